"""A run's numbers: ``metrics.jsonl`` (the record), the console (one line a step), TensorBoard and W&B (by switch).

``metrics.jsonl`` holds one JSON object a step, in rising order of ``step``. Row v holds what was measured while the
weights went from version v - 1 to v, and the held-out scores of version v where it was evaluated; row 0 is the base
model's evaluation only. Every value besides ``step`` and ``generations`` is a float, or null where it was not finite.
"""

import dataclasses
import importlib.util
import json
import logging
import math
import os
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_sdpo.config import Config, ConfigError, TrackingConfig

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
LOSS_KEYS = ("loss/total", "loss/divergence", "loss/cross_entropy")
"""What stands for the loss where one number is shown: the first that a run records."""

Row = dict[str, float | None]

_NUMBERS = (
    ("reward", ("verdict/reward",), ".2f"),
    ("eval", ("eval/accuracy",), ".2f"),
    ("loss", LOSS_KEYS, ".4f"),
    ("grad", ("optim/grad_norm",), ".2f"),
)
_PHASES = (
    ("gen", "time/generate"),
    ("ver", "time/verify"),
    ("stu", "time/score_student"),
    ("tea", "time/score_teacher"),
    ("trn", "time/train"),
    ("syn", "time/sync"),
)


class Tracker:
    """Writes one row a step. Only the rank with ``is_writer`` does anything; the calls are the same on all."""

    def __init__(self, config: Config, run_dir: Path, is_writer: bool) -> None:
        """Opens ``run_dir/metrics.jsonl`` for appending, after dropping a last line that a kill left torn.

        Raises ConfigError when a tracker is switched on whose package is not installed.
        """
        self._config = config
        self._is_writer = is_writer
        if not is_writer:
            return
        self._path = run_dir / METRICS_FILE
        self._sinks = _sinks(config, run_dir)
        self._last_step = self._keep(None)
        self._file: TextIO = self._path.open("a")
        self._bar = _progress_bar(config.steps) if sys.stdout.isatty() else None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record one step on disk (durable when this returns), then show it.

        ``generations`` is derived from the step unless ``metrics`` has it. A value that is not finite becomes null,
        with a warning. Raises ValueError when ``step`` is not beyond the last recorded one.
        """
        if not self._is_writer:
            return
        if step <= self._last_step:
            raise ValueError(f"step {step} is already recorded (the last is {self._last_step}); truncate_after first")
        generations = step * self._config.rollout.prompts_per_step * self._config.rollout.attempts_per_prompt
        row: Row = {"generations": generations, **{k: _finite(step, k, v) for k, v in metrics.items()}, "step": step}
        _write_durably(self._file, json.dumps(row, sort_keys=True, allow_nan=False) + "\n")
        self._last_step = step
        self._show(row)
        for sink in self._sinks:
            sink.log(step, {k: v for k, v in row.items() if v is not None and k != "step"})

    def say(self, words: str) -> None:
        """A warning on the console, between the lines of the steps."""
        if not self._is_writer:
            return
        if self._bar is None:
            print(f"warning: {words}", flush=True)
        else:
            self._bar.console.print(f"warning: {words}", markup=False, highlight=False, soft_wrap=True)

    def truncate_after(self, step: int) -> None:
        """Drop the rows beyond ``step`` atomically: a run that resumes from a checkpoint records them again."""
        if not self._is_writer:
            return
        self._file.close()
        self._last_step = self._keep(step)
        self._file = self._path.open("a")

    def close(self) -> None:
        """Flush everything. The tracker cannot be used afterwards."""
        if not self._is_writer:
            return
        self._file.close()
        for sink in self._sinks:
            sink.close()
        if self._bar is not None:
            self._bar.stop()

    def _keep(self, step: int | None) -> int:
        """Rewrite the file with the whole rows up to ``step`` (None: all of them); returns the last step, or -1."""
        if not self._path.exists():
            return -1
        rows, torn = _parse(self._path)
        kept = [row for row in rows if step is None or _step(row) <= step]
        if torn:
            logger.warning("%s: dropped a last line that was cut while it was written", self._path)
        if len(kept) < len(rows):
            logger.info("%s: dropped %d rows beyond step %d", self._path, len(rows) - len(kept), step)
        temporary = self._path.with_suffix(".tmp")
        with temporary.open("w") as file:
            _write_durably(file, "".join(json.dumps(row, sort_keys=True) + "\n" for row in kept))
        temporary.replace(self._path)
        return _step(kept[-1]) if kept else -1

    def _show(self, row: Row) -> None:
        line = console_line(row, self._config.steps)
        if self._bar is None:
            print(line, flush=True)
            return
        self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        self._bar.update(self._bar.task_ids[0], completed=_step(row))


def read_metrics(run_dir: Path) -> list[Row]:
    """The rows of a run, also of one that is still running; none when it has recorded nothing yet.

    A torn last line is left out with a warning. Raises ConfigError when another line is not a row.
    """
    path = Path(run_dir) / METRICS_FILE
    if not path.exists():
        return []
    rows, torn = _parse(path)
    if torn:
        logger.warning("%s: its last line is cut; it is left out", path)
    return rows


def console_line(row: Row, steps: int) -> str:
    """``step  12/28 | gens 1536 | reward 0.42 | eval 0.71 | loss 0.0123 | grad 0.80 | gen 0.9 ver 0.0 … s``"""
    width = len(str(steps))
    parts = [f"step {_step(row):{width}d}/{steps}", f"gens {int(row['generations'] or 0)}"]
    parts += [f"{name} {_number(row, keys, spec)}" for name, keys, spec in _NUMBERS]
    if skipped := row.get("optim/skipped_steps"):
        parts.append(f"skipped {skipped:.0f}")
    phases = [f"{name} {row[key]:.1f}" for name, key in _PHASES if row.get(key) is not None]
    if phases:
        parts.append(" ".join(phases) + " s")
    return " | ".join(parts)


def _number(row: Row, keys: Sequence[str], spec: str) -> str:
    values = [value for key in keys if (value := row.get(key)) is not None]
    return format(values[0], spec) if values else "-"


def _step(row: Row) -> int:
    value = row["step"]
    assert value is not None  # _parse admits no other row
    return int(value)


def _parse(path: Path) -> tuple[list[Row], bool]:
    """The whole rows of a metrics file, and whether a torn last line was left out."""
    rows: list[Row] = []
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("not a row")
        except ValueError as error:
            if number == len(lines):
                return rows, True
            raise ConfigError(f"{path} line {number} is not a row of metrics; repair or remove the file") from error
        rows.append(row)
    return rows, False


def _finite(step: int, key: str, value: float) -> float | None:
    number = value if isinstance(value, int) else float(value)
    if math.isfinite(number):
        return number
    logger.warning("step %d: %s is %s; it is recorded as null", step, key, number)
    return None


def _write_durably(file: TextIO, text: str) -> None:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())


def _progress_bar(steps: int) -> Progress:
    columns = (TextColumn("steps"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, transient=True)
    bar.add_task("train", total=steps)
    bar.start()
    return bar


@dataclasses.dataclass(frozen=True, slots=True)
class _Sink:
    """A tracker beside metrics.jsonl."""

    log: Callable[[int, Mapping[str, float]], None]
    close: Callable[[], None]


def check_trackers(config: TrackingConfig) -> None:
    """Refuse a tracker whose package is not installed; imports none."""
    for asked, package, how in (
        (config.tensorboard, "tensorboard", "tracking.tensorboard is on but TensorBoard"),
        (config.wandb_project is not None, "wandb", "tracking.wandb_project is set but wandb"),
    ):
        if asked and importlib.util.find_spec(package) is None:
            off = "tracking.tensorboard=false" if package == "tensorboard" else "tracking.wandb_project=none"
            raise ConfigError(f"{how} is not installed; pip install 'megatron-sdpo[trackers]', or set {off}")


def _sinks(config: Config, run_dir: Path) -> list[_Sink]:
    sinks = []
    if config.tracking.tensorboard:
        sinks.append(_tensorboard(run_dir))
    if config.tracking.wandb_project is not None:
        sinks.append(_wandb(config, config.tracking.wandb_project, run_dir))
    return sinks


def _tensorboard(run_dir: Path) -> _Sink:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "tracking.tensorboard is on but TensorBoard is not installed; "
            "pip install 'megatron-sdpo[trackers]', or set tracking.tensorboard=false"
        ) from error
    writers: list[Any] = []

    def log(step: int, values: Mapping[str, float]) -> None:
        if not writers:  # opened here because only now is the step known from which older events are void
            writers.append(SummaryWriter(str(run_dir / "tensorboard"), purge_step=step))
        for key, value in values.items():
            writers[0].add_scalar(key, value, step)

    def close() -> None:
        for writer in writers:
            writer.close()

    return _Sink(log, close)


def _wandb(config: Config, project: str, run_dir: Path) -> _Sink:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            "tracking.wandb_project is set but wandb is not installed; "
            "pip install 'megatron-sdpo[trackers]', or set tracking.wandb_project=none"
        ) from error
    id_file = run_dir / "wandb-id"  # the same run directory is the same W&B run
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex)
    run: Any = wandb.init(
        project=project,
        name=config.name,
        id=id_file.read_text().strip(),
        resume="allow",
        dir=str(run_dir),
        config=dataclasses.asdict(config),
    )
    return _Sink(lambda step, values: run.log(dict(values), step=step), run.finish)
