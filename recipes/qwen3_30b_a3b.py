"""Qwen3-30B-A3B, a mixture of 128 experts, by SDPO on four nodes of eight H100: two train, two generate.

A pipeline stage is one node: context ranks (4) and data ranks (2) together hold the experts, 16 each, so tokens reach
their experts by NVLink, and the pipeline crosses the two nodes. Nothing needs to be computed again. Needs
``models/Qwen3-30B-A3B`` and ``data/sciknoweval``.
"""

from megatron_sdpo.config import Config, LayoutConfig
from recipes import _paper as paper


def sdpo() -> Config:
    """The paper's settings without rich feedback, on SciKnowEval chemistry: planned 64.1 GB, 62 s a step."""
    return Config(
        name="qwen3-30b-a3b-sdpo",
        run_dir="runs/qwen3-30b-a3b-sdpo",
        steps=250,
        model=paper.model("Qwen3-30B-A3B"),
        task=paper.sciknoweval("chemistry"),
        layout=LayoutConfig(
            pipeline_parallel=2,
            context_parallel=4,
            expert_parallel=8,
            world_size=16,
            distributed_optimizer=True,
            overlap_grad_reduce=True,
            tokens_per_micro_batch=8192,
        ),
        engine=paper.engines(8, tensor_parallel=2),
        rollout=paper.rollout(),
        teacher_context=paper.teacher_context(feedback=False),
        teacher=paper.teacher(0.05),
        objective=paper.sdpo(alpha=0.5, top_k=100),
        optim=paper.adamw(1e-5, 10, 32),
        publish=paper.publish(),
        evaluation=paper.evaluation(16),
    )


RECIPES = {"qwen3-30b-a3b-sdpo": sdpo}
