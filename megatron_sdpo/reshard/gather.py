"""The tensors of a bucket, whole and under their Hugging Face names, on the rank that sends them."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sdpo.mcore import names
from megatron_sdpo.mcore.groups import ParallelGroups
from megatron_sdpo.reshard.plan import Bucket


def is_sender(groups: ParallelGroups) -> bool:
    """One rank of each pipeline rank sends: tensor rank 0 of the first copy of the model."""
    return groups.tensor_rank == 0 and groups.holds_first_copy


def gather(
    bucket: Bucket, own: Mapping[str, Tensor], hf_config: Mapping[str, Any], groups: ParallelGroups
) -> list[tuple[str, Tensor]]:
    """(name, tensor) pairs on the bucket's sender, [] elsewhere; every tensor rank of the pipeline rank must call it.

    ``own`` are the rank's parameters (``hf.canonical_parameters``). One collective a bucket: the slices of all its
    parameters travel as one contiguous buffer (gloo silently corrupts non-contiguous ones).
    """
    if groups.pipeline_rank != bucket.rank or not groups.holds_first_copy:
        return []
    cut = [parameter for parameter in bucket.parameters if parameter.cut]
    ranks = _gather_flat([own[parameter.local] for parameter in cut], groups)
    if groups.tensor_rank != 0:
        return []
    shards = {parameter.local: [rank[i] for rank in ranks] for i, parameter in enumerate(cut)}
    pairs = []
    for parameter in bucket.parameters:
        local = shards.get(parameter.local, [own[parameter.local].detach()])
        pieces: list[list[Tensor]] = [names.split(parameter.tensors, shard, hf_config) for shard in local]
        for tensor, parts in zip(parameter.tensors, zip(*pieces, strict=True), strict=True):
            whole = names.join(tensor, parts)
            if tuple(whole.shape) != tensor.shape:
                raise ValueError(
                    f"{parameter.local} gives {tensor.name} the shape {tuple(whole.shape)}, not {tensor.shape}"
                )
            pairs.append((tensor.name, whole))
    return pairs


def _gather_flat(locals_: list[Tensor], groups: ParallelGroups) -> list[list[Tensor]]:
    """Every tensor rank's shards on tensor rank 0, as ``[rank][parameter]``; [] on the others."""
    if not locals_:
        return []
    detached = [local.detach() for local in locals_]
    if groups.tensor_size == 1:
        return [detached]
    flat = torch.cat([local.reshape(-1) for local in detached])
    first = groups.tensor_rank == 0
    received = [torch.empty_like(flat) for _ in range(groups.tensor_size)] if first else None
    dist.gather(flat, received, group=groups.tensor, group_dst=0)
    sizes = [local.numel() for local in detached]
    return [
        [part.view(local.shape) for part, local in zip(buffer.split(sizes), detached, strict=True)]
        for buffer in received or []
    ]
