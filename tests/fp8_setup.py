"""A model whose shards blocks of 128 divide, also on two tensor ranks, and learners of it in every precision."""

from pathlib import Path

from megatron_sdpo.config import LayoutConfig
from megatron_sdpo.mcore.groups import ParallelGroups
from megatron_sdpo.mcore.learner import Learner
from tests.learner_setup import make_batch, make_config, make_learner
from tests.tiny_model import write_tiny_checkpoint

LAYERS = 3
BOTH = ("fp8.student=emulated", "fp8.teacher=emulated")


def write_model(folder: Path) -> Path:
    return write_tiny_checkpoint(
        folder / "blocks",
        1,
        "llama",
        104,
        128,
        LAYERS,
        heads=4,
        kv_heads=4,
        head_dim=64,
        intermediate_size=256,
        std=0.1,
    )


def learner_of(model: Path, groups: ParallelGroups, *overrides: str, layout: LayoutConfig | None = None) -> Learner:
    return make_learner(make_config(model, overrides, layout), groups)


def first_batch(learner: Learner) -> dict[str, list[float] | float]:
    """What the passes over one batch say: log-probs of the student, teacher's at its support, metrics."""
    batch = make_batch()
    student = learner.score_student(batch)
    teacher = learner.score_teacher(batch, student)
    metrics = learner.train(batch, student, teacher)
    return {
        "student": [x for i in sorted(student.old_log_probs) for x in student.old_log_probs[i].tolist()],
        "loss": metrics["loss/total"],
        "grad_norm": metrics["optim/grad_norm"],
        "floor": metrics.get("precision/floor", -1.0),
        "probe": learner.log_probs([5, 6, 7, 8, 9]),
    }


def write_published(path: Path, family: str, seed: int = 1, head_dim: int = 128, layers: int = 2) -> Path:
    """A model that FP8 engines take, also on two tensor ranks: 4 heads, 256 MLP units, or as many of each expert."""
    write_tiny_checkpoint(
        path,
        seed,
        family,
        104,
        128,
        layers,
        heads=4,
        kv_heads=4 if head_dim < 128 else 2,
        head_dim=head_dim,
        intermediate_size=256,
        expert_size=256,
        std=0.1,
    )
    return path
