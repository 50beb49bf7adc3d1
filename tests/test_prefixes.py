"""Shared beginnings, before any model: who shares, what is saved, where tokens and rows stand, how ranks are dealt."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_sdpo.batching import MicroBatch, RowCut, View, assign, cut, cuts_of, homes_of, pack, packed, prompt_of
from megatron_sdpo.flops import Tokens, counted
from megatron_sdpo.prefixes import Prefix, common, shared, spared, together
from megatron_sdpo.types import Sample

CPU = torch.device("cpu")
FEW = st.lists(st.integers(0, 1), max_size=5)
"""Tokens of which there are two: beginnings, whole prompts that begin others, and equal ones are frequent."""


@st.composite
def siblings(draw: st.DrawFn) -> list[tuple[list[int], list[int]]]:
    """(prompt, response): prompts of at least one token, which begin with parts of one text."""
    text = draw(st.lists(st.integers(2, 9), min_size=1, max_size=12))
    found = []
    for _ in range(draw(st.integers(1, 6))):
        prompt = text[: draw(st.integers(0, len(text)))] + draw(FEW)
        found.append((prompt or [0], draw(st.lists(st.integers(0, 9), max_size=4))))
    return found


def samples_of(found: Sequence[tuple[list[int], list[int]]], questions: int = 1) -> list[Sample]:
    return [Sample(str(i), i % questions, (), tuple(r), (), tuple(p), 0.0) for i, (p, r) in enumerate(found)]


@given(FEW, FEW)
def test_common_is_where_two_differ_first(a: list[int], b: list[int]) -> None:
    assert common(a, b) == sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _divisions(items: list[int]) -> list[list[list[int]]]:
    if not items:
        return [[]]
    first, *rest = items
    found = []
    for division in _divisions(rest):
        found.append([[first], *division])
        for k, part in enumerate(division):
            found.append([*division[:k], [first, *part], *division[k + 1 :]])
    return found


@settings(deadline=None)
@given(siblings(), st.integers(1, 4))
@example([([2, 0, 1], []), ([2], []), ([2, 2], []), ([2, 0, 1], [])], 1)
def test_no_division_saves_more(found: list[tuple[list[int], list[int]]], least: int) -> None:
    prompts = {3 * i + 1: tuple(prompt) for i, (prompt, _) in enumerate(found)}
    chosen = shared(prompts, least)

    def saving(part: Sequence[int]) -> int:
        tokens = min(common(prompts[a], prompts[b]) for a in part for b in part)
        return (len(part) - 1) * tokens if tokens >= least else 0

    groups: dict[Prefix, list[int]] = {}
    for i, prefix in chosen.items():
        groups.setdefault(prefix, []).append(i)
    for prefix, members in groups.items():
        assert prefix.first == min(members) and len(members) > 1 and prefix.tokens >= least
        assert len({prompts[i][: prefix.tokens] for i in members}) == 1
        assert min(len(prompts[i]) for i in members) >= prefix.tokens
    most = max(sum(map(saving, division)) for division in _divisions(list(prompts)))
    assert sum(prefix.tokens * (len(members) - 1) for prefix, members in groups.items()) == most
    assert spared([sorted(chosen, key=lambda i: chosen[i].first)], chosen).tokens == most


def test_what_siblings_share_is_the_longest_solution_not_the_question_alone() -> None:
    question, first, second = (1, 2, 3, 4), (5, 6, 7, 8, 9), (5, 5, 5)
    prompts = {i: (*question, *first, i) for i in range(4)} | {4: (*question, *second), 5: (*question, *second, 7)}
    assert shared(prompts, 3) == dict.fromkeys(range(4), Prefix(0, 9)) | dict.fromkeys((4, 5), Prefix(4, 7))
    del prompts[5]
    assert shared(prompts, 3) == dict.fromkeys(range(4), Prefix(0, 9))
    # Those who read the question alone share it, around those who read more.
    prompts |= {6: (*question, 0), 7: (*question, 9)}
    assert shared(prompts, 3) == dict.fromkeys(range(4), Prefix(0, 9)) | dict.fromkeys((4, 6, 7), Prefix(4, 4))
    assert shared({}, 1) == shared({0: (1,)}, 1) == shared({0: (1, 2), 1: (1, 3)}, 2) == {}


def test_a_long_chain_of_beginnings_is_no_deeper_than_a_list() -> None:
    chain = {i: tuple(range(i + 1)) for i in range(200)}
    chosen = shared(chain, 1)
    assert all(chain[i][: prefix.tokens] == chain[prefix.first][: prefix.tokens] for i, prefix in chosen.items())
    assert spared([sorted(chosen, key=lambda i: chosen[i].first)], chosen).tokens > 199 * 200 // 2 * 0.8


def check_row(batch: MicroBatch, samples: Sequence[Sample], view: View) -> None:
    """Each sequence found in the row by positions alone: a piece at 0 begins one, any other continues the last such."""
    ends = list(itertools.accumulate(batch.lengths))
    pieces = [(s, slice(e - n, e)) for s, n, e in zip(batch.starts, batch.lengths, ends, strict=True)]
    ids, positions = batch.ids_T.tolist(), batch.positions_T.tolist()
    assert len(ids) == ends[-1]
    head: slice | None = None
    for start, piece in pieces:
        assert positions[piece] == list(range(start, start + piece.stop - piece.start))
        if start == 0:
            head = piece
        else:
            assert head is not None and head.stop - head.start == start

    def tokens_before(row: int) -> list[int]:
        """What the token at a row has read, itself included."""
        head: slice = slice(0, 0)
        for start, piece in pieces:
            head = piece if start == 0 else head
            if piece.start <= row < piece.stop:
                return ([] if start == 0 else ids[head]) + ids[piece.start : row + 1]
        raise AssertionError(row)

    rows, answers = iter(batch.rows_N.tolist()), iter(batch.response_ids_N.tolist())
    for i in batch.samples:
        sequence = [*prompt_of(samples[i], view), *samples[i].response_ids]
        for offset in range(len(samples[i].response_ids)):
            known = sequence[: len(prompt_of(samples[i], view)) + offset]
            assert tokens_before(next(rows)) == known
            assert next(answers) == sequence[len(known)]
    assert next(rows, None) is next(answers, None) is None


@settings(deadline=None, max_examples=200)
@given(siblings(), st.integers(1, 3), st.integers(1, 40), st.integers(1, 3), st.sampled_from([1, 4]), st.data())
def test_rows_hold_every_sequence_within_the_budget(
    found: list[tuple[list[int], list[int]]],
    questions: int,
    budget: int,
    data_size: int,
    multiple: int,
    data: st.DataObject,
) -> None:
    samples = samples_of(found, questions)
    dealt = data.draw(st.lists(st.integers(0, data_size - 1), min_size=len(samples), max_size=len(samples)))
    shares = [[i for i, rank in enumerate(dealt) if rank == r] for r in range(data_size)]
    cuts = cuts_of(samples, shares, "teacher", budget, least_shared=1)
    assert cuts == cuts_of(samples, [share[::-1] for share in shares], "teacher", budget, least_shared=1)
    assert len({len(own) for own in cuts.ranks}) == 1
    plain = sum(len(p) + len(r) for p, r in found)
    computed = 0
    for rank, share in enumerate(shares):
        batches = packed(samples, cuts, "teacher", rank, CPU, RowCut(multiple=multiple))
        assert sorted(i for batch in batches for i in batch.samples) == share
        for batch in batches:
            check_row(batch, samples, "teacher")
            assert len(batch.ids_T) % multiple == 0
            assert len(batch.samples) <= 1 or len(batch.ids_T) - batch.padding <= budget
            computed += len(batch.ids_T) - batch.padding
    assert plain - computed == cuts.spared.tokens


@settings(deadline=None)
@given(siblings())
def test_pairs_are_spared_with_the_tokens(found: list[tuple[list[int], list[int]]]) -> None:
    """Counted one pair at a time, of a token and one that it reads."""
    samples, order = samples_of(found), list(range(len(found)))
    chosen = shared({i: prompt_of(samples[i], "teacher") for i in order}, 1)
    order.sort(key=lambda i: (chosen[i].first if i in chosen else i, i))
    batch = pack([(i, prompt_of(samples[i], "teacher"), samples[i].response_ids) for i in order], CPU, prefixes=chosen)
    whole = counted([(len(p), len(r)) for p, r in found])
    pairs = sum(start + k + 1 for start, n in zip(batch.starts, batch.lengths, strict=True) for k in range(n))
    assert spared([order], chosen) == Tokens(whole.tokens - len(batch.ids_T), whole.pairs - pairs, 0)


def test_one_who_shares_with_nobody_here_stands_alone() -> None:
    chosen: dict[int, Prefix] = dict.fromkeys((0, 1, 2), Prefix(0, 2))
    assert together((0, 2, 5, 1), chosen) == [(Prefix(0, 2), [0, 2]), (None, [5]), (None, [1])]
    batch = pack([(0, (1, 2, 3), (4,)), (5, (7,), (8,)), (1, (1, 2), (9,))], CPU, prefixes=chosen)
    assert (batch.starts, batch.lengths) == ((0, 0, 0), (4, 2, 3))


def test_the_end_of_a_beginning_predicts_for_all_whose_prompt_it_is() -> None:
    chosen: dict[int, Prefix] = dict.fromkeys((0, 1, 2), Prefix(0, 2))
    batch = pack([(0, (1, 2), (4,)), (1, (1, 2), (5, 6)), (2, (1, 2), ())], CPU, prefixes=chosen)
    assert (batch.starts, batch.lengths, batch.ids_T.tolist()) == ((0, 2, 2), (2, 1, 2), [1, 2, 4, 5, 6])
    assert batch.rows_N.tolist() == [1, 1, 3]
    assert batch.response_lengths == (1, 2, 0)


def test_a_group_that_no_micro_batch_holds_reads_its_beginning_in_each() -> None:
    samples = samples_of([([1] * 20 + [i], [5, 6]) for i in range(2, 8)])
    cuts = cuts_of(samples, [list(range(6))], "teacher", 29, least_shared=8)
    assert cuts.ranks == (((0, 1, 2), (3, 4, 5)),)
    assert [len(b.ids_T) for b in packed(samples, cuts, "teacher", 0, CPU)] == [29, 29]
    assert cuts.spared == Tokens(4 * 20, 4 * 210, 0)
    assert [len(b) for b in cuts_of(samples, [list(range(6))], "teacher", 29).ranks[0]] == [1] * 6


def test_short_beginnings_and_other_questions_are_not_shared() -> None:
    short, long = [1] * 7, [1] * 8
    for beginning, questions, count in ((short, 1, 0), (long, 2, 0), (long, 1, 1)):
        samples = samples_of([([*beginning, 2], [5]), ([*beginning, 3], [5])], questions)
        cuts = cuts_of(samples, [[0, 1]], "teacher", 99, least_shared=8)
        assert cuts.spared.tokens == count * len(long)


def test_what_cannot_be_packed_is_refused() -> None:
    twice = [(0, (1, 2), (3,)), (1, (1, 2), (3,))]
    with pytest.raises(ValueError, match="context-parallel ranks divide whole sequences"):
        pack(twice, CPU, RowCut(0, 2), dict.fromkeys((0, 1), Prefix(0, 2)))
    with pytest.raises(ValueError, match="twice in one row"):
        pack([twice[0], twice[0]], CPU)


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 4)), max_size=24),
    st.integers(1, 5),
    st.data(),
)
def test_siblings_meet_as_far_as_ranks_stay_balanced(
    found: list[tuple[int, int]], data_size: int, data: st.DataObject
) -> None:
    costs, groups = [c for c, _ in found], [g for _, g in found]
    homes = homes_of(costs, groups, data_size)
    assert all(len({h for h, g in zip(homes, groups, strict=True) if g == group}) == 1 for group in groups)
    positions = data.draw(st.lists(st.sampled_from(range(len(costs))), unique=True)) if costs else []
    shares = assign(costs, positions, data_size, homes)
    assert sorted(i for share in shares for i in share) == sorted(positions)
    assert shares == assign(costs, positions[::-1], data_size, homes)
    loads = [sum(costs[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max((costs[i] for i in positions), default=0)


def test_whole_questions_stay_together_where_they_weigh_alike() -> None:
    groups = [i // 8 for i in range(32)]
    costs = [100] * 32
    for chosen in (range(32), range(0, 32, 2)):  # a mini-batch of all, and one of every other
        shares = assign(costs, chosen, 4, homes_of(costs, groups, 4))
        assert [len({groups[i] for i in share}) for share in shares] == [1] * 4
    assert max(len({groups[i] for i in share}) for share in assign(costs, range(32), 4)) == 4


def test_cut_counts_a_beginning_once() -> None:
    lengths, chosen = dict.fromkeys(range(4), 10), dict.fromkeys(range(4), Prefix(0, 8))
    assert cut(range(4), lengths, 16, 0, chosen) == [(0, 1, 2, 3)]
    assert cut(range(4), lengths, 15, 0, chosen) == [(0, 1), (2, 3)]
    assert cut(range(4), lengths, 15) == [(0,), (1,), (2,), (3,)]
