"""Triton kernels of ``vocabulary``'s walks over the logits: each reads them once, a program a row.

Logits at the kept tokens are set to -inf in place for the time of a walk and put back by the same program: the sum over
the other tokens is taken of these alone, however little they hold. Imported only where logits are on a GPU.

The largest of a row are found one after the other: few are wanted, of numbers that one program holds at one time.
"""

# pyright: reportIndexIssue=false, reportPrivateImportUsage=false
import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 4096
"""That a program holds at one time."""
MOST = 8192
"""Of which ``largest_keys`` finds the largest."""
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


@triton.jit
def _runs_kernel(logits, maxima, runs, stride, run: tl.constexpr, columns: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    for first in range(0, runs * run, columns):
        place = first + tl.arange(0, columns)
        z = tl.load(logits + row * stride + place, mask=place < runs * run, other=-float("inf")).to(tl.float32)
        found = tl.max(tl.reshape(z, [columns // run, run]), 1)
        number = first // run + tl.arange(0, columns // run)
        tl.store(maxima + row * runs + number, found, mask=number < runs)


@triton.jit
def _largest_kernel(numbers, ids, found, n, k, ids_stride, width: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, width)
    inside = slot < n
    z = tl.load(numbers + row * n + slot, mask=inside, other=0.0).to(tl.float32)
    z = tl.where(z == 0.0, 0.0, z)  # one zero: equal numbers, equal bits
    bits = z.to(tl.int32, bitcast=True)
    # Bits of negative floats grow with the magnitude: flip them, sign apart.
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    name = tl.load(ids + row * ids_stride + slot, mask=inside, other=0)
    keys = bits.to(tl.int64) * 4294967296 + (4294967295 - name)
    none = tl.zeros([width], tl.int64) - 9223372036854775807
    keys = tl.where(inside, keys, none)
    for i in range(0, k):
        best = tl.max(keys, 0)
        tl.store(found + row * k + i, best)
        keys = tl.where(keys == best, none, keys)


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


def run_maxima(logits_TV: Tensor, runs: int, run: int) -> Tensor:
    """The largest logit of each of the first runs of ``run`` columns, a power of two: fp32 ``[T, runs]``."""
    maxima = torch.empty(len(logits_TV), runs, dtype=torch.float32, device=logits_TV.device)
    _runs_kernel[(len(logits_TV),)](
        logits_TV, maxima, runs, logits_TV.stride(0), run=run, columns=max(run, COLUMNS), num_warps=8
    )
    return maxima


def largest_keys(numbers_TN: Tensor, ids_TN: Tensor, k: int) -> Tensor:
    """The k largest keys of each row (``vocabulary._keys``), largest first, int64 [T, k]; of at most ``MOST`` numbers.

    ``ids``: int64; rows may be one and the same.
    """
    rows, n = numbers_TN.shape
    found = torch.empty(rows, k, dtype=torch.int64, device=numbers_TN.device)
    width = triton.next_power_of_2(n)
    _largest_kernel[(rows,)](
        numbers_TN.contiguous(),
        ids_TN if ids_TN.stride(1) == 1 else ids_TN.contiguous(),
        found,
        n,
        k,
        ids_TN.stride(0) if ids_TN.stride(1) == 1 else n,
        width=width,
        num_warps=4 if width <= 2048 else 8 if width <= 4096 else 16,
    )
    return found
