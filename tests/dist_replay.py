"""Worker of test_replay.py: a learner that takes a step apart, beside a plain one, on some layouts under torchrun.

Arguments: folder layout... (see dist_learner.parse). Asserts on every rank.
"""

import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_sdpo.config import LayoutConfig
from megatron_sdpo.mcore.groups import ParallelGroups, initialize, shutdown
from megatron_sdpo.mcore.inspection import Found, InspectedLearner
from tests.dist_checkpoint import differences, state_of
from tests.dist_learner import parse
from tests.learner_setup import learn, make_batch, make_config, make_learner

INSPECTED = 1


def check_inspection(folder: Path, groups: ParallelGroups, layout: LayoutConfig) -> None:
    """Several micro-batches of two mini-batches; then one of each."""
    for budget in (40, 4096):
        overrides = (f"layout.tokens_per_micro_batch={budget}", "optim.mini_batches=2")
        config = make_config(folder / "qwen3-tied", overrides, layout)
        found: list[Found] = []
        learner = InspectedLearner(config, groups, INSPECTED, found.append, detect_anomaly=False)
        plain = make_learner(config, groups)
        for step in range(3):
            metrics = learn(learner, make_batch(step))
            assert metrics == learn(plain, make_batch(step))
            assert differences(state_of(learner), state_of(plain)) == []
            assert (len(found) > 0) == (step >= INSPECTED)
            if step == INSPECTED:
                check_found(found, metrics)
                assert budget > 40 or max(one.micro_batches for one in found) > 1


def check_found(found: list[Found], metrics: dict[str, float]) -> None:
    ids = [id for one in found for samples in one.samples for id in samples]
    assert sorted(ids) == sorted(sample.id for sample in make_batch(INSPECTED).samples)
    counts = {one.mini_batch: one.micro_batches for one in found}
    order = [(mini, micro) for mini in (1, 2) for micro in range(1, counts[mini] + 1)]
    assert [(one.mini_batch, one.micro_batch) for one in found] == order and found[0].mini_batches == 2
    assert sum(loss for one in found for loss in one.losses) / 2 == pytest.approx(metrics["loss/total"], rel=1e-5)
    norms = [sum(one.norm for one in found if one.mini_batch == mini) for mini in (1, 2)]
    assert sum(norms) / 2 >= metrics["optim/grad_norm"] * (1 - 1e-5)  # the triangle's inequality
    if all(one.micro_batches == 1 for one in found):
        assert sum(norms) / 2 == metrics["optim/grad_norm"]


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    for name in sys.argv[2:]:
        groups = initialize(parse(name), seed=0, timeout_s=60)
        check_inspection(folder, groups, parse(name))
        parallel_state.destroy_model_parallel()
    shutdown()


if __name__ == "__main__":
    main()
