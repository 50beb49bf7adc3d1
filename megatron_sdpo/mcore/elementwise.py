"""Norm, gated unit and rotary embedding for machines without Transformer Engine, each one autograd function.

Composed of torch's own operators they would write several times as much memory, which is what they cost on a CPU: of a
training step of a model of a million parameters a tenth. Nothing but their inputs is kept for the backward pass.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class _RMSNorm(torch.autograd.Function):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis, fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_H, scale)
        return (x * scale).mul_(weight_H)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight_H, scale = ctx.saved_tensors
        normed = x * scale
        by_weight = grad * normed
        along = (by_weight @ weight_H).div_(x.shape[-1]).unsqueeze(-1)  # of the gradient, along the normed vector
        grad_x = torch.addcmul(grad * weight_H, normed, along, value=-1).mul_(scale)
        return grad_x, by_weight.flatten(0, -2).sum(0), None


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm, fp32 inside; the one Megatron ships refuses sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Megatron reads this mark to reduce the gradient over the tensor group.
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed: Any = _RMSNorm.apply(x.float(), self.weight.float(), self.eps)
        return normed.to(x.dtype)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        gate, up = gate_and_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gate_and_up,) = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_and_up)
        grad_gate, grad_up = out.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return out


class SwiGLU(torch.nn.Module):
    """``[..., 2F] -> [..., F]``: ``silu(gate) * up``, gates in the first half."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()

    def forward(self, gate_and_up: Tensor) -> Tensor:
        out: Any = _SwiGLU.apply(gate_and_up)
        return out

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Nothing to save: it has no weights."""
        return {}


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_Thd: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TD, sin_TD)
        return _turned(x_Thd, cos_TD, sin_TD, 1.0)

    @staticmethod
    def backward(ctx: Any, grad_Thd: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        cos_TD, sin_TD = ctx.saved_tensors
        return _turned(grad_Thd, cos_TD, sin_TD, -1.0), None, None


def rotate(x_Thd: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotary embedding, halves convention: ``x * cos + (-x2, x1) * sin``; no gradient to the tables."""
    out: Any = _Rotate.apply(x_Thd, cos_TD, sin_TD)
    return out


def _turned(x_Thd: Tensor, cos_TD: Tensor, sin_TD: Tensor, direction: float) -> Tensor:
    """By the angles, or back by them (direction -1), which the two halves of the tables have in common."""
    half = x_Thd.shape[-1] // 2
    out = x_Thd * cos_TD[:, None]
    sin_T1d = sin_TD[:, None, :half]
    out[..., :half].addcmul_(x_Thd[..., half:], sin_T1d, value=-direction)
    out[..., half:].addcmul_(x_Thd[..., :half], sin_T1d, value=direction)
    return out
