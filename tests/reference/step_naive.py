"""One optimizer step as one would write it with transformers and autograd: each sample alone, no packing, no shards."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sdpo.config import Config
from megatron_sdpo.rollout import cpu_platform
from megatron_sdpo.types import Sample
from tests.reference import sdpo_naive


def load(path: Path) -> Any:
    cpu_platform.provide_torchvision_operators()
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")


def first_step(
    student: Any, teacher: Any, samples: Sequence[Sample], config: Config
) -> tuple[float, float, dict[str, Tensor]]:
    """Loss, gradient norm, and the weights by name after one clipped AdamW step; ``student`` is changed."""
    share = config.objective.grpo_share
    parts = {"sdpo": 1.0 - share, "grpo": share} if config.objective.kind == "hybrid" else {config.objective.kind: 1.0}
    loss = torch.stack([part * _loss(student, teacher, samples, kind, config) for kind, part in parts.items()]).sum()
    loss.backward()
    parameters = [p for p in student.parameters() if p.grad is not None]
    norm = torch.stack([p.grad.double().pow(2).sum() for p in parameters]).sum().sqrt().item()
    for parameter in parameters:
        parameter.grad *= min(1.0, config.optim.clip_grad / (norm + 1e-6))
    decay = [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.optim.weight_decay}]
    decay.append({"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0})
    betas = (config.optim.beta1, config.optim.beta2)
    torch.optim.AdamW(decay, lr=config.optim.lr, betas=betas, eps=config.optim.eps).step()
    return loss.item(), norm, {name: p.detach() for name, p in student.named_parameters()}


def _loss(student: Any, teacher: Any, samples: Sequence[Sample], kind: Any, config: Config) -> Tensor:
    config = replace(config, objective=replace(config.objective, kind=kind))
    terms = [
        weight * _token_losses(student, teacher, sample, samples, config).sum()
        for sample, weight in zip(samples, _weights(samples, config), strict=True)
        if weight
    ]
    return torch.stack(terms).sum()


def _weights(samples: Sequence[Sample], config: Config) -> list[float]:
    """Paper: the mean over tokens that have a target. Reference release: over all sequences, the mean of each."""
    sdpo, weighting = config.objective.kind == "sdpo", config.objective.sample_weighting
    success, limit = config.teacher_context.success_threshold, config.objective.stop_at_saturation
    trained = [s.teacher_prompt_ids is not None or not sdpo for s in samples]
    if sdpo and weighting == "failed_only":
        trained = [t and s.reward < success for s, t in zip(samples, trained, strict=True)]
    if limit is not None:
        trained = [t and _rate(s, samples, success) < limit for s, t in zip(samples, trained, strict=True)]
    weights = _mean_weights(samples, trained, config)
    if weighting == "question_difficulty":
        spread = [(p * (1 - p)) ** 0.5 for p in (_rate(s, samples, success) for s in samples)]
        mean = sum(spread) / len(spread)  # groups are equally large here
        weights = [weight * s / mean for weight, s in zip(weights, spread, strict=True)]
    return weights


def _rate(sample: Sample, samples: Sequence[Sample], success: float) -> float:
    rewards = [s.reward for s in samples if s.group == sample.group]
    return sum(reward >= success for reward in rewards) / len(rewards)


def _mean_weights(samples: Sequence[Sample], trained: Sequence[bool], config: Config) -> list[float]:
    if config.objective.aggregation == "sequence_mean":
        return [t / (len(samples) * len(s.response_ids)) for s, t in zip(samples, trained, strict=True)]
    tokens = sum(len(s.response_ids) for s, t in zip(samples, trained, strict=True) if t)
    return [t / tokens for t in trained]


def _token_losses(student: Any, teacher: Any, sample: Sample, samples: Sequence[Sample], config: Config) -> Tensor:
    objective, temperature = config.objective, config.rollout.temperature
    logits_RV = _response_logits(student, sample.prompt_ids, sample.response_ids) / temperature
    log_probs_R = sdpo_naive.log_probs(logits_RV).gather(1, torch.tensor(sample.response_ids)[:, None])[:, 0]
    if objective.kind == "next_token":
        return -log_probs_R
    mismatch_R = torch.ones_like(log_probs_R)
    if objective.engine_mismatch_cap is not None:
        engine_R = torch.tensor(sample.engine_log_probs).double()
        mismatch_R = (log_probs_R.detach() - engine_R).exp().clamp(max=objective.engine_mismatch_cap)
    if objective.kind == "grpo":
        rewards = [s.reward for s in samples if s.group == sample.group]
        advantage = sample.reward - sum(rewards) / len(rewards)
        values_R = -advantage * (log_probs_R - log_probs_R.detach()).exp() * mismatch_R
        with torch.no_grad():  # the teacher stands in for the reference
            reference_RV = _response_logits(teacher, sample.prompt_ids, sample.response_ids) / temperature
        reference_R = sdpo_naive.log_probs(reference_RV).gather(1, torch.tensor(sample.response_ids)[:, None])[:, 0]
        ratio_R = (reference_R - log_probs_R).exp()
        return values_R + objective.kl_coefficient * (ratio_R - ratio_R.log() - 1)
    assert sample.teacher_prompt_ids is not None
    with torch.no_grad():
        teacher_RV = _response_logits(teacher, sample.teacher_prompt_ids, sample.response_ids) / temperature
        if config.teacher.kind == "trust_region":
            live_RV = _response_logits(student, sample.teacher_prompt_ids, sample.response_ids) / temperature
            teacher_RV = (1 - config.teacher.mixture) * teacher_RV + config.teacher.mixture * live_RV
    if objective.sample_weighting == "teacher_confidence":
        log_q_RV = sdpo_naive.log_probs(teacher_RV)
        mismatch_R = mismatch_R * (objective.teacher_confidence_beta * (log_q_RV.exp() * log_q_RV).sum(dim=1)).exp()
    if objective.support == "sampled":
        teacher_R = sdpo_naive.log_probs(teacher_RV).gather(1, torch.tensor(sample.response_ids)[:, None])[:, 0]
        advantage_R = teacher_R - log_probs_R.detach()
        if objective.credit == "sequence":
            advantage_R = advantage_R.mean()
        return -advantage_R * log_probs_R * mismatch_R
    if objective.support == "vocabulary":
        p_RV, q_RV = (sdpo_naive.log_probs(x_RV).exp() for x_RV in (logits_RV, teacher_RV))
        return sdpo_naive.bin_divergence(p_RV, q_RV, objective.alpha) * mismatch_R
    ids_RK = sdpo_naive.support(logits_RV.detach(), 1 if objective.credit == "token" else objective.top_k)
    return sdpo_naive.divergence(logits_RV, teacher_RV, ids_RK, objective.alpha, objective.tail) * mismatch_R


def _response_logits(model: Any, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    logits_TV = model(torch.tensor([[*prompt, *response]])).logits[0]
    return logits_TV[len(prompt) - 1 : -1]
