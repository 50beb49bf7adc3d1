"""Engines without a trainer: to score a model, or to talk to it."""

import asyncio
import sys
import tempfile
import time
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from megatron_sdpo.chat import Chat
from megatron_sdpo.config import Config
from megatron_sdpo.evaluate import evaluate
from megatron_sdpo.launch.local import POLL_S, Interrupted, RoleDied, signals_raise
from megatron_sdpo.launch.roles import words_of_end
from megatron_sdpo.launch.run_dir import RunDir
from megatron_sdpo.rollout.client import EngineClient
from megatron_sdpo.rollout.control import EngineError
from megatron_sdpo.rollout.fleet import Ended, Fleet
from megatron_sdpo.rollout.sampler import Sampler
from megatron_sdpo.sandbox import lent
from megatron_sdpo.tasks import load_task
from megatron_sdpo.types import Evaluation

R = TypeVar("R")
NOTICE_S = 2.0
"""A request that fails may be the first sign of an engine's end; so long that is waited for."""


async def evaluate_model(config: Config) -> Evaluation:
    """Held-out scores of ``config.model`` by a fleet of its own, whose files are thrown away.

    Scores and transcripts are kept in ``config.run_dir`` (report/evaluation.py); the table goes to standard error.
    """
    from megatron_sdpo.report.evaluation import EvaluationRecord  # loads matplotlib

    task = load_task(config.task.name, **config.task.options)
    with tempfile.TemporaryDirectory() as folder, lent(task, config.sandbox):
        run_dir = RunDir(Path(folder))
        run_dir.prepare(config)
        with Fleet(config, run_dir.path, run_dir.token(), alone=True) as fleet:
            assert fleet.router is not None
            async with EngineClient([fleet.router], run_dir.token(), config.engine.patience_s) as client:
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
                scoring = evaluate(sampler, task.eval_questions(), config.evaluation, 0, record.add)
                evaluation = await while_engines_last(fleet, scoring, f"what was answered is in {record.folder}")
    print(f"{record.finish(config)}\nscores and transcripts are in {record.folder}", file=sys.stderr)
    return evaluation


def serve_model(config: Config) -> None:
    """Engines of ``config.model`` until Ctrl-C or SIGTERM; raises RoleDied when one is lost and cannot be replaced."""
    run_dir = RunDir(Path(config.run_dir))
    with run_dir.locked(), suppress(Interrupted), signals_raise():
        run_dir.prepare(config)
        with Fleet(config, run_dir.path, run_dir.token(), alone=True, text=True) as fleet:
            for address in {a.name: a for a in (*fleet.engines, fleet.router) if a}.values():
                print(f"{address.name} {address.url}")
            print(f"token in {run_dir.token_file}; Ctrl-C stops", flush=True)
            while not (lost := fleet.tend()):
                time.sleep(POLL_S)
            raise _died(lost[0], "all engines were stopped")


async def while_engines_last(fleet: Fleet, work: Coroutine[Any, Any, R], stopped: str) -> R:
    """What ``work`` returns. Engines that end or hang meanwhile are replaced; RoleDied, with the words of what
    ``stopped`` means, when that cannot be."""
    task = asyncio.create_task(work)
    try:
        while not task.done():
            for ended in fleet.tend():
                raise _died(ended, stopped)
            await asyncio.wait([task], timeout=POLL_S)
        return task.result()
    except BaseExceptionGroup as failures:
        if (failure := _first(failures)) is None:
            raise
        for ended in await _lost(fleet):
            raise _died(ended, stopped) from failure
        raise failure from None
    finally:
        task.cancel()
        await asyncio.wait([task])


async def _lost(fleet: Fleet) -> tuple[Ended, ...]:
    """Engines that have ended by now, or do so in a moment."""
    deadline = time.monotonic() + NOTICE_S
    while not (lost := fleet.dead()) and time.monotonic() < deadline:
        await asyncio.sleep(POLL_S)
    return lost


def _first(failures: BaseExceptionGroup[BaseException]) -> EngineError | None:
    """Of the requests that failed."""
    failure: BaseException = failures
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    return failure if isinstance(failure, EngineError) else None


def _died(ended: Ended, stopped: str) -> RoleDied:
    return RoleDied(words_of_end(ended.name, ended.exit_code, stopped, ended.log_tail))
