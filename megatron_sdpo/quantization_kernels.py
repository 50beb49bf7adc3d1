"""Triton kernels of ``quantization``'s two functions: one pass over memory, the same codes and scales to the bit.

``torch`` reads a tensor several times for a scale and its codes. Imported only where a GPU's tensor is quantised.
"""

# pyright: reportIndexIssue=false, reportPrivateImportUsage=false
import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128
ROWS = 32
"""Rows of activations that a program takes."""


@triton.jit
def _codes(x, largest: tl.constexpr):
    return tl.minimum(tl.maximum(x, -largest), largest).to(tl.float8e4nv)


@triton.jit
def _factor(amax, largest: tl.constexpr, most: tl.constexpr):
    factor = tl.minimum(tl.div_rn(tl.zeros_like(amax) + largest, amax), most)
    return tl.where((amax == 0.0) | (amax != amax) | (amax == float("inf")), 1.0, factor)


@triton.jit
def _rows_kernel(
    x,
    codes,
    scales,
    t,
    k,
    blocks,
    largest: tl.constexpr,
    most: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = (row < t)[:, None] & (column < k)[None, :]
    place = row[:, None].to(tl.int64) * k + column[None, :]
    numbers = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    factor = _factor(tl.max(tl.abs(numbers), 1), largest, most)
    tl.store(codes + place, _codes(numbers * factor[:, None], largest), mask=inside)
    tl.store(
        scales + row.to(tl.int64) * blocks + tl.program_id(1),
        tl.div_rn(tl.zeros_like(factor) + 1.0, factor),
        mask=row < t,
    )


@triton.jit
def _blocks_kernel(
    w,
    codes,
    scales,
    n,
    k,
    blocks,
    largest: tl.constexpr,
    most: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0) * block + tl.arange(0, block)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = (row < n)[:, None] & (column < k)[None, :]
    place = row[:, None].to(tl.int64) * k + column[None, :]
    numbers = tl.load(w + place, mask=inside, other=0.0).to(tl.float32)
    factor = _factor(tl.max(tl.max(tl.abs(numbers), 1), 0), largest, most)
    tl.store(codes + place, _codes(numbers * factor, largest), mask=inside)
    tl.store(scales + tl.program_id(0) * blocks + tl.program_id(1), tl.div_rn(tl.zeros_like(factor) + 1.0, factor))


def quantized_rows(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    """As ``quantization.quantized_rows``, of a contiguous tensor on a GPU."""
    t, k = x_TK.shape
    blocks = triton.cdiv(k, BLOCK)
    codes = torch.empty_like(x_TK, dtype=torch.float8_e4m3fn)
    scales = x_TK.new_empty((t, blocks), dtype=torch.float32)
    _rows_kernel[(triton.cdiv(t, ROWS), blocks)](
        x_TK, codes, scales, t, k, blocks, largest=448.0, most=3.4028234663852886e38, rows=ROWS, block=BLOCK
    )
    return codes, scales


def quantized_blocks(w_NK: Tensor) -> tuple[Tensor, Tensor]:
    """As ``quantization.quantized_blocks``, of a contiguous tensor on a GPU."""
    n, k = w_NK.shape
    high, wide = triton.cdiv(n, BLOCK), triton.cdiv(k, BLOCK)
    codes = torch.empty_like(w_NK, dtype=torch.float8_e4m3fn)
    scales = w_NK.new_empty((high, wide), dtype=torch.float32)
    _blocks_kernel[(high, wide)](
        w_NK, codes, scales, n, k, wide, largest=448.0, most=3.4028234663852886e38, block=BLOCK, num_warps=8
    )
    return codes, scales
