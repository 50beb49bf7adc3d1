"""The divergence that SDPO minimises, on logits whose vocabulary may be cut over a process group.

At every response position the student's vocabulary is folded into bins: the K most probable tokens,
one bin each, and one *tail* bin for all other tokens. Student ``p`` and teacher ``q`` are compared on
these K + 1 bins:

    alpha = 0      KL(q || p)                                    mass-covering
    alpha = 1      KL(p || q)                                    mode-seeking
    between        (1 - alpha) KL(p || m) + alpha KL(q || m),    m = (1 - alpha) p + alpha q

The endpoints are cases of their own: the mixture formula vanishes there.

The gradient in the logit ``z_j`` of a token in bin ``b`` is, with ``p_j`` its own probability,

    dl/dz_j = p_j (c_b - sum_b' p_b' c_b')
    c_b = -q_b / p_b  (alpha 0),   log(p_b / q_b)  (alpha 1),   (1 - alpha) log(p_b / m_b)  (between)

It is made in two steps, each with a closed form and none with a collective: ``_BinDivergence`` gives
``p_b c_b``, the gradient in the log-probability of a bin, and ``BinLogProbs`` carries any such gradient
to the logits. ``BinLogProbs`` is the only differentiable code that knows of the shards.

Axes, dtypes and process groups as in vocabulary.py, whose functions ``student_support`` and ``support_log_probs`` make
what is compared here. Results are equal on all ranks of the group.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_sdpo.vocabulary import (
    LOG_FLOOR,
    BinLogProbs,
    Reading,
    all_reduce,
    entropy,
    read,
    row_blocks,
    sampled_log_probs,
    student_support,
    support_log_probs,
    widen,
)

__all__ = [
    "LOG_FLOOR",
    "TAIL_FLOOR",
    "divergence",
    "entropy",
    "full_divergence",
    "read",
    "sampled_log_probs",
    "student_support",
    "support_log_probs",
]

TAIL_FLOOR = 1e-7
"""The least tail mass that K fp32 log-probs can tell from none."""


def divergence(
    logits_TV: Tensor,
    ids_TK: Tensor,
    teacher_log_probs_TK: Tensor,
    alpha: float,
    tail: bool = True,
    group: dist.ProcessGroup | None = None,
    advantage_bounds: tuple[float, float] | None = None,
    reading: Reading | None = None,
    overwrite: bool = False,
) -> Tensor:
    """Divergence of student and teacher at each token, with gradient to ``logits_TV`` only; fp32 [T], in nats.

    ``teacher_log_probs_TK`` are the teacher's log-probs at ``ids_TK``, from ``support_log_probs``; with K + 1
    columns the last is its tail. With K columns the tail is the rest to one, at least ``TAIL_FLOOR``.
    ``tail=False`` drops the tail and renormalises the K kept tokens on both sides. ``advantage_bounds``, for
    alpha 1 only, clamp the advantages log(q_b / p_b) in the gradient and leave the values. ``reading``, of
    the same logits at ``ids_TK``, spares the forward pass its walk and its collectives. ``overwrite`` makes the
    gradient in the logits' own memory (``BinLogProbs``). ``ValueError`` for an alpha outside [0, 1], bounds with
    another alpha than 1, or shapes that do not fit.
    """
    _check_alpha(alpha, advantage_bounds)
    tokens, k = ids_TK.shape
    if logits_TV.shape[0] != tokens or teacher_log_probs_TK.shape not in {(tokens, k), (tokens, k + 1)}:
        raise ValueError(
            f"shapes do not fit: logits {tuple(logits_TV.shape)}, ids {tuple(ids_TK.shape)}, teacher log-probs"
            f" {tuple(teacher_log_probs_TK.shape)}; the teacher needs {k} or {k + 1} columns"
        )
    log_p_TB = BinLogProbs.apply(logits_TV, ids_TK, group, reading, overwrite)
    log_q_TB = teacher_log_probs_TK.detach().to(log_p_TB.dtype)
    if not tail:
        log_p_TB, log_q_TB = (x_TB[:, :k].log_softmax(dim=1) for x_TB in (log_p_TB, log_q_TB))
    elif log_q_TB.shape[1] == k:
        log_q_TB = torch.cat([log_q_TB, _rest_to_one(log_q_TB, log_p_TB[:, -1].detach())[:, None]], dim=1)
    return _BinDivergence.apply(log_p_TB, log_q_TB, alpha, advantage_bounds)


def full_divergence(
    logits_TV: Tensor,
    teacher_logits_TV: Tensor,
    alpha: float,
    group: dist.ProcessGroup | None = None,
    advantage_bounds: tuple[float, float] | None = None,
    overwrite: bool = False,
) -> Tensor:
    """``divergence`` with one bin for every token of the vocabulary, from the logits of both; fp32 [T], in nats.

    Both are kept for the backward pass, which makes no collective. ``ValueError`` as ``divergence``.
    """
    _check_alpha(alpha, advantage_bounds)
    if logits_TV.shape != teacher_logits_TV.shape:
        raise ValueError(
            f"shapes do not fit: logits {tuple(logits_TV.shape)}, teacher's {tuple(teacher_logits_TV.shape)}"
        )
    return _FullDivergence.apply(logits_TV, teacher_logits_TV.detach(), alpha, group, advantage_bounds, overwrite)


# ------------------------------------------------------------------------------- divergence over bins


class _BinDivergence(torch.autograd.Function):
    """log p [T, B], log q [T, B] -> divergence [T]; gradient to log p only."""

    @staticmethod
    def forward(
        ctx: Any, log_p_TB: Tensor, log_q_TB: Tensor, alpha: float, advantage_bounds: tuple[float, float] | None
    ) -> Tensor:
        values_T, slope_TB = _value_and_slope(log_p_TB, log_q_TB, alpha, advantage_bounds)
        ctx.save_for_backward(slope_TB)
        return values_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None, None, None]:
        (slope_TB,) = ctx.saved_tensors
        return grad_T[:, None] * slope_TB, None, None, None


def _value_and_slope(
    log_p_TB: Tensor, log_q_TB: Tensor, alpha: float, advantage_bounds: tuple[float, float] | None = None
) -> tuple[Tensor, Tensor]:
    """Divergence [T] and ``p_b c_b`` [T, B], up to a multiple of ``p_b``, which the softmax ignores.

    Each KL is summed as p log(p/q) + q - p, which is the same because p and q both sum to one. No term is
    negative, so small divergences are not lost in the rounding of large terms of both signs. When p and q
    are equal, value and slope are exactly zero.
    """
    log_p_TB, log_q_TB = log_p_TB.clamp(min=LOG_FLOOR), log_q_TB.clamp(min=LOG_FLOOR)
    p_TB, q_TB = log_p_TB.exp(), log_q_TB.exp()
    log_ratio_TB = log_q_TB - log_p_TB
    teacher_higher_TB = log_ratio_TB > 0
    shrink_TB = torch.expm1(-log_ratio_TB.abs())  # the smaller of p and q over the larger, minus one
    if alpha in (0.0, 1.0):
        q_minus_p_TB = torch.where(teacher_higher_TB, -q_TB, p_TB) * shrink_TB
        if alpha == 0.0:
            return (q_TB * log_ratio_TB - q_minus_p_TB).sum(dim=1), -q_minus_p_TB
        advantage_TB = log_ratio_TB if advantage_bounds is None else log_ratio_TB.clamp(*advantage_bounds)
        return (q_minus_p_TB - p_TB * log_ratio_TB).sum(dim=1), -p_TB * advantage_TB
    # The shares that the smaller and the larger of p and q have in m.
    smaller_TB = torch.full_like(log_p_TB, alpha).masked_fill_(teacher_higher_TB, 1.0 - alpha)
    larger_TB = torch.full_like(log_p_TB, 1.0 - alpha).masked_fill_(teacher_higher_TB, alpha)
    log_m_over_larger_TB = torch.where(
        shrink_TB > -0.5,
        torch.log1p(smaller_TB * shrink_TB),  # accurate where p and q are close
        torch.log(larger_TB + smaller_TB * (-log_ratio_TB.abs()).exp()),  # and where they are far apart
    ).clamp(min=LOG_FLOOR)
    log_m_over_p_TB = log_m_over_larger_TB + log_ratio_TB.clamp(min=0.0)
    log_m_over_q_TB = log_m_over_larger_TB - log_ratio_TB.clamp(max=0.0)
    slope_TB = -(1.0 - alpha) * p_TB * log_m_over_p_TB
    return (slope_TB - alpha * q_TB * log_m_over_q_TB).sum(dim=1), slope_TB


def _check_alpha(alpha: float, advantage_bounds: tuple[float, float] | None) -> None:
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is {alpha}; it must lie between 0 and 1")
    if advantage_bounds is not None and alpha != 1.0:
        raise ValueError(f"alpha is {alpha}; advantages have bounds for alpha 1 only")


def _rest_to_one(log_q_TK: Tensor, log_p_tail_T: Tensor) -> Tensor:
    """Log of the mass that K log-probs leave, [T]; nothing where the student has no tail either."""
    kept_T = log_q_TK.double().logsumexp(dim=1).clamp(max=-TAIL_FLOOR)
    return torch.log(-torch.expm1(kept_T)).to(log_q_TK.dtype).masked_fill(log_p_tail_T == -torch.inf, -torch.inf)


class _FullDivergence(torch.autograd.Function):
    """logits [T, V], teacher's logits [T, V] -> divergence [T]; gradient to the former only."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_TV: Tensor,
        teacher_TV: Tensor,
        alpha: float,
        group: dist.ProcessGroup | None,
        advantage_bounds: tuple[float, float] | None,
        overwrite: bool,
    ) -> Tensor:
        norms_T2 = torch.stack([_log_norm(logits_TV, group), _log_norm(teacher_TV, group)], dim=1)
        ctx.form, ctx.overwrite = (alpha, advantage_bounds), overwrite
        sums = []
        for rows_TV, rows_UV, rows_T2 in row_blocks(logits_TV, teacher_TV, norms_T2):
            values_T, slope_TV = _full_value_and_slope(rows_TV, rows_UV, rows_T2, *ctx.form)
            sums.append(torch.stack([values_T, slope_TV.sum(dim=1)], dim=1))
        sums_T2 = all_reduce(torch.cat(sums), dist.ReduceOp.SUM, group)
        ctx.save_for_backward(logits_TV, teacher_TV, norms_T2, sums_T2)
        return sums_T2[:, 0].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        """Softmax's gradient: the slope less ``p_j`` times its sum over the vocabulary, known from the forward pass."""
        logits_TV, teacher_TV, norms_T2, sums_T2 = ctx.saved_tensors
        grad_TV = logits_TV.detach() if ctx.overwrite else torch.empty_like(logits_TV)
        blocks = row_blocks(grad_TV, logits_TV, teacher_TV, norms_T2, sums_T2[:, 1:], grad_T[:, None])
        for out_TV, rows_TV, rows_UV, rows_T2, slopes_T1, grad_T1 in blocks:
            _, slope_TV = _full_value_and_slope(rows_TV, rows_UV, rows_T2, *ctx.form)
            p_TV = (widen(rows_TV) - rows_T2[:, :1]).exp_()
            out_TV.copy_(slope_TV.sub_(p_TV.mul_(slopes_T1)).mul_(grad_T1))
        return grad_TV, None, None, None, None, None


def _full_value_and_slope(
    logits_TV: Tensor,
    teacher_TV: Tensor,
    norms_T2: Tensor,
    alpha: float,
    advantage_bounds: tuple[float, float] | None,
) -> tuple[Tensor, Tensor]:
    """This shard's part of the divergence [T], and its slope [T, V]."""
    log_p_TV, log_q_TV = widen(logits_TV) - norms_T2[:, :1], widen(teacher_TV) - norms_T2[:, 1:]
    return _value_and_slope(log_p_TV, log_q_TV, alpha, advantage_bounds)


def _log_norm(logits_TV: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Log-sum-exp of each row over the whole vocabulary, [T]."""
    top_T1 = all_reduce(widen(logits_TV.amax(dim=1, keepdim=True)), dist.ReduceOp.MAX, group)
    blocks = row_blocks(logits_TV, top_T1)
    mass_T = torch.cat([(widen(rows_TV) - rows_T1).exp_().sum(dim=1) for rows_TV, rows_T1 in blocks])
    return all_reduce(mass_T, dist.ReduceOp.SUM, group).log() + top_T1[:, 0]
