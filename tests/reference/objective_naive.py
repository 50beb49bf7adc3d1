"""The objectives as they are written down: one sample after the other, one token after the other, float64, plain loops.

Of the package only the settings are read. Every term is a pair (value, surrogate): the loss, and what has the
loss's gradient, which differ where the definition changes the gradient alone (clipped advantages).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_sdpo.config import ObjectiveConfig

Term = tuple[Any, Any]


@dataclass(frozen=True)
class Sampled:
    """One attempt and what every model says of it: logits ``[R, V]``, float64."""

    question: int
    reward: float
    response: tuple[int, ...]
    engine: tuple[float, ...]
    """Log-probs at sampling."""
    student_RV: Tensor
    old_RV: Tensor
    """The student when the batch began."""
    teacher_RV: Tensor | None
    """None: there is no teacher context."""
    reference_RV: Tensor


def objective(samples: Sequence[Sampled], settings: ObjectiveConfig, success: float) -> Term:
    """The loss of one mini-batch that is a whole generation batch."""
    if settings.kind != "hybrid":
        return _total(samples, settings, success)
    grpo, sdpo = (_total(samples, replace(settings, kind=kind), success) for kind in ("grpo", "sdpo"))
    share = settings.grpo_share
    return share * grpo[0] + (1 - share) * sdpo[0], share * grpo[1] + (1 - share) * sdpo[1]


def _total(samples: Sequence[Sampled], s: ObjectiveConfig, success: float) -> Term:
    value = surrogate = torch.zeros((), dtype=torch.float64)
    token_loss = {"sdpo": _sdpo, "grpo": _grpo, "next_token": _next_token}[s.kind]
    for sample, weight in zip(samples, _weights(samples, s, success), strict=True):
        if weight == 0:
            continue
        for t in range(len(sample.response)):
            token_value, token_surrogate = token_loss(sample, t, samples, s)
            value, surrogate = value + weight * token_value, surrogate + weight * token_surrogate
    return value, surrogate


# ------------------------------------------------------------------------------------------------ samples


def _weights(samples: Sequence[Sampled], s: ObjectiveConfig, success: float) -> list[float]:
    """token_mean: 1 / tokens. sequence_mean: 1 / (sequences * own tokens). Times the question's factor."""
    trains = []
    for sample in samples:
        saturated = (
            s.stop_at_saturation is not None and _rate(sample.question, samples, success) >= s.stop_at_saturation
        )
        taught = s.kind != "sdpo" or sample.teacher_RV is not None
        left_out = s.kind == "sdpo" and s.sample_weighting == "failed_only" and sample.reward >= success
        trains.append(taught and not saturated and not left_out)
    count_all = s.masked_in_denominator
    if count_all is None:
        count_all = s.aggregation == "sequence_mean"
    tokens = sequences = 0
    for sample, train in zip(samples, trains, strict=True):
        if train or count_all:
            tokens, sequences = tokens + len(sample.response), sequences + 1
    weights = []
    for sample, train in zip(samples, trains, strict=True):
        own = tokens if s.aggregation == "token_mean" else sequences * len(sample.response)
        weights.append(_factor(sample.question, samples, s, success) / own if train and own else 0.0)
    return weights


def _rate(question: int, samples: Sequence[Sampled], success: float) -> float:
    rewards = [sample.reward for sample in samples if sample.question == question]
    return sum(reward >= success for reward in rewards) / len(rewards)


def _factor(question: int, samples: Sequence[Sampled], s: ObjectiveConfig, success: float) -> float:
    if s.sample_weighting != "question_difficulty":
        return 1.0
    spread = {}
    for sample in samples:
        rate = _rate(sample.question, samples, success)
        spread[sample.question] = math.sqrt(rate * (1 - rate))
    mean = sum(spread.values()) / len(spread)
    return spread[question] / mean if mean > 0 else 0.0


# ------------------------------------------------------------------------------------------------- tokens


def _next_token(sample: Sampled, t: int, samples: Sequence[Sampled], s: ObjectiveConfig) -> Term:
    value = -_log_prob(sample.student_RV[t], sample.response[t])
    return value, value


def _grpo(sample: Sampled, t: int, samples: Sequence[Sampled], s: ObjectiveConfig) -> Term:
    """PPO's clipped ratio with clip-higher and dual clip, token TIS, and the k3 penalty without it."""
    rewards = [other.reward for other in samples if other.question == sample.question]
    mean = sum(rewards) / len(rewards)
    advantage = sample.reward - mean
    if s.advantage_std:
        variance = sum((reward - mean) ** 2 for reward in rewards) / max(1, len(rewards) - 1)
        advantage /= math.sqrt(variance) + 1e-6
    y = sample.response[t]
    log_p, log_old = _log_prob(sample.student_RV[t], y), _log_prob(sample.old_RV[t], y).detach()
    ratio = torch.exp(log_p - log_old)
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - s.clip_low, 1 + s.clip_high) * advantage)
    if s.dual_clip is not None and advantage < 0:
        gain = torch.maximum(gain, torch.tensor(s.dual_clip * advantage, dtype=torch.float64))
    value = -gain * _weight(log_old, sample.engine[t], s.engine_mismatch_cap)
    if s.kl_coefficient:
        log_r = _log_prob(sample.reference_RV[t], y).detach() - log_p
        value = value + s.kl_coefficient * (torch.exp(log_r) - log_r - 1)
    return value, value


def _sdpo(sample: Sampled, t: int, samples: Sequence[Sampled], s: ObjectiveConfig) -> Term:
    """Divergence to the teacher times the two detached importance weights of the sampled token."""
    assert sample.teacher_RV is not None
    y = sample.response[t]
    log_p, log_old = _log_prob(sample.student_RV[t], y), _log_prob(sample.old_RV[t], y)
    factor = _weight(log_p, log_old.item(), s.policy_drift_clip)
    factor *= _weight(log_old, sample.engine[t], s.engine_mismatch_cap)
    if s.sample_weighting == "teacher_confidence":
        q = sample.teacher_RV[t].softmax(0).tolist()
        factor *= math.exp(s.teacher_confidence_beta * sum(x * math.log(x) for x in q))
    if s.support == "sampled":
        advantages = []
        for u, token in enumerate(sample.response):
            log_q = _log_prob(sample.teacher_RV[u], token).item()
            now_RV = sample.old_RV if s.credit == "sequence" else sample.student_RV
            advantages.append(_bounded(log_q - _log_prob(now_RV[u], token).item(), s))
        advantage = sum(advantages) / len(advantages) if s.credit == "sequence" else advantages[t]
        value = surrogate = -advantage * log_p
    else:
        value, surrogate = _divergence(sample.student_RV[t], sample.old_RV[t], sample.teacher_RV[t], s)
    return factor * value, factor * surrogate


def _divergence(student_V: Tensor, old_V: Tensor, teacher_V: Tensor, s: ObjectiveConfig) -> Term:
    """Over the bins: each kept token, and the rest of the vocabulary as one; or every token."""
    vocabulary = range(len(student_V))
    kept = list(vocabulary)
    if s.support == "top_k":
        old = old_V.tolist()
        kept = sorted(vocabulary, key=lambda j: (-old[j], j))[: 1 if s.credit == "token" else s.top_k]
    bins = [[j] for j in kept]
    if s.support == "top_k" and s.tail:
        bins.append([j for j in vocabulary if j not in kept])
    p, q = (_masses(logits_V.softmax(0), bins) for logits_V in (student_V, teacher_V.detach()))
    value = surrogate = torch.zeros((), dtype=torch.float64)
    for p_b, q_b in zip(p, q, strict=True):
        if s.alpha == 0:
            term = q_b * torch.log(q_b / p_b)
        elif s.alpha == 1:
            term = p_b * torch.log(p_b / q_b)
        else:
            m_b = (1 - s.alpha) * p_b + s.alpha * q_b
            term = (1 - s.alpha) * p_b * torch.log(p_b / m_b) + s.alpha * q_b * torch.log(q_b / m_b)
        value = value + term
        if s.advantage_clip is not None:
            term = -p_b * _bounded(torch.log(q_b / p_b).item(), s)
        surrogate = surrogate + term
    return value, surrogate


def _masses(probabilities_V: Tensor, bins: Sequence[Sequence[int]]) -> list[Tensor]:
    masses = [torch.stack([probabilities_V[j] for j in tokens]).sum() for tokens in bins]
    whole = torch.stack(masses).sum()  # less than one where the rest was dropped
    return [mass / whole for mass in masses]


def _bounded(advantage: float, s: ObjectiveConfig) -> float:
    if s.advantage_clip is None:
        return advantage
    least = -s.advantage_clip if s.advantage_clip_sides == "two" else -math.inf
    return min(max(advantage, least), s.advantage_clip)


def _weight(log_a: Tensor, log_b: float, cap: float | None) -> float:
    return 1.0 if cap is None else min(math.exp(log_a.item() - log_b), cap)


def _log_prob(logits_V: Tensor, token: int) -> Tensor:
    return logits_V[token] - logits_V.logsumexp(0)
