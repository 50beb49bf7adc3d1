"""The coordinator's process of a discovery: ``python -m megatron_sdpo.launch.discovery_coordinator RUN_DIR``."""

import asyncio

from megatron_sdpo import config as configuration
from megatron_sdpo.chat import Chat
from megatron_sdpo.config import Config
from megatron_sdpo.discovery import Trials
from megatron_sdpo.discovery.progress import Console
from megatron_sdpo.discovery.record import TrialFiles, planned
from megatron_sdpo.launch.role import play
from megatron_sdpo.launch.run_dir import RunDir, wait_for
from megatron_sdpo.rollout.client import EngineClient
from megatron_sdpo.rollout.fleet_files import read_address
from megatron_sdpo.rollout.sampler import Sampler
from megatron_sdpo.rollout.wire import serve
from megatron_sdpo.sandbox import lent
from megatron_sdpo.tasks import load_task
from megatron_sdpo.types import Task


async def run(run_dir: RunDir) -> None:
    """Serve the trainer until this process is ended."""
    config = configuration.load(run_dir.config)
    task = load_task(config.task.name, **config.task.options)
    with lent(task, config.sandbox):
        await _serve(run_dir, config, task)


async def _serve(run_dir: RunDir, config: Config, task: Task) -> None:
    token = run_dir.token()
    tokens, files = Chat(config.model.path, config.model.thinking), TrialFiles(run_dir.trials)
    questions = task.train_questions()[: config.discovery.questions]
    plan = planned(config, len(questions))
    router = wait_for(lambda: read_address(run_dir.path, "router"), "the engines", config.engine.start_timeout_s)
    console = Console(len(plan), sum(map(files.has, plan)), config.discovery.budget)
    try:
        async with EngineClient([router], token, config.engine.patience_s) as client:
            sampler = Sampler(client, tokens, task, config.rollout.max_new_tokens, config.rollout.verify_workers)
            trials = Trials(config, questions, tokens, sampler, run_dir.attempts, files, console)
            await serve(
                config.engine.host,
                token,
                {
                    "baselines": trials.baselines,
                    "next_trial": trials.next_trial,
                    "batch": trials.batch,
                    "trained": trials.trained,
                },
                listening=lambda url: run_dir.publish_address("coordinator", url),
                lives=lambda beat: run_dir.publish_address("coordinator-beat", str(beat)),
            )
    finally:
        console.close()


if __name__ == "__main__":
    play("coordinator", lambda run_dir: asyncio.run(run(run_dir)))
