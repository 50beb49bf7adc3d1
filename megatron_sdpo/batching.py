"""Samples -> micro-batches: the student's view, the teacher's view, and the alignment of the two.

A view is a prompt followed by the response; student and teacher differ in the prompt only, the
response ids are the very same. Teacher prompts are longer, so each view is packed on its own.
Everything per token that must meet across the views is keyed by (sample, response offset): an
``[R, ...]`` tensor per sample, concatenated here in the micro-batch's order.

The plan is a pure function of the lengths, so every rank computes the same one without talking.
"""

import bisect
import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_sdpo.types import Sample

View = Literal["student", "teacher"]


@dataclass(frozen=True, slots=True)
class RowCut:
    """How the ranks of one data rank divide a packed row.

    Each of ``ranks`` context-parallel ranks holds two of ``2 * ranks`` equal chunks of every sequence, an early and a
    late one (zig-zag), so that all have as much attention to compute; what each holds is a multiple of ``multiple``
    tokens, which tensor ranks divide under sequence parallelism. Sequences and row are filled up to that with tokens
    that nobody learns from.
    """

    rank: int = 0
    ranks: int = 1
    multiple: int = 1

    @property
    def sequence_unit(self) -> int:
        """Divides the padded length of every sequence."""
        return 2 * self.ranks if self.ranks > 1 else 1

    @property
    def row_unit(self) -> int:
        """Divides the length of the whole row."""
        return math.lcm(self.sequence_unit, self.ranks * self.multiple)


WHOLE = RowCut()


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Sequences packed end to end into one row, and where their responses are predicted.

    Example: prompts of 2 and 3 tokens with responses of 2 and 1 give ``lengths=(4, 4)``, ``T = 8`` and
    ``rows_N = [1, 2, 6]``: the hidden state at row 1 predicts the first response token.

    ``samples`` are positions in the list of samples that was planned; empty for a padding micro-batch, which a
    rank with less work runs so that all ranks enter the same collectives: padding, no response. ``T`` counts this
    context rank's tokens and ``N`` the response tokens that they predict; without context parallelism these are all.
    """

    samples: tuple[int, ...]
    lengths: tuple[int, ...]
    """Of the sequences of the whole row; the last may be padding alone."""
    padded_lengths: tuple[int, ...]
    """The same with the padding at the end of each."""
    response_lengths: tuple[int, ...]
    ids_T: Tensor
    """int64, the tokens."""
    positions_T: Tensor
    """int64, position of each token in its own sequence."""
    rows_N: Tensor
    """int64, for each of the ``N`` response tokens the row, of ``T``, whose hidden state predicts it."""
    response_ids_N: Tensor
    """int64, the response tokens."""
    places: tuple[Tensor, ...]
    """int64, for each context rank where its ``N`` stand among the response tokens of all samples, end to end."""
    rank: int
    """This context rank."""
    padding: int
    """Tokens of the whole row that belong to no sample."""

    @property
    def my_padding(self) -> float:
        """This context rank's part of ``padding``."""
        return self.padding / len(self.places)

    def split(self, values: Tensor) -> dict[int, Tensor]:
        """Of all response tokens, ``[sum of R, ...]`` -> sample position -> ``[R, ...]``."""
        return dict(zip(self.samples, values.split(self.response_lengths), strict=True)) if self.samples else {}

    def join(self, values_R: Mapping[int, Tensor], none: Tensor) -> Tensor:
        """Sample position -> ``[R, ...]``, concatenated in this micro-batch's order: this rank's part, ``[N, ...]``.

        ``none`` is what a padding micro-batch gets: no rows, with the right columns and dtype.
        """
        return self._mine(torch.cat([values_R[i] for i in self.samples])) if self.samples else none

    def spread(self, per_sample: Sequence[float]) -> Tensor:
        """One number a sample -> fp32 ``[N]``, repeated over its response tokens."""
        values = torch.tensor([per_sample[i] for i in self.samples], dtype=torch.float32)
        return self._mine(values.repeat_interleave(torch.tensor(self.response_lengths, dtype=torch.int64)))

    def _mine(self, values: Tensor) -> Tensor:
        return values if len(self.places) == 1 else values[self.places[self.rank].to(values.device)]


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


def cut(share: Sequence[int], lengths: Mapping[int, int], budget: int, count: int = 0) -> list[tuple[int, ...]]:
    """One rank's positions -> micro-batches of at most ``budget`` tokens; a longer sequence stands alone.

    There are as few as the budget allows, or ``count`` if that is more, and the largest of them is as small as it can
    be: stages of a pipeline wait for the largest. Sequences of like length share a micro-batch, the longest first:
    running out of memory shows in the first one.
    """
    ordered = sorted(share, key=lambda i: (-lengths[i], i))
    wanted = max(count, len(_filled(ordered, lengths, budget)))
    least = bisect.bisect_left(range(budget), True, key=lambda bound: len(_filled(ordered, lengths, bound)) <= wanted)
    return _filled(ordered, lengths, least)


def _filled(ordered: Sequence[int], lengths: Mapping[int, int], bound: int) -> list[tuple[int, ...]]:
    """In this order, each filled up to the bound: no division of the order has fewer parts."""
    cuts: list[tuple[int, ...]] = []
    held: list[int] = []
    tokens = 0
    for i in ordered:
        if held and tokens + lengths[i] > bound:
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
    row: RowCut = WHOLE,
    count_multiple: int = 1,
) -> list[MicroBatch]:
    """The micro-batches of one data rank; every rank gets equally many, padding ones where it has less work.

    ``shares`` holds the positions in ``samples`` of every data rank (``assign``). Their number is a multiple of
    ``count_multiple``, as an interleaved pipeline wants it.
    """
    lengths = {i: len(prompt_of(samples[i], view)) + len(samples[i].response_ids) for share in shares for i in share}
    count = _up_to(max(len(cut(share, lengths, budget)) for share in shares), count_multiple)
    mine = cut(shares[data_rank], lengths, budget, count)
    mine += [()] * (count - len(mine))
    return [pack([(i, prompt_of(samples[i], view), samples[i].response_ids) for i in ids], device, row) for ids in mine]


def pack(
    sequences: Sequence[tuple[int, Sequence[int], Sequence[int]]], device: torch.device, row: RowCut = WHOLE
) -> MicroBatch:
    """``(sample position, prompt, response)`` triples -> one packed row; none at all gives a padding micro-batch."""
    ids: list[int] = []
    rows: list[int] = []
    lengths: list[int] = []
    padded: list[int] = []
    for _, prompt, response in sequences:
        if not prompt:
            raise ValueError("a sequence needs at least one prompt token before its response")
        first = len(ids) + len(prompt) - 1
        rows.extend(range(first, first + len(response)))
        lengths.append(len(prompt) + len(response))
        padded.append(_up_to(lengths[-1], row.sequence_unit))
        ids.extend((*prompt, *response, *[0] * (padded[-1] - lengths[-1])))
    tokens = sum(lengths)
    fill = _up_to(max(len(ids), 1), row.row_unit) - len(ids)
    if fill:
        ids.extend([0] * fill)
        lengths.append(fill)
        padded.append(fill)
    kept, places = _cut_row(padded, rows, row)
    ids_, rows_, responses_ = (
        torch.tensor(x, dtype=torch.int64) for x in (ids, rows, [t for _, _, response in sequences for t in response])
    )
    row_of = torch.full((len(ids),), -1).index_copy_(0, kept, torch.arange(len(kept)))
    mine = places[row.rank]
    return MicroBatch(
        samples=tuple(i for i, _, _ in sequences),
        lengths=tuple(lengths),
        padded_lengths=tuple(padded),
        response_lengths=tuple(len(response) for _, _, response in sequences),
        ids_T=ids_[kept].to(device),
        positions_T=torch.cat([torch.arange(n) for n in padded])[kept].to(device),
        rows_N=row_of[rows_[mine]].to(device),
        response_ids_N=responses_[mine].to(device),
        places=tuple(place.to(device) for place in places),
        rank=row.rank,
        padding=len(ids) - tokens,
    )


def _up_to(length: int, unit: int) -> int:
    return -(-length // unit) * unit


def zigzag(padded_lengths: Sequence[int], rank: int, ranks: int) -> Tensor:
    """int64, the tokens of a packed row that a context rank holds; all of them when it is alone.

    They are the chunks ``rank`` and ``2 * ranks - 1 - rank`` of each sequence's ``2 * ranks``.
    Example: lengths 4, 8 on rank 0 of 2: 0, 3, 4, 5, 10, 11.
    """
    if ranks == 1:
        return torch.arange(sum(padded_lengths))
    kept, start = [], 0
    for length in padded_lengths:
        chunk = length // (2 * ranks)
        for place in (rank, 2 * ranks - 1 - rank):
            kept.append(torch.arange(start + place * chunk, start + (place + 1) * chunk))
        start += length
    return torch.cat(kept)


def _cut_row(padded_lengths: Sequence[int], rows: Sequence[int], row: RowCut) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The tokens of this context rank, and for each which of the response tokens it predicts (``rows``)."""
    shares = [zigzag(padded_lengths, rank, row.ranks) for rank in range(row.ranks)]
    holder = torch.empty(sum(padded_lengths), dtype=torch.int64)
    for rank, share in enumerate(shares):
        holder[share] = rank
    holder_of_rows = holder[torch.tensor(rows, dtype=torch.int64)]
    return shares[row.rank], tuple((holder_of_rows == rank).nonzero()[:, 0] for rank in range(row.ranks))


def deal(count: int, mini_batches: int, seed: int, step: int) -> list[list[int]]:
    """Positions 0..count-1 -> the mini-batches of one generation batch, at random by (seed, step).

    Their sizes differ by one at most.
    """
    if mini_batches == 1:
        return [list(range(count))]
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    order = torch.randperm(count, generator=generator).tolist()
    return [sorted(order[i::mini_batches]) for i in range(mini_batches)]
