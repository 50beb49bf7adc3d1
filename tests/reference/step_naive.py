"""Optimizer steps as one would write them with transformers and autograd: each sample alone, no packing, no shards."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sdpo.config import Config, ObjectiveConfig
from megatron_sdpo.rollout import cpu_platform
from megatron_sdpo.types import Sample
from tests.reference import sdpo_naive

Models = tuple[Any, Any, Any]
"""The student, the student when the batch began, and the teacher."""


def load(path: Path) -> Any:
    cpu_platform.provide_torchvision_operators()
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")


def first_step(
    student: Any, teacher: Any, samples: Sequence[Sample], config: Config
) -> tuple[float, float, dict[str, Tensor]]:
    """Loss, gradient norm, and the weights by name after one clipped AdamW step; ``student`` is changed."""
    ((loss, norm),), weights = steps(student, teacher, samples, [range(len(samples))], config)
    return loss, norm, weights


def steps(
    student: Any, teacher: Any, samples: Sequence[Sample], mini_batches: Sequence[Sequence[int]], config: Config
) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """(loss, gradient norm) of one clipped AdamW step for each mini-batch, and the weights by name after them."""
    began = deepcopy(student)
    matrices = [p for p in student.parameters() if p.dim() > 1]
    decay = [{"params": matrices, "weight_decay": config.optim.weight_decay}]
    decay.append({"params": [p for p in student.parameters() if p.dim() == 1], "weight_decay": 0.0})
    betas = (config.optim.beta1, config.optim.beta2)
    optimizer = torch.optim.AdamW(decay, lr=config.optim.lr, betas=betas, eps=config.optim.eps)
    share = config.objective.grpo_share
    parts = {"sdpo": 1.0 - share, "grpo": share} if config.objective.kind == "hybrid" else {config.objective.kind: 1.0}
    found = []
    for chosen in mini_batches:
        optimizer.zero_grad()
        losses = [s * _loss((student, began, teacher), samples, chosen, kind, config) for kind, s in parts.items()]
        loss = torch.stack(losses).sum()
        loss.backward()
        parameters = [p for p in student.parameters() if p.grad is not None]
        norm = torch.stack([p.grad.double().pow(2).sum() for p in parameters]).sum().sqrt().item()
        for parameter in parameters:
            parameter.grad *= min(1.0, config.optim.clip_grad / (norm + 1e-6))
        optimizer.step()
        found.append((loss.item(), norm))
    return found, {name: p.detach() for name, p in student.named_parameters()}


def _loss(models: Models, samples: Sequence[Sample], chosen: Sequence[int], kind: Any, config: Config) -> Tensor:
    config = replace(config, objective=replace(config.objective, kind=kind))
    weights = _weights(samples, chosen, config)
    terms = [
        weight * _token_losses(models, samples[i], samples, config).sum()
        for i, weight in zip(chosen, weights, strict=True)
        if weight
    ]
    return torch.stack(terms).sum()


def _weights(samples: Sequence[Sample], chosen: Sequence[int], config: Config) -> list[float]:
    """Paper: the mean over tokens that have a target. Reference release: over all sequences, the mean of each."""
    sdpo, weighting = config.objective.kind == "sdpo", config.objective.sample_weighting
    success, limit = config.teacher_context.success_threshold, config.objective.stop_at_saturation
    trained = [s.teacher_prompt_ids is not None or not sdpo for s in samples]
    if sdpo and weighting == "failed_only":
        trained = [t and s.reward < success for s, t in zip(samples, trained, strict=True)]
    if limit is not None:
        trained = [t and _rate(s, samples, success) < limit for s, t in zip(samples, trained, strict=True)]
    weights = _mean_weights([samples[i] for i in chosen], [trained[i] for i in chosen], config)
    if weighting == "question_difficulty":
        spread = [(p * (1 - p)) ** 0.5 for p in (_rate(s, samples, success) for s in samples)]
        mean = sum(spread) / len(spread)  # groups are equally large here
        weights = [weight * spread[i] / mean for i, weight in zip(chosen, weights, strict=True)]
    return weights


def _rate(sample: Sample, samples: Sequence[Sample], success: float) -> float:
    rewards = [s.reward for s in samples if s.group == sample.group]
    return sum(reward >= success for reward in rewards) / len(rewards)


def _mean_weights(samples: Sequence[Sample], trained: Sequence[bool], config: Config) -> list[float]:
    """Empty responses are sequences, but have no token to weigh."""
    count_all = config.objective.masked_in_denominator
    if config.objective.aggregation == "sequence_mean":
        sequences = sum(trained) if count_all is False else len(samples)
        return [t / (sequences * max(1, len(s.response_ids))) for s, t in zip(samples, trained, strict=True)]
    tokens = sum(len(s.response_ids) for s, t in zip(samples, trained, strict=True) if t or count_all)
    return [t / tokens for t in trained]


def _token_losses(models: Models, sample: Sample, samples: Sequence[Sample], config: Config) -> Tensor:
    if not sample.response_ids:
        return torch.zeros(0)
    objective, temperature = config.objective, config.rollout.temperature
    student, began, teacher = models
    response_R1 = torch.tensor(sample.response_ids)[:, None]
    logits_RV = _response_logits(student, sample.prompt_ids, sample.response_ids) / temperature
    log_probs_R = sdpo_naive.log_probs(logits_RV).gather(1, response_R1)[:, 0]
    if objective.kind == "next_token":
        return -log_probs_R
    with torch.no_grad():
        old_RV = _response_logits(began, sample.prompt_ids, sample.response_ids) / temperature
        old_R = sdpo_naive.log_probs(old_RV).gather(1, response_R1)[:, 0]
    weight_R = torch.ones_like(log_probs_R)
    if objective.engine_mismatch_cap is not None:
        engine_R = torch.tensor(sample.engine_log_probs).double()
        weight_R = (old_R - engine_R).exp().clamp(max=objective.engine_mismatch_cap)
    if objective.kind == "grpo":
        rewards = [s.reward for s in samples if s.group == sample.group]
        advantage = sample.reward - sum(rewards) / len(rewards)
        ratio_R = (log_probs_R - old_R).exp()
        clipped_R = ratio_R.clamp(1 - objective.clip_low, 1 + objective.clip_high)
        gain_R = torch.minimum(ratio_R * advantage, clipped_R * advantage)
        if objective.dual_clip is not None and advantage < 0:
            gain_R = gain_R.clamp(min=objective.dual_clip * advantage)
        with torch.no_grad():  # the teacher stands in for the reference
            reference_RV = _response_logits(teacher, sample.prompt_ids, sample.response_ids) / temperature
        reference_R = sdpo_naive.log_probs(reference_RV).gather(1, response_R1)[:, 0]
        ratio_R = (reference_R - log_probs_R).exp()
        return -gain_R * weight_R + objective.kl_coefficient * (ratio_R - ratio_R.log() - 1)
    assert sample.teacher_prompt_ids is not None
    if objective.policy_drift_clip is not None:
        weight_R = weight_R * (log_probs_R.detach() - old_R).exp().clamp(max=objective.policy_drift_clip)
    with torch.no_grad():
        teacher_RV = _response_logits(teacher, sample.teacher_prompt_ids, sample.response_ids) / temperature
        if config.teacher.kind == "trust_region":
            live_RV = _response_logits(began, sample.teacher_prompt_ids, sample.response_ids) / temperature
            teacher_RV = (1 - config.teacher.mixture) * teacher_RV + config.teacher.mixture * live_RV
    if objective.sample_weighting == "teacher_confidence":
        log_q_RV = sdpo_naive.log_probs(teacher_RV)
        weight_R = weight_R * (objective.teacher_confidence_beta * (log_q_RV.exp() * log_q_RV).sum(dim=1)).exp()
    return weight_R * _distances(logits_RV, log_probs_R, old_RV, old_R, teacher_RV, response_R1, objective)


def _distances(
    logits_RV: Tensor,
    log_probs_R: Tensor,
    old_RV: Tensor,
    old_R: Tensor,
    teacher_RV: Tensor,
    response_R1: Tensor,
    objective: ObjectiveConfig,
) -> Tensor:
    """The student's distance to the teacher at each token, at the chosen support."""
    if objective.support == "sampled":
        teacher_R = sdpo_naive.log_probs(teacher_RV).gather(1, response_R1)[:, 0]
        sequence = objective.credit == "sequence"
        advantage_R = (teacher_R - old_R).mean() if sequence else teacher_R - log_probs_R.detach()
        return -advantage_R * log_probs_R
    if objective.support == "vocabulary":
        p_RV, q_RV = (sdpo_naive.log_probs(x_RV).exp() for x_RV in (logits_RV, teacher_RV))
        return sdpo_naive.bin_divergence(p_RV, q_RV, objective.alpha)
    ids_RK = sdpo_naive.support(old_RV, 1 if objective.credit == "token" else objective.top_k)
    return sdpo_naive.divergence(logits_RV, teacher_RV, ids_RK, objective.alpha, objective.tail)


def _response_logits(model: Any, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    logits_TV = model(torch.tensor([[*prompt, *response]])).logits[0]
    return logits_TV[len(prompt) - 1 : -1]
