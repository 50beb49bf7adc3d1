"""What a generation batch's passes cost this trainer: tokens, FLOPs and memory, for every step's row."""

import resource
from collections.abc import Mapping
from typing import Any

import torch

from megatron_sdpo.config import Config
from megatron_sdpo.flops import batch_tokens, generation_flops, pass_flops, peak_tflops
from megatron_sdpo.types import Batch

PASSES = ("time/score_student", "time/score_teacher", "time/train")


def performance(
    batch: Batch, config: Config, hf_config: Mapping[str, Any], world_size: int, seconds: Mapping[str, float]
) -> dict[str, float]:
    """Of the phases ``PASSES`` together; tokens are those of prompts and responses in all passes, without padding.

    ``perf/tokens_per_s`` of the whole trainer; ``perf/tflops_per_rank``, model TFLOP/s; ``perf/mfu``, its share of the
    GPU's dense bf16 peak, only where that is known; ``perf/memory_gb``, the most that this rank has held so far: of
    the GPU's memory in tensors, without a GPU of the process; ``flops/...``, model FLOPs of the whole batch in the
    passes and in generation.
    """
    busy = max(sum(seconds[phase] for phase in PASSES), 1e-9)
    spent = pass_flops(hf_config, batch.samples, config.objective)
    tflops = sum(spent.values()) / busy / world_size / 1e12
    found = {
        "flops/generate": float(generation_flops(hf_config, batch.samples)),
        "flops/score_student": float(spent["score_student"]),
        "flops/score_teacher": float(spent["score_teacher"]),
        "flops/train": float(spent["train"]),
        "perf/tokens_per_s": batch_tokens(batch.samples, config.objective) / busy,
        "perf/tflops_per_rank": tflops,
        "perf/memory_gb": _memory_gb(),
    }
    peak = peak_tflops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return found if peak is None else {**found, "perf/mfu": tflops / peak}


def _memory_gb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
