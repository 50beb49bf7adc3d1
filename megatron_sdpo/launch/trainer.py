"""A trainer rank's process: ``torchrun ... -m megatron_sdpo.launch.trainer RUN_DIR``."""

from pathlib import Path
from typing import Any

import msgspec
import torch.distributed as dist

from megatron_sdpo import config as configuration
from megatron_sdpo.config import Config
from megatron_sdpo.launch.role import play
from megatron_sdpo.launch.run_dir import RunDir, wait_for
from megatron_sdpo.loop import train
from megatron_sdpo.mcore import checkpoint
from megatron_sdpo.mcore import groups as parallel
from megatron_sdpo.mcore.finite import NonFiniteError
from megatron_sdpo.mcore.groups import ParallelGroups
from megatron_sdpo.mcore.hf import canonical_parameters, save_hf
from megatron_sdpo.mcore.learner import Learner
from megatron_sdpo.reshard.publish import Publisher
from megatron_sdpo.rollout.control import EngineControl
from megatron_sdpo.rollout.fleet import read_engines
from megatron_sdpo.rollout.wire import Argument, CoordinatorClient, Kind
from megatron_sdpo.tracking import Tracker
from megatron_sdpo.types import Batch, Evaluation, encode

COLLECTIVE_TIMEOUT_S = 7200.0
"""Ranks wait in a collective while rank 0 waits for generation, which may take long."""


class SharedCoordinator:
    """The coordinator as all ranks see it: rank 0 asks, everybody gets the answer."""

    def __init__(self, client: CoordinatorClient | None, groups: ParallelGroups) -> None:
        self._client, self._groups = client, groups

    def _ask(self, kind: Kind, argument: Argument, answer: Any) -> Any:
        """The answer, of the type ``answer``."""
        box: list[Any] = [self._client.ask(kind, argument) if self._client is not None else None]
        dist.broadcast_object_list(box, src=0, group=self._groups.world)
        return msgspec.msgpack.decode(box[0], type=answer)


class SharedSource(SharedCoordinator):
    """The coordinator of a training run (types.BatchSource)."""

    def batch(self, step: int) -> Batch:
        return self._ask("batch", step, Batch)

    def evaluate(self, version: int) -> Evaluation:
        return self._ask("evaluate", version, Evaluation)

    def published(self, version: int) -> None:
        self._ask("published", version, type(None))


class DueCheckpoints:
    """Saves every ``checkpoint.every`` steps and after the last."""

    def __init__(self, config: Config, learner: Learner, folder: Path) -> None:
        self._config, self._learner, self._folder = config, learner, folder

    def save_if_due(self, cursor: int) -> None:
        step, every = self._learner.step, self._config.checkpoint.every
        if step % every == 0 or step == self._config.steps:
            checkpoint.save(self._learner, self._folder, cursor, self._config.checkpoint.keep)


def run(run_dir: RunDir) -> None:
    """Build the parts, resume, train, export."""
    config, token = configuration.load(run_dir.config), run_dir.token()
    groups = parallel.initialize(config.layout, config.seed, COLLECTIVE_TIMEOUT_S)
    learner = Learner(config, groups)
    resumed = checkpoint.load_latest(learner, run_dir.checkpoints)
    tracker = Tracker(config, run_dir.path, is_writer=groups.rank == 0)
    tracker.truncate_after(learner.step if resumed else -1)
    client = connect(run_dir, config, token, groups)
    if resumed and groups.rank == 0:
        print(f"resumed from the checkpoint of step {resumed.step}", flush=True)
    publisher = publisher_for(learner, run_dir, config, token)
    try:
        train(
            config,
            SharedSource(client, groups),
            learner,
            publisher,
            DueCheckpoints(config, learner, run_dir.checkpoints),
            tracker,
        )
    except NonFiniteError as failure:
        raise kept(failure, run_dir, groups) from failure
    save_hf(learner.model, run_dir.exported, groups, config.layout, config.model.path)
    publisher.close()
    tracker.close()
    parallel.shutdown()


def connect(run_dir: RunDir, config: Config, token: str, groups: ParallelGroups) -> CoordinatorClient | None:
    """Rank 0's line to the coordinator; all ranks leave together, when the engines' addresses are there too."""
    client = None
    if groups.rank == 0:
        # The coordinator listens once the engines serve, so all addresses are there then.
        url = wait_for(
            lambda: _read(run_dir.addresses / "coordinator"), "the coordinator", config.engine.start_timeout_s
        )
        client = CoordinatorClient(url, token)
    dist.barrier(group=groups.world)
    return client


def publisher_for(learner: Learner, run_dir: RunDir, config: Config, token: str) -> Publisher:
    """Sends the learner's weights to the engines of the run."""
    engines = [EngineControl(a, token, config.publish.timeout_s) for a in read_engines(run_dir.path)]
    return Publisher(
        config.publish,
        learner.hf_config,
        learner.groups,
        canonical_parameters(learner.model),
        engines,
        config.engine.host,
        learner.log_probs,
    )


def kept(failure: NonFiniteError, run_dir: RunDir, groups: ParallelGroups) -> NonFiniteError:
    """The failure with its batch on disk, and a message that says where; all ranks call this."""
    path = run_dir.failures / f"step-{failure.batch.step:08d}.msgpack"
    if groups.rank == 0:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(failure.batch))
    dist.barrier(group=groups.world)  # the first rank to end takes the others with it
    return NonFiniteError(f"{failure}; the batch is in {path}", failure.batch)


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None


if __name__ == "__main__":  # checkpoint writers start a process which imports this module again
    play("trainer", run)
