"""Megatron's pipeline schedule, called with packed micro-batches: scoring passes and training passes.

``on_hidden`` receives the final hidden states ``[N, H]`` that predict the response tokens; prompts never meet the
head. It runs on the last stage, on every tensor rank alike. Whoever wants logits makes them of a chunk of rows at a
time (``megatron_sdpo.fused``).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_sdpo.batching import MicroBatch
from megatron_sdpo.mcore.model import Model, chunks_of
from megatron_sdpo.mcore.modules import packed_rows

R = TypeVar("R")


@torch.no_grad()
def score(model: Model, micro_batches: Sequence[MicroBatch], on_hidden: Callable[[MicroBatch, Tensor], R]) -> list[R]:
    """Forward only: ``on_hidden(micro_batch, hidden_NH)`` for each micro-batch, in order; [] before the last stage."""

    def collect(micro_batch: MicroBatch, hidden_T1H: Tensor, non_loss_data: bool = True) -> R:
        return on_hidden(micro_batch, _predicting(micro_batch, hidden_T1H))

    return _run(chunks_of(model), micro_batches, collect, forward_only=True, collect_non_loss_data=True)


def forward_backward(
    wrapped: Sequence[torch.nn.Module],
    micro_batches: Sequence[MicroBatch],
    on_hidden: Callable[[MicroBatch, Tensor], tuple[Tensor, R]],
) -> list[R]:
    """Forward and backward of the plain sum of the losses; gradients arrive in ``wrapped`` (Megatron's DDP
    around each stage of this rank).

    ``on_hidden(micro_batch, hidden_NH) -> (loss, anything)``; the anythings come back, [] before the last stage.
    Losses must already carry their global denominators: nothing is averaged here.
    """

    def loss_func(micro_batch: MicroBatch, hidden_T1H: Tensor) -> tuple[Tensor, Tensor, R]:
        loss, report = on_hidden(micro_batch, _predicting(micro_batch, hidden_T1H))
        # Megatron divides by the sum of this count unless it is zero (calculate_per_token_loss): zero keeps plain sums.
        return loss, torch.zeros((), dtype=torch.int, device=loss.device), report

    return _run(wrapped, micro_batches, loss_func, forward_only=False)


def of_all_ranks(micro_batch: MicroBatch, values_N: Tensor, context: dist.ProcessGroup) -> Tensor:
    """``[N, ...]`` of every context rank -> those of all response tokens in their order, ``[sum of R, ...]``, on each.

    Student and teacher divide a response otherwise, as their prompts differ; so what was found of it is put together,
    and each pass takes the part that it needs (``MicroBatch.join``).
    """
    if len(micro_batch.places) == 1 or not micro_batch.samples:
        return values_N
    most = max(map(len, micro_batch.places))
    mine = values_N.new_zeros((most, *values_N.shape[1:]))
    mine[: len(values_N)] = values_N
    gathered = values_N.new_empty((len(micro_batch.places) * most, *values_N.shape[1:]))
    dist.all_gather_into_tensor(gathered, mine, group=context)
    whole = values_N.new_empty((sum(micro_batch.response_lengths), *values_N.shape[1:]))
    for place, found in zip(micro_batch.places, gathered.split(most), strict=True):
        whole[place] = found[: len(place)]
    return whole


def _predicting(micro_batch: MicroBatch, hidden_T1H: Tensor) -> Tensor:
    return hidden_T1H[:, 0].index_select(0, micro_batch.rows_N)


def _run(
    chunks: Sequence[torch.nn.Module],
    micro_batches: Sequence[MicroBatch],
    loss_func: Callable[..., Any],
    forward_only: bool,
    **options: Any,
) -> list[Any]:
    def step(batches: Any, module: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        micro_batch = next(batches)
        hidden_T1H = module(
            micro_batch.ids_T[None],
            micro_batch.positions_T[None],
            None,
            packed_seq_params=packed_rows(
                micro_batch.lengths,
                micro_batch.ids_T.device,
                micro_batch.padded_lengths,
                (micro_batch.rank, len(micro_batch.places)),
                micro_batch.starts,
            ),
        )
        return hidden_T1H, partial(loss_func, micro_batch)

    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(micro_batches) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(micro_batches),
        seq_length=max(len(m.ids_T) for m in micro_batches),
        micro_batch_size=1,
        forward_only=forward_only,
        **options,
    )
