"""Between trials a learner goes back to the base: to the bit what a new one would be, under every layout."""

from pathlib import Path

import pytest

from megatron_sdpo.config import LayoutConfig
from megatron_sdpo.mcore.groups import ParallelGroups
from tests.dist_reset import CASES, check_reset
from tests.launch import run_ranks


@pytest.mark.parametrize("case", CASES)
def test_a_reset_learner_is_a_new_one(folder: Path, groups: ParallelGroups, case: str) -> None:
    model, overrides = CASES[case]
    check_reset(folder / model, overrides, groups, LayoutConfig())


@pytest.mark.parametrize("layout", ["tp2-sp", "pp2", "dp2-overlap"])
def test_under_every_layout(folder: Path, layout: str) -> None:
    run_ranks("dist_reset.py", 2, [str(folder), layout], timeout=200)
