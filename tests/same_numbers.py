"""What a layout trained (``dist_learner.run_cases``) against what one process did.

Sums are taken in another order under another layout, which moves a loss or a gradient norm in fp32 by a few 1e-6 of
itself; ``TOLERANCE`` leaves room for that and for nothing else.
"""

import json
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.dist_learner import BATCHES
from tests.learner_setup import comparable

TOLERANCE = 1e-5
"""Relative, of losses and gradient norms."""
WEIGHT_TOLERANCE = 1e-5
"""Of weights after Adam: their distance, relative to how far training moved them (rounding alone makes 4e-6)."""
BF16_TOLERANCE = 6e-2
"""Of losses and gradient norms in bf16, whose numbers are 4e-3 apart: sums in another order round elsewhere (4.6e-2
found)."""


def metrics_of(path: Path) -> list[dict[str, float]]:
    return json.loads((path / "metrics.json").read_text())


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return math.sqrt(sum((a[name].double() - b[name].double()).pow(2).sum().item() for name in a))


def check_weights(
    found: dict[str, Tensor],
    expected: dict[str, Tensor],
    before: dict[str, Tensor],
    tolerance: float = WEIGHT_TOLERANCE,
) -> None:
    assert distance(found, expected) <= tolerance * distance(expected, before)


def check_case(out: Path, single: Path, before: Path, bf16_weights: float) -> None:
    """``out`` and ``single``: the directories of one case; ``before``: of its model. A case in bf16 is named so."""
    metrics, expected = metrics_of(out), metrics_of(single)
    assert len(metrics) == BATCHES
    exact = not out.name.startswith("bf16")
    for ours, theirs in zip(metrics, expected, strict=True):
        if exact:
            agreed = comparable(ours) == pytest.approx(comparable(theirs), rel=TOLERANCE, abs=1e-9)
            assert agreed, f"{out}: {ours} is not {theirs}"
        for key in ("loss/total", "optim/grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=BF16_TOLERANCE), f"{out}"
    weights = [load_file(path / "model.safetensors") for path in (out, single, before)]
    check_weights(weights[0], weights[1], weights[2], WEIGHT_TOLERANCE if exact else bf16_weights)
