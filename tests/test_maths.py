"""Boxed answers, compared by math-verify in processes of their own."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sdpo.config import ConfigError
from megatron_sdpo.tasks import load_task, maths, maths_checker
from megatron_sdpo.tasks.maths import EMPTY, LONGEST_ANSWER, NO_BOX, NOT_CLOSED, TOO_LONG, Maths, last_boxed
from megatron_sdpo.types import Message, Verdict
from tests.task_data import written

needs_math_verify = pytest.mark.skipif(
    maths.importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed (extra: tasks)"
)
ANSWERS = ["1/3", "x^2+2x+1", r"\{1,2,3\}", r"$\boxed{1000}$", "(1,2)", r"\sqrt{8}", "BCA", "abc"]
ROWS = [{"idx": i, "prompt": f"Problem {i}?", "answer": answer} for i, answer in enumerate(ANSWERS)]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Maths]:
    folder = tmp_path_factory.mktemp("maths")
    written(folder / "test.jsonl", ROWS)
    task = load_task("maths", data=str(folder))
    assert isinstance(task, Maths)
    yield task
    task.close()


RIGHT = [
    (0, r"So it is $\boxed{\frac{1}{3}}$."),
    (0, r"<think>\boxed{2}</think>\boxed{\dfrac13}"),
    (0, r"\boxed{7} no, \boxed{ 2/6 }"),
    (1, r"\boxed{(x+1)^2}"),
    (1, r"\boxed{1 + 2x + x^{2}}"),
    (2, r"\boxed{3, 1, 2}"),
    (3, r"\boxed{10^3}"),
    (3, r"\boxed{1{,}000}"),
    (3, r"\boxed{n = 1000}"),
    (3, r"\boxed{1000}"),
    (4, r"\boxed{\left(1, 2\right)}"),
    (5, r"\boxed{2\sqrt{2}}"),
    (3, r"\boxed{1000.}"),
    (3, r"\boxed{$1000$. }"),
    (3, r"\boxed{1000\$}"),
    (6, r"\boxed{\text{BCA}}"),
    (6, r"\boxed{bca}"),
    (7, r"\boxed{bca}"),
]
WRONG = [
    (0, r"\boxed{0.33}", r'The boxed answer "0.33" was read as 0.330000000000000, which is not the right result.'),
    (1, r"\boxed{(x+1)^3}", r'The boxed answer "(x+1)^3" was read as (x + 1)**3, which is not the right result.'),
    (
        3,
        r"\boxed{\frac{2000}{3}}",
        r'The boxed answer "\frac{2000}{3}" was read as 2000/3, which is not the right result.',
    ),
    (4, r"\boxed{(2,1)}", 'The boxed answer "(2,1)" was read as (2, 1), which is not the right result.'),
    (6, r"\boxed{ABC}", 'The boxed answer "ABC" was read as "ABC", which is not the right result.'),
    (6, r"\boxed{abc}", 'The boxed answer "abc" was read as "abc", which is not the right result.'),
    (3, r"\boxed{1000..}", 'The boxed answer "1000.." cannot be read as mathematics.'),
    (3, r"\boxed{\frac{}{}}", r'The boxed answer "\frac{}{}" cannot be read as mathematics.'),
]
FORM = [
    ("The result is 1/3.", NO_BOX),
    ("", NO_BOX),
    (r"\boxed{1/3} or rather \boxed{1/3", NOT_CLOSED),
    (r"\boxed{{1/3}", NOT_CLOSED),
    (r"\boxed{ $$ }", EMPTY),
    (r"\boxed{" + "1" * (LONGEST_ANSWER + 1) + "}", TOO_LONG),
    (r"<think>\boxed{1/3}</think>It is a third.", NO_BOX),
    (r"<think>\boxed{2}</think><think>Or is it \boxed{1/3}, or", NO_BOX),
]


@needs_math_verify
@pytest.mark.parametrize(("idx", "response"), RIGHT)
def test_equal_values(task: Maths, idx: int, response: str) -> None:
    assert task.verify(task.eval_questions()[idx], response) == Verdict(1.0)


@needs_math_verify
@pytest.mark.parametrize(("idx", "response", "feedback"), WRONG)
def test_other_values_and_how_they_were_read(task: Maths, idx: int, response: str, feedback: str) -> None:
    assert task.verify(task.eval_questions()[idx], response) == Verdict(0.0, feedback)


@needs_math_verify
@pytest.mark.parametrize(("response", "feedback"), FORM)
def test_answers_without_a_proper_box(task: Maths, response: str, feedback: str) -> None:
    assert task.verify(task.eval_questions()[0], response) == Verdict(0.0, feedback)


@needs_math_verify
def test_an_endless_computation_is_ended_and_the_next_answer_judged(
    task: Maths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maths_checker, "CPU_SECONDS", 1)
    monkeypatch.setattr(task, "_checker", maths_checker.Checker())
    question = task.eval_questions()[3]
    endless = task.verify(question, r"\boxed{9^{9^{9^9}}}")
    assert endless == Verdict(0.0, r'The boxed answer "9^{9^{9^9}}" is too hard to compare; simplify it.')
    assert task.verify(question, r"\boxed{10^3}") == Verdict(1.0)
    assert task.verify(question, "\\boxed{\ud800}").reward == 0.0
    task.close()


@needs_math_verify
def test_a_process_that_is_killed_is_replaced(task: Maths) -> None:
    question, checker = task.eval_questions()[3], task._checker
    assert task.verify(question, r"\boxed{10^3}") == Verdict(1.0)
    for process in checker._idle:
        process.kill()
        process.wait()
    assert task.verify(question, r"\boxed{10^3}") == Verdict(1.0)


@needs_math_verify
def test_verdicts_are_the_same_from_any_number_of_threads(task: Maths) -> None:
    asked = [(idx, response) for idx, response, *_ in (*RIGHT, *WRONG)]
    one = [task.verify(task.eval_questions()[idx], response) for idx, response in asked]
    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(lambda a: task.verify(task.eval_questions()[a[0]], a[1]), asked)) == one
    assert threading.active_count() < 10


@needs_math_verify
def test_a_right_answer_that_cannot_be_read_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written(tmp_path / "test.json", [{"idx": 0, "prompt": "?", "answer": r"\frac{}{}"}])
    task = load_task("maths", data=str(tmp_path))
    assert isinstance(task, Maths)
    question = task.eval_questions()[0]
    assert task.verify(question, r"\boxed{\frac{}{}}") == Verdict(1.0)
    assert [task.verify(question, r"\boxed{1}").reward for _ in range(2)] == [0.0, 0.0]
    assert caplog.messages == ["the right answer of 'test/0' cannot be read, so only the same text counts"]
    task.close()


@needs_math_verify
def test_a_checker_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maths_checker, "CPU_SECONDS", "three")
    with pytest.raises(maths_checker.CheckerError, match=r"(?s)did not start: .*invalid literal for int"):
        maths_checker.Checker().compare("1", "2")


@needs_math_verify
@pytest.mark.parametrize(
    ("prompt", "asked"), [("2+2?", "2+2?\nBox it: \\boxed{}"), (r"Use \boxed{}.", r"Use \boxed{}.")]
)
def test_the_box_is_asked_for(tmp_path: Path, prompt: str, asked: str) -> None:
    written(tmp_path / "train.json", [{"idx": 0, "prompt": prompt, "answer": "4", "category": "sums"}])
    task = load_task("maths", data=str(tmp_path), instruction=r"Box it: \boxed{}")
    assert task.train_questions()[0].messages == (Message("user", asked),)
    assert task.train_questions()[0].payload == {"answer": "4", "category": "sums"}


@needs_math_verify
@pytest.mark.parametrize("answer", ["", " $ $ ", "1" * (LONGEST_ANSWER + 1)])
def test_a_malformed_row_is_named(tmp_path: Path, answer: str) -> None:
    written(tmp_path / "train.json", [{"idx": 0, "prompt": "?", "answer": answer}])
    with pytest.raises(ConfigError, match=r"train\.json, line 1: the answer has \d+ characters"):
        load_task("maths", data=str(tmp_path))


def test_without_math_verify_the_task_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maths.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs math-verify, which is not installed; install megatron-sdpo\[tasks\]"):
        load_task("maths", data=str(tmp_path))


BALANCED = st.recursive(
    st.text(alphabet=st.characters(exclude_characters="{}\\", exclude_categories=())),
    lambda inner: st.builds(lambda a, b: f"{a}{{{b}}}\\{{", inner, inner),
    max_leaves=8,
)


@given(st.text(), BALANCED, st.text())
def test_the_last_box_is_found_whatever_stands_around_it(before: str, inside: str, after: str) -> None:
    assert last_boxed(f"{before}\\boxed{{{inside}}}{after.replace('box', '')}") == inside


def test_the_public_shape_of_an_answer() -> None:
    assert json.dumps(last_boxed(r"\boxed{\text{a}\}{b}}c")) == json.dumps(r"\text{a}\}{b}")
