"""Times on one GPU: an 8B model's layers in bf16 and FP8, quantisation and EMA beside a copy."""

import gc
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from gpu_sections.common import Finding, at_least, at_most, draw_batch, joined, learner_of, qwen3, write_model
from megatron_sdpo import flops, quantization
from megatron_sdpo.batching import MicroBatch
from megatron_sdpo.mcore.forward import forward_backward, score
from megatron_sdpo.mcore.learner import Learner
from megatron_sdpo.teacher import ema_update
from megatron_sdpo.types import Batch

LAYERS = 6
"""Of Qwen3-8B's 36: what a GPU of 80 GB holds with master weights, moments, gradients and teacher."""


def seconds(work: Callable[[], object], rounds: int = 5, warm: int = 2) -> float:
    """Median over rounds, by CUDA events."""
    for _ in range(warm):
        work()
    times = []
    for _ in range(rounds):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        work()
        ended.record()
        torch.cuda.synchronize()
        times.append(began.elapsed_time(ended) / 1e3)
    return statistics.median(times)


def ceilings() -> list[Finding]:
    """What the card does at best: a copy, and a product of large matrices."""
    x = torch.empty(1 << 30, dtype=torch.bfloat16, device="cuda").normal_()
    y = torch.empty_like(x)
    copied = 2 * x.nbytes / seconds(lambda: y.copy_(x)) / 1e12
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    rate = 2 * 8192**3 / seconds(lambda: a @ b, rounds=10) / 1e12
    return [Finding("copy, TB/s read and written", copied), Finding("bf16 product 8192^3, TFLOP/s", rate)]


def quantisation() -> list[Finding]:
    """Codes and scales of 0.5G numbers in bf16: bytes read and written a second, beside a copy's."""
    from megatron_sdpo import quantization_kernels as kernels

    x = torch.empty(16_384, 32_768, dtype=torch.bfloat16, device="cuda").normal_()
    y = torch.empty_like(x)
    copied = 2 * x.nbytes / seconds(lambda: y.copy_(x))
    moved = x.nbytes + x.numel()
    findings = [Finding("copy, TB/s", copied / 1e12)]
    small = x[:1000, :3000].contiguous()
    for name in ("quantized_rows", "quantized_blocks"):
        kernel, plain = getattr(kernels, name), getattr(quantization, f"{name.removeprefix('quantized_')}_in_torch")
        for numbers in (small, small.float() * 1e-3, torch.zeros_like(small)):
            (codes, scales), (wanted, wanted_scales) = kernel(numbers), plain(numbers)
            same = (codes.view(torch.uint8) == wanted.view(torch.uint8)).double().mean().item()
            findings.append(at_least(f"{name}, {numbers.dtype}: share of codes that are torch's", same, 1.0))
            off = ((scales - wanted_scales).abs() / wanted_scales).max().item()
            findings.append(at_most(f"{name}, {numbers.dtype}: scales from torch's, relative", off, 0.0))
        rate = moved / seconds(lambda kernel=kernel: kernel(x))
        findings.append(at_least(f"{name}: kernel, share of the copy's bandwidth", rate / copied, 0.6))
        slow = moved / seconds(lambda plain=plain: plain(x[:2048])) * (2048 / 16_384)
        findings.append(Finding(f"{name}: torch, share of the copy's bandwidth", slow / copied))
    weight = torch.ones(4096, dtype=torch.bfloat16, device="cuda")
    for name, moved, kernel in (
        ("quantized_swiglu", x.nbytes + x.numel() // 2, lambda: kernels.quantized_swiglu(x)),
        (
            "quantized_rms_norm",
            x.nbytes + x.numel(),
            lambda: kernels.quantized_rms_norm(x.view(-1, 4096), weight, 1e-6),
        ),
    ):
        findings.append(
            at_least(f"{name}: kernel, share of the copy's bandwidth", moved / seconds(kernel) / copied, 0.6)
        )
    return findings


def ema() -> list[Finding]:
    """The teacher's update of 1G weights in fp32, one tensor of an 8B model's layer after the other."""
    shapes = [(6144, 4096), (4096, 4096), (24_576, 4096), (4096, 12_288)] * 5
    teacher, student = ([torch.randn(shape, device="cuda") for shape in shapes] for _ in range(2))
    moved = 3 * sum(t.nbytes for t in teacher)
    x = torch.cat([t.flatten() for t in student])
    y = torch.empty_like(x)
    copied = 2 * x.nbytes / seconds(lambda: y.copy_(x))
    rate = moved / seconds(lambda: ema_update(teacher, student, 0.05))
    return [at_least("EMA update, share of the copy's bandwidth", rate / copied, 0.7)]


def _sum(micro_batch: MicroBatch, hidden_NH: Tensor) -> tuple[Tensor, None]:
    return hidden_NH.float().sum() * 1e-6, None


def stack() -> list[Finding]:
    """Qwen3-8B with fewer layers: the learner's passes, and the layers alone, in bf16 and blockwise FP8."""
    findings, times = [], {}
    batch = draw_batch(150_000, [(512, 3584, 1024)] * 12)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        model = write_model(Path(name) / "model", qwen3(num_hidden_layers=LAYERS), std=0.02)
        for kind in ("off", "blockwise"):
            learner = learner_of(
                model, f"fp8.student={kind}", f"fp8.teacher={kind}", "layout.tokens_per_micro_batch=16384"
            )
            times[kind] = _passes(learner, batch)
            findings += _said(learner, batch, "bf16" if kind == "off" else "FP8", times[kind])
            del learner
            gc.collect()
            torch.cuda.empty_cache()
    for what, goal in (("layers, train", 1.25), ("layers, forward", 1.4), ("train", None), ("score_teacher", None)):
        ratio = times["off"][what] / times["blockwise"][what]
        findings.append(at_least(f"{what}: FP8 faster by", ratio, goal) if goal else Finding(f"{what}: by", ratio))
    return findings


def sharing() -> list[Finding]:
    """The teacher's pass of Qwen3-8B's layers over the siblings of two questions, with ``layout.share_prefixes`` and
    without. Their contexts are 4096 tokens that all eight read and 32 of each one's own, responses 2048 to 4092."""
    findings, batch = [], _siblings()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        model = write_model(Path(name) / "model", qwen3(num_hidden_layers=LAYERS), std=0.02)
        for kind in ("off", "blockwise"):
            found = {}
            for share in ("off", "teacher"):
                asked = (f"fp8.student={kind}", f"fp8.teacher={kind}", f"layout.share_prefixes={share}")
                found[share] = _taught(learner_of(model, *asked, "layout.tokens_per_micro_batch=36864"), batch)
                findings.append(
                    Finding(f"fp8 {kind}: s of the teacher's pass, share_prefixes={share}", found[share][1])
                )
                gc.collect()
                torch.cuda.empty_cache()
            (alone, slow), (together, quick) = found["off"], found["teacher"]
            findings.append(Finding(f"fp8 {kind}: sooner by", slow / quick))
            findings.append(Finding(f"fp8 {kind}: log-probs apart, mean", (alone - together).abs().mean().item()))
    return findings


def _siblings() -> Batch:
    samples = []
    for question in range(2):
        lengths = [(512, 1, 4096)] + [(512, 2048 + 292 * i, 32) for i in range(8)]
        shared, *tails = draw_batch(150_000, lengths, question).samples
        for i, tail in enumerate(tails):
            read = (*(shared.teacher_prompt_ids or ()), *(tail.teacher_prompt_ids or ()))
            own = replace(tail, id=f"0/{question}/{i}", group=question, prompt_ids=shared.prompt_ids)
            samples.append(replace(own, teacher_prompt_ids=read))
    return Batch(0, tuple(samples), {}, cursor=1)


def _taught(learner: Learner, batch: Batch) -> tuple[Tensor, float]:
    """What the teacher says, and the seconds that it takes."""
    student = learner.score_student(batch)
    log_probs = joined(learner.score_teacher(batch, student).log_probs)
    return log_probs, seconds(lambda: learner.score_teacher(batch, student), 5, 1)


def _passes(learner: Learner, batch: Batch) -> dict[str, float]:
    student = learner.score_student(batch)
    teacher = learner.score_teacher(batch, student)
    rows = learner._cut(batch.samples, learner._shares(batch), "student")

    def layers_train() -> None:
        for ddp in learner.wrapped:
            ddp.zero_grad_buffer()
        with learner.precision.of(learner.config.fp8.student):
            forward_backward(learner.wrapped, rows, _sum)

    def layers_forward() -> None:
        with learner.precision.of(learner.config.fp8.teacher, at_once=True):
            score(learner.model, rows, lambda micro_batch, hidden_NH: None)

    torch.cuda.reset_peak_memory_stats()
    return {
        "score_student": seconds(lambda: learner.score_student(batch), 3, 1),
        "score_teacher": seconds(lambda: learner.score_teacher(batch, student), 3, 1),
        "train": seconds(lambda: learner.train(batch, student, teacher), 3, 1),
        "layers, train": seconds(layers_train, 3, 1),
        "layers, forward": seconds(layers_forward, 3, 1),
    }


def _said(learner: Learner, batch: Batch, kind: str, times: dict[str, float]) -> list[Finding]:
    hf, peak = learner.hf_config, (flops.peak_tflops(torch.cuda.get_device_name()) or 989.4) * 1e12
    student = flops.counted([(len(s.prompt_ids), len(s.response_ids)) for s in batch.samples])
    taught = flops.counted([(len(s.teacher_prompt_ids or ()), len(s.response_ids)) for s in batch.samples])
    whole, teacher = (flops.forward_flops(hf, tokens) for tokens in (student, taught))
    bare = flops.forward_flops(hf, flops.Tokens(student.tokens, student.pairs, 0))
    works = {
        "score_student": whole,
        "score_teacher": teacher,
        "train": 3 * whole,
        "layers, train": 3 * bare,
        "layers, forward": bare,
    }
    findings = []
    for what, taken in times.items():
        rate = works[what] / taken
        shown = f"{taken:.4f}, {rate / 1e12:.0f}, {rate / peak:.3f}"
        findings.append(Finding(f"{kind} {what}: s, TFLOP/s, share of bf16 peak", shown))
    if kind == "bf16":
        mfu = works["layers, train"] / times["layers, train"] / peak
        findings.append(at_least("bf16 layers, train: MFU", mfu, 0.45))
        findings.append(Finding("bf16 train, with head and optimizer: MFU", works["train"] / times["train"] / peak))
    findings.append(Finding(f"{kind}: peak GiB of all passes", torch.cuda.max_memory_allocated() / 2**30))
    return findings
