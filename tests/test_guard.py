"""The collapse guard as a function of what it has seen; the learner's use of it is in test_learner.py."""

from dataclasses import replace
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sdpo.config import GuardConfig
from megatron_sdpo.guard import History, factor, fallen

REWARD = GuardConfig(signal="reward", drop=0.1, damping=0.25, reward_window=2)
VALUES = st.lists(st.floats(0.0, 1.0), max_size=30)
CONFIGS = st.builds(
    GuardConfig,
    signal=st.sampled_from(["off", "reward", "accuracy", "both"]),
    drop=st.floats(0.0, 1.0),
    damping=st.floats(0.0, 1.0),
    reward_window=st.integers(1, 6),
    accuracy_window=st.integers(1, 6),
)


def _factors(rewards: list[float], config: GuardConfig) -> list[float]:
    """The factor of each step of a run."""
    histories = accumulate(rewards, lambda history, reward: history.with_reward(reward), initial=History())
    return [factor(history, config) for history in histories][1:]


def test_a_fall_damps_until_the_signal_has_recovered() -> None:
    rewards = [0.25, 0.75, 1.0, 0.75, 0.5, 0.75, 0.75, 1.0, 0.25]
    # means of two:  0.5, 0.875, 0.875, 0.625, 0.625, 0.75, 0.875, 0.625
    assert _factors(rewards, REWARD) == [1, 1, 1, 1, 0.25, 0.25, 0.25, 1, 0.25]
    assert _factors(rewards, replace(REWARD, drop=0.125)) == [
        1,
        1,
        1,
        1,
        0.25,
        0.25,
        1,
        1,
        0.25,
    ]  # more than, not as much
    assert _factors(rewards, replace(REWARD, reward_window=1)) == [1, 1, 1, 0.25, 0.25, 0.25, 0.25, 1, 0.25]
    assert _factors(rewards, replace(REWARD, reward_window=10)) == [1] * 9


@pytest.mark.parametrize(
    ("signal", "rewards", "accuracies", "damped"),
    [
        ("reward", (1.0, 0.0), (0.0, 1.0), True),
        ("reward", (0.0, 1.0), (1.0, 0.0), False),
        ("accuracy", (1.0, 0.0), (0.0, 1.0), False),
        ("accuracy", (0.0, 1.0), (1.0, 0.0), True),
        ("accuracy", (1.0, 0.0), (), False),
        ("both", (1.0, 0.0), (0.0, 1.0), True),
        ("both", (0.0, 1.0), (1.0, 0.0), True),
        ("both", (0.0, 1.0), (0.0, 1.0), False),
        ("off", (1.0, 0.0), (1.0, 0.0), False),
    ],
)
def test_only_the_signals_that_are_watched_damp(signal, rewards, accuracies, damped: bool) -> None:
    config = GuardConfig(signal=signal, reward_window=1, damping=0.5)
    assert factor(History(rewards, accuracies), config) == (0.5 if damped else 1.0)


@given(rewards=VALUES, accuracies=VALUES, config=CONFIGS)
def test_the_factor_is_one_or_the_damping_and_off_is_exactly_one(rewards, accuracies, config: GuardConfig) -> None:
    history = History(tuple(rewards), tuple(accuracies))
    found = factor(history, config)
    assert found in (1.0, config.damping)
    assert factor(history, replace(config, signal="off")) == 1.0
    assert factor(history, replace(config, drop=1.0)) == 1.0
    if config.signal == "both":
        alone = [factor(history, replace(config, signal=signal)) for signal in ("reward", "accuracy")]
        assert found == min(alone)


@given(rewards=VALUES.map(sorted), accuracies=VALUES.map(sorted), config=CONFIGS)
def test_signals_that_only_rise_never_damp(rewards, accuracies, config: GuardConfig) -> None:
    assert factor(History(tuple(rewards), tuple(accuracies)), replace(config, drop=0.0)) == 1.0


@given(values=VALUES, window=st.integers(1, 6))
def test_the_fall_is_that_of_plain_means(values: list[float], window: int) -> None:
    means = [sum(values[i : i + window]) / window for i in range(len(values) - window + 1)]
    assert fallen(values, window) == pytest.approx(max(means) - means[-1] if means else 0.0, abs=1e-12)
