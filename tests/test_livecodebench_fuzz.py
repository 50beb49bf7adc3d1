"""LiveCodeBench's grader takes any text, of which a part is executed: the counterpart of test_graders.py."""

import random
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sdpo.sandbox import LocalSandbox, Outcome, Program
from megatron_sdpo.tasks import load_task
from megatron_sdpo.tasks.livecodebench import LiveCodeBench
from megatron_sdpo.tasks.livecodebench_grading import FEEDBACK_CHARACTERS, code_of
from megatron_sdpo.types import Verdict
from tests.livecodebench_setup import PAIR, RIGHT, SUM, write
from tests.mutations import PIECES, mutated
from tests.sandbox_setup import CONFIG, skip_without_sandbox
from tests.test_graders import check

CALLED = "class Solution:\n    def pair(self, a: int, b: int) -> List[int]:\n        return sorted([a, b])"
RESPONSES = [
    f"<think>\nTwo numbers, or more?\n</think>\nI add them.\n```python\n{RIGHT}\n```\n",
    f"I sort them.\n```python\n{CALLED}\n```",
    "```\nx = [int(word) for word in input().split()]\nprint(sum(x))\n```\nThis takes linear time.",
]
EXECUTED_SHARE = 0.08
THREADS = 4
PART = 250
"""Responses that one thread judges one after the other, drawn by a seed of their own."""


class Counting:
    """A sandbox that counts what became of the programs it executes."""

    def __init__(self, sandbox: LocalSandbox) -> None:
        self.config = sandbox.config
        self.kinds: Counter[str] = Counter()
        self._sandbox = sandbox

    def run_blocking(self, program: Program) -> tuple[Outcome, ...]:
        outcomes = self._sandbox.run_blocking(program)
        self.kinds[outcomes[-1].kind] += 1
        return outcomes

    async def run(self, program: Program) -> tuple[Outcome, ...]:
        return await self._sandbox.run(program)

    def close(self) -> None:
        self._sandbox.close()


@pytest.fixture
def judging(tmp_path: Path) -> Iterator[tuple[LiveCodeBench, Counting]]:
    skip_without_sandbox()
    task = load_task("livecodebench", data=write(tmp_path, SUM, PAIR), train_tests="whole")
    assert isinstance(task, LiveCodeBench)
    with LocalSandbox(replace(CONFIG, workers=THREADS, warm=THREADS)) as sandbox:
        counting = Counting(sandbox)
        task.use_sandbox(counting)
        yield task, counting


def responses(count: int, seed: int) -> Iterator[str]:
    """Mutated ones, most of them without a program: executing one takes a thousand times as long as all else."""
    draw = random.Random(seed)
    for response in mutated(RESPONSES, count, seed):
        if draw.random() < EXECUTED_SHARE or code_of(response)[0] is None:
            yield response
        elif draw.random() < 0.01:
            yield f"```python\n{draw.choice(PIECES).replace('`', '') * 2**20}#\n```"  # too long for the sandbox
        else:
            yield without_program(response, draw)


def without_program(response: str, draw: random.Random) -> str:
    match draw.randrange(4):
        case 0:
            return response.replace("```", draw.choice(["``", "", "'''", "~~~", "`\u200b``", "\uff40" * 3]))
        case 1:
            return response.replace("```", "") + f"\n```python\n{draw.choice(PIECES).replace('`', '')}"
        case 2:
            return f"{response}\n</think>\n{draw.choice(PIECES)}"
        case _:
            return response.replace("\n", draw.choice(["\r", "\u2028", " ", "\x0b"]))


def fuzzed(task: LiveCodeBench, count: int, seed: int) -> Counter[str]:
    """How often which kind of verdict was given."""
    questions = task.eval_questions()

    def judged(part: int) -> Counter[str]:
        question = questions[part % len(questions)]
        texts = responses(min(PART, count - part * PART), seed=seed + part)
        return Counter(kind_of(check(task, question, text)) for text in texts)

    found: Counter[str] = Counter()
    with ThreadPoolExecutor(THREADS) as threads:
        for some in threads.map(judged, range(-(-count // PART))):
            found.update(some)
    assert found.total() == count
    return found


def kind_of(verdict: Verdict) -> str:
    """``"right"``, or what its words begin with."""
    assert len(verdict.feedback) <= FEEDBACK_CHARACTERS
    if verdict.reward:
        return "right"
    assert verdict.feedback
    title, colon, words = verdict.feedback.split("\n")[0].partition(": ")
    return words if colon and title.startswith(("Test Case", "Incorrect Format")) else title


COMMON = {"right", "Wrong Answer", "Syntax Error", "Runtime Error"}


def test_mutated_programs(judging: tuple[LiveCodeBench, Counting]) -> None:
    task, sandbox = judging
    found = fuzzed(task, 2000, seed=1)
    assert set(found) > COMMON
    assert 40 < sandbox.kinds.total() < 600


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_thousand_mutated_programs(judging: tuple[LiveCodeBench, Counting]) -> None:
    """As other tasks have it in test_graders.py; several thousand of the responses are executed."""
    task, sandbox = judging
    began = time.monotonic()
    found = fuzzed(task, 100_000, seed=1000)
    print(f"{time.monotonic() - began:.0f} s; verdicts {dict(found)}; executed {dict(sandbox.kinds)}")
    assert COMMON | {"Source Limit Exceeded"} < set(found)
    assert 4000 < sandbox.kinds.total() < 20_000


def test_enormous_responses_take_time_in_proportion(judging: tuple[LiveCodeBench, Counting]) -> None:
    """Long texts without a program, or with a hundred thousand of them, are looked at once."""
    task, _ = judging
    question = task.eval_questions()[0]
    for piece in (*PIECES, "```\n", "```x\n```\n", "`" * 7, "```" + "x" * 30, "</think>```\n"):
        for text in (piece * 100_000, RESPONSES[0] + piece * 50_000, piece * 50_000 + RESPONSES[0]):
            began = time.thread_time()
            code_of(text)
            assert time.thread_time() - began < 1.0, piece
    assert check(task, question, "```python\n" + "x\n" * 2**20 + "```").feedback.startswith("Source Limit Exceeded")
    assert check(task, question, "```x\n" * 200_000).reward == 0.0
