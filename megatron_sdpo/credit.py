"""What each sample and each token weighs in the loss, and its advantage: from rewards, counts and log-probs alone.

Weights are made once, from the counts of a whole mini-batch (``objective.py`` says why), and groups are those of the
whole generation batch.
"""

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_sdpo.config import ObjectiveConfig
from megatron_sdpo.vocabulary import LOG_FLOOR

STD_FLOOR = 1e-6
"""Added to a group's standard deviation, which is zero when all rewards are equal."""


def token_weights(response_lengths: Sequence[int], has_target: Sequence[bool], config: ObjectiveConfig) -> list[float]:
    """The weight of every response token of each sample, from the whole mini-batch.

    ``has_target`` is False for a sample that must not train (SDPO: no teacher context; ``without_target``);
    its weight is 0.
    token_mean gives 1 / (tokens), sequence_mean 1 / (sequences * own tokens); which samples are counted in
    the denominator says ``config.masked_in_denominator``. An empty response is a sequence without tokens.

    Example: lengths 2 and 6, the second masked: token_mean [0.5, 0.0], sequence_mean [0.25, 0.0].
    """
    count_masked = config.masked_in_denominator
    if count_masked is None:
        count_masked = config.aggregation == "sequence_mean"
    samples = list(zip(response_lengths, has_target, strict=True))
    counted = [length for length, target in samples if target or count_masked]
    tokens, sequences = sum(counted), len(counted)
    return [
        0.0
        if not target or length == 0
        else 1.0 / (tokens if config.aggregation == "token_mean" else sequences * length)
        for length, target in samples
    ]


def without_target(
    rewards: Sequence[float], groups: Sequence[int], success: float, config: ObjectiveConfig
) -> tuple[list[bool], list[bool]]:
    """Which samples the rewards keep from training at all, and which from learning of the teacher.

    ``success`` is the reward from which an attempt is successful. The first are attempts at saturated
    questions (``stop_at_saturation``), the second these and, with failed_only, the successful attempts. The
    rates are those of the whole generation batch, also when it is dealt to several mini-batches.

    Example: rewards 1, 1, 0 and 1, 0, 0 of two groups, saturation 0.6: the first three, and these.
    """
    limit, rates = config.stop_at_saturation, _success_rates(rewards, groups, success)
    stopped = [limit is not None and rates[group] >= limit for group in groups]
    failed_only = config.sample_weighting == "failed_only"
    return stopped, [stop or (failed_only and reward >= success) for stop, reward in zip(stopped, rewards, strict=True)]


def question_factors(
    rewards: Sequence[float], groups: Sequence[int], success: float, config: ObjectiveConfig
) -> list[float]:
    """What question_difficulty multiplies the weight of each sample by; otherwise one.

    sqrt(p (1 - p)) of the question's success rate p, divided by its mean over the questions, each counted once.
    When no question is between never and always solved, nothing is learned: all factors are zero.

    Example: two groups, one half solved, one never: 2 and 0.
    """
    if config.sample_weighting != "question_difficulty":
        return [1.0] * len(rewards)
    spread = {group: math.sqrt(rate * (1.0 - rate)) for group, rate in _success_rates(rewards, groups, success).items()}
    mean = math.fsum(spread.values()) / max(1, len(spread))
    return [spread[group] / mean if mean else 0.0 for group in groups]


def confidence_factors(entropy_T: Tensor, beta: float) -> Tensor:
    """What teacher_confidence multiplies the weight of each token by: exp(-beta * entropy of the teacher, nats)."""
    return (-beta * entropy_T).exp()


def _success_rates(rewards: Sequence[float], groups: Sequence[int], success: float) -> dict[int, float]:
    members: defaultdict[int, list[bool]] = defaultdict(list)
    for reward, group in zip(rewards, groups, strict=True):
        members[group].append(reward >= success)
    return {group: sum(successes) / len(successes) for group, successes in members.items()}


def advantages(rewards: Sequence[float], groups: Sequence[int], std: bool) -> list[float]:
    """GRPO's advantage of each sample: its reward minus the mean of its group.

    ``std`` also divides by the group's sample standard deviation. A group of one has advantage 0.

    Example: rewards 1, 0, 0, 0 of one group: 0.75, -0.25, -0.25, -0.25.
    """
    members: defaultdict[int, list[float]] = defaultdict(list)
    for reward, group in zip(rewards, groups, strict=True):
        members[group].append(reward)
    mean = {group: math.fsum(values) / len(values) for group, values in members.items()}
    scale = dict.fromkeys(members, 1.0)
    if std:
        for group, values in members.items():
            squares = math.fsum((value - mean[group]) ** 2 for value in values)
            scale[group] = math.sqrt(squares / max(1, len(values) - 1)) + STD_FLOOR
    return [(reward - mean[group]) / scale[group] for reward, group in zip(rewards, groups, strict=True)]


def sampled_advantages(log_probs_T: Tensor, teacher_log_probs_T: Tensor, bounds: tuple[float, float] | None) -> Tensor:
    """SDPO's advantage of each sampled token, log q(y) - log p(y), within ``bounds``; an impossible token has e^-10000.

    Example: student 1/2, teacher 1/4: -log 2, the token is pushed down.
    """
    advantages_T = teacher_log_probs_T.clamp(min=LOG_FLOOR) - log_probs_T.clamp(min=LOG_FLOOR)
    return advantages_T if bounds is None else advantages_T.clamp(*bounds)


def sequence_advantages(advantages_T: Tensor, response_lengths: Sequence[int]) -> Tensor:
    """The mean over each response, at each of its tokens; responses lie end to end.

    Example: advantages 1, 3, 5 of lengths 2 and 1: 2, 2, 5.
    """
    responses = advantages_T.split(list(response_lengths)) if response_lengths else ()
    return torch.cat([advantages_T[:0], *(response_R.mean().expand_as(response_R) for response_R in responses)])
