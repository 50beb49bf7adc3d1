"""Tool use as ToolAlpaca asks for it: the right calls with the right arguments; nothing is executed.

An answer is right when its calls are those of the row, each as often, with equal arguments (``toolcalls.Call.key``).
Calls may come in any order, unless the row says ``"ordered": true``: then the API depends on it. Arguments may stand in
any order, the values of a list only where ``unordered_arguments`` says so. A call that the data marks ``[Optional]``
may be left out.

The feedback names what is wrong call by call: unknown tool, missing, undocumented or ill-typed argument, wrong value.
It tells expected values only with ``feedback="expected"``, since then the teacher reads the answer.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from megatron_sdpo.tasks.dataset import DatasetTask, PromptRow, fields_of
from megatron_sdpo.tasks.rows import RowError
from megatron_sdpo.tasks.toolcalls import MOST_CALLS, Call, bare_name, parse_calls, read_arguments, same
from megatron_sdpo.tasks.tooldocs import KINDS, Parameter, Tool, alike, collection_name, documented_tools, kind_of
from megatron_sdpo.tasks.wording import as_json, quoted
from megatron_sdpo.types import Question, Verdict

MOST_PROBLEMS = 6
"""Problems that a feedback names; it says how many more there are."""

NO_CALL = (
    "There is no tool call. Write a line 'Action: ' with a tool's name and a line 'Action Input: ' with a JSON object."
)
TOO_MANY = f"There are more than {MOST_CALLS} calls; the request does not need so many."
WRONG_ORDER = "These are the right calls, but not in the right order."


class ToolRow(PromptRow):
    """``answer`` is a JSON list of ``{"Action": name, "Action_Input": JSON object in a string}``."""

    ordered: bool = False


class _Expected(msgspec.Struct):
    Action: str
    Action_Input: str | dict[str, Any]


@dataclass(kw_only=True)
class ToolUse(DatasetTask):
    """``data`` holds train.json and test.json."""

    feedback: Literal["none", "problems", "expected"] = "problems"
    """problems: what is wrong, not what would be right; expected: the right calls, too (they are the answer)."""

    unordered_arguments: tuple[str, ...] = ()
    """Names of arguments whose lists mean the same in any order, e.g. ``["categories", "tags"]``."""

    def question(self, id: str, row: dict[str, Any]) -> Question:
        fields = fields_of(row, ToolRow)
        calls = [_expected_call(call) for call in _decoded(fields.answer)]
        if not calls:
            raise RowError("the answer has no call")
        if len(calls) > MOST_CALLS:
            raise RowError(f"the answer has {len(calls)} calls, more than {MOST_CALLS}")
        category = fields.category or collection_name(fields.prompt) or "tools"
        return Question(id, self.messages(fields), {"calls": calls, "ordered": fields.ordered, "category": category})

    def verify(self, question: Question, response: str) -> Verdict:
        """Reward 1 when all calls are right, else 0."""
        calls = [call.with_sorted(self.unordered_arguments) for call in parse_calls(response)]
        wanted = [_Wanted.of(call, self.unordered_arguments) for call in question.payload["calls"]]
        if is_right(calls, wanted, question.payload["ordered"]):
            return Verdict(1.0)
        if self.feedback == "none":
            return Verdict(0.0)
        problems = list(find_problems(calls, wanted, documented_tools(question.messages[-1].content)))
        words = problems[:MOST_PROBLEMS] or [WRONG_ORDER]
        if len(problems) > MOST_PROBLEMS:
            words.append(f"There are {len(problems) - MOST_PROBLEMS} more problems.")
        if self.feedback == "expected":
            words += ["Expected calls:", *(f"{w.call.name} {as_json(w.call.arguments, 1000)}" for w in wanted)]
        return Verdict(0.0, "\n".join(words))


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A call of the right answer, and whether it may be left out."""

    call: Call
    optional: bool

    @classmethod
    def of(cls, payload: dict[str, Any], unordered: Sequence[str]) -> "_Wanted":
        return cls(Call(payload["name"], payload["arguments"]).with_sorted(unordered), payload["optional"])


def is_right(calls: Sequence[Call], wanted: Sequence[_Wanted], ordered: bool) -> bool:
    """All calls that are wanted, the optional ones or not, and no others."""
    if any(call.problem for call in calls):
        return False
    given = [call.key for call in calls]
    if not ordered:
        must = Counter(w.call.key for w in wanted if not w.optional)
        return must <= Counter(given) <= Counter(w.call.key for w in wanted)
    place = 0
    for w in wanted:
        if place < len(given) and given[place] == w.call.key:
            place += 1
        elif not w.optional:
            return False
    return place == len(given)


def find_problems(calls: Sequence[Call], wanted: Sequence[_Wanted], tools: dict[str, Tool]) -> Iterator[str]:
    """Sentences about everything that keeps the calls from being those wanted, in the order of the calls.

    A call that is right is never complained of, even where the data go beyond their own documentation.
    """
    if not calls:
        yield NO_CALL
        return
    if len(calls) > MOST_CALLS:
        yield TOO_MANY
        return
    left = list(wanted)
    wrong: list[tuple[int, Call]] = []
    for number, call in enumerate(calls, start=1):
        equal = next((w for w in left if not call.problem and w.call.key == call.key), None)
        left = [w for w in left if w is not equal]
        if equal is None:
            wrong.append((number, call))
    for number, call in wrong:
        meant = _nearest(call, left)
        left = [w for w in left if w is not meant]
        yield from (f"Call {number}{problem}" for problem in _call_problems(call, meant, tools))
    missing = sum(not w.optional for w in left)
    if missing:
        yield f"{missing} more {'call is' if missing == 1 else 'calls are'} needed."


def _nearest(call: Call, left: Sequence[_Wanted]) -> _Wanted | None:
    """Of the calls still wanted, the one of the same tool with the most equal arguments; the first of several."""
    of_tool = [w for w in left if w.call.name == call.name]

    def equal_arguments(w: _Wanted) -> int:
        return sum(key in call.arguments and same(call.arguments[key], v) for key, v in w.call.arguments.items())

    return max(of_tool, key=equal_arguments, default=None)


def _call_problems(call: Call, meant: _Wanted | None, tools: dict[str, Tool]) -> Iterator[str]:
    named = f" ({quoted(call.name, 60)})"
    tool = tools.get(call.name)
    if call.problem:
        yield f"{named}: the Action Input {call.problem}."
    elif meant is None and tool is None:
        yield f"{named}: there is no such tool; there are {', '.join(tools) or 'none'}."
    elif not call.has_input:
        yield f"{named} has no Action Input; write its arguments as a JSON object."
    else:
        described = list(_argument_problems(call, meant, (tool.parameters if tool else None) or {}, tool))
        yield from (f"{named}: {problem}" for problem in described)
        if meant is None and not described:
            yield f"{named} is not wanted here, or not this often."


def _argument_problems(
    call: Call, meant: _Wanted | None, parameters: dict[str, Parameter], tool: Tool | None
) -> Iterator[str]:
    """By the call that was meant, where there is one; by the documentation alone, where there is none."""
    right = meant.call.arguments if meant else {}
    required = right if meant else [name for name, parameter in parameters.items() if parameter.required]
    for name in required:
        if name not in call.arguments:
            yield f"the argument {quoted(name, 60)} is missing."
    for name, value in call.arguments.items():
        parameter = parameters.get(name, Parameter())
        shown = f"the argument {quoted(name, 60)}"
        if name in right and same(value, right[name]):
            continue
        if name not in right and name not in parameters and tool is not None and tool.parameters is not None:
            yield f"there is no argument {quoted(name, 60)}; there are {', '.join(parameters) or 'none'}."
        elif not parameter.accepts(value):
            yield f"{shown} must be {KINDS[parameter.kind][0]}, but {as_json(value)} is {kind_of(value)}."
        elif parameter.choices and isinstance(value, str) and value not in parameter.choices:
            yield f"{shown} must be one of {', '.join(parameter.choices)}, not {as_json(value)}."
        elif name in right and not alike(value, right[name]):
            yield f"{shown} must be {kind_of(right[name])}, but {as_json(value)} is {kind_of(value)}."
        elif name in right:
            yield f"{shown} has the wrong value {as_json(value)}."
        elif meant is not None:
            yield f"{shown} must be left out."


def _decoded(answer: str) -> list[_Expected]:
    try:
        return msgspec.json.decode(answer, type=list[_Expected])
    except msgspec.DecodeError as error:  # and its ValidationError
        raise RowError(f"the answer is not a list of calls: {error}") from error


def _expected_call(expected: _Expected) -> dict[str, Any]:
    name, optional = bare_name(expected.Action)
    given = expected.Action_Input
    try:
        arguments = given if isinstance(given, dict) else read_arguments(given)
    except ValueError as error:
        raise RowError(f"the Action_Input of {expected.Action!r} {error}") from error
    return {"name": name, "arguments": arguments, "optional": optional}
