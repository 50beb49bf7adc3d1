"""All roles of a run on this machine: started together, watched, stopped together."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import megatron_sdpo
from megatron_sdpo.config import Config
from megatron_sdpo.launch.run_dir import RunDir
from megatron_sdpo.rollout import lifeline
from megatron_sdpo.rollout.fleet import GRACE_S, Fleet, log_tail
from megatron_sdpo.timeline import write_timeline

POLL_S = 0.2
GPU_DETERMINISM = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NCCL_ALGO": "Ring",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
}
"""What the libraries want to be told before a trainer starts; not yet run on a GPU."""


class RoleDied(RuntimeError):
    """A role ended before the run was finished; the message names it and shows the end of its log."""


class Interrupted(RuntimeError):
    """A signal asked the run to stop. ``number`` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(number).name}; the same command continues from the last checkpoint"
        )
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


@dataclass(frozen=True, slots=True)
class _Role:
    name: str
    process: subprocess.Popen[bytes]
    log: Path


def run_locally(config: Config, run_dir: RunDir, program: Program = TRAINING) -> None:
    """Run to the end. Raises RoleDied or Interrupted after everything has been stopped; nothing stays behind.

    The roles end with this process even when it is killed outright.
    """
    with run_dir.locked(), signals_raise():
        run_dir.prepare(config)
        lifeline_was = os.environ.get(lifeline.PARENT)
        roles: list[_Role] = []
        fleet = Fleet(config, run_dir.path, run_dir.token())
        try:
            os.environ[lifeline.PARENT] = str(os.getpid())
            # Trainer and coordinator load while the engines do.
            for name, command in _commands(program, run_dir, config).items():
                roles.append(_start(name, command, run_dir, config, speaks=name == program.speaker))
            if config.debug.from_journal is None:
                fleet.start()
            _watch(roles, fleet, run_dir, f"all roles were stopped, {program.afterwards}")
        finally:
            _stop(roles)
            fleet.stop()
            _restore(lifeline_was)
            write_timeline(run_dir.path)


def _commands(program: Program, run_dir: RunDir, config: Config) -> dict[str, list[str]]:
    coordinator = [sys.executable, "-m", program.coordinator, str(run_dir.path)]
    torchrun = ["megatron_sdpo.launch.torchrun", "--standalone", f"--nproc-per-node={config.layout.world_size}", "-m"]
    trainer = [sys.executable, "-m", *torchrun, program.trainer, str(run_dir.path)]
    if config.debug.from_journal is not None:
        return {"trainer": trainer}
    if config.debug.rollout_only:
        trainer = [sys.executable, "-m", "megatron_sdpo.launch.rollout_only", str(run_dir.path)]
    return {"coordinator": coordinator, "trainer": trainer}


def _start(name: str, command: Sequence[str], run_dir: RunDir, config: Config, speaks: bool) -> _Role:
    """Standard output of the role that speaks stays the console's; everything else goes to the role's log."""
    log = run_dir.logs / f"{name}.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=None if speaks else output,
            stderr=output,
            env=environment(config),
            start_new_session=True,
        )
    return _Role(name, process, log)


def environment(config: Config) -> dict[str, str]:
    """What every role's process gets besides this process's own environment."""
    checkout = str(Path(megatron_sdpo.__file__ or "").parents[1])
    own = {
        lifeline.PARENT: str(os.getpid()),
        "PYTHONPATH": os.pathsep.join(filter(None, [checkout, os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
    }
    if config.engine.host in ("127.0.0.1", "localhost"):
        own["GLOO_SOCKET_IFNAME"] = "lo"
    if config.deterministic:
        own |= GPU_DETERMINISM
    return {"OMP_NUM_THREADS": "1"} | dict(os.environ) | own


def _watch(roles: Sequence[_Role], fleet: Fleet, run_dir: RunDir, stopped: str) -> None:
    """Until the trainer has finished; any other end is RoleDied, with the words of what ``stopped`` means."""
    trainer = next(role for role in roles if role.name == "trainer")
    while trainer.process.poll() != 0:
        for ended in fleet.dead():
            raise RoleDied(_words(ended.name, ended.exit_code, stopped, ended.log_tail))
        for role in roles:
            code = role.process.poll()
            if code is not None:
                why = run_dir.failure_of(role.name) or log_tail(role.log)
                raise RoleDied(_words(role.name, code, stopped, why))
        # A stopped rank does not obey torchrun, which would wait for it: what is to be said has been said.
        if run_dir.hung.exists() and (why := run_dir.failure_of(trainer.name)):
            raise RoleDied(f"trainer hung; {stopped}.\n{why}")
        time.sleep(POLL_S)


def _words(name: str, code: int, stopped: str, why: str) -> str:
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"{name} {how}; {stopped}.\n{why}".strip()


def _stop(roles: Sequence[_Role]) -> None:
    for role in roles:
        _signal_group(role, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while time.monotonic() < deadline and any(role.process.poll() is None for role in roles):
        time.sleep(POLL_S / 4)
    for role in roles:
        _signal_group(role, signal.SIGKILL)
        role.process.wait()


def _signal_group(role: _Role, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # the whole group has ended
        os.killpg(role.process.pid, number)


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
