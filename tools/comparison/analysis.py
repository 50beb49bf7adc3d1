"""From finished runs to what is said of them. Pure: everything here is a function of ``runs.json``.

A run that diverged is a result: it counts as 0 at every evaluation that it did not reach.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

LEVELS = (0.5, 0.8, 0.9)
SELECTION = (
    "mean held-out accuracy over all generations (area under the curve, trapezoids), mean of the tuning seeds;"
    " of equals the first"
)

Phase = Literal["tuning", "final"]
Outcome = Literal["finished", "diverged"]
Curve = tuple[tuple[int, float], ...]
"""(generations, held-out accuracy), rising."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One finished cell. ``commit`` is the code that ran it; ``seconds`` is the wall time of its last start."""

    phase: Phase
    arm: str
    """The algorithm's name in a tuning run."""
    candidate: int
    seed: int
    overrides: tuple[str, ...]
    commit: str
    date: str
    seconds: float
    outcome: Outcome
    curve: Curve


@dataclass(frozen=True, slots=True)
class Summary:
    """One run in numbers; ``generations_to`` is by level, None where the level was never reached."""

    area: float
    generations_to: dict[str, float | None]
    peak: float
    final: float
    drop: float
    """Peak minus final."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """``runs.json``: an experiment as it was run."""

    experiment: str
    title: str
    reference: str
    grid: tuple[int, ...]
    arms: dict[str, str]
    """Arm -> its algorithm."""
    candidates: dict[str, tuple[tuple[str, ...], ...]]
    """Algorithm -> its candidate settings, in order."""
    chosen: dict[str, int]
    """Algorithm -> the candidate that was chosen by ``selection``."""
    selection: str = SELECTION
    machine: str
    runs: tuple[Run, ...]
    summaries: tuple[Summary, ...]
    """Of the runs, in their order."""


def completed(curve: Curve, grid: Sequence[int]) -> Curve:
    """The curve at every point of the grid; 0 where the run had ended."""
    measured = dict(curve)
    return tuple((generations, measured.get(generations, 0.0)) for generations in grid)


def crossing(curve: Curve, level: float) -> float | None:
    """Generations at which the curve first reaches the level, linear between evaluations.

    ``crossing(((0, 0.0), (512, 0.4), (1024, 0.6)), 0.5)`` is 768.
    """
    if curve and curve[0][1] >= level:
        return float(curve[0][0])
    for (x0, y0), (x1, y1) in pairwise(curve):
        if y1 >= level:
            return x0 + (level - y0) / (y1 - y0) * (x1 - x0)
    return None


def area(curve: Curve) -> float:
    """Mean accuracy over the generations, by trapezoids."""
    pieces = pairwise(curve)
    return sum((y0 + y1) / 2 * (x1 - x0) for (x0, y0), (x1, y1) in pieces) / (curve[-1][0] - curve[0][0])


def summary(run: Run, grid: Sequence[int]) -> Summary:
    curve = completed(run.curve, grid)
    values = [accuracy for _, accuracy in curve]
    levels = {f"{level:g}": crossing(curve, level) for level in LEVELS}
    return Summary(area(curve), levels, max(values), values[-1], max(values) - values[-1])


def chosen_candidate(runs: Sequence[Run], candidates: int, grid: Sequence[int]) -> int:
    """Which candidate has the largest mean area over one algorithm's tuning runs; of equals the first."""
    scores = candidate_areas(runs, candidates, grid)
    return max(range(candidates), key=lambda i: (scores[i], -i))


def candidate_areas(runs: Sequence[Run], candidates: int, grid: Sequence[int]) -> list[float]:
    """Mean area of each candidate. Every candidate must have been run with the same seeds."""
    seeds = [{run.seed for run in runs if run.candidate == i} for i in range(candidates)]
    assert seeds[0] and all(s == seeds[0] for s in seeds), "a candidate was not run"
    areas = [[area(completed(r.curve, grid)) for r in runs if r.candidate == i] for i in range(candidates)]
    return [statistics.mean(values) for values in areas]


def speed_ups(runs: Mapping[int, Summary], reference: Mapping[int, Summary], level: float) -> list[float | None]:
    """The reference's generations to the level over the arm's, seed by seed; None where one never got there."""
    ratios: list[float | None] = []
    for seed in sorted(runs.keys() & reference.keys()):
        ours, theirs = runs[seed].generations_to[f"{level:g}"], reference[seed].generations_to[f"{level:g}"]
        ratios.append(theirs / ours if ours and theirs else None)
    return ratios


@dataclass(frozen=True, slots=True)
class Band:
    """An arm's mean curve, and the lowest and highest seed at each point."""

    generations: tuple[int, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def band(curves: Sequence[Curve], grid: Sequence[int]) -> Band:
    columns = list(zip(*([y for _, y in completed(curve, grid)] for curve in curves), strict=True))
    return Band(tuple(grid), tuple(map(statistics.mean, columns)), tuple(map(min, columns)), tuple(map(max, columns)))


def final_runs(record: Record, arm: str) -> dict[int, tuple[Run, Summary]]:
    """Seed -> what is reported of an arm."""
    pairs = zip(record.runs, record.summaries, strict=True)
    return {run.seed: (run, told) for run, told in pairs if run.phase == "final" and run.arm == arm}
