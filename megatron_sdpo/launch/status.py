"""How a run stands (``RUN_DIR/status.json``), and how it is asked to stop (``RUN_DIR/stop``).

Whoever starts the roles writes the status; nobody else does. It is what tells a batch job whether to run again: an exit
code cannot, because Slurm makes one number of those of many processes. The trainer looks for the request after every
step; it then saves, notes the step, and ends.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from megatron_sdpo.launch.run_dir import RunDir

State = Literal["running", "finished", "interrupted", "failed", "planned"]


@dataclass(frozen=True, slots=True)
class Status:
    """Example: ``Status("interrupted", "attempt-002", "the time limit is near", step=12, retries=1)``

    One line of JSON, in this order: slurm/job.sh reads it with sed.
    """

    state: State
    """interrupted: the same command continues, and should; planned: a dry run."""
    attempt: str
    """Which start this is about; empty outside Slurm."""
    sentence: str = ""
    step: int = 0
    """Of the newest checkpoint."""
    retries: int = 0
    """How many attempts in a row have ended without a new checkpoint, since the job was submitted."""


def write_status(run_dir: RunDir, status: Status) -> None:
    """Atomically."""
    temporary = run_dir.path / ".status.tmp"
    temporary.write_text(json.dumps(asdict(status)) + "\n")
    temporary.replace(run_dir.path / "status.json")


def read_status(run_dir: RunDir) -> Status | None:
    """None where there never was one."""
    try:
        return Status(**json.loads((run_dir.path / "status.json").read_text()))
    except FileNotFoundError:
        return None


def newest_checkpoint(run_dir: RunDir) -> int:
    """Step of the newest checkpoint that has its name, 0 without any; no torch."""
    folder = run_dir.checkpoints
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(name.removeprefix("step-")) for name in names if re.fullmatch(r"step-\d+", name)), default=0)


def request_stop(run_dir: RunDir, why: str) -> None:
    """Ask the trainer to save after the step that it is at, and to end. The first reason stays."""
    path = _request(run_dir)
    if not path.exists():
        path.write_text(why)


def stop_requested(run_dir: RunDir) -> str | None:
    """Why the run should stop, if it should."""
    try:
        return _request(run_dir).read_text()
    except FileNotFoundError:
        return None


def forget_stop(run_dir: RunDir) -> None:
    """A new start is not asked to stop."""
    for path in (_request(run_dir), _stopped(run_dir)):
        path.unlink(missing_ok=True)


def note_stopped(run_dir: RunDir, step: int) -> None:
    """The trainer has saved at ``step`` because it was asked to stop, and ends."""
    _stopped(run_dir).write_text(str(step))


def has_stopped(run_dir: RunDir) -> bool:
    """Whether a trainer that ended without failure has stopped on request, and not finished."""
    return _stopped(run_dir).exists()


def _request(run_dir: RunDir) -> Path:
    return run_dir.path / "stop"


def _stopped(run_dir: RunDir) -> Path:
    return run_dir.path / "stopped"
