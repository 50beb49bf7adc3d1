"""What a study's runs say: a curve for each arm and size, what a level costs by size, arms and sizes compared.

Every number comes with an interval (``laws``), and what the data cannot say is said in words instead of a number.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_sdpo.scaling.laws import (
    DRAWS,
    Interval,
    Points,
    Power,
    Saturating,
    draw_curves,
    fit_power,
    fit_saturating,
    interval,
)

BUDGETS = 9
"""At how many compute budgets the best size is looked for."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run as far as it got. ``flops`` in all by phase; ``points`` without the evaluation before training, whose
    score is ``floor``."""

    arm: str
    size: str
    seed: int
    parameters: int
    floor: float
    points: Points
    flops: Mapping[str, float]
    generations: int


@dataclass(frozen=True, slots=True)
class Rung:
    """All seeds of an arm at a size. ``curve`` None: the evaluations are too few, see ``notes``."""

    arm: str
    size: str
    parameters: int
    seeds: int
    last: tuple[float, ...]
    """Each seed's last score."""
    spent: float
    """FLOPs of a run, mean."""
    shares: dict[str, float]
    """Of those, by phase."""
    curve: Saturating | None
    draws: tuple[Saturating, ...]
    notes: tuple[str, ...]
    within: float
    """The least that a seed has spent: up to here the curve is seen."""

    def cost(self, level: float) -> float | None:
        """FLOPs to a level, if it was reached within what was spent."""
        if self.curve is None or not 0 < (found := self.curve.cost(level)) <= self.within:
            return None
        return found

    def cost_interval(self, level: float) -> Interval:
        return interval([curve.cost(level) for curve in self.draws])


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The largest size's cost: ``foretold`` from the others, and ``found``. ``times``: what was found, in units of what
    was foretold."""

    size: str
    foretold: float
    found: float
    times: Interval

    @property
    def holds(self) -> bool:
        return 1.0 in self.times


@dataclass(frozen=True, slots=True)
class SizeLaw:
    """What a level costs an arm, by parameters. ``law`` None: see ``note``."""

    arm: str
    level: float
    costs: dict[str, float]
    law: Power | None
    exponent: Interval | None
    held_out: HeldOut | None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Gap:
    """Two arms at one size, at equal compute: scores at ``compute``, and how many times less a level costs."""

    size: str
    arm: str
    reference: str
    compute: float
    difference: float
    difference_between: Interval
    times_less: dict[float, tuple[float, Interval]]


@dataclass(frozen=True, slots=True)
class Budget:
    """The size that gets furthest for so many FLOPs, and how often draws agree."""

    compute: float
    size: str
    score: float
    agreed: float


@dataclass(frozen=True, slots=True)
class Findings:
    rungs: tuple[Rung, ...]
    laws: tuple[SizeLaw, ...]
    gaps: tuple[Gap, ...]
    budgets: dict[str, tuple[Budget, ...]]


def find(runs: Sequence[Run], levels: Sequence[float], seed: int = 0) -> Findings:
    """Everything, from the runs there are; the first run's arm is what the others are compared with.

    A seed is the same questions for every arm and size, so what it is lucky with is taken for one luck: the draws of
    all are made with the same weights, and what two of them share drops out of their difference.
    """
    arms = list(dict.fromkeys(run.arm for run in runs))
    rungs = []
    ordered = _ordered(runs, arms)
    for arm, size in dict.fromkeys((run.arm, run.size) for run in ordered):
        rungs.append(_rung([run for run in ordered if (run.arm, run.size) == (arm, size)], seed))
    by_arm = {arm: [rung for rung in rungs if rung.arm == arm] for arm in arms}
    laws = [size_law(by_arm[arm], level) for arm in arms for level in levels]
    gaps = [
        gap(rung, other, levels)
        for arm in arms[1:]
        for rung in by_arm[arm]
        for other in by_arm[arms[0]]
        if rung.size == other.size and rung.curve and other.curve
    ]
    return Findings(tuple(rungs), tuple(laws), tuple(gaps), {arm: budgets(by_arm[arm]) for arm in arms})


def _ordered(runs: Sequence[Run], arms: Sequence[str]) -> list[Run]:
    return sorted(runs, key=lambda run: (arms.index(run.arm), run.parameters, run.seed))


def _rung(runs: Sequence[Run], seed: int) -> Rung:
    """One arm at one size."""
    evaluated = [run for run in runs if run.points.compute]
    floor = float(np.mean([run.floor for run in runs]))
    spent = float(np.mean([sum(run.flops.values()) for run in runs]))
    phases = {phase: float(np.mean([run.flops[phase] for run in runs])) for phase in runs[0].flops}
    points, notes = [run.points for run in evaluated], []
    curve, draws = None, []
    try:
        curve = fit_saturating(points, floor) if points else None
        draws = draw_curves(points, curve, DRAWS, seed) if curve else []
    except ValueError as error:
        notes.append(str(error))
    within = min((run.points.compute[-1] for run in evaluated), default=0.0)
    if not points:
        notes.append("no evaluation after training began")
    if curve is not None and curve.middle > within:
        notes.append("half of the way was not gone yet: its top is a guess")
    if len(runs) == 1:
        notes.append("one seed: intervals show the noise of evaluations only")
    return Rung(
        arm=runs[0].arm,
        size=runs[0].size,
        parameters=runs[0].parameters,
        seeds=len(runs),
        last=tuple(run.points.scores[-1] for run in evaluated),
        spent=spent,
        shares={phase: flops / spent if spent else 0.0 for phase, flops in phases.items()},
        curve=curve,
        draws=tuple(draws),
        notes=tuple(notes),
        within=within,
    )


def size_law(rungs: Sequence[Rung], level: float) -> SizeLaw:
    """What ``level`` costs by size, of the sizes that reached it; with four of them, the largest is foretold too."""
    reached = [(rung, cost) for rung in rungs if (cost := rung.cost(level)) is not None]
    costs = {rung.size: cost for rung, cost in reached}
    arm = rungs[0].arm
    if len(reached) < 3:
        note = f"{len(reached)} of {len(rungs)} sizes reached {level:.0%} within their compute; a law takes three"
        return SizeLaw(arm, level, costs, None, None, None, note)
    sizes = [float(rung.parameters) for rung, _ in reached]
    drawn = [[rung.draws[i].cost(level) for rung, _ in reached] for i in range(DRAWS)]
    drawn = [one for one in drawn if all(0 < cost < math.inf for cost in one)]
    exponents = [fit_power(sizes, one).exponent for one in drawn]
    found = fit_power(sizes, list(costs.values()))
    held_out = None
    if len(reached) > 3:
        foretold = fit_power(sizes[:-1], list(costs.values())[:-1]).at(sizes[-1])
        times = [one[-1] / fit_power(sizes[:-1], one[:-1]).at(sizes[-1]) for one in drawn]
        held_out = HeldOut(reached[-1][0].size, foretold, reached[-1][1], interval(times))
    return SizeLaw(arm, level, costs, found, interval(exponents), held_out)


def gap(rung: Rung, reference: Rung, levels: Sequence[float]) -> Gap:
    """``rung`` against ``reference`` at what both have spent."""
    assert rung.curve is not None and reference.curve is not None
    compute = min(rung.within, reference.within)
    pairs = list(zip(rung.draws, reference.draws, strict=True))
    times = {}
    for level in levels:
        mine, theirs = rung.cost(level), reference.cost(level)
        if mine is not None and theirs is not None:
            drawn = [b.cost(level) / a.cost(level) for a, b in pairs if 0 < a.cost(level) < math.inf]
            times[level] = (theirs / mine, interval(drawn))
    return Gap(
        size=rung.size,
        arm=rung.arm,
        reference=reference.arm,
        compute=compute,
        difference=float(rung.curve.at(compute) - reference.curve.at(compute)),
        difference_between=interval([float(a.at(compute) - b.at(compute)) for a, b in pairs]),
        times_less=times,
    )


def budgets(rungs: Sequence[Rung]) -> tuple[Budget, ...]:
    """The best size at compute budgets that every size has seen, from where one of them is halfway: before that all lie
    at their floors. None with fewer than two sizes."""
    curves = [rung for rung in rungs if rung.curve is not None]
    if len(curves) < 2:
        return ()
    low = min(rung.curve.middle for rung in curves if rung.curve)
    high = min(rung.within for rung in curves)
    found = []
    for compute in np.geomspace(low, high, BUDGETS) if low < high else ():
        scores = [float(rung.curve.at(compute)) for rung in curves if rung.curve]
        best = int(np.argmax(scores))
        drawn = [int(np.argmax([float(rung.draws[i].at(compute)) for rung in curves])) for i in range(DRAWS)]
        found.append(Budget(float(compute), curves[best].size, scores[best], drawn.count(best) / DRAWS))
    return tuple(found)
