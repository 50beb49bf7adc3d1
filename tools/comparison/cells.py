"""Cells: one training run each, in its own directory, by the command line; finished ones are never run again."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from comparison.analysis import Curve, Outcome
from comparison.experiments import LAYOUT, RECIPE, Overrides
from megatron_sdpo import config as configuration
from megatron_sdpo.config import Config
from megatron_sdpo.launch.side_by_side import SideBySide
from megatron_sdpo.tracking import read_metrics
from recipes import recipe

ROOT = Path(__file__).parents[2]
EXECUTED = ("megatron_sdpo", "recipes")
NICENESS = 19
PATIENCE = (
    "engine.start_timeout_s=3000",
    "engine.request_timeout_s=3000",
    "publish.timeout_s=3000",
)
"""A shared machine is slow, not broken."""
_DIVERGED = re.compile(r"(not |non-?)finite|\b(is|has) (nan|-?inf)\b", re.IGNORECASE)
_END_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Ended:
    """How a cell ended; ``cell.json`` in its directory."""

    overrides: Overrides
    commit: str
    date: str
    seconds: float
    outcome: Outcome
    """diverged: the run ended because weights or log-probs were not finite."""
    curve: Curve


class CellFailed(RuntimeError):
    """A run ended for another reason than its mathematics; it is tried again at the next start."""


class Stopped(RuntimeError):
    """The tool was told to stop."""


def cell_config(overrides: Overrides) -> Config:
    """What the cell's command trains; ConfigError when that is no valid configuration."""
    layout = ("layout.tensor_parallel=1", "layout.pipeline_parallel=1", "layout.world_size=1")
    config = configuration.apply_overrides(recipe(RECIPE), [*layout, *PATIENCE, *overrides])
    configuration.check(config)
    return config


def cell_name(overrides: Overrides) -> str:
    """The same for the same experiment however it is spelled: a digest of the resolved configuration.

    A new configuration key gives every cell a new name, so results never mix what a key did not exist for.
    """
    config = cell_config(overrides)
    model = replace(config.model, path=Path(config.model.path).name)
    resolved = asdict(replace(config, name="", run_dir="", model=model))
    return hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest()[:16]


def commit() -> str:
    """The commit that last changed what a run executes; ``+changes`` is appended when the files differ from it."""
    changed = _git("status", "--porcelain", "--", *EXECUTED)
    return _git("log", "-1", "--format=%H", "--", *EXECUTED) + ("+changes" if changed else "")


class Cells:
    """The cells of a work folder, ``jobs`` at a time."""

    def __init__(self, work: Path, jobs: int) -> None:
        self._work, self._jobs, self._commit = work, jobs, commit()
        self._commands = SideBySide()

    def run(self, cells: Mapping[str, Overrides]) -> dict[str, Ended]:
        """Run what is not finished yet; ``cells`` is title -> overrides.

        Raises CellFailed after all have been tried when some failed, and Stopped on SIGINT and SIGTERM.
        """
        by_name = {cell_name(overrides): (title, overrides) for title, overrides in cells.items()}
        ended = {name: told for name in by_name if (told := self._ended(name)) is not None}
        failures: list[str] = []
        bar = _progress(len(by_name), len(ended))
        with self._commands.listening(), bar as progress, ThreadPoolExecutor(self._jobs) as pool:
            waiting = {
                pool.submit(self._run, name, overrides): (name, title)
                for name, (title, overrides) in by_name.items()
                if name not in ended
            }
            for future in as_completed(waiting):
                name, title = waiting[future]
                try:
                    ended[name] = future.result()
                    progress.console.print(f"{title}: {_words(ended[name])}", markup=False, highlight=False)
                except CellFailed as failure:
                    failures.append(f"{title}: {failure}")
                    progress.console.print(failures[-1], markup=False, highlight=False)
                except Stopped:
                    continue
                progress.advance(progress.task_ids[0])
        if self._commands.stopping.is_set():
            raise Stopped("stopped; the same command continues")
        if failures:
            raise CellFailed(f"{len(failures)} of {len(cells)} cells failed; the same command tries them again")
        return {title: ended[cell_name(overrides)] for title, overrides in cells.items()}

    def _ended(self, name: str) -> Ended | None:
        path = self._work / name / "cell.json"
        if not path.exists():
            return None
        return msgspec.json.decode(path.read_bytes(), type=Ended)

    def _run(self, name: str, overrides: Overrides) -> Ended:
        folder, run_dir = self._work / name, self._work / name / "run"
        self._wait_for_orphan(run_dir)
        if (told := self._ended(name)) is not None:  # another tool's, which works in the same folder
            return told
        self._forget_other_code(folder)
        run_dir.mkdir(parents=True, exist_ok=True)
        (folder / "commit").write_text(self._commit)
        began = time.perf_counter()
        with (folder / "output.txt").open("ab") as output:
            position = output.tell()
            code = self._commands.run(_command(run_dir, overrides), output.fileno(), self._environment())
        if self._commands.stopping.is_set():
            raise Stopped
        said = (folder / "output.txt").read_bytes()[position:].decode(errors="replace")
        if code != 0 and not (code == 1 and _DIVERGED.search(said)):
            raise CellFailed(f"ended with exit code {code}, see {folder}/output.txt\n{said[-1500:]}")
        rows = [(row["generations"], row.get("eval/accuracy")) for row in read_metrics(run_dir)]
        curve = tuple((int(x), y) for x, y in rows if x is not None and y is not None)
        date = datetime.now(UTC).strftime("%Y-%m-%d")
        seconds = round(time.perf_counter() - began, 1)
        ended = Ended(overrides, self._commit, date, seconds, "finished" if code == 0 else "diverged", curve)
        temporary = folder / "cell.tmp"
        temporary.write_bytes(msgspec.json.encode(ended))
        temporary.replace(folder / "cell.json")
        return ended

    def _wait_for_orphan(self, run_dir: Path) -> None:
        """A run outlives a tool that was killed outright, and holds its directory until it ends."""
        run_dir.mkdir(parents=True, exist_ok=True)
        with (run_dir / "lock").open("a") as lock:
            while not self._commands.stopping.is_set():
                try:
                    return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    self._commands.stopping.wait(1.0)
        raise Stopped

    def _forget_other_code(self, folder: Path) -> None:
        """A cell is one commit's: what another one has begun is started over."""
        began_by = folder / "commit"
        if began_by.exists() and began_by.read_text() != self._commit:
            shutil.rmtree(folder)

    def _environment(self) -> dict[str, str]:
        """Byte code is kept in the work folder: where Python is told to write none, each of a run's processes compiles
        its imports anew."""
        kept = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        own = {"PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": str(self._work.resolve() / "bytecode")}
        return {"OMP_NUM_THREADS": "1"} | kept | own


def _command(run_dir: Path, overrides: Overrides) -> list[str]:
    cli = [sys.executable, "-m", "megatron_sdpo.cli", "train", RECIPE, "--layout", LAYOUT, "--run-dir", str(run_dir)]
    return ["nice", "-n", str(NICENESS), *cli, *PATIENCE, *overrides]


def _words(ended: Ended) -> str:
    last = f"{ended.curve[-1][1]:.1%} after {ended.curve[-1][0]} generations" if ended.curve else "no evaluation"
    return f"{ended.outcome}, {last}, {ended.seconds:.0f} s"


def _progress(total: int, done: int) -> Progress:
    columns = (TextColumn("cells"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns)
    progress.add_task("cells", total=total, completed=done)
    return progress


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()
