"""What the paper's runs have in common (arXiv 2601.20802, tables 12 and 13), and what it left to the released settings.

Each function is one block of the tables; a recipe puts them together. Where paper and released code disagree the code's
effective behaviour is taken: the mean over sequences of their token means, masked samples in the denominator.
"""

from typing import Literal

from megatron_sdpo.config import (
    EngineConfig,
    EvaluationConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    PublishConfig,
    RolloutConfig,
    SandboxConfig,
    TaskConfig,
    TeacherConfig,
    TeacherContextConfig,
)
from megatron_sdpo.rollout.prompts import ENGINE_RESERVE

PROMPT_TOKENS, RESPONSE_TOKENS = 2048, 8192
QUESTIONS, ATTEMPTS = 32, 8
MODELS, DATA = "models", "data"
"""Folders, relative to the working directory: set model.path and task.options.data where yours are elsewhere."""


def model(name: str) -> ModelConfig:
    """A checkpoint in ``models/NAME``, in bf16; the longest prompt and response, and what an engine keeps."""
    return ModelConfig(path=f"{MODELS}/{name}", max_length=PROMPT_TOKENS + RESPONSE_TOKENS + ENGINE_RESERVE)


def sciknoweval(domain: Literal["chemistry", "physics", "biology", "materials"]) -> TaskConfig:
    """Multiple choice of level L3."""
    return TaskConfig(name="sciknoweval", options={"data": f"{DATA}/sciknoweval", "domain": domain})


def tooluse() -> TaskConfig:
    """ToolAlpaca."""
    return TaskConfig(name="tooluse", options={"data": f"{DATA}/tooluse"})


def livecodebench() -> TaskConfig:
    """Release 6, February to April 2025: half of the tests of each question for training, all for evaluation."""
    return TaskConfig(name="livecodebench", options={"data": f"{DATA}/livecodebench", "train_tests": "half"})


def engines(count: int, tensor_parallel: int = 1) -> EngineConfig:
    """A big model takes its time to load."""
    return EngineConfig(count=count, tensor_parallel=tensor_parallel, start_timeout_s=1800.0, request_timeout_s=1800.0)


JUDGES = 16
"""Threads that judge programs, and sandboxes in which these run: a small part of the cores of a node of eight GPUs."""


def sandbox() -> SandboxConfig:
    """As many as judge."""
    return SandboxConfig(workers=JUDGES, warm=JUDGES)


def rollout(verify_workers: int = 2) -> RolloutConfig:
    """Strictly on-policy as far as generation goes, at temperature 1."""
    return RolloutConfig(
        prompts_per_step=QUESTIONS,
        attempts_per_prompt=ATTEMPTS,
        max_new_tokens=RESPONSE_TOKENS,
        temperature=1.0,
        max_staleness=0,
        verify_workers=verify_workers,
    )


def teacher_context(feedback: bool) -> TeacherContextConfig:
    """A sibling's success; with ``feedback`` that of the verifier where there is none."""
    return TeacherContextConfig(
        success_threshold=0.5,
        feedback="without_solution" if feedback else "never",
        include_attempt=False,
        exclude_own_success=True,
        remove_thinking=True,
        max_prompt_tokens=10240,
    )


def teacher(update_rate: float) -> TeacherConfig:
    """Follows the student once a generation batch."""
    return TeacherConfig(kind="ema", update_rate=update_rate, update_every="generation_batch")


def sdpo(alpha: float, top_k: int) -> ObjectiveConfig:
    """The student's most probable tokens and a tail bin; both importance weights capped at 2."""
    return ObjectiveConfig(
        kind="sdpo",
        alpha=alpha,
        support="top_k",
        top_k=top_k,
        tail=True,
        aggregation="sequence_mean",
        masked_in_denominator=True,
        policy_drift_clip=2.0,
        engine_mismatch_cap=2.0,
    )


def grpo() -> ObjectiveConfig:
    """No division by the standard deviation, clip-higher, dual clip, no KL term."""
    return ObjectiveConfig(
        kind="grpo",
        advantage_std=False,
        clip_low=0.2,
        clip_high=0.28,
        dual_clip=3.0,
        kl_coefficient=0.0,
        aggregation="sequence_mean",
        masked_in_denominator=True,
        engine_mismatch_cap=2.0,
    )


def adamw(lr: float, warmup_steps: int, questions_per_step: int) -> OptimConfig:
    """Constant after a warm-up of so many generation batches, each dealt to optimizer steps of so many questions."""
    return OptimConfig(
        lr=lr,
        lr_decay="constant",
        warmup_steps=warmup_steps,
        weight_decay=0.01,
        beta1=0.9,
        beta2=0.999,
        clip_grad=1.0,
        mini_batches=QUESTIONS // questions_per_step,
    )


def evaluation(attempts: int) -> EvaluationConfig:
    """Every fifth batch, at less than the temperature of training."""
    return EvaluationConfig(every=5, attempts=attempts, temperature=0.6, top_p=0.95)


def publish() -> PublishConfig:
    """bf16 engines and trainers differ by more than fp32 ones do (0.36 was seen); a big model takes longer."""
    return PublishConfig(probe_tolerance=0.5, timeout_s=900.0)
