"""Samples -> micro-batches: the student's view, the teacher's view, and the alignment of the two.

A view is a prompt followed by the response; student and teacher differ in the prompt only, the
response ids are the very same. Teacher prompts are longer, so each view is packed on its own.
Everything per token that must meet across the views is keyed by (sample, response offset): an
``[R, ...]`` tensor per sample, concatenated here in the micro-batch's order.

The plan is a pure function of the lengths, so every rank computes the same one without talking.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_sdpo.types import Sample

View = Literal["student", "teacher"]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Sequences packed end to end into one row of ``T`` tokens, and where their responses are predicted.

    Example: prompts of 2 and 3 tokens with responses of 2 and 1 give ``lengths=(4, 4)``, ``T = 8`` and
    ``rows_N = [1, 2, 6]``: the hidden state at row 1 predicts the first response token.

    ``samples`` are positions in the list of samples that was planned; empty for a padding micro-batch, which a
    rank with less work runs so that all ranks enter the same collectives: one token, no response.
    """

    samples: tuple[int, ...]
    lengths: tuple[int, ...]
    response_lengths: tuple[int, ...]
    ids_T: Tensor
    """int64, all tokens."""
    positions_T: Tensor
    """int64, position of each token in its own sequence."""
    rows_N: Tensor
    """int64, for each of the ``N`` response tokens the packed row whose hidden state predicts it."""
    response_ids_N: Tensor
    """int64, the response tokens."""

    def split(self, values_N: Tensor) -> dict[int, Tensor]:
        """``[N, ...]`` -> sample position -> ``[R, ...]``."""
        return dict(zip(self.samples, values_N.split(self.response_lengths), strict=True)) if self.samples else {}

    def join(self, values_R: Mapping[int, Tensor], none: Tensor) -> Tensor:
        """Sample position -> ``[R, ...]``, concatenated to ``[N, ...]`` in this micro-batch's order.

        ``none`` is what a padding micro-batch gets: no rows, with the right columns and dtype.
        """
        return torch.cat([values_R[i] for i in self.samples]) if self.samples else none

    def spread(self, per_sample: Sequence[float]) -> Tensor:
        """One number a sample -> fp32 ``[N]``, repeated over its response tokens."""
        values = torch.tensor([per_sample[i] for i in self.samples], dtype=torch.float32)
        return values.repeat_interleave(torch.tensor(self.response_lengths, dtype=torch.int64))


def prompt_of(sample: Sample, view: View) -> tuple[int, ...]:
    """The prompt that precedes the response in a view; the teacher view needs a teacher context."""
    if view == "student":
        return sample.prompt_ids
    if sample.teacher_prompt_ids is None:
        raise ValueError(f"sample {sample.id} has no teacher context, so it has no teacher view")
    return sample.teacher_prompt_ids


def assign(costs: Sequence[int], positions: Sequence[int], data_size: int) -> list[list[int]]:
    """Deal ``positions`` (indices into ``costs``, tokens of all passes) to data-parallel ranks.

    A sample stays on its rank for every pass, so what the scoring passes found never has to travel. The most
    expensive are dealt first, each to the rank with the least work: balanced and deterministic.
    """
    loads = [(0, rank) for rank in range(data_size)]
    shares: list[list[int]] = [[] for _ in range(data_size)]
    for i in sorted(positions, key=lambda i: (-costs[i], i)):
        load, rank = heapq.heappop(loads)
        shares[rank].append(i)
        heapq.heappush(loads, (load + costs[i], rank))
    return shares


def cut(share: Sequence[int], lengths: Mapping[int, int], budget: int) -> list[tuple[int, ...]]:
    """One rank's positions -> micro-batches of at most ``budget`` tokens; a longer sequence stands alone.

    Sequences of like length share a micro-batch, the longest first: running out of memory shows in the first one.
    """
    cuts: list[tuple[int, ...]] = []
    held: list[int] = []
    tokens = 0
    for i in sorted(share, key=lambda i: (-lengths[i], i)):
        if held and tokens + lengths[i] > budget:
            cuts.append(tuple(held))
            held, tokens = [], 0
        held.append(i)
        tokens += lengths[i]
    return [*cuts, tuple(held)] if held else cuts


def micro_batches(
    samples: Sequence[Sample],
    shares: Sequence[Sequence[int]],
    view: View,
    budget: int,
    data_rank: int,
    device: torch.device,
) -> list[MicroBatch]:
    """The micro-batches of one data rank; every rank gets equally many, padding ones where it has less work.

    ``shares`` holds the positions in ``samples`` of every data rank (``assign``).
    """
    lengths = {i: len(prompt_of(samples[i], view)) + len(samples[i].response_ids) for share in shares for i in share}
    cuts = [cut(share, lengths, budget) for share in shares]
    padding = max(map(len, cuts)) - len(cuts[data_rank])
    mine = cuts[data_rank] + [()] * padding
    return [pack([(i, prompt_of(samples[i], view), samples[i].response_ids) for i in ids], device) for ids in mine]


def pack(sequences: Sequence[tuple[int, Sequence[int], Sequence[int]]], device: torch.device) -> MicroBatch:
    """``(sample position, prompt, response)`` triples -> one packed row; none at all gives a padding micro-batch."""
    ids: list[int] = []
    rows: list[int] = []
    lengths: list[int] = []
    for _, prompt, response in sequences:
        if not prompt:
            raise ValueError("a sequence needs at least one prompt token before its response")
        first = len(ids) + len(prompt) - 1
        rows.extend(range(first, first + len(response)))
        ids.extend(prompt)
        ids.extend(response)
        lengths.append(len(prompt) + len(response))
    if not sequences:
        ids, lengths = [0], [1]
    return MicroBatch(
        samples=tuple(i for i, _, _ in sequences),
        lengths=tuple(lengths),
        response_lengths=tuple(len(response) for _, _, response in sequences),
        ids_T=torch.tensor(ids, dtype=torch.int64, device=device),
        positions_T=torch.cat([torch.arange(n, device=device) for n in lengths]),
        rows_N=torch.tensor(rows, dtype=torch.int64, device=device),
        response_ids_N=torch.tensor(
            [t for _, _, response in sequences for t in response], dtype=torch.int64, device=device
        ),
    )


def deal(count: int, mini_batches: int, seed: int, step: int) -> list[list[int]]:
    """Positions 0..count-1 -> the mini-batches of one generation batch, at random by (seed, step).

    Their sizes differ by one at most.
    """
    if mini_batches == 1:
        return [list(range(count))]
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    order = torch.randperm(count, generator=generator).tolist()
    return [sorted(order[i::mini_batches]) for i in range(mini_batches)]
