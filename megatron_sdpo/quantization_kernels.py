"""Triton kernels of ``quantization``'s functions: one pass over memory, the same codes and scales to the bit.

``torch`` reads a tensor several times for a scale and its codes. Imported only where a GPU's tensor is quantised. What
makes the numbers in the same pass, a gated unit or a norm, agrees with torch to fp32's rounding.
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


@triton.jit
def _swiglu_kernel(
    gates,
    codes,
    scales,
    t,
    f,
    largest: tl.constexpr,
    most: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * rows
    row = tl.arange(0, rows)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = (row < t - first)[:, None] & (column < f)[None, :]
    own = gates + first * (2 * f)
    place = row[:, None] * (2 * f) + column[None, :]
    gate = tl.load(own + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(own + f + place, mask=inside, other=0.0).to(tl.float32)
    # Rounded as if it had been written.
    numbers = (gate / (1.0 + tl.exp(-gate)) * up).to(gates.dtype.element_ty).to(tl.float32)
    factor = _factor(tl.max(tl.abs(numbers), 1), largest, most)
    out = row[:, None] * f + column[None, :]
    tl.store(codes + first * f + out, _codes(numbers * factor[:, None], largest), mask=inside)
    tl.store(
        scales + tl.program_id(1).to(tl.int64) * t + first + row,
        tl.div_rn(tl.zeros_like(factor) + 1.0, factor),
        mask=row < t - first,
    )


@triton.jit
def _norm_kernel(
    x,
    weight,
    codes,
    scales,
    t,
    h,
    eps,
    largest: tl.constexpr,
    most: tl.constexpr,
    blocks: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    number = tl.arange(0, blocks)
    inner = number[:, None] * block + tl.arange(0, block)[None, :]
    own, made = x + row * h, codes + row * h
    squares = tl.zeros([blocks, block], tl.float32)
    for first in range(0, h, blocks * block):
        wide = tl.load(own + first + inner, mask=first + inner < h, other=0.0).to(tl.float32)
        squares += wide * wide
    shrink = tl.rsqrt(tl.sum(tl.sum(squares, 1), 0) / h + eps)
    for first in range(0, h, blocks * block):  # again, of what the caches have
        inside = first + inner < h
        wide = tl.load(own + first + inner, mask=inside, other=0.0).to(tl.float32)
        gain = tl.load(weight + first + inner, mask=inside, other=0.0).to(tl.float32)
        # Rounded as if it had been written.
        numbers = (wide * shrink * gain).to(x.dtype.element_ty).to(tl.float32)
        factor = _factor(tl.max(tl.abs(numbers), 1), largest, most)
        tl.store(made + first + inner, _codes(numbers * factor[:, None], largest), mask=inside)
        tl.store(
            scales + row + (first // block + number).to(tl.int64) * t,
            tl.div_rn(tl.zeros_like(factor) + 1.0, factor),
            mask=first + number * block < h,
        )


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


def quantized_swiglu(gates_T2F: Tensor) -> tuple[Tensor, Tensor]:
    """As ``quantization.quantized_swiglu``, of a contiguous tensor on a GPU."""
    t, f = gates_T2F.shape[0], gates_T2F.shape[1] // 2
    blocks = triton.cdiv(f, BLOCK)
    codes = gates_T2F.new_empty((t, f), dtype=torch.float8_e4m3fn)
    scales = gates_T2F.new_empty((blocks, t), dtype=torch.float32)
    rows = ROWS // 2  # of two inputs
    _swiglu_kernel[(triton.cdiv(t, rows), blocks)](
        gates_T2F, codes, scales, t, f, largest=448.0, most=3.4028234663852886e38, rows=rows, block=BLOCK, num_warps=8
    )
    return codes, scales


def quantized_rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As ``quantization.quantized_rms_norm``, of contiguous tensors on a GPU."""
    t, h = x_TH.shape
    codes = torch.empty_like(x_TH, dtype=torch.float8_e4m3fn)
    scales = x_TH.new_empty((triton.cdiv(h, BLOCK), t), dtype=torch.float32)
    _norm_kernel[(t,)](
        *(x_TH, weight_H, codes, scales, t, h, eps),
        largest=448.0,
        most=3.4028234663852886e38,
        blocks=8,
        block=BLOCK,
        num_warps=4,
    )
    return codes, scales
