"""The coordinator's process: ``python -m megatron_sdpo.launch.coordinator RUN_DIR``."""

import asyncio
import dataclasses
import os
from collections.abc import Callable
from functools import partial

from megatron_sdpo import config as configuration
from megatron_sdpo.chat import Chat
from megatron_sdpo.config import Config
from megatron_sdpo.evaluate import evaluate
from megatron_sdpo.launch.observation import DrawnSampler, drawn, timeline_of
from megatron_sdpo.launch.role import play
from megatron_sdpo.launch.roles import HOST
from megatron_sdpo.launch.run_dir import RunDir, wait_for
from megatron_sdpo.loop import make_batch
from megatron_sdpo.rollout.client import EngineClient
from megatron_sdpo.rollout.fleet_files import read_address, read_replacements
from megatron_sdpo.rollout.journal import Journal
from megatron_sdpo.rollout.prompts import PromptStream, check_lengths
from megatron_sdpo.rollout.sampler import Sampler
from megatron_sdpo.rollout.wire import Handler, Kind, serve
from megatron_sdpo.sandbox import lent
from megatron_sdpo.tasks import load_task
from megatron_sdpo.types import Batch, Evaluation, Task


class Coordinator:
    """Makes batches as far ahead as ``rollout.max_staleness`` allows, and evaluates on request.

    ``replaced`` counts the engines that have been replaced since the run was started.
    """

    def __init__(
        self,
        config: Config,
        task: Task,
        tokens: Chat,
        sampler: Sampler,
        journal: Journal,
        replaced: Callable[[], int] = lambda: 0,
    ) -> None:
        self._config, self._tokens, self._sampler, self._journal = config, tokens, sampler, journal
        self._replaced = replaced
        self._prompts = PromptStream(task.train_questions(), config.rollout.prompts_per_step, config.seed)
        self._held_out = task.eval_questions()
        self._batches: dict[int, asyncio.Task[Batch]] = {}
        self._last: asyncio.Task[Batch] | None = None

    async def published(self, version: int) -> None:
        """The engines serve ``version``: the batches that may now be made are started, in order."""
        self._batches = {step: task for step, task in self._batches.items() if step >= version}
        ahead = min(version + self._config.rollout.max_staleness, self._config.steps - 1)
        for step in range(version, ahead + 1):
            if step not in self._batches:
                self._last = self._batches[step] = asyncio.create_task(self._make(step, self._last))

    async def batch(self, step: int) -> Batch:
        """The batch of a step that ``published`` has allowed."""
        return await self._batches[step]

    async def evaluate(self, version: int) -> Evaluation:
        return await evaluate(self._sampler, self._held_out, self._config.evaluation, version)

    async def _make(self, step: int, before: asyncio.Task[Batch] | None) -> Batch:
        if before is not None:
            await before
        batch = await make_batch(step, self._config, self._prompts, self._sampler, self._journal, self._tokens)
        replaced = {"rollout/engines_replaced": float(self._replaced())}
        return dataclasses.replace(batch, metrics={**batch.metrics, **replaced})


async def run(run_dir: RunDir) -> None:
    """Serve the trainer until this process is ended."""
    config = configuration.load(run_dir.config)
    task = load_task(config.task.name, **config.task.options)
    with lent(task, config.sandbox):
        await _serve(run_dir, config, task)


async def _serve(run_dir: RunDir, config: Config, task: Task) -> None:
    token = run_dir.token()
    tokens = Chat(config.model.path, config.model.thinking)
    questions = [*task.train_questions(), *task.eval_questions()]
    check_lengths(questions, tokens, config.rollout.max_new_tokens, config.model.max_length)
    router = wait_for(lambda: read_address(run_dir.path, "router"), "the engines", config.engine.start_timeout_s)
    async with EngineClient([router], token, config.engine.patience_s) as client:
        timeline = timeline_of(config, run_dir, "coordinator")
        sampler = (Sampler if timeline is None else partial(DrawnSampler, timeline))(
            client, tokens, task, config.rollout.max_new_tokens, config.rollout.verify_workers, config.sampling_seed
        )
        coordinator = Coordinator(
            config, task, tokens, sampler, Journal(run_dir.attempts), lambda: read_replacements(run_dir.path)
        )
        handlers: dict[Kind, Handler] = {
            "batch": coordinator.batch,
            "evaluate": coordinator.evaluate,
            "published": coordinator.published,
        }
        await serve(
            os.environ.get(HOST, config.engine.host),
            token,
            drawn(handlers, timeline),
            listening=lambda url: run_dir.publish_address("coordinator", url),
            lives=lambda beat: run_dir.publish_address("coordinator-beat", str(beat)),
        )


if __name__ == "__main__":
    play("coordinator", lambda run_dir: asyncio.run(run(run_dir)))
