"""Laws fitted to held-out scores: what a run reaches for what it has spent, how that moves with size, how sure it is.

A run against its compute saturates (Khatri et al., "The Art of Scaling Reinforcement Learning Compute for LLMs", arXiv
2510.13786, equation 1)::

    R(C) = R0 + (A - R0) / (1 + (C_mid / C)^B)

and what a level costs goes with size N as a power, ``k * N^b``. Intervals are a wild cluster bootstrap's, a run being a
cluster: the residuals of each run are multiplied by one random weight (Webb's six points, which serve where there are
few clusters) and the curve is fitted again. Few runs know little of how runs scatter, so the weights are larger by
what Student's t asks beyond a normal distribution: 1.3 times with five runs, 1.8 with three. All in float64; nothing
here reads a file.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares
from scipy.special import ndtri, stdtrit

Floats = NDArray[np.float64]
CONFIDENCE = 0.9
DRAWS = 200
_WEBB = np.array([-(1.5**0.5), -1.0, -(0.5**0.5), 0.5**0.5, 1.0, 1.5**0.5])
_SIGNS = np.array([-1.0, 1.0])
_FLATTEST, _STEEPEST = 0.1, 10.0
_GRID = 24
_BEYOND = 3.0
"""Decades beyond the points in which the middle is looked for."""


@dataclass(frozen=True, slots=True)
class Points:
    """A run's evaluations: cumulative FLOPs (above zero) and held-out scores."""

    compute: tuple[float, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Saturating:
    """``floor`` is the score before training (R0), ``top`` the asymptote (A), at ``middle`` FLOPs (C_mid) half of the
    way is gone, ``slope`` (B) says how fast. Example: ``Saturating(0.02, 0.98, 1e12, 2.0).at(1e12)`` is 0.5."""

    floor: float
    top: float
    middle: float
    slope: float

    def at(self, compute: Floats | float) -> Floats:
        """The score after so many FLOPs."""
        share = _share(np.log10(np.asarray(compute, float)), math.log10(self.middle), self.slope)
        return self.floor + (self.top - self.floor) * share

    def cost(self, level: float) -> float:
        """FLOPs to a score; nothing for one that was there before, infinity for one above the top."""
        if level <= self.floor:
            return 0.0
        if level >= self.top:
            return math.inf
        return self.middle * ((level - self.floor) / (self.top - level)) ** (1 / self.slope)


@dataclass(frozen=True, slots=True)
class Power:
    """``scale * size ** exponent``."""

    scale: float
    exponent: float

    def at(self, size: float) -> float:
        return self.scale * size**self.exponent


@dataclass(frozen=True, slots=True)
class Interval:
    """Between these ``CONFIDENCE`` of what was drawn lie."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def fit_saturating(runs: Sequence[Points], floor: float) -> Saturating:
    """Least squares over the points of all runs. ValueError with fewer than four points: three numbers are fitted.

    For a middle and a slope the best top is known in closed form, so these two are looked for: on a grid, then from
    its best place.
    """
    x = np.log10(np.concatenate([run.compute for run in runs]))
    y = np.concatenate([run.scores for run in runs]) - floor
    if len(y) < 4:
        raise ValueError(f"{len(y)} evaluations are too few for a curve of three numbers; it takes four")

    def height(share: Floats) -> Floats:
        best = (share * y).sum(-1) / np.maximum((share**2).sum(-1), 1e-30)
        return np.clip(best, 0.0, max(1.0 - floor, 0.0))

    def residuals(place: Floats) -> Floats:
        share = _share(x, place[0], math.exp(place[1]))
        return height(share) * share - y

    low = np.array([x.min() - _BEYOND, math.log(_FLATTEST)])
    high = np.array([x.max() + _BEYOND, math.log(_STEEPEST)])
    middles, slopes = np.meshgrid(*(np.linspace(*ends, _GRID + 2)[1:-1] for ends in zip(low, high, strict=True)))
    shares = _share(x, middles[..., None], np.exp(slopes)[..., None])
    costs = ((height(shares)[..., None] * shares - y) ** 2).sum(-1)
    best = np.unravel_index(int(costs.argmin()), costs.shape)
    begin = (middles[best], slopes[best])
    found = least_squares(residuals, begin, bounds=(low, high), xtol=1e-12, ftol=1e-12, gtol=1e-12).x
    top = floor + float(height(_share(x, found[0], math.exp(found[1]))))
    return Saturating(floor, top, float(10 ** found[0]), math.exp(found[1]))


def fit_power(sizes: Sequence[float], values: Sequence[float]) -> Power:
    """Least squares of logarithms. ValueError with fewer than two sizes, or where a value is not above zero."""
    if len(set(sizes)) < 2:
        raise ValueError("a power law takes two sizes or more")
    if not all(0 < value < math.inf for value in values):
        raise ValueError(f"a power law takes finite values above zero, not {list(values)}")
    exponent, offset = np.polyfit(np.log(sizes), np.log(values), 1)
    return Power(float(np.exp(offset)), float(exponent))


def draw_curves(runs: Sequence[Points], fit: Saturating, draws: int, seed: int) -> list[Saturating]:
    """The curve fitted again to data that might as well have been seen.

    A run's residuals keep together, since what one seed was lucky with it stays lucky with. One run alone says nothing
    of other seeds: its points are then taken for independent, and the draws show the noise of evaluations only.
    """
    random = np.random.default_rng(seed)
    residuals = [np.asarray(run.scores) - fit.at(np.asarray(run.compute)) for run in runs]
    count = len(runs)
    drawn = []
    for _ in range(draws):
        if count == 1:
            weights: list[Floats | float] = [random.choice(_SIGNS, len(residuals[0]))]
        else:
            weights = [float(weight) * _wider(count) for weight in random.choice(_WEBB, count)]
        again = [
            Points(run.compute, tuple(fit.at(np.asarray(run.compute)) + weight * residual))
            for run, weight, residual in zip(runs, weights, residuals, strict=True)
        ]
        drawn.append(fit_saturating(again, fit.floor))
    return drawn


def _wider(count: int) -> float:
    """What residuals of so few runs are multiplied by: a sample's variance, and Student's t in place of the normal."""
    tail = (1 + CONFIDENCE) / 2
    return (count / (count - 1)) ** 0.5 * float(stdtrit(count - 1, tail) / ndtri(tail))


def interval(values: Sequence[float]) -> Interval:
    """The middle ``CONFIDENCE`` of them; infinities count as the largest."""
    ordered = sorted(values)
    aside = math.floor(round((1 - CONFIDENCE) / 2 * (len(ordered) - 1), 6))
    return Interval(ordered[aside], ordered[-1 - aside])


def _share(log_compute: Floats, log_middle: Floats | float, slope: Floats | float) -> Floats:
    """Of the way from floor to top, what is gone."""
    odds = np.clip(slope * (log_middle - log_compute) * math.log(10), -300.0, 300.0)
    return 1 / (1 + np.exp(odds))
