"""The curves of one or several runs, as a file (PNG, on white) and for a page (SVG, in the page's colours).

Figures are made without pyplot: no global state, no display.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, MaxNLocator

from megatron_sdpo.report.record import RunRecord
from megatron_sdpo.tracking import LOSS_KEYS

PHASES = {
    "time/generate": "generate",
    "time/verify": "verify",
    "time/score_student": "score student",
    "time/score_teacher": "score teacher",
    "time/train": "train",
    "time/sync": "sync weights",
    "time/evaluate": "evaluate",
}
MOST_BARS = 150
"""Of a long run several steps share one: thousands would make a page slow that nobody can read."""
COLOURS = ("#4e79a7", "#f28e2b", "#3f9c4b", "#e15759", "#a06cb4", "#3fa5a5", "#b5835a", "#d37295")
"""Mid tones: readable on white and on near-black."""

# Colours that no series uses; the page's own replace them in the SVG
_INK, _GRID = "#0a0b0c", "#d1d2d3"
_STYLE: Any = {
    "font.size": 9.5,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.labelcolor": _INK,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",
    "svg.hashsalt": "megatron-sdpo",
}


@dataclass(frozen=True, slots=True)
class Panel:
    """A curve with a panel of its own. Example: ``Panel("Training reward", ("verdict/reward",), True)``"""

    title: str
    keys: tuple[str, ...]
    fraction: bool
    """The value lies between 0 and 1."""
    marker: str = ""


PANELS = (
    Panel("Held-out accuracy", ("eval/accuracy",), True, "o"),
    Panel("Training reward", ("verdict/reward",), True),
    Panel("Loss", LOSS_KEYS, False),
)


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """Curves of one run that share a panel. Example: ``Diagnostic("Policy entropy", "nats", {"loss/entropy": ""})``"""

    title: str
    unit: str
    keys: dict[str, str]
    """Of the rows, and their names in the legend."""


DIAGNOSTICS = (
    Diagnostic("Policy entropy", "nats per token", {"loss/entropy": ""}),
    Diagnostic("Gradient norm, before clipping", "", {"optim/grad_norm": ""}),
    Diagnostic("Trainer/engine mismatch", "nats per token", {"loss/mismatch": ""}),
    Diagnostic(
        "Response length", "tokens", {"rollout/response_tokens": "training", "eval/response_tokens": "held-out"}
    ),
    Diagnostic(
        "What the teacher reads",
        "share of attempts",
        {
            "context/demonstration": "a success",
            "context/feedback": "feedback",
            "context/both": "both",
            "context/none": "nothing: no target",
            "context/dropped": "too long: no target",
        },
    ),
    Diagnostic(
        "Questions solved, responses cut",
        "share",
        {"verdict/solved_questions": "questions with a success", "rollout/cut_share": "responses cut"},
    ),
)


def diagnostics_svg(run: RunRecord) -> str:
    """What one looks at when a run goes wrong, for a page; "" where nothing of it is recorded."""
    found = [d for d in DIAGNOSTICS if any(run.series(key)[0] for key in d.keys)]
    return as_svg(lambda: _diagnostics(run, found)) if found else ""


def curve_png(runs: Sequence[RunRecord], path: Path) -> None:
    """Write the curves as a PNG on white."""
    save_png(lambda: _figure(runs), path)


def curve_svg(runs: Sequence[RunRecord]) -> str:
    """The curves for a page (``as_svg``)."""
    return as_svg(lambda: _figure(runs))


def save_png(draw: Callable[[], Figure], path: Path) -> None:
    """Draw in the house style and write a PNG on white."""
    with matplotlib.rc_context(_STYLE):
        temporary = path.with_suffix(".tmp")
        draw().savefig(temporary, format="png", dpi=150, facecolor="white")
        temporary.replace(path)


def as_svg(draw: Callable[[], Figure]) -> str:
    """Draw in the house style: an ``<svg>`` element whose text and lines take the page's ``--ink`` and ``--grid``."""
    out = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        draw().savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "var(--ink)").replace(_GRID, "var(--grid)")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(r'<svg ([^>]*?)height="[^"]*"([^>]*?)width="[^"]*"', r"<svg \1\2", svg, count=1)


def _figure(runs: Sequence[RunRecord]) -> Figure:
    """2 x 2 panels; the fourth is the time of one run's phases, or of several runs' whole steps."""
    figure = Figure(figsize=(10.4, 6.8), layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1))
    axes = figure.subplots(2, 2).flat
    for ax, panel in zip(axes, PANELS, strict=False):
        _curves(ax, runs, panel)
    if len(runs) == 1:
        _phases(axes[3], runs[0])
    else:
        _curves(axes[3], runs, Panel("Seconds per step", ("time/step",), False))
    return figure


def _diagnostics(run: RunRecord, found: Sequence[Diagnostic]) -> Figure:
    rows = -(-len(found) // 3)
    figure = Figure(figsize=(10.4, 2.9 * rows), layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1))
    axes = list(figure.subplots(rows, 3, squeeze=False).flat)
    for ax in axes[len(found) :]:
        ax.set_axis_off()
    for ax, diagnostic in zip(axes, found, strict=False):
        for (key, label), colour in zip(diagnostic.keys.items(), COLOURS, strict=False):
            xs, ys = run.series(key)
            if xs and (any(ys) or len(diagnostic.keys) == 1):  # what never happened only crowds the legend
                marker = "o" if key.startswith("eval/") else ""
                ax.plot(xs, ys, color=colour, marker=marker, markersize=3.5, label=label)
        ax.set_title(diagnostic.title)
        _generations(ax)
        ax.set_ylabel(diagnostic.unit)
        ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
        if len(diagnostic.keys) > 1 and ax.get_lines():
            ax.legend()
    return figure


def _curves(ax: Axes, runs: Sequence[RunRecord], panel: Panel) -> None:
    drawn = 0
    for index, run in enumerate(runs):
        xs, ys = run.series(*panel.keys)
        colour = COLOURS[index % len(COLOURS)]
        if xs:
            ax.plot(xs, ys, color=colour, marker=panel.marker, markersize=4.5, label=_plain(run.name))
            drawn += 1
    ax.set_title(panel.title)
    _generations(ax)
    if not drawn:
        _nothing(ax)
        return
    if panel.fraction:
        ax.set_ylim(-0.02, 1.02)
    else:
        ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    if len(runs) > 1:
        ax.legend()


def _phases(ax: Axes, run: RunRecord) -> None:
    rows = [row for row in run.rows if any(row.get(key) for key in PHASES)]
    pooled = -(-len(rows) // MOST_BARS)
    parts = [rows[first : first + pooled] for first in range(0, len(rows), pooled or 1)]
    steps = [int(part[0]["step"] or 0) + (len(part) - 1) / 2 for part in parts]
    ax.set_title("Seconds per step")
    ax.set_xlabel("step" if pooled <= 1 else f"step; a bar is the mean of {pooled}")
    if not rows:
        _nothing(ax)
        return
    bottom = [0.0] * len(parts)
    for (key, name), colour in zip(PHASES.items(), COLOURS, strict=False):
        heights = [sum(row.get(key) or 0.0 for row in part) / len(part) for part in parts]
        if any(heights):
            ax.bar(steps, heights, bottom=bottom, width=0.85 * pooled, color=colour, label=name)
            bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    ax.set_ylim(0, 1.3 * max(bottom))
    ax.grid(False, axis="x")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(ncols=4, loc="upper left", columnspacing=1.1, handlelength=1.0, handletextpad=0.5)


def _generations(ax: Axes) -> None:
    """50k instead of 50000, of which many ticks would run into each other."""
    ax.set_xlabel("generations")
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))


def _nothing(ax: Any) -> None:
    ax.text(0.5, 0.5, "nothing recorded yet", ha="center", va="center", transform=ax.transAxes)
    ax.set_xticks([])
    ax.set_yticks([])


def _plain(name: str) -> str:
    """A legend entry as it is: a leading underscore would hide it, dollar signs would be read as mathematics."""
    return name.lstrip("_").replace("$", r"\$") or "run"
