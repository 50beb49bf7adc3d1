"""Turn a local copy of LiveCodeBench into a task file for the task livecodebench.

    python tools/prepare_livecodebench.py COPY/test6.jsonl --from 2025-02-01 --before 2025-05-01 \\
        --out data/livecodebench

COPY holds the JSON-lines files of livecodebench/code_generation_lite, which you have got yourself (parquet is read,
too). The dates given above are those of the 131 problems of the paper (release v6). Private tests become the graded
ones, public tests stay apart. Nothing is executed and nothing is downloaded.
"""

import argparse
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from megatron_sdpo.config import ConfigError
from megatron_sdpo.tasks.livecodebench_data import FILE, Problem, convert


def prepare(
    copies: Sequence[Path], out: Path, first: datetime.date | None = None, before: datetime.date | None = None
) -> tuple[int, int]:
    """Write ``out``/problems.jsonl; how many problems and graded tests. What cannot be read raises ConfigError."""
    problems: dict[str, Problem] = {}
    for copy in copies:
        for problem in convert(copy, first, before):
            if problem.id in problems:
                raise ConfigError(f"{copy} has the problem {problem.id!r} once more; name each file of the copy once")
            problems[problem.id] = problem
    if not problems:
        raise ConfigError("no problem of the copy is from these dates; set --from and --before to others")
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / (FILE + ".tmp")
    with temporary.open("wb") as file:
        file.writelines(msgspec.json.encode(problem) + b"\n" for problem in problems.values())
    temporary.replace(out / FILE)
    return len(problems), sum(len(problem.tests) for problem in problems.values())


def prepared(
    copies: Sequence[Path], out: Path, first: datetime.date | None = None, before: datetime.date | None = None
) -> str:
    """``prepare``, and what it did in words; a file that is there is not written over."""
    if (out / FILE).exists():
        raise ConfigError(f"{out / FILE} exists already; remove it or give another target")
    problems, tests = prepare(copies, out, first, before)
    return f"{out / FILE}: {problems} problems, {tests} graded tests"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("copies", type=Path, nargs="+", help="files of code_generation_lite")
    parser.add_argument("--out", type=Path, required=True, help=f"folder for {FILE}")
    parser.add_argument("--from", dest="first", type=datetime.date.fromisoformat, help="first day of contests")
    parser.add_argument("--before", type=datetime.date.fromisoformat, help="the day after the last")
    given = parser.parse_args(arguments)
    try:
        print(prepared(given.copies, given.out, given.first, given.before))
    except ConfigError as error:
        print(f"prepare_livecodebench: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
