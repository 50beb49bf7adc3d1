"""scaling/laws.py: by hand, against known curves, and whether intervals hold what they promise."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sdpo.scaling.laws import (
    Interval,
    Points,
    Saturating,
    draw_curves,
    fit_power,
    fit_saturating,
    interval,
)

COMPUTE = tuple(float(c) for c in np.geomspace(1e10, 1e13, 12))


def seen(curve: Saturating, noise: float = 0.0, shift: float = 0.0, seed: int = 0) -> Points:
    """A run of this curve; ``shift`` is its own, at every point alike."""
    random = np.random.default_rng(seed)
    scores = curve.at(np.array(COMPUTE)) + random.normal(0, noise, len(COMPUTE)) + random.normal(0, 1) * shift
    return Points(COMPUTE, tuple(float(score) for score in scores))


def test_a_curve_by_hand() -> None:
    curve = Saturating(floor=0.1, top=0.9, middle=1e12, slope=2.0)
    assert curve.at(1e12) == pytest.approx(0.5)
    assert curve.at(2e12) == pytest.approx(0.1 + 0.8 / (1 + 0.25))
    assert curve.at(1e30) == pytest.approx(0.9) and curve.at(1e-30) == pytest.approx(0.1)
    assert curve.cost(0.5) == pytest.approx(1e12)
    assert curve.cost(0.1 + 0.8 / 1.25) == pytest.approx(2e12)
    assert curve.cost(0.1) == curve.cost(0.05) == 0.0
    assert curve.cost(0.9) == curve.cost(0.95) == math.inf


@settings(max_examples=40, deadline=None)
@given(st.floats(0.0, 0.3), st.floats(0.5, 1.0), st.floats(10.7, 12.3), st.floats(0.6, 4.0), st.floats(0.05, 0.45))
def test_exact_points_give_back_their_curve(
    floor: float, top: float, middle: float, slope: float, level: float
) -> None:
    curve = Saturating(floor, top, 10**middle, slope)
    found = fit_saturating([seen(curve)], floor)
    np.testing.assert_allclose(found.at(np.array(COMPUTE)), curve.at(np.array(COMPUTE)), atol=1e-5)
    wanted = floor + level * (top - floor)
    assert found.cost(wanted) == pytest.approx(curve.cost(wanted), rel=1e-3)


def test_a_power_law_by_hand() -> None:
    law = fit_power([1.0, 10.0, 100.0], [3.0, 30.0, 300.0])
    assert (law.scale, law.exponent) == (pytest.approx(3.0), pytest.approx(1.0))
    assert law.at(1000.0) == pytest.approx(3000.0)
    assert fit_power([2.0, 8.0], [4.0, 1.0]).exponent == pytest.approx(-1.0)
    for sizes, values in (([5.0, 5.0], [1.0, 2.0]), ([1.0, 2.0], [1.0, math.inf]), ([1.0, 2.0], [0.0, 1.0])):
        with pytest.raises(ValueError):
            fit_power(sizes, values)


def test_too_few_evaluations_are_refused() -> None:
    with pytest.raises(ValueError, match="3 evaluations are too few"):
        fit_saturating([Points((1e9, 1e10, 1e11), (0.1, 0.2, 0.3))], 0.0)


def test_an_interval_leaves_a_twentieth_on_each_side() -> None:
    assert interval([float(i) for i in range(101)]) == Interval(5.0, 95.0)
    assert 5.0 in interval([float(i) for i in range(101)]) and 4.9 not in interval([float(i) for i in range(101)])
    assert interval([1.0, math.inf, 2.0, math.inf]).high == math.inf


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """Four seeds, each a little better or worse throughout: the cost of half the way, 90 %."""
    truth = Saturating(0.05, 0.9, 3e11, 1.5)
    level, held, tries = 0.5, 0, 40
    for i in range(tries):
        runs = [seen(truth, noise=0.02, shift=0.03, seed=100 * i + j) for j in range(4)]
        fit = fit_saturating(runs, truth.floor)
        costs = [curve.cost(level) for curve in draw_curves(runs, fit, 60, i)]
        held += truth.cost(level) in interval(costs)
    assert 0.7 * tries <= held <= 0.99 * tries, held


def test_seeds_that_differ_widen_the_interval_and_one_seed_shows_noise_only() -> None:
    truth = Saturating(0.05, 0.9, 3e11, 1.5)

    def width(runs: list[Points]) -> float:
        fit = fit_saturating(runs, truth.floor)
        costs = interval([math.log10(curve.cost(0.5)) for curve in draw_curves(runs, fit, 100, 0)])
        return costs.high - costs.low

    alike = [seen(truth, noise=0.01, seed=j) for j in range(3)]
    apart = [seen(truth, noise=0.01, shift=0.1, seed=j) for j in range(3)]
    assert width(apart) > 3 * width(alike)
    assert 0 < width(alike[:1]) < width(apart) / 3
    exact = fit_saturating([seen(truth)], truth.floor)
    assert draw_curves([seen(truth)], exact, 3, 1)[0].top == pytest.approx(exact.top, abs=1e-4)
