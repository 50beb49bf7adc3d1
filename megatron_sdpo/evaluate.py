"""Held-out scores: plain questions, no teacher context, by the same sampler and verifier as in training."""

import time
from collections.abc import Callable, Sequence

from megatron_sdpo.config import EvaluationConfig
from megatron_sdpo.rollout.sampler import Asked, Sampler
from megatron_sdpo.types import Evaluation, Group, Question


async def evaluate(
    sampler: Sampler,
    questions: Sequence[Question],
    config: EvaluationConfig,
    version: int,
    finished: Callable[[Group], None] = lambda group: None,
) -> Evaluation:
    """Mean reward over ``config.attempts`` attempts at each of the first ``config.questions`` questions.

    ``eval/accuracy`` is that mean (avg@k), ``eval/any_correct`` the share of questions with a success among the k.
    ``finished`` is called with the attempts at each question as they get ready.
    """
    began = time.perf_counter()
    chosen = questions[: config.questions]
    asked = [
        Asked(version, slot, q, config.attempts, config.temperature, "evaluate", config.top_p)
        for slot, q in enumerate(chosen)
    ]
    groups, _ = await sampler.groups(asked, finished)
    rewards = [[verdict.reward for verdict in group.verdicts] for group in groups]
    tokens = [len(attempt.response_ids) for group in groups for attempt in group.attempts]
    return Evaluation(
        version,
        {
            "eval/accuracy": sum(map(sum, rewards)) / sum(map(len, rewards)),
            "eval/any_correct": sum(max(r) > 0 for r in rewards) / len(rewards),
            "eval/response_tokens": sum(tokens) / len(tokens),
            "time/evaluate": time.perf_counter() - began,
        },
    )
