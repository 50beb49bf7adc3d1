"""Packed rows, and the layer modules for machines without Transformer Engine, put in through the layer spec.

A micro-batch is one packed row: the tokens of all its sequences end to end, ``[T, 1, H]`` inside the model, with
``PackedRows`` saying where each begins. On a GPU Transformer Engine reads the same object.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_sdpo.mcore.experts import with_experts


class Padding:
    """Where packed tokens stand in right-padded blocks; computed once, shared by all layers.

    Sequences whose lengths lie within a factor of two share a block, so one long sequence does not widen many
    short ones. ``P`` counts the places of all blocks, block after block.

    ``blocks``: (sequences, width) of each. ``source_P`` (int64): the packed row in each place; a pad repeats its
    sequence's last token. ``position_P``: the place's position in its sequence. ``target_T`` (int64): the place of
    each packed row. ``cos_PD``, ``sin_PD``: rotary factors, set by the model before its layers run.
    """

    cos_PD: Tensor
    sin_PD: Tensor

    def __init__(self, lengths: Tensor) -> None:
        starts, device = torch.cumsum(lengths, 0) - lengths, lengths.device
        members_by_size: dict[int, list[int]] = {}
        for i, length in enumerate(lengths.tolist()):
            members_by_size.setdefault(length.bit_length(), []).append(i)
        blocks, sources, positions, insides = [], [], [], []
        for members in members_by_size.values():
            last_M1 = (lengths[members] - 1)[:, None]
            width = int(last_M1.max()) + 1
            position_MS = torch.arange(width, device=device).expand(len(members), -1)
            blocks.append((len(members), width))
            positions.append(position_MS.flatten())
            sources.append((starts[members][:, None] + torch.minimum(position_MS, last_M1)).flatten())
            insides.append((position_MS <= last_M1).flatten())
        self.blocks: tuple[tuple[int, int], ...] = tuple(blocks)
        self.source_P, self.position_P = torch.cat(sources), torch.cat(positions)
        places = torch.nonzero(torch.cat(insides)).squeeze(1)
        self.target_T = torch.empty_like(places)
        self.target_T[self.source_P[places]] = places


@dataclass
class PackedRows(PackedSeqParams):
    """Megatron's description of one packed row ("thd" format), plus what the CPU attention derives from it."""

    @functools.cached_property
    def padding(self) -> Padding:
        return Padding(torch.diff(self.cu_seqlens_q).long())


def packed_rows(lengths: Sequence[int], device: torch.device) -> PackedRows:
    """Describe a row that holds sequences of these lengths (tokens, each at least 1), end to end."""
    if not lengths or min(lengths) < 1:
        raise ValueError(f"a packed row needs sequences of at least one token, not lengths {list(lengths)}")
    ends = torch.tensor([0, *lengths]).cumsum(0).to(dtype=torch.int32, device=device)
    longest = max(lengths)
    return PackedRows(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
    )


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm, fp32 inside; the one Megatron ships refuses sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Megatron reads this mark to reduce the gradient over the tensor group.
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps).to(x.dtype)


class _Pad(torch.autograd.Function):
    """``[T, h, d] -> [P, h, d]``. Pads get zero gradient in causal attention, so backward is a plain gather."""

    @staticmethod
    def forward(ctx: Any, x_Thd: Tensor, padding: Padding) -> Tensor:
        ctx.padding = padding
        return x_Thd.index_select(0, padding.source_P)

    @staticmethod
    def backward(ctx: Any, grad_Phd: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad_Phd.index_select(0, ctx.padding.target_T), None


class _Unpad(torch.autograd.Function):
    """``[P, ...] -> [T, ...]``: drop the pads; their gradient is zero."""

    @staticmethod
    def forward(ctx: Any, x_P: Tensor, padding: Padding) -> Tensor:
        ctx.padding = padding
        return x_P.index_select(0, padding.target_T)

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_P = grad_T.new_zeros((len(ctx.padding.source_P), *grad_T.shape[1:]))
        return grad_P.index_copy_(0, ctx.padding.target_T, grad_T), None


def _rotate(x_Phd: Tensor, cos_PD: Tensor, sin_PD: Tensor) -> Tensor:
    """Rotary embedding, halves convention: ``x * cos + (-x2, x1) * sin``."""
    left, right = x_Phd.chunk(2, dim=-1)
    return x_Phd * cos_PD[:, None] + torch.cat((-right, left), dim=-1) * sin_PD[:, None]


class CausalAttention(MegatronModule):
    """Megatron's core attention on torch's scaled_dot_product_attention: causal, grouped queries, packed rows.

    A packed row is unpacked into right-padded sequences, so no mask is needed and no token can see another
    sequence. Rotary embedding happens here for packed rows (the model passes none to the layers): Megatron's own
    walks over the sequences in Python, in every layer.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels or 1)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: PackedRows | None = None,
        **_: Any,
    ) -> Tensor:
        """Packed: ``[T, h, d] -> [T, h * d]``; otherwise ``[s, b, h, d] -> [s, b, h * d]``, already rotated."""
        if attention_mask is not None:
            raise ValueError("CausalAttention takes no mask: it is causal within each sequence")
        if packed_seq_params is None:
            out = self._attend(*(x.permute(1, 2, 0, 3) for x in (query, key, value)))
            return out.permute(2, 0, 1, 3).flatten(2)
        padding = packed_seq_params.padding
        q_Phd, k_Phd, v_Phd = (_Pad.apply(x, padding) for x in (query, key, value))
        q_Phd, k_Phd = (_rotate(x, padding.cos_PD, padding.sin_PD) for x in (q_Phd, k_Phd))
        sizes = [n * width for n, width in padding.blocks]
        out, split = [], zip(*(x.split(sizes) for x in (q_Phd, k_Phd, v_Phd)), strict=True)
        for block, qkv in zip(padding.blocks, split, strict=True):
            attended = self._attend(*(x.unflatten(0, block).transpose(1, 2) for x in qkv))
            out.append(attended.transpose(1, 2).flatten(2).flatten(0, 1))
        return _Unpad.apply(out[0] if len(out) == 1 else torch.cat(out), padding)  # pyright: ignore

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``[n, h, s, d]`` each, keys and values with fewer heads under grouped queries."""
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=grouped)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Nothing to save: attention has no weights."""
        return {}


def cpu_block_spec(config: TransformerConfig, n_layers: int) -> TransformerBlockSubmodules:
    """The layers of one stage from the modules above and Megatron's own tensor-parallel linears."""
    spec: ModuleSpec = get_gpt_layer_local_spec(
        config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    layer: Any = spec.submodules
    if config.num_moe_experts:
        with_experts(layer)
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention = layer.self_attention.submodules
    attention.core_attention = CausalAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    # A bare layer spec would take Megatron's own norm for the final one.
    return TransformerBlockSubmodules(layer_specs=[spec] * n_layers, layer_norm=cast(Any, RMSNorm))
