"""Worker of test_sharing.py: shared beginnings against none, under some layouts one after another under torchrun.

Arguments: folder LAYOUT:FAMILY... Every rank compares what it finds; rank 0 writes folder/LAYOUT-FAMILY.json: what
each of two ``train`` calls said where beginnings were shared, and the tokens that this spared.
"""

import json
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_sdpo.mcore.groups import initialize, shutdown
from tests.dist_learner import parse
from tests.learner_setup import comparable
from tests.same_numbers import TOLERANCE
from tests.sharing_setup import check_same, scored


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    for name, family in (argument.split(":") for argument in sys.argv[2:]):
        layout = parse(name)
        groups = initialize(layout, seed=0, timeout_s=60)
        budget = "layout.tokens_per_micro_batch=90"
        plain, said, _ = scored(folder / family, groups, layout, "off", budget)
        found, metrics, spared = scored(folder / family, groups, layout, "scoring", budget)
        assert all(spared.values()) and len(spared) == 2, spared
        assert bool(found["student"]) == groups.is_last_stage
        check_same(found, plain)
        for ours, theirs in zip(metrics, said, strict=True):
            assert comparable(ours) == pytest.approx(comparable(theirs), rel=TOLERANCE, abs=1e-9), f"{name} {family}"
        if groups.rank == 0:
            (folder / f"{name}-{family}.json").write_text(json.dumps([metrics, spared]))
        parallel_state.destroy_model_parallel()
    shutdown()


if __name__ == "__main__":
    main()
