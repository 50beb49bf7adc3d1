"""Samples -> micro-batches: the student's view, the teacher's view, and the alignment of the two.

A view is a prompt followed by the response; student and teacher differ in the prompt only, the
response ids are the very same. Teacher prompts are longer, so each view is packed on its own.
Everything per token that must meet across the views is keyed by (sample, response offset): an
``[R, ...]`` tensor per sample, concatenated here in the micro-batch's order.

The plan is a pure function of the tokens, so every rank computes the same one without talking.

In scoring passes samples whose prompts begin alike (``prefixes``) may be packed as that beginning, once, and what
follows it of each; attention then lets every such tail see the beginning. In training passes each sample stands by
itself: prompts have gradients through the responses, and what is trained is what it was.
"""

import bisect
import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_sdpo import prefixes as beginnings
from megatron_sdpo.flops import Tokens
from megatron_sdpo.prefixes import Prefixes
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
NOTHING_SHARED: Prefixes = {}


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Sequences packed end to end into one row, and where their responses are predicted.

    Example: prompts of 2 and 3 tokens with responses of 2 and 1 give ``lengths=(4, 4)``, ``T = 8`` and
    ``rows_N = [1, 2, 6]``: the hidden state at row 1 predicts the first response token. If the prompts share a
    beginning of 2 tokens, the whole of the first, the pieces are that beginning and two tails: ``lengths=(2, 2, 2)``,
    ``starts=(0, 2, 2)``, ``T = 6``, ``rows_N = [1, 2, 4]``.

    ``samples`` are positions in the list of samples that was planned; empty for a padding micro-batch, which a
    rank with less work runs so that all ranks enter the same collectives: padding, no response. ``T`` counts this
    context rank's tokens and ``N`` the response tokens that they predict; without context parallelism these are all.
    """

    samples: tuple[int, ...]
    lengths: tuple[int, ...]
    """Of the pieces of the whole row, which are sequences where none is shared; the last may be padding alone."""
    starts: tuple[int, ...]
    """Of each piece the position of its first token: a piece that does not begin at 0 continues the last one before it
    that does."""
    padded_lengths: tuple[int, ...]
    """The same with the padding at the end of each."""
    response_lengths: tuple[int, ...]
    ids_T: Tensor
    """int64, the tokens."""
    positions_T: Tensor
    """int64, position of each token in its own sequence, the shared beginning included."""
    rows_N: Tensor
    """int64, for each of the ``N`` response tokens the row, of ``T``, whose hidden state predicts it. The end
    of a shared beginning may predict the first token of several."""
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


def assign(
    costs: Sequence[int], positions: Sequence[int], data_size: int, homes: Sequence[int] | None = None
) -> list[list[int]]:
    """Deal ``positions`` (indices into ``costs``, tokens of all passes) to data-parallel ranks.

    A sample stays on its rank for every pass, so what the scoring passes found never has to travel. The most
    expensive are dealt first, each to the rank with the least work: balanced and deterministic. Those for whom there
    is room within an equal part go to their ``homes`` before (``homes_of``), so that siblings meet; what two ranks
    have to do then still differs by one sample at most.
    """
    ordered = sorted(positions, key=lambda i: (-costs[i], i))
    work = [0] * data_size
    shares: list[list[int]] = [[] for _ in range(data_size)]
    if homes is not None:
        equal, rest = sum(costs[i] for i in ordered) / data_size, []
        for i in ordered:
            if work[homes[i]] + costs[i] <= equal:
                shares[homes[i]].append(i)
                work[homes[i]] += costs[i]
            else:
                rest.append(i)
        ordered = rest
    loads = [(load, rank) for rank, load in enumerate(work)]
    heapq.heapify(loads)
    for i in ordered:
        load, rank = heapq.heappop(loads)
        shares[rank].append(i)
        heapq.heappush(loads, (load + costs[i], rank))
    return shares


def homes_of(costs: Sequence[int], groups: Sequence[int], data_size: int) -> list[int]:
    """For each sample the data rank where it meets its siblings, those of its question (``groups``), if it can."""
    whole: dict[int, int] = {}
    for cost, group in zip(costs, groups, strict=True):
        whole[group] = whole.get(group, 0) + cost
    order = list(whole)
    shares = assign([whole[group] for group in order], range(len(order)), data_size)
    home = {order[k]: rank for rank, share in enumerate(shares) for k in share}
    return [home[group] for group in groups]


def cut(
    share: Sequence[int],
    lengths: Mapping[int, int],
    budget: int,
    count: int = 0,
    prefixes: Prefixes = NOTHING_SHARED,
) -> list[tuple[int, ...]]:
    """One rank's positions -> micro-batches of at most ``budget`` tokens; a longer sequence stands alone.

    There are as few as the budget allows, or ``count`` if that is more, and the largest of them is as small as it can
    be: stages of a pipeline wait for the largest. Sequences of like length share a micro-batch, the longest first:
    running out of memory shows in the first one. Those that share a beginning are neighbours, where the longest of
    them would be; the beginning counts once in each micro-batch that has some of them.
    """
    longest: dict[int, int] = {}
    for i in share:
        first = prefixes[i].first if i in prefixes else i
        longest[first] = max(longest.get(first, 0), lengths[i])

    def place(i: int) -> tuple[int, ...]:
        first = prefixes[i].first if i in prefixes else i
        return -longest[first], first, -lengths[i], i

    ordered = sorted(share, key=place)
    wanted = max(count, len(_filled(ordered, lengths, budget, prefixes)))
    least = bisect.bisect_left(
        range(budget), True, key=lambda bound: len(_filled(ordered, lengths, bound, prefixes)) <= wanted
    )
    return _filled(ordered, lengths, least, prefixes)


def _filled(
    ordered: Sequence[int], lengths: Mapping[int, int], bound: int, prefixes: Prefixes
) -> list[tuple[int, ...]]:
    """In this order, each filled up to the bound: no division of the order has fewer parts."""
    cuts: list[tuple[int, ...]] = []
    held: list[int] = []
    tokens = 0
    for i in ordered:
        prefix = prefixes.get(i)
        is_there = prefix is not None and bool(held) and prefixes.get(held[-1]) == prefix
        added = lengths[i] - (prefix.tokens if prefix is not None and is_there else 0)
        if held and tokens + added > bound:
            cuts.append(tuple(held))
            held, tokens, added = [], 0, lengths[i]
        held.append(i)
        tokens += added
    return [*cuts, tuple(held)] if held else cuts


@dataclass(frozen=True, slots=True)
class Cuts:
    """Every data rank's micro-batches of one pass, as positions of samples; equally many, () where a rank has less."""

    ranks: tuple[tuple[tuple[int, ...], ...], ...]
    prefixes: Prefixes

    @property
    def spared(self) -> Tokens:
        """What all ranks together do not compute because beginnings are shared."""
        return beginnings.spared((positions for rank in self.ranks for positions in rank), self.prefixes)


def cuts_of(
    samples: Sequence[Sample],
    shares: Sequence[Sequence[int]],
    view: View,
    budget: int,
    count_multiple: int = 1,
    least_shared: int | None = None,
) -> Cuts:
    """``shares`` holds the positions in ``samples`` of every data rank (``assign``). The micro-batches of a rank are a
    multiple of ``count_multiple``, as an interleaved pipeline wants it. ``least_shared``: siblings on one rank read
    what their prompts begin with once, where they are in one micro-batch and it has so many tokens; None: never."""
    lengths = {i: len(prompt_of(samples[i], view)) + len(samples[i].response_ids) for share in shares for i in share}
    prefixes: dict[int, beginnings.Prefix] = {}
    if least_shared is not None:
        questions = [sample.group for sample in samples]
        for share in shares:
            prompts = {i: prompt_of(samples[i], view) for i in share}
            prefixes |= beginnings.shared_by_siblings(prompts, questions, least_shared)
    count = _up_to(max(len(cut(share, lengths, budget, 0, prefixes)) for share in shares), count_multiple)
    ranks = [cut(share, lengths, budget, count, prefixes) for share in shares]
    return Cuts(tuple((*own, *[()] * (count - len(own))) for own in ranks), prefixes)


def packed(
    samples: Sequence[Sample], cuts: Cuts, view: View, data_rank: int, device: torch.device, row: RowCut = WHOLE
) -> list[MicroBatch]:
    """The micro-batches of one data rank."""
    return [
        pack([(i, prompt_of(samples[i], view), samples[i].response_ids) for i in ids], device, row, cuts.prefixes)
        for ids in cuts.ranks[data_rank]
    ]


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
    """``cuts_of`` and ``packed``: those of one data rank, with nothing shared."""
    return packed(samples, cuts_of(samples, shares, view, budget, count_multiple), view, data_rank, device, row)


def pack(
    sequences: Sequence[tuple[int, Sequence[int], Sequence[int]]],
    device: torch.device,
    row: RowCut = WHOLE,
    prefixes: Prefixes = NOTHING_SHARED,
) -> MicroBatch:
    """``(sample position, prompt, response)`` triples -> one packed row; none at all gives a padding micro-batch.

    Neighbours with one prefix are packed as that and their tails, which context-parallel ranks cannot divide.
    """
    ids: list[int] = []
    rows: list[int] = []
    starts: list[int] = []
    lengths: list[int] = []
    padded: list[int] = []

    def add(tokens: Sequence[int], start: int) -> int:
        """A piece; back comes where its sequence would begin if it were whole."""
        first = len(ids) - start
        if tokens:
            starts.append(start)
            lengths.append(len(tokens))
            padded.append(_up_to(lengths[-1], row.sequence_unit))
            ids.extend((*tokens, *[0] * (padded[-1] - lengths[-1])))
        return first

    of = {i: (prompt, response) for i, prompt, response in sequences}
    if len(of) < len(sequences):
        raise ValueError("a sample cannot be twice in one row")
    for prefix, members in beginnings.together(of, prefixes):
        n = prefix.tokens if prefix is not None else 0
        if n and row.ranks > 1:
            raise ValueError("context-parallel ranks divide whole sequences, not those that share a beginning")
        head = add(of[members[0]][0][:n], 0)
        for prompt, response in (of[i] for i in members):
            if not prompt:
                raise ValueError("a sequence needs at least one prompt token before its response")
            first = add((*prompt[n:], *response), n)
            predicting = range(len(prompt) - 1, len(prompt) + len(response) - 1)
            rows.extend(position + (head if position < n else first) for position in predicting)
    tokens = sum(lengths)
    fill = _up_to(max(len(ids), 1), row.row_unit) - len(ids)
    if fill:
        add([0] * fill, 0)
    kept, places = _cut_row(padded, rows, row)
    ids_, rows_, responses_ = (
        torch.tensor(x, dtype=torch.int64) for x in (ids, rows, [t for _, _, response in sequences for t in response])
    )
    row_of = torch.full((len(ids),), -1).index_copy_(0, kept, torch.arange(len(kept)))
    mine = places[row.rank]
    return MicroBatch(
        samples=tuple(of),
        lengths=tuple(lengths),
        starts=tuple(starts),
        padded_lengths=tuple(padded),
        response_lengths=tuple(len(response) for _, _, response in sequences),
        ids_T=ids_[kept].to(device),
        positions_T=torch.cat([torch.arange(s, s + n) for s, n in zip(starts, padded, strict=True)])[kept].to(device),
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
