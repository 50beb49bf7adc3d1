"""Problems that tests of LiveCodeBench share, and their task file."""

import base64
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

import msgspec

from megatron_sdpo.tasks.livecodebench_data import Case, Problem

SUM = Problem(
    id="sum",
    question="Add the numbers of a line.",
    tests=(Case("1 2\n", "3\n"), Case("10 20 30\n", "60\n"), Case("5\n", "5\n"), Case("0 0\n", "0\n")),
    public_tests=(Case("1 1\n", "2\n"),),
    time_limit_s=0.5,
    memory_bytes=128 * 2**20,
)
PAIR = Problem(
    id="pair",
    question="Return a and b, sorted.",
    tests=(Case("2\n1", "[1, 2]"), Case("1\n1", "[1, 1]")),
    function="pair",
    starter_code="class Solution:\n    def pair(self, a: int, b: int) -> List[int]:\n        ",
)
RIGHT = "print(sum(map(int, input().split())))"


def packed(value: Any) -> str:
    """As private tests are published: pickled, compressed, in base 64."""
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def published_problem(
    id: str = "abc1", function: str | None = None, date: str = "2025-02-03T00:00:00", **changes: Any
) -> dict[str, Any]:
    """A row of code_generation_lite, with its columns."""
    tests = [{"input": "2\n1", "output": "[1, 2]", "testtype": "functional" if function else "stdin"}]
    fields = {"question_title": "t", "question_content": "Do it.", "platform": "atcoder", "question_id": id}
    fields |= {"contest_id": "c", "contest_date": date, "starter_code": "", "difficulty": "easy"}
    fields |= {"public_test_cases": json.dumps(tests), "private_test_cases": packed(json.dumps(tests * 3))}
    return fields | {"metadata": json.dumps({"func_name": function} if function else {})} | changes


def write(folder: Path, *problems: Problem) -> str:
    path = folder / "problems.jsonl"
    path.write_bytes(b"".join(msgspec.json.encode(problem) + b"\n" for problem in problems))
    return str(path)
