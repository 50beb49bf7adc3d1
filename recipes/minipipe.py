"""MiniPipe: a 0.37M-parameter model learns, on two CPU cores and in minutes, what its machine's commands are called."""

from dataclasses import replace
from pathlib import Path

import megatron_sdpo
from megatron_sdpo.config import (
    CheckpointConfig,
    Config,
    DiscoveryConfig,
    EngineConfig,
    EvaluationConfig,
    LayoutConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RolloutConfig,
    TaskConfig,
    TeacherConfig,
    TeacherContextConfig,
)
from megatron_sdpo.tasks.minipipe import ATTEMPT_TEMPLATE, FEEDBACK_TEMPLATE, SOLUTION_TEMPLATE, TEACHER_TEMPLATE

_DATA = Path(megatron_sdpo.__file__ or "").parent / "data"
BASE_MODEL = str(_DATA / "minipipe-base")
HARD_QUESTIONS = str(_DATA / "minipipe-hard.jsonl")
"""Chosen by tools/choose_hard_questions.py: the base model solves them once in 250 to 2000 attempts."""


def minipipe() -> Config:
    """SDPO: from 2 % to over 95 % on held-out compositions, in 28 batches of 16 questions x 8 attempts.

    Learning rate and mini-batches are the best of those tried (results/rich). The teacher stays what it was: as fast
    as one that follows the student, and steady when the run is made longer (results/teachers).
    """
    return Config(
        name="minipipe",
        run_dir="runs/minipipe",
        steps=28,
        model=ModelConfig(path=BASE_MODEL, dtype="float32", max_length=128),
        task=TaskConfig(name="minipipe", options={"machine_seed": 1}),
        layout=LayoutConfig(tensor_parallel=2, world_size=2, tokens_per_micro_batch=4096),
        engine=EngineConfig(max_running_requests=320, max_total_tokens=65536, start_timeout_s=180),
        rollout=RolloutConfig(prompts_per_step=16, attempts_per_prompt=8, max_new_tokens=16),
        teacher_context=TeacherContextConfig(
            template=TEACHER_TEMPLATE,
            solution_template=SOLUTION_TEMPLATE,
            attempt_template=ATTEMPT_TEMPLATE,
            feedback_template=FEEDBACK_TEMPLATE,
            max_prompt_tokens=96,
        ),
        teacher=TeacherConfig(kind="frozen"),
        objective=ObjectiveConfig(kind="sdpo", alpha=0.5, top_k=20),
        optim=OptimConfig(lr=1e-3, lr_decay="linear", min_lr_ratio=0.1, mini_batches=8),
        checkpoint=CheckpointConfig(every=4),
        evaluation=EvaluationConfig(every=4, attempts=4),
    )


def minipipe_grpo() -> Config:
    """The GRPO baseline on the same questions, at the best settings of those tried (results/rich)."""
    config = minipipe()
    return replace(
        config,
        name="minipipe-grpo",
        run_dir="runs/minipipe-grpo",
        objective=ObjectiveConfig(kind="grpo", advantage_std=True),
        optim=OptimConfig(lr=1e-3, lr_decay="linear", min_lr_ratio=0.1, mini_batches=4),
    )


def minipipe_discovery() -> Config:
    """Hard questions one at a time, from the base model each time: how many attempts until the first success?"""
    config = minipipe()
    return replace(
        config,
        name="minipipe-discovery",
        run_dir="runs/minipipe-discovery",
        steps=128,
        task=TaskConfig(
            name="minipipe",
            options={"machine_seed": 1, "ranks": [1, 2, 3], "min_ops": 3, "max_ops": 4, "questions": HARD_QUESTIONS},
        ),
        layout=LayoutConfig(tokens_per_micro_batch=4096),
        teacher=TeacherConfig(kind="ema", update_rate=0.05),
        optim=OptimConfig(lr=2e-3),
        evaluation=EvaluationConfig(every=0),
        discovery=DiscoveryConfig(budget=1024, seeds=3),
    )


RECIPES = {"minipipe": minipipe, "minipipe-grpo": minipipe_grpo, "minipipe-discovery": minipipe_discovery}
