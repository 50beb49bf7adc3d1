"""Packing and dealing: properties that hold for any lengths, and plain loops as the reference."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sdpo.batching import WHOLE, MicroBatch, RowCut, View, assign, cut, deal, micro_batches, pack, zigzag
from megatron_sdpo.types import Sample

CPU = torch.device("cpu")
IDS = st.integers(0, 99)
SEQUENCES = st.lists(
    st.tuples(st.lists(IDS, min_size=1, max_size=6), st.lists(IDS, max_size=6), st.lists(IDS, min_size=1, max_size=9)),
    min_size=1,
    max_size=9,
)
"""(prompt, response, teacher prompt) of each sample."""


def samples_of(sequences: Sequence[tuple[list[int], list[int], list[int]]]) -> list[Sample]:
    return [Sample(str(i), 0, tuple(p), tuple(r), (), tuple(t), 0.0) for i, (p, r, t) in enumerate(sequences)]


@given(st.lists(st.integers(1, 50), max_size=20), st.integers(1, 5), st.data())
def test_assign_is_a_balanced_partition(costs: list[int], data_size: int, data: st.DataObject) -> None:
    positions = data.draw(st.lists(st.sampled_from(range(len(costs))), unique=True)) if costs else []
    shares = assign(costs, positions, data_size)
    assert sorted(i for share in shares for i in share) == sorted(positions)
    assert shares == assign(costs, positions[::-1], data_size)
    loads = [sum(costs[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max((costs[i] for i in positions), default=0)


@given(st.dictionaries(st.integers(0, 30), st.integers(1, 20), max_size=12), st.integers(1, 40))
def test_cut_keeps_to_the_budget(lengths: dict[int, int], budget: int) -> None:
    cuts = cut(list(lengths), lengths, budget)
    assert sorted(i for group in cuts for i in group) == sorted(lengths)
    assert all(len(group) == 1 or sum(lengths[i] for i in group) <= budget for group in cuts)
    assert all(cuts)
    longest_first = [lengths[i] for group in cuts for i in group]
    assert longest_first == sorted(longest_first, reverse=True)


@given(st.lists(st.integers(1, 20), max_size=8), st.integers(1, 40), st.integers(0, 5))
def test_cut_makes_as_few_as_it_may_and_the_largest_as_small_as_it_can(
    lengths: list[int], budget: int, count: int
) -> None:
    cuts = cut(range(len(lengths)), dict(enumerate(lengths)), budget, count)
    ordered = sorted(lengths, reverse=True)
    possible: dict[int, int] = {}  # number of parts -> the least size of the largest part, by trying all divisions
    for marks in itertools.product([False, True], repeat=max(len(ordered) - 1, 0)):
        edges = [0, *(i + 1 for i, mark in enumerate(marks) if mark), len(ordered)]
        parts = [ordered[a:b] for a, b in itertools.pairwise(edges) if b > a]
        if all(len(part) == 1 or sum(part) <= budget for part in parts):
            largest = max(map(sum, parts), default=0)
            possible[len(parts)] = min(largest, possible.get(len(parts), largest))
    allowed = max(min(possible), count)
    assert len(cuts) <= allowed
    largest = max((sum(lengths[i] for i in group) for group in cuts), default=0)
    assert largest == min(size for parts, size in possible.items() if parts <= allowed)


@settings(deadline=None)
@given(SEQUENCES, st.integers(1, 4), st.integers(1, 40), st.sampled_from(["student", "teacher"]))
def test_every_rank_runs_equally_many_micro_batches(
    sequences: list[tuple[list[int], list[int], list[int]]], data_size: int, budget: int, view: View
) -> None:
    samples = samples_of(sequences)
    shares = assign([len(p) + len(r) for p, r, _ in sequences], range(len(samples)), data_size)
    ranks = [micro_batches(samples, shares, view, budget, rank, CPU) for rank in range(data_size)]
    assert len({len(batches) for batches in ranks}) == 1
    for share, batches in zip(shares, ranks, strict=True):
        assert sorted(i for batch in batches for i in batch.samples) == sorted(share)
        assert all(len(batch.samples) <= 1 or len(batch.ids_T) <= budget for batch in batches)
        for batch in batches:
            check_packing(batch, samples, view)


def check_packing(batch: MicroBatch, samples: Sequence[Sample], view: View) -> None:
    """Every field against a walk over the tokens, one at a time."""
    ids, positions, rows, responses = [], [], [], []
    for i in batch.samples:
        prompt = samples[i].prompt_ids if view == "student" else samples[i].teacher_prompt_ids
        assert prompt is not None
        for position, token in enumerate([*prompt, *samples[i].response_ids]):
            if position >= len(prompt):
                rows.append(len(ids) - 1)
                responses.append(token)
            ids.append(token)
            positions.append(position)
    if not batch.samples:
        ids, positions = [0], [0]
    assert batch.ids_T.tolist() == ids
    assert batch.positions_T.tolist() == positions
    assert batch.rows_N.tolist() == rows
    assert batch.response_ids_N.tolist() == responses == [ids[row + 1] for row in rows]
    assert sum(batch.lengths) == sum(batch.padded_lengths) == len(ids)
    assert batch.padding == (0 if batch.samples else 1)
    assert batch.response_lengths == tuple(len(samples[i].response_ids) for i in batch.samples)
    for field in (batch.ids_T, batch.positions_T, batch.rows_N, batch.response_ids_N):
        assert field.dtype == torch.int64 and field.dim() == 1


@settings(deadline=None)
@given(SEQUENCES, st.integers(1, 40))
def test_both_views_end_in_the_same_responses(
    sequences: list[tuple[list[int], list[int], list[int]]], budget: int
) -> None:
    """What is keyed by sample in one view meets the same tokens in the other, however each is packed."""
    samples = samples_of(sequences)
    found: dict[View, dict[int, torch.Tensor]] = {"student": {}, "teacher": {}}
    for view, by_sample in found.items():
        for batch in micro_batches(samples, [list(range(len(samples)))], view, budget, 0, CPU):
            by_sample |= batch.split(batch.response_ids_N)
    for i, sample in enumerate(samples):
        assert found["student"][i].tolist() == found["teacher"][i].tolist() == list(sample.response_ids)


@settings(deadline=None)
@given(SEQUENCES, st.randoms(use_true_random=False))
def test_join_is_the_inverse_of_split(sequences: list[tuple[list[int], list[int], list[int]]], shuffle) -> None:
    order = list(enumerate(sequences))
    shuffle.shuffle(order)
    batch = pack([(i, prompt, response) for i, (prompt, response, _) in order], CPU)
    values_NK = torch.arange(2 * len(batch.rows_N)).reshape(-1, 2)
    parts = batch.split(values_NK)
    assert [len(parts[i]) for i in batch.samples] == list(batch.response_lengths)
    assert torch.equal(batch.join(parts, none=values_NK[:0]), values_NK)
    per_sample = [float(i) for i in range(len(sequences))]
    assert batch.spread(per_sample).tolist() == [float(i) for i, (_, response, _) in order for _ in response]


def test_a_padding_micro_batch_is_one_token_without_a_response() -> None:
    batch = pack([], CPU)
    assert (batch.lengths, batch.samples, batch.response_lengths) == ((1,), (), ())
    assert (batch.ids_T.tolist(), batch.positions_T.tolist()) == ([0], [0])
    assert len(batch.rows_N) == len(batch.response_ids_N) == len(batch.spread([])) == 0
    assert batch.split(torch.empty(0, 3)) == {}
    none = torch.empty(0, 3, dtype=torch.int64)
    assert batch.join({}, none) is none


def test_a_rank_without_samples_pads() -> None:
    samples = samples_of([([1], [2], [3]), ([1, 2], [3, 4], [5])])
    ranks = [micro_batches(samples, [[0, 1], []], "student", 1, rank, CPU) for rank in (0, 1)]
    assert [[batch.samples for batch in batches] for batches in ranks] == [[(1,), (0,)], [(), ()]]


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one prompt token"):
        pack([(0, (), (1, 2))], CPU)
    untaught = Sample("3/1/0", 0, (1,), (2,), (), None, 0.0)
    with pytest.raises(ValueError, match="3/1/0 has no teacher context"):
        micro_batches([untaught], [[0]], "teacher", 10, 0, CPU)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**40), st.integers(0, 10_000))
def test_deal_is_a_partition_by_seed_and_step(count: int, mini_batches: int, seed: int, step: int) -> None:
    dealt = deal(count, mini_batches, seed, step)
    assert sorted(i for chosen in dealt for i in chosen) == list(range(count))
    assert len(dealt) == mini_batches
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    state = torch.get_rng_state()
    assert deal(count, mini_batches, seed, step) == dealt
    assert torch.equal(torch.get_rng_state(), state)


def test_deal_differs_between_steps_and_seeds() -> None:
    dealt = [str(deal(64, 2, seed, step)) for seed in range(4) for step in range(4)]
    assert len(set(dealt)) == len(dealt)


CUTS = st.sampled_from([(ranks, multiple) for ranks in (1, 2, 3) for multiple in (1, 2, 3, 4)])


@settings(deadline=None, max_examples=30)
@given(SEQUENCES, CUTS)
def test_ranks_divide_a_row(sequences: list[tuple[list[int], list[int], list[int]]], cut: tuple[int, int]) -> None:
    """Every token is on one rank, in an early and a late chunk of its sequence; every response token is predicted once,
    by the token before it; what fills the row is counted."""
    ranks, multiple = cut
    given = [(i, prompt, response) for i, (prompt, response, _) in enumerate(sequences)]
    whole = pack(given, CPU)
    parts = [pack(given, CPU, RowCut(rank, ranks, multiple)) for rank in range(ranks)]
    padded = parts[0].padded_lengths
    assert len({len(part.ids_T) for part in parts}) == 1
    assert sum(len(part.ids_T) for part in parts) == sum(padded)
    assert len(parts[0].ids_T) % multiple == 0
    assert ranks == 1 or all(length % (2 * ranks) == 0 for length in padded)
    assert parts[0].padding == sum(padded) - sum(whole.lengths)
    assert parts[0].lengths[: len(sequences)] == whole.lengths

    row = torch.full((sum(padded), 2), -1)
    for part in parts:
        mine = zigzag(padded, part.rank, ranks)
        assert (row[mine] == -1).all()
        row[mine] = torch.stack((part.ids_T, part.positions_T), 1)
        assert torch.equal(mine[part.rows_N], _rows(whole, padded)[part.places[part.rank]])
        assert torch.equal(part.response_ids_N, whole.response_ids_N[part.places[part.rank]])
    real = torch.cat([torch.arange(n) + start for n, start in zip(whole.lengths, _starts(padded), strict=False)])
    assert torch.equal(row[real], torch.stack((whole.ids_T, whole.positions_T), 1))
    assert torch.cat([part.places[part.rank] for part in parts]).sort().values.tolist() == list(
        range(len(whole.rows_N))
    )
    assert all(torch.equal(a, b) for part in parts for a, b in zip(part.places, parts[0].places, strict=True))


def _starts(lengths: tuple[int, ...]) -> list[int]:
    return [sum(lengths[:i]) for i in range(len(lengths))]


def _rows(whole: MicroBatch, padded: tuple[int, ...]) -> torch.Tensor:
    """Where the predicting tokens of an unpadded row stand in the padded one."""
    shift = [new - old for new, old in zip(_starts(padded), _starts(whole.lengths), strict=False)]
    return whole.rows_N + torch.tensor(shift).repeat_interleave(torch.tensor(whole.lengths))[whole.rows_N]


@settings(deadline=None, max_examples=30)
@given(SEQUENCES, st.sampled_from([2, 3]))
def test_what_ranks_join_is_what_they_split(
    sequences: list[tuple[list[int], list[int], list[int]]], ranks: int
) -> None:
    given = [(i, prompt, response) for i, (prompt, response, _) in enumerate(sequences)]
    whole = pack(given, CPU)
    values = torch.arange(2 * len(whole.rows_N)).reshape(-1, 2)
    per_sample = [float(i) for i in range(len(sequences))]
    for rank in range(ranks):
        part = pack(given, CPU, RowCut(rank, ranks))
        parts = part.split(values)
        assert all(torch.equal(parts[i], whole.split(values)[i]) for i in whole.samples)
        assert torch.equal(part.join(parts, none=values[:0]), values[part.places[rank]])
        assert torch.equal(part.spread(per_sample), whole.spread(per_sample)[part.places[rank]])


@pytest.mark.parametrize(
    ("row", "tokens"), [(RowCut(), 1), (RowCut(multiple=4), 4), (RowCut(1, 2), 4), (RowCut(0, 2, 3), 12)]
)
def test_a_padding_micro_batch_fills_one_unit(row: RowCut, tokens: int) -> None:
    batch = pack([], CPU, row)
    assert (batch.samples, batch.padding, sum(batch.padded_lengths)) == ((), tokens, tokens)
    assert len(batch.ids_T) == tokens // row.ranks and len(batch.rows_N) == 0


def test_an_interleaved_pipeline_gets_its_multiple() -> None:
    samples = samples_of([([1, 2], [3], [1])] * 5)
    for multiple, count in ((1, 5), (2, 6), (4, 8)):
        found = micro_batches(samples, [list(range(5))], "student", 1, 0, CPU, WHOLE, multiple)
        assert [len(batch.samples) for batch in found] == [1] * 5 + [0] * (count - 5)
