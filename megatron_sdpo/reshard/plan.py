"""The publishing plan: which pipeline stage sends which tensors, in which bucket. Pure; no devices."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from megatron_sdpo.mcore import names
from megatron_sdpo.mcore.names import HfTensor


@dataclass(frozen=True, slots=True)
class Parameter:
    """A Megatron parameter of one stage and the Hugging Face tensors it becomes."""

    local: str
    """Its name on the stage's ranks."""
    tensors: tuple[HfTensor, ...]

    @property
    def cut(self) -> bool:
        """Tensor ranks hold slices; otherwise each holds the whole."""
        return self.tensors[0].tp_axis is not None

    def elements(self) -> int:
        return sum(prod(tensor.shape) for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class Bucket:
    """What travels in one message, from the ranks of one stage. A parameter is never divided over two buckets,
    so tensors that an engine fuses again (q, k, v; gate, up) arrive together."""

    stage: int
    parameters: tuple[Parameter, ...]

    @property
    def tensors(self) -> tuple[HfTensor, ...]:
        return tuple(tensor for parameter in self.parameters for tensor in parameter.tensors)


def plan(hf_config: Mapping[str, Any], pp_size: int, element_bytes: int, bucket_bytes: int) -> tuple[Bucket, ...]:
    """Buckets of about ``bucket_bytes``, in the order in which they are sent: by stage, then in forward order.

    Every tensor of the checkpoint is in exactly one bucket; a parameter larger than ``bucket_bytes`` has its own.
    A tied embedding is sent by the first stage only.
    """
    buckets: list[Bucket] = []
    for stage in range(pp_size):
        held: list[Parameter] = []
        size = 0
        for tensors in names.parameters(hf_config).values():
            if tensors[0].stage(pp_size) != stage:
                continue
            parameter = Parameter(tensors[0].local(pp_size), tensors)
            more = parameter.elements() * element_bytes
            if held and size + more > bucket_bytes:
                buckets.append(Bucket(stage, tuple(held)))
                held, size = [], 0
            held.append(parameter)
            size += more
        buckets.append(Bucket(stage, tuple(held)))
    return tuple(buckets)
