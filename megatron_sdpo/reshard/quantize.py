"""What FP8 engines load: codes and scales of the layers' linears, the rest as it is (fp8_format.py).

The trainer's own products are of the same codes, to the bit, wherever its blocks are those of the Hugging Face tensors.
It quantises a rank's local weight, which is made of parts (names.py): ``linear_fc1`` is ``[gate; up]``, ``linear_qkv``
has a group of query heads, their key head and their value head in turn. Blocks of 128 rows do not cross from one part
into the next when head_dim and each rank's MLP units are multiples of 128, nor do those of the row-parallel linears
when a rank's columns are. With a head_dim of 64 a trainer's block of ``linear_qkv`` may hold half of a key and half of
a value head, while an engine's holds two key heads: the same numbers by other scales, an error of the same size as FP8
itself makes. That is allowed; ``sync/probe_gap`` and the importance weights show it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from megatron_sdpo.fp8_format import is_quantized, scale_name
from megatron_sdpo.quantization import quantized_blocks

Tensors = list[tuple[str, Tensor]]


def quantized(hf_config: Mapping[str, Any], kept: int, pairs: Tensors) -> Tensors:
    """(name, tensor) pairs of a bucket -> those that FP8 engines load, where the tensors lie.

    ``X.weight`` ``[N, K]`` of a linear becomes ``X.weight`` (float8_e4m3fn, ``[N, K]``) and ``X.weight_scale_inv``
    (fp32, ``[ceil(N / 128), ceil(K / 128)]``); ``kept`` layers at each end have none. Largest elements first: an engine
    receives a bucket as bytes and views each tensor in its place there, which must be a multiple of its element's size.
    """
    made = [found for name, tensor in pairs for found in encoded(hf_config, kept, name, tensor)]
    return sorted(made, key=lambda pair: -pair[1].element_size())


def encoded(hf_config: Mapping[str, Any], kept: int, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What becomes of one tensor."""
    if not is_quantized(name, hf_config["num_hidden_layers"], kept):
        yield name, tensor
        return
    codes, scales = quantized_blocks(tensor)
    yield name, codes
    yield scale_name(name), scales
