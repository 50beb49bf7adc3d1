"""``runs.json``, the table and the figure of an experiment. The last two are functions of the first."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import msgspec
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from comparison.analysis import LEVELS, Record, Run, Summary, band, candidate_areas, final_runs, speed_ups
from megatron_sdpo.report.figures import COLOURS

RUNS, TABLE, FIGURE = "runs.json", "table.md", "curves.png"
_STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
}


def save(record: Record, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RUNS).write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")


def load(folder: Path) -> Record:
    return msgspec.json.decode((folder / RUNS).read_bytes(), type=Record)


def write(record: Record, folder: Path) -> None:
    """``table.md`` and ``curves.png`` beside ``runs.json``."""
    (folder / TABLE).write_text(table(record))
    with matplotlib.rc_context(_STYLE):
        _figure(record).savefig(folder / FIGURE, format="png", dpi=130, facecolor="white")


def table(record: Record) -> str:
    """Markdown: how it was made, the arms, each seed's speed, and what was chosen among."""
    finals = [run for run in record.runs if run.phase == "final"]
    seeds = sorted({run.seed for run in finals})
    commits = ", ".join(sorted({_short(run.commit) for run in record.runs}))
    dates = sorted({run.date for run in record.runs})
    lines = [
        f"# {record.title}",
        "",
        f"`python tools/compare_algorithms.py {record.experiment} --seeds {','.join(map(str, seeds))}`;"
        f" {record.grid[-1]} generations an arm; code {commits}; {' to '.join(sorted({dates[0], dates[-1]}))}."
        f" {record.machine}.",
        "",
        f"Held-out accuracy over 80 questions x 8 attempts; mean over {len(seeds)} seed(s), lowest to highest in"
        " brackets. A seed is another hidden machine and other samples. Generations to a level: one number a seed"
        " (linear between evaluations). A diverged run counts as 0 from where it ended.",
        "",
        *_rows(_heads(), [_arm_row(record, arm) for arm in record.arms]),
        "",
        f"How many times fewer generations than {record.reference}, seed by seed (? where one of the two never got"
        " there):",
        "",
        *_rows(
            ("arm", *(f"to {level:.0%}" for level in LEVELS)),
            [_speed_row(record, arm) for arm in record.arms if arm != record.reference],
        ),
        "",
        *_tuning(record),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _heads() -> tuple[str, ...]:
    return ("arm", "settings", "mean over generations", *(f"to {level:.0%}" for level in LEVELS), "end", "drop", "runs")


def _arm_row(record: Record, arm: str) -> tuple[str, ...]:
    runs = final_runs(record, arm)
    told = [summary for _, (_, summary) in sorted(runs.items())]
    algorithm = record.arms[arm]
    diverged = sum(run.outcome == "diverged" for run, _ in runs.values())
    return (
        arm,
        _settings(record.candidates[algorithm][record.chosen[algorithm]]),
        _spread([s.area for s in told]),
        *(", ".join(_generations(s, level) for s in told) for level in LEVELS),
        _spread([s.final for s in told]),
        _spread([s.drop for s in told]),
        f"{len(told)}" + (f", {diverged} diverged" if diverged else ""),
    )


def _speed_row(record: Record, arm: str) -> tuple[str, ...]:
    ours, theirs = (
        {seed: summary for seed, (_, summary) in final_runs(record, name).items()} for name in (arm, record.reference)
    )
    return (arm, *(_ratios(speed_ups(ours, theirs, level)) for level in LEVELS))


def _ratios(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    each = ", ".join("?" if value is None else f"{value:.2f}" for value in values)
    return f"**{statistics.median(known):.2f}** ({each})" if len(known) == len(values) and known else each


def _tuning(record: Record) -> list[str]:
    lines: list[str] = []
    for algorithm, candidates in record.candidates.items():
        runs = [run for run in record.runs if run.phase == "tuning" and run.arm == algorithm]
        if not runs:
            continue
        if not lines:
            seeds = ", ".join(map(str, sorted({run.seed for run in runs})))
            lines += [
                f"Settings were chosen on other machines and questions (seed {seeds}, 80 x 4 attempts) by the"
                f" {record.selection}:",
                "",
            ]
        areas = candidate_areas(runs, len(candidates), record.grid)
        rows = []
        for i, (candidate, value) in enumerate(zip(candidates, areas, strict=True)):
            mark = "**" if i == record.chosen[algorithm] else ""
            ends = " ".join(_end(run) for run in runs if run.candidate == i)
            rows.append((algorithm, f"{mark}{_settings(candidate)}{mark}", f"{mark}{value:.3f}{mark}", ends))
        lines += [*_rows(("algorithm", "settings", "mean over generations", "end"), rows), ""]
    return lines


def _end(run: Run) -> str:
    return f"{run.curve[-1][1]:.2f}" if run.outcome == "finished" else "diverged"


def _generations(summary: Summary, level: float) -> str:
    value = summary.generations_to[f"{level:g}"]
    return "never" if value is None else f"{value:.0f}"


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _settings(overrides: Sequence[str]) -> str:
    """``optim.lr=1e-3`` is shown as ``lr 1e-3``."""
    pairs = (override.split(".", 1)[-1].split("=") for override in overrides)
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in pairs)


def _short(commit: str) -> str:
    head, plus, rest = commit.partition("+")
    return head[:8] + plus + rest


def _rows(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def _figure(record: Record) -> Figure:
    """Left: mean and range over the seeds. Right: every seed's generations to each level."""
    figure = Figure(figsize=(11.5, 4.6), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
    left, right = figure.subplots(1, 2, width_ratios=(1.7, 1))
    seeds = {run.seed for run in record.runs if run.phase == "final"}
    for arm, colour in zip(record.arms, COLOURS, strict=False):
        drawn = band([run.curve for run, _ in final_runs(record, arm).values()], record.grid)
        left.plot(drawn.generations, drawn.mean, color=colour, marker="o", markersize=3.5, linewidth=1.8, label=arm)
        left.fill_between(drawn.generations, drawn.low, drawn.high, color=colour, alpha=0.15, linewidth=0)
    left.set_ylim(-0.02, 1.02)
    left.set_xlim(0, record.grid[-1] * 1.01)
    left.set_xlabel("generations")
    left.set_title(
        f"Held-out accuracy: mean and range of {len(seeds)} seeds" if len(seeds) > 1 else "Held-out accuracy, one seed"
    )
    _levels(right, record)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=4)
    figure.suptitle(record.title, fontsize=12, x=0.01, ha="left")
    return figure


def _levels(ax: Axes, record: Record) -> None:
    arms = list(record.arms)
    width = 0.8 / len(arms)
    never = record.grid[-1] * 1.06
    missing = False
    for i, (arm, colour) in enumerate(zip(arms, COLOURS, strict=False)):
        for position, level in enumerate(LEVELS):
            x = position + (i - (len(arms) - 1) / 2) * width
            for _, told in final_runs(record, arm).values():
                value = told.generations_to[f"{level:g}"]
                missing |= value is None
                marker = "x" if value is None else "o"
                ax.plot(x, never if value is None else value, marker, color=colour, markersize=5.5, alpha=0.8)
    if missing:
        ax.axhline(record.grid[-1], color="#888888", linewidth=0.8, linestyle=":")
    ax.set_xticks(range(len(LEVELS)), [f"{level:.0%}" for level in LEVELS])
    ax.set_xlim(-0.5, len(LEVELS) - 0.5)
    ax.set_ylim(0, record.grid[-1] * 1.1)
    ax.grid(axis="x", visible=False)
    ax.set_title("Generations to reach" + (" (x: never)" if missing else ""))
