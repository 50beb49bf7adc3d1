"""Worker of test_placement.py: every placement of the teacher's weights, under one layout after the other.

Arguments: folder layout... Asserts on every rank.
"""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_sdpo.config import LayoutConfig
from megatron_sdpo.mcore import checkpoint
from megatron_sdpo.mcore.groups import ParallelGroups, initialize, shutdown
from megatron_sdpo.mcore.learner import Learner
from tests.dist_checkpoint import differences, state_of
from tests.dist_learner import parse
from tests.learner_setup import learn, make_batch, make_config, make_learner

PLACEMENTS = ("swapped", "resident", "offloaded")
CASES: dict[str, tuple[str, ...]] = {
    "ema": ("model.dtype=bfloat16",),
    "ema-fp32": ("teacher.update_every=optimizer_step", "optim.mini_batches=2"),
    "frozen": ("model.dtype=bfloat16", "teacher.kind=frozen"),
    "trust-region": ("model.dtype=bfloat16", "teacher.kind=trust_region", "teacher.mixture=0.3"),
    "reference": ("model.dtype=bfloat16", "objective.kind=hybrid", "objective.kl_coefficient=0.5"),
}
"""Name -> overrides."""


def learner_of(folder: Path, case: str, placement: str, groups: ParallelGroups, layout: LayoutConfig) -> Learner:
    model = "qwen3_moe" if layout.expert_parallel > 1 else "llama"
    config = make_config(folder / model, (*CASES[case], f"teacher.placement={placement}"), layout)
    return make_learner(config, groups, folder / f"{model}-teacher")


def check_case(folder: Path, case: str, groups: ParallelGroups, layout: LayoutConfig) -> None:
    """Three batches, a reset and one more are the same to the bit, wherever the teacher is."""
    found: list[tuple[Any, dict[str, Tensor]]] = []
    for placement in PLACEMENTS:
        learner = learner_of(folder, case, placement, groups, layout)
        metrics = [learn(learner, make_batch(step)) for step in range(3)]
        learner.reset()
        metrics.append(learn(learner, make_batch(3)))
        found.append((metrics, {name: x.clone() for name, x in state_of(learner).items() if isinstance(x, Tensor)}))
    for placement, (metrics, state) in zip(PLACEMENTS[1:], found[1:], strict=True):
        assert metrics == found[0][0], f"{case} {placement}: {metrics} is not {found[0][0]}"
        assert differences(state, found[0][1]) == [], f"{case} {placement}"


def check_never_stale(folder: Path, placement: str, groups: ParallelGroups, layout: LayoutConfig, path: Path) -> None:
    """What the teacher says changes exactly when its weights do."""
    learner = learner_of(folder, "ema", placement, groups, layout)
    batch = make_batch()
    student = learner.score_student(batch)  # of the first weights: the support stays the same

    def says() -> list[Tensor]:
        scores = learner.score_teacher(batch, student)
        return [scores.log_probs[i] for i in sorted(scores.log_probs)]

    def differ(a: list[Tensor], b: list[Tensor]) -> bool:
        return any(not torch.equal(x, y) for x, y in zip(a, b, strict=True))

    first, has_scores = says(), learner.groups.is_last_stage
    assert has_scores == bool(first)
    teacher = learner.score_teacher(batch, student)
    learner.train(batch, student, teacher)
    assert not differ(says(), first)  # the student has moved, the teacher not
    learner.update_teacher()
    second = says()
    assert differ(second, first) == has_scores
    assert not differ(says(), second)
    checkpoint.save(learner, path, cursor=0, keep=1)
    assert not differ(says(), second)
    learn(learner, make_batch(1))
    assert differ(says(), second) == has_scores
    assert checkpoint.load_latest(learner, path) is not None
    assert not differ(says(), second)
    learner.reset()
    assert differ(says(), second) == has_scores


class Collectives(TorchDispatchMode):
    """How often each is called within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.calls[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def check_gathers(folder: Path, groups: ParallelGroups, layout: LayoutConfig) -> None:
    """resident: the weights travel once after an update, however many passes there are; else twice a pass."""
    found = {}
    for placement in PLACEMENTS:
        learner = learner_of(folder, "ema", placement, groups, layout)
        batch = make_batch()
        student = learner.score_student(batch)
        counts = []
        for _ in range(3):
            learner.weights.gather()
            with Collectives() as collectives:
                learner.score_teacher(batch, student)
            counts.append(sum(n for name, n in collectives.calls.items() if "gather" in name))
        found[placement] = counts
    first, of_tokens, again = found["resident"]
    buckets = first - of_tokens  # experts on other ranks gather the counts of their tokens, in each layer
    assert again == of_tokens and (of_tokens > 0) == (layout.expert_parallel > 1) and buckets > 0, found
    assert found["swapped"] == found["offloaded"] and min(found["swapped"]) >= 2 * buckets + of_tokens, found


def main() -> None:
    folder = Path(sys.argv[1])
    for name in sys.argv[2:]:
        layout = parse(name)
        groups = initialize(layout, seed=0, timeout_s=60)
        for case in CASES if layout.distributed_optimizer else ("ema", "reference"):
            check_case(folder, case, groups, layout)
        for placement in PLACEMENTS:
            check_never_stale(folder, placement, groups, layout, folder / name / placement)
        if layout.distributed_optimizer:
            check_gathers(folder, groups, layout)
        parallel_state.destroy_model_parallel()
    shutdown()


if __name__ == "__main__":
    main()
