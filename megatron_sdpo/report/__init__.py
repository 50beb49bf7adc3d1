"""What a run did, as one self-contained page: ``report.html``, and ``curve.png`` for a slide or a ticket.

Everything is read from the run directory, so a report can be made while the run goes on, after it was killed, or on
another machine. What is not there yet is named in the page. All text that a model wrote is escaped by the templates
(data/report/); the page loads nothing from anywhere.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_sdpo import measures
from megatron_sdpo.config import Config, ConfigError, fields_by_name
from megatron_sdpo.report.contexts import teacher_reads
from megatron_sdpo.report.figures import PHASES, curve_png, curve_svg, diagnostics_svg
from megatron_sdpo.report.page import render, write
from megatron_sdpo.report.record import RunRecord, read_run
from megatron_sdpo.timeline import write_timeline
from megatron_sdpo.types import Group

ATTEMPTS_PER_GROUP = 4
MILESTONES = (0.5, 0.8, 0.9)


def write_report(run_dir: Path) -> Path:
    """Write ``run_dir/report.html``, ``run_dir/curve.png`` and a timeline where there is one; returns the page's path.

    Raises ConfigError when ``run_dir`` is no run directory.
    """
    run_dir = Path(run_dir)
    run = read_run(run_dir)
    write_timeline(run_dir)
    curve_png([run], run_dir / "curve.png")
    changed, default = _settings(run.config)
    reads, why_unread = teacher_reads(run.config, run.groups)
    page = render(
        "run.html.j2",
        run=run,
        headlines=_headlines(run),
        curves=curve_svg([run]) if run.rows else "",
        diagnostics=diagnostics_svg(run),
        phases=_phase_table(run),
        numbers=_numbers(run),
        changed=changed,
        default=default,
        transcripts=[_transcript(group, reads[i] if reads else []) for i, group in enumerate(run.groups)],
        why_unread=why_unread,
    )
    return write(run_dir / "report.html", page)


def write_comparison(run_dirs: Sequence[Path], out: Path) -> Path:
    """Overlay several runs in one page ``out`` (an .html file) with the same curves beside it as PNG.

    Raises ConfigError for fewer than two runs, for a directory that is no run, or for another suffix.
    """
    out = Path(out)
    if len(run_dirs) < 2:
        raise ConfigError(f"a comparison needs two runs or more, not {len(run_dirs)}; name their run directories")
    if out.suffix != ".html":
        raise ConfigError(f"the comparison is a page: name it {out.with_suffix('.html')} instead of {out}")
    runs = [read_run(Path(run_dir), with_groups=False) for run_dir in run_dirs]
    runs = _told_apart(runs, run_dirs)
    out.parent.mkdir(parents=True, exist_ok=True)
    curve_png(runs, out.with_suffix(".png"))
    headlines = [dict(_headlines(run)) for run in runs]
    page = render(
        "comparison.html.j2",
        runs=runs,
        curves=curve_svg(runs),
        headlines=headlines,
        labels=list(dict.fromkeys(label for numbers in headlines for label in numbers)),
        differences=_differences(runs),
    )
    return write(out, page)


def _told_apart(runs: Sequence[RunRecord], run_dirs: Sequence[Path]) -> list[RunRecord]:
    """Directories may share their last name (a/run, b/run); then the whole path is the name."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run_dir) for run_dir in run_dirs]
    return [dataclasses.replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def _headlines(run: RunRecord) -> list[tuple[str, str]]:
    """(label, value) of the numbers one looks for first."""
    generations, accuracy = run.series("eval/accuracy")
    _, rewards = run.series("verdict/reward")
    _, seconds = run.series("time/step")
    steps = int(run.rows[-1]["step"] or 0) if run.rows else 0
    of = f" of {run.config.steps}" if run.config is not None else ""
    lines = [("steps", f"{steps}{of}")]
    if run.rows:
        lines.append(("generations", f"{int(run.rows[-1]['generations'] or 0):,}"))
    if accuracy:
        lines.append(("held-out accuracy, first → last", f"{accuracy[0]:.3f} → {accuracy[-1]:.3f}"))
        lines.append(("best held-out accuracy", f"{max(accuracy):.3f}"))
        for milestone in MILESTONES:
            reached = [g for g, a in zip(generations, accuracy, strict=True) if a >= milestone]
            if reached:
                lines.append((f"generations to {milestone:.0%}", f"{int(reached[0]):,}"))
    if rewards:
        lines.append(("training reward, last step", f"{rewards[-1]:.3f}"))
    if seconds:
        lines.append(("time in steps", _duration(sum(seconds))))
        lines.append(("seconds per step, median", f"{sorted(seconds)[len(seconds) // 2]:.2f}"))
    return lines


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _phase_table(run: RunRecord) -> list[dict[str, Any]]:
    """One entry a phase: seconds in all, mean over the steps which have it, share of the time in all phases."""
    totals = {name: run.series(key, against="step")[1] for key, name in PHASES.items()}
    whole = sum(map(sum, totals.values()))
    return [
        {"name": name, "total": sum(v), "mean": sum(v) / len(v), "longest": max(v), "share": sum(v) / whole}
        for name, v in totals.items()
        if v and whole > 0
    ]


def _numbers(run: RunRecord) -> list[tuple[str, list[str], str, str]]:
    """(key, first, last, least and greatest value, unit, meaning) of every number that the run records."""
    lines = []
    for key in measures.in_order({key for row in run.rows for key in row} - {"step", "generations"}):
        _, values = run.series(key, against="step")
        found = measures.measure(key) or measures.Measure("", "")
        if values:
            chosen = (values[0], values[-1], min(values), max(values))
            lines.append((key, [measures.shown(value) for value in chosen], found.unit, found.words))
    return lines


def _flat(config: Config) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key in fields_by_name():
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        values[key] = value
    return values


def _settings(config: Config | None) -> tuple[list[tuple[str, str, str]], list[tuple[str, str]]]:
    """((key, value, default) where the run differs or no default exists), ((key, value) of the others)."""
    defaults = {key: default for key, (_, default) in fields_by_name().items()}
    changed: list[tuple[str, str, str]] = []
    unchanged: list[tuple[str, str]] = []
    values = {} if config is None else _flat(config)
    for key, value in values.items():
        default = defaults[key]
        if default is dataclasses.MISSING:
            changed.append((key, _shown(value), "always set"))
        elif value != default:
            changed.append((key, _shown(value), _shown(default)))
        else:
            unchanged.append((key, _shown(value)))
    return changed, unchanged


def _differences(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """(key, value in each run) of the settings which are not the same in all runs."""
    flats = [None if run.config is None else _flat(run.config) for run in runs]
    rows = []
    for key in fields_by_name():
        values = ["not known" if flat is None else _shown(flat[key]) for flat in flats]
        if len(set(values)) > 1 and key != "run_dir":
            rows.append((key, values))
    return rows


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and value.strip() == value != "" else json.dumps(value)


def _transcript(group: Group, reads: Sequence[str]) -> dict[str, Any]:
    """What the page shows of a group: as many of its best attempts as of the others, where it has both.

    ``reads``: the teacher's prompt for each attempt, if it is known.
    """
    judged = list(zip(group.attempts, group.verdicts, strict=True))
    best = max((v.reward for _, v in judged), default=0.0)
    top = [i for i, (_, v) in enumerate(judged) if v.reward == best]
    rest = [i for i, (_, v) in enumerate(judged) if v.reward != best]
    half = ATTEMPTS_PER_GROUP // 2
    chosen = sorted(top[: max(half, ATTEMPTS_PER_GROUP - len(rest))] + rest[: max(half, ATTEMPTS_PER_GROUP - len(top))])
    return {
        "step": group.step,
        "slot": group.slot,
        "question": group.question,
        "count": len(judged),
        "mean_reward": sum(v.reward for _, v in judged) / max(len(judged), 1),
        "attempts": [
            {"number": i + 1, "attempt": judged[i][0], "verdict": judged[i][1], "read": reads[i] if reads else ""}
            for i in chosen
        ],
    }
