"""Competitive-programming problems: the task file, and how rows of LiveCodeBench become it.

One problem a line; ``tests`` decide the reward, ``public_tests`` are those that its statement shows::

    {"id": "abc387_f", "question": "You are given ...", "starter_code": "", "function": null, "date": "2025-02-01",
     "difficulty": "easy", "tests": [{"input": "3\n1 2 3\n", "output": "6\n"}], "public_tests": []}

A problem with a ``function`` has one JSON value a line in each input, one in each output. ``time_limit_s`` and
``memory_bytes`` may stand in a line; otherwise the sandbox's limits hold.
"""

import base64
import datetime
import json
import pickletools
import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from megatron_sdpo.config import ConfigError
from megatron_sdpo.tasks.dataset import judge_malformed
from megatron_sdpo.tasks.rows import RowError, read_rows

FILE = "problems.jsonl"
"""The task file in a folder."""


class Case(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a program reads, and what it should print or return."""

    input: str
    output: str


class Problem(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One line of the task file."""

    id: str
    question: str
    tests: tuple[Case, ...]
    public_tests: tuple[Case, ...] = ()
    function: str | None = None
    starter_code: str = ""
    date: str = ""
    difficulty: str = ""
    time_limit_s: float | None = None
    memory_bytes: int | None = None


def read_problems(path: str | Path, max_malformed_share: float = 0.0) -> tuple[Problem, ...]:
    """The problems of a task file, or of a folder's ``problems.jsonl``.

    Bad lines are named in the log and left out; more than ``max_malformed_share`` of the lines raise ConfigError.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    problems: dict[str, Problem] = {}
    malformed: list[str] = []
    lines = 0
    for number, line in _lines(path):
        lines += 1
        try:
            problem = _checked(msgspec.json.decode(line, type=Problem))
            if problem.id in problems:
                raise ConfigError(f"the problem {problem.id!r} is there twice")
            problems[problem.id] = problem
        except (ConfigError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            malformed.append(f"{path}, line {number}: {error}")
    if not lines:
        raise ConfigError(f"the problems file {path} is empty; make it with tools/prepare_data.py")
    judge_malformed(malformed, lines, max_malformed_share)
    return tuple(problems.values())


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number and text of each line that is not empty."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise ConfigError(f"cannot read the problems file {path}: {error.strerror}") from error


def _checked(problem: Problem) -> Problem:
    if not problem.id or not problem.question.strip():
        raise ConfigError("the id or the question is empty")
    if not problem.tests:
        raise ConfigError(f"the problem {problem.id!r} has no tests")
    for limit in (problem.time_limit_s, problem.memory_bytes):
        if limit is not None and limit <= 0:
            raise ConfigError(f"a limit of the problem {problem.id!r} is {limit}; it must be above 0")
    if problem.function is not None:
        for test in (*problem.tests, *problem.public_tests):
            try:
                json.loads(test.output)
                list(map(json.loads, test.input.split("\n")))
            except ValueError as error:
                raise ConfigError(f"a test of the function problem {problem.id!r} is not JSON: {error}") from error
    return problem


def half_of_tests(problem: Problem) -> tuple[int, ...]:
    """The places of a random half of a problem's tests, at least one; the same in every run and for every file."""
    count = len(problem.tests)
    return tuple(sorted(random.Random(f"half of {problem.id}").sample(range(count), max(1, count // 2))))


# --- rows of LiveCodeBench's code_generation_lite


def convert(path: Path, first: datetime.date | None = None, before: datetime.date | None = None) -> Iterator[Problem]:
    """The problems of a copy of LiveCodeBench, of contests from ``first`` on and ``before`` a day.

    The copy is a file of JSON lines, as it is published, or one that rows.py reads (parquet, arrow).
    """
    rows = read_rows([path])
    if not len(rows):
        raise ConfigError(f"{path} is empty; name a file of LiveCodeBench")
    for place in range(len(rows)):
        try:
            problem = _checked(problem_of_row(rows[place]))
        except (ConfigError, RowError) as error:
            raise ConfigError(f"{rows.where(place)}: {error}") from error
        day = datetime.date.fromisoformat(problem.date)
        if (first is None or first <= day) and (before is None or day < before):
            yield problem


def problem_of_row(row: dict[str, Any]) -> Problem:
    """A row as LiveCodeBench publishes it; its private tests are graded, as in the paper."""
    try:
        function = json.loads(row["metadata"] or "{}").get("func_name")
        return Problem(
            id=str(row["question_id"]),
            question=row["question_content"],
            tests=_tests(row["private_test_cases"]),
            public_tests=_tests(row["public_test_cases"]),
            function=function,
            starter_code=row["starter_code"] or "",
            difficulty=str(row.get("difficulty") or ""),
            date=datetime.datetime.fromisoformat(str(row["contest_date"])).date().isoformat(),
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, zlib.error) as error:
        raise ConfigError(f"not a row of LiveCodeBench: {type(error).__name__}: {error}") from error


_TEXTS = ("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
_AROUND = ("PROTO", "FRAME", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "STOP")
"""Instructions of a pickle that holds one text: those that make it, and those that mean nothing beside it."""


def _pickled_text(data: bytes) -> str:
    """The one text in a pickle, whose instructions are read and not carried out; ValueError for any other pickle."""
    texts: list[str] = []
    for instruction, argument, _ in pickletools.genops(data):
        if instruction.name in _TEXTS and not texts:
            texts.append(str(argument))
        elif instruction.name not in _AROUND:
            raise ValueError(f"its pickle is not one text: it goes on with {instruction.name}")
    if not texts:
        raise ValueError("its pickle is empty")
    return texts[0]


def _tests(text: str) -> tuple[Case, ...]:
    """JSON as it is, or pickled, compressed and in base 64."""
    try:
        cases = json.loads(text)
    except ValueError:
        packed = zlib.decompress(base64.b64decode(text, validate=True))
        cases = json.loads(_pickled_text(packed))
    return tuple(Case(case["input"], case["output"]) for case in cases)
