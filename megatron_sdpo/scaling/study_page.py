"""What a study found: ``findings.json`` (numbers), ``study.png`` (curves), ``study.html`` (both, in tables and words).

Everything is computed from the rows that the runs have recorded, so it can be made while the study goes on.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from megatron_sdpo.config import ConfigError
from megatron_sdpo.report.figures import COLOURS, as_svg, save_png
from megatron_sdpo.report.page import render, write
from megatron_sdpo.scaling.findings import Findings, Gap, Run, Rung, SizeLaw, find
from megatron_sdpo.scaling.laws import CONFIDENCE, DRAWS, Interval, interval
from megatron_sdpo.scaling.runs import Manifest, read_runs, steps_done

_POINTS = 120


def write_study(folder: Path, manifest: Manifest) -> tuple[Path, Findings]:
    """Write the three files into ``folder``: (the page, what was found). ConfigError when no run has begun there."""
    runs = read_runs(folder, manifest)
    if not runs:
        raise ConfigError(f"{folder}: no run of the study has recorded a held-out score yet; run it, or wait")
    findings = find(runs, manifest.levels)
    write(folder / "findings.json", json.dumps(_plain(runs, findings), indent=1, allow_nan=False) + "\n")
    save_png(lambda: _figure(runs, findings), folder / "study.png")
    begun = {f"{run.arm}-{run.size}-seed{run.seed}" for run in runs}
    done = {cell.name: steps_done(folder, cell) for cell in manifest.cells if cell.name in begun}
    missing = [
        f"{cell.name}: {done.get(cell.name, 0)} of {manifest.steps[cell.name]} steps"
        for cell in manifest.cells
        if done.get(cell.name, 0) < manifest.steps[cell.name]
    ]
    page = render(
        "study.html.j2",
        manifest=manifest,
        missing=missing,
        curves=as_svg(lambda: _figure(runs, findings)),
        rungs=[_rung_row(rung, manifest.levels) for rung in findings.rungs],
        laws=[(law.arm, f"{law.level:.0%}", law_words(law)) for law in findings.laws],
        gaps=[_gap_row(gap) for gap in findings.gaps],
        budgets=findings.budgets,
        levels=[f"{level:.0%}" for level in manifest.levels],
        confidence=CONFIDENCE,
        draws=DRAWS,
        amount=_amount,
    )
    return write(folder / "study.html", page), findings


def findings_lines(findings: Findings) -> list[str]:
    """What one looks for first: each arm's law at each level, and the arms against each other."""
    lines = [f"{law.arm}, {law.level:.0%}: {law_words(law)}" for law in findings.laws]
    for gap in findings.gaps:
        between = f"{gap.difference_between.low:+.3f} to {gap.difference_between.high:+.3f}"
        lines.append(f"{gap.size}: {gap.arm} - {gap.reference} at equal FLOPs {gap.difference:+.3f} ({between})")
    return lines


def law_words(law: SizeLaw) -> str:
    """Example: ``FLOPs grow as size^0.62 (0.55 to 0.70); 8B foretold 3.1e+18, found 1.05 times (0.9 to 1.2): holds``"""
    if law.law is None or law.exponent is None:
        return law.note
    words = f"FLOPs grow as size^{law.law.exponent:.2f} ({law.exponent.low:.2f} to {law.exponent.high:.2f})"
    if (told := law.held_out) is None:
        return f"{words}; with three sizes nothing is left to test it on"
    verdict = "holds" if told.holds else "does not hold"
    times = f"{told.found / told.foretold:.2f} times ({_range(told.times, '.2f')})"
    return f"{words}; {told.size} foretold {_amount(told.foretold)}, found {times}: {verdict}"


def _amount(value: float) -> str:
    return "never" if math.isinf(value) else f"{value:.2e}"


def _range(interval: Interval, spec: str) -> str:
    low, high = (("never" if math.isinf(v) else format(v, spec)) for v in (interval.low, interval.high))
    return f"{low} to {high}"


def _rung_row(rung: Rung, levels: Sequence[float]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "arm": rung.arm,
        "size": rung.size,
        "parameters": f"{rung.parameters:,}",
        "seeds": rung.seeds,
        "spent": _amount(rung.spent),
        "shares": ", ".join(f"{phase} {share:.0%}" for phase, share in rung.shares.items() if share),
        "last": " ".join(f"{score:.3f}" for score in rung.last),
        "notes": rung.notes,
        "curve": None,
    }
    if rung.curve is not None:
        row["curve"] = {
            "floor": f"{rung.curve.floor:.3f}",
            "top": (f"{rung.curve.top:.3f}", _range(_interval_of(rung, "top"), ".3f")),
            "middle": (_amount(rung.curve.middle), _range(_interval_of(rung, "middle"), ".2e")),
            "slope": (f"{rung.curve.slope:.2f}", _range(_interval_of(rung, "slope"), ".2f")),
        }
        row["costs"] = [_cost(rung, level) for level in levels]
    return row


def _cost(rung: Rung, level: float) -> tuple[str, str]:
    cost = rung.cost(level)
    return ("not reached", "") if cost is None else (_amount(cost), _range(rung.cost_interval(level), ".2e"))


def _interval_of(rung: Rung, name: str) -> Interval:
    """Of a number of the curve, by its draws."""
    return interval([float(getattr(curve, name)) for curve in rung.draws])


def _gap_row(gap: Gap) -> dict[str, Any]:
    times = {
        f"{level:.0%}": (f"{found:.2f}", _range(between, ".2f")) for level, (found, between) in gap.times_less.items()
    }
    return {
        "size": gap.size,
        "arm": gap.arm,
        "reference": gap.reference,
        "compute": _amount(gap.compute),
        "difference": (f"{gap.difference:+.3f}", _range(gap.difference_between, "+.3f")),
        "times": times,
    }


def _plain(runs: Sequence[Run], findings: Findings) -> dict[str, Any]:
    """For JSON: the runs' points, and what they say without the draws; infinities as null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): plain(one) for key, one in value.items() if key != "draws"}
        if isinstance(value, list | tuple):
            return [plain(one) for one in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return plain({"runs": [asdict(run) for run in runs], **asdict(findings)})


def _figure(runs: Sequence[Run], findings: Findings) -> Figure:
    """A panel an arm with every run's points and the curve of each size, and one of the laws by size."""
    arms = list(findings.budgets)
    figure = Figure(figsize=(5.2 * (len(arms) + 1), 4.4), layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1))
    axes = figure.subplots(1, len(arms) + 1, squeeze=False)[0]
    sizes = list(dict.fromkeys(rung.size for rung in sorted(findings.rungs, key=lambda rung: rung.parameters)))
    for ax, arm in zip(axes, arms, strict=False):
        ax.set_title(f"{arm}: held-out score against compute")
        for rung in (one for one in findings.rungs if one.arm == arm):
            own = [run for run in runs if (run.arm, run.size) == (arm, rung.size)]
            _curve(ax, rung, own, COLOURS[sizes.index(rung.size) % len(COLOURS)])
        ax.set_xscale("log")
        ax.set_xlabel("model FLOPs of a run so far, generation and training")
        ax.set_ylim(-0.02, 1.02)
        ax.legend(loc="upper left")
    _laws(axes[-1], findings, arms)
    return figure


def _curve(ax: Axes, rung: Rung, runs: Sequence[Run], colour: str) -> None:
    for run in runs:
        ax.plot(run.points.compute, run.points.scores, ".", color=colour, markersize=4)
    if rung.curve is None:
        return
    xs = np.geomspace(min(run.points.compute[0] for run in runs if run.points.compute), rung.within, _POINTS)
    drawn = np.array([curve.at(xs) for curve in rung.draws])
    low, high = np.quantile(drawn, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2), axis=0)
    ax.plot(xs, rung.curve.at(xs), color=colour, label=rung.size)
    ax.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)


def _laws(ax: Axes, findings: Findings, arms: Sequence[str]) -> None:
    """What the first level costs by size; the second is in the tables."""
    levels = list(dict.fromkeys(law.level for law in findings.laws))
    ax.set_title(f"FLOPs to a score of {levels[0]:.0%}, by size")
    ax.set_xlabel("parameters of the layers")
    ax.set_xscale("log")
    ax.set_yscale("log")
    for law in (one for one in findings.laws if one.level == levels[0]):
        colour = COLOURS[(4 + arms.index(law.arm)) % len(COLOURS)]
        rungs = [rung for rung in findings.rungs if rung.arm == law.arm and rung.size in law.costs]
        for rung in rungs:
            between = rung.cost_interval(law.level)
            ends = [between.low, between.high if math.isfinite(between.high) else rung.within]
            ax.plot([rung.parameters] * 2, ends, color=colour, linewidth=1.2)
        xs = [float(rung.parameters) for rung in rungs]
        ax.plot(xs, list(law.costs.values()), "o", color=colour, markersize=5, label=law.arm)
        if law.law is not None:
            ax.plot(xs, [law.law.at(x) for x in xs], color=colour, linestyle="--")
    if any(law.costs for law in findings.laws if law.level == levels[0]):
        ax.legend(loc="upper left")
