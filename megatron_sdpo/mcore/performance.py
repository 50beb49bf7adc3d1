"""What a generation batch's passes cost this trainer: tokens, FLOPs and memory, for every step's row."""

import resource
from collections.abc import Mapping
from typing import Any

import torch

from megatron_sdpo.batching import View
from megatron_sdpo.config import Config
from megatron_sdpo.flops import (
    NO_TOKENS,
    Tokens,
    batch_passes,
    batch_tokens,
    forward_flops,
    generation_flops,
    pass_flops,
    peak_tflops,
)
from megatron_sdpo.types import Batch

NOTHING: Mapping[View, Tokens] = {}
PASSES = ("time/score_student", "time/score_teacher", "time/train")


def performance(
    batch: Batch,
    config: Config,
    hf_config: Mapping[str, Any],
    world_size: int,
    seconds: Mapping[str, float],
    spared: Mapping[View, Tokens] = NOTHING,
) -> dict[str, float]:
    """Of the phases ``PASSES`` together; tokens are those of prompts and responses in all passes, without padding, and
    without those that siblings share (``spared``, of one pass over a view): their number is ``perf/shared_tokens``.

    ``perf/tokens_per_s`` of the whole trainer; ``perf/tflops_per_rank``, model TFLOP/s; ``perf/mfu``, its share of the
    GPU's dense bf16 peak, only where that is known; ``perf/memory_gb``, the most that this rank has held so far: of
    the GPU's memory in tensors, without a GPU of the process; ``flops/...``, model FLOPs of the whole batch in the
    passes and in generation: those that are computed, so none for tokens that siblings share.
    """
    busy = max(sum(seconds[phase] for phase in PASSES), 1e-9)
    spent = pass_flops(hf_config, batch.samples, config.objective)
    _, scorings, _ = batch_passes(batch.samples, config.objective)
    student, teacher = spared.get("student", NO_TOKENS), spared.get("teacher", NO_TOKENS)
    spent["score_student"] -= scorings * forward_flops(hf_config, student)
    spent["score_teacher"] -= forward_flops(hf_config, teacher)
    shared_tokens = scorings * student.tokens + teacher.tokens
    tflops = sum(spent.values()) / busy / world_size / 1e12
    found = {
        "flops/generate": float(generation_flops(hf_config, batch.samples)),
        "flops/score_student": float(spent["score_student"]),
        "flops/score_teacher": float(spent["score_teacher"]),
        "flops/train": float(spent["train"]),
        "perf/shared_tokens": float(shared_tokens),
        "perf/tokens_per_s": (batch_tokens(batch.samples, config.objective) - shared_tokens) / busy,
        "perf/tflops_per_rank": tflops,
        "perf/memory_gb": _memory_gb(),
    }
    peak = peak_tflops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return found if peak is None else {**found, "perf/mfu": tflops / peak}


def _memory_gb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
