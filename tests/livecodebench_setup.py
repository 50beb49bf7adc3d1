"""Problems that tests of LiveCodeBench share, and their task file."""

from pathlib import Path

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


def write(folder: Path, *problems: Problem) -> str:
    path = folder / "problems.jsonl"
    path.write_bytes(b"".join(msgspec.json.encode(problem) + b"\n" for problem in problems))
    return str(path)
