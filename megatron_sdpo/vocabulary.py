"""What is read off logits whose vocabulary may be cut over a process group: supports, log-probs, entropies.

Conventions. Tensors end in their axes: ``T`` tokens, ``V`` vocabulary *of this rank*, ``K`` kept tokens,
``B`` = K + 1 bins, the last of which, the *tail*, holds all other tokens. Rank r of ``group`` holds the ids
r * V ... (r + 1) * V - 1, all ranks equally many; with ``group=None`` the vocabulary is whole. Ids are global, unique
in a row and inside the vocabulary. Logits are those of the sampling distribution (already divided by the temperature)
in any float dtype; -inf marks a column that does not exist. Arithmetic is fp32 (float64 for float64 logits) and logs
are natural. Results are equal on all ranks of the group, so a loss made of them must not be summed over that group
again.

``BinLogProbs`` is the only differentiable code here. Its backward pass makes no collective.
"""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = {"cpu": 1 << 20, "cuda": 1 << 24}
"""Logits, in whole rows, whose wide copies are alive at one time: 20 bytes of each, 80 in ``full_divergence``.

So many that a GPU is busy; so few that a CPU keeps them in its caches.
"""

_HAS_TRITON = importlib.util.find_spec("triton") is not None

RUN = 64
"""Columns that ``student_support`` looks at together first."""

LOG_FLOOR = -1e4
"""A bin without any mass counts as e^-10000, so that every difference of logs is finite."""

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
    first_id, kept = _first_id(shard, group), min(k, shard)
    rows = max(1, 20 * BLOCK["cpu" if logits_TV.is_cpu else "cuda"] // support_bytes(shard, kept))
    blocks = logits_TV.detach().split(rows)
    keys_TK = torch.cat([_largest_keys(rows_TV, kept, first_id) for rows_TV in blocks])
    if group is not None:
        keys_TK = _all_gather_columns(keys_TK, group).topk(k).values
    return _LOW_32 - (keys_TK & _LOW_32)


def support_bytes(columns: int, k: int) -> int:
    """What ``student_support`` makes for the moment of a row of so many columns on a rank."""
    return max(20 * (columns // RUN), 40 * k * RUN) if _in_runs(columns, k) else 20 * columns


@dataclass(frozen=True, slots=True)
class Reading:
    """What one walk over the logits finds (``read``); fp32, equal on all ranks of the group, no gradient."""

    log_probs_TB: Tensor
    """Log-probs of the K tokens and of the tail. The tail is summed over its tokens and not taken as the rest to one,
    so that it is right however small it is."""
    tail_T: Tensor
    """Log-sum-exp of the tail's logits, -inf where there are none."""
    sampled_T: Tensor | None = None
    """Log-probs of the sampled tokens."""
    entropy_T: Tensor | None = None
    """Entropy of the whole distribution, in nats."""


@torch.no_grad()
def read(
    logits_TV: Tensor,
    ids_TK: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    sampled_ids_T: Tensor | None = None,
    with_entropy: bool = False,
) -> Reading:
    """Everything that is wanted of the logits in one walk over the vocabulary: log-probs at ``ids_TK`` and of the rest
    to them, at one sampled token a row (which need not be among these), and the entropy.

    One MAX and one SUM all-reduce, of T and T * (K + 1) numbers, and T more for each of the last two.
    """
    first_id = _first_id(logits_TV.shape[1], group)
    wanted_TK = ids_TK if sampled_ids_T is None else torch.cat([ids_TK, sampled_ids_T[:, None]], dim=1)
    if _on_kernels(logits_TV):
        kept_TK, tail_T, mean_T = _read_by_kernel(logits_TV, wanted_TK, ids_TK.shape[1], first_id, with_entropy)
    else:
        parts = [
            _read_rows(rows_TV, rows_TK, ids_TK.shape[1], first_id, with_entropy, scratch_CV)
            for scratch_CV in [_scratch(logits_TV)]
            for rows_TV, rows_TK in row_blocks(logits_TV, wanted_TK)
        ]
        kept_TK, tail_T, mean_T = (torch.cat(part) for part in zip(*parts, strict=True))
    top_T = all_reduce(tail_T, dist.ReduceOp.MAX, group)
    top_T = torch.where(top_T.isinf(), 0.0, top_T)  # an empty tail: exp(-inf - 0) is 0
    below_T = tail_T - top_T
    mass_T = below_T.exp()
    moment_T = (mean_T + below_T.clamp(min=LOG_FLOOR)) * mass_T  # sum of exp(z - top) (z - top) over this rank's tail
    packed_TC = torch.cat([kept_TK, mass_T[:, None], *([moment_T[:, None]] if with_entropy else [])], dim=1)
    packed_TC = all_reduce(packed_TC, dist.ReduceOp.SUM, group)
    kept_TK, mass_T = packed_TC[:, : kept_TK.shape[1]], packed_TC[:, kept_TK.shape[1]]
    tail_T = mass_T.log() + top_T
    k = ids_TK.shape[1]
    bins_TB = torch.cat([kept_TK[:, :k], tail_T[:, None]], dim=1)
    log_probs_TB, sampled_T = _normalised(bins_TB, None if sampled_ids_T is None else kept_TK[:, k:])
    if not with_entropy:
        return Reading(log_probs_TB, tail_T, sampled_T)
    log_kept_TK, log_tail_T = log_probs_TB[:, :k].clamp(min=LOG_FLOOR), log_probs_TB[:, k].clamp(min=LOG_FLOOR)
    # A token of the tail has log-prob (z - top) + shift, and the tail's tokens together have exp(shift) * mass.
    shift_T = log_tail_T - mass_T.log().clamp(min=LOG_FLOOR)
    tail_moment_T = log_tail_T.exp() * (packed_TC[:, -1] / mass_T.clamp(min=torch.finfo(mass_T.dtype).tiny) + shift_T)
    return Reading(log_probs_TB, tail_T, sampled_T, -(log_kept_TK.exp() * log_kept_TK).sum(dim=1) - tail_moment_T)


@torch.no_grad()
def support_log_probs(
    logits_TV: Tensor, ids_TK: Tensor, group: dist.ProcessGroup | None = None, *, with_tail: bool = False
) -> Tensor:
    """Log-probabilities of ``ids_TK`` under the whole vocabulary; fp32 [T, K], no gradient.

    ``with_tail`` appends the log-mass of all other tokens as column K + 1.
    """
    log_probs_TB = read(logits_TV, ids_TK, group).log_probs_TB
    return log_probs_TB if with_tail else log_probs_TB[:, :-1].contiguous()


def sampled_log_probs(
    logits_TV: Tensor,
    ids_T: Tensor,
    group: dist.ProcessGroup | None = None,
    reading: Reading | None = None,
    overwrite: bool = False,
) -> Tensor:
    """Log-probability of one token a row, with gradient to ``logits_TV``; fp32 [T].

    ``reading``, of the same logits at ``ids_T[:, None]``, spares the walk; ``overwrite`` as in ``BinLogProbs``.
    """
    return BinLogProbs.apply(logits_TV, ids_T[:, None], group, reading, overwrite)[:, 0]


@torch.no_grad()
def entropy(logits_TV: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Entropy of each row in nats; fp32 [T], no gradient."""
    top_T1 = all_reduce(widen(logits_TV.amax(dim=1, keepdim=True)), dist.ReduceOp.MAX, group)
    sums = []
    for rows_TV, rows_T1 in row_blocks(logits_TV, top_T1):
        below_TV = (widen(rows_TV) - rows_T1).clamp_(min=LOG_FLOOR)  # finite, so that 0 * log 0 is 0
        mass_TV = below_TV.exp()
        sums.append(torch.stack([mass_TV.sum(dim=1), below_TV.mul_(mass_TV).sum(dim=1)], dim=1))
    mass_T, moment_T = all_reduce(torch.cat(sums), dist.ReduceOp.SUM, group).unbind(dim=1)
    return mass_T.log() - moment_T / mass_T


# ------------------------------------------------------------------------- logits -> log-probs of bins


class BinLogProbs(torch.autograd.Function):
    """logits [T, V], ids [T, K] -> log-probs of the K tokens and of the tail, [T, K + 1].

    With ``overwrite`` the backward pass writes the gradient over the logits: for one who owns them and has no other
    use of them. Another that autograd still has raises its error of a tensor modified in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_TV: Tensor,
        ids_TK: Tensor,
        group: dist.ProcessGroup | None,
        reading: Reading | None,
        overwrite: bool,
    ) -> Tensor:
        reading = read(logits_TV, ids_TK, group) if reading is None else reading
        ctx.first_id, ctx.overwrite = _first_id(logits_TV.shape[1], group), overwrite
        ctx.save_for_backward(logits_TV, ids_TK, reading.log_probs_TB, reading.tail_T)
        return reading.log_probs_TB.clone()  # what the caller has must not become an output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TB: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Softmax's gradient on the bins; the tail's share goes to its tokens in proportion to their mass."""
        logits_TV, ids_TK, log_probs_TB, tail_T = ctx.saved_tensors
        share_TB = grad_TB - log_probs_TB.exp() * grad_TB.sum(dim=1, keepdim=True)
        tail_T1 = torch.where(tail_T.isinf(), 0.0, tail_T)[:, None]  # an empty tail: exp(-inf - 0) is 0
        grad_TV = logits_TV.detach() if ctx.overwrite else torch.empty_like(logits_TV)
        if _on_kernels(logits_TV):
            from megatron_sdpo import vocabulary_kernels as kernels

            places = _locate(ids_TK, logits_TV.shape[1], ctx.first_id)
            kernels.gradient(logits_TV, grad_TV, *places, tail_T1[:, 0], share_TB)
            return grad_TV, None, None, None, None
        # A wide gradient is made where it stays.
        scratch_CV = None if grad_TV.dtype == share_TB.dtype else _scratch(logits_TV)
        blocks = row_blocks(grad_TV, logits_TV, ids_TK, tail_T1, share_TB)
        for out_TV, rows_TV, rows_TK, rows_T1, rows_TB in blocks:
            local_TK, owned_TK = _locate(rows_TK, rows_TV.shape[1], ctx.first_id)
            wide_TV = out_TV if scratch_CV is None else scratch_CV[: len(out_TV)]
            torch.sub(rows_TV, rows_T1, out=wide_TV)
            torch.mul(_without(wide_TV, local_TK, owned_TK).exp_(), rows_TB[:, -1:], out=out_TV)
            out_TV.scatter_add_(1, local_TK, rows_TB[:, :-1].masked_fill(~owned_TK, 0.0).to(out_TV.dtype))
        return grad_TV, None, None, None, None


def _on_kernels(logits_TV: Tensor) -> bool:
    """Whether one program a row walks over these logits (vocabulary_kernels.py) instead of torch's operators: on a GPU,
    in a dtype of 32 bits or fewer, no two rows in one place."""
    if not logits_TV.is_cuda or logits_TV.dtype == torch.float64 or not logits_TV.numel() or not _HAS_TRITON:
        return False
    return logits_TV.stride(1) == 1 and logits_TV.stride(0) >= logits_TV.shape[1]


def _read_by_kernel(
    logits_TV: Tensor, wanted_TK: Tensor, k: int, first_id: int, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``_read_rows``, of all rows."""
    from megatron_sdpo import vocabulary_kernels as kernels

    local_TK, owned_TK = _locate(wanted_TK, logits_TV.shape[1], first_id)
    kept_TK = widen(logits_TV.gather(1, local_TK)).masked_fill(~owned_TK, 0.0)
    return kept_TK, *kernels.tail_of(logits_TV.detach(), local_TK, owned_TK, k, with_entropy, LOG_FLOOR)


def _read_rows(
    rows_TV: Tensor, wanted_TK: Tensor, k: int, first_id: int, with_entropy: bool, scratch_CV: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of one block on this rank: its logits at the wanted ids, zero where another rank has them; and of the rest to the
    first ``k`` of them, the log-sum-exp s [T] and the mean of z - s [T], zero unless ``with_entropy``."""
    local_TK, owned_TK = _locate(wanted_TK, rows_TV.shape[1], first_id)
    kept_TK = widen(rows_TV.gather(1, local_TK)).masked_fill(~owned_TK, 0.0)
    wide_TV = _without(scratch_CV[: len(rows_TV)].copy_(rows_TV), local_TK[:, :k], owned_TK[:, :k])
    top_T1 = wide_TV.amax(dim=1, keepdim=True)
    top_T1 = torch.where(top_T1.isinf(), 0.0, top_T1)
    wide_TV.sub_(top_T1)
    if not with_entropy:
        mass_T = wide_TV.exp_().sum(dim=1)
        return kept_TK, mass_T.log() + top_T1[:, 0], torch.zeros_like(mass_T)
    mass_TV = wide_TV.exp()
    mass_T = mass_TV.sum(dim=1)
    log_mass_T = mass_T.log()
    moment_T = mass_TV.mul_(wide_TV.clamp_(min=LOG_FLOOR)).sum(dim=1)  # finite, so that 0 * log 0 is 0
    mean_T = torch.where(mass_T == 0, 0.0, moment_T / mass_T - log_mass_T)
    return kept_TK, log_mass_T + top_T1[:, 0], mean_T


def _normalised(bins_TB: Tensor, sampled_T1: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Log-softmax of the bins, and of one more logit a row by the same sum."""
    top_T1 = bins_TB.amax(dim=1, keepdim=True)
    below_TB = bins_TB - top_T1
    log_sum_T1 = below_TB.exp().sum(dim=1, keepdim=True).log()
    return below_TB - log_sum_T1, None if sampled_T1 is None else (sampled_T1 - top_T1 - log_sum_T1)[:, 0]


def _without(wide_TV: Tensor, local_TK: Tensor, owned_TK: Tensor) -> Tensor:
    """The tail: writes -inf at the owned ids."""
    # Added, not assigned: an id of another shard then adds zero wherever it was clamped to.
    mask_TK = torch.zeros_like(local_TK, dtype=wide_TV.dtype).masked_fill(owned_TK, -torch.inf)
    return wide_TV.scatter_add_(1, local_TK, mask_TK)


# ------------------------------------------------------------------------------------ shards and rows


def _first_id(shard: int, group: dist.ProcessGroup | None) -> int:
    """Global id of this rank's first column."""
    return 0 if group is None else dist.get_rank(group) * shard


def _locate(ids_TK: Tensor, shard: int, first_id: int) -> tuple[Tensor, Tensor]:
    """Columns of global ids in this shard, clamped into it, and whether the shard owns them."""
    local_TK = ids_TK - first_id
    return local_TK.clamp(0, shard - 1), (local_TK >= 0) & (local_TK < shard)


def _in_runs(columns: int, k: int) -> int:
    """How many runs to look at first; 0: hardly a column would be spared."""
    runs = columns // RUN
    return runs if runs > 2 * k else 0


def _largest_keys(rows_TV: Tensor, k: int, first_id: int) -> Tensor:
    """The k largest keys (``_keys``) of each row, largest first.

    A run of columns of which one is among the k largest has its own largest among the largest k of all runs: were there
    k runs before it, in the order of their largest logit and then their place, each would have an entry before that
    one. So one walk over the logits finds the runs, and only their columns are sorted.
    """
    columns = rows_TV.shape[1]
    runs = _in_runs(columns, k)
    if runs == 0:
        return _largest(rows_TV, torch.arange(first_id, first_id + columns, device=rows_TV.device), k)
    best_TR = _run_maxima(rows_TV, runs)
    chosen_TK = _LOW_32 - (_largest(best_TR, torch.arange(runs, device=rows_TV.device), k) & _LOW_32)
    inside_r = torch.arange(RUN, device=rows_TV.device)
    places_TC = (chosen_TK[:, :, None] * RUN + inside_r).flatten(1)
    over_C = torch.arange(runs * RUN, columns, device=rows_TV.device)  # fewer than a run, behind the last
    places_TC = torch.cat([places_TC, over_C.expand(len(rows_TV), -1)], dim=1)
    return _largest(rows_TV.gather(1, places_TC), places_TC + first_id, k)


def _run_maxima(rows_TV: Tensor, runs: int) -> Tensor:
    """The largest logit of each run, [T, runs]."""
    if _on_kernels(rows_TV):
        from megatron_sdpo import vocabulary_kernels as kernels

        return kernels.run_maxima(rows_TV, runs, RUN)
    return rows_TV[:, : runs * RUN].unflatten(1, (runs, RUN)).amax(dim=2)


def _largest(numbers_TN: Tensor, ids_N: Tensor, k: int) -> Tensor:
    """The k largest keys of each row, largest first; ``ids_N`` may differ by row."""
    if _on_kernels(numbers_TN):
        from megatron_sdpo import vocabulary_kernels as kernels

        if numbers_TN.shape[1] <= kernels.MOST:
            return kernels.largest_keys(numbers_TN, ids_N.expand(numbers_TN.shape), k)
    return _keys(numbers_TN, ids_N).topk(k).values


def _keys(logits_TV: Tensor, ids_V: Tensor) -> Tensor:
    """int64 keys, all different, that sort like (logit, lower id): fp32 bits above, the inverted id below.

    Different keys have one order, so a top-k over them has one answer. ``ids_V`` may differ by row.
    """
    bits_TV = (logits_TV.float() + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0: equal numbers, equal bits
    # Bits of negative floats grow with the magnitude: flip them, sign apart.
    bits_TV = torch.where(bits_TV < 0, bits_TV ^ 0x7FFFFFFF, bits_TV)
    return bits_TV.long().bitwise_left_shift_(32).add_(_LOW_32 - ids_V)


def widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rows(logits_TV: Tensor) -> int:
    """Rows of a block."""
    return max(1, BLOCK["cpu" if logits_TV.is_cpu else "cuda"] // max(1, logits_TV.shape[1]))


def _scratch(logits_TV: Tensor) -> Tensor:
    """Room for the wide copy of one block, to be used again for the next."""
    dtype = torch.promote_types(logits_TV.dtype, torch.float32)
    return torch.empty_like(logits_TV[: _rows(logits_TV)], dtype=dtype)


def row_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each tensor, the first of which is logits; one empty block when there are none."""
    rows = _rows(tensors[0])
    return zip(*(x.detach().split(rows) for x in tensors), strict=True)


def all_reduce(x: Tensor, op: Any, group: dist.ProcessGroup | None) -> Tensor:
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
