"""Where one forward pass of an 8B model's layers spends its time on the GPU, kernel by kernel, in bf16 and in FP8."""

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from gpu_sections.common import Finding, draw_batch, learner_of, qwen3, write_model
from gpu_sections.speed import LAYERS, seconds
from megatron_sdpo.mcore import fp8_codes
from megatron_sdpo.mcore.forward import score

MOST = 25
KINDS = {
    "attention": r"flash|sdpa|fmha|attn|attention",
    "quantising, transposing": r"quantize|cast_transpose|block_scal|swizzle|amax",
    "products": r"gemm|nvjet|cutlass|xmma|splitk|cublas",
    "norms": r"rmsnorm|layernorm|ln_fwd|norm",
    "rotary": r"rope|rotary",
    "gated unit": r"silu|swiglu|glu|triton",
    "copies": r"memcpy|memset|copy|cat|fill",
}
"""The first whose pattern is in a kernel's name or in that of the operator that launched it."""


@dataclass(slots=True)
class Launched:
    """All launches of one kernel by one operator."""

    kernel: str
    operator: str
    count: int = 0
    microseconds: float = 0.0

    @property
    def kind(self) -> str:
        for text in (self.kernel, self.operator):
            for kind, pattern in KINDS.items():
                if re.search(pattern, text, re.IGNORECASE):
                    return kind
        return "the rest"


def layers_by_kernel() -> list[Finding]:
    """The layers of ``stack``, one forward pass over its rows: the longest kernels, and the time by kind."""
    # The head is not called: a small vocabulary is quickly written.
    settings = qwen3(num_hidden_layers=LAYERS, vocab_size=4096)
    batch = draw_batch(4096, [(512, 3584, 1024)] * 12)
    findings, totals = [], {}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        model = write_model(Path(name) / "model", settings, std=0.02)
        learner = learner_of(model, "fp8.student=off", "fp8.teacher=blockwise", "layout.tokens_per_micro_batch=16384")
    rows = learner._cut(batch.samples, learner._shares(batch), "student")
    for kind, said in (("off", "bf16"), ("blockwise", "FP8")):

        def forward(kind: Any = kind) -> None:
            with learner.precision.of(kind, at_once=True):
                score(learner.model, rows, lambda micro_batch, hidden_NH: None)

        taken = seconds(forward, 3, 2)
        launched = launches(forward)
        busy = sum(one.microseconds for one in launched) / 1e6
        findings.append(Finding(f"{said}: s, kernels alone s, of it", f"{taken:.4f}, {busy:.4f}, {busy / taken:.3f}"))
        findings += [Finding(f"{said} {what}", shown) for what, shown in longest(launched)]
        totals[said] = by_kind(launched)
    with given_norms_and_units():
        slower = seconds(forward, 3, 1)
    findings.append(Finding("FP8 without codes written at once: s, slower by", f"{slower:.4f}, {slower / taken:.3f}"))
    for what in totals["bf16"] | totals["FP8"]:
        times = [totals[said].get(what, 0.0) / 1e3 for said in ("bf16", "FP8")]
        findings.append(Finding(f"{what}: ms in bf16, in FP8", f"{times[0]:.2f}, {times[1]:.2f}"))
    return findings


@contextmanager
def given_norms_and_units() -> Iterator[None]:
    """Within the block Transformer Engine's own, as in training."""
    before, fp8_codes._at_once = fp8_codes._at_once, lambda: False
    try:
        yield
    finally:
        fp8_codes._at_once = before


@contextmanager
def counted_codes() -> Iterator[list[torch.Size]]:
    """Shapes of what is written as codes within the block."""
    before, shapes = fp8_codes._as_tensor, []

    def counted(codes: torch.Tensor, *rest: Any) -> Any:
        shapes.append(codes.shape)
        return before(codes, *rest)

    fp8_codes._as_tensor = counted
    try:
        yield shapes
    finally:
        fp8_codes._as_tensor = before


def launches(work: Callable[[], object]) -> list[Launched]:
    """Of the kernels, copies and fills that ``work`` runs on the GPU; the longest first."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    return summed(profiler.events() or [])


def summed(events: Any) -> list[Launched]:
    """The profiler's events -> what ran on the GPU, by the innermost operator that launched it where one is known."""
    found: dict[tuple[str, str], Launched] = {}

    def add(kernel: str, operator: str, count: int, microseconds: float) -> None:
        one = found.setdefault((kernel, operator), Launched(kernel, operator))
        one.count += count
        one.microseconds += microseconds

    ran: dict[str, list[float]] = {}
    for event in events:
        if event.device_type.name == "CUDA" and not event.is_user_annotation:
            ran.setdefault(event.name, []).append(event.time_range.elapsed_us())
    rest = {kernel: [float(len(times)), sum(times)] for kernel, times in ran.items()}
    for event in events:
        if event.device_type.name != "CPU":
            continue
        for kernel in event.kernels:
            add(kernel.name, event.name, 1, kernel.duration)
            rest[kernel.name][0] -= 1
            rest[kernel.name][1] -= kernel.duration
    for kernel, (count, microseconds) in rest.items():
        if count > 0:
            add(kernel, "", int(count), microseconds)
    return sorted(found.values(), key=lambda one: -one.microseconds)


def longest(launched: list[Launched]) -> list[tuple[str, str]]:
    """A line for each of the longest: (kernel, share of all, milliseconds, launches, kind, operator)."""
    whole = sum(one.microseconds for one in launched)
    return [
        (
            shortened(one.kernel),
            f"{one.microseconds / whole:6.1%} {one.microseconds / 1e3:8.2f} ms {one.count:5}x  {one.kind}"
            + f", by {shortened(one.operator, 50)}" * bool(one.operator),
        )
        for one in launched[:MOST]
    ]


def shortened(name: str, most: int = 90) -> str:
    """Without what templates repeat: the beginning and the end."""
    name = re.sub(r"\s+", " ", name.removeprefix("void "))
    half = most // 2
    return name if len(name) <= most else f"{name[: half - 1]}..{name[-half + 1 :]}"


def by_kind(launched: list[Launched]) -> dict[str, float]:
    """Microseconds of each kind, the longest first."""
    sums: dict[str, float] = {}
    for one in launched:
        sums[one.kind] = sums.get(one.kind, 0.0) + one.microseconds
    return dict(sorted(sums.items(), key=lambda item: -item[1]))
