"""The tensors of a bucket, whole and under their Hugging Face names, on the rank that sends them."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sdpo.mcore import names
from megatron_sdpo.mcore.groups import ParallelGroups
from megatron_sdpo.reshard.plan import Bucket, Parameter


def is_sender(groups: ParallelGroups) -> bool:
    """One rank of each pipeline rank sends: tensor rank 0 of the first copy of the model."""
    return groups.tensor_rank == 0 and groups.holds_first_copy


def gather(
    bucket: Bucket, own: Mapping[str, Tensor], hf_config: Mapping[str, Any], groups: ParallelGroups
) -> list[tuple[str, Tensor]]:
    """(name, tensor) pairs on the bucket's sender, [] elsewhere; every rank of the pipeline rank must call it.

    ``own`` are the rank's parameters (``hf.canonical_parameters``). Whoever holds the first copy of a slice or an
    expert sends it to the sender; one message a rank and bucket, in one contiguous buffer.
    """
    if groups.pipeline_rank != bucket.rank:
        return []
    shown: dict[int, list[Parameter]] = {}
    for parameter in bucket.parameters:
        for rank in _holders(parameter, bucket, groups):
            shown.setdefault(rank, []).append(parameter)
    sender = groups.rank_of(0, bucket.rank)
    if groups.rank != sender:
        if mine := shown.get(groups.rank):
            dist.send(torch.cat([own[p.local].detach().reshape(-1) for p in mine]), sender, group=groups.world)
        return []
    received = {rank: _received(held, rank, own, groups) for rank, held in shown.items() if rank != sender}
    pairs = []
    for parameter in bucket.parameters:
        ranks = _holders(parameter, bucket, groups)
        shards = [received[r][parameter.local] if r != sender else own[parameter.local].detach() for r in ranks]
        pairs += _whole(parameter, shards, hf_config)
    return pairs


def _holders(parameter: Parameter, bucket: Bucket, groups: ParallelGroups) -> list[int]:
    return groups.holders(bucket.rank, parameter.cut, parameter.expert_rank(groups.expert_size))


def _received(
    parameters: Sequence[Parameter], rank: int, own: Mapping[str, Tensor], groups: ParallelGroups
) -> dict[str, Tensor]:
    """The shards that ``rank`` sends, by local name."""
    shapes = {}
    for parameter in parameters:
        _, size = groups.tensor_place(parameter.tensors[0].expert is not None)
        shapes[parameter.local] = names.local_shape(parameter.tensors, size)
    flat = next(iter(own.values())).detach().new_empty(sum(map(prod, shapes.values())))
    dist.recv(flat, rank, group=groups.world)
    parts = flat.split([prod(shape) for shape in shapes.values()])
    return {local: part.view(shape) for (local, shape), part in zip(shapes.items(), parts, strict=True)}


def _whole(parameter: Parameter, shards: Sequence[Tensor], hf_config: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    pieces: list[list[Tensor]] = [names.split(parameter.tensors, shard, hf_config) for shard in shards]
    pairs = []
    for tensor, parts in zip(parameter.tensors, zip(*pieces, strict=True), strict=True):
        whole = names.join(tensor, parts)
        if tuple(whole.shape) != tensor.shape:
            raise ValueError(
                f"{parameter.local} gives {tensor.name} the shape {tuple(whole.shape)}, not {tensor.shape}"
            )
        pairs.append((tensor.name, whole))
    return pairs
