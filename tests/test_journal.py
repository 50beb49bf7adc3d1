"""Groups on disk: what comes back, what a kill may leave, and what is refused."""

import json
import tempfile
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sdpo.rollout.journal import Journal, JournalError
from megatron_sdpo.types import Attempt, Group, Message, Question, Verdict

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
IDS = st.lists(st.integers(0, 200_000), max_size=4).map(tuple)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
QUESTIONS = st.builds(
    Question,
    id=st.text(),
    messages=st.lists(st.builds(Message, st.sampled_from(["system", "user", "assistant"]), st.text())).map(tuple),
    payload=st.dictionaries(st.text(), JSON, max_size=3),
)
ATTEMPTS = st.builds(
    Attempt,
    prompt_ids=IDS,
    response_ids=IDS,
    engine_log_probs=st.lists(NUMBERS, max_size=4).map(tuple),
    text=st.text(),
    finish=st.sampled_from(["stop", "length"]),
    weight_version=st.integers(0, 10**6),
)
VERDICTS = st.builds(Verdict, st.floats(0, 1), st.text())


def groups_of(step: int, slots: int) -> st.SearchStrategy[list[Group]]:
    """Groups of one step, one a slot, in any order."""
    one = st.tuples(QUESTIONS, st.lists(st.tuples(ATTEMPTS, VERDICTS), max_size=3))
    made = st.lists(one, min_size=slots, max_size=slots).map(
        lambda parts: [
            Group(step, slot, question, tuple(a for a, _ in judged), tuple(v for _, v in judged))
            for slot, (question, judged) in enumerate(parts)
        ]
    )
    return made.flatmap(st.permutations).map(list)


def group(step: int = 4, slot: int = 0) -> Group:
    attempt = Attempt((5, 9), (31, 1), (-0.7, -0.1), "above 2\nsort", "stop", step)
    return Group(step, slot, Question(f"q{slot}", (Message("user", "é"),)), (attempt,), (Verdict(1.0),))


@settings(max_examples=60, deadline=None)
@given(groups_of(3, 3))
def test_what_is_appended_is_read_back(groups: list[Group]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder))
        for one in groups:
            journal.append(one)
        assert Journal(Path(folder)).groups(3) == {one.slot: one for one in groups}
        assert journal.groups(2) == {}
        assert [path.name for path in Path(folder).iterdir()] == ["step-00000003.jsonl"]


@settings(max_examples=40, deadline=None)
@given(groups_of(3, 3), st.data())
def test_a_kill_at_any_byte_loses_only_the_group_being_written(groups: list[Group], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        journal, path = Journal(Path(folder)), Path(folder) / "step-00000003.jsonl"
        for one in groups[:2]:
            journal.append(one)
        whole = path.read_bytes()
        journal.append(groups[2])
        path.write_bytes(path.read_bytes()[: data.draw(st.integers(len(whole), path.stat().st_size - 1))])
        assert Journal(Path(folder)).groups(3) == {one.slot: one for one in groups[:2]}
        assert path.read_bytes() == whole
        journal.append(groups[2])
        assert Journal(Path(folder)).groups(3) == {one.slot: one for one in groups}


def test_a_dropped_line_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal, path = Journal(tmp_path), tmp_path / "step-00000004.jsonl"
    journal.append(group())
    assert journal.groups(4) == {0: group()}
    assert caplog.records == []
    path.write_bytes(path.read_bytes()[:-1])  # the whole object, but not its line end
    assert journal.groups(4) == {}
    assert [str(path) in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (b"\x00\x00\x00", "is not a group"),
        (b"", "is not a group"),
        (b'{"step": 4}', "is not a group"),
        (msgspec.json.encode(group(slot=1)).replace(b"above", b"\xff"), "is not a group"),
        (msgspec.json.encode(group(slot=1)).replace(b"{}", b'{"a":' + b"[" * 100_000), "is not a group"),
        (json.dumps([4]).encode(), "is not a group"),
    ],
)
def test_a_line_that_is_no_group_is_named(tmp_path: Path, second: bytes, words: str) -> None:
    journal, path = Journal(tmp_path), tmp_path / "step-00000004.jsonl"
    journal.append(group())
    first = path.read_bytes()
    path.write_bytes(first + second + b"\n" + first)
    with pytest.raises(JournalError) as error:
        journal.groups(4)
    assert str(error.value).startswith(f"{path} line 2 {words}")
    assert path.read_bytes() == first + second + b"\n" + first


@pytest.mark.parametrize(
    ("second", "words"),
    [(group(slot=0), "holds step 4 slot 0 out of place"), (group(step=5, slot=1), "holds step 5 slot 1 out of place")],
)
def test_a_group_out_of_place_is_named(tmp_path: Path, second: Group, words: str) -> None:
    journal, path = Journal(tmp_path), tmp_path / "step-00000004.jsonl"
    journal.append(group())
    journal.append(second)
    if second.step != 4:  # as a file that was copied over another would hold it
        other = tmp_path / "step-00000005.jsonl"
        path.write_bytes(path.read_bytes() + other.read_bytes())
    with pytest.raises(JournalError) as error:
        journal.groups(4)
    assert str(error.value) == f"{path} line 2 {words}"


def test_whole_groups_are_counted_by_step(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for step, slot in ((3, 0), (4, 0), (4, 1), (6, 2)):
        journal.append(group(step, slot))
    with (tmp_path / "step-00000006.jsonl").open("ab") as file:
        file.write(b'{"cut')
    (tmp_path / "step-00000007.jsonl").touch()
    assert journal.counts(4) == {4: 2, 6: 1}
