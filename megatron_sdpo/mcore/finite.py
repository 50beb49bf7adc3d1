"""NaN and infinity stop a run before they reach the weights: on every rank, with one sentence that names the sample.

So does a spike of the gradient norm, where the configuration says so (``judge_norm``).

What is looked at: the log-probs that a batch came with (the engine's), those that the scoring passes found
(old, reference, teacher), the loss of each micro-batch and the norm of the gradient. The first that is not
finite, in this order, is the one to name; the others follow from it.

A sample of weight zero is looked at like any other. It has no influence on the loss, but its numbers come from
the same engine and the same weights as everybody's, and in the training pass its activations meet gradients of
zero, which a NaN makes NaN.

Every rank calls these functions at the same place. A number that one rank saw stops all: nobody is left waiting
in a collective.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sdpo import spikes
from megatron_sdpo.batching import MicroBatch
from megatron_sdpo.config import SpikeConfig
from megatron_sdpo.mcore import platform
from megatron_sdpo.mcore.groups import ParallelGroups
from megatron_sdpo.mcore.scores import StudentScores, TeacherScores
from megatron_sdpo.types import Batch, Sample

NAMED = 8
"""At most so many samples are named one by one."""


class StoppedError(RuntimeError):
    """Training ended before an optimizer step, on all ranks; nothing has been updated with what was found.

    ``batch`` is the one that was being trained on, for replay.
    """

    def __init__(self, message: str, batch: Batch) -> None:
        super().__init__(message)
        self.batch = batch


class NonFiniteError(StoppedError):
    """A number that training would have used is NaN or infinite."""


class SpikeError(StoppedError):
    """The norm of the gradient is far beyond those before it."""


@dataclass(frozen=True, slots=True, order=True)
class _Finding:
    """Sorts by cause, then by position in the batch."""

    cause: int
    position: int
    words: str


def check_scores(batch: Batch, student: StudentScores, teacher: TeacherScores, groups: ParallelGroups) -> None:
    """Raise NonFiniteError when a log-prob of the batch, or one that a scoring pass found, is not finite."""
    states = teacher.states.hidden if teacher.states is not None else {}
    found = [
        *_engine(batch.samples),
        *_scored(1, "the trainer's old log-probs", student.old_log_probs, batch.samples),
        *_scored(2, "the reference's log-probs", student.reference_log_probs, batch.samples),
        *_scored(3, "the teacher's log-probs", teacher.log_probs, batch.samples),
        *_scored(3, "the teacher's hidden states", states, batch.samples),
        *_scored(3, "the teacher's entropies", teacher.entropies, batch.samples),
    ]
    _stop_together(found, batch, groups)


def check_step(
    batch: Batch,
    chosen: Sequence[int],
    micro_batches: Sequence[MicroBatch],
    losses: Sequence[Tensor],
    grad_norm: float,
    groups: ParallelGroups,
) -> float:
    """Raise NonFiniteError when a micro-batch's loss or the norm of the gradient is not finite; else give the norm.

    ``chosen`` are the positions of the mini-batch; ``losses`` belong to ``micro_batches`` on the last stage and
    are absent before it; ``grad_norm`` is the norm over all shards and ranks. What comes back is the largest that a
    rank has found, should rounding tell them apart: on every rank the same, so that all judge it alike.
    """
    found = [
        _Finding(
            0,
            min(micro_batch.samples, default=0),
            f"the loss of the micro-batch of {_names(batch, micro_batch.samples)} is {loss}",
        )
        for micro_batch, loss in zip(micro_batches, torch.stack(list(losses)).tolist() if losses else [], strict=False)
        if not math.isfinite(loss)
    ]
    if not math.isfinite(grad_norm):
        words = f"the gradient norm of the mini-batch of {_names(batch, chosen)} is {grad_norm}, with finite losses"
        found.append(_Finding(1, 0, words))
    return _stop_together(found, batch, groups, grad_norm)


def judge_norm(
    history: spikes.History, norm: float, config: SpikeConfig, batch: Batch, chosen: Sequence[int]
) -> spikes.Judged:
    """Whether the step along a gradient of this norm, the same on every rank, is made; SpikeError stops all."""
    judged = spikes.judge(history, norm, config)
    if judged.action == "stop":
        words = f"the gradient norm of the mini-batch of {_names(batch, chosen)} is {judged.words}"
        raise SpikeError(_sentence(batch, words), batch)
    return judged


def _engine(samples: Sequence[Sample]) -> Iterator[_Finding]:
    for i, sample in enumerate(samples):
        if not all(map(math.isfinite, sample.engine_log_probs)):
            yield _finding(0, i, "the engine's log-probs", torch.tensor(sample.engine_log_probs), sample)


def _scored(cause: int, what: str, found: Mapping[int, Tensor], samples: Sequence[Sample]) -> list[_Finding]:
    if not found:
        return []
    finite = torch.stack([values.isfinite().all() for values in found.values()]).tolist()  # one wait for the device
    wrong = [i for i, good in zip(found, finite, strict=True) if not good]
    return [_finding(cause, i, what, found[i], samples[i]) for i in wrong]


def _finding(cause: int, position: int, what: str, values: Tensor, sample: Sample) -> _Finding:
    """``values``: ``[R]`` or ``[R, ...]``."""
    bad = ~values.reshape(len(values), -1).isfinite()
    tokens = bad.any(dim=1).nonzero()[:, 0].tolist()
    first = values.reshape(len(values), -1)[tokens[0]][bad[tokens[0]]][0].item()
    where = f"at {len(tokens)} of its {len(values)} response tokens, first at {tokens[0]}"
    words = f"sample {sample.id} (question slot {sample.group}) has {first} among {what}, {where}"
    return _Finding(cause, position, words)


def _names(batch: Batch, positions: Sequence[int]) -> str:
    ids = [batch.samples[i].id for i in positions[:NAMED]]
    more = len(positions) - len(ids)
    return f"sample{'s' * (len(positions) > 1)} {', '.join(ids)}" + (f" and {more} more" if more else "")


def _stop_together(found: Sequence[_Finding], batch: Batch, groups: ParallelGroups, number: float = 0.0) -> float:
    """When any rank has found something, every rank raises the same sentence; else the largest ``number`` of all."""
    seen = torch.tensor([float(bool(found)), number], dtype=torch.float64, device=platform.device())
    if groups.world_size > 1:
        dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=groups.world)
    stop, largest = seen.tolist()
    if not stop:
        return largest
    everywhere: list[Any] = [None] * groups.world_size
    dist.all_gather_object(everywhere, list(found), group=groups.world)
    findings: list[_Finding] = sorted({finding for rank in everywhere for finding in rank})
    first = findings[0]
    others = sum(finding.cause == first.cause for finding in findings) - 1
    more = f" (and {others} more like it)" if others else ""
    raise NonFiniteError(_sentence(batch, f"{first.words}{more}"), batch)


def _sentence(batch: Batch, why: str) -> str:
    return (
        f"training stopped at step {batch.step}, before an optimizer step: {why}; weights, optimizer and teacher are as"
        " before that step"
    )
