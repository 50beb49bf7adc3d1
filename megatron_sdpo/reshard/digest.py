"""A fingerprint of weights: the same for the same names, shapes, dtypes and bits, wherever the tensors live."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

_CHUNK = 1 << 20


def checksum(tensor: Tensor, chunk: int = _CHUNK) -> int:
    """A 64-bit sum of the tensor's bytes, each times its place, so that any change of one byte and any two bytes
    swapped show. Computed where the tensor lies, ``chunk`` bytes at a time (that does not change the result).
    """
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for start in range(0, data.numel(), chunk):
        part = data[start : start + chunk].to(torch.int64)
        place = torch.arange(start + 1, start + 1 + part.numel(), device=data.device)
        total += (part * place).sum()  # wraps around at 2**64, on every device alike
    return int(total)


def digest(lines: Iterable[str]) -> str:
    """16 hexadecimal digits over ``describe`` lines, whatever their order."""
    return hashlib.blake2b("\n".join(sorted(lines)).encode(), digest_size=8).hexdigest()


def describe(name: str, tensor: Tensor) -> str:
    """Example: ``"model.norm.weight float32 (96,) 1234567"``"""
    return f"{name} {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} {checksum(tensor)}"
