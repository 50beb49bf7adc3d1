"""Time and memory of SDPO's loss on the last layer, forward and backward, beside what one would write first.

    python tools/bench_divergence.py [--tokens 2048] [--vocabulary 151936] [--top-k 100] [--hidden 256]
                                     [--dtype float32] [--device cpu] [--chunks 1024 512] [--rounds 5]

Two tables. From logits: student logits [T, V] are there and get a gradient. From hidden states: they and the head are
there and get gradients, so each side multiplies by the head itself. Every side but (b) compares the K most probable
tokens and the tail by the Jensen-Shannon divergence with a teacher whose log-probs at these tokens are given; (b) knows
the teacher's logits, or makes them of its hidden states.

Memory is the peak beyond the inputs; from hidden states, the head's gradient, which every side makes, is not in it. It
is counted operation by operation on a CPU and read from the allocator on a GPU. Time is that of one thread on a CPU
(seconds that it ran, so that other processes matter less) and of the clock on a GPU. The median of several rounds is
printed; the order of the sides is another in each. Results belong in tools/BENCHMARKS.md.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from bench_machine import machine
from live_memory import peak_bytes
from torch import Tensor

from megatron_sdpo.divergence import divergence, student_support, support_log_probs
from megatron_sdpo.fused import Head, fused_divergence, fused_loss, scored

ALPHA = 0.5
Side = Callable[[], object]


def naive(logits_TV: Tensor, ids_TK: Tensor | None, teacher_TB: Tensor, k: int) -> Tensor:
    """(a): log-softmax, top-k unless the ids are known, gather; the rest is on K + 1 bins and small."""
    log_p_TV = F.log_softmax(logits_TV.float(), dim=1)
    if ids_TK is None:
        ids_TK = log_p_TV.detach().topk(k, dim=1).indices
    kept_TK = log_p_TV.gather(1, ids_TK)
    tail_T1 = torch.log1p(-kept_TK.exp().sum(dim=1, keepdim=True).clamp(max=1 - 1e-7))
    log_p_TB = torch.cat([kept_TK, tail_T1], dim=1)
    p_TB, q_TB = log_p_TB.exp(), teacher_TB.exp()
    log_m_TB = ((1 - ALPHA) * p_TB + ALPHA * q_TB).log()
    return ((1 - ALPHA) * p_TB * (log_p_TB - log_m_TB) + ALPHA * q_TB * (teacher_TB - log_m_TB)).sum(dim=1)


def whole_vocabulary(logits_TV: Tensor, teacher_TV: Tensor) -> Tensor:
    """(b): KL(teacher || student) over every token."""
    log_p_TV, log_q_TV = F.log_softmax(logits_TV.float(), dim=1), F.log_softmax(teacher_TV.float(), dim=1)
    return F.kl_div(log_p_TV, log_q_TV, reduction="none", log_target=True).sum(dim=1)


class Inputs:
    """Hidden states and heads such that the student's distributions are neither flat nor certain."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
        generator = torch.Generator(device).manual_seed(0)
        normal = partial(torch.randn, generator=generator, device=device)
        self.hidden_TH = normal(arguments.tokens, arguments.hidden).to(dtype).requires_grad_()
        scale = 3.0 / arguments.hidden**0.5
        self.head_VH = (scale * normal(arguments.vocabulary, arguments.hidden)).to(dtype).requires_grad_()
        self.teacher_TH = (self.hidden_TH.detach() + 0.3 * normal(arguments.tokens, arguments.hidden)).to(dtype)
        self.k = arguments.top_k
        head = Head(self.head_VH.detach(), chunk=256)
        (self.ids_TK,) = scored(self.hidden_TH, head, lambda logits_CV, _: (student_support(logits_CV, self.k),))
        (self.teacher_TB,) = scored(
            self.teacher_TH,
            head,
            lambda logits_CV, rows: (support_log_probs(logits_CV, self.ids_TK[rows], with_tail=True),),
        )
        self.head_gradient = self.head_VH.numel() * self.head_VH.element_size()


def backward(values_T: Tensor, *leaves: Tensor) -> None:
    """Gradients of the mean, made and dropped."""
    torch.autograd.grad(values_T.mean(), leaves)


def from_logits(inputs: Inputs) -> dict[str, Side]:
    with torch.no_grad():
        logits_TV = inputs.hidden_TH @ inputs.head_VH.t()
        teacher_TV = inputs.teacher_TH @ inputs.head_VH.t()
    logits_TV.requires_grad_()
    ids_TK, teacher_TB, k = inputs.ids_TK, inputs.teacher_TB, inputs.k
    return {
        "(a) log-softmax, top-k, gather": lambda: backward(naive(logits_TV, None, teacher_TB, k), logits_TV),
        "(a) without top-k": lambda: backward(naive(logits_TV, ids_TK, teacher_TB, k), logits_TV),
        "(b) KL over the vocabulary": lambda: backward(whole_vocabulary(logits_TV, teacher_TV), logits_TV),
        "divergence": lambda: backward(divergence(logits_TV, ids_TK, teacher_TB, ALPHA), logits_TV),
        "student_support": lambda: student_support(logits_TV, k),
    }


def from_hidden(inputs: Inputs, chunks: Sequence[int]) -> dict[str, Side]:
    hidden_TH, head_VH, ids_TK, teacher_TB = inputs.hidden_TH, inputs.head_VH, inputs.ids_TK, inputs.teacher_TB

    def of_whole(values: Callable[[Tensor], Tensor]) -> None:
        backward(values(hidden_TH @ head_VH.t()), hidden_TH, head_VH)

    @torch.no_grad()
    def products() -> tuple[Tensor, Tensor]:
        logits_TV = hidden_TH @ head_VH.t()
        return logits_TV @ head_VH, logits_TV.t() @ hidden_TH

    def kl_to_hidden(logits_TV: Tensor) -> Tensor:
        return whole_vocabulary(logits_TV, inputs.teacher_TH @ head_VH.detach().t())

    def of_each_token(chunk: int) -> None:
        backward(fused_divergence(hidden_TH, head_VH, ids_TK, teacher_TB, ALPHA, chunk=chunk), hidden_TH, head_VH)

    def of_the_sum(chunk: int) -> None:
        def loss_of(logits_CV: Tensor, rows: slice) -> tuple[Tensor, None]:
            values_C = divergence(logits_CV, ids_TK[rows], teacher_TB[rows], ALPHA, overwrite=True)  # as the trainer
            return values_C.sum() / len(hidden_TH), None

        loss, _ = fused_loss(hidden_TH, Head(head_VH, chunk=chunk), loss_of)
        torch.autograd.grad(loss, (hidden_TH, head_VH))

    return {
        "(a) log-softmax, top-k, gather": lambda: of_whole(lambda x_TV: naive(x_TV, None, teacher_TB, inputs.k)),
        "(b) KL over the vocabulary": lambda: of_whole(kl_to_hidden),
        "(c) the three products alone": products,
        "divergence of whole logits": lambda: of_whole(lambda x_TV: divergence(x_TV, ids_TK, teacher_TB, ALPHA)),
        **{f"fused_divergence, chunks of {chunk}": partial(of_each_token, chunk) for chunk in chunks},
        **{f"fused_loss, chunks of {chunk}": partial(of_the_sum, chunk) for chunk in chunks},
    }


def seconds(run: Side, device: torch.device) -> float:
    if device.type != "cuda":
        began = time.process_time()
        run()
        return time.process_time() - began
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    run()
    torch.cuda.synchronize(device)
    return time.perf_counter() - began


def measure(title: str, sides: Mapping[str, Side], rounds: int, device: torch.device, discount: int) -> None:
    """One table: seconds (median, lowest to highest), peak GB beyond inputs and ``discount``, ratios to the first."""
    memory = {name: (peak_bytes(run, device) - discount) / 1e9 for name, run in sides.items()}  # and warms up
    times: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    for round_ in range(rounds):
        turn = round_ % len(order)
        for name in order[turn:] + order[:turn]:
            times[name].append(seconds(sides[name], device))
    print(f"\n{title}; load {os.getloadavg()[0]:.0f}\n\n| | seconds | of (a) | GB | of (a) |\n|---|---|---|---|---|")
    first = order[0]
    for name in order:
        middle, base = statistics.median(times[name]), statistics.median(times[first])
        spread = f"{middle:.3f} ({min(times[name]):.3f} to {max(times[name]):.3f})"
        print(f"| {name} | {spread} | {middle / base:.2f} | {memory[name]:.3f} | {memory[name] / memory[first]:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--top-k", type=int, default=100)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--chunks", type=int, nargs="+", default=[1024, 512])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(arguments.device)
    inputs = Inputs(arguments)
    print(machine())
    print(", ".join(f"{name} {value}" for name, value in vars(arguments).items()))
    measure("From logits", from_logits(inputs), arguments.rounds, device, 0)
    sides = from_hidden(inputs, arguments.chunks)
    measure("From hidden states", sides, arguments.rounds, device, inputs.head_gradient)


if __name__ == "__main__":
    main()
