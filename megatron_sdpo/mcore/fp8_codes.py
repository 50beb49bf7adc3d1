"""A teacher's passes in blockwise FP8 write codes at once; Transformer Engine writes numbers and reads them again.

Its norm and its gated unit write bf16, from which a second kernel makes the codes that the next product takes. Where
no backward pass wants anything else, one kernel does both (``quantization.quantized_rms_norm``, ``quantized_swiglu``),
with nearly the same roundings. The student's scoring passes go the way of its training passes, whose log-probs they
stand for; so do other precisions, and whatever fits no blocks of 128.

Written for Transformer Engine 2.11.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from megatron_sdpo.quantization import BLOCK, quantized_rms_norm, quantized_swiglu

_asked = False


@contextmanager
def written_at_once(asked: bool = True) -> Iterator[None]:
    """Within the block passes that nobody differentiates may write codes at once."""
    global _asked
    before, _asked = _asked, asked
    try:
        yield
    finally:
        _asked = before


def write_codes_when_asked(layers: Any) -> None:
    """Of these layers, made of Transformer Engine's modules; its norms before a linear are replaced everywhere."""
    from transformer_engine.pytorch.module import layernorm_linear

    given = layernorm_linear.apply_normalization
    if not isinstance(given, partial):
        layernorm_linear.apply_normalization = partial(_normalized, given)
    for layer in layers:
        mlp: Any = layer.mlp
        if type(layer.mlp) is MLP:
            mlp.forward = partial(_mlp, mlp, mlp.forward)


def _at_once() -> bool:
    """Whether it was asked for, in a pass that nobody will differentiate, in blockwise FP8."""
    if not _asked or torch.is_grad_enabled():
        return False
    from transformer_engine.pytorch.distributed import is_fp8_activation_recompute_enabled
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    if not FP8GlobalStateManager.is_fp8_enabled():
        return False
    # What is computed again for a backward pass is computed first without one.
    return FP8GlobalStateManager.get_fp8_recipe().float8_block_scaling() and not is_fp8_activation_recompute_enabled()


def _mlp(
    mlp: Any, given: Callable[..., Any], hidden_T1H: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any
) -> Any:
    """Megatron's, whose gated unit becomes codes on the way."""
    units = mlp.linear_fc2.weight.shape[1]
    if per_token_scale is not None or mlp.config.add_bias_linear or units % BLOCK or not _at_once():
        return given(hidden_T1H, per_token_scale, **kwargs)
    gates_T12F, _ = mlp.linear_fc1(hidden_T1H)
    codes_TF, scales_BT = quantized_swiglu(gates_T12F.view(-1, 2 * units))
    return mlp.linear_fc2(_as_tensor(codes_TF, scales_BT, (*gates_T12F.shape[:-1], units), gates_T12F.dtype))


def _normalized(
    given: Callable[..., Any],
    x_TH: Tensor,
    out: Any,
    weight_H: Tensor,
    bias: Tensor | None,
    eps: float,
    quantizer: Any,
    dtype: torch.dtype,
    normalization: str,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> Any:
    """Transformer Engine's ``apply_normalization``: (normed, mean, deviation), the last two for a backward pass."""
    fits = x_TH.is_contiguous() and x_TH.shape[1] % BLOCK == 0 and dtype == x_TH.dtype
    plain = normalization == "RMSNorm" and bias is None and out is None and not zero_centered_gamma
    if not (fits and plain and quantizer is not None and _at_once() and _as_ours(quantizer)):
        return given(*(x_TH, out, weight_H, bias, eps, quantizer, dtype, normalization, sm_margin, zero_centered_gamma))
    return _as_tensor(*quantized_rms_norm(x_TH, weight_H, eps), x_TH.shape, dtype), None, None


def _as_ours(quantizer: Any) -> bool:
    """Whether it would make the codes of ``quantization.quantized_rows``, laid out for products."""
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer

    if not isinstance(quantizer, Float8BlockQuantizer) or quantizer.columnwise_usage or quantizer.all_gather_usage:
        return False
    return quantizer.block_scaling_dim == 1 and quantizer.amax_epsilon == 0.0 and not quantizer.force_pow_2_scales


def _as_tensor(codes: Tensor, scales_BT: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    """What Transformer Engine's quantizer would have made: codes as bytes, scales as products want them, for which the
    tokens of a rank are a multiple of four (``fp8.token_multiple``)."""
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer, Float8BlockwiseQTensor

    quantizer = Float8BlockQuantizer(
        fp8_dtype=tex.DType.kFloat8E4M3,
        rowwise=True,
        columnwise=False,
        amax_epsilon=0.0,
        force_pow_2_scales=False,
        block_scaling_dim=1,
    )
    return Float8BlockwiseQTensor(
        shape=shape,
        dtype=dtype,
        device=codes.device,
        rowwise_data=codes.view(torch.uint8).view(shape),
        rowwise_scale_inv=scales_BT,
        columnwise_data=None,
        columnwise_scale_inv=None,
        fp8_dtype=tex.DType.kFloat8E4M3,
        quantizer=quantizer,
        is_2D_scaled=False,
    )
