"""A fingerprint of weights: the same for the same names, shapes, dtypes and bits, wherever the tensors live."""

import hashlib
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = {"cpu": 1 << 20, "cuda": 1 << 25}
"""So few bytes that a CPU keeps what is made of them in its caches; so many that a GPU is busy."""
_ROW = 128
"""Bytes whose sums are found by a matrix product: in fp32, and in the narrower formats that a product may take for it,
these are exact integers, whatever the order."""


def checksum(tensor: Tensor, chunk: int | None = None) -> int:
    """A 64-bit sum of the tensor's bytes, each times its place, so that any change of one byte and any two bytes
    swapped show. Computed where the tensor lies, ``chunk`` bytes at a time, which does not change the result.
    """
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    chunk = chunk or _CHUNK["cpu" if data.is_cpu else "cuda"]
    place_B = torch.arange(1.0, _ROW + 1, device=data.device)
    weights_B2 = torch.stack([torch.ones_like(place_B), place_B], dim=1)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for start in range(0, data.numel(), chunk):
        part = data[start : start + chunk]
        if more := -len(part) % _ROW:
            part = F.pad(part, (0, more))  # zeros add nothing
        plain_R, placed_R = (part.view(-1, _ROW).float() @ weights_B2).long().unbind(dim=1)
        first_R = torch.arange(start, start + len(part), _ROW, device=data.device)
        total += (plain_R * first_R + placed_R).sum()  # wraps around at 2**64, on every device alike
    return int(total)


def digest(lines: Iterable[str]) -> str:
    """16 hexadecimal digits over ``describe`` lines, whatever their order."""
    return hashlib.blake2b("\n".join(sorted(lines)).encode(), digest_size=8).hexdigest()


def describe(name: str, tensor: Tensor) -> str:
    """Example: ``"model.norm.weight float32 (96,) 1234567"``"""
    return f"{name} {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} {checksum(tensor)}"
