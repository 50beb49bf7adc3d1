"""A start for a model and a task of one's own, on one node of eight GPUs: set ``model.path``, ``task.name`` and
``task.options``, or take it as the base of a recipe in a module of one's own.

The paper's settings of tasks without rich feedback, except that the teacher reads the verifier's words where no other
attempt has succeeded. Four trainer ranks hold up to 8B; the other four GPUs have an engine each.
"""

from megatron_sdpo.config import CheckpointConfig, Config, LayoutConfig, TaskConfig
from recipes import _paper as paper


def own() -> Config:
    """SDPO of Qwen3-8B on the questions of ``data/maths``, judged by math-verify, until told otherwise."""
    return Config(
        name="own",
        run_dir="runs/own",
        steps=100,
        model=paper.model("Qwen3-8B"),
        task=TaskConfig(name="maths", options={"data": f"{paper.DATA}/maths"}),
        layout=LayoutConfig(tensor_parallel=4, sequence_parallel=True, world_size=4, tokens_per_micro_batch=8192),
        engine=paper.engines(4),
        rollout=paper.rollout(),
        teacher_context=paper.teacher_context(feedback=True),
        teacher=paper.teacher(0.05),
        objective=paper.sdpo(alpha=0.5, top_k=100),
        optim=paper.adamw(1e-5, 10, 32),
        publish=paper.publish(),
        checkpoint=CheckpointConfig(every=10),
        evaluation=paper.evaluation(4),
    )


RECIPES = {"own": own}
