"""What the learner is tested on: tiny models, one fixed batch, and configurations by dotted overrides."""

import json
import random
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_sdpo.config import Config, LayoutConfig, ModelConfig, TaskConfig, apply_overrides
from megatron_sdpo.mcore.groups import ParallelGroups
from megatron_sdpo.mcore.hf import load_hf
from megatron_sdpo.mcore.learner import Learner
from megatron_sdpo.types import Batch, Sample
from tests.tiny_model import write_tiny_checkpoint

MODELS = {"llama": 2, "qwen3-tied": 4}
"""Name -> layers."""
VOCABULARY, HIDDEN = 104, 48
# (prompt, response, teacher prompt or None) tokens; neighbours in this list answer the same question
_LENGTHS = (
    *((3, 5, 9), (1, 17, 30), (20, 2, 21)),
    *((8, 9, None), (8, 1, 12), (8, 11, 40)),
    *((2, 6, 2), (30, 4, None), (5, 13, 7)),
)


def kv_heads(model: str) -> int:
    """One for every head, or one for two."""
    return 4 if model == "llama" else 2


def write_models(folder: Path, vocabulary: int = VOCABULARY, models: Mapping[str, int] = MODELS) -> None:
    """``folder/NAME`` for each of ``models``, and beside it ``NAME-teacher`` with other weights, not far away."""
    for name, layers in models.items():
        family, tied = name.removesuffix("-tied"), name.endswith("-tied")
        for path, seed in ((folder / name, 1), (folder / f"{name}-teacher", 2)):
            write_tiny_checkpoint(
                path,
                seed,
                family,
                vocabulary,
                HIDDEN,
                layers,
                kv_heads=kv_heads(name),
                head_dim=12,
                intermediate_size=80,
                std=0.2,
            )
            if tied:
                _tie(path)
        student, noise = (load_file(folder / which / "model.safetensors") for which in (name, f"{name}-teacher"))
        teacher = {key: weight + 0.2 * (noise[key] - weight) for key, weight in student.items()}
        save_file(teacher, folder / f"{name}-teacher" / "model.safetensors", metadata={"format": "pt"})


def make_config(model: Path, overrides: tuple[str, ...] = (), layout: LayoutConfig | None = None) -> Config:
    """fp32, SDPO; a learning rate at which three steps visibly move the loss, and gradients that are clipped.

    Adam's epsilon is not far below the gradients, so that rounding of a gradient near zero stays rounding.
    """
    base = Config(
        name="test",
        run_dir="unused",
        steps=10,
        seed=3,
        model=ModelConfig(path=str(model), dtype="float32", max_length=512),
        task=TaskConfig(name="none"),
        layout=layout or LayoutConfig(),
    )
    ours = ("optim.lr=1e-3", "optim.eps=1e-4", "optim.clip_grad=0.05", "optim.weight_decay=0.1")
    ours += ("objective.top_k=12", "teacher.update_rate=0.2")
    return apply_overrides(base, [*ours, *overrides])


def make_batch(step: int = 0) -> Batch:
    """Nine samples of three questions, prompts of 1 to 40 and responses of 1 to 17 tokens, two without a context."""
    draw = random.Random(step)

    def ids(count: int) -> tuple[int, ...]:
        # never token 0: transformers gives the padding token's embedding no gradient
        return tuple(draw.randrange(2, VOCABULARY) for _ in range(count))

    samples = [
        Sample(
            id=f"{step}/{i // 3}/{i % 3}",
            group=i // 3,
            prompt_ids=ids(prompt),
            response_ids=ids(response),
            engine_log_probs=tuple(draw.uniform(-9.0, -1.0) for _ in range(response)),
            teacher_prompt_ids=None if teacher is None else ids(teacher),
            reward=draw.choice([0.0, 0.5, 1.0]),
        )
        for i, (prompt, response, teacher) in enumerate(_LENGTHS)
    ]
    return Batch(step, tuple(samples), {}, cursor=(step + 1) * 3)


def make_learner(config: Config, groups: ParallelGroups, teacher: Path | None = None) -> Learner:
    """A learner whose teacher and reference, if any, have the weights of the directory ``teacher``; None: its own."""
    learner = Learner(config, groups)
    if teacher is not None:
        load_hf(learner.model, teacher, groups, config.layout)
        with torch.no_grad():
            theirs = learner.weights.cut(dict(learner.model.named_parameters()))
            for held in filter(None, (learner.teacher, learner.reference)):
                for weight, part in zip(held.tensors, theirs if held.tensors else (), strict=True):
                    weight.copy_(part)
        load_hf(learner.model, config.model.path, groups, config.layout)
    return learner


def learn(learner: Learner, batch: Batch) -> dict[str, float]:
    """All passes over one batch, as the loop makes them."""
    student = learner.score_student(batch)
    metrics = learner.train(batch, student, learner.score_teacher(batch, student))
    learner.update_teacher()
    return metrics


def comparable(metrics: dict[str, float]) -> dict[str, float]:
    """What every layout must say alike: all but which share of its tokens fills rows and micro-batches."""
    return {key: value for key, value in metrics.items() if key != "optim/padding_share"}


def _tie(path: Path) -> None:
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": True}))
    tensors = load_file(path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
