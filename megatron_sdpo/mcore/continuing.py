"""Attention for rows of which some pieces continue others (``PackedRows.starts``).

Each piece gets a copy of the keys and values of the beginning that it continues, in front of its own, for the time of
one layer's attention: on a CPU pieces of like size are a block with a mask (``Continuations``, for
``modules.CausalAttention``), on a GPU see ``te_attention``.
"""

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


class Continuations:
    """Where packed tokens stand in blocks of queries and of all keys that these see, pads among both.

    A block has pieces that continue beginnings of one length (of none: 0) and whose own lengths lie within a factor of
    two. One mask over a whole group takes twice as long, as most of it is hidden. To attend to both parts one
    after the other and weigh them by log-sum-exp saves a tenth to a fifth of the time for long beginnings, costs a
    tenth for short ones, and needs an operator that torch does not show.

    ``blocks``: (pieces, tokens before each, width). ``queries_P``, ``keys_S`` (int64): the packed row in each place,
    block after block. ``target_T`` (int64): the place of each packed row among the queries.
    """

    def __init__(self, lengths: Tensor, starts: Sequence[int]) -> None:
        row_starts, device = torch.cumsum(lengths, 0) - lengths, lengths.device
        heads = list(itertools.accumulate(range(len(starts)), lambda head, i: i if starts[i] == 0 else head))
        members_by_block: dict[tuple[int, int], list[int]] = {}
        for i, length in enumerate(lengths.tolist()):
            members_by_block.setdefault((starts[i], length.bit_length()), []).append(i)
        blocks, queries, keys, insides = [], [], [], []
        for (before, _), members in members_by_block.items():
            last_M1 = (lengths[members] - 1)[:, None]
            width = int(last_M1.max()) + 1
            position_MW = torch.arange(width, device=device).expand(len(members), -1)
            own_MW = row_starts[members][:, None] + torch.minimum(position_MW, last_M1)
            head_MB = row_starts[[heads[i] for i in members]][:, None] + torch.arange(before, device=device)
            blocks.append((len(members), before, width))
            queries.append(own_MW.flatten())
            keys.append(torch.cat((head_MB, own_MW), 1).flatten())
            insides.append((position_MW <= last_M1).flatten())
        self.blocks: tuple[tuple[int, int, int], ...] = tuple(blocks)
        self.queries_P, self.keys_S = torch.cat(queries), torch.cat(keys)
        places = torch.nonzero(torch.cat(insides)).squeeze(1)
        self.target_T = torch.empty_like(places)
        self.target_T[self.queries_P[places]] = places

    @functools.cached_property
    def masks(self) -> list[Tensor | None]:
        """For each block which keys its queries see, ``[width, before + width]``; None: plainly causal."""
        device = self.target_T.device
        return [
            torch.ones(width, before + width, dtype=torch.bool, device=device).tril(before) if before else None
            for _, before, width in self.blocks
        ]


def seen(lengths: Sequence[int], starts: Sequence[int]) -> Tensor:
    """int64, the packed rows whose keys each piece sees, piece after piece.

    Example: lengths 2, 1, 1 with starts 0, 2, 2 give 0, 1; 0, 1, 2; 0, 1, 3.
    """
    parts: list[Tensor] = []
    head = torch.empty(0, dtype=torch.int64)
    for start, own in zip(starts, torch.arange(sum(lengths)).split(list(lengths)), strict=True):
        head = own if start == 0 else head
        parts += [own] if start == 0 else [head, own]
    return torch.cat(parts)
