"""The head and what is computed of its logits, a chunk of tokens at a time: logits [T, V] are never whole.

A loss that is a sum over tokens is differentiated as soon as a chunk's logits are there: their gradient becomes
those of hidden states and head at once, and both are dropped before the next chunk. ``fused_loss`` so makes the
head's three matrix products and nothing twice; its backward pass only hands out what the forward pass found.
``fused_divergence`` gives a value per token, whose upstream gradient is not known before the backward pass: this
makes the logits again, a fourth product.

Alive at one time: the logits of one chunk, over which their gradient is written where the loss allows it, wide copies
of some rows (``vocabulary.BLOCK``), the gradient of the hidden states, and that of the head in fp32 unless it is added
to one that the caller has anyhow (``Head.main_grad_VH``).

Axes as in divergence.py; ``H`` hidden size, ``C`` the tokens of a chunk. The head's rows are this rank's share of
the vocabulary, the hidden states are whole on every rank of the group, and their gradient is summed over it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_sdpo.divergence import divergence
from megatron_sdpo.vocabulary import Reading, read

CHUNK = 1024
"""Tokens of a chunk where nobody says otherwise."""

SLICE = 1 << 25
"""Numbers of a product that are rounded to the head's dtype before they are added in fp32."""

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Head:
    """The last linear layer and how its logits are taken.

    Example: ``Head(weight_VH, temperature=0.7).logits(hidden_CH)`` are the logits of the sampling distribution.
    """

    weight_VH: Tensor
    """This rank's rows of the vocabulary."""
    temperature: float = 1.0
    group: dist.ProcessGroup | None = None
    """Ranks that share the vocabulary; None: it is whole."""
    chunk: int = CHUNK
    """Tokens whose logits are alive at one time, at least 1."""
    vocabulary: int | None = None
    """Entries that exist, over all ranks; rows beyond them only make the ranks' shares equal. None: all exist."""
    main_grad_VH: Tensor | None = None
    """Where ``fused_loss`` adds the weight's gradient in its forward pass, fp32 at least: autograd then has none for
    it. None: autograd hands it out."""

    def logits(self, hidden_CH: Tensor) -> Tensor:
        """``[C, V]``, multiplied in the weight's dtype, divided by the temperature; -inf where no entry exists."""
        logits_CV = hidden_CH.to(self.weight_VH.dtype) @ self.weight_VH.t()
        if self.temperature != 1.0:
            logits_CV.div_(self.temperature)
        if self.vocabulary is not None:
            first_id = 0 if self.group is None else dist.get_rank(self.group) * len(self.weight_VH)
            logits_CV[:, max(0, self.vocabulary - first_id) :] = -torch.inf
        return logits_CV

    def chunks(self, tokens: int) -> Iterator[slice]:
        """Rows of each chunk; an empty chunk when there are no tokens, which enters the same collectives."""
        for first in range(0, max(tokens, 1), self.chunk):
            yield slice(first, min(first + self.chunk, tokens))


@torch.no_grad()
def scored(
    hidden_TH: Tensor, head: Head, of_logits: Callable[[Tensor, slice], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """``of_logits(logits_CV, rows)`` of every chunk, its tensors (first axis: tokens) each joined over chunks."""
    found = [of_logits(head.logits(hidden_TH[rows]), rows) for rows in head.chunks(len(hidden_TH))]
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def fused_loss(
    hidden_TH: Tensor, head: Head, loss_of: Callable[[Tensor, slice], tuple[Tensor, R]]
) -> tuple[Tensor, list[R]]:
    """The sum over chunks of a loss of logits, with gradient to ``hidden_TH`` and the head; and each chunk's rest.

    ``loss_of(logits_CV, rows) -> (scalar, anything)`` must be additive over tokens and keep no logits; its backward
    pass may overwrite them. Autograd is on where it is called, and its collectives are done when the forward pass
    returns. T = 0 is one empty chunk, a zero with zero gradients. The backward pass may run once (``RuntimeError``
    after that): it scales the gradients that it hands out in place.

    With ``head.main_grad_VH`` the weight's gradient is there when the forward pass returns, as of a loss that is
    minimised as it stands: a backward pass with another upstream gradient than one is a ``RuntimeError``.
    """
    loss, rests, gradients = _differentiated(hidden_TH.detach(), head, loss_of)
    return _Known.apply(hidden_TH, head.weight_VH, loss, gradients, head), rests


def fused_divergence(
    hidden_TH: Tensor,
    head_VH: Tensor,
    ids_TK: Tensor,
    teacher_log_probs_TK: Tensor,
    alpha: float,
    tail: bool = True,
    group: dist.ProcessGroup | None = None,
    chunk: int = CHUNK,
    temperature: float = 1.0,
    advantage_bounds: tuple[float, float] | None = None,
    vocabulary: int | None = None,
) -> Tensor:
    """``divergence`` of the head's logits with gradient to ``hidden_TH`` and ``head_VH``; fp32 [T], in nats.

    Where the sum over tokens is all that is wanted, ``fused_loss`` is cheaper by a matrix product. The backward
    pass makes no collective but the sum of the hidden states' gradient. ``vocabulary`` as in ``Head``. Errors as
    ``divergence``.
    """
    if not len(hidden_TH) == len(ids_TK) == len(teacher_log_probs_TK):
        raise ValueError(
            f"shapes do not fit: hidden states {tuple(hidden_TH.shape)}, ids {tuple(ids_TK.shape)}, teacher log-probs"
            f" {tuple(teacher_log_probs_TK.shape)}; each needs a row for every token"
        )
    head = Head(head_VH, temperature, group, chunk, vocabulary)

    def values(logits_CV: Tensor, rows: slice, found: Reading) -> Tensor:
        teacher_CK = teacher_log_probs_TK[rows]
        return divergence(logits_CV, ids_TK[rows], teacher_CK, alpha, tail, group, advantage_bounds, found, True)

    return _FusedDivergence.apply(hidden_TH, head_VH, ids_TK, head, values)


@torch.no_grad()
def _differentiated(
    hidden_TH: Tensor, head: Head, loss_of: Callable[[Tensor, slice], tuple[Tensor, R]]
) -> tuple[Tensor, list[R], tuple[Tensor, Tensor | None]]:
    """Loss, rests, and the loss's gradients [T, H] and [V, H] (fp32 at least), not yet divided by the temperature; for
    the second None where it has been added, divided, to ``head.main_grad_VH``."""
    weight_VH, main_grad_VH = head.weight_VH.detach(), head.main_grad_VH
    grad_TH, scale = torch.empty_like(hidden_TH), 1.0 / head.temperature
    if main_grad_VH is None:
        own = torch.zeros_like(weight_VH, dtype=torch.promote_types(weight_VH.dtype, torch.float32))
        grad_VH, scale = own, 1.0
    else:
        own, grad_VH = None, main_grad_VH

    def add(rows: slice) -> tuple[Tensor, R]:
        loss, rest, grad_CV = _with_gradient(head.logits(hidden_TH[rows]), rows, loss_of)
        grad_TH[rows] = grad_CV @ weight_VH
        _add_product(grad_VH, grad_CV, hidden_TH[rows].to(weight_VH.dtype), scale)
        return loss, rest

    losses, rests = zip(*(add(rows) for rows in head.chunks(len(hidden_TH))), strict=True)
    return torch.stack(losses).sum(), list(rests), (grad_TH, own)


@torch.enable_grad()
def _with_gradient(
    logits_CV: Tensor, rows: slice, loss_of: Callable[[Tensor, slice], tuple[Tensor, R]]
) -> tuple[Tensor, R, Tensor]:
    leaf_CV = logits_CV.detach().requires_grad_()
    loss, rest = loss_of(leaf_CV, rows)
    (grad_CV,) = torch.autograd.grad(loss, leaf_CV)
    return loss.detach(), rest, grad_CV


def _add_product(total_VH: Tensor, grad_CV: Tensor, hidden_CH: Tensor, scale: float) -> None:
    """``total += scale * grad^T hidden``; a narrower dtype is rounded to once per chunk and added in fp32."""
    if total_VH.dtype == grad_CV.dtype:
        total_VH.addmm_(grad_CV.t(), hidden_CH, alpha=scale)
        return
    if grad_CV.is_cuda:  # one product that adds to what is there
        torch.addmm(total_VH, grad_CV.t(), hidden_CH, out_dtype=total_VH.dtype, alpha=scale, out=total_VH)  # pyright: ignore
        return
    entries = max(1, SLICE // hidden_CH.shape[1])  # the product of all entries would be a second gradient of the head
    for part_VH, part_CV in zip(total_VH.split(entries), grad_CV.split(entries, dim=1), strict=True):
        part_VH.add_(part_CV.t() @ hidden_CH, alpha=scale)


def _handed_out(
    gradients: tuple[Tensor, Tensor | None], upstream: Tensor, head: Head, hidden_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """The gradients in the parameters' dtypes, times upstream / temperature, [T, H] summed over the group.

    The head's is scaled in place; the other is new, so that it may be reduced in place.
    """
    grad_TH, grad_VH = gradients
    scale = upstream / head.temperature
    grad_TH = (grad_TH * scale).to(hidden_dtype)
    if head.group is not None:
        dist.all_reduce(grad_TH, group=head.group)
    return grad_TH, None if grad_VH is None else grad_VH.mul_(scale).to(head.weight_VH.dtype)


class _Known(torch.autograd.Function):
    """A scalar whose gradients in hidden states and head have been found already."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        loss: Tensor,
        gradients: tuple[Tensor, Tensor | None],
        head: Head,
    ) -> Tensor:
        ctx.gradients, ctx.head, ctx.dtype = gradients, head, hidden_TH.dtype
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        if ctx.gradients is None:
            raise RuntimeError(
                "fused_loss has handed out its gradients: a second backward pass needs a new forward pass"
            )
        if ctx.head.main_grad_VH is not None and (times := float(upstream)) != 1.0:
            raise RuntimeError(
                "the head's gradient has been added to main_grad_VH as of a loss that is minimised as it stands, not"
                f" times {times:g}; scale the loss within loss_of"
            )
        gradients, ctx.gradients = ctx.gradients, None
        return *_handed_out(gradients, upstream, ctx.head, ctx.dtype), None, None, None


class _FusedDivergence(torch.autograd.Function):
    """hidden [T, H], weight [V, H] -> ``values(logits, rows, reading)`` [T]; backward makes the logits again."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, ids_TK: Tensor, head: Head, values: Callable[..., Tensor]
    ) -> Tensor:
        def of_logits(logits_CV: Tensor, rows: slice) -> tuple[Tensor, ...]:
            found = read(logits_CV, ids_TK[rows], head.group)
            return values(logits_CV, rows, found), found.log_probs_TB, found.tail_T

        values_T, *found = scored(hidden_TH, head, of_logits)
        ctx.save_for_backward(hidden_TH, weight_VH, *found)
        ctx.head, ctx.values = head, values
        return values_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_T: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        hidden_TH, _, log_probs_TB, tail_T = ctx.saved_tensors

        def loss_of(logits_CV: Tensor, rows: slice) -> tuple[Tensor, None]:
            values_C = ctx.values(logits_CV, rows, Reading(log_probs_TB[rows], tail_T[rows]))
            return (upstream_T[rows] * values_C).sum(), None

        loss, _, gradients = _differentiated(hidden_TH, ctx.head, loss_of)
        return *_handed_out(gradients, torch.ones_like(loss), ctx.head, hidden_TH.dtype), None, None, None
