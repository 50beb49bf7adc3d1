"""The learning-rate curve, by hand."""

import math
from typing import Literal

import pytest

from megatron_sdpo.config import OptimConfig
from megatron_sdpo.mcore.optimizer import learning_rate


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.25, 0.5, 0.75, 1.0, 1.0, 0.8, 0.6, 0.4]),
        ("cosine", [0.25, 0.5, 0.75, 1.0, 1.0, *(0.2 + 0.4 * (1 + math.cos(math.pi * i / 4)) for i in (1, 2, 3))]),
    ],
)
def test_the_rate_rises_to_its_full_height_and_falls_towards_its_least(
    decay: Literal["constant", "linear", "cosine"], expected: list[float]
) -> None:
    """Of a run of eight batches, four of them warm-up: the first already learns, and the fall ends behind the last."""
    config = OptimConfig(lr=3e-4, lr_decay=decay, warmup_steps=4, min_lr_ratio=0.2)
    rates = [learning_rate(config, step, 8) / 3e-4 for step in range(8)]
    assert rates == pytest.approx(expected, rel=1e-12)
    assert learning_rate(config, 8, 8) / 3e-4 == pytest.approx(1.0 if decay == "constant" else 0.2, rel=1e-12)
    plain = OptimConfig(lr=3e-4, lr_decay=decay)
    assert learning_rate(plain, 0, 8) == 3e-4


def test_a_run_that_is_all_warm_up() -> None:
    config = OptimConfig(lr=1.0, lr_decay="linear", warmup_steps=8)
    assert [learning_rate(config, step, 4) for step in range(4)] == [0.125, 0.25, 0.375, 0.5]
