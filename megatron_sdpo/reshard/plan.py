"""The publishing plan: which pipeline rank sends which tensors, in which bucket. Pure; no devices."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from megatron_sdpo.mcore import names
from megatron_sdpo.mcore.names import HfTensor


@dataclass(frozen=True, slots=True)
class Parameter:
    """A Megatron parameter and the Hugging Face tensors it becomes."""

    local: str
    """Its name on the ranks that hold it (``hf.canonical_parameters``)."""
    tensors: tuple[HfTensor, ...]

    @property
    def cut(self) -> bool:
        """Tensor ranks hold slices; otherwise each holds the whole."""
        return self.tensors[0].tp_axis is not None

    def expert_rank(self, ep_size: int) -> int | None:
        """The expert rank that holds it; None: all ranks of its stage do."""
        return self.tensors[0].expert_rank(ep_size)

    def elements(self) -> int:
        return sum(prod(tensor.shape) for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class Bucket:
    """What travels in one message, from the ranks of one pipeline rank. A parameter is never divided over two
    buckets, so tensors that an engine fuses again (q, k, v; gate, up) arrive together."""

    rank: int
    """Of the pipeline."""
    parameters: tuple[Parameter, ...]

    @property
    def tensors(self) -> tuple[HfTensor, ...]:
        return tuple(tensor for parameter in self.parameters for tensor in parameter.tensors)


def plan(
    hf_config: Mapping[str, Any], pp_size: int, element_bytes: int, bucket_bytes: int, vp_size: int = 1
) -> tuple[Bucket, ...]:
    """Buckets of about ``bucket_bytes``, in the order in which they are sent: by pipeline rank, then in forward order.

    Every tensor of the checkpoint is in exactly one bucket; a parameter larger than ``bucket_bytes`` has its own.
    A tied embedding is sent by the first stage only. With ``vp_size`` above 1 a pipeline rank holds as many stages,
    ``pp_size`` apart.
    """
    buckets: list[Bucket] = []
    stages = pp_size * vp_size
    for rank in range(pp_size):
        held: list[Parameter] = []
        size = 0
        for tensors in names.parameters(hf_config).values():
            chunk, on_rank = divmod(tensors[0].stage(stages), pp_size)
            if on_rank != rank:
                continue
            local = tensors[0].local(stages)
            parameter = Parameter(local if vp_size == 1 else f"{chunk}.{local}", tensors)
            more = parameter.elements() * element_bytes
            if held and size + more > bucket_bytes:
                buckets.append(Bucket(rank, tuple(held)))
                held, size = [], 0
            held.append(parameter)
            size += more
        buckets.append(Bucket(rank, tuple(held)))
    return tuple(buckets)
