"""Weights into safetensors files, a tensor at a time."""

import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from torch import Tensor

INDEX = "model.safetensors.index.json"
_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
}


class SafetensorsWriter:
    """One model.safetensors, or numbered files and their index when there are more than ``shard_bytes``.

    Names, shapes and dtypes (``dtype`` but for those in ``others``) are known beforehand, so that each tensor has its
    place and none is kept; in a file those with the largest elements come first, so that all are aligned. A context
    manager; a tensor that is unknown, misshapen, of another dtype, given twice or not at all is a ValueError.

    Example:
        with SafetensorsWriter(folder, {"a.weight": (2, 3)}, torch.float32, 4 << 30) as writer:
            writer.write("a.weight", torch.zeros(2, 3))
    """

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        shard_bytes: int,
        others: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        self.folder, self.shapes = folder, dict(shapes)
        self.dtypes = {**dict.fromkeys(shapes, dtype), **(others or {})}
        self.total_bytes = sum(map(self._size, shapes))
        files = _dealt(((name, self._size(name)) for name in shapes), shard_bytes)
        many = len(files) > 1
        self._file_of: dict[str, str] = {}
        self._begin: dict[str, int] = {}
        """Where a tensor's bytes begin in its file."""
        self._streams: dict[str, IO[bytes]] = {}
        self._missing = set(shapes)
        for i, contents in enumerate(files):
            file = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" if many else "model.safetensors"
            self._start(file, sorted(contents, key=lambda name: -self.dtypes[name].itemsize))

    def write(self, name: str, tensor: Tensor) -> None:
        if name not in self._missing:
            raise ValueError(
                f"{name} is not a tensor of this model" if name not in self.shapes else f"{name} came twice"
            )
        if (tuple(tensor.shape), tensor.dtype) != (self.shapes[name], dtype := self.dtypes[name]):
            raise ValueError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, not {dtype} of {self.shapes[name]}"
            )
        stream = self._streams[self._file_of[name]]
        stream.seek(self._begin[name])
        as_bytes: Any = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
        stream.write(memoryview(as_bytes))
        self._missing.remove(name)

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream in self._streams.values():
            stream.close()
        if kind is not None:
            return
        if self._missing:
            raise ValueError(f"{min(self._missing)} and {len(self._missing) - 1} more were not written")
        if len(self._streams) > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": self._file_of}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _size(self, name: str) -> int:
        return prod(self.shapes[name]) * self.dtypes[name].itemsize

    def _start(self, file: str, contents: Iterable[str]) -> None:
        """Write the header; the bytes of the tensors follow it in the order of ``contents``."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in contents:
            begin, end = end, end + self._size(name)
            header[name] = {
                "dtype": _DTYPES[self.dtypes[name]],
                "shape": self.shapes[name],
                "data_offsets": [begin, end],
            }
            self._begin[name], self._file_of[name] = begin, file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # so that tensors are aligned
        stream = self._streams[file] = (self.folder / file).open("wb")
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in contents:
            self._begin[name] += stream.tell()


def _dealt(sizes: Iterable[tuple[str, int]], most: int) -> list[list[str]]:
    """Names in order, in lists whose sizes reach ``most`` at their last name."""
    files: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes:
        if filled >= most:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size
    return files
