"""A ladder of sizes for scaling laws: Qwen3 from 0.6B to 32B, one task, one set of hyperparameters, SDPO.

The paper's settings without rich feedback on SciKnowEval chemistry; only model, layout and engines differ. The paper
has sizes up to 8B, on another task. Needs ``models/Qwen3-SIZE`` and ``data/sciknoweval``; two nodes of eight H100, 32B
four: nodes that train and nodes that generate.
"""

import json
from dataclasses import asdict, dataclass
from functools import partial

from megatron_sdpo.config import Config, LayoutConfig, ObjectiveConfig
from megatron_sdpo.scaling.study import Study
from recipes import _paper as paper


@dataclass(frozen=True, slots=True)
class Rung:
    """One size."""

    layout: LayoutConfig
    engines: tuple[int, int]
    """How many, and GPUs of each."""


def _layout(tensor: int = 1, pipeline: int = 1, context: int = 1, ranks: int = 8) -> LayoutConfig:
    replicated = ranks > tensor * pipeline
    return LayoutConfig(
        tensor_parallel=tensor,
        sequence_parallel=tensor > 1,
        pipeline_parallel=pipeline,
        context_parallel=context,
        world_size=ranks,
        distributed_optimizer=replicated,
        overlap_grad_reduce=replicated,
        tokens_per_micro_batch=8192,
    )


RUNGS = {
    "0.6B": Rung(_layout(), (8, 1)),
    "1.7B": Rung(_layout(), (8, 1)),
    "4B": Rung(_layout(context=2), (8, 1)),  # one rank for a copy would leave nothing free: 76 of 77 GB
    "8B": Rung(_layout(tensor=2), (8, 1)),
    "14B": Rung(_layout(tensor=4, pipeline=2), (8, 1)),
    "32B": Rung(_layout(tensor=8, pipeline=2, ranks=16), (8, 2)),  # on one node it does not fit
}


def rung(size: str) -> Config:
    """SDPO of Qwen3 of this size, by the settings that all sizes share."""
    held, name = RUNGS[size], f"ladder-{size.lower()}"
    count, tensor = held.engines
    return Config(
        name=name,
        run_dir=f"runs/{name}",
        steps=250,
        model=paper.model(f"Qwen3-{size}"),
        task=paper.sciknoweval("chemistry"),
        layout=held.layout,
        engine=paper.engines(count, tensor),
        rollout=paper.rollout(),
        teacher_context=paper.teacher_context(feedback=False),
        teacher=paper.teacher(0.05),
        objective=paper.sdpo(alpha=0.5, top_k=100),
        optim=paper.adamw(1e-5, 10, 32),
        publish=paper.publish(),
        evaluation=paper.evaluation(16),
    )


RECIPES = {f"ladder-{size.lower()}": partial(rung, size) for size in RUNGS}


def _as_overrides(objective: ObjectiveConfig) -> tuple[str, ...]:
    """What makes the ladder's objective this one."""
    ours = asdict(paper.sdpo(alpha=0.5, top_k=100))
    return tuple(f"objective.{key}={json.dumps(v)}" for key, v in asdict(objective).items() if v != ours[key])


STUDIES = [
    Study(
        name="ladder",
        title="SDPO and GRPO on SciKnowEval chemistry, Qwen3 0.6B to 32B",
        sizes={size: f"ladder-{size.lower()}" for size in RUNGS},
        arms={"sdpo": (), "grpo": _as_overrides(paper.grpo())},
        seeds=(0, 1, 2),
        levels=(0.5, 0.7),
    )
]
