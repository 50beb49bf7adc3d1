"""Public data sets as they are published, made into what the tasks read."""

import datetime
import json
from pathlib import Path
from typing import Any

import prepare_data
import pytest

from megatron_sdpo.tasks import load_task
from tests.livecodebench_setup import published_problem
from tests.task_data import TOOLS, as_response, real_data, tool_prompt, written


def published_choice(number: int, **changed: Any) -> dict[str, Any]:
    """A row of SciKnowEval."""
    return {
        "prompt": {"default": "Please directly give the answer."},
        "question": f"What weighs {number}?",
        "choices": {"text": ["a", "b", "c", "d"], "label": ["A", "B", "C", "D"]},
        "answerKey": "ABCD"[number % 4],
        "type": "mcq-4-choices",
        "domain": "Chemistry",
        "details": {"level": "L3", "task": "weights", "subtask": "w", "source": "x"},
        "answer": "",
        **changed,
    }


TWO = {"choices": {"text": ["yes", "no"], "label": ["A", "B"]}, "type": "mcq-2-choices", "answerKey": "B"}
SCIENCE = [
    *(published_choice(i) for i in range(20)),
    published_choice(3),
    published_choice(30, type="open-ended-qa"),
    published_choice(31, details={"level": "L1"}),
    *(published_choice(40 + i, domain="Biology", **TWO) for i in range(10)),
    *(published_choice(60 + i, domain="Material") for i in range(10)),
]


def run(*arguments: object) -> int:
    return prepare_data.main([str(argument) for argument in arguments])


def test_sciknoweval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path / "source" / "data" / "part1.jsonl", SCIENCE[:25])
    (tmp_path / "source" / "part2.json").write_text(json.dumps(SCIENCE[25:]))
    target = tmp_path / "data"
    assert run("sciknoweval", tmp_path / "source", target) == 0
    said = capsys.readouterr().out
    for words in ("a prompt that was there before: 1", "type open-ended-qa: 1", "level L1: 1", "train.json: 18 rows"):
        assert words in said
    assert sorted(path.name for path in target.iterdir()) == ["biology", "chemistry", "materials"]
    task = load_task("sciknoweval", data=str(target), domain="chemistry")
    assert (len(task.train_questions()), len(task.eval_questions())) == (18, 2)
    for question in (*task.train_questions(), *task.eval_questions()):
        number = int(question.messages[1].content.split("weighs ")[1].split("?")[0])
        assert task.verify(question, f"<answer>{'ABCD'[number % 4]}</answer>").reward == 1.0
        assert question.payload["category"] == "weights"
        assert "four options" in question.messages[0].content and "(A, B, C, or D)" in question.messages[0].content
    biology = load_task("sciknoweval", data=str(target), domain="biology").eval_questions()[0]
    assert biology.payload["letters"] == "AB" and "(A or B)" in biology.messages[0].content
    again = tmp_path / "again"
    assert run("sciknoweval", tmp_path / "source", again) == 0
    for path in target.rglob("*.json"):
        assert (again / path.relative_to(target)).read_bytes() == path.read_bytes()
    assert run("sciknoweval", tmp_path / "source", tmp_path / "other", "--seed", 1) == 0
    assert (tmp_path / "other" / "chemistry" / "test.json").read_bytes() != (
        target / "chemistry" / "test.json"
    ).read_bytes()


def test_livecodebench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same problems from the published files and from tables, by this tool and by its own."""
    rows = [published_problem("abc1"), published_problem("abc2", "pair"), published_problem("abc3")]
    written(tmp_path / "lines" / "test5.jsonl", rows[:1])
    written(tmp_path / "lines" / "test6.jsonl", rows[1:])
    made = tmp_path / "data" / "problems.jsonl"
    assert run("livecodebench", tmp_path / "lines", made.parent) == 0
    assert capsys.readouterr().out == f"{made}: 3 problems, 9 graded tests\n"
    task = load_task("livecodebench", data=str(made.parent))
    assert [q.id for q in task.train_questions()] == ["half/abc1", "half/abc2", "half/abc3"]
    assert [q.id for q in task.eval_questions()] == ["whole/abc1", "whole/abc2", "whole/abc3"]
    assert run("livecodebench", tmp_path / "lines", made.parent) == 2
    assert "exists already" in capsys.readouterr().err
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    (tmp_path / "tables").mkdir()
    dated = [{**row, "contest_date": datetime.datetime.fromisoformat(row["contest_date"])} for row in rows]
    pyarrow.parquet.write_table(arrow.Table.from_pylist(dated), tmp_path / "tables" / "test.parquet")
    assert run("livecodebench", tmp_path / "tables", tmp_path / "other") == 0
    assert (tmp_path / "other" / "problems.jsonl").read_bytes() == made.read_bytes()


def test_the_prompts_are_those_of_the_public_task_files(tmp_path: Path) -> None:
    row = json.loads(real_data("sciknoweval", "chemistry", "train.json").read_text().split("\n")[0])
    question, _, rest = row["prompt"].partition("\n\nA: ")
    texts = [line.partition(": ")[2] for line in f"A: {rest}".split("\n")[:4]]
    choices = {"text": texts, "label": list("ABCD")}
    written(tmp_path / "s.jsonl", [published_choice(0, question=question, choices=choices), published_choice(1)])
    assert run("sciknoweval", tmp_path / "s.jsonl", tmp_path / "data", "--test-share", 0.5) == 0
    made = [json.loads(p.read_text()) for p in sorted((tmp_path / "data" / "chemistry").iterdir())]
    same = next(m for m in made if question in m["prompt"])
    assert (same["prompt"], same["system"]) == (row["prompt"], row["system"])


def test_the_prompts_of_tool_use_are_those_of_the_public_file() -> None:
    for line in real_data("tooluse", "test.json").read_text().splitlines():
        prompt = json.loads(line)["prompt"]
        name, rest = prompt.split("\nName: ", 1)[1].split("\nDescription: ", 1)
        description, rest = rest.split("\nDocumentation:\n", 1)
        documentation, question = rest.split("\nUse the following format:", 1)[0], prompt.split("\nQuestion: ", 1)[1]
        parts = {"name": name, "description": description, "documentation": documentation, "question": question}
        assert prepare_data.TOOL_PROMPT.format(**parts) == prompt


def test_toolalpaca(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, description, documentation = TOOLS.split("\n", 2)
    api = {
        "Name": name.removeprefix("Name: "),
        "Description": description.removeprefix("Description: "),
        "NLDocumentation": documentation.removeprefix("Documentation:\n"),
    }
    call = ("findDogs", '{"breed": "Pug"}')

    def dialogue(request: str, *calls: tuple[str, str]) -> dict[str, Any]:
        return {"input": request, "intermediate_steps": [[[*c, "\nThought"], "seen"] for c in calls], "output": "!"}

    trained = [
        dialogue("Number 0, please.\nHint: it is a Pug", call, ("listBreeds", "{}")),
        dialogue("Who?", ("getDetails", '{"Question": "?"}'), call),
        dialogue("Nothing."),
        dialogue("Bad.", ("findDogs", "Pug")),
    ]
    held_out = [[{"Action": "listBreeds", "Action_Input": "{}"}]]
    (tmp_path / "source").mkdir()
    undocumented = {"Name": "x", "Function_Description": None}
    (tmp_path / "source" / "train_data.json").write_text(json.dumps([{**api, "Instances": trained}, undocumented]))
    (tmp_path / "source" / "eval_simulated.json").write_text(
        json.dumps([{**api, "Instructions": ["All breeds?"], "Golden_Answers": held_out}])
    )
    (tmp_path / "source" / "eval_real.json").write_text("[]")
    assert run("toolalpaca", tmp_path / "source", tmp_path / "data") == 0
    said = capsys.readouterr().out
    for words in ("getDetails): 1", "without calls: 1", "no JSON object: 1", "documentation: 1", "eval_real.json: 1"):
        assert words in said
    task = load_task("tooluse", data=str(tmp_path / "data"))
    (question,) = task.train_questions()
    prompt, made_up = question.messages[0].content, tool_prompt("Number 0, please.")
    assert prompt.split("\nThought")[0] == made_up.split("\nThought")[0]
    assert prompt.split("Begin!")[1] == made_up.split("Begin!")[1]
    assert question.payload["category"] == "Kennel"
    assert task.verify(question, as_response([call, ("listBreeds", {})])).reward == 1.0
    assert task.verify(task.eval_questions()[0], as_response([("listBreeds", {})])).reward == 1.0


@pytest.mark.parametrize(
    ("rows", "arguments", "words"),
    [
        (
            [published_choice(0), {"type": "mcq-4-choices", "details": {"level": "L3"}}],
            [],
            "s.jsonl, line 2: not a row",
        ),
        ([published_choice(0, domain="Alchemy")], [], "the domain is 'Alchemy'"),
        ([published_choice(0, type="x")], [], "no rows of sciknoweval that can be used; 1 times type x"),
        ([published_choice(0, answerKey="E")], [], "the answer is 'E'"),
        ([published_choice(0)], ["--test-share", 1], "--test-share is 1"),
    ],
)
def test_what_cannot_be_used_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list[dict], arguments: list[object], words: str
) -> None:
    written(tmp_path / "s.jsonl", rows)
    assert run("sciknoweval", tmp_path / "s.jsonl", tmp_path / "data", *arguments) == 2
    assert words in capsys.readouterr().err


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path / "s.jsonl", SCIENCE)
    assert [run("sciknoweval", tmp_path / "s.jsonl", tmp_path / "data") for _ in range(2)] == [0, 2]
    assert "exists already" in capsys.readouterr().err
    assert run("sciknoweval", tmp_path / "nowhere", tmp_path / "data") == 2
    assert "nowhere is no data file" in capsys.readouterr().err
