"""Qwen3-8B, the paper's runs: SciKnowEval, tool use and LiveCodeBench v6 by SDPO (bf16 as there, or FP8) and the two
GRPO baselines.

Needs ``models/Qwen3-8B`` and ``data/TASK`` (``model.path``, ``task.options.data``), and two nodes of eight 80 GB GPUs:
eight trainer ranks on one, eight engines on the other. The paper had one node of four GH200; the batch is the same.

Thinking is switched off, as in the paper. Its numbers are the best of a run within five hours (science and tools) or 90
generation batches (code); a recipe makes as many batches and evaluates every fifth.
"""

from dataclasses import dataclass, replace
from functools import partial

from megatron_sdpo.config import (
    Config,
    Fp8Config,
    LayoutConfig,
    ObjectiveConfig,
    OptimConfig,
    SandboxConfig,
    TaskConfig,
)
from recipes import _paper as paper


@dataclass(frozen=True, slots=True)
class Setting:
    """A task's column of the paper's table 12, and the numbers of its results."""

    task: TaskConfig
    steps: int
    feedback: bool
    programs: bool
    """Answers are executed."""
    update_rate: float
    alpha: float
    top_k: int
    lr: float
    warmup_steps: int
    questions_per_step: int
    eval_attempts: int


def _plain(task: TaskConfig) -> Setting:
    """Section 3: rewards only, JSD, one optimizer step a batch."""
    return Setting(
        task=task,
        steps=250,
        feedback=False,
        programs=False,
        update_rate=0.05,
        alpha=0.5,
        top_k=100,
        lr=1e-5,
        warmup_steps=10,
        questions_per_step=32,
        eval_attempts=16,
    )


SETTINGS = {
    **{
        f"sciknoweval-{domain}": _plain(paper.sciknoweval(domain))
        for domain in ("chemistry", "physics", "biology", "materials")
    },
    "tooluse": _plain(paper.tooluse()),
    # Section 4: the tests' words, KL(student || teacher), an optimizer step for the attempts of one question's number
    "livecodebench": Setting(
        task=paper.livecodebench(),
        steps=90,
        feedback=True,
        programs=True,
        update_rate=0.01,
        alpha=1.0,
        top_k=20,
        lr=1e-6,
        warmup_steps=0,
        questions_per_step=1,
        eval_attempts=4,
    ),
}


def sdpo(name: str) -> Config:
    """SDPO with an EMA teacher, by the paper's table 12."""
    setting = SETTINGS[name]
    return _config(
        f"qwen3-8b-{name}-sdpo",
        setting,
        paper.sdpo(setting.alpha, setting.top_k),
        paper.adamw(setting.lr, setting.warmup_steps, setting.questions_per_step),
    )


def sdpo_fp8(name: str) -> Config:
    """SDPO as above, with student, teacher and engines in blockwise FP8: the same codes of the weights for all three.

    Training passes keep codes beside the weights, in both directions, so four tensor ranks divide the model.
    """
    config = sdpo(name)
    return replace(
        config,
        name=f"{config.name}-fp8",
        run_dir=f"{config.run_dir}-fp8",
        layout=replace(config.layout, tensor_parallel=4),
        fp8=Fp8Config(student="blockwise", teacher="blockwise", floor_limit=0.01),
        engine=replace(config.engine, fp8="blockwise"),
        publish=replace(config.publish, probe_tolerance=1.0),
    )


def grpo(name: str) -> Config:
    """GRPO by the paper's table 13: four optimizer steps a batch, of eight questions each, at a rate of 1e-6."""
    setting = SETTINGS[name]
    return _config(f"qwen3-8b-{name}-grpo", setting, paper.grpo(), paper.adamw(1e-6, setting.warmup_steps, 8))


def grpo_on_policy(name: str) -> Config:
    """On-policy GRPO by the paper's table 13: one optimizer step a batch at a rate of 1e-5. The paper has none for
    LiveCodeBench; here it is made alike."""
    setting = SETTINGS[name]
    return _config(
        f"qwen3-8b-{name}-grpo-on-policy", setting, paper.grpo(), paper.adamw(1e-5, setting.warmup_steps, 32)
    )


def _config(name: str, setting: Setting, objective: ObjectiveConfig, optim: OptimConfig) -> Config:
    return Config(
        name=name,
        run_dir=f"runs/{name}",
        steps=setting.steps,
        model=paper.model("Qwen3-8B"),
        task=setting.task,
        layout=LayoutConfig(
            tensor_parallel=2,
            sequence_parallel=True,
            world_size=8,
            distributed_optimizer=True,
            overlap_grad_reduce=True,
            tokens_per_micro_batch=8192,
        ),
        engine=paper.engines(8),
        rollout=paper.rollout(verify_workers=paper.JUDGES) if setting.programs else paper.rollout(),
        sandbox=paper.sandbox() if setting.programs else SandboxConfig(),
        teacher_context=paper.teacher_context(setting.feedback),
        teacher=paper.teacher(setting.update_rate),
        objective=objective,
        optim=optim,
        publish=paper.publish(),
        evaluation=paper.evaluation(setting.eval_attempts),
    )


RECIPES = {
    f"qwen3-8b-{name}-{suffix}": partial(function, name)
    for name in SETTINGS
    for suffix, function in (
        ("sdpo", sdpo),
        ("sdpo-fp8", sdpo_fp8),
        ("grpo", grpo),
        ("grpo-on-policy", grpo_on_policy),
    )
}
