"""Block FP8 in plain torch, on any device: E4M3 codes and fp32 scales, laid out as in DeepSeek's checkpoints.

An activation or a gradient has a scale for 128 numbers of a row, a weight for 128 x 128. A scale multiplies codes back
to numbers (``weight_scale_inv``). Rows and columns that do not fill a last block make a smaller one. The rounding is
Transformer Engine's (``Float8BlockScaling`` with fp32 scales): codes are ``x * (448 / amax)``, rounded to the nearest.
"""

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sdpo import fp8_format

_HAS_TRITON = importlib.util.find_spec("triton") is not None
BLOCK = fp8_format.BLOCK
CODES = torch.float8_e4m3fn
LARGEST = 448.0
"""Of E4M3."""


def quantized_rows(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Codes ``[T, K]`` and scales fp32 ``[T, ceil(K / 128)]``, one for each 128 numbers of a row.

    Example: a row ``[448.0, -1.0]`` has the scale 1.0 and itself as codes.
    """
    if _on_kernels(x_TK):
        from megatron_sdpo import quantization_kernels as kernels

        return kernels.quantized_rows(x_TK)
    return rows_in_torch(x_TK)


def rows_in_torch(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    """``quantized_rows`` without a kernel."""
    k = x_TK.shape[-1]
    x_TBk = F.pad(x_TK.float(), (0, -k % BLOCK)).unflatten(-1, (-1, BLOCK))
    factor_TB = _factors(x_TBk.abs().amax(-1))
    codes = _rounded(x_TBk * factor_TB[..., None]).flatten(-2)[..., :k]
    return codes.contiguous(), factor_TB.reciprocal()


def quantized_swiglu(gates_T2F: Tensor) -> tuple[Tensor, Tensor]:
    """``silu(gate) * up`` of ``[gate, up]`` in its dtype, quantised by rows: codes ``[T, F]`` and scales
    ``[ceil(F / 128), T]``, transposed as products on a GPU want them."""
    if _on_kernels(gates_T2F):
        from megatron_sdpo import quantization_kernels as kernels

        return kernels.quantized_swiglu(gates_T2F)
    return swiglu_in_torch(gates_T2F)


def swiglu_in_torch(gates_T2F: Tensor) -> tuple[Tensor, Tensor]:
    """``quantized_swiglu`` without a kernel."""
    gate_TF, up_TF = gates_T2F.float().chunk(2, dim=1)
    codes, scales = rows_in_torch((F.silu(gate_TF) * up_TF).to(gates_T2F.dtype))
    return codes, scales.t().contiguous()


def quantized_rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The RMS norm of ``x`` in its dtype, quantised by rows: codes ``[T, H]`` and scales ``[ceil(H / 128), T]``."""
    if _on_kernels(x_TH):
        from megatron_sdpo import quantization_kernels as kernels

        return kernels.quantized_rms_norm(x_TH, weight_H, eps)
    return rms_norm_in_torch(x_TH, weight_H, eps)


def rms_norm_in_torch(x_TH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``quantized_rms_norm`` without a kernel."""
    wide_TH = x_TH.float()
    normed_TH = wide_TH * torch.rsqrt(wide_TH.square().mean(1, keepdim=True) + eps) * weight_H.float()
    codes, scales = rows_in_torch(normed_TH.to(x_TH.dtype))
    return codes, scales.t().contiguous()


def quantized_blocks(w_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Codes ``[N, K]`` and scales fp32 ``[ceil(N / 128), ceil(K / 128)]``, one for each 128 x 128 numbers."""
    if _on_kernels(w_NK):
        from megatron_sdpo import quantization_kernels as kernels

        return kernels.quantized_blocks(w_NK)
    return blocks_in_torch(w_NK)


def blocks_in_torch(w_NK: Tensor) -> tuple[Tensor, Tensor]:
    """``quantized_blocks`` without a kernel."""
    n, k = w_NK.shape
    padded = F.pad(w_NK.float(), (0, -k % BLOCK, 0, -n % BLOCK))
    w_AnBk = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    factor_AB = _factors(w_AnBk.abs().amax((1, 3)))
    codes = _rounded(w_AnBk * factor_AB[:, None, :, None]).flatten(2).flatten(0, 1)[:n, :k]
    return codes.contiguous(), factor_AB.reciprocal()


def of_rows(codes_TK: Tensor, scales_TB: Tensor) -> Tensor:
    """The inverse of ``quantized_rows``, fp32 ``[T, K]``."""
    return codes_TK.float() * scales_TB.repeat_interleave(BLOCK, -1)[..., : codes_TK.shape[-1]]


def of_blocks(codes_NK: Tensor, scales_AB: Tensor) -> Tensor:
    """The inverse of ``quantized_blocks``, fp32 ``[N, K]``."""
    n, k = codes_NK.shape
    return codes_NK.float() * scales_AB.repeat_interleave(BLOCK, 0)[:n].repeat_interleave(BLOCK, 1)[:, :k]


def _on_kernels(x: Tensor) -> bool:
    """Whether one pass over memory (quantization_kernels.py) does it: a GPU's rows, one after the other."""
    return x.is_cuda and x.dtype != torch.float64 and x.is_contiguous() and x.numel() > 0 and _HAS_TRITON


def _factors(amax: Tensor) -> Tensor:
    """What brings the largest number of each block to 448; 1 for a block of zeros, and never infinite."""
    # A division: torch makes of number / tensor a product with the reciprocal, which rounds twice.
    factor = torch.full_like(amax, LARGEST).div_(amax).clamp_(max=torch.finfo(torch.float32).max)
    return torch.where((amax == 0) | ~amax.isfinite(), torch.ones_like(factor), factor)


def _rounded(x: Tensor) -> Tensor:
    return x.clamp(-LARGEST, LARGEST).to(CODES)  # a number that is not finite stays one: NaN


class BlockLinear(torch.autograd.Function):
    """``y = x w^T`` with every product on block-quantised numbers, accumulated in fp32: the emulation of an FP8 linear.

    ``x [..., K]``, ``w [N, K]``; in and out in x's dtype. Backward: the gradient is quantised along its rows where it
    meets the weight, and along its columns, as the input is, where it makes the weight's gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        x_TK = of_rows(*quantized_rows(x.reshape(-1, x.shape[-1])))
        y_TN = x_TK @ of_blocks(*quantized_blocks(w)).t()
        return y_TN.to(x.dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, w = ctx.saved_tensors
        grad_TN, x_TK = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_x = of_rows(*quantized_rows(grad_TN)) @ of_blocks(*quantized_blocks(w))
        columns_NT, columns_KT = (of_rows(*quantized_rows(t.t())) for t in (grad_TN, x_TK))
        return grad_x.to(x.dtype).reshape(x.shape), (columns_NT @ columns_KT.t()).to(w.dtype)
