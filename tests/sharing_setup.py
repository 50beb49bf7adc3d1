"""Batches of siblings for shared beginnings, models of every family, and what scoring makes of them."""

import dataclasses
import random
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sdpo.config import LayoutConfig
from megatron_sdpo.mcore.groups import ParallelGroups
from megatron_sdpo.types import Batch, Sample
from tests.learner_setup import VOCABULARY, learn, make_config, make_learner, write_models
from tests.test_mcore_model import make_qwen2

FAMILIES = ("llama", "qwen2", "qwen3-tied", "qwen3_moe")
LOG_PROB_TOLERANCE = 2e-5
"""Absolute, of log-probs in fp32 (4e-6 found): a product over other rows adds in another order."""


def write_families(folder: Path) -> None:
    write_models(folder, models=dict.fromkeys(("llama", "qwen3-tied", "qwen3_moe", "qwen3"), 4))
    for path in (folder / "qwen3", folder / "qwen3-teacher"):
        make_qwen2(path)
        path.rename(path.with_name(path.name.replace("qwen3", "qwen2")))


def sibling_batch(step: int = 0) -> Batch:
    """Three questions of six attempts. The teacher's prompts of the first: a solution that five read, two of them with
    words of their own after it, and another; of the second: all the same, and the whole prompt of one is the beginning
    of the others; of the third: nothing in common, and one without a context. Responses have 1 to 12 tokens."""
    draw = random.Random(step)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(2, VOCABULARY) for _ in range(count))

    samples = []
    for group in range(3):
        question, solution, same = ids(11), ids(26), ids(20)
        contexts: list[tuple[tuple[int, ...] | None, ...]] = [
            (*((*question, *solution, *ids(n)) for n in (0, 0, 3, 5, 0)), (*question, *ids(30))),
            tuple((*same, *ids(n)) for n in (0, 4, 0, 1, 0, 2)),
            (*(ids(n) for n in (1, 9, 14, 30, 3)), None),
        ]
        for i, context in enumerate(contexts[group]):
            response = ids(1 if i in (1, 2) else draw.randrange(2, 13))
            engine = tuple(draw.uniform(-9.0, -1.0) for _ in response)
            samples.append(
                Sample(f"{step}/{group}/{i}", group, question, response, engine, context, draw.choice([0.0, 0.5, 1.0]))
            )
    return Batch(step, tuple(samples), {}, cursor=3)


def scored(
    model: Path, groups: ParallelGroups, layout: LayoutConfig, share: str, *overrides: str, batches: int = 2
) -> tuple[dict[str, dict[int, Tensor]], list[dict[str, float]], dict[str, int]]:
    """What scoring passes say by sample (of all data ranks, on the last stage), what trained batches say, and how many
    tokens each view was spared."""
    layout = dataclasses.replace(layout, share_prefixes=share)  # pyright: ignore[reportArgumentType]
    config = make_config(model, ("optim.mini_batches=2", *overrides), layout)
    teacher = model.with_name(f"{model.name}-teacher")
    learner = make_learner(config, groups, teacher if teacher.exists() else None)
    batch = sibling_batch()
    student = learner.score_student(batch)
    mine = {"student": student.old_log_probs, "teacher": learner.score_teacher(batch, student).log_probs}
    spared = {view: tokens.tokens for view, tokens in learner._spared.items()}
    metrics = [learn(learner, sibling_batch(step)) for step in range(batches)]
    if groups.data_size > 1 and groups.is_last_stage:
        everywhere: list[dict[str, dict[int, Tensor]]] = [{}] * groups.data_size
        dist.all_gather_object(everywhere, mine, group=groups.data)
        mine = {view: {i: x for found in everywhere for i, x in found[view].items()} for view in mine}
    return mine, metrics, spared


def check_same(
    ours: dict[str, dict[int, Tensor]], theirs: dict[str, dict[int, Tensor]], tolerance: float = LOG_PROB_TOLERANCE
) -> None:
    """Every log-prob of every sample."""
    for view, found in theirs.items():
        assert ours[view].keys() == found.keys()
        for i, log_probs in found.items():
            torch.testing.assert_close(ours[view][i], log_probs, rtol=0, atol=tolerance, msg=f"{view} {i}")
