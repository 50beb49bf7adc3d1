"""Block FP8 on a machine without CUDA: the numbers of SGLang's FP8 layers, in plain torch.

SGLang's own CPU kernels want a CPU with AMX and a build of ``sgl_kernel``. Here the products of its two FP8 methods are
those of quantization.py: the codes of the weights, and activations quantised for each 128 numbers of a row. Its loading
of weights and scales, fused and cut over tensor ranks, is used as it is. Slow; made for tests.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_sdpo.fp8_format import KEY

_FP8 = "MEGATRON_SDPO_FP8_ENGINE"


def is_asked_for(arguments: Sequence[str]) -> bool:
    """Whether these SGLang arguments, or the checkpoint that they name, say that the model is in FP8."""
    said = {name: value for name, _, value in (argument.partition("=") for argument in arguments)}
    if KEY in json.loads(said.get("--json-model-override-args", "{}")):
        return True
    file = Path(said.get("--model-path", "")) / "config.json"
    return file.is_file() and KEY in json.loads(file.read_text())


def switch_on() -> None:
    """For this process and those that it starts."""
    os.environ[_FP8] = "1"
    provide()


def provide() -> None:
    """The products; nothing where ``switch_on`` was not called. Imports sglang."""
    if os.environ.get(_FP8) != "1":
        return
    import torch
    from sglang.srt.layers.quantization import fp8

    both: Any = (fp8.Fp8LinearMethod, fp8.Fp8MoEMethod)
    for method in both:
        # Packs weights for kernels that are not there.
        method.process_weights_after_loading = lambda self, layer: None
    fp8.Fp8LinearMethod.apply = linear
    fp8.Fp8MoEMethod.apply = experts
    supported = [torch.float32, *fp8.Fp8Config.get_supported_act_dtypes()]
    fp8.Fp8Config.get_supported_act_dtypes = classmethod(lambda cls: supported)  # pyright: ignore[reportAttributeAccessIssue]


def product(x: Any, codes_NK: Any, scales_AB: Any) -> Any:
    """``[..., K]`` -> ``[..., N]``, in x's dtype."""
    from megatron_sdpo.quantization import of_blocks, of_rows, quantized_rows

    x_TK = of_rows(*quantized_rows(x.reshape(-1, x.shape[-1])))
    return (x_TK @ of_blocks(codes_NK, scales_AB).t()).to(x.dtype).unflatten(0, x.shape[:-1])


def linear(self: Any, layer: Any, x: Any, bias: Any = None) -> Any:
    """In the place of ``Fp8LinearMethod.apply``."""
    if not self.block_quant:
        raise NotImplementedError("on a CPU without AMX only FP8 in blocks is computed here")
    y = product(x, layer.weight, layer.weight_scale_inv)
    return y if bias is None else y + bias


def experts(self: Any, layer: Any, dispatch_output: Any) -> Any:
    """In the place of ``Fp8MoEMethod.apply``: every token by its experts, one expert after the other."""
    import torch
    import torch.nn.functional as F
    from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput

    settings = self.moe_runner_config
    if not self.block_quant or settings.activation != "silu" or settings.apply_router_weight_on_input:
        raise NotImplementedError("on a CPU without AMX only gated SiLU experts with FP8 in blocks are computed here")
    x_TH = dispatch_output.hidden_states
    weights_TE, ids_TE, _ = dispatch_output.topk_output
    out_TH = torch.zeros_like(x_TH)
    for expert in ids_TE.unique().tolist():
        if expert < 0:  # of a token that is padding
            continue
        tokens, places = (ids_TE == expert).nonzero(as_tuple=True)
        gate, up = product(x_TH[tokens], layer.w13_weight[expert], layer.w13_weight_scale_inv[expert]).chunk(2, -1)
        y = product(F.silu(gate) * up, layer.w2_weight[expert], layer.w2_weight_scale_inv[expert])
        out_TH.index_add_(0, tokens, y * weights_TE[tokens, places, None].to(y.dtype))
    return StandardCombineInput(hidden_states=out_TH)
