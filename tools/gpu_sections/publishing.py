"""The sender's path of one GPU in GB/s: an 8B model's layers gathered, described, quantised and copied to the host."""

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu_sections.common import DEVICE, Finding, learner_of, qwen3, write_model
from gpu_sections.speed import LAYERS
from megatron_sdpo.mcore.hf import canonical_parameters
from megatron_sdpo.quantization import quantized_blocks
from megatron_sdpo.reshard.digest import describe
from megatron_sdpo.reshard.gather import gather
from megatron_sdpo.reshard.host import HostCopies
from megatron_sdpo.reshard.plan import plan
from megatron_sdpo.reshard.quantize import quantized

Tensors = list[tuple[str, Tensor]]


def clocked(work: Callable[[], object], rounds: int = 3) -> float:
    """Median of the clock's seconds, the GPU's work included."""
    times = []
    for _ in range(rounds + 1):
        _wait()
        began = time.perf_counter()
        work()
        _wait()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def publish() -> list[Finding]:
    """Each part of ``Publisher._gather_all`` by itself, and all of it."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        # The head and the embedding are as other tensors: a small vocabulary is quickly written.
        model = write_model(Path(name) / "model", qwen3(num_hidden_layers=LAYERS, vocab_size=4096), std=0.02)
        learner = learner_of(model)
    own = canonical_parameters(learner.model, learner.groups)
    buckets = plan(learner.hf_config, 1, 2, learner.config.publish.bucket_bytes)
    return rates(
        learner.hf_config, [partial(gather, bucket, own, learner.hf_config, learner.groups) for bucket in buckets]
    )


def rates(hf_config: Mapping[str, Any], gathered: Sequence[Callable[[], Tensors]]) -> list[Finding]:
    """``gathered`` makes a bucket each."""
    buckets = [make() for make in gathered]
    tensors = [pair for bucket in buckets for pair in bucket]
    linears = [tensor for name, tensor in tensors if tensor.dim() == 2 and "proj" in name]
    whole, of_linears = (sum(x.nbytes for x in held) for held in ([t for _, t in tensors], linears))
    codes = [(name, quantized_blocks(tensor)[0]) for name, tensor in tensors if "proj" in name]
    host = HostCopies()

    def as_published(encoded: Callable[[Tensors], Tensors]) -> None:
        for i, make in enumerate(gathered):
            pairs = make()
            assert finite(pairs)
            pairs = encoded(pairs)
            lines = [describe(name, tensor) for name, tensor in pairs]
            assert len(host.copy(0, i, pairs)) == len(lines)

    parts: dict[str, tuple[int, Callable[[], object]]] = {
        "gather, rename": (whole, lambda: [make() for make in gathered]),
        "are all finite": (whole, lambda: [finite(bucket) for bucket in buckets]),
        "describe": (whole, lambda: [describe(name, tensor) for name, tensor in tensors]),
        "quantise (bytes of bf16)": (of_linears, lambda: [quantized_blocks(tensor) for tensor in linears]),
        "describe FP8 codes (their bytes)": (of_linears // 2, lambda: [describe(*pair) for pair in codes]),
        "to host memory that is new": (whole, lambda: [tensor.to("cpu", copy=True) for _, tensor in tensors]),
        "to host memory that is kept": (whole, lambda: [host.copy(1, i, pairs) for i, pairs in enumerate(buckets)]),
        "all of it": (whole, partial(as_published, lambda pairs: pairs)),
        "all of it, to FP8 (bytes of bf16)": (whole, partial(as_published, partial(quantized, hf_config, 0))),
    }
    findings = [Finding("bytes of the layers, buckets, tensors", f"{whole}, {len(buckets)}, {len(tensors)}")]
    for what, (size, work) in parts.items():
        taken = clocked(work)
        findings.append(Finding(f"{what}: GB/s, ms", f"{size / taken / 1e9:.2f}, {1e3 * taken:.1f}"))
    return findings


def finite(pairs: Tensors) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for _, tensor in pairs)
