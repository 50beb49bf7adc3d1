"""Samples that follow from a seed, on a machine without CUDA.

SGLang draws a request's tokens from a hash of its ``sampling_seed`` and the position when it is started with
``--enable-deterministic-inference``. On a GPU that also makes its kernels give a row the same numbers in every batch.
For a CPU it offers neither: the hash is a compiled kernel that the wheel lacks, and matrix products round differently
in batches of different sizes. Here are the hash, and arguments by which an engine works on one request at a time.
"""

import os
import sys
from types import ModuleType
from typing import Any

SEEDED = "--enable-deterministic-inference"
"""SGLang's switch, on every machine: what a request is answered follows from its seed alone."""
SERVER_ARGS: tuple[str, ...] = ("--max-running-requests=1", "--disable-radix-cache")
"""After the user's: one request is the whole batch, and computes all of its prompt whatever came before."""

_DETERMINISTIC = "MEGATRON_SDPO_DETERMINISTIC_ENGINE"
_WORD = 0xFFFFFFFF

_kept_alive: list[Any] = []


def switch_on() -> None:
    """For this process and those that it starts; before they import torch."""
    os.environ[_DETERMINISTIC] = "1"
    os.environ["TORCH_COMPILE_DISABLE"] = "1"  # SGLang compiles the sampler, for which a machine may lack the compiler
    provide()


def provide() -> None:
    """What SGLang lacks for its switch on a CPU; nothing where ``switch_on`` was not called. Imports sglang."""
    if os.environ.get(_DETERMINISTIC) != "1":
        return
    import torch
    from sglang.srt import batch_invariant_ops
    from sglang.srt.arg_groups import choices

    choices.add_deterministic_attention_backend_choices(["torch_native"])
    # Its kernels are for GPUs, and a batch of one has no other sizes to be invariant to.
    batch_invariant_ops.enable_batch_invariant_mode = lambda *args, **kwargs: None
    if _is_placeholder(sys.modules.get("sgl_kernel")) and not hasattr(torch.ops.sgl_kernel, "murmur_hash32_cpu"):
        library = torch.library.Library("sgl_kernel", "FRAGMENT")
        library.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor col_indices) -> Tensor")
        library.impl("murmur_hash32_cpu", murmur_hash32, "CPU")
        _kept_alive.append(library)


def _is_placeholder(module: ModuleType | None) -> bool:
    return module is not None and getattr(module, "__file__", None) is None


def murmur_hash32(seeds_N: Any, positions_N: Any, columns_V: Any) -> Any:
    """MurmurHash3 of (seed's low word, seed's high word, position, column), as SGLang's GPU kernel: uint32 ``[N, V]``.

    ``seeds_N`` is uint64, the others hold integers. Computed in int64, whose low words do not mind that it overflows.
    """
    import torch

    seeds_N1 = seeds_N.view(torch.int64)[:, None]
    state: Any = torch.zeros((), dtype=torch.int64)
    for block in (seeds_N1, seeds_N1 >> 32, positions_N.to(torch.int64)[:, None], columns_V.to(torch.int64)[None, :]):
        mixed = _rotated((block & _WORD) * 0xCC9E2D51 & _WORD, 15) * 0x1B873593 & _WORD
        state = (_rotated(state ^ mixed, 13) * 5 + 0xE6546B64) & _WORD
    state = state ^ 16  # the length in bytes
    state = (state ^ (state >> 16)) * 0x85EBCA6B & _WORD
    state = (state ^ (state >> 13)) * 0xC2B2AE35 & _WORD
    return (state ^ (state >> 16)).to(torch.uint32)


def _rotated(words: Any, by: int) -> Any:
    return ((words << by) | (words >> (32 - by))) & _WORD
