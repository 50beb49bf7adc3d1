"""Tool use: calls as a parser finds them, what counts as right, and which words a wrong argument gets."""

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sdpo.config import ConfigError
from megatron_sdpo.tasks import load_task
from megatron_sdpo.tasks.toolcalls import DEEPEST, MOST_CALLS, Call, parse_calls, same
from megatron_sdpo.tasks.tooldocs import Parameter, documented_tools
from megatron_sdpo.tasks.tooluse import MOST_PROBLEMS, NO_CALL, TOO_MANY, WRONG_ORDER, ToolUse
from megatron_sdpo.types import Question, Verdict
from tests.mutations import mutated
from tests.task_data import as_response, real_data, tool_prompt, tool_row, written

FIND = ("findDogs", {"breed": "Spaniel", "limit": 3, "tags": ["calm", "old"]})
OWNER = (
    "addOwner",
    {"dog": 7, "owner": {"name": "Zoë", "phones": [{"kind": "home", "number": "1 {2}"}]}, "share": 0.5},
)
LIST: tuple[str, dict[str, Any]] = ("listBreeds", {})
ROWS = [
    tool_row(0, [FIND]),
    tool_row(1, [OWNER]),
    tool_row(2, [LIST]),
    tool_row(3, [FIND, ("findDogs", {"breed": "Poodle"}), OWNER]),
    tool_row(4, [FIND, OWNER], ordered=True),
    tool_row(5, [LIST, ("[Optional]findDogs", {"breed": "Collie"})]),
    tool_row(6, [("getDetails", {"Question": "which?"})]),  # undocumented, as a few of the real ones
    tool_row(7, [LIST, LIST]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tooluse")
    written(folder / "test.json", ROWS)
    return folder


@pytest.fixture(scope="module")
def task(folder: Path) -> ToolUse:
    task = load_task("tooluse", data=str(folder))
    assert isinstance(task, ToolUse)
    return task


def asked(task: ToolUse, idx: int) -> Question:
    return task.eval_questions()[idx]


def test_rows_become_questions(task: ToolUse) -> None:
    assert not task.train_questions()
    question = asked(task, 5)
    assert question.id == "test/5"
    assert question.payload == {
        "calls": [
            {"name": "listBreeds", "arguments": {}, "optional": False},
            {"name": "findDogs", "arguments": {"breed": "Collie"}, "optional": True},
        ],
        "ordered": False,
        "category": "Kennel",
    }


def test_tools_are_read_from_the_prompt() -> None:
    tools = documented_tools(tool_prompt("?"))
    assert list(tools) == ["findDogs", "addOwner", "listBreeds"]
    assert tools["findDogs"].parameters == {
        "breed": Parameter("string", True),
        "size": Parameter("string", False, ("small", "large")),
        "limit": Parameter("integer"),
        "tags": Parameter("array"),
    }
    assert tools["listBreeds"].parameters == {}


RIGHT = [
    (0, as_response([FIND])),
    (0, 'Action: findDogs\nAction Input: {\n  "limit": 3.0,\n  "tags": ["calm", "old"],\n "breed": "Sp\\u0061niel"}\n'),
    (0, f"**Action:** `findDogs`\n**Action Input:** ```json\n{json.dumps(FIND[1])}\n```\nFinal Answer: three dogs"),
    (0, f"Thought: x Action: findDogs Action Input: {json.dumps(FIND[1])}"),
    (0, f"<think>Action: listBreeds</think>{as_response([FIND])}"),
    (1, as_response([OWNER])),  # an object in an object in a list: no regular expression finds its end
    (1, as_response([(OWNER[0], json.dumps(OWNER[1]).replace("\\u00eb", "e\u0308"))])),
    (2, as_response([LIST])),
    (2, "Action: listBreeds"),
    (3, as_response([FIND, ("findDogs", {"breed": "Poodle"}), OWNER])),
    (3, as_response([OWNER, ("findDogs", {"breed": "Poodle"}), FIND])),
    (4, as_response([FIND, OWNER])),
    (5, as_response([LIST])),
    (5, as_response([LIST, ("findDogs", {"breed": "Collie"})])),
    (5, as_response([("[Optional]findDogs", {"breed": "Collie"}), LIST])),
    (6, as_response([("getDetails", {"Question": "which?"})])),
    (7, as_response([LIST, LIST])),
]


@pytest.mark.parametrize(("idx", "response"), RIGHT)
def test_right_calls(task: ToolUse, idx: int, response: str) -> None:
    assert task.verify(asked(task, idx), response) == Verdict(1.0)


def changed(**arguments: Any) -> list[tuple[str, Any]]:
    return [(FIND[0], {k: v for k, v in {**FIND[1], **arguments}.items() if v is not ...})]


F = 'Call 1 ("findDogs")'
WRONG = [
    (0, "I would look for dogs.", [NO_CALL]),
    (0, f"<think>{as_response([FIND])}\nOr", [NO_CALL]),
    (
        0,
        as_response([("findDog", FIND[1])]),
        [
            'Call 1 ("findDog"): there is no such tool; there are findDogs, addOwner, listBreeds.',
            "1 more call is needed.",
        ],
    ),
    (0, as_response(changed(breed=...)), [f'{F}: the argument "breed" is missing.']),
    (
        0,
        as_response(changed(colour="red")),
        [f'{F}: there is no argument "colour"; there are breed, size, limit, tags.'],
    ),
    (0, as_response(changed(limit="3")), [f'{F}: the argument "limit" must be an integer, but "3" is a string.']),
    (
        0,
        as_response(changed(limit=True)),
        [f'{F}: the argument "limit" must be an integer, but true is a boolean.'],
    ),
    (0, as_response(changed(limit=None)), [f'{F}: the argument "limit" must be an integer, but null is null.']),
    (0, as_response(changed(tags="calm")), [f'{F}: the argument "tags" must be a list, but "calm" is a string.']),
    (0, as_response(changed(limit=4)), [f'{F}: the argument "limit" has the wrong value 4.']),
    (0, as_response(changed(tags=["old", "calm"])), [f'{F}: the argument "tags" has the wrong value ["old", "calm"].']),
    (0, as_response(changed(size="huge")), [f'{F}: the argument "size" must be one of small, large, not "huge".']),
    (0, as_response(changed(size="small")), [f'{F}: the argument "size" must be left out.']),
    (
        0,
        as_response(changed(limit=..., breed="Pug")),
        [f'{F}: the argument "limit" is missing.', f'{F}: the argument "breed" has the wrong value "Pug".'],
    ),
    (0, as_response([FIND, FIND]), ['Call 2 ("findDogs") is not wanted here, or not this often.']),
    (0, as_response([LIST, FIND]), ['Call 1 ("listBreeds") is not wanted here, or not this often.']),
    (0, "Action: findDogs", [f"{F} has no Action Input; write its arguments as a JSON object."]),
    (
        0,
        as_response([("findDogs", "{breed: 1}")]),
        [
            f"{F}: the Action Input is not valid JSON: Expecting property name enclosed in double quotes"
            ' at "breed: 1}".'
        ],
    ),
    (
        0,
        as_response([("findDogs", '["Spaniel"]')]),
        [f'{F}: the Action Input is not a JSON object but "[\\"Spaniel\\"]".'],
    ),
    (
        0,
        as_response([("findDogs", '{"limit": NaN}')]),
        [f"{F}: the Action Input is not valid JSON: NaN is not a JSON value."],
    ),
    (0, as_response([("findDogs", '{"limit": 3, "limit": 3}')]), [f'{F}: the Action Input gives "limit" twice.']),
    (
        0,
        as_response([("findDogs", '{"limit": ' + "9" * 5000 + "}")]),
        [f"{F}: the Action Input has a number that is too long."],
    ),
    (
        0,
        as_response([("findDogs", '{"tags": ' + "[" * 100 + "]" * 100 + "}")]),
        [f"{F}: the Action Input is nested more than {DEEPEST} deep."],
    ),
    (
        0,
        as_response([("findDogs", '{"tags": ' + "[" * 100000)]),
        [f"{F}: the Action Input is nested more than {DEEPEST} deep."],
    ),
    (
        0,
        f"Action Input: {json.dumps(FIND[1])}",
        ['Call 1 (""): the Action Input has no Action before it.', "1 more call is needed."],
    ),
    (
        1,
        as_response([("addOwner", {**OWNER[1], "share": "half"})]),
        ['Call 1 ("addOwner"): the argument "share" must be a number, but "half" is a string.'],
    ),
    (
        1,
        as_response([("addOwner", {**OWNER[1], "share": 1})]),
        ['Call 1 ("addOwner"): the argument "share" has the wrong value 1.'],
    ),
    (
        2,
        as_response([("listBreeds", {"all": True})]),
        ['Call 1 ("listBreeds"): there is no argument "all"; there are none.'],
    ),
    (3, as_response([OWNER, ("findDogs", {"breed": "Poodle"})]), ["1 more call is needed."]),
    (3, as_response([("findDogs", {"breed": "Poodle"})]), ["2 more calls are needed."]),
    (4, as_response([OWNER, FIND]), [WRONG_ORDER]),
    (4, as_response([FIND, OWNER, LIST]), ['Call 3 ("listBreeds") is not wanted here, or not this often.']),
    (4, as_response([FIND]), ["1 more call is needed."]),
    (5, as_response([("findDogs", {"breed": "Collie"})]), ["1 more call is needed."]),
    (
        5,
        as_response([LIST, ("findDogs", {"breed": "Pug"})]),
        ['Call 2 ("findDogs"): the argument "breed" has the wrong value "Pug".'],
    ),
    (
        6,
        as_response([("getDetails", {"Question": "who?"})]),
        ['Call 1 ("getDetails"): the argument "Question" has the wrong value "who?".'],
    ),
    (7, as_response([LIST]), ["1 more call is needed."]),
]


@pytest.mark.parametrize(("idx", "response", "problems"), WRONG)
def test_wrong_calls_and_their_words(task: ToolUse, folder: Path, idx: int, response: str, problems: list[str]) -> None:
    assert task.verify(asked(task, idx), response) == Verdict(0.0, "\n".join(problems))
    silent = load_task("tooluse", data=str(folder), feedback="none")
    assert silent.verify(asked(task, idx), response) == Verdict(0.0)


def test_the_expected_calls_are_told_only_when_asked_for(task: ToolUse, folder: Path) -> None:
    response = as_response(changed(breed="Pug"))
    assert "Spaniel" not in task.verify(asked(task, 0), response).feedback
    telling = load_task("tooluse", data=str(folder), feedback="expected")
    expected = f"Expected calls:\nfindDogs {json.dumps(FIND[1])}"
    assert telling.verify(asked(task, 0), response).feedback.endswith(expected)


def test_a_long_list_of_problems_is_cut_and_counted(task: ToolUse) -> None:
    feedback = task.verify(asked(task, 0), as_response([("nothing", {})] * 50)).feedback
    assert feedback.count("\n") == MOST_PROBLEMS
    assert feedback.endswith(f"There are {51 - MOST_PROBLEMS} more problems.")


def test_more_calls_than_anybody_needs_are_not_looked_at(task: ToolUse) -> None:
    response = as_response([FIND] * MOST_CALLS)
    assert task.verify(asked(task, 0), response).feedback.startswith('Call 2 ("findDogs") is not wanted here')
    assert task.verify(asked(task, 0), response + as_response([FIND])) == Verdict(0.0, TOO_MANY)


def test_what_looks_like_a_call_inside_an_input_is_not_one() -> None:
    text = 'Action: a\nAction Input: {"note": "Action: b\\nAction Input: {}"}\nAction: c\nAction Input: {}'
    assert parse_calls(text) == (Call("a", {"note": "Action: b\nAction Input: {}"}), Call("c", {}))
    assert parse_calls("Reaction: a\nAction Plan: b") == ()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)
CALLS = st.lists(st.tuples(st.from_regex(r"\A\w+\Z"), st.dictionaries(st.text(), JSON, max_size=4)), max_size=5)


@settings(max_examples=50, deadline=None)
@given(CALLS, st.integers(0, 4), st.booleans())
def test_any_calls_are_read_back(calls: list[tuple[str, dict]], indent: int, ascii_only: bool) -> None:
    lines = []
    for name, arguments in calls:
        lines += [
            f"Action: {name}",
            "Action Input: " + json.dumps(arguments, indent=indent or None, ensure_ascii=ascii_only),
        ]
    found = parse_calls("\n".join(lines))
    assert [(c.name, c.problem) for c in found] == [(name, "") for name, _ in calls]
    assert all(same(c.arguments, arguments) for c, (_, arguments) in zip(found, calls, strict=True))


@settings(max_examples=50, deadline=None)
@given(CALLS.filter(bool), st.randoms(use_true_random=False))
def test_order_of_calls_and_of_arguments_changes_nothing(calls: list[tuple[str, dict]], chance: random.Random) -> None:
    payload = [{"name": name, "arguments": arguments, "optional": False} for name, arguments in calls]
    question = Question("q", (), {"calls": payload, "ordered": False, "category": ""})
    shuffled = [(name, dict(chance.sample(list(a.items()), len(a)))) for name, a in chance.sample(calls, len(calls))]
    assert ToolUse.verify(SILENT, question, as_response(shuffled)) == Verdict(1.0)
    assert ToolUse.verify(SILENT, question, as_response(shuffled[1:])) == Verdict(0.0)


def test_lists_may_come_in_any_order_where_the_task_says_so(task: ToolUse, folder: Path) -> None:
    other = as_response(changed(tags=["old", "calm"]))
    assert task.verify(asked(task, 0), other).reward == 0.0
    free = load_task("tooluse", data=str(folder), unordered_arguments=["tags", "limit"])
    assert free.verify(asked(task, 0), other) == Verdict(1.0)
    assert free.verify(asked(task, 0), as_response(changed(tags=["old", "calm", "old"]))).reward == 0.0
    assert free.verify(asked(task, 0), as_response(changed(tags=["old"]))).reward == 0.0


class _Silent(ToolUse):
    """The verifier without data."""

    def __init__(self) -> None:
        self.feedback, self.unordered_arguments = "none", ()


SILENT = _Silent()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (tool_row(0, [FIND], answer="[]"), "has no call"),
        (tool_row(0, [FIND] * 65), "the answer has 65 calls, more than 64"),
        (tool_row(0, [FIND], answer="none"), "not a list of calls"),
        (tool_row(0, [FIND], answer='[{"Action": "a"}]'), "Action_Input"),
        (tool_row(0, [FIND], answer='[{"Action": "a", "Action_Input": "{"}]'), "Action_Input of 'a' is not valid JSON"),
        (tool_row(0, [FIND], answer='[{"Action": "a", "Action_Input": "{} x"}]'), "after the object"),
        (tool_row(0, [FIND], ordered="yes"), "ordered"),
        (tool_row(0, [FIND], prompt=" "), "prompt is empty"),
    ],
)
def test_a_malformed_row_is_named(tmp_path: Path, row: dict, words: str) -> None:
    written(tmp_path / "train.json", [row])
    with pytest.raises(ConfigError, match=rf"train\.json, line 1: .*{words}"):
        load_task("tooluse", data=str(tmp_path))


def regex_grade(response: str, answer: list[dict]) -> bool:
    """The grader of the public SDPO code, which the parser replaces."""
    names = re.findall(r"Action:\s*(\w+)", response)
    inputs: dict[str, Any] = {}
    for found in re.findall(r"Action Input:\s*({.*?})", response, re.DOTALL):
        try:
            inputs |= json.loads(found)
        except json.JSONDecodeError:
            return False
    wanted: dict[str, Any] = {}
    for call in answer:
        wanted |= json.loads(call["Action_Input"])
    return Counter(names) == Counter(call["Action"] for call in answer) and inputs == wanted


def test_the_public_file() -> None:
    path = real_data("tooluse", "test.json")
    task = load_task("tooluse", data=str(path.parent))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    by_regex = []
    for row, question in zip(rows, task.eval_questions(), strict=True):
        answer = json.loads(row["answer"])
        response = as_response([(call["Action"], call["Action_Input"]) for call in answer])
        assert task.verify(question, response) == Verdict(1.0), row["idx"]
        if not regex_grade(response, answer):
            by_regex.append(row["idx"])
        for place, call in enumerate(answer):  # every single argument changed by itself is noticed
            for name, value in json.loads(call["Action_Input"]).items():
                arguments = {**json.loads(call["Action_Input"]), name: "other" if isinstance(value, int) else 17}
                calls = [(c["Action"], arguments if i == place else c["Action_Input"]) for i, c in enumerate(answer)]
                verdict = task.verify(question, as_response(calls))
                assert verdict.reward == 0.0 and json.dumps(name) in verdict.feedback
        for mutation in mutated([response], 30, seed=row["idx"]):
            verdict = task.verify(question, mutation)
            assert verdict.reward in (0.0, 1.0) and bool(verdict.feedback) == (verdict.reward == 0.0)
    assert by_regex == [4072, 4079]  # a nested object, a name in brackets
