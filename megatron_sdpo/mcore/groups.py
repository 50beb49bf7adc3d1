"""Process groups of a layout. Built once, then passed as an argument: Megatron's global getters stay here."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch.distributed import ProcessGroup

from megatron_sdpo.config import ConfigError, LayoutConfig
from megatron_sdpo.mcore import platform


@dataclass(frozen=True, slots=True)
class ParallelGroups:
    """Where this rank stands. Ranks count within their group; ``rank`` counts in the world.

    Example: of 8 ranks with tensor 2, pipeline 2, rank 5 is tensor rank 1 of data rank 0 of the last pipeline rank.
    """

    world: ProcessGroup
    tensor: ProcessGroup
    """Ranks that hold slices of the same layers for the same rows."""
    pipeline: ProcessGroup
    """One rank of each stage."""
    data: ProcessGroup
    """Ranks with the same weights and different rows."""
    context: ProcessGroup
    """Ranks with the same weights and parts of the same rows."""
    data_context: ProcessGroup
    """All ranks with the same weights."""
    model_parallel: ProcessGroup
    """All ranks (tensor x pipeline) that hold one copy of the weights; of the experts only some (``expert``)."""
    expert: ProcessGroup
    """Ranks that divide the experts of the same layers. They are ranks of one stage, whatever their place among tensor,
    context and data ranks."""
    expert_data: ProcessGroup
    """All ranks with the same weights of experts."""
    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    virtual_size: int
    """Stages that each pipeline rank holds: stage s is on pipeline rank s modulo ``pipeline_size``."""
    data_rank: int
    data_size: int
    context_rank: int
    context_size: int
    expert_rank: int
    expert_size: int
    expert_tensor_rank: int
    expert_tensor_size: int
    """Ranks that hold slices of the same experts: all tensor ranks, or 1."""
    last_stage_rank: int
    """World rank of the last stage in this rank's pipeline group."""

    @property
    def holds_first_copy(self) -> bool:
        """Of all ranks with the same weights, the one that shows them to others; for experts see ``holders``."""
        return self.data_rank == 0 and self.context_rank == 0

    @property
    def vocabulary(self) -> ProcessGroup | None:
        """Ranks that share the vocabulary; None where each has the whole."""
        return self.tensor if self.tensor_size > 1 else None

    @property
    def stages(self) -> int:
        """Of the whole model."""
        return self.pipeline_size * self.virtual_size

    @property
    def own_stages(self) -> range:
        """Those that this rank holds, in the order of the model."""
        return range(self.pipeline_rank, self.stages, self.pipeline_size)

    @property
    def is_last_stage(self) -> bool:
        """Among this rank's stages is the last of all, which has the head."""
        return self.pipeline_rank == self.pipeline_size - 1

    def rank_of(self, tensor: int, pipeline: int, data: int = 0, context: int = 0) -> int:
        """World rank at a position; Megatron counts tensor fastest, then context, data, pipeline."""
        return tensor + self.tensor_size * (context + self.context_size * (data + self.data_size * pipeline))

    def tensor_place(self, of_expert: bool) -> tuple[int, int]:
        """(rank, size) by which this rank cuts a weight over tensor ranks."""
        if of_expert:
            return self.expert_tensor_rank, self.expert_tensor_size
        return self.tensor_rank, self.tensor_size

    def holders(self, pipeline: int, cut: bool, expert_rank: int | None = None) -> list[int]:
        """World ranks that show one weight of a pipeline rank to others: those of its slices, in order, if it is
        ``cut``; of an expert those at ``expert_rank``. The first copy of each.

        Example: of 4 ranks with tensor 1, expert 2, the experts of the second half are shown by ``[1]``.
        """
        if expert_rank is None:
            return [self.rank_of(tensor, pipeline) for tensor in range(self.tensor_size if cut else 1)]
        # Megatron counts the tensor ranks of experts fastest, then expert, copies, pipeline.
        first = self.rank_of(0, pipeline) + self.expert_tensor_size * expert_rank
        return [first + tensor for tensor in range(self.expert_tensor_size if cut else 1)]


def initialize(layout: LayoutConfig, seed: int, timeout_s: float) -> ParallelGroups:
    """Start torch.distributed (from torchrun's environment, or alone) and cut the world by ``layout``.

    ``timeout_s`` bounds every collective. The seed drives dropout and fresh weights; it differs by tensor rank
    where Megatron wants it to. Raises ConfigError when the world has another size than the layout.
    """
    platform.redirect_megatron()
    _check_backend(layout)
    start_world(timeout_s)
    _check_size(layout)
    parallel_state.initialize_model_parallel(
        layout.tensor_parallel,
        layout.pipeline_parallel,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        context_parallel_size=layout.context_parallel,
        expert_model_parallel_size=layout.expert_parallel,
        expert_tensor_parallel_size=layout.expert_tensor,
        distributed_timeout_minutes=max(1, round(timeout_s / 60)),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)  # without a GPU the line before moved the one generator there is
    groups = _groups(layout.virtual_pipeline)
    here = groups.rank_of(groups.tensor_rank, groups.pipeline_rank, groups.data_rank, groups.context_rank)
    (experts_here,) = groups.holders(groups.pipeline_rank, cut=False, expert_rank=groups.expert_rank)
    experts_here += groups.expert_tensor_rank
    experts_here += groups.expert_data.rank() * groups.expert_size * groups.expert_tensor_size
    if here != groups.rank or experts_here != groups.rank:
        raise RuntimeError(
            f"megatron placed rank {groups.rank} where this package expects rank {here}, its experts {experts_here}"
        )
    return groups


def shutdown() -> None:
    """Forget the groups and leave torch.distributed; safe to call twice."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _check_backend(layout: LayoutConfig) -> None:
    """Refuse what only NCCL can do."""
    uneven = layout.expert_parallel > 1 and layout.expert_tensor > 1 and layout.sequence_parallel
    if uneven and platform.backend() == "gloo":
        raise ConfigError(
            f"layout.expert_parallel {layout.expert_parallel} with sequence_parallel and {layout.expert_tensor} slices"
            " of each expert gathers different numbers of tokens over tensor ranks, which gloo cannot; set"
            " layout.expert_tensor_parallel=1"
        )


def start_world(timeout_s: float) -> None:
    """Start torch.distributed, from torchrun's environment or alone, unless it runs; ranks can talk then."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        timeout = timedelta(seconds=timeout_s)
        if "RANK" in os.environ:
            dist.init_process_group(platform.backend(), timeout=timeout)
        else:
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
            dist.init_process_group(platform.backend(), store=store, rank=0, world_size=1, timeout=timeout)


def _check_size(layout: LayoutConfig) -> None:
    size = dist.get_world_size()
    if size != layout.world_size:
        dist.destroy_process_group()
        raise ConfigError(
            f"layout.world_size is {layout.world_size} but {size} trainer ranks were started;"
            f" start them with torchrun --nproc-per-node or set layout.world_size={size}"
        )


def _groups(virtual_size: int) -> ParallelGroups:
    world = dist.group.WORLD
    assert world is not None, "torch.distributed is not initialised"
    tensor: Any = parallel_state.get_tensor_model_parallel_group()
    pipeline: Any = parallel_state.get_pipeline_model_parallel_group()
    data: Any = parallel_state.get_data_parallel_group()
    context: Any = parallel_state.get_context_parallel_group()
    data_context: Any = parallel_state.get_data_parallel_group(with_context_parallel=True)
    model_parallel: Any = parallel_state.get_model_parallel_group()
    expert: Any = parallel_state.get_expert_model_parallel_group()
    expert_data: Any = parallel_state.get_expert_data_parallel_group()
    expert_tensor: Any = parallel_state.get_expert_tensor_parallel_group()
    return ParallelGroups(
        world=world,
        tensor=tensor,
        pipeline=pipeline,
        data=data,
        context=context,
        data_context=data_context,
        model_parallel=model_parallel,
        expert=expert,
        expert_data=expert_data,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor_rank=tensor.rank(),
        tensor_size=tensor.size(),
        pipeline_rank=pipeline.rank(),
        pipeline_size=pipeline.size(),
        virtual_size=virtual_size,
        data_rank=data.rank(),
        data_size=data.size(),
        context_rank=context.rank(),
        context_size=context.size(),
        expert_rank=expert.rank(),
        expert_size=expert.size(),
        expert_tensor_rank=expert_tensor.rank(),
        expert_tensor_size=expert_tensor.size(),
        last_stage_rank=parallel_state.get_pipeline_model_parallel_last_rank(),
    )
