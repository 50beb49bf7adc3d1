"""The task file of LiveCodeBench: made of a copy of the data set, read, and refused with the place of what is wrong."""

import base64
import datetime
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

import prepare_livecodebench
import pytest

from megatron_sdpo.config import ConfigError
from megatron_sdpo.tasks import load_task
from megatron_sdpo.tasks.livecodebench import LiveCodeBench
from megatron_sdpo.tasks.livecodebench_data import Case, read_problems
from tests.livecodebench_setup import SUM, write


def packed(value: Any) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def row(id: str = "abc1", date: str = "2025-02-03T00:00:00", function: str | None = None, **changes: Any) -> dict:
    tests = [{"input": "2\n1", "output": "[1, 2]", "testtype": "functional" if function else "stdin"}]
    fields = {"question_title": "t", "question_content": "Do it.", "platform": "atcoder", "question_id": id}
    fields |= {"contest_id": "c", "contest_date": date, "starter_code": "", "difficulty": "easy"}
    fields |= {"public_test_cases": json.dumps(tests), "private_test_cases": packed(json.dumps(tests * 3))}
    return fields | {"metadata": json.dumps({"func_name": function} if function else {})} | changes


def copy_of(folder: Path, *rows: dict) -> Path:
    path = folder / "test6.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_a_copy_of_livecodebench_becomes_a_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = json.dumps([{"input": "1", "output": "1", "testtype": "stdin"}])
    rows = [
        row("early", "2025-01-31T00:00:00"),
        row("first", "2025-02-01T00:00:00"),
        row("called", "2025-04-30T12:00:00", "pair", starter_code="class Solution: ..."),
        row("plain", "2025-03-01T00:00:00", private_test_cases=plain),
        row("late", "2025-05-01T00:00:00"),
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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(_Malicious()))).decode()},
            "names builtins.print",
        ),
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
    copy = copy_of(tmp_path, row("good"), row("bad", **changes))
    assert prepare_livecodebench.main([str(copy), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert "line 2" in said.err and words in said.err and "executed" not in said.out
    assert not (tmp_path / "out").exists()


def test_what_a_copy_cannot_give_is_refused(tmp_path: Path) -> None:
    copy = copy_of(tmp_path, row("a"))
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
