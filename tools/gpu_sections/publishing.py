"""The sender's path of one GPU in GB/s: an 8B model's layers gathered, described, quantised and copied to the host."""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from gpu_sections.common import DEVICE, Finding, learner_of, qwen3, write_model
from gpu_sections.speed import LAYERS
from megatron_sdpo.mcore.hf import canonical_parameters
from megatron_sdpo.quantization import quantized_blocks
from megatron_sdpo.reshard.digest import describe
from megatron_sdpo.reshard.gather import gather
from megatron_sdpo.reshard.plan import plan

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
    """Each part of ``Publisher._gather_all`` by itself, all of it, and what else could take its last part's place."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        # The head and the embedding are as other tensors: a small vocabulary is quickly written.
        model = write_model(Path(name) / "model", qwen3(num_hidden_layers=LAYERS, vocab_size=4096), std=0.02)
        learner = learner_of(model)
    own = canonical_parameters(learner.model, learner.groups)
    buckets = plan(learner.hf_config, 1, 2, learner.config.publish.bucket_bytes)
    return rates([partial(gather, bucket, own, learner.hf_config, learner.groups) for bucket in buckets])


def rates(gathered: Sequence[Callable[[], Tensors]]) -> list[Finding]:
    """``gathered`` makes a bucket each."""
    buckets = [make() for make in gathered]
    tensors = [pair for bucket in buckets for pair in bucket]
    linears = [tensor for name, tensor in tensors if tensor.dim() == 2 and "proj" in name]
    whole, of_linears = (sum(x.nbytes for x in held) for held in ([t for _, t in tensors], linears))
    codes = [(name, quantized_blocks(tensor)[0]) for name, tensor in tensors if "proj" in name]
    pinned = Pinned(max(sum(t.nbytes for _, t in bucket) for bucket in buckets))

    def as_it_is() -> None:
        for make in gathered:
            described(make())

    def through_pinned() -> None:
        for make in gathered:
            pairs = make()
            lines = [describe(name, tensor) for name, tensor in pairs]
            assert lines and finite(pairs)
            pinned.host_copies(pairs)

    parts: dict[str, tuple[int, Callable[[], object]]] = {
        "gather, rename": (whole, lambda: [make() for make in gathered]),
        "are all finite": (whole, lambda: [finite(bucket) for bucket in buckets]),
        "describe": (whole, lambda: [describe(name, tensor) for name, tensor in tensors]),
        "quantise (bytes of bf16)": (of_linears, lambda: [quantized_blocks(tensor) for tensor in linears]),
        "describe FP8 codes (their bytes)": (of_linears // 2, lambda: [describe(*pair) for pair in codes]),
        "to('cpu', copy=True)": (whole, lambda: [tensor.to("cpu", copy=True) for _, tensor in tensors]),
        "to pinned memory, as one": (pinned.size, pinned.fill),
        "pinned staging, then host memory": (whole, lambda: [pinned.host_copies(bucket) for bucket in buckets]),
        "all of it, as it is": (whole, as_it_is),
        "all of it, through pinned staging": (whole, through_pinned),
    }
    findings = [Finding("bytes of the layers, buckets, tensors", f"{whole}, {len(buckets)}, {len(tensors)}")]
    for what, (size, work) in parts.items():
        taken = clocked(work)
        findings.append(Finding(f"{what}: GB/s, ms", f"{size / taken / 1e9:.2f}, {1e3 * taken:.1f}"))
    same = all(
        torch.equal(copy, tensor.cpu())
        for bucket in buckets
        for (_, copy), (_, tensor) in zip(pinned.host_copies(bucket), bucket, strict=True)
    )
    return [*findings, Finding("pinned staging gives the same", "yes" if same else "no", "yes", same)]


def described(pairs: Tensors) -> Tensors:
    """What ``Publisher._gather_all`` does with a bucket."""
    assert finite(pairs)
    lines = [describe(name, tensor) for name, tensor in pairs]
    assert len(lines) == len(pairs)
    return [(name, tensor.to("cpu", copy=True)) for name, tensor in pairs]


def finite(pairs: Tensors) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for _, tensor in pairs)


class Pinned:
    """Two halves of page-locked memory: one is filled from the GPU while the other is emptied."""

    HALF = 1 << 26

    def __init__(self, largest: int) -> None:
        self.halves = [torch.empty(self.HALF, dtype=torch.uint8, pin_memory=DEVICE.type == "cuda") for _ in range(2)]
        self.size = min(largest, 1 << 30)
        self._source = torch.zeros(self.size, dtype=torch.uint8, device=DEVICE)
        self._whole = torch.empty(self.size, dtype=torch.uint8, pin_memory=DEVICE.type == "cuda")

    def fill(self) -> None:
        """The ceiling: one copy as large as a bucket, to memory that stays page-locked."""
        self._whole.copy_(self._source, non_blocking=True)

    def host_copies(self, pairs: Tensors) -> Tensors:
        """The tensors in ordinary host memory, each copied in pieces."""
        copies = [(name, torch.empty(tensor.shape, dtype=tensor.dtype)) for name, tensor in pairs]
        pieces = [
            (target, source)
            for (_, copy), (_, tensor) in zip(copies, pairs, strict=True)
            for target, source in zip(
                _bytes(copy).split(self.HALF), _bytes(tensor.contiguous()).split(self.HALF), strict=True
            )
        ]
        waiting: tuple[Tensor, Tensor, object] | None = None
        for i, (target, source) in enumerate(pieces):
            half = self.halves[i % 2][: len(source)]
            half.copy_(source, non_blocking=True)
            filled = torch.cuda.Event() if DEVICE.type == "cuda" else None
            if filled is not None:
                filled.record()
            _empty(waiting)
            waiting = (target, half, filled)
        _empty(waiting)
        return copies


def _empty(waiting: tuple[Tensor, Tensor, object] | None) -> None:
    if waiting is None:
        return
    target, half, filled = waiting
    if isinstance(filled, torch.cuda.Event):
        filled.synchronize()
    target.copy_(half)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)
