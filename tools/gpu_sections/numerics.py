"""Transformer Engine's linears, the learner's precisions, packing and the divergence, each against a reference."""

import random
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu_sections.common import (
    DEVICE,
    SMALL,
    Finding,
    at_least,
    at_most,
    draw_batch,
    holds,
    joined,
    learner_of,
    mixed_lengths,
    qwen3,
    relative,
    step_of,
    write_model,
)
from gpu_sections.kernels import counted_codes, given_norms_and_units
from megatron_sdpo import quantization
from megatron_sdpo.divergence import divergence, student_support, support_log_probs
from megatron_sdpo.fused import Head, fused_divergence
from megatron_sdpo.mcore.hf import save_hf
from megatron_sdpo.types import Batch, Sample


def environment() -> list[Finding]:
    """What is here."""
    import importlib.metadata

    import transformer_engine.pytorch as te

    device = torch.cuda.get_device_properties(0)
    able, why = te.is_fp8_block_scaling_available(return_reason=True)
    return [
        Finding("GPU", f"{device.name}, {device.total_memory / 2**30:.0f} GiB, {device.multi_processor_count} SMs"),
        Finding("torch", f"{torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"),
        Finding("transformer-engine", importlib.metadata.version("transformer_engine")),
        Finding("megatron-core", importlib.metadata.version("megatron_core")),
        holds("blockwise FP8 available", able, why or "yes"),
    ]


def linears() -> list[Finding]:
    """One linear of Transformer Engine's against fp32 and against the emulation; and its codes against ours."""
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import Float8BlockScaling, Float8CurrentScaling, Format

    findings = []
    generator = torch.Generator(DEVICE).manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE).bfloat16()

    for recipe, bound, oracle in (
        (Float8BlockScaling(fp8_format=Format.E4M3), 0.045, 0.006),
        (Float8CurrentScaling(fp8_format=Format.E4M3), 0.05, None),
    ):
        name = type(recipe).__name__
        for t, k, n in ((256, 512, 384), (2048, 4096, 1536)):
            linear = te.Linear(k, n, bias=False, params_dtype=torch.bfloat16, device=DEVICE)
            x, grad = drawn(t, k).requires_grad_(), drawn(t, n)
            with te.fp8_autocast(enabled=True, fp8_recipe=recipe):
                y = linear(x)
            y.backward(grad)
            w: Any = linear.weight
            wanted = (x @ w.t(), grad @ w, grad.t() @ x)
            got: Any = (y, x.grad, w.grad)
            for what, a, b in zip(("y", "dx", "dw"), got, wanted, strict=True):
                findings.append(at_most(f"{name} {t}x{k}x{n} {what} against bf16", relative(a, b), bound))
            if oracle is None:
                continue
            x2, w2 = x.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
            emulated: Any = quantization.BlockLinear.apply(x2, w2)
            emulated.backward(grad)
            ours: Any = (emulated, x2.grad, w2.grad)
            for what, a, b in zip(("y", "dx", "dw"), got, ours, strict=True):
                findings.append(at_most(f"{name} {t}x{k}x{n} {what} against the emulation", relative(a, b), oracle))
    return findings + _codes(drawn(384, 640), drawn(200, 640))


def _codes(w_NK: Tensor, x_TK: Tensor) -> list[Finding]:
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer

    findings = []
    for what, x, dim, ours in (
        ("weight", w_NK, 2, quantization.quantized_blocks(w_NK)),
        ("activation", x_TK, 1, quantization.quantized_rows(x_TK)),
    ):
        quantizer = Float8BlockQuantizer(
            fp8_dtype=tex.DType.kFloat8E4M3,
            rowwise=True,
            columnwise=False,
            force_pow_2_scales=False,
            amax_epsilon=0.0,
            block_scaling_dim=dim,
        )
        theirs: Any = quantizer(x)
        codes = theirs._rowwise_data.view(torch.uint8)
        same = (codes == ours[0].view(torch.uint8)).double().mean().item()
        # Its kernel for activations divides with less care: one code in a thousand is the neighbour.
        findings.append(at_least(f"codes of a {what} like Transformer Engine's", same, 1.0 if dim == 2 else 0.998))
        scales = theirs._rowwise_scale_inv
        scales = scales.t() if dim == 1 else scales
        n, k = ours[1].shape
        findings.append(at_most(f"scales of a {what}", relative(scales[:n, :k], ours[1]), 1e-6))
        again = theirs.dequantize(dtype=torch.float32)
        back = (quantization.of_blocks if dim == 2 else quantization.of_rows)(*ours)
        findings.append(at_most(f"numbers of a {what} after both", relative(again, back), 5e-3))
    return findings


def codes() -> list[Finding]:
    """Codes that a teacher's passes write at once, beside those of torch and of the passes that write numbers first."""
    findings = []
    generator = torch.Generator(DEVICE).manual_seed(0)
    gates, x, weight = (
        torch.randn(shape, generator=generator, device=DEVICE).bfloat16()
        for shape in ((640, 3072), (640, 1536), (1536,))
    )
    for what, ours, torchs in (
        ("gated unit", quantization.quantized_swiglu(gates), quantization.swiglu_in_torch(gates)),
        ("norm", quantization.quantized_rms_norm(x, weight, 1e-6), quantization.rms_norm_in_torch(x, weight, 1e-6)),
    ):
        same = (ours[0].view(torch.uint8) == torchs[0].view(torch.uint8)).double().mean().item()
        findings.append(at_least(f"codes of a {what} like torch's", same, 0.998))
        findings.append(at_most(f"scales of a {what} from torch's", relative(ours[1], torchs[1]), 1e-3))
    with tempfile.TemporaryDirectory() as name:
        model = write_model(Path(name) / "model", qwen3(**SMALL))
        batch = draw_batch(SMALL["vocab_size"], mixed_lengths(16))
        learner = learner_of(model, "fp8.student=blockwise", "fp8.teacher=blockwise")
        with counted_codes() as written:
            student = learner.score_student(batch)
            of_student = len(written)
            at_once = joined(learner.score_teacher(batch, student).log_probs)
        with given_norms_and_units():
            given = joined(learner.score_teacher(batch, student).log_probs)
        again = joined(learner.score_teacher(batch, student).log_probs)
    apart = (at_once - given).abs()
    return [
        *findings,
        holds("log-probs again, to the bit", torch.equal(at_once, again)),
        holds(
            "codes are written at once, by the teacher alone", len(written) > of_student == 0, f"{len(written)} times"
        ),
        Finding("log-probs that differ from those of numbers first", (apart > 0).double().mean().item()),
        at_most("log-probs from those of numbers first, mean", apart.mean().item(), 0.01),
        Finding("log-probs from those of numbers first, largest", apart.max().item()),
    ]


def learners() -> list[Finding]:
    """A step of SDPO in every precision, against plain modules in fp32."""
    findings = []
    with tempfile.TemporaryDirectory() as name:
        model = write_model(Path(name) / "model", qwen3(**SMALL))
        batch = draw_batch(SMALL["vocab_size"], mixed_lengths(16))
        sampled = ("objective.support=sampled", "objective.alpha=1")  # rounding would choose another top-K
        fp32 = step_of(learner_of(model, "model.dtype=float32", *sampled), batch)
        for kind, log_prob_bound, share in (
            ("bf16", 0.03, 0.05),
            ("blockwise", 0.12, 0.15),
            ("tensorwise", 0.15, 0.2),
            ("emulated", 0.12, 0.15),
        ):
            asked = () if kind == "bf16" else (f"fp8.student={kind}", f"fp8.teacher={kind}")
            asked = (*asked, *sampled)
            learner = learner_of(model, *asked)
            metrics, student, teacher = step_of(learner, batch)
            for what, got, wanted in (("student", student, fp32[1]), ("teacher", teacher, fp32[2])):
                apart = (joined(got) - joined(wanted)).abs().mean().item()
                findings.append(at_most(f"{kind}: {what} log-probs from fp32, mean", apart, log_prob_bound))
            for key in ("loss/total", "optim/grad_norm"):
                off = abs(metrics[key] / fp32[0][key] - 1)
                findings.append(at_most(f"{kind}: {key} from fp32, relative", off, share))
            if "precision/floor" in metrics:
                findings.append(at_most(f"{kind}: floor, same precision", metrics["precision/floor"], 1e-4))
            if kind == "bf16":
                findings += _exported(learner, model, Path(name))
        mixed = step_of(learner_of(model, "fp8.teacher=blockwise"), batch)[0]
        findings.append(at_most("floor, bf16 student and blockwise teacher, nats", mixed["precision/floor"], 0.05))
    return findings


def _exported(learner: Any, model: Path, folder: Path) -> list[Finding]:
    """Names and shapes under Transformer Engine: loaded and exported again, untrained, to the bit."""
    from safetensors.torch import load_file

    learner.reset()
    save_hf(learner.model, folder / "exported", learner.groups, learner.config.layout, model)
    before, after = (load_file(path / "model.safetensors") for path in (model, folder / "exported"))
    same = before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    return [holds("loaded into Transformer Engine's modules and exported: the same to the bit", same)]


def packed() -> list[Finding]:
    """Sequences end to end in one row against each alone."""
    findings = []
    with tempfile.TemporaryDirectory() as name:
        model = write_model(Path(name) / "model", qwen3(**SMALL))
        batch = draw_batch(SMALL["vocab_size"], mixed_lengths(24, seed=1))
        for kind, bound in (("off", 0.02), ("blockwise", 0.08)):
            one, each = (
                learner_of(model, f"fp8.student={kind}", f"layout.tokens_per_micro_batch={tokens}")
                for tokens in (8192, 1)
            )
            together, alone = (joined(learner.score_student(batch).old_log_probs) for learner in (one, each))
            findings.append(
                at_most(f"fp8 {kind}: packed from alone, mean", (together - alone).abs().mean().item(), bound)
            )
            findings += _shared(model, kind, bound)
            changed = replace(batch.samples[0], prompt_ids=batch.samples[0].prompt_ids[::-1])
            other = Batch(0, (changed, *batch.samples[1:]), {}, 1)
            scores, scores_other = (one.score_student(b).old_log_probs for b in (batch, other))
            leaks = max((scores[i] - scores_other[i]).abs().max().item() for i in range(1, len(batch.samples)))
            findings.append(at_most(f"fp8 {kind}: change in the others when one prompt changes", leaks, 0.0))
    return findings


def _shared(model: Path, kind: str, bound: float) -> list[Finding]:
    """Siblings whose contexts begin alike, by ``layout.share_prefixes`` and without: the same, and how much sooner."""
    draw = random.Random(3)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(2, SMALL["vocab_size"]) for _ in range(count))

    contexts = [ids(1500), ids(900)]
    samples = []
    for i in range(16):
        response = ids(draw.randint(1, 200))
        own = (*contexts[i // 8], *ids(i % 8 * 9))
        samples.append(Sample(f"0/{i}", i // 8, ids(60), response, (-8.0,) * len(response), own, 0.0))
    batch = Batch(0, tuple(samples), {}, 1)
    scores, seconds = {}, {}
    for share in ("off", "teacher"):
        asked = (f"fp8.student={kind}", f"fp8.teacher={kind}", f"layout.share_prefixes={share}")
        learner = learner_of(model, *asked, "layout.tokens_per_micro_batch=32768")
        student = learner.score_student(batch)
        rounds = []
        for _ in range(6):
            torch.cuda.synchronize()
            began = time.perf_counter()
            scores[share] = joined(learner.score_teacher(batch, student).log_probs)
            torch.cuda.synchronize()
            rounds.append(time.perf_counter() - began)
        seconds[share] = statistics.median(rounds[1:])
    apart = (scores["teacher"] - scores["off"]).abs().mean().item()
    return [
        at_most(f"fp8 {kind}: siblings that share their beginnings from those that do not, mean", apart, bound),
        Finding(f"fp8 {kind}: s of the teacher's pass, alone, shared", " ".join(f"{s:.4f}" for s in seconds.values())),
    ]


def teacher() -> list[Finding]:
    """No stale codes: what the teacher says changes when its weights do, and then only."""
    findings = []
    with tempfile.TemporaryDirectory() as name:
        model = write_model(Path(name) / "model", qwen3(**SMALL))
        batch = draw_batch(SMALL["vocab_size"], mixed_lengths(12))
        for placement in ("swapped", "resident", "offloaded"):
            both = ("fp8.student=blockwise", "fp8.teacher=blockwise", "optim.lr=1e-3", f"teacher.placement={placement}")
            learner = learner_of(model, *both, "teacher.update_rate=0.3")

            student = learner.score_student(batch)

            def says(learner: Any = learner, student: Any = student) -> Tensor:
                return joined(learner.score_teacher(batch, student).log_probs)

            first = says()
            findings.append(holds(f"{placement}: the teacher says the same again", torch.equal(first, says())))
            own = joined(learner.score_student(batch).old_log_probs)
            findings.append(
                holds(f"{placement}: the student after the teacher", torch.equal(own, joined(student.old_log_probs)))
            )
            learner.train(batch, student, learner.score_teacher(batch, student))
            findings.append(holds(f"{placement}: nor after the student has moved", torch.equal(first, says())))
            learner.update_teacher()
            moved = says()
            findings.append(holds(f"{placement}: but after its own update", not torch.equal(first, moved)))
            fresh = learner_of(model, "fp8.student=blockwise", "fp8.teacher=blockwise", "teacher.kind=live")
            with torch.no_grad():
                for (key, p), (_, q) in zip(fresh.model.named_parameters(), _teacher_named(learner), strict=True):
                    assert p.shape == q.shape, key
                    p.copy_(q)
            anew = joined(fresh.score_teacher(batch, student).log_probs)
            findings.append(holds(f"{placement}: as a model that was never quantised before", torch.equal(moved, anew)))
    return findings


def _teacher_named(learner: Any) -> list[tuple[str, Tensor]]:
    names = [name for name, _ in learner.model.named_parameters()]
    with learner.teacher.swapped_in(learner.weights):
        return [(name, p.detach().clone()) for name, p in zip(names, learner.model.parameters(), strict=True)]


def divergences() -> list[Finding]:
    """The loss on the last layer, in bf16 and fp32, against float64 over the whole vocabulary."""
    findings = []
    generator = torch.Generator(DEVICE).manual_seed(0)
    t, h, v, k = 96, 256, 32_000, 20
    hidden = torch.randn(t, h, generator=generator, device=DEVICE)
    head, other = (torch.randn(v, h, generator=generator, device=DEVICE) * 0.15 for _ in range(2))
    teacher_logits = hidden @ (head + 0.3 * other).t()
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        x, w = (z.to(dtype, copy=True).requires_grad_() for z in (hidden, head))
        logits = (x.detach() @ w.detach().t()).double()
        ids = student_support(logits, k)
        teacher_TB = support_log_probs(teacher_logits, ids, with_tail=True)
        exact_x, exact_w = (z.detach().to(torch.float64, copy=True).requires_grad_() for z in (x, w))
        exact = _naive(exact_x @ exact_w.t(), ids, teacher_TB.double())
        exact.sum().backward()
        fused = fused_divergence(x, w, ids, teacher_TB, 0.5, chunk=32)
        fused.sum().backward()
        plain = divergence(x.detach() @ w.detach().t(), ids, teacher_TB, 0.5)
        for what, got, wanted in (
            ("fused values", fused, exact),
            ("values of logits", plain, exact),
            ("gradient of hidden states", x.grad, exact_x.grad),
            ("gradient of the head", w.grad, exact_w.grad),
        ):
            assert got is not None and wanted is not None
            findings.append(at_most(f"{dtype}: {what} from float64", relative(got.detach(), wanted.detach()), bound))
        exists = Head(w.detach(), vocabulary=v).logits(x.detach())
        findings.append(holds(f"{dtype}: logits are finite", bool(exists.isfinite().all())))
    return findings


def _naive(logits_TV: Tensor, ids_TK: Tensor, teacher_TB: Tensor) -> Tensor:
    """Jensen-Shannon divergence over the kept tokens and the tail, float64."""
    log_p = logits_TV.log_softmax(1)
    kept = log_p.gather(1, ids_TK)
    outside = torch.ones_like(log_p, dtype=torch.bool).scatter(1, ids_TK, False)
    tail = (log_p.exp() * outside).sum(1, keepdim=True)
    p, q = torch.cat([kept.exp(), tail], 1), teacher_TB.exp()
    m = (p + q) / 2
    return 0.5 * ((p * (p.log() - m.log())).sum(1) + (q * (q.log() - m.log())).sum(1))
