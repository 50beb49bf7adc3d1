"""SciKnowEval: which answers count, in both kinds of feedback."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sdpo.config import ConfigError
from megatron_sdpo.tasks import load_task
from megatron_sdpo.tasks.sciknoweval import NO_ANSWER, NOT_CLOSED, SciKnowEval, extracted, option_letters
from megatron_sdpo.types import Message, Question, Verdict
from tests.task_data import SYSTEM, choice_row, real_data, written


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sciknoweval")
    written(folder / "chemistry" / "train.json", [choice_row(0), choice_row(4, "C"), choice_row(8, "A", options=2)])
    written(folder / "chemistry" / "test.json", [choice_row(5, "D")])
    return folder


def loaded(folder: Path, **options: object) -> SciKnowEval:
    task = load_task("sciknoweval", data=str(folder), domain="chemistry", **options)
    assert isinstance(task, SciKnowEval)
    return task


def test_rows_become_questions(folder: Path) -> None:
    task = loaded(folder)
    assert [q.id for q in task.train_questions()] == ["train/0", "train/4", "train/8"]
    assert task.eval_questions()[0] == Question(
        "test/5",
        (Message("system", SYSTEM), Message("user", choice_row(5)["prompt"])),
        {"answer": "D", "letters": "ABCD", "category": "chemistry"},
    )
    assert task.train_questions()[2].payload["letters"] == "AB"


RIGHT = [
    "<answer>D</answer>",
    "<reasoning>A? B?</reasoning>\n<answer>\n D\t\n</answer>\n",
    "<answer>A</answer><answer>D</answer>x",
    "<think><answer>A</answer></think><answer>D</answer>",
]
LETTERS = "one of the letters A, B, C, D alone, not "
WRONG = {
    "": NO_ANSWER,
    "D": NO_ANSWER,
    "D</answer>": NO_ANSWER,
    "<answer>D": NOT_CLOSED,
    "<think><answer>D</answer></think>D.": NO_ANSWER,
    "<think>Perhaps <answer>D</answer>, or": NO_ANSWER,
    "<answer>D</answer><answer>": NOT_CLOSED,
    "<answer>d</answer>": LETTERS + '"d".',
    "<answer></answer>": LETTERS + '"".',
    "<answer>D: 8 u</answer>": LETTERS + '"D: 8 u".',
    "<answer>D <b></answer>": LETTERS + '"D <b>".',
    "<answer>AB</answer>": LETTERS + '"AB".',
    "<answer>\uff24</answer>": LETTERS + '"\uff24".',
    "<answer>E</answer>": LETTERS + '"E".',
    "<answer>" + "x" * 1000 + "</answer>": f'{LETTERS}"{"x" * 60} … {"x" * 60}".',
    "<answer>\ud800</answer>": LETTERS + '"?".',
    "<answer>C</answer>": "",
    "<answer>D</answer><answer>C</answer>": "",
}


@pytest.mark.parametrize("response", RIGHT)
def test_right_answers(folder: Path, response: str) -> None:
    for with_words in (False, True):
        task = loaded(folder, format_feedback=with_words)
        assert task.verify(task.eval_questions()[0], response) == Verdict(1.0)


@pytest.mark.parametrize("response", WRONG)
def test_wrong_answers(folder: Path, response: str) -> None:
    task = loaded(folder)
    assert task.verify(task.eval_questions()[0], response) == Verdict(0.0)
    task = loaded(folder, format_feedback=True)
    verdict = task.verify(task.eval_questions()[0], response)
    assert verdict.reward == 0.0
    assert verdict.feedback.endswith(WRONG[response]) and bool(verdict.feedback) == bool(WRONG[response])


@given(st.text(), st.text(" \t\n\r\u00a0\u2028"), st.sampled_from("ABCD"), st.text())
def test_only_the_last_answer_counts_whatever_stands_around_it(
    before: str, space: str, letter: str, after: str
) -> None:
    after = after.replace("<answer>", "")
    assert extracted(f"{before}<answer>{space}{letter}{space}</answer>{after}") == letter


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({**choice_row(0), "answer": "E"}, "the answer is 'E', not one of the letters A, B, C, D"),
        (choice_row(0, "C", options=2), "the answer is 'C', not one of the letters A, B"),
        ({**choice_row(0), "answer": "AB"}, "the answer is 'AB'"),
        ({**choice_row(0), "prompt": "What?"}, "has no options"),
        ({**choice_row(0), "answer": 3}, "answer"),
        ({k: v for k, v in choice_row(0).items() if k != "prompt"}, "prompt"),
        ({**choice_row(0), "idx": 1.5}, "idx must be"),
    ],
)
def test_a_malformed_row_is_named(tmp_path: Path, row: dict, words: str) -> None:
    written(tmp_path / "chemistry" / "train.json", [choice_row(7), row])
    with pytest.raises(ConfigError, match=r"train\.json, line 2: .*" + words):
        loaded(tmp_path)


def test_an_unknown_domain_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="option 'domain' is 'alchemy'"):
        load_task("sciknoweval", data=str(folder), domain="alchemy")
    with pytest.raises(ConfigError, match="physics does not exist"):
        load_task("sciknoweval", data=str(folder), domain="physics")


def test_letters_are_those_of_the_options() -> None:
    assert option_letters("C: is what?\n\nA: 1\nB: 2\nC: 3") == "ABC"
    assert option_letters("A: 1\nC: 3") == "A"
    assert option_letters("Note A: 1") == ""


@pytest.mark.parametrize(("domain", "train", "held_out"), [("chemistry", 1890, 210), ("physics", 720, 80)])
def test_the_public_files(domain: str, train: int, held_out: int) -> None:
    data = real_data("sciknoweval", domain)
    task = load_task("sciknoweval", data=str(data.parent), domain=domain)
    assert (len(task.train_questions()), len(task.eval_questions())) == (train, held_out)
    for name, questions in (("train", task.train_questions()), ("test", task.eval_questions())):
        rows = [json.loads(line) for line in (data / f"{name}.json").read_text().splitlines()]
        for row, question in zip(rows, questions, strict=True):
            assert question.messages == (Message("system", row["system"]), Message("user", row["prompt"]))
            rewards = [task.verify(question, f"<answer>\n{letter}\n</answer>").reward for letter in "ABCD"]
            assert rewards == [float(letter == row["answer"]) for letter in "ABCD"]
