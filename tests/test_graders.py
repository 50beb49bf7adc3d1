"""Graders take any text: they never raise, never hang, answer in valid text, and say the same to everybody at once."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest

from megatron_sdpo.tasks import load_task, maths
from megatron_sdpo.types import Question, Task, Verdict
from tests.mutations import PIECES, mutated
from tests.task_data import as_response, choice_row, tool_row, written

CALLS = [
    ("findDogs", {"breed": "Spaniel", "limit": 3, "tags": ["calm"]}),
    ("addOwner", {"dog": 7, "owner": {"name": "Zoë"}}),
]
ROWS = {
    "sciknoweval": ("chemistry", [choice_row(0, "B")]),
    "tooluse": ("", [tool_row(0, CALLS)]),
    "maths": ("", [{"idx": 0, "prompt": "?", "answer": r"\frac{x^2+1}{3}"}]),
}
RESPONSES = {
    "sciknoweval": ["<reasoning>\nIsotope 0: A? B!\n</reasoning>\n<answer>\nB\n</answer>", "<answer>C</answer>"],
    "tooluse": [as_response(CALLS), as_response([*CALLS, ("listBreeds", {})]), "**Action:** findDogs"],
    "maths": [r"So $\boxed{\frac{x^2+1}{3}}$.", r"\boxed{\frac13 + \frac{x^{2}}{3}}", r"\boxed{\{1, 2\sqrt{3}\}}"],
}
OPTIONS = {
    "sciknoweval": {"domain": "chemistry", "format_feedback": True},
    "tooluse": {"feedback": "expected"},
    "maths": {},
}
LONGEST_FEEDBACK = 8000


@pytest.fixture(params=list(ROWS), scope="module")
def judged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Task]]:
    """A task's name, and the task."""
    name = request.param
    if name == "maths" and maths.importlib.util.find_spec("math_verify") is None:
        pytest.skip("math-verify is not installed (extra: tasks)")
    folder = tmp_path_factory.mktemp(name)
    below, rows = ROWS[name]
    written(folder / below / "test.json", rows)
    task = load_task(name, data=str(folder), **OPTIONS[name])
    yield name, task
    if isinstance(task, maths.Maths):
        task.close()


def check(task: Task, question: Question, response: str) -> Verdict:
    verdict = task.verify(question, response)
    assert isinstance(verdict, Verdict) and verdict.reward in (0.0, 1.0)
    assert len(verdict.feedback) <= LONGEST_FEEDBACK
    assert not (verdict.reward and verdict.feedback)
    assert msgspec.json.decode(msgspec.json.encode(verdict), type=Verdict) == verdict  # the journal can hold it
    return verdict


def fuzzed(name: str, task: Task, count: int) -> None:
    question = task.eval_questions()[0]
    rewards = [check(task, question, response).reward for response in mutated(RESPONSES[name], count, seed=1)]
    assert 0.0 < sum(rewards) < count  # some mutations change nothing that counts


def test_mutated_answers(judged: tuple[str, Task]) -> None:
    fuzzed(*judged, count=300 if judged[0] == "maths" else 3000)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_hundred_thousand_mutated_answers(judged: tuple[str, Task]) -> None:
    fuzzed(*judged, count=100_000)


def test_verdicts_do_not_depend_on_who_asks_at_the_same_time(judged: tuple[str, Task]) -> None:
    name, task = judged
    question = task.eval_questions()[0]
    responses = list(mutated(RESPONSES[name], 40 if name == "maths" else 400, seed=2))
    alone = [check(task, question, response) for response in responses]
    with ThreadPoolExecutor(2 if name == "maths" else 8) as threads:
        together = list(threads.map(lambda response: check(task, question, response), responses))
    assert together == alone


def test_enormous_answers_take_time_in_proportion(judged: tuple[str, Task]) -> None:
    name, task = judged
    question, right = task.eval_questions()[0], RESPONSES[name][0]
    for piece in PIECES:
        for text in (piece * 100_000, right + piece * 50_000, piece * 50_000 + right):
            began = time.thread_time()
            check(task, question, text)
            assert time.thread_time() - began < 2.0, piece
