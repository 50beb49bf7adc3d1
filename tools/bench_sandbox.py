"""How fast programs are executed in the sandbox, and answers graded.

    python tools/bench_sandbox.py [--workers 2] [--programs 200] [--backend bubblewrap]

throughput   trivial programs a second, all of them queued at once, each in a sandbox of its own; and bare ``python -c``
             a second by as many threads, which says what else the machine had to do
overhead     one program at a time: seconds until its outcome is there, less those of a bare ``python -c`` of the same
             program by the same interpreter; the two alternate
cold         the same without sandboxes that were started ahead
grading      answers of the task livecodebench a second, ten tests each, and how the time of a program with ten tests
             compares with one test
queue        resident memory of this process before and after two thousand programs wait

Medians. Results belong in tools/BENCHMARKS.md; a machine that does other work gives other numbers.
"""

import argparse
import asyncio
import dataclasses
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import psutil
from bench_machine import machine

from megatron_sdpo.sandbox import LocalSandbox, Program, SandboxConfig, check_local
from megatron_sdpo.tasks.livecodebench import LiveCodeBench
from megatron_sdpo.tasks.livecodebench_data import Case, Problem

TRIVIAL = "print(1)"
ANSWER = "```python\nprint(sum(map(int, input().split())))\n```"
TESTS = 10


def seconds(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def throughput(config: SandboxConfig, programs: int) -> float:
    """Programs a second, start and end of the pool not counted."""

    async def all_of_them(sandbox: LocalSandbox) -> None:
        outcomes = await asyncio.gather(*(sandbox.run(Program(TRIVIAL)) for _ in range(programs)))
        assert all(outcome.stdout == b"1\n" for (outcome,) in outcomes)

    with LocalSandbox(config) as sandbox:
        return programs / seconds(lambda: asyncio.run(all_of_them(sandbox)))


def bare_throughput(config: SandboxConfig, programs: int) -> float:
    """The same programs by bare interpreters, ``config.workers`` at a time."""
    with LocalSandbox(dataclasses.replace(config, warm=0)) as sandbox:
        command = [sandbox.interpreter, "-c", TRIVIAL]

    def all_of_them() -> None:
        with ThreadPoolExecutor(config.workers) as threads:
            list(threads.map(lambda _: subprocess.run(command, capture_output=True, check=True), range(programs)))

    return programs / seconds(all_of_them)


def start_up(config: SandboxConfig, rounds: int) -> tuple[float, float]:
    """Median seconds of one program in the sandbox, and of a bare interpreter."""
    inside: list[float] = []
    bare: list[float] = []
    with LocalSandbox(dataclasses.replace(config, workers=1)) as sandbox:
        python = sandbox.interpreter
        sandbox.run_blocking(Program(TRIVIAL))
        for _ in range(rounds):
            time.sleep(0.15)  # the next sandbox is being started; here one program at a time is wanted
            inside.append(seconds(lambda: sandbox.run_blocking(Program(TRIVIAL))))
            time.sleep(0.15)
            bare.append(seconds(lambda: subprocess.run([python, "-c", TRIVIAL], capture_output=True, check=True)))
    return statistics.median(inside), statistics.median(bare)


def grading(config: SandboxConfig, answers: int) -> tuple[float, float, float]:
    """Answers a second by as many threads as workers; median seconds of a program with one test, and with ten."""
    tests = tuple(Case(f"{i} {i}\n", f"{2 * i}\n") for i in range(TESTS))
    with tempfile.TemporaryDirectory() as folder, LocalSandbox(config) as sandbox:
        path = Path(folder) / "problems.jsonl"
        path.write_bytes(msgspec.json.encode(Problem(id="sum", question="Add.", tests=tests)))
        task = LiveCodeBench(data=str(path), train_tests="whole")
        task.use_sandbox(sandbox)
        (question,) = task.train_questions()
        with ThreadPoolExecutor(config.workers) as threads:

            def all_of_them() -> None:
                verdicts = threads.map(lambda _: task.verify(question, ANSWER), range(answers))
                assert all(verdict.reward == 1.0 for verdict in verdicts)

            rate = answers / seconds(all_of_them)
        source = "print(input())"
        one = [seconds(lambda: sandbox.run_blocking(Program(source, (b"1",)))) for _ in range(15)]
        ten = [seconds(lambda: sandbox.run_blocking(Program(source, (b"1",) * TESTS))) for _ in range(15)]
    return rate, statistics.median(one), statistics.median(ten)


def queue(config: SandboxConfig, programs: int = 2000) -> float:
    """Megabytes by which this process grows when so many wait."""

    async def waiting(sandbox: LocalSandbox) -> float:
        before = psutil.Process().memory_info().rss
        runs = [asyncio.create_task(sandbox.run(Program(TRIVIAL))) for _ in range(programs)]
        await asyncio.sleep(0.5)
        grown = psutil.Process().memory_info().rss - before
        for run in runs:
            run.cancel()
        await asyncio.gather(*runs, return_exceptions=True)
        return grown / 1e6

    with LocalSandbox(config) as sandbox:
        return asyncio.run(waiting(sandbox))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--programs", type=int, default=200)
    parser.add_argument("--backend", choices=("bubblewrap", "unsafe-none"), default="bubblewrap")
    given = parser.parse_args()
    config = SandboxConfig(backend=given.backend, workers=given.workers)
    check_local(config)
    print(machine())
    rate, bare = throughput(config, given.programs), bare_throughput(config, given.programs)
    print(f"throughput  {rate:6.1f} programs/s with {given.workers} workers; bare python -c {bare:.1f}/s")
    for name, warm in (("warm start", config.warm), ("cold start", 0)):
        inside, bare = (1e3 * s for s in start_up(dataclasses.replace(config, warm=warm), 40))
        print(f"{name}  {inside:6.1f} ms; bare python -c {bare:.1f} ms; overhead {inside - bare:.1f} ms")
    rate, one, ten = grading(config, 60)
    print(f"grading     {rate:6.1f} answers/s of {TESTS} tests; one test {1e3 * one:.1f} ms, all {1e3 * ten:.1f} ms")
    print(f"queue       {queue(config):6.1f} MB more for 2000 programs that wait")


if __name__ == "__main__":
    main()
