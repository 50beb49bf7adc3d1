"""Findings, random models, batches and learners on a GPU."""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_sdpo.config import Config, LayoutConfig, ModelConfig, TaskConfig, apply_overrides
from megatron_sdpo.hf_config import read_hf_config
from megatron_sdpo.launch.planning import PUBLISHED
from megatron_sdpo.mcore import names, platform
from megatron_sdpo.mcore.groups import ParallelGroups, initialize
from megatron_sdpo.mcore.learner import Learner
from megatron_sdpo.types import Batch, Sample

DEVICE = platform.device()
QWEN3_8B = PUBLISHED / "Qwen3-8B" / "config.json"


@dataclass(frozen=True, slots=True)
class Finding:
    """One row of the table. ``good`` None: a number without a bound."""

    what: str
    found: float | str
    bound: str = ""
    good: bool | None = None


def at_most(what: str, found: float, bound: float) -> Finding:
    return Finding(what, found, f"<= {bound:g}", found <= bound)


def at_least(what: str, found: float, bound: float) -> Finding:
    return Finding(what, found, f">= {bound:g}", found >= bound)


def holds(what: str, good: bool, found: str = "") -> Finding:
    return Finding(what, found or ("yes" if good else "no"), "yes", good)


def relative(found: Tensor, wanted: Tensor) -> float:
    """Of the norm of the difference to that wanted, in float64."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def qwen3(**changes: int) -> dict[str, Any]:
    """A Qwen3 configuration: that of the 8B model with other sizes."""
    return {**json.loads(QWEN3_8B.read_text()), **changes}


SMALL = {
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "intermediate_size": 1536,
    "vocab_size": 4096,
    "max_position_embeddings": 4096,
}


def write_model(folder: Path, settings: dict[str, Any], seed: int = 0, std: float = 0.03) -> Path:
    """A checkpoint directory of random weights in bf16; norms are ones."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    generator = torch.Generator(DEVICE).manual_seed(seed)
    tensors = {}
    for name, tensor in names.hf_layout(read_hf_config(folder)).items():
        if len(tensor.shape) == 1:
            tensors[name] = torch.ones(tensor.shape, dtype=torch.bfloat16)
        else:
            drawn = torch.randn(tensor.shape, generator=generator, device=DEVICE, dtype=torch.bfloat16)
            tensors[name] = drawn.mul_(std).cpu()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def draw_batch(
    vocabulary: int, lengths: Sequence[tuple[int, int, int]], seed: int = 0, step: int = 0, group: int = 4
) -> Batch:
    """Random tokens; ``lengths`` of prompt, response and teacher prompt."""
    draw = random.Random(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(2, vocabulary) for _ in range(count))

    samples = [
        Sample(f"{step}/{i}", i // group, ids(p), ids(r), (-8.0,) * r, ids(t), float(i % 2))
        for i, (p, r, t) in enumerate(lengths)
    ]
    return Batch(step, tuple(samples), {}, cursor=step + 1)


def mixed_lengths(count: int, seed: int = 0) -> list[tuple[int, int, int]]:
    draw = random.Random(seed)
    return [(draw.randint(4, 90), draw.randint(3, 120), draw.randint(30, 200)) for _ in range(count)]


def config_of(model: Path, *overrides: str) -> Config:
    """SDPO in bf16 on one GPU."""
    base = Config(
        name="gpu",
        run_dir="unused",
        steps=1000,
        model=ModelConfig(path=str(model), dtype="bfloat16", max_length=4096),
        task=TaskConfig(name="none"),
        layout=LayoutConfig(),
    )
    return apply_overrides(base, ["objective.top_k=20", "optim.lr=1e-4", *overrides])


_groups: list[ParallelGroups] = []


def groups_of_one() -> ParallelGroups:
    """This process alone, on NCCL."""
    if not _groups:
        _groups.append(initialize(LayoutConfig(), seed=0, timeout_s=300))
    return _groups[0]


def learner_of(model: Path, *overrides: str) -> Learner:
    return Learner(config_of(model, *overrides), groups_of_one())


def step_of(learner: Learner, batch: Batch) -> tuple[dict[str, float], dict[int, Tensor], dict[int, Tensor]]:
    """All passes over a batch -> (metrics, student's log-probs, teacher's)."""
    student = learner.score_student(batch)
    teacher = learner.score_teacher(batch, student)
    metrics = learner.train(batch, student, teacher)
    learner.update_teacher()
    return metrics, student.old_log_probs, teacher.log_probs


def joined(values: dict[int, Tensor]) -> Tensor:
    """In the order of the samples."""
    return torch.cat([values[i].flatten() for i in sorted(values)])


def rows(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    return [asdict(finding) for finding in findings]
