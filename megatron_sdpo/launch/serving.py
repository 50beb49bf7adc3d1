"""Engines without a trainer: to score a model, or to talk to it."""

import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from megatron_sdpo.chat import Chat
from megatron_sdpo.config import Config
from megatron_sdpo.evaluate import evaluate
from megatron_sdpo.launch.local import POLL_S, Interrupted, RoleDied, signals_raise
from megatron_sdpo.launch.run_dir import RunDir
from megatron_sdpo.rollout.client import EngineClient
from megatron_sdpo.rollout.fleet import Fleet
from megatron_sdpo.rollout.sampler import Sampler
from megatron_sdpo.tasks import load_task
from megatron_sdpo.types import Evaluation


async def evaluate_model(config: Config) -> Evaluation:
    """Held-out scores of ``config.model`` by a fleet of its own, whose files are thrown away.

    Scores and transcripts are kept in ``config.run_dir`` (report/evaluation.py); the table goes to standard error.
    """
    from megatron_sdpo.report.evaluation import EvaluationRecord  # loads matplotlib

    task = load_task(config.task.name, **config.task.options)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = RunDir(Path(folder))
        run_dir.prepare(config)
        with Fleet(config, run_dir.path, run_dir.token()) as fleet:
            assert fleet.router is not None
            async with EngineClient([fleet.router], run_dir.token(), config.engine.request_timeout_s) as client:
                tokens = Chat(config.model.path, config.model.thinking)
                sampler = Sampler(
                    client,
                    tokens,
                    task,
                    config.rollout.max_new_tokens,
                    config.rollout.verify_workers,
                    config.sampling_seed,
                )
                record = EvaluationRecord(Path(config.run_dir))
                evaluation = await evaluate(sampler, task.eval_questions(), config.evaluation, 0, record.add)
    print(f"{record.finish(config)}\nscores and transcripts are in {record.folder}", file=sys.stderr)
    return evaluation


def serve_model(config: Config) -> None:
    """Engines of ``config.model`` until Ctrl-C or SIGTERM; raises RoleDied when one of them ends by itself."""
    run_dir = RunDir(Path(config.run_dir))
    with run_dir.locked(), suppress(Interrupted), signals_raise():
        run_dir.prepare(config)
        with Fleet(config, run_dir.path, run_dir.token()) as fleet:
            for address in {a.name: a for a in (*fleet.engines, fleet.router) if a}.values():
                print(f"{address.name} {address.url}")
            print(f"token in {run_dir.token_file}; Ctrl-C stops", flush=True)
            while not (ended := fleet.dead()):
                time.sleep(POLL_S)
            raise RoleDied(f"{ended[0].name} ended with exit code {ended[0].exit_code}\n{ended[0].log_tail}")
