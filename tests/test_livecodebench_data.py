"""The task file of LiveCodeBench: made of a copy of the data set, read, and refused with the place of what is wrong."""

import base64
import datetime
import json
import pickle
import resource
import zlib
from pathlib import Path
from typing import Any

import prepare_livecodebench
import pytest

from megatron_sdpo.config import ConfigError
from megatron_sdpo.tasks import load_task
from megatron_sdpo.tasks.livecodebench import LiveCodeBench
from megatron_sdpo.tasks.livecodebench_data import Case, read_problems
from tests.livecodebench_setup import PAIR, SUM, packed, published_problem, write


def copy_of(folder: Path, *rows: dict) -> Path:
    path = folder / "test6.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_a_copy_of_livecodebench_becomes_a_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = json.dumps([{"input": "1", "output": "1", "testtype": "stdin"}])
    rows = [
        published_problem("early", date="2025-01-31T00:00:00"),
        published_problem("first", date="2025-02-01T00:00:00"),
        published_problem("called", "pair", "2025-04-30T12:00:00", starter_code="class Solution: ..."),
        published_problem("plain", date="2025-03-01T00:00:00", private_test_cases=plain),
        published_problem("late", date="2025-05-01T00:00:00"),
    ]
    copy, out = copy_of(tmp_path, *rows), tmp_path / "data" / "livecodebench"
    given = [str(copy), "--from", "2025-02-01", "--before", "2025-05-01", "--out", str(out)]
    assert prepare_livecodebench.main(given) == 0
    assert capsys.readouterr().out == f"{out}/problems.jsonl: 3 problems, 7 graded tests\n"
    problems = {problem.id: problem for problem in read_problems(out)}
    assert list(problems) == ["first", "called", "plain"]
    assert problems["called"].function == "pair" and len(problems["called"].tests) == 3
    assert problems["first"].public_tests == (Case("2\n1", "[1, 2]"),)
    questions = LiveCodeBench(data=str(out)).train_questions()
    assert {question.payload["category"] for question in questions} == {"easy"}
    assert questions[1].messages[0].content.endswith("```python\nclass Solution: ...\n```")
    assert questions[0].messages[0].content.endswith("write the answer to standard output.")
    assert [q.id for q in LiveCodeBench(data=str(out), problems=("plain",)).eval_questions()] == ["whole/plain"]


class _Malicious:
    def __reduce__(self) -> Any:
        return print, ("executed",)


class _Text(str):
    """A string, but not as the interpreter has it."""

    __slots__ = ()


PICKLES = {
    "calls": pickle.dumps(_Malicious()),
    "calls, in text": pickle.dumps(_Malicious(), protocol=0),
    "calls after a text": b"V[]\n0cbuiltins\nprint\n(Vexecuted\ntR.",
    "makes an object": pickle.dumps(_Text("[]")),
    "a list of texts": pickle.dumps(["[]"]),
    "bytes": pickle.dumps(b"[]"),
    "a name of somebody else's": b"Pprint\n.",
    "a registered class": b"\x82\x01.",
    "a memo that fills the memory": b"\x80\x02X\x02\x00\x00\x00[]r\xff\xff\xff\x7f.",
    "a text longer than the file": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x00[]",
    "cut short": pickle.dumps("[]")[:-1],
    "nothing": b".",
    "no pickle": b"[]",
}


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_of_anything_but_a_text_is_refused_and_not_carried_out(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = base64.b64encode(zlib.compress(PICKLES[name])).decode()
    copy = copy_of(tmp_path, published_problem("bad", private_test_cases=text))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert prepare_livecodebench.main([str(copy), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert "line 1: " in said.err and "executed" not in said.out
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("size", [1, 200, 100_000])
def test_texts_of_every_kind_of_pickle_are_read(tmp_path: Path, protocol: int, size: int) -> None:
    tests = [{"input": "\u00e9\u4e2d\U0001f40d" * size, "output": "1"}]
    data = pickle.dumps(json.dumps(tests, ensure_ascii=False), protocol)
    text = base64.b64encode(zlib.compress(data)).decode()
    prepare_livecodebench.prepare([copy_of(tmp_path, published_problem(private_test_cases=text))], tmp_path / "out")
    assert read_problems(tmp_path / "out")[0].tests == (Case(tests[0]["input"], "1"),)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"private_test_cases": packed(_Malicious())}, "its pickle is not one text"),
        ({"private_test_cases": "not base 64!"}, "not a row of LiveCodeBench"),
        ({"private_test_cases": "[]"}, "has no tests"),
        ({"private_test_cases": '[{"input": "1"}]'}, "output"),
        ({"metadata": '{"func_name": "f"}', "private_test_cases": '[{"input": "a", "output": "1"}]'}, "is not JSON"),
        ({"contest_date": "yesterday"}, "not a row of LiveCodeBench"),
        ({"question_content": " "}, "question is empty"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(
    tmp_path: Path, changes: dict, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = copy_of(tmp_path, published_problem("good"), published_problem("bad", **changes))
    assert prepare_livecodebench.main([str(copy), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert "line 2" in said.err and words in said.err and "executed" not in said.out
    assert not (tmp_path / "out").exists()


def test_what_a_copy_cannot_give_is_refused(tmp_path: Path) -> None:
    copy = copy_of(tmp_path, published_problem("a"))
    with pytest.raises(ConfigError, match="name each file of the copy once"):
        prepare_livecodebench.prepare([copy, copy], tmp_path / "out")
    with pytest.raises(ConfigError, match="no problem of the copy is from these dates"):
        prepare_livecodebench.prepare([copy], tmp_path / "out", first=datetime.date(2026, 1, 1))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("{}", "line 1: .*id"),
        ("[" * 100_000, "line 1"),
        ('{"id": "a", "question": "q", "tests": []}', "has no tests"),
        ('{"id": "a", "question": "q", "tests": [{"input": "", "output": ""}], "x": 1}', "x"),
        ('{"id": "a", "question": "q", "tests": [{"input": "", "output": ""}], "time_limit_s": 0}', "above 0"),
        ('{"id": "a", "question": "q", "function": "f", "tests": [{"input": "1", "output": "x"}]}', "is not JSON"),
        ('{"id": "a", "question": "q", "tests": [{"input": "", "output": ""}]}\n' * 2, "twice"),
    ],
)
def test_a_bad_task_file_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "problems.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=words):
        LiveCodeBench(data=str(tmp_path))


def test_options_that_name_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no problem 'x'"):
        LiveCodeBench(data=write(tmp_path, SUM), problems=("x",))
    with pytest.raises(ConfigError, match="cannot read the problems file"):
        LiveCodeBench(data=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="option 'train_tests'"):
        load_task("livecodebench", data=write(tmp_path, SUM), train_tests="quarter")


def test_bad_lines_are_named_counted_and_left_out_up_to_a_share(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(write(tmp_path, SUM, PAIR))
    path.write_bytes(b"{\n" + path.read_bytes() + b'{"id": "sum", "question": "q", "tests": []}\n')
    with pytest.raises(ConfigError, match=r"problems\.jsonl, line 1: .*\(2 of 4 rows are malformed"):
        LiveCodeBench(data=str(tmp_path), max_malformed_share=0.4)
    task = LiveCodeBench(data=str(tmp_path), max_malformed_share=0.5)
    assert [q.id for q in task.eval_questions()] == ["whole/sum", "whole/pair"]
    first, second, counted = caplog.messages
    assert "line 1: " in first and "line 4: the problem 'sum' has no tests" in second
    assert counted == "2 of 4 rows are malformed and left out"
    with pytest.raises(ConfigError, match="max_malformed_share is 1; set it"):
        LiveCodeBench(data=str(tmp_path), max_malformed_share=1.0)
