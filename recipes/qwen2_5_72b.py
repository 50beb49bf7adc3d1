"""Qwen2.5-72B-Instruct by SDPO on 16 and 32 nodes of eight H100; layout and nodes are explained in _large.py.

FP8 has one scale a tensor: the MLP's 29568 units are 231 blocks of 128, which no useful number of tensor ranks divides,
so blockwise FP8 is refused. Needs ``models/Qwen2.5-72B`` and ``data/sciknoweval``.
"""

from megatron_sdpo.config import Config
from recipes import _large as large

MODEL = "Qwen2.5-72B"


def on_16_nodes() -> Config:
    """One copy on 64 GPUs, eight engines of eight: planned 66.7 GB a trainer rank, 99 s a step of 128 questions x 8."""
    return large.sdpo("qwen2.5-72b-sdpo-16n", MODEL, "tensorwise", copies=1)


def on_32_nodes() -> Config:
    """Two copies on 128 GPUs, sixteen engines of eight: planned 56.7 GB, 99 s a step of 256 questions x 8."""
    return large.sdpo("qwen2.5-72b-sdpo-32n", MODEL, "tensorwise", copies=2)


RECIPES = {"qwen2.5-72b-sdpo-16n": on_16_nodes, "qwen2.5-72b-sdpo-32n": on_32_nodes}
