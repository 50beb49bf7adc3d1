"""discovery@k against hand numbers and against counting every subset."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sdpo.discovery.statistics import (
    Curve,
    Independent,
    Sequential,
    discovery_curve,
    drawn_at,
    mean_attempts,
    shown_at,
    unbiased,
)


def test_the_estimator_by_hand() -> None:
    # 5 attempts, 2 correct: 1 - C(3, k) / C(5, k) for C(3, k) = 3, 3, 1, 0, 0 of C(5, k) = 5, 10, 10, 5, 1
    assert unbiased(5, 2, 5).tolist() == pytest.approx([0.4, 0.7, 0.9, 1.0, 1.0])
    assert unbiased(4, 0, 3).tolist() == [0.0, 0.0, 0.0]
    assert unbiased(1, 1, 1).tolist() == [1.0]


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_the_estimator_is_the_mean_over_all_subsets(case: tuple[int, int, int]) -> None:
    samples, correct, k = case
    attempts = [True] * correct + [False] * (samples - correct)
    subsets = list(itertools.combinations(attempts, k))
    assert unbiased(samples, correct, k)[-1] == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_the_estimator_does_not_overflow() -> None:
    curve = unbiased(2944, 1, 2750)
    assert curve[-1] == pytest.approx(2750 / 2944)
    exact = 1 - math.comb(2944 - 7, 512) / math.comb(2944, 512)
    assert unbiased(2944, 7, 512)[-1] == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize(("samples", "correct", "budget"), [(4, 5, 2), (4, -1, 2), (4, 1, 5), (4, 1, 0)])
def test_more_than_was_sampled_is_not_known(samples: int, correct: int, budget: int) -> None:
    with pytest.raises(ValueError, match="cannot tell"):
        unbiased(samples, correct, budget)


def test_trials_count_from_their_first_success() -> None:
    trials = Sequential((2, None, 4, 9))
    assert trials.curve(5).tolist() == [0.0, 0.25, 0.25, 0.5, 0.5]  # 9 is beyond the budget


def test_the_mean_over_questions_and_what_is_read_off_it() -> None:
    found = [Sequential((1, 3)), Sequential((None, None)), Independent(4, 2)]
    curve = discovery_curve(found, 4)
    assert curve.mean.tolist() == pytest.approx([1 / 3, (0.5 + 5 / 6) / 3, 2 / 3, 2 / 3])
    assert curve.attempts_to(0.5) == 3
    assert curve.attempts_to(2 / 3) == 3
    assert curve.attempts_to(0.7) is None
    # min(first, 4) is 1 and 3, 4 and 4; of {1, 2} among 4 attempts in random order the first lies at 5 / 3
    assert mean_attempts(curve.mean) == pytest.approx((2 + 4 + 5 / 3) / 3)


def test_the_interval_holds_the_mean_narrows_with_questions_and_is_the_same_each_time() -> None:
    few = [Sequential((3, None)), Sequential((1, 8)), Sequential((None, 5))]
    one, again = discovery_curve(few, 8), discovery_curve(few, 8)
    many = discovery_curve(few * 20, 8)
    assert np.array_equal(one.low, again.low) and np.array_equal(one.high, again.high)
    assert np.all(one.low <= one.mean) and np.all(one.mean <= one.high)
    assert np.all(np.diff(one.mean) >= 0)
    assert many.high[4] - many.low[4] < 0.5 * (one.high[4] - one.low[4])


def test_a_picture_needs_only_the_k_at_which_something_moves() -> None:
    line = np.array([0.0, 0.0, 0.5, 0.5, 0.5, 0.5])
    assert Curve(line, np.zeros(6), np.array([0.0, 0.0, 0.5, 0.5, 1.0, 1.0])).changes() == [1, 3, 5, 6]


def test_seeds_are_drawn_within_a_question() -> None:
    curve = discovery_curve([Sequential((1, None))], 1)  # one question: what varies can only be its trials
    assert (curve.low[0], curve.mean[0], curve.high[0]) == (0.0, 0.5, 1.0)
    certain = discovery_curve([Independent(50, 0), Independent(50, 0)], 10)
    assert certain.high[-1] == 0.0


@pytest.mark.parametrize("budget", [1, 2, 8, 100, 1024])
def test_the_k_that_are_shown_lie_within_the_budget(budget: int) -> None:
    for ks in (shown_at(budget), drawn_at(budget)):
        assert ks == sorted(set(ks)) and ks[0] == 1 and ks[-1] == budget
