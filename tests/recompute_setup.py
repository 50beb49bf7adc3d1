"""What recomputation is tested on: trained with and without it, the same numbers, and what was computed again."""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_sdpo.config import LayoutConfig
from megatron_sdpo.mcore.groups import ParallelGroups
from megatron_sdpo.mcore.learner import Learner
from megatron_sdpo.types import Batch
from tests.learner_setup import learn, make_batch, make_config, make_learner

LAYERS = {"llama": 8, "qwen3_moe": 2}
"""Of each model."""
SETTINGS: dict[str, tuple[str, ...]] = {
    "none": (),
    "core_attn": ("layout.recompute=selective",),
    "mlp": ("layout.recompute=selective", 'layout.recompute_modules=["mlp"]'),
    "moe": ("layout.recompute=selective", 'layout.recompute_modules=["moe"]'),
    "layernorm": ("layout.recompute=selective", 'layout.recompute_modules=["layernorm"]'),
    "together": ("layout.recompute=selective", 'layout.recompute_modules=["core_attn","layernorm"]'),
    "uniform": ("layout.recompute=full",),
    "uniform-2": ("layout.recompute=full", "layout.recompute_num_layers=2"),
    "block": ("layout.recompute=full", "layout.recompute_method=block"),
    "divided": ("layout.recompute=full", "layout.distribute_saved_activations=true"),
}
"""Name -> overrides."""
_PARTS = {"core_attention": "core_attn", "mlp": "mlp", "input_layernorm": "layernorm", "router": "moe"}
"""Module name -> whose recomputation runs it again."""


def learner_of(
    folder: Path, model: str, setting: str, groups: ParallelGroups, layout: LayoutConfig | None = None
) -> Learner:
    overrides = ("optim.mini_batches=2", *SETTINGS[setting])
    config = make_config(folder / model, overrides, layout or LayoutConfig())
    return make_learner(config, groups, folder / f"{model}-teacher")


def long_batch() -> Batch:
    """Four samples of 140 and 150 tokens: of a training pass's memory, most is activations."""
    short = make_batch(2)
    samples = [
        dataclasses.replace(s, prompt_ids=s.prompt_ids * (140 // len(s.prompt_ids)), teacher_prompt_ids=s.prompt_ids)
        for s in short.samples[:4]
    ]
    return dataclasses.replace(short, samples=tuple(samples))


def count_calls(learner: Learner) -> Counter[str]:
    """From now on, how often parts of the layers are run, under the names in settings; ``layer``: whole layers."""
    calls: Counter[str] = Counter()

    def watch(module: torch.nn.Module, name: str) -> None:
        module.register_forward_pre_hook(lambda *_: calls.update([name]))

    for path, module in learner.model.named_modules():
        last = path.rpartition(".")[2]
        if last.isdecimal() and ".layers." in f".{path}" and path.count("layers.") == 1 and "experts" not in path:
            watch(module, "layer")
        elif last in _PARTS:
            watch(module, _PARTS[last])
    return calls


def two_batches(learner: Learner) -> tuple[list[dict[str, float]], list[list[Tensor]]]:
    """What two batches say, and this rank's weights before and after them."""
    weights = [_copies(learner)]
    metrics = [learn(learner, make_batch(step)) for step in range(2)]
    return metrics, [*weights, _copies(learner)]


def _copies(learner: Learner) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in learner.model.parameters()]


def check_same(setting: str, learner: Learner, plain: Learner) -> list[dict[str, float]]:
    """Two batches give the same numbers with and without: to the bit but where norms are computed again.

    Their own gradients are then summed before the residual's is added: within 1e-5, then.
    """
    (found, (_, ours)), (expected, (before, theirs)) = two_batches(learner), two_batches(plain)
    if "layernorm" in "".join(SETTINGS[setting]):
        assert found == [pytest.approx(metrics, rel=1e-5, abs=1e-9) for metrics in expected]
        assert _distance(ours, theirs) <= 1e-5 * _distance(before, theirs)
    else:
        assert found == expected
        assert all(map(torch.equal, ours, theirs))
    return found


def _distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return math.sqrt(sum((x.double() - y.double()).pow(2).sum().item() for x, y in zip(a, b, strict=True)))


def calls_of_training(learner: Learner) -> Counter[str]:
    """Of one more batch's training passes alone."""
    batch = make_batch(2)
    student = learner.score_student(batch)
    teacher = learner.score_teacher(batch, student)
    calls = count_calls(learner)
    learner.train(batch, student, teacher)
    return Counter(calls)
