"""A trainer rank's process: ``torchrun ... -m megatron_sdpo.launch.trainer RUN_DIR``."""

import gc
import os
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import torch.distributed as dist

from megatron_sdpo import config as configuration
from megatron_sdpo.chat import Chat
from megatron_sdpo.config import Config
from megatron_sdpo.launch.agreement import check_agreement
from megatron_sdpo.launch.observation import TrainerObservation
from megatron_sdpo.launch.role import play
from megatron_sdpo.launch.run_dir import RunDir, wait_for
from megatron_sdpo.launch.status import note_stopped, stop_requested
from megatron_sdpo.launch.stragglers import OwnWork, StragglerLog
from megatron_sdpo.launch.watchdog import Watchdog
from megatron_sdpo.loop import as_batch, train
from megatron_sdpo.mcore import checkpoint
from megatron_sdpo.mcore import groups as parallel
from megatron_sdpo.mcore.finite import StoppedError
from megatron_sdpo.mcore.groups import ParallelGroups
from megatron_sdpo.mcore.hf import canonical_parameters, save_hf
from megatron_sdpo.mcore.learner import Learner
from megatron_sdpo.phases import Phases
from megatron_sdpo.reshard.publish import Publisher
from megatron_sdpo.reshard.quantize import quantized
from megatron_sdpo.reshard.transport import own_address
from megatron_sdpo.rollout.control import EngineControl
from megatron_sdpo.rollout.fleet_files import RunningFleet
from megatron_sdpo.rollout.journal import Journal
from megatron_sdpo.rollout.wire import Argument, CoordinatorClient, Kind
from megatron_sdpo.tracking import Tracker
from megatron_sdpo.types import Batch, BatchSource, EngineAddress, Evaluation, WeightsPublisher, encode

COLLECTIVE_TIMEOUT_S = 7200.0
"""Ranks wait in a collective while rank 0 waits for generation, which may take long; the watchdog bounds the rest."""


class SharedCoordinator:
    """The coordinator as all ranks see it: rank 0 asks, everybody gets the answer."""

    def __init__(self, client: CoordinatorClient | None, groups: ParallelGroups) -> None:
        self._client, self._groups = client, groups

    def _as_first_rank(self, value: Callable[[], Any]) -> Any:
        """What the first rank finds, on every rank."""
        box: list[Any] = [value() if self._client is not None else None]
        dist.broadcast_object_list(box, src=0, group=self._groups.world)
        return box[0]

    def _ask(self, kind: Kind, argument: Argument, answer: Any) -> Any:
        """The answer, of the type ``answer``."""
        client = self._client
        return msgspec.msgpack.decode(self._as_first_rank(lambda: client and client.ask(kind, argument)), type=answer)


class SharedSource(SharedCoordinator):
    """The coordinator of a training run (types.BatchSource)."""

    def batch(self, step: int) -> Batch:
        return self._ask("batch", step, Batch)

    def evaluate(self, version: int) -> Evaluation:
        return self._ask("evaluate", version, Evaluation)

    def published(self, version: int) -> None:
        self._ask("published", version, type(None))


class JournalSource:
    """The batches that another run has journalled (types.BatchSource); every rank makes them for itself."""

    def __init__(self, config: Config, journal: Journal) -> None:
        self._config, self._journal, self._tokens = config, journal, Chat(config.model.path, config.model.thinking)

    def batch(self, step: int) -> Batch:
        groups = self._journal.groups(step)
        cursor = (step + 1) * self._config.rollout.prompts_per_step
        return as_batch(step, [groups[slot] for slot in sorted(groups)], self._config, self._tokens, {}, cursor)

    def evaluate(self, version: int) -> Evaluation:
        raise RuntimeError("a journal cannot be evaluated")

    def published(self, version: int) -> None:
        pass


class NoEngines:
    """Where there is nobody to send weights to (types.WeightsPublisher)."""

    def publish(self, version: int) -> dict[str, float]:
        return {}

    def release(self) -> None:
        pass

    def close(self) -> None:
        pass


class StopRequestedError(Exception):
    """The run was asked to stop, and its state is on disk."""


class DueCheckpoints:
    """Saves every ``checkpoint.every`` steps and after the last (types.Checkpoints); all ranks call in step.

    When the run was asked to stop it saves at once, and raises StopRequestedError on all ranks when that is complete.

    ``time/checkpoint_background`` is how long writing took beside training, in the row of the step in which the
    checkpoint got its name.
    """

    def __init__(self, config: Config, learner: Learner, run_dir: RunDir) -> None:
        self._config, self._learner, self._run_dir = config, learner, run_dir
        self._saver = checkpoint.Saver(learner, run_dir.checkpoints, config.checkpoint)
        self._journal = Journal(run_dir.attempts)

    def save_if_due(self, cursor: int) -> dict[str, float]:
        step, every = self._learner.step, self._config.checkpoint.every
        stops = step < self._config.steps and self._stop_requested()
        due = stops or step % every == 0 or step == self._config.steps
        seconds = self._saver.poll(wait=due)
        if due:
            self._saver.begin(cursor, self._journal.counts(step - 1) if self._learner.groups.rank == 0 else {})
        if stops:
            self.finish()
            raise StopRequestedError
        return {} if seconds is None else {"time/checkpoint_background": seconds}

    def finish(self) -> None:
        self._saver.poll(wait=True)

    def _stop_requested(self) -> bool:
        """What the first rank sees counts: file systems show a file here sooner than there."""
        groups = self._learner.groups
        box = [groups.rank == 0 and stop_requested(self._run_dir) is not None]
        dist.broadcast_object_list(box, src=0, group=groups.world)
        return box[0]


def run(run_dir: RunDir) -> None:
    """Build the parts, resume, train, export."""
    config, token = configuration.load(run_dir.config), run_dir.token()
    watchdog = watchdog_of(config, run_dir)
    own_work, observation = OwnWork(), TrainerObservation(config, run_dir, own_rank())
    phases = Phases([watchdog, own_work, *observation.followers])
    with phases("start"):
        groups = start(config)
    with phases("build"):
        learner = Learner(config, groups)
        observation.watch(learner)
    with phases("resume"):
        resumed = checkpoint.load_latest(learner, run_dir.checkpoints)
    tracker = Tracker(config, run_dir.path, is_writer=groups.rank == 0)
    tracker.truncate_after(learner.step if resumed else -1)
    with phases("wait"):
        source, publisher = _around(learner, run_dir, config, token, observation)
    phases.taken()  # no step took these times
    phases.step = learner.step
    if resumed and groups.rank == 0:
        print("\n".join(resumed_words(resumed, Journal(run_dir.attempts))), flush=True)
    checkpoints = DueCheckpoints(config, learner, run_dir)
    rows = StragglerLog(config.ranks, groups, own_work, tracker)
    gc.collect()
    gc.freeze()  # a full collection looks through all modules, a quarter of a second, on one rank while the others wait
    try:
        train(config, source, learner, publisher, checkpoints, rows, phases)
    except StoppedError as failure:  # on all ranks
        with phases("stop"):
            checkpoints.finish()
            raise kept(failure, run_dir, groups) from failure
    except StopRequestedError:  # on all ranks
        if groups.rank == 0:
            note_stopped(run_dir, learner.step)
    else:
        with phases("export"):
            save_hf(learner.model, run_dir.exported, groups, config.layout, config.model.path)
    publisher.close()
    tracker.close()
    observation.close()
    watchdog.close()
    parallel.shutdown()


def watchdog_of(config: Config, run_dir: RunDir) -> Watchdog:
    """Of this process, which torchrun has told its rank, or which is alone."""
    return Watchdog(config, run_dir, own_rank(), int(os.environ.get("WORLD_SIZE", "1")))


def own_rank() -> int:
    """As torchrun says, before the ranks have met."""
    return int(os.environ.get("RANK", "0"))


def start(config: Config) -> ParallelGroups:
    """The ranks meet, find that they are of one mind, and take their places; every generator is at the seed."""
    random.seed(config.seed)  # nobody is known to draw from these two, but a checkpoint keeps them
    np.random.seed(config.seed)
    torch.use_deterministic_algorithms(config.deterministic)
    parallel.start_world(COLLECTIVE_TIMEOUT_S)
    check_agreement(config)
    return parallel.initialize(config.layout, config.seed, COLLECTIVE_TIMEOUT_S)


def _around(
    learner: Learner, run_dir: RunDir, config: Config, token: str, observation: TrainerObservation
) -> tuple[BatchSource, WeightsPublisher]:
    """Where batches come from and weights go to."""
    if config.debug.from_journal is not None:
        return JournalSource(config, Journal(Path(config.debug.from_journal))), NoEngines()
    client = connect(run_dir, config, token, learner.groups)
    return SharedSource(client, learner.groups), publisher_for(learner, run_dir, config, token, observation.control)


def resumed_words(resumed: checkpoint.Resumed, journal: Journal) -> list[str]:
    """What a run that goes on should know, a line each."""
    lines = [f"a damaged checkpoint was set aside: {sentence}" for sentence in resumed.refused]
    now = journal.counts(resumed.step - 1)
    for step, count in resumed.journal.items():
        if now.get(step, 0) < count:
            what = "trained on already" if step < resumed.step else "to be sampled again"
            lines.append(f"the journal of step {step} has lost {count - now.get(step, 0)} of {count} groups ({what})")
    ahead = {step: count for step, count in now.items() if step >= resumed.step}
    words = f"; journalled ahead of it: {sum(ahead.values())} groups of {len(ahead)} steps" if ahead else ""
    return [*lines, f"resumed from the checkpoint of step {resumed.step}{words}"]


def connect(run_dir: RunDir, config: Config, token: str, groups: ParallelGroups) -> CoordinatorClient | None:
    """Rank 0's line to the coordinator; all ranks leave together, when the engines' addresses are there too."""
    client = None
    if groups.rank == 0:
        # The coordinator listens once the engines serve, so all addresses are there then.
        url = wait_for(run_dir.coordinator_address, "the coordinator", config.engine.start_timeout_s)
        client = CoordinatorClient(url, token, run_dir.coordinator_beat, config.ranks.timeout_s)
    dist.barrier(group=groups.world)
    return client


def publisher_for(
    learner: Learner,
    run_dir: RunDir,
    config: Config,
    token: str,
    control: Callable[[EngineAddress, str, float], EngineControl] = EngineControl,
) -> Publisher:
    """Sends the learner's weights to the engines of the run."""
    fleet = RunningFleet(run_dir.path, lambda address: control(address, token, config.publish.timeout_s))
    found = wait_for(lambda: fleet.all_of(config.engine.count), "the engines", config.engine.start_timeout_s)
    engines = [fleet.control(address) for address in found]
    in_fp8 = config.engine.fp8 != "off"

    def probe_log_probs(ids: Sequence[int]) -> list[float]:
        """As close to what the engines compute as this model can come."""
        with learner.precision.of(config.fp8.student if in_fp8 else "off"):
            return learner.log_probs(ids)

    return Publisher(
        config.publish,
        learner.hf_config,
        learner.groups,
        canonical_parameters(learner.model, learner.groups),
        engines,
        own_address(engines[0].address.url),
        probe_log_probs,
        fleet,
        partial(quantized, learner.hf_config, config.fp8.high_precision_layers) if in_fp8 else None,
        config.engine.release_memory,
    )


def kept(failure: StoppedError, run_dir: RunDir, groups: ParallelGroups) -> StoppedError:
    """The failure with its batch on disk, and a message that says where; all ranks call this."""
    path = run_dir.failure(failure.batch.step)
    if groups.rank == 0:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(failure.batch))
    dist.barrier(group=groups.world)  # the first rank to end takes the others with it
    return type(failure)(f"{failure}; the batch is in {path}", failure.batch)


if __name__ == "__main__":  # checkpoint writers start a process which imports this module again
    play("trainer", run)
