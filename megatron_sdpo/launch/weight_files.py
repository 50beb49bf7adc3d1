"""The files of a Hugging Face checkpoint before anybody loads them: whole? how many weights? Headers only; no torch."""

import json
import math
import struct
from pathlib import Path
from typing import Any

from megatron_sdpo.config import ConfigError, read_json

INDEX = "model.safetensors.index.json"
LONGEST_HEADER = 100_000_000
"""Bytes, as safetensors itself has it."""


def count_weights(folder: Path) -> int:
    """Numbers in all tensors; ConfigError names a file that is missing, cut short, or something else (what Git LFS or a
    download that broke off leaves)."""
    index = folder / INDEX
    listed = sorted(set(read_json(index, "the index of the weights")["weight_map"].values())) if index.exists() else []
    missing = [name for name in listed if not (folder / name).is_file()]
    if missing:
        raise ConfigError(
            f"{INDEX} of {folder} names {len(missing)} file(s) that are not there, such as {missing[0]}; download the"
            " whole checkpoint"
        )
    files = [folder / name for name in listed] or sorted(folder.glob("*.safetensors"))
    return sum(math.prod(tensor["shape"]) for file in files for tensor in _tensors(file))


def _tensors(file: Path) -> list[dict[str, Any]]:
    """dtype, shape and place of each tensor of a file, which is long enough to hold them."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else LONGEST_HEADER + 1
        header = opened.read(length) if length <= LONGEST_HEADER else b""
    try:
        tensors = [tensor for name, tensor in json.loads(header).items() if name != "__metadata__"]
        end = 8 + length + max((tensor["data_offsets"][1] for tensor in tensors), default=0)
    except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise ConfigError(
            f"{file} ({size:,} bytes) is not a safetensors file: Git LFS leaves a pointer where `git lfs pull` has not"
            " run; download the whole checkpoint"
        ) from error
    if size < end:
        raise ConfigError(f"{file} has {size:,} bytes of {end:,}: it was cut; download the whole checkpoint")
    return tensors
