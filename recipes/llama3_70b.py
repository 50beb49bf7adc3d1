"""Llama-3.3-70B-Instruct by SDPO on 16 and 32 nodes of eight H100; layout and nodes are explained in _large.py.

FP8 is blockwise, the layout of DeepSeek's and SGLang's FP8 checkpoints: tp4 leaves each rank whole blocks of 128 (two
key-value heads of 128, 7168 MLP units). Needs ``models/Llama-3.3-70B`` and ``data/sciknoweval``.
"""

from megatron_sdpo.config import Config
from recipes import _large as large

MODEL = "Llama-3.3-70B"


def on_16_nodes() -> Config:
    """One copy on 64 GPUs, eight engines of eight: planned 64.7 GB a trainer rank, 96 s a step of 128 questions x 8."""
    return large.sdpo("llama3.3-70b-sdpo-16n", MODEL, "blockwise", copies=1)


def on_32_nodes() -> Config:
    """Two copies on 128 GPUs, sixteen engines of eight: planned 55.1 GB, 96 s a step of 256 questions x 8."""
    return large.sdpo("llama3.3-70b-sdpo-32n", MODEL, "blockwise", copies=2)


RECIPES = {"llama3.3-70b-sdpo-16n": on_16_nodes, "llama3.3-70b-sdpo-32n": on_32_nodes}
