"""Which passes multiply by the layers' weights in FP8, through Transformer Engine or, emulated, in plain torch.

Student and teacher are one model whose weights are exchanged, so its precision is a switch of the pass. Transformer
Engine quantises a weight when a schedule first uses it and keeps the codes for the other micro-batches of the pass:
each pass quantises anew, so codes are never older than the weights in the model.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_sdpo.config import ConfigError, Fp8Config, Fp8Kind
from megatron_sdpo.mcore.fp8_codes import written_at_once
from megatron_sdpo.quantization import BLOCK, BlockLinear

INSTALL = "install the extra gpu (transformer-engine 2.11) on a machine with a Hopper GPU"


class _Emulated:
    """Of a linear of Megatron's: products on block-quantised numbers while ``quantised``, its own otherwise."""

    quantised = False

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.quantised:
            return super()._forward_impl(input, weight, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        # What Megatron's function does besides the product: gather tokens, or sum the input's gradient over ranks.
        if kwargs["sequence_parallel"]:
            input = gather_from_sequence_parallel_region(input, group=kwargs["tp_group"])
        elif kwargs["allreduce_dgrad"]:
            input = copy_to_tensor_model_parallel_region(input, group=kwargs["tp_group"])
        out: Any = BlockLinear.apply(input, weight)
        return out if kwargs["bias"] is None else out + kwargs["bias"]


class EmulatedColumnLinear(_Emulated, ColumnParallelLinear):
    """Megatron's column-parallel linear in emulated FP8."""


class EmulatedRowLinear(_Emulated, RowParallelLinear):
    """Megatron's row-parallel linear in emulated FP8."""


class Precision:
    """The precision of the passes of one rank's stages; in model.dtype outside ``of``."""

    def __init__(self, stages: Sequence[Any], fp8: Fp8Config) -> None:
        """``stages``: the models of this rank, built for ``fp8``."""
        self.fp8, self._stages = fp8, stages
        kept, self._linears = fp8.high_precision_layers, []
        for stage in stages:
            stage.config.fp8 = None
            for layer in stage.decoder.layers:
                if kept < layer.layer_number <= stage.config.num_layers - kept:
                    self._linears += [module for module in layer.modules() if isinstance(module, _Emulated)]

    @contextmanager
    def of(self, kind: Fp8Kind, at_once: bool = False) -> Iterator[None]:
        """Within the block passes run in FP8 of this kind, which the model was built for, or (off) in model.dtype.

        ``at_once``: faster where no backward pass follows, and a little differently rounded (fp8_codes.py).
        """
        if kind not in ("off", *self.fp8.kinds):
            raise ValueError(f"the model was built for fp8 {self.fp8.kinds}, not for {kind}")
        self._switch(kind)
        try:
            with written_at_once(at_once):
                yield
        finally:
            self._switch("off")

    def _switch(self, kind: Fp8Kind) -> None:
        for linear in self._linears:
            linear.quantised = kind == "emulated"
        for stage in self._stages:
            stage.config.fp8 = "e4m3" if kind in ("blockwise", "tensorwise") else None


def uses_transformer_engine(dtype: torch.dtype, fp8: Fp8Config) -> bool:
    """Whether a model is made of Transformer Engine's modules: in bf16 on a GPU, if it is there.

    Its attention has no fp32; and an emulation is one of the plain modules.
    """
    exists = torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
    return exists and dtype == torch.bfloat16 and "emulated" not in fp8.kinds


def megatron_settings(fp8: Fp8Config) -> dict[str, Any]:
    """Megatron's keys for Transformer Engine's FP8; none for the emulation, of which Megatron knows nothing."""
    if not fp8.kinds or fp8.kinds == ("emulated",):
        return {}
    kept = fp8.high_precision_layers
    return {
        "fp8": "e4m3",  # gradients too: a block's range is small
        "fp8_recipe": fp8.kinds[0],
        "first_last_layers_bf16": kept > 0,
        "num_layers_at_start_in_bf16": kept,
        "num_layers_at_end_in_bf16": kept,
    }


def token_multiple(fp8: Fp8Config) -> int:
    """What the tokens of a rank must be a multiple of: blocks run along tokens too, in the weights' gradients."""
    return BLOCK if {"blockwise", "tensorwise"} & set(fp8.kinds) else 1


def check_backend(fp8: Fp8Config) -> None:
    """ConfigError where nothing multiplies in the FP8 that is asked for: Megatron would go on without, silently."""
    if not fp8.kinds or fp8.kinds == ("emulated",):
        return
    asked = f"fp8 {fp8.kinds[0]} needs"
    if not torch.cuda.is_available():
        raise ConfigError(f"{asked} a GPU, and torch sees none; run on one, or set fp8.student and fp8.teacher to off")
    try:
        import transformer_engine.pytorch as te
    except Exception as error:  # a library that it does not find is a RuntimeError or an OSError
        raise ConfigError(f"{asked} Transformer Engine, which does not load ({error}); {INSTALL}") from error
    blockwise = fp8.kinds == ("blockwise",)
    able, why = (te.is_fp8_block_scaling_available if blockwise else te.is_fp8_available)(return_reason=True)
    if not able:
        raise ConfigError(
            f"{asked} hardware or libraries that are not here: {why}; set fp8.student and fp8.teacher to off"
        )
