"""Transformer Engine's attention for rows of which some pieces continue others (``PackedRows.starts``).

Queries are fewer than keys, and causal from the last of both on ("bottom right"), which flash attention and cuDNN
(since 9.7, on Hopper) do for packed rows. Written for Transformer Engine 2.11, with which it ran on an H200. Where no
backend does it, Transformer Engine says that it has none.
"""

from typing import Any

from torch import Tensor

from megatron_sdpo.mcore.elementwise import rotate
from megatron_sdpo.mcore.modules import PackedRows


def with_continuations(layer: Any) -> None:
    """Put it into a layer's submodules (of a layer spec), around Megatron's class."""
    attention = layer.self_attention.submodules
    attention.core_attention = continuing(attention.core_attention)


def continuing(given: Any) -> Any:
    """A subclass of Megatron's ``TEDotProductAttention``; rows in which nothing is continued go the way they went."""

    class ContinuingAttention(given):
        def forward(
            self,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Tensor | None,
            *args: Any,
            packed_seq_params: PackedRows | None = None,
            **kwargs: Any,
        ) -> Tensor:
            """``[T, h, d]`` each, not yet rotated where pieces are continued -> ``[T, h * d]``."""
            rows = packed_seq_params
            if rows is None or not rows.starts:
                return super().forward(query, key, value, attention_mask, *args, packed_seq_params=rows, **kwargs)
            rotary = rows.rotary
            assert rotary is not None, "the model has not said how to rotate this row"
            q_Thd, k_Thd = (rotate(x.float(), *rotary).to(x.dtype) for x in (query, key))
            # Transformer Engine's own forward: Megatron's has no name for this mask.
            return super(given, self).forward(
                q_Thd,
                k_Thd.index_select(0, rows.seen_S),
                value.index_select(0, rows.seen_S),
                None,
                qkv_format="thd",
                attn_mask_type="padding_causal_bottom_right",
                cu_seqlens_q=rows.cu_seqlens_q,
                cu_seqlens_kv=rows.cu_seqlens_kv,
                max_seqlen_q=rows.max_seqlen_q,
                max_seqlen_kv=rows.max_seqlen_kv,
            )

    return ContinuingAttention
