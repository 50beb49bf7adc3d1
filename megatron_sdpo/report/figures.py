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
from matplotlib.ticker import MaxNLocator

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


def _curves(ax: Axes, runs: Sequence[RunRecord], panel: Panel) -> None:
    drawn = 0
    for index, run in enumerate(runs):
        xs, ys = run.series(*panel.keys)
        colour = COLOURS[index % len(COLOURS)]
        if xs:
            ax.plot(xs, ys, color=colour, marker=panel.marker, markersize=4.5, label=_plain(run.name))
            drawn += 1
    ax.set_title(panel.title)
    ax.set_xlabel("generations")
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
    steps = [int(row["step"] or 0) for row in rows]
    ax.set_title("Seconds per step")
    ax.set_xlabel("step")
    if not rows:
        _nothing(ax)
        return
    bottom = [0.0] * len(rows)
    for (key, name), colour in zip(PHASES.items(), COLOURS, strict=False):
        heights = [row.get(key) or 0.0 for row in rows]
        if any(heights):
            ax.bar(steps, heights, bottom=bottom, width=0.85, color=colour, label=name)
            bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    ax.set_ylim(0, 1.3 * max(bottom))
    ax.grid(False, axis="x")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(ncols=4, loc="upper left", columnspacing=1.1, handlelength=1.0, handletextpad=0.5)


def _nothing(ax: Any) -> None:
    ax.text(0.5, 0.5, "nothing recorded yet", ha="center", va="center", transform=ax.transAxes)
    ax.set_xticks([])
    ax.set_yticks([])


def _plain(name: str) -> str:
    """A legend entry as it is: a leading underscore would hide it, dollar signs would be read as mathematics."""
    return name.lstrip("_").replace("$", r"\$") or "run"
