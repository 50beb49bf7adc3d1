"""Triton kernels of ``vocabulary``'s two walks over the logits: each reads them once, a program a row.

Logits at the kept tokens are set to -inf in place for the time of a walk and put back by the same program: the sum over
the other tokens is taken of these alone, however little they hold. Imported only where logits are on a GPU.
"""

# pyright: reportIndexIssue=false, reportPrivateImportUsage=false
import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 4096
"""That a program holds at one time."""
_EMPTY = tl.constexpr(-1e30)
"""Below every logit: the largest of no logits."""


@triton.jit
def _tail_kernel(
    logits,
    ids,
    owned,
    sums,
    means,
    v,
    k,
    ids_width,
    stride,
    floor: tl.constexpr,
    with_entropy: tl.constexpr,
    width: tl.constexpr,
    columns: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, width)
    column_of = tl.load(ids + row * ids_width + slot, mask=slot < k, other=0)
    mine = (slot < k) & (tl.load(owned + row * ids_width + slot, mask=slot < k, other=0) != 0)
    own = logits + row * stride
    kept = tl.load(own + column_of, mask=mine, other=0.0)
    tl.debug_barrier()
    none = tl.zeros([width], tl.float32) - float("inf")
    tl.store(own + column_of, none.to(kept.dtype), mask=mine)
    tl.debug_barrier()
    top = tl.zeros([columns], tl.float32) + _EMPTY
    mass = tl.zeros([columns], tl.float32)
    moment = tl.zeros([columns], tl.float32)
    for first in range(0, v, columns):
        place = first + tl.arange(0, columns)
        z = tl.load(own + place, mask=place < v, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, z)
        shrink = tl.exp(top - higher)
        below = z - higher
        share = tl.exp(below)
        if with_entropy:
            moment = shrink * (moment + mass * tl.maximum(top - higher, floor)) + share * tl.maximum(below, floor)
        mass = mass * shrink + share
        top = higher
    most = tl.max(top, 0)
    shrink = tl.exp(top - most)
    if with_entropy:
        moment = tl.sum(shrink * (moment + mass * tl.maximum(top - most, floor)), 0)
    mass = tl.sum(mass * shrink, 0)
    tl.store(sums + row, tl.log(mass) + most)
    if with_entropy:
        tl.store(means + row, tl.where(mass == 0.0, 0.0, moment / mass - tl.log(mass)))
    tl.debug_barrier()
    tl.store(own + column_of, kept, mask=mine)


@triton.jit
def _gradient_kernel(
    logits,
    out,
    ids,
    owned,
    tails,
    shares,
    v,
    k,
    stride,
    out_stride,
    width: tl.constexpr,
    columns: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, width)
    column_of = tl.load(ids + row * k + slot, mask=slot < k, other=0)
    mine = (slot < k) & (tl.load(owned + row * k + slot, mask=slot < k, other=0) != 0)
    share = tl.load(shares + row * (k + 1) + slot, mask=slot < k, other=0.0)
    tail, tail_share = tl.load(tails + row), tl.load(shares + row * (k + 1) + k)
    for first in range(0, v, columns):
        place = first + tl.arange(0, columns)
        z = tl.load(logits + row * stride + place, mask=place < v, other=0.0).to(tl.float32)
        grad = tl.exp(z - tail) * tail_share
        tl.store(out + row * out_stride + place, grad.to(out.dtype.element_ty), mask=place < v)
    tl.debug_barrier()
    tl.store(out + row * out_stride + column_of, share.to(out.dtype.element_ty), mask=mine)


def tail_of(
    logits_TV: Tensor, local_TK: Tensor, owned_TK: Tensor, k: int, with_entropy: bool, floor: float
) -> tuple[Tensor, Tensor]:
    """Of the columns other than the first ``k`` of ``local_TK`` that are owned: log-sum-exp s, and mean of z - s
    (zeros unless ``with_entropy``), fp32 [T] each. The logits are as before when it has run."""
    rows, v = logits_TV.shape
    sums, means = (torch.zeros(rows, dtype=torch.float32, device=logits_TV.device) for _ in range(2))
    _tail_kernel[(rows,)](
        logits_TV,
        local_TK.contiguous(),
        owned_TK.contiguous().to(torch.int8),
        sums,
        means,
        v,
        k,
        local_TK.shape[1],
        logits_TV.stride(0),
        floor=floor,
        with_entropy=with_entropy,
        width=triton.next_power_of_2(max(k, 1)),
        columns=min(COLUMNS, triton.next_power_of_2(v)),
        num_warps=8,
    )
    return sums, means


def gradient(
    logits_TV: Tensor, out_TV: Tensor, local_TK: Tensor, owned_TK: Tensor, tail_T: Tensor, share_TB: Tensor
) -> None:
    """``out``, which may be the logits themselves: ``exp(z - tail)`` times the tail's share, and the kept tokens' own
    shares at the columns that are owned."""
    rows, v = logits_TV.shape
    k = local_TK.shape[1]
    _gradient_kernel[(rows,)](
        logits_TV,
        out_TV,
        local_TK.contiguous(),
        owned_TK.contiguous().to(torch.int8),
        tail_T.contiguous(),
        share_TB.contiguous(),
        v,
        k,
        logits_TV.stride(0),
        out_TV.stride(0),
        width=triton.next_power_of_2(max(k, 1)),
        columns=min(COLUMNS, triton.next_power_of_2(v)),
        num_warps=8,
    )
