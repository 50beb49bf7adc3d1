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
``p_b c_b``, the gradient in the log-probability of a bin, and ``_BinLogProbs`` carries any such gradient
to the logits. ``_BinLogProbs`` is the only differentiable code that knows of the shards.

Conventions. Tensors end in their axes: ``T`` tokens, ``V`` vocabulary *of this rank*, ``K`` kept tokens,
``B`` bins. Rank r of ``group`` holds the ids r * V ... (r + 1) * V - 1, all ranks equally many; with
``group=None`` the vocabulary is whole. Ids are global, unique in a row and inside the vocabulary. Logits
are those of the sampling distribution (already divided by the temperature) in any float dtype; -inf marks
a column that does not exist. Arithmetic is fp32 (float64 for float64 logits) and logs are natural. Results
are equal on all ranks of the group, so a loss made of them must not be summed over that group again.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = {"cpu": 1 << 20, "cuda": 1 << 24}
"""Logits, in whole rows, whose wide copies are alive at one time: 20 bytes of each, 80 in ``full_divergence``.

So many that a GPU is busy; so few that a CPU keeps them in its caches.
"""

LOG_FLOOR = -1e4
"""A bin without any mass counts as e^-10000, so that every difference of logs is finite."""

TAIL_FLOOR = 1e-7
"""The least tail mass that K fp32 log-probs can tell from none."""

_LOW_32 = 0xFFFFFFFF


# ---------------------------------------------------------------------------------------------- public


@torch.no_grad()
def student_support(logits_TV: Tensor, k: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """Ids of the k largest logits of each row over the whole vocabulary, largest first; int64 [T, k].

    Exact: of equal logits (compared in fp32) the lower id comes first, whatever the device or the number
    of shards. ``ValueError`` when k is below 1 or above the vocabulary.
    """
    shard = logits_TV.shape[1]
    vocabulary = shard * (1 if group is None else dist.get_world_size(group))
    if not 1 <= k <= vocabulary:
        raise ValueError(f"k is {k}; it must lie between 1 and the {vocabulary} entries of the vocabulary")
    ids_V = torch.arange(shard, device=logits_TV.device) + _first_id(shard, group)
    blocks = _row_blocks(logits_TV)
    keys_TK = torch.cat([_keys(rows_TV, ids_V).topk(min(k, shard)).values for (rows_TV,) in blocks])
    if group is not None:
        keys_TK = _all_gather_columns(keys_TK, group).topk(k).values
    return _LOW_32 - (keys_TK & _LOW_32)


@torch.no_grad()
def support_log_probs(
    logits_TV: Tensor, ids_TK: Tensor, group: dist.ProcessGroup | None = None, *, with_tail: bool = False
) -> Tensor:
    """Log-probabilities of ``ids_TK`` under the whole vocabulary; fp32 [T, K], no gradient.

    ``with_tail`` appends the log-mass of all other tokens as column K + 1. It is summed over those tokens
    and not taken as the rest to one, so that it is right however small it is.
    """
    log_probs_TB, _ = bin_log_probs(logits_TV, ids_TK, group)
    return log_probs_TB if with_tail else log_probs_TB[:, :-1].contiguous()


def sampled_log_probs(logits_TV: Tensor, ids_T: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Log-probability of one token a row, with gradient to ``logits_TV``; fp32 [T]."""
    return _BinLogProbs.apply(logits_TV, ids_T[:, None], group, None)[:, 0]


def divergence(
    logits_TV: Tensor,
    ids_TK: Tensor,
    teacher_log_probs_TK: Tensor,
    alpha: float,
    tail: bool = True,
    group: dist.ProcessGroup | None = None,
    advantage_bounds: tuple[float, float] | None = None,
    bins: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Divergence of student and teacher at each token, with gradient to ``logits_TV`` only; fp32 [T], in nats.

    ``teacher_log_probs_TK`` are the teacher's log-probs at ``ids_TK``, from ``support_log_probs``; with K + 1
    columns the last is its tail. With K columns the tail is the rest to one, at least ``TAIL_FLOOR``.
    ``tail=False`` drops the tail and renormalises the K kept tokens on both sides. ``advantage_bounds``, for
    alpha 1 only, clamp the advantages log(q_b / p_b) in the gradient and leave the values. ``bins``, kept of an
    earlier pass over the same logits (``bin_log_probs``), spare the forward pass its collectives. ``ValueError``
    for an alpha outside [0, 1], bounds with another alpha than 1, or shapes that do not fit.
    """
    _check_alpha(alpha, advantage_bounds)
    tokens, k = ids_TK.shape
    if logits_TV.shape[0] != tokens or teacher_log_probs_TK.shape not in {(tokens, k), (tokens, k + 1)}:
        raise ValueError(
            f"shapes do not fit: logits {tuple(logits_TV.shape)}, ids {tuple(ids_TK.shape)}, teacher log-probs"
            f" {tuple(teacher_log_probs_TK.shape)}; the teacher needs {k} or {k + 1} columns"
        )
    log_p_TB = _BinLogProbs.apply(logits_TV, ids_TK, group, bins)
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
) -> Tensor:
    """``divergence`` with one bin for every token of the vocabulary, from the logits of both; fp32 [T], in nats.

    Both are kept for the backward pass, which makes no collective. ``ValueError`` as ``divergence``.
    """
    _check_alpha(alpha, advantage_bounds)
    if logits_TV.shape != teacher_logits_TV.shape:
        raise ValueError(
            f"shapes do not fit: logits {tuple(logits_TV.shape)}, teacher's {tuple(teacher_logits_TV.shape)}"
        )
    return _FullDivergence.apply(logits_TV, teacher_logits_TV.detach(), alpha, group, advantage_bounds)


@torch.no_grad()
def entropy(logits_TV: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Entropy of each row in nats; fp32 [T], no gradient."""
    top_T1 = _all_reduce(_widen(logits_TV.amax(dim=1, keepdim=True)), dist.ReduceOp.MAX, group)
    sums = []
    for rows_TV, rows_T1 in _row_blocks(logits_TV, top_T1):
        below_TV = (_widen(rows_TV) - rows_T1).clamp_(min=LOG_FLOOR)  # finite, so that 0 * log 0 is 0
        mass_TV = below_TV.exp()
        sums.append(torch.stack([mass_TV.sum(dim=1), below_TV.mul_(mass_TV).sum(dim=1)], dim=1))
    mass_T, moment_T = _all_reduce(torch.cat(sums), dist.ReduceOp.SUM, group).unbind(dim=1)
    return mass_T.log() - moment_T / mass_T


# ------------------------------------------------------------------------- logits -> log-probs of bins


class _BinLogProbs(torch.autograd.Function):
    """logits [T, V], ids [T, K] -> log-probs of the K tokens and of the tail, [T, K + 1]."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_TV: Tensor,
        ids_TK: Tensor,
        group: dist.ProcessGroup | None,
        bins: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        ctx.first_id = _first_id(logits_TV.shape[1], group)
        log_probs_TB, tail_T = bin_log_probs(logits_TV, ids_TK, group) if bins is None else bins
        ctx.save_for_backward(logits_TV, ids_TK, log_probs_TB, tail_T)
        return log_probs_TB.clone()  # bins of the caller must not become an output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TB: Tensor) -> tuple[Tensor, None, None, None]:
        """Softmax's gradient on the bins; the tail's share goes to its tokens in proportion to their mass."""
        logits_TV, ids_TK, log_probs_TB, tail_T = ctx.saved_tensors
        share_TB = grad_TB - log_probs_TB.exp() * grad_TB.sum(dim=1, keepdim=True)
        tail_T1 = torch.where(tail_T.isinf(), 0.0, tail_T)[:, None]  # an empty tail: exp(-inf - 0) is 0
        grad_TV = torch.empty_like(logits_TV)
        # A wide gradient is made where it stays.
        scratch_CV = None if grad_TV.dtype == share_TB.dtype else _scratch(logits_TV)
        blocks = _row_blocks(grad_TV, logits_TV, ids_TK, tail_T1, share_TB)
        for out_TV, rows_TV, rows_TK, rows_T1, rows_TB in blocks:
            local_TK, owned_TK = _locate(rows_TK, rows_TV.shape[1], ctx.first_id)
            wide_TV = out_TV if scratch_CV is None else scratch_CV[: len(out_TV)]
            torch.sub(rows_TV, rows_T1, out=wide_TV)
            torch.mul(_without(wide_TV, local_TK, owned_TK).exp_(), rows_TB[:, -1:], out=out_TV)
            out_TV.scatter_add_(1, local_TK, rows_TB[:, :-1].masked_fill(~owned_TK, 0.0).to(out_TV.dtype))
        return grad_TV, None, None, None


@torch.no_grad()
def bin_log_probs(logits_TV: Tensor, ids_TK: Tensor, group: dist.ProcessGroup | None = None) -> tuple[Tensor, Tensor]:
    """Log-probs of the bins [T, K + 1], and the log-sum-exp of the logits outside ``ids_TK`` [T]; no gradient.

    One MAX and one SUM all-reduce, of T and T * (K + 1) numbers.
    """
    first_id = _first_id(logits_TV.shape[1], group)
    tails, kept, scratch_CV = [], [], _scratch(logits_TV)
    for rows_TV, rows_TK in _row_blocks(logits_TV, ids_TK):
        local_TK, owned_TK = _locate(rows_TK, rows_TV.shape[1], first_id)
        wide_TV = _without(scratch_CV[: len(rows_TV)].copy_(rows_TV), local_TK, owned_TK)
        top_T1 = wide_TV.amax(dim=1, keepdim=True)
        top_T1 = torch.where(top_T1.isinf(), 0.0, top_T1)
        tails.append(wide_TV.sub_(top_T1).exp_().sum(dim=1).log() + top_T1[:, 0])
        kept.append(_widen(rows_TV.gather(1, local_TK)).masked_fill(~owned_TK, 0.0))
    tail_T, kept_TK = torch.cat(tails), torch.cat(kept)
    top_T = _all_reduce(tail_T, dist.ReduceOp.MAX, group)
    top_T = torch.where(top_T.isinf(), 0.0, top_T)  # an empty tail: exp(-inf - 0) is 0
    packed_TB = torch.cat([kept_TK, (tail_T - top_T).exp()[:, None]], dim=1)
    packed_TB = _all_reduce(packed_TB, dist.ReduceOp.SUM, group)
    tail_T = packed_TB[:, -1].log() + top_T
    return torch.cat([packed_TB[:, :-1], tail_T[:, None]], dim=1).log_softmax(dim=1), tail_T


def _without(wide_TV: Tensor, local_TK: Tensor, owned_TK: Tensor) -> Tensor:
    """The tail: writes -inf at the owned ids."""
    # Added, not assigned: an id of another shard then adds zero wherever it was clamped to.
    mask_TK = torch.zeros_like(local_TK, dtype=wide_TV.dtype).masked_fill(owned_TK, -torch.inf)
    return wide_TV.scatter_add_(1, local_TK, mask_TK)


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
    ) -> Tensor:
        norms_T2 = torch.stack([_log_norm(logits_TV, group), _log_norm(teacher_TV, group)], dim=1)
        ctx.form = alpha, advantage_bounds
        sums = []
        for rows_TV, rows_UV, rows_T2 in _row_blocks(logits_TV, teacher_TV, norms_T2):
            values_T, slope_TV = _full_value_and_slope(rows_TV, rows_UV, rows_T2, *ctx.form)
            sums.append(torch.stack([values_T, slope_TV.sum(dim=1)], dim=1))
        sums_T2 = _all_reduce(torch.cat(sums), dist.ReduceOp.SUM, group)
        ctx.save_for_backward(logits_TV, teacher_TV, norms_T2, sums_T2)
        return sums_T2[:, 0].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Softmax's gradient: the slope less ``p_j`` times its sum over the vocabulary, known from the forward pass."""
        logits_TV, teacher_TV, norms_T2, sums_T2 = ctx.saved_tensors
        grad_TV = torch.empty_like(logits_TV)
        blocks = _row_blocks(grad_TV, logits_TV, teacher_TV, norms_T2, sums_T2[:, 1:], grad_T[:, None])
        for out_TV, rows_TV, rows_UV, rows_T2, slopes_T1, grad_T1 in blocks:
            _, slope_TV = _full_value_and_slope(rows_TV, rows_UV, rows_T2, *ctx.form)
            p_TV = (_widen(rows_TV) - rows_T2[:, :1]).exp_()
            out_TV.copy_(slope_TV.sub_(p_TV.mul_(slopes_T1)).mul_(grad_T1))
        return grad_TV, None, None, None, None


def _full_value_and_slope(
    logits_TV: Tensor,
    teacher_TV: Tensor,
    norms_T2: Tensor,
    alpha: float,
    advantage_bounds: tuple[float, float] | None,
) -> tuple[Tensor, Tensor]:
    """This shard's part of the divergence [T], and its slope [T, V]."""
    log_p_TV, log_q_TV = _widen(logits_TV) - norms_T2[:, :1], _widen(teacher_TV) - norms_T2[:, 1:]
    return _value_and_slope(log_p_TV, log_q_TV, alpha, advantage_bounds)


def _log_norm(logits_TV: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Log-sum-exp of each row over the whole vocabulary, [T]."""
    top_T1 = _all_reduce(_widen(logits_TV.amax(dim=1, keepdim=True)), dist.ReduceOp.MAX, group)
    blocks = _row_blocks(logits_TV, top_T1)
    mass_T = torch.cat([(_widen(rows_TV) - rows_T1).exp_().sum(dim=1) for rows_TV, rows_T1 in blocks])
    return _all_reduce(mass_T, dist.ReduceOp.SUM, group).log() + top_T1[:, 0]


# ------------------------------------------------------------------------------------ shards and rows


def _first_id(shard: int, group: dist.ProcessGroup | None) -> int:
    """Global id of this rank's first column."""
    return 0 if group is None else dist.get_rank(group) * shard


def _locate(ids_TK: Tensor, shard: int, first_id: int) -> tuple[Tensor, Tensor]:
    """Columns of global ids in this shard, clamped into it, and whether the shard owns them."""
    local_TK = ids_TK - first_id
    return local_TK.clamp(0, shard - 1), (local_TK >= 0) & (local_TK < shard)


def _keys(logits_TV: Tensor, ids_V: Tensor) -> Tensor:
    """int64 keys, all different, that sort like (logit, lower id): fp32 bits above, the inverted id below.

    Different keys have one order, so a top-k over them has one answer.
    """
    bits_TV = (logits_TV.float() + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0: equal numbers, equal bits
    # Bits of negative floats grow with the magnitude: flip them, sign apart.
    bits_TV = torch.where(bits_TV < 0, bits_TV ^ 0x7FFFFFFF, bits_TV)
    return bits_TV.long().bitwise_left_shift_(32).add_(_LOW_32 - ids_V)


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rows(logits_TV: Tensor) -> int:
    """Rows of a block."""
    return max(1, BLOCK["cpu" if logits_TV.is_cpu else "cuda"] // max(1, logits_TV.shape[1]))


def _scratch(logits_TV: Tensor) -> Tensor:
    """Room for the wide copy of one block, to be used again for the next."""
    dtype = torch.promote_types(logits_TV.dtype, torch.float32)
    return torch.empty_like(logits_TV[: _rows(logits_TV)], dtype=dtype)


def _row_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each tensor, the first of which is logits; one empty block when there are none."""
    rows = _rows(tensors[0])
    return zip(*(x.detach().split(rows) for x in tensors), strict=True)


def _all_reduce(x: Tensor, op: Any, group: dist.ProcessGroup | None) -> Tensor:
    """The reduced tensor, as a new one: a tensor that autograd may know is never written."""
    if group is None:
        return x
    reduced = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(reduced, op=op, group=group)
    return reduced


def _all_gather_columns(x_TK: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The columns of all ranks side by side, in rank order."""
    x_TK = x_TK.contiguous()
    parts = [torch.empty_like(x_TK) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x_TK, group=group)
    return torch.cat(parts, dim=1)
