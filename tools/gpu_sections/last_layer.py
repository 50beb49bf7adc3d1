"""The loss on the last layer from hidden states: its time beside the head's products, its memory both ways."""

from dataclasses import dataclass
from functools import cached_property

import torch
from bench_divergence import naive
from live_memory import peak_bytes
from torch import Tensor

from gpu_sections.common import DEVICE, Finding, at_most
from gpu_sections.kernels import launches, longest
from gpu_sections.speed import seconds
from megatron_sdpo.divergence import divergence
from megatron_sdpo.fused import Head, fused_loss
from megatron_sdpo.vocabulary import student_support, support_log_probs

CHUNKS = (1024, 2048, 4096)


@dataclass
class LastLayer:
    """``t`` tokens, width ``h``, ``v`` entries, a support of ``k``, in bf16."""

    t: int = 4096
    h: int = 4096
    v: int = 151_936
    k: int = 20

    def __post_init__(self) -> None:
        self.hidden_TH = torch.randn(self.t, self.h, device=DEVICE).bfloat16().requires_grad_()
        self.weight_VH = torch.empty(self.v, self.h, device=DEVICE, dtype=torch.bfloat16)
        self.weight_VH.normal_(std=3 / self.h**0.5).requires_grad_()
        logits_TV = self.logits()
        self.ids_TK = student_support(logits_TV, self.k)
        near_TB = support_log_probs(logits_TV, self.ids_TK, with_tail=True)
        self.teacher_TB = near_TB - 0.1 * torch.rand(self.t, self.k + 1, device=DEVICE)

    @torch.no_grad()
    def logits(self) -> Tensor:
        return self.hidden_TH @ self.weight_VH.t()

    @cached_property
    def main_grad_VH(self) -> Tensor:
        """As the trainer has it for each of its weights."""
        return torch.zeros(self.v, self.h, device=DEVICE)

    def unfused(self) -> None:
        """Logits, log-softmax and what follows, whole."""
        values_T = naive(self.hidden_TH @ self.weight_VH.t(), None, self.teacher_TB, self.k)
        torch.autograd.grad(values_T.mean(), (self.hidden_TH, self.weight_VH))

    def fused(self, chunk: int, main_grad_VH: Tensor | None = None) -> None:
        def loss_of(logits_CV: Tensor, rows: slice) -> tuple[Tensor, None]:
            values_C = divergence(logits_CV, self.ids_TK[rows], self.teacher_TB[rows], 0.5, overwrite=True)
            return values_C.sum() / self.t, None

        head = Head(self.weight_VH, chunk=chunk, main_grad_VH=main_grad_VH)
        loss, _ = fused_loss(self.hidden_TH, head, loss_of)
        torch.autograd.grad(loss, (self.hidden_TH, self.weight_VH), allow_unused=True)


def head() -> list[Finding]:
    """Time and memory of the fused loss, beside the head's three products and beside the unfused loss."""
    layer = LastLayer()
    walk, products, read = _parts(layer)
    findings = [Finding("support_log_probs: ms, TB/s", f"{1e3 * walk:.2f}, {read / walk / 1e12:.2f}")]
    findings += memory_of(layer)
    for chunk in CHUNKS:
        for words, buffer in (("", None), (", into main_grad", layer.main_grad_VH)):
            taken = seconds(lambda chunk=chunk, buffer=buffer: layer.fused(chunk, buffer))
            what = f"fused loss, chunks of {chunk}{words}"
            findings.append(at_most(f"{what}: of the products' time", taken / products, 1.3))
            findings.append(Finding(f"{what}: ms", 1e3 * taken))
    return findings


def _parts(layer: LastLayer) -> tuple[float, float, int]:
    """Seconds of one walk over the logits and of the head's three products, and the logits' bytes."""
    logits_TV, hidden_TH, weight_VH = layer.logits(), layer.hidden_TH.detach(), layer.weight_VH.detach()
    walk = seconds(lambda: support_log_probs(logits_TV, layer.ids_TK))
    products = seconds(lambda: (hidden_TH @ weight_VH.t(), logits_TV @ weight_VH, logits_TV.t() @ hidden_TH))
    return walk, products, logits_TV.nbytes


def memory_of(layer: LastLayer) -> list[Finding]:
    """Peaks beyond the inputs. In training the head's gradient is added to a buffer that is there anyhow."""
    gib, buffer = 2**30, layer.main_grad_VH
    layer.fused(CHUNKS[0], buffer)  # workspaces of the products are there from now on
    unfused = peak_bytes(layer.unfused, DEVICE)
    findings = [Finding("unfused loss: GiB beyond the inputs", unfused / gib)]
    for chunk in CHUNKS:
        own, added = (
            peak_bytes(lambda chunk=chunk, held=held: layer.fused(chunk, held), DEVICE) for held in (None, buffer)
        )
        what = f"fused loss, chunks of {chunk}"
        findings.append(Finding(f"{what}: GiB, of the unfused", f"{own / gib:.2f}, {own / unfused:.3f}"))
        share = added / unfused
        bounded = at_most if chunk == CHUNKS[0] else lambda what, found, _: Finding(what, found)
        findings.append(bounded(f"{what}, into main_grad: memory of the unfused", share, 0.15))
        findings.append(Finding(f"{what}, into main_grad: GiB", added / gib))
    return findings


def support() -> list[Finding]:
    """``student_support`` of 4,096 tokens: time, beside one reading of the logits, and memory."""
    layer = LastLayer()
    logits_TV = layer.logits()
    once = seconds(lambda: logits_TV.clone()) / 2
    taken = seconds(lambda: student_support(logits_TV, layer.k))
    memory = peak_bytes(lambda: student_support(logits_TV, layer.k), DEVICE)
    kernels = [
        Finding(f"  {what}", shown) for what, shown in longest(launches(lambda: student_support(logits_TV, layer.k)))
    ]
    wanted_TK = logits_TV[:64].float().sort(dim=1, descending=True, stable=True).indices[:, : layer.k]
    same = (student_support(logits_TV[:64], layer.k) == wanted_TK).double().mean().item()
    return [
        Finding(
            "student_support of 4,096 tokens: ms, of one reading of the logits",
            f"{1e3 * taken:.2f}, {taken / once:.1f}",
        ),
        Finding("student_support of 4,096 tokens: GiB", memory / 2**30),
        *kernels[:8],
        Finding("student_support: share of ids that a stable sort gives", same, "== 1", same == 1.0),
    ]
