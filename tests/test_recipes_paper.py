"""The recipes' hyperparameters against the paper's tables 12 and 13 (arXiv 2601.20802 v2) and the released settings.

The values below are copied from there, not from the recipes.
"""

from dataclasses import replace
from operator import attrgetter
from typing import Any

import pytest

from recipes import recipe

DOMAINS = ("chemistry", "physics", "biology", "materials")
PLAIN_TASKS = {**{f"sciknoweval-{d}": ("sciknoweval", {"domain": d}) for d in DOMAINS}, "tooluse": ("tooluse", {})}
TASKS = {**PLAIN_TASKS, "livecodebench": ("livecodebench", {"train_tests": "half"})}

EVERY_RUN: dict[str, Any] = {
    "model.dtype": "bfloat16",
    "model.thinking": False,
    "rollout.max_new_tokens": 8192,
    "rollout.prompts_per_step": 32,
    "rollout.attempts_per_prompt": 8,
    "rollout.temperature": 1.0,
    "rollout.max_staleness": 0,
    "evaluation.every": 5,
    "evaluation.temperature": 0.6,
    "evaluation.top_p": 0.95,
    "optim.lr_decay": "constant",
    "optim.weight_decay": 0.01,
    "optim.clip_grad": 1.0,
    "optim.beta1": 0.9,
    "optim.beta2": 0.999,
    "objective.engine_mismatch_cap": 2.0,  # token TIS
    # one sequence a micro-batch makes the mean over sequences of token means, over masked sequences too
    "objective.aggregation": "sequence_mean",
    "objective.masked_in_denominator": True,
    "guard.signal": "off",
    "spikes.policy": "off",
}
SDPO: dict[str, Any] = {
    "objective.kind": "sdpo",
    "objective.support": "top_k",
    "objective.tail": True,
    "objective.policy_drift_clip": 2.0,
    "objective.advantage_clip": None,
    "objective.credit": "logit",
    "objective.sample_weighting": "uniform",
    "teacher.kind": "ema",
    "teacher.update_every": "generation_batch",
    "teacher_context.success_threshold": 0.5,
    "teacher_context.demonstrations": True,
    "teacher_context.demonstration": "first",
    "teacher_context.exclude_own_success": True,
    "teacher_context.remove_thinking": True,
    "teacher_context.include_attempt": False,
    "teacher_context.max_prompt_tokens": 10240,
}
GRPO: dict[str, Any] = {
    "objective.kind": "grpo",
    "objective.advantage_std": False,
    "objective.clip_low": 0.2,
    "objective.clip_high": 0.28,
    "objective.dual_clip": 3.0,
    "objective.kl_coefficient": 0.0,
}
COLUMNS: dict[str, dict[str, Any]] = {  # of table 12, and the rows of table 13
    "plain-sdpo": {
        "objective.alpha": 0.5,
        "objective.top_k": 100,
        "teacher.update_rate": 0.05,
        "teacher_context.feedback": "never",
        "optim.lr": 1e-5,
        "optim.warmup_steps": 10,
        "optim.mini_batches": 1,  # 32 of 32 questions
        "evaluation.attempts": 16,
    },
    "plain-grpo": {
        "optim.lr": 1e-6,
        "optim.warmup_steps": 10,
        "optim.mini_batches": 4,  # 8 of 32 questions
        "evaluation.attempts": 16,
    },
    "plain-grpo-on-policy": {
        "optim.lr": 1e-5,
        "optim.warmup_steps": 10,
        "optim.mini_batches": 1,
        "evaluation.attempts": 16,
    },
    "livecodebench-sdpo": {
        "objective.alpha": 1.0,  # KL(student || teacher)
        "objective.top_k": 20,
        "teacher.update_rate": 0.01,
        "teacher_context.feedback": "without_solution",
        "optim.lr": 1e-6,
        "optim.warmup_steps": 0,
        "optim.mini_batches": 32,  # 1 of 32 questions
        "evaluation.attempts": 4,
    },
    "livecodebench-grpo": {
        "optim.lr": 1e-6,
        "optim.warmup_steps": 0,
        "optim.mini_batches": 4,
        "evaluation.attempts": 4,
    },
    # not in the paper: as the on-policy run of table 13, with the warm-up and evaluation of this task
    "livecodebench-grpo-on-policy": {
        "optim.lr": 1e-5,
        "optim.warmup_steps": 0,
        "optim.mini_batches": 1,
        "evaluation.attempts": 4,
    },
}
KINDS = {"sdpo": SDPO, "grpo": GRPO, "grpo-on-policy": GRPO}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", TASKS)
def test_a_run_of_the_paper_has_its_hyperparameters(task: str, kind: str) -> None:
    config = recipe(f"qwen3-8b-{task}-{kind}")
    column = COLUMNS[f"{'plain' if task in PLAIN_TASKS else task}-{kind}"]
    wanted = EVERY_RUN | KINDS[kind] | column
    assert {key: attrgetter(key)(config) for key in wanted} == wanted
    name, options = TASKS[task]
    assert config.task.name == name
    assert config.task.options == {"data": f"data/{name}", **options}
    assert config.model.path == "models/Qwen3-8B"
    assert config.model.max_length - config.rollout.max_new_tokens >= 2048  # the longest prompt


@pytest.mark.parametrize("task", TASKS)
def test_a_run_in_fp8_is_the_papers_but_for_that(task: str) -> None:
    config, plain = recipe(f"qwen3-8b-{task}-sdpo-fp8"), recipe(f"qwen3-8b-{task}-sdpo")
    assert (config.fp8.student, config.fp8.teacher, config.engine.fp8) == ("blockwise",) * 3
    own = ("name", "run_dir", "layout", "fp8", "engine", "publish")
    assert replace(plain, **{key: getattr(config, key) for key in own}) == config
    assert replace(plain.engine, fp8="blockwise") == config.engine


@pytest.mark.parametrize("size", ["0.6B", "1.7B", "4B", "8B", "14B", "32B"])
def test_the_ladder_differs_in_size_alone(size: str) -> None:
    config = recipe(f"ladder-{size.lower()}")
    wanted = EVERY_RUN | SDPO | COLUMNS["plain-sdpo"]
    assert {key: attrgetter(key)(config) for key in wanted} == wanted
    assert config.model.path == f"models/Qwen3-{size}"


def test_the_mixture_of_experts_has_the_papers_settings() -> None:
    config = recipe("qwen3-30b-a3b-sdpo")
    wanted = EVERY_RUN | SDPO | COLUMNS["plain-sdpo"]
    assert {key: attrgetter(key)(config) for key in wanted} == wanted


@pytest.mark.parametrize("nodes", [16, 32])
@pytest.mark.parametrize(("model", "kind"), [("llama3.3-70b", "blockwise"), ("qwen2.5-72b", "tensorwise")])
def test_large_runs_differ_from_the_paper_where_they_say(model: str, kind: str, nodes: int) -> None:
    """A larger batch, generation one batch ahead, the smaller learning rate of the search grid, fewer evaluations."""
    config = recipe(f"{model}-sdpo-{nodes}n")
    changed = {
        "rollout.prompts_per_step": 128 * nodes // 16,
        "rollout.max_staleness": 1,
        "optim.lr": 1e-6,
        "evaluation.attempts": 4,
        "fp8.student": kind,
        "fp8.teacher": kind,
    }
    wanted = EVERY_RUN | SDPO | COLUMNS["plain-sdpo"] | changed
    assert {key: attrgetter(key)(config) for key in wanted} == wanted
