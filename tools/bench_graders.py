"""How many answers a second each grader judges, of right, wrong, malformed and enormous ones.

::

    python tools/bench_graders.py                # one line a task and kind of answer
    python tools/bench_graders.py --threads 4    # as rollout.verify_workers does

Graders in Python share one interpreter lock, so threads do not make them faster; mathematical answers are compared in
processes of their own, one a thread (tasks/maths_checker.py), and programs are executed in as many sandboxes as there
are threads, here on ten tests (bench_sandbox.py says more).
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from bench_machine import machine

from megatron_sdpo.config import ConfigError
from megatron_sdpo.sandbox import LocalSandbox, SandboxConfig, check_local
from megatron_sdpo.tasks import load_task
from megatron_sdpo.tasks.livecodebench import LiveCodeBench
from megatron_sdpo.tasks.livecodebench_data import FILE, Case, Problem
from megatron_sdpo.tasks.maths import Maths
from megatron_sdpo.types import Task

REASONING = "Let me think about this. " * 320
"""About 2,000 tokens, as models write them."""
TOOLS = """Name: Kennel
Documentation:
findDogs: Find dogs.
Parameters: {"breed": "Required. string. The breed.", "limit": "integer. How many.", "tags": "Array[string]. Traits."}
Output: Names.
"""
CALL = 'Action: findDogs\nAction Input: {"breed": "Pug", "limit": 3, "tags": ["calm"]}'
PROGRAM = "print(sum(map(int, input().split())))"
ROWS: dict[str, Any] = {
    "sciknoweval": {"prompt": "Which?\n\nA: a\nB: b\nC: c\nD: d", "answer": "B"},
    "tooluse": {
        "prompt": f"{TOOLS}\nQuestion: A calm Pug?",
        "answer": json.dumps([{"Action": "findDogs", "Action_Input": CALL.split("Input: ")[1]}]),
    },
    "maths": {"prompt": "Which?", "answer": r"\frac{x^2+1}{3}"},
}
OPTIONS: dict[str, Any] = {"sciknoweval": {"domain": "chemistry", "format_feedback": True}}
ANSWERS: dict[str, dict[str, str]] = {
    "sciknoweval": {"right": "<answer>B</answer>", "wrong": "<answer>C</answer>", "malformed": "<answer>B: b</answer>"},
    "tooluse": {
        "right": CALL,
        "wrong": CALL.replace("3", '"3"').replace("calm", "old"),
        "malformed": CALL.removesuffix("}"),
    },
    "maths": {
        "same text": r"\boxed{\frac{x^2+1}{3}}",
        "right": r"\boxed{\frac13 + \frac{x^{2}}{3}}",
        "wrong": r"\boxed{\frac{x^2+1}{4}}",
        "malformed": r"\boxed{\frac{x^2+1}{3}",
    },
    "livecodebench": {
        "right": f"```python\n{PROGRAM}\n```",
        "wrong": f"```python\n{PROGRAM}\n```".replace("sum", "max"),
        "malformed": f"```python\n{PROGRAM}",
    },
}


@contextmanager
def programs(threads: int) -> Iterator[Task]:
    """LiveCodeBench with one question, and with sandboxes."""
    tests = tuple(Case(f"{i} {i}\n", f"{2 * i}\n") for i in range(10))
    config = SandboxConfig(workers=threads, warm=threads)
    check_local(config)
    with tempfile.TemporaryDirectory() as folder, LocalSandbox(config) as sandbox:
        (Path(folder) / FILE).write_bytes(msgspec.json.encode(Problem(id="sum", question="Add.", tests=tests)))
        task = LiveCodeBench(data=folder)
        task.use_sandbox(sandbox)
        yield task


@contextmanager
def loaded(name: str, threads: int) -> Iterator[Task]:
    """The task with one question."""
    if name == "livecodebench":
        with programs(threads) as task:
            yield task
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / OPTIONS.get(name, {}).get("domain", "") / "test.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"idx": 0, **ROWS[name]}) + "\n")
        task = load_task(name, data=folder, **OPTIONS.get(name, {}))
        try:
            yield task
        finally:
            if isinstance(task, Maths):
                task.close()


def rate(task: Task, answer: str, threads: int, seconds: float) -> float:
    """Answers a second, over about so many seconds."""
    question = task.eval_questions()[0]
    task.verify(question, answer)  # starts a process, where there is one to start

    def judged() -> int:
        count, until = 0, time.perf_counter() + seconds
        while time.perf_counter() < until:
            task.verify(question, answer)
            count += 1
        return count

    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        counts = [job.result() for job in [pool.submit(judged) for _ in range(threads)]]
    return sum(counts) / (time.perf_counter() - began)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="a measurement; default 1")
    parsed = parser.parse_args(arguments)
    print(machine())
    print(f"{parsed.threads} thread(s); answers after about 2,000 tokens of reasoning\n")
    print("| task | answer | a second | each |\n|---|---|---|---|")
    for name, answers in ANSWERS.items():
        try:
            with loaded(name, parsed.threads) as task:
                enormous = {"1 MB": REASONING * 125 + answers["right"]}
                for kind, answer in {**answers, **enormous}.items():
                    found = rate(task, REASONING + answer, parsed.threads, parsed.seconds)
                    print(f"| {name} | {kind} | {found:,.0f} | {1e6 / found:,.0f} µs |", flush=True)
        except ConfigError as error:
            print(f"| {name} | not measured: {error} | | |")


if __name__ == "__main__":
    main()
