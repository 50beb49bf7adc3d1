"""Tool calls in a model's text: found, parsed, compared.

A call is ``Action: name`` and after it ``Action Input: {JSON}``, which may run over lines and stand in a code fence.
What looks like a call inside a JSON input is part of that input.
"""

import json
import re
import unicodedata
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_sdpo.tasks.wording import after_thinking, quoted

DEEPEST = 64
"""Objects and lists of an input inside each other; far below where Python's own parser gives up."""

MOST_CALLS = 64
"""Calls that are looked at; the parser's words about a bad one take time in proportion to the whole text."""

# It begins with a literal, which the engine finds fast; what may not stand before that is looked at afterwards.
_MARK = re.compile(r"Action(?<!\wAction)(?P<input> Input)?\**[ \t]*:\**")
_FENCE = re.compile(r"\s*(?:```(?:json)?)?\s*")
_OPTIONAL = "[Optional]"


@dataclass(frozen=True, slots=True)
class Call:
    """Example: ``Call("getFacts", {"limit": 3})``. ``problem`` says why the input could not be read; "" if it could.

    ``has_input`` is False when no ``Action Input:`` followed, which counts as ``{}``.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    has_input: bool = True
    problem: str = ""

    @property
    def key(self) -> str:
        """Equal for calls that mean the same: arguments in any order, 1 and 1.0, composed and decomposed accents."""
        return json.dumps([_normal(self.name), _normal(self.arguments)], sort_keys=True)

    def with_sorted(self, names: Collection[str]) -> "Call":
        """The same call with the lists under these arguments in one order, so that any order is equal."""
        lists = {name: self.arguments[name] for name in names if isinstance(self.arguments.get(name), list)}
        ordered = {name: sorted(values, key=_canonical) for name, values in lists.items()}
        return replace(self, arguments={**self.arguments, **ordered}) if ordered else self


def parse_calls(text: str) -> tuple[Call, ...]:
    """The calls of a response in their order, those with a problem too; thinking before the answer is left out.

    After more than ``MOST_CALLS`` the rest of the text is not looked at.
    """
    text = after_thinking(text)
    calls: list[Call] = []
    name: str | None = None  # of a call whose input has not come yet
    place = 0
    while len(calls) <= MOST_CALLS and (mark := _MARK.search(text, place)):
        place = mark.end()
        if not mark["input"]:
            if name is not None:
                calls.append(Call(name, has_input=False))
            name, place = _name(text, place)
            continue
        begin = _FENCE.match(text, place)
        assert begin is not None
        try:
            arguments, place = _read_object(text, begin.end())
            calls.append(Call(name or "", arguments, problem="" if name is not None else "has no Action before it"))
        except _NotReadable as error:
            calls.append(Call(name or "", problem=str(error)))
        name = None
    if name is not None:
        calls.append(Call(name, has_input=False))
    return tuple(calls)


def bare_name(name: str) -> tuple[str, bool]:
    """``"[Optional]update"`` -> ``("update", True)``: the data marks calls that may be left out so."""
    return name.removeprefix(_OPTIONAL).strip(), name.startswith(_OPTIONAL)


def same(one: Any, other: Any) -> bool:
    """Equality of JSON values as ``Call.key`` has it: true is not 1, and 1 is 1.0."""
    return _canonical(one) == _canonical(other)


def read_arguments(text: str) -> dict[str, Any]:
    """A whole text as a JSON object; ValueError when it is none."""
    arguments, end = _read_object(text, len(text) - len(text.lstrip()))
    if text[end:].strip():
        raise ValueError(f"there is {quoted(text[end:].strip(), 40)} after the object")
    return arguments


class _NotReadable(ValueError):
    """Why an input is no JSON object."""


def _name(text: str, place: int) -> tuple[str, int]:
    """The rest of the line, up to an Action Input on it, without marks of emphasis; and where that ends."""
    newline = text.find("\n", place)
    end = len(text) if newline < 0 else newline
    following = _MARK.search(text, place, end)
    if following and following["input"]:
        end = following.start()
    return bare_name(text[place:end].strip(" \t\r*`\"'"))[0], end


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _NotReadable(f"gives {quoted(twice)} twice")
    return found


def _no_constant(name: str) -> Any:
    raise _NotReadable(f"is not valid JSON: {name} is not a JSON value")


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_constant)


def _read_object(text: str, place: int) -> tuple[dict[str, Any], int]:
    """The JSON object that starts at a place, and where it ends."""
    try:
        value, end = _DECODER.raw_decode(text, place)
    except _NotReadable:
        raise
    except json.JSONDecodeError as error:
        raise _NotReadable(f"is not valid JSON: {error.msg} at {quoted(text[error.pos : error.pos + 20])}") from error
    except RecursionError as error:
        raise _NotReadable(f"is nested more than {DEEPEST} deep") from error
    except ValueError as error:  # a number with thousands of digits
        raise _NotReadable("has a number that is too long") from error
    if not isinstance(value, dict):
        raise _NotReadable(f"is not a JSON object but {quoted(text[place:end], 40)}")
    if _depth(value) > DEEPEST:
        raise _NotReadable(f"is nested more than {DEEPEST} deep")
    return value, end


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        depth += 1
    return depth - 1


def _canonical(value: Any) -> str:
    return json.dumps(_normal(value), sort_keys=True)


def _normal(value: Any) -> Any:
    if isinstance(value, dict):
        return {unicodedata.normalize("NFC", key): _normal(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_normal(inner) for inner in value]
    if isinstance(value, str):
        return unicodedata.normalize("NFC", value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
