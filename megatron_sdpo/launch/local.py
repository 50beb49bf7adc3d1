"""All roles of a run on this machine: started together, watched, stopped together."""

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from megatron_sdpo.config import Config, ConfigError
from megatron_sdpo.launch.roles import POLL_S, Role, RoleDied, environment, start_role, stop_roles, words_of_end
from megatron_sdpo.launch.run_dir import RunDir
from megatron_sdpo.launch.status import forget_stop, has_stopped, stop_requested
from megatron_sdpo.rollout import lifeline
from megatron_sdpo.rollout.cpu_platform import has_cuda
from megatron_sdpo.rollout.fleet import Fleet, Share
from megatron_sdpo.rollout.fleet_files import log_tail
from megatron_sdpo.timeline import write_timeline


class Interrupted(RuntimeError):
    """A signal, or a request in the run directory, asked the run to stop. ``number`` is the signal's."""

    def __init__(self, number: int, by: str | None = None) -> None:
        who = by or signal.Signals(number).name
        super().__init__(f"stopped by {who}; the same command continues from the last checkpoint")
        self.number = number


@dataclass(frozen=True, slots=True)
class Program:
    """What runs as coordinator and as trainer, and whose standard output is the console's."""

    coordinator: str
    trainer: str
    speaker: str
    afterwards: str = "the same command continues from the last checkpoint"
    """What a user should know when it has failed."""


TRAINING = Program("megatron_sdpo.launch.coordinator", "megatron_sdpo.launch.trainer", "trainer")
DISCOVERY = Program(
    "megatron_sdpo.launch.discovery_coordinator", "megatron_sdpo.launch.discovery_trainer", "coordinator"
)
REPLAY = Program("", "megatron_sdpo.launch.replay_trainer", "trainer", "the run itself was only read")
"""Without a coordinator: ``debug.from_journal`` must be set."""


def run_locally(config: Config, run_dir: RunDir, program: Program = TRAINING) -> None:
    """Run to the end. Raises RoleDied or Interrupted after everything has been stopped; nothing stays behind.

    The roles end with this process even when it is killed outright.
    """
    share = Share(
        range(config.engine.count), config.engine.host, first_gpu=first_gpu_of_engines(config, gpus_of_torch())
    )
    with run_dir.locked(), signals_raise():
        run_dir.prepare(config)
        forget_stop(run_dir)
        lifeline_was = os.environ.get(lifeline.PARENT)
        roles: list[Role] = []
        fleet = Fleet(config, run_dir.path, run_dir.token(), share)
        try:
            os.environ[lifeline.PARENT] = str(os.getpid())
            own = _local_environment(config)
            # Trainer and coordinator load while the engines do.
            for name, command in _commands(program, run_dir, config).items():
                roles.append(start_role(name, command, run_dir, own, speaks=name == program.speaker))
            if config.debug.from_journal is None:
                fleet.start()
            _watch(roles, fleet, run_dir, f"all roles were stopped, {program.afterwards}")
            if has_stopped(run_dir):
                raise Interrupted(signal.SIGTERM, by=f"request ({stop_requested(run_dir)})")
        finally:
            stop_roles(roles)
            fleet.stop()
            _restore(lifeline_was)
            write_timeline(run_dir.path)


def gpus_here() -> int:
    """GPUs of this machine that its programs may see, without asking torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() and name.strip() != "-1"])
    return len([path for path in Path("/dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()])


def gpus_of_torch() -> int:
    """The same, 0 where torch cannot use them: a CPU build beside GPUs runs as on a machine without them.

    Torch, whose import takes seconds, is asked only where there are some.
    """
    count = gpus_here()
    return count if count and has_cuda() else 0


def first_gpu_of_engines(config: Config, gpus: int) -> int:
    """The engines' GPUs follow those of the trainer's ranks. Where there are fewer, and ``publish.backend`` is ipc
    or gloo, they are the trainer's own; else ConfigError. 0 on a machine without GPUs."""
    ranks, engines = config.layout.world_size, config.engine.count * config.engine.tensor_parallel
    if config.debug.from_journal is not None or config.debug.rollout_only:
        return 0
    if not gpus:
        if config.publish.backend == "nccl":
            raise ConfigError("publish.backend=nccl goes from GPU to GPU, and torch sees none here; set it to auto")
        return 0
    if config.engine.release_memory:  # they are to be shared, then, however many there are
        if gpus >= max(ranks, engines):
            return 0
    elif gpus >= ranks + engines:
        return ranks
    elif config.publish.backend in ("ipc", "gloo") and gpus >= max(ranks, engines):
        return 0
    raise ConfigError(
        f"{ranks} trainer rank(s) and {engines} GPU(s) of engines are more than the {gpus} GPU(s) here; lower"
        " layout.world_size or engine.count, or, for both on the same GPUs, set publish.backend=ipc"
    )


def _commands(program: Program, run_dir: RunDir, config: Config) -> dict[str, list[str]]:
    coordinator = [sys.executable, "-m", program.coordinator, str(run_dir.path)]
    torchrun = ["megatron_sdpo.launch.torchrun", "--standalone", f"--nproc-per-node={config.layout.world_size}", "-m"]
    trainer = [sys.executable, "-m", *torchrun, program.trainer, str(run_dir.path)]
    if config.debug.from_journal is not None:
        return {"trainer": trainer}
    if config.debug.rollout_only:
        trainer = [sys.executable, "-m", "megatron_sdpo.launch.rollout_only", str(run_dir.path)]
    return {"coordinator": coordinator, "trainer": trainer}


def _local_environment(config: Config) -> dict[str, str]:
    own = environment(config)
    if config.engine.host in ("127.0.0.1", "localhost"):
        own["GLOO_SOCKET_IFNAME"] = "lo"
    return own


def _watch(roles: Sequence[Role], fleet: Fleet, run_dir: RunDir, stopped: str) -> None:
    """Until the trainer has finished; any other end is RoleDied, with the words of what ``stopped`` means."""
    trainer = next(role for role in roles if role.name == "trainer")
    while trainer.process.poll() != 0:
        for ended in fleet.tend():
            raise RoleDied(words_of_end(ended.name, ended.exit_code, stopped, ended.log_tail))
        for role in roles:
            code = role.process.poll()
            if code is not None:
                why = run_dir.failure_of(role.name) or log_tail(role.log)
                raise RoleDied(words_of_end(role.name, code, stopped, why))
        # A stopped rank does not obey torchrun, which would wait for it: what is to be said has been said.
        if run_dir.hung.exists() and (why := run_dir.failure_of(trainer.name)):
            raise RoleDied(f"trainer hung; {stopped}.\n{why}")
        time.sleep(POLL_S)


@contextmanager
def signals_raise() -> Iterator[None]:
    """SIGINT and SIGTERM raise Interrupted in the main thread within the block."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _restore(lifeline_was: str | None) -> None:
    if lifeline_was is None:
        os.environ.pop(lifeline.PARENT, None)
    else:
        os.environ[lifeline.PARENT] = lifeline_was
