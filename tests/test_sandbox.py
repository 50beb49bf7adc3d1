"""The sandbox: what programs cannot do, how they end, and that they do not disturb each other."""

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import replace

import psutil
import pytest

from megatron_sdpo.sandbox import LocalSandbox, Outcome, Program
from tests.sandbox_attacks import ATTACKS, DAEMON, Attack
from tests.sandbox_setup import CONFIG, SMALL, skip_without_sandbox

NEIGHBOUR = Program("print(sum(map(int, input().split())))", (b"1 2 3",), limits=SMALL)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[LocalSandbox]:
    skip_without_sandbox()
    os.environ["SECRET_OF_A_TEST"] = "hunter2"
    with LocalSandbox(CONFIG) as sandbox:
        yield sandbox
    del os.environ["SECRET_OF_A_TEST"]


def one(sandbox: LocalSandbox, source: str, **options: object) -> Outcome:
    return sandbox.run_blocking(Program(source, limits=replace(SMALL, **options)))[0]  # pyright: ignore


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_an_attack_is_contained_and_its_neighbour_unharmed(sandbox: LocalSandbox, attack: Attack) -> None:
    outcomes: list[Outcome] = []
    attacker = threading.Thread(target=lambda: outcomes.append(one(sandbox, attack.source, wall_s=attack.wall_s)))
    attacker.start()
    while attacker.is_alive():
        assert sandbox.run_blocking(NEIGHBOUR)[0].stdout == b"6\n"
        attacker.join(0.3)
    outcome = outcomes[0]
    assert outcome.kind in attack.kinds
    if attack.output is not None:
        assert outcome.stdout.decode() == attack.output
    assert attack.error in outcome.error
    assert outcome.wall_s < attack.wall_s + 5
    assert len(outcome.stdout) <= SMALL.output_bytes
    assert sandbox.run_blocking(NEIGHBOUR)[0].stdout == b"6\n"
    assert not [p for p in psutil.process_iter(["cmdline"]) if DAEMON in (p.info["cmdline"] or [])]


def test_the_memory_of_all_processes_together_is_bounded(sandbox: LocalSandbox) -> None:
    """Measured from outside: four children grow to just below the limit of one, and end when they pass it together."""
    (attack,) = (attack for attack in ATTACKS if attack.name.startswith("memory of processes that are each"))
    outcomes: list[Outcome] = []
    attacker = threading.Thread(target=lambda: outcomes.append(one(sandbox, attack.source)))
    attacker.start()
    most = 0
    while attacker.is_alive():
        most = max(most, sum(map(_own_bytes, psutil.Process().children(recursive=True))))
        attacker.join(0.005)
    assert outcomes[0].kind == "memory_limit"
    assert 100e6 < most < 1.6 * SMALL.memory_bytes


def _own_bytes(process: psutil.Process) -> int:
    with suppress(psutil.Error):
        memory = process.memory_info()
        return memory.rss - memory.shared
    return 0


def test_every_input_is_executed_by_itself(sandbox: LocalSandbox) -> None:
    source = """
import os, sys
seen = [name for name in os.listdir("/tmp")]
open("/tmp/left", "w").write(sys.stdin.read())
if os.fork() == 0:
    while True: pass
print(seen, len([n for n in os.listdir("/proc") if n.isdigit()]), hasattr(sys, "kept"), "hunter2" in str(os.environ))
sys.kept = True
"""
    outcomes = sandbox.run_blocking(Program(source, (b"a", b"b", b"c"), limits=SMALL))
    assert [outcome.stdout for outcome in outcomes] == [b"[] 3 False False\n"] * 3
    assert {outcome.kind for outcome in outcomes} == {"ok"}


def test_it_stops_after_the_first_that_does_not_end_well(sandbox: LocalSandbox) -> None:
    program = Program("print(1 // int(input()))", (b"1", b"0", b"1"), limits=SMALL)
    first, second = sandbox.run_blocking(program)
    assert (first.kind, first.stdout, first.exit_code) == ("ok", b"1\n", 0)
    assert (second.kind, second.exit_code) == ("runtime_error", 1)
    assert second.error == (
        "ZeroDivisionError: integer division or modulo by zero\n"
        "    print(1 // int(input()))\nLine 1 in <module> (Solution.py)"
    )


def test_what_an_execution_used_is_told(sandbox: LocalSandbox) -> None:
    source = (
        "import time\nx = bytearray(60 * 10**6)\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    )
    outcome = one(sandbox, source)
    assert 0.28 < outcome.cpu_s < 0.6 and outcome.wall_s > outcome.cpu_s - 0.05
    assert 60e6 < outcome.peak_bytes < 120e6
    assert one(sandbox, "").peak_bytes < 40e6  # not what this process has


def test_ends_by_code_and_by_signal(sandbox: LocalSandbox) -> None:
    ends = [
        one(sandbox, f"import os, sys\n{end}") for end in ("sys.exit(3)", "os._exit(3)", "os.abort()", "exit('no')")
    ]
    assert [(end.kind, end.exit_code, end.signal) for end in ends] == [
        ("ok", 3, None),
        ("runtime_error", 3, None),
        ("runtime_error", None, 6),
        ("ok", 1, None),
    ]
    assert ends[3].stderr == b"no\n"


@pytest.mark.parametrize(
    ("source", "result"),
    [
        ("def f(a, b): return a + b", b"3"),
        ("class Solution:\n    def f(self, a: int, b: int) -> List[int]: return (a, [b])", b"[1, [2]]"),
        ("import numpy as np\ndef f(a, b): return {'x': np.int64(a), 'y': np.array([b])}", b'{"x": 1, "y": [2]}'),
        ("def f(a, b):\n    print('words')\n    return heappop([b]) + gcd(a, 1)", b"3"),
        ("def f(a, b): return mode([b, b, a]) + Counter([a])[a] if isqrt(4) == b else 0", b"3"),
        ("def f(a, b): return {1, 2}", None),
        ("def f(a, b): import os; os._exit(0)", None),
    ],
)
def test_a_function_is_called(sandbox: LocalSandbox, source: str, result: bytes | None) -> None:
    (outcome,) = sandbox.run_blocking(Program(source, (b"1\n2",), function="f", limits=SMALL))
    assert (outcome.kind, outcome.result) == ("ok", result)


def test_an_event_loop_and_processes_with_pipes_run(sandbox: LocalSandbox) -> None:
    """What is counted and filtered for the sake of the limits is there for those who use it a little."""
    source = """
import asyncio, multiprocessing, subprocess, sys
async def add(a, b):
    await asyncio.sleep(0)
    return a + b
ours, theirs = multiprocessing.Pipe()
process = multiprocessing.get_context("fork").Process(target=lambda: theirs.send(ours is not None))
process.start()
done = subprocess.run([sys.executable, "-c", "print(2)"], capture_output=True, text=True)
print(asyncio.run(add(1, 2)), ours.recv(), done.stdout.strip())
process.join()
"""
    outcome = one(sandbox, source, cpu_s=5.0)
    assert (outcome.kind, outcome.stdout, outcome.error) == ("ok", b"3 True 2\n", "")


def test_long_input_and_output_go_through(sandbox: LocalSandbox) -> None:
    data = b"".join(b"%d\n" % i for i in range(100_000))
    program = Program("import sys\nprint(sys.stdin.read(), end='')", (data, data), limits=SMALL)
    assert [outcome.stdout == data for outcome in sandbox.run_blocking(program)] == [True, True]
    ignoring = Program("print(1)", (data * 8,), limits=SMALL)
    assert sandbox.run_blocking(ignoring)[0].stdout == b"1\n"


@pytest.mark.parametrize("warm", [0, 1])
def test_programs_run_also_when_few_sandboxes_are_started_ahead(warm: int) -> None:
    skip_without_sandbox()

    async def several() -> list[bytes]:
        with LocalSandbox(replace(CONFIG, workers=3, warm=warm)) as sandbox:
            ran = await asyncio.gather(*(sandbox.run(Program(f"print({i})", limits=SMALL)) for i in range(6)))
            return [outcome.stdout for (outcome,) in ran]

    assert asyncio.run(several()) == [b"%d\n" % i for i in range(6)]


def test_the_same_ends_whatever_runs_beside() -> None:
    skip_without_sandbox()
    sources = [
        "print(sum(range(10**5)))",
        "import random\nprint(random.random(), hash('x'))",
        "1 / 0",
        "x = bytearray(10**10)",
        "print('y' * 10**7)",
        "def",
        "import os\nos._exit(4)",
    ]
    programs = [Program(source, limits=SMALL) for source in sources] * 3

    def seen(workers: int) -> list[tuple[object, ...]]:
        async def all_of_them() -> list[tuple[Outcome, ...]]:
            with LocalSandbox(replace(CONFIG, workers=workers)) as sandbox:
                return await asyncio.gather(*map(sandbox.run, programs))

        return [(o.kind, o.stdout, o.exit_code, o.signal, o.error) for (o,) in asyncio.run(all_of_them())]

    alone = seen(1)
    assert seen(6) == alone
    assert alone[: len(sources)] == alone[len(sources) : 2 * len(sources)]


def test_thousands_wait_in_order_in_little_memory_and_leave_when_cancelled() -> None:
    skip_without_sandbox()
    sources = [f"print({i})" for i in range(3000)]

    async def crowd() -> tuple[list[int], int, float]:
        done: list[int] = []

        async def run(sandbox: LocalSandbox, i: int) -> None:
            (outcome,) = await sandbox.run(Program(sources[i], limits=SMALL))
            done.append(int(outcome.stdout))

        with LocalSandbox(replace(CONFIG, workers=1)) as sandbox:
            before = psutil.Process().memory_info().rss
            sleeper = asyncio.create_task(sandbox.run(Program("import time\ntime.sleep(15)", limits=SMALL)))
            tasks = [asyncio.create_task(run(sandbox, i)) for i in range(len(sources))]
            await asyncio.sleep(0.5)
            grown = psutil.Process().memory_info().rss - before
            assert not done
            for i, task in enumerate(tasks):
                if i % 150:
                    task.cancel()
            started = time.monotonic()
            sleeper.cancel()
            await asyncio.gather(sleeper, *tasks, return_exceptions=True)
            return done, grown, time.monotonic() - started

    done, grown, seconds = asyncio.run(crowd())
    assert done == list(range(0, len(sources), 150))
    assert grown < 40e6
    assert seconds < 12  # the sleeper was not waited for


def test_nothing_is_left_when_it_is_closed() -> None:
    skip_without_sandbox()
    before = set(psutil.Process().children(recursive=True))
    sandbox = LocalSandbox(CONFIG)
    sandbox.run_blocking(NEIGHBOUR)
    sleepers = [threading.Thread(target=_cancelled, args=(sandbox,)) for _ in range(4)]  # two run, two wait
    for sleeper in sleepers:
        sleeper.start()
    time.sleep(1.0)
    children = [child for child in psutil.Process().children(recursive=True) if child not in before]
    assert len(children) >= CONFIG.warm
    started = time.monotonic()
    sandbox.close()
    for sleeper in sleepers:
        sleeper.join()
    assert time.monotonic() - started < 10
    assert not psutil.wait_procs(children, timeout=5)[1]


def test_sandboxes_that_are_ended_while_they_start_leave_nothing() -> None:
    skip_without_sandbox()
    before = set(psutil.Process().children(recursive=True))
    orphans_before, started = _orphans(), time.monotonic()
    for pause in (0.0, 0.002, 0.005, 0.01, 0.02):
        sandbox = LocalSandbox(replace(CONFIG, warm=3))
        time.sleep(pause)
        sandbox.close()
    assert time.monotonic() - started < 30
    assert set(psutil.Process().children(recursive=True)) <= before
    assert not psutil.wait_procs(_orphans() - orphans_before, timeout=10)[1]


def _orphans() -> set[psutil.Process]:
    return {p for p in psutil.process_iter(["name", "ppid"]) if (p.info["name"], p.info["ppid"]) == ("bwrap", 1)}


def _cancelled(sandbox: LocalSandbox) -> None:
    with pytest.raises(CancelledError):
        sandbox.run_blocking(Program("import time\ntime.sleep(19)", limits=SMALL))
