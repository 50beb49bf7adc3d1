"""Micro-batches on a timeline: hooks around the model, which is otherwise as it was."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_sdpo.mcore.model import Model, chunks_of
from megatron_sdpo.timeline import Timeline, Track


def watch_passes(model: Model, timeline: Timeline, track: Track) -> None:
    """From now on every micro-batch's ``forward`` and ``backward`` through each stage of this rank is drawn.

    They are what the host does: on a GPU, launching (not yet run on a GPU; kernels are what the profiler shows). The
    head and the loss are not in ``forward``, but between the two.
    """
    for number, chunk in enumerate(chunks_of(model)):
        chunk.register_forward_pre_hook(partial(_forward_begins, timeline, track, number))
        chunk.register_forward_hook(partial(_forward_ends, timeline, track, number))


def _forward_begins(timeline: Timeline, track: Track, chunk: int, module: torch.nn.Module, _: Any) -> None:
    timeline.begin(track, "forward", chunk=chunk)


def _forward_ends(
    timeline: Timeline, track: Track, chunk: int, module: torch.nn.Module, _: Any, hidden_T1H: Tensor
) -> None:
    timeline.end(track)
    if not hidden_T1H.requires_grad:
        return

    def backward_begins(grad: Tensor) -> None:
        timeline.begin(track, "backward", chunk=chunk, tokens=len(grad))
        # Called when the whole backward pass that we are in has ended.
        torch.autograd.Variable._execution_engine.queue_callback(partial(timeline.end, track))  # pyright: ignore

    hidden_T1H.register_hook(backward_begins)
