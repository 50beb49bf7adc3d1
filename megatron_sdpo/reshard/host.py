"""Copies of buckets in host memory that is taken once and used again: page-locked where they come from a GPU.

A copy into memory that the system has yet to give, or that a GPU cannot write to directly, is thirty times slower.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNED = 16


class HostCopies:
    """Two sets of copies: one is written while the other is kept.

    Page-locked memory comes in powers of two: a bucket of 300 MB takes 512.
    """

    def __init__(self) -> None:
        self._sets: tuple[list[Tensor], list[Tensor]] = ([], [])

    def copy(self, which: int, bucket: int, pairs: Sequence[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
        """(name, copy) of each pair, in the place of what the same ``bucket`` of this set (0 or 1) held before.

        On a GPU they are complete after ``torch.cuda.synchronize``. Buckets come in order, from 0.
        """
        ends = [0]
        for _, tensor in pairs:
            ends.append(ends[-1] + tensor.nbytes + -tensor.nbytes % _ALIGNED)
        held = self._sets[which]
        if bucket == len(held):
            held.append(torch.empty(0, dtype=torch.uint8))
        if held[bucket].numel() != ends[-1]:
            on_gpu = any(tensor.is_cuda for _, tensor in pairs)
            held[bucket] = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=on_gpu)
        copies = []
        for (name, tensor), start in zip(pairs, ends, strict=False):
            place = held[bucket][start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            copies.append((name, place.copy_(tensor, non_blocking=True)))
        return copies
