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
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = (row < t)[:, None] & (column < f)[None, :]
    place = row[:, None].to(tl.int64) * (2 * f) + column[None, :]
    gate = tl.load(gates + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gates + place + f, mask=inside, other=0.0).to(tl.float32)
    # Rounded as if it had been written.
    numbers = (gate / (1.0 + tl.exp(-gate)) * up).to(gates.dtype.element_ty).to(tl.float32)
    factor = _factor(tl.max(tl.abs(numbers), 1), largest, most)
    out = row[:, None].to(tl.int64) * f + column[None, :]
    tl.store(codes + out, _codes(numbers * factor[:, None], largest), mask=inside)
    tl.store(
        scales + tl.program_id(1).to(tl.int64) * t + row,
        tl.div_rn(tl.zeros_like(factor) + 1.0, factor),
        mask=row < t,
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
    column = number[:, None] * block + tl.arange(0, block)[None, :]
    inside = column < h
    wide = tl.load(x + row * h + column, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(tl.sum(wide * wide, 1), 0) / h
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    numbers = (wide * tl.rsqrt(mean + eps) * gain).to(x.dtype.element_ty).to(tl.float32)
    factor = _factor(tl.max(tl.abs(numbers), 1), largest, most)
    tl.store(codes + row * h + column, _codes(numbers * factor[:, None], largest), mask=inside)
    tl.store(
        scales + number.to(tl.int64) * t + row,
        tl.div_rn(tl.zeros_like(factor) + 1.0, factor),
        mask=number * block < h,
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
    """As ``quantization.quantized_swiglu``, of a contiguous tensor on a GPU. Not yet run on a GPU."""
    t, f = gates_T2F.shape[0], gates_T2F.shape[1] // 2
    blocks = triton.cdiv(f, BLOCK)
    codes = gates_T2F.new_empty((t, f), dtype=torch.float8_e4m3fn)
    scales = gates_T2F.new_empty((blocks, t), dtype=torch.float32)
    _swiglu_kernel[(triton.cdiv(t, ROWS), blocks)](
        gates_T2F, codes, scales, t, f, largest=448.0, most=3.4028234663852886e38, rows=ROWS, block=BLOCK
    )
    return codes, scales


def quantized_rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As ``quantization.quantized_rms_norm``, of contiguous tensors on a GPU. Not yet run on a GPU."""
    t, h = x_TH.shape
    blocks = triton.cdiv(h, BLOCK)
    codes = torch.empty_like(x_TH, dtype=torch.float8_e4m3fn)
    scales = x_TH.new_empty((blocks, t), dtype=torch.float32)
    _norm_kernel[(t,)](
        *(x_TH, weight_H, codes, scales, t, h, eps),
        largest=448.0,
        most=3.4028234663852886e38,
        blocks=triton.next_power_of_2(blocks),
        block=BLOCK,
        num_warps=8 if blocks > 16 else 4,
    )
    return codes, scales
