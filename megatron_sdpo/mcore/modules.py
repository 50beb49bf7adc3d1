"""Packed rows, and the layer modules for machines without Transformer Engine, put in through the layer spec.

A micro-batch is one packed row: the tokens of all its sequences end to end, ``[T, 1, H]`` inside the model, with
``PackedRows`` saying where each begins. On a GPU Transformer Engine reads the same object.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_sdpo.batching import zigzag
from megatron_sdpo.mcore.continuing import Continuations, seen
from megatron_sdpo.mcore.elementwise import RMSNorm, SwiGLU, rotate
from megatron_sdpo.mcore.experts import with_experts

RUN_TOKENS = 64
"""A block of its own costs about as much as copying so many tokens into a padded one."""


class Padding:
    """Where packed tokens stand in right-padded blocks; computed once, shared by all layers.

    Sequences whose lengths lie within a factor of two share a block, so one long sequence does not widen many
    short ones. ``P`` counts the places of all blocks, block after block.

    ``blocks``: (sequences, width) of each. ``source_P`` (int64): the packed row in each place; a pad repeats its
    sequence's last token. ``target_T`` (int64): the place of each packed row. ``none``: the row as it is, is the
    blocks: sequences of one length stand together, and are many enough for a block of their own.
    """

    def __init__(self, lengths: Tensor) -> None:
        runs = [(len(list(equal)), length) for length, equal in itertools.groupby(lengths.tolist())]
        self.none = len(runs) == 1 or int(lengths.sum()) >= RUN_TOKENS * len(runs)
        if self.none:
            self.blocks: tuple[tuple[int, int], ...] = tuple(runs)
            return
        starts, device = torch.cumsum(lengths, 0) - lengths, lengths.device
        members_by_size: dict[int, list[int]] = {}
        for i, length in enumerate(lengths.tolist()):
            members_by_size.setdefault(length.bit_length(), []).append(i)
        blocks, sources, insides = [], [], []
        for members in members_by_size.values():
            last_M1 = (lengths[members] - 1)[:, None]
            width = int(last_M1.max()) + 1
            position_MS = torch.arange(width, device=device).expand(len(members), -1)
            blocks.append((len(members), width))
            sources.append((starts[members][:, None] + torch.minimum(position_MS, last_M1)).flatten())
            insides.append((position_MS <= last_M1).flatten())
        self.blocks = tuple(blocks)
        self.source_P = torch.cat(sources)
        places = torch.nonzero(torch.cat(insides)).squeeze(1)
        self.target_T = torch.empty_like(places)
        self.target_T[self.source_P[places]] = places


@dataclass
class PackedRows(PackedSeqParams):
    """Megatron's description of one packed row ("thd" format), plus what the CPU attention derives from it."""

    share: tuple[int, int] = (0, 1)
    """This context rank, of how many."""
    starts: tuple[int, ...] = ()
    """Position of each piece's first token, where some are not 0: such a piece continues the last one before it that
    begins at 0, and is longer by that on the side of keys and values (``cu_seqlens_kv``)."""
    rotary: tuple[Tensor, Tensor] | None = None
    """Cosine and sine, where the CPU attention wants them; set by the model before its layers run."""

    @functools.cached_property
    def padding(self) -> Padding:
        return Padding(torch.diff(self.cu_seqlens_q).long())

    @functools.cached_property
    def continuations(self) -> Continuations:
        return Continuations(torch.diff(self.cu_seqlens_q).long(), self.starts)

    @functools.cached_property
    def seen_S(self) -> Tensor:
        """int64, the packed rows whose keys and values each piece sees, piece after piece (``cu_seqlens_kv``)."""
        return seen(self._lengths, self.starts).to(self.cu_seqlens_q.device)

    @property
    def _lengths(self) -> list[int]:
        return torch.diff(self.cu_seqlens_q).tolist()

    @functools.cached_property
    def zigzag(self) -> "ZigZag":
        """Where tokens stand under context parallelism; the ranks are those of ``share``."""
        padded = self.cu_seqlens_q if self.cu_seqlens_q_padded is None else self.cu_seqlens_q_padded
        return ZigZag(torch.diff(padded).tolist(), *self.share)

    def set_rotary(self, cos_SD: Tensor, sin_SD: Tensor) -> None:
        """From those of every position of the longest sequence."""
        if self.share[1] > 1:
            position_T = self.zigzag.position_T
        else:
            begins = zip(self.starts or itertools.repeat(0), self._lengths, strict=False)
            position_T = torch.cat([torch.arange(start, start + n, device=cos_SD.device) for start, n in begins])
        self.rotary = cos_SD[position_T], sin_SD[position_T]


class ZigZag:
    """Where the tokens of a row stand that context ranks divide (``batching.zigzag``).

    ``position_T``: position in its sequence of each token that this rank holds. ``order_S``: the places, among all
    ranks' tokens one rank after the other, of the row's tokens in their order. ``sequences``: for each its slice of
    this rank's tokens and of the row.
    """

    def __init__(self, padded_lengths: Sequence[int], rank: int, ranks: int) -> None:
        shares = [zigzag(padded_lengths, r, ranks) for r in range(ranks)]
        position_S = torch.cat([torch.arange(n) for n in padded_lengths])
        self.position_T = position_S[shares[rank]]
        self.order_S = torch.cat(shares).argsort()
        self.sequences: list[tuple[slice, slice]] = []
        start = 0
        for length in padded_lengths:
            mine = slice(start // ranks, (start + length) // ranks)
            self.sequences.append((mine, slice(start, start + length)))
            start += length


class _GatherTokens(torch.autograd.Function):
    """``[T, ...]`` of each rank -> all of them, one rank after the other; gradients are summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, x_T: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = x_T.new_empty((group.size() * len(x_T), *x_T.shape[1:]))
        dist.all_gather_into_tensor(out, x_T.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        out = grad.new_empty((len(grad) // ctx.group.size(), *grad.shape[1:]))
        dist.reduce_scatter_tensor(out, grad.contiguous(), group=ctx.group)
        return out, None


def packed_rows(
    lengths: Sequence[int],
    device: torch.device,
    padded_lengths: Sequence[int] | None = None,
    share: tuple[int, int] = (0, 1),
    starts: Sequence[int] | None = None,
) -> PackedRows:
    """Describe a row that holds sequences of these lengths (tokens, each at least 1), end to end.

    ``padded_lengths`` are the lengths with the padding at the end of each; None: there is none. ``share``: this context
    rank, of how many that divide the row. ``starts``: position of each piece's first token, None: all 0; one that is
    not continues the last piece before it that begins at 0.
    """
    if not lengths or min(lengths) < 1:
        raise ValueError(f"a packed row needs sequences of at least one token, not lengths {list(lengths)}")
    padded = list(padded_lengths or lengths)
    ends, padded_ends = (
        torch.tensor([0, *x]).cumsum(0).to(dtype=torch.int32, device=device) for x in (lengths, padded)
    )
    longest = max(padded)
    row = PackedRows(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        share=share,
    )
    if starts is not None and any(starts):
        if padded != list(lengths):
            raise ValueError("pieces that continue others have no padding of their own")
        seen = [start + length for start, length in zip(starts, lengths, strict=True)]
        row.starts, row.max_seqlen_kv = tuple(starts), max(seen)
        row.cu_seqlens_kv = torch.tensor([0, *seen]).cumsum(0).to(dtype=torch.int32, device=device)
    if padded != list(lengths):
        row.cu_seqlens_q_padded = row.cu_seqlens_kv_padded = padded_ends
    return row


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


class CausalAttention(MegatronModule):
    """Megatron's core attention on torch's scaled_dot_product_attention: causal, grouped queries, packed rows.

    A packed row is unpacked into right-padded sequences, so no mask is needed and no token can see another
    sequence. Rotary embedding happens here for packed rows (the model passes none to the layers): Megatron's own
    walks over the sequences in Python, in every layer.

    Pieces that continue a shared beginning (``PackedRows.starts``) see it and themselves.

    Under context parallelism keys and values are gathered over the ranks and each sequence is masked by position:
    exact, made for checking layouts, not for long rows.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels or 1)
        self.context = pg_collection.cp if pg_collection is not None and config.context_parallel_size > 1 else None

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
        if self.context is not None:
            return self._over_ranks(query, key, value, packed_seq_params, self.context)
        rotary = packed_seq_params.rotary
        assert rotary is not None, "the model has not said how to rotate this row"
        q_Thd, k_Thd = (rotate(x, *rotary) for x in (query, key))
        if packed_seq_params.starts:
            return self._continuing(q_Thd, k_Thd, value, packed_seq_params.continuations)
        padding = packed_seq_params.padding
        if padding.none:
            return self._in_blocks((q_Thd, k_Thd, value), padding.blocks)
        padded: Any = [_Pad.apply(x, padding) for x in (q_Thd, k_Thd, value)]
        out: Any = _Unpad.apply(self._in_blocks(padded, padding.blocks), padding)
        return out

    def _in_blocks(self, qkv: Sequence[Tensor], blocks: Sequence[tuple[int, int]]) -> Tensor:
        """``[P, h, d]`` each -> ``[P, h * d]``; of each block (sequences, width)."""
        split = zip(*(x.split([n * width for n, width in blocks]) for x in qkv), strict=True)
        out = []
        for block, parts in zip(blocks, split, strict=True):
            attended = self._attend(*(x.unflatten(0, block).transpose(1, 2) for x in parts))
            out.append(attended.transpose(1, 2).flatten(2).flatten(0, 1))
        return out[0] if len(out) == 1 else torch.cat(out)

    def _continuing(self, q_Thd: Tensor, k_Thd: Tensor, v_Thd: Tensor, places: Continuations) -> Tensor:
        """``[T, h, d]`` each, rotated -> ``[T, h * d]``, where pieces continue others."""
        queries = q_Thd.index_select(0, places.queries_P).split([n * width for n, _, width in places.blocks])
        sizes = [n * (before + width) for n, before, width in places.blocks]
        keys, values = (x.index_select(0, places.keys_S).split(sizes) for x in (k_Thd, v_Thd))
        out = []
        for (n, _, _), sees, q, k, v in zip(places.blocks, places.masks, queries, keys, values, strict=True):
            q, k, v = (x.unflatten(0, (n, -1)).transpose(1, 2) for x in (q, k, v))
            attended = self._attend(q, k, v, sees)
            out.append(attended.transpose(1, 2).flatten(2).flatten(0, 1))
        return torch.cat(out).index_select(0, places.target_T)

    def _over_ranks(
        self, query: Tensor, key: Tensor, value: Tensor, rows: PackedRows, context: dist.ProcessGroup
    ) -> Tensor:
        """``[T, h, d]`` of this rank's tokens -> ``[T, h * d]``."""
        zigzag, rotary = rows.zigzag, rows.rotary
        assert rotary is not None, "the model has not said how to rotate this row"
        q_Thd, k_Thd = (rotate(x, *rotary) for x in (query, key))
        k_Shd, v_Shd = (
            _GatherTokens.apply(x, context).index_select(0, zigzag.order_S)  # pyright: ignore
            for x in (k_Thd, value)
        )
        out = []
        for mine, whole in zigzag.sequences:
            position_Q = zigzag.position_T[mine]
            sees_QS = position_Q[:, None] >= torch.arange(whole.stop - whole.start, device=position_Q.device)
            q, k, v = (x.transpose(0, 1)[None] for x in (q_Thd[mine], k_Shd[whole], v_Shd[whole]))
            out.append(self._attend(q, k, v, sees_QS)[0].transpose(0, 1).flatten(1))
        return torch.cat(out)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, sees: Tensor | None = None) -> Tensor:
        """``[n, h, s, d]`` each, keys and values with fewer heads under grouped queries; causal, or as in ``sees``."""
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=sees, is_causal=sees is None, scale=self.scale, enable_gqa=grouped
        )

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Nothing to save: attention has no weights."""
        return {}


def cpu_block_spec(
    config: TransformerConfig, n_layers: int, linears: tuple[type, type] | None = None
) -> TransformerBlockSubmodules:
    """The layers of one stage from the modules above and Megatron's own tensor-parallel linears.

    ``linears``: classes to take instead of its column-parallel and its row-parallel one.
    """
    spec: ModuleSpec = get_gpt_layer_local_spec(
        config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    layer: Any = spec.submodules
    if config.num_moe_experts:
        with_experts(layer)
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention = layer.self_attention.submodules
    attention.core_attention = CausalAttention
    mlp = layer.mlp.submodules
    mlp = mlp.experts.submodules if config.num_moe_experts else mlp
    mlp.activation_func = SwiGLU
    if linears is not None:
        attention.linear_qkv, attention.linear_proj = linears
        mlp.linear_fc1, mlp.linear_fc2 = linears
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    # A bare layer spec would take Megatron's own norm for the final one.
    return TransformerBlockSubmodules(layer_specs=[spec] * n_layers, layer_norm=cast(Any, RMSNorm))
