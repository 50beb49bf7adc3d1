"""A run directory read back, as far as it got: configuration, rows of metrics, a few groups of attempts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from megatron_sdpo import config as configuration
from megatron_sdpo.config import Config, ConfigError
from megatron_sdpo.tracking import METRICS_FILE, Row, read_metrics
from megatron_sdpo.types import Group

GROUPS_PER_STEP = 2


@dataclass(frozen=True, slots=True)
class RunRecord:
    """``missing`` says, in words for the page, what the directory does not hold (yet).

    Example: ``RunRecord("minipipe-tp2", config, rows, groups, ("no evaluation yet",))``
    """

    name: str
    config: Config | None
    rows: tuple[Row, ...]
    groups: tuple[Group, ...]
    missing: tuple[str, ...]

    def series(self, *keys: str, against: str = "generations") -> tuple[list[float], list[float]]:
        """(x, y) of the rows which have both values; y is the first of ``keys`` that the run records."""
        key = next((key for key in keys if any(row.get(key) is not None for row in self.rows)), keys[0])
        pairs = [(x, y) for row in self.rows if (x := row.get(against)) is not None and (y := row.get(key)) is not None]
        return [x for x, _ in pairs], [y for _, y in pairs]


def read_run(run_dir: Path, with_groups: bool = True) -> RunRecord:
    """Raises ConfigError when the directory has neither a configuration, nor metrics, nor attempts."""
    config_file, journals = run_dir / "config.json", sorted((run_dir / "attempts").glob("step-*.jsonl"))
    if not (config_file.exists() or (run_dir / METRICS_FILE).exists() or journals):
        raise ConfigError(
            f"{run_dir} is not a run directory: it has no config.json, no {METRICS_FILE} and no attempts/; "
            "pass the --run-dir of a training run"
        )
    missing: list[str] = []
    config = _read_config(config_file, missing)
    rows = tuple(read_metrics(run_dir))
    missing += _gaps(config, rows)
    groups: list[Group] = []
    if with_groups:
        for journal in _first_middle_last(journals):
            groups += _interesting(_read_groups(journal, missing))
        if not journals:
            missing.append("no attempts are journalled yet, so there are no transcripts")
    return RunRecord(run_dir.resolve().name, config, rows, tuple(groups), tuple(missing))


def _read_config(path: Path, missing: list[str]) -> Config | None:
    if not path.exists():
        missing.append("config.json is missing, so the settings are not known")
        return None
    try:
        return configuration.load(path)
    except ConfigError as error:
        missing.append(f"the settings cannot be read: {error}")
        return None


def _gaps(config: Config | None, rows: Sequence[Row]) -> list[str]:
    if not rows:
        return ["no step is recorded yet, so there are no curves"]
    gaps = []
    last = int(rows[-1]["step"] or 0)
    if config is not None and last < config.steps:
        gaps.append(f"the run has not finished: {last} of {config.steps} steps are recorded")
    if not any(row.get("eval/accuracy") is not None for row in rows):
        gaps.append("no held-out evaluation is recorded yet")
    steps = {int(row["step"] or 0) for row in rows}
    holes = sorted(set(range(max(min(steps), 1), last + 1)) - steps)
    if holes:
        gaps.append(f"{len(holes)} steps have no row of metrics, the first is step {holes[0]}")
    return gaps


def _first_middle_last(journals: Sequence[Path]) -> list[Path]:
    chosen = {0, (len(journals) - 1) // 2, len(journals) - 1} if journals else set()
    return [journals[i] for i in sorted(chosen)]


def _read_groups(journal: Path, missing: list[str]) -> list[Group]:
    groups = []
    for number, line in enumerate(journal.read_bytes().splitlines(), 1):
        try:
            groups.append(msgspec.json.decode(line, type=Group))
        except msgspec.DecodeError:
            missing.append(f"attempts/{journal.name} line {number} is cut or damaged; it is left out")
    return groups


def _interesting(groups: Sequence[Group]) -> list[Group]:
    """The groups to show: those where attempts differ in reward say most."""
    mixed_first = sorted(groups, key=lambda g: (len({v.reward for v in g.verdicts}) <= 1, g.slot))
    return sorted(mixed_first[:GROUPS_PER_STEP], key=lambda g: g.slot)
