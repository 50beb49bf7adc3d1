"""The process of a role: how it is started, how its end is told, how it is ended."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import megatron_sdpo
from megatron_sdpo.config import Config
from megatron_sdpo.launch.run_dir import RunDir
from megatron_sdpo.rollout import lifeline
from megatron_sdpo.rollout.fleet import GRACE_S

POLL_S = 0.2
HOST = "MEGATRON_SDPO_HOST"
"""Environment variable of a role: the address at which this machine is reached, instead of engine.host."""
GPU_DETERMINISM = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NCCL_ALGO": "Ring",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
}
"""What the libraries want to be told before a trainer starts; not yet run on a GPU."""


class RoleDied(RuntimeError):
    """A role ended before the run was finished; the message names it and shows the end of its log."""


@dataclass(frozen=True, slots=True)
class Role:
    """Example: ``Role("trainer", process, Path("runs/minipipe/logs/trainer.log"))``"""

    name: str
    process: subprocess.Popen[bytes]
    log: Path


def start_role(
    name: str, command: Sequence[str], run_dir: RunDir, environment: Mapping[str, str], speaks: bool
) -> Role:
    """Standard output of the role that speaks stays the console's; everything else goes to the role's log."""
    log = run_dir.logs / f"{name}.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=None if speaks else output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
    return Role(name, process, log)


def environment(config: Config) -> dict[str, str]:
    """What every role's process gets besides this process's own environment."""
    checkout = str(Path(megatron_sdpo.__file__ or "").parents[1])
    own = {
        lifeline.PARENT: str(os.getpid()),
        "PYTHONPATH": os.pathsep.join(filter(None, [checkout, os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
    }
    if config.deterministic:
        own |= GPU_DETERMINISM
    return {"OMP_NUM_THREADS": "1"} | dict(os.environ) | own


def words_of_end(name: str, code: int, stopped: str, why: str) -> str:
    """How a role ended, what that means for the others (``stopped``), and why."""
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"{name} {how}; {stopped}.\n{why}".strip()


def stop_roles(roles: Sequence[Role], grace_s: float = GRACE_S) -> None:
    """Asked first, killed with all its children after ``grace_s``."""
    for role in roles:
        _signal_group(role, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline and any(role.process.poll() is None for role in roles):
        time.sleep(POLL_S / 4)
    for role in roles:
        _signal_group(role, signal.SIGKILL)
        role.process.wait()


def _signal_group(role: Role, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # the whole group has ended
        os.killpg(role.process.pid, number)
