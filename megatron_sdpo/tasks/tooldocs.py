"""What a tool-use prompt documents: tools, their parameters, and the types of these.

Read from the text that the model reads::

    getFacts: Retrieve facts.
    Parameters: {"category": "Required. string. One of: [habits, habitat]. The category.", "limit": "integer."}
"""

import json
import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

_TOOL = re.compile(r"^([\w.\-\[\]/]+): ")
_PARAMETERS = "Parameters: "
_SPECIFIED = re.compile(r"\s*(?P<required>Required\.\s*)?(?P<kind>[A-Za-z]+)\b")
_CHOICES = re.compile(r"One of: \[([^\]]*)\]")
_NAME = re.compile(r"^Name: (.+)$", re.MULTILINE)

KINDS: dict[str, tuple[str, tuple[type, ...]]] = {
    "string": ("a string", (str,)),
    "integer": ("an integer", (int,)),
    "number": ("a number", (int, float)),
    "boolean": ("a boolean", (bool,)),
    "object": ("an object", (dict,)),
    "array": ("a list", (list,)),
}


@dataclass(frozen=True, slots=True)
class Parameter:
    """Example: ``Parameter("string", True, ("habits", "habitat"))``; ``kind`` is "" where the text names none."""

    kind: str = ""
    required: bool = False
    choices: tuple[str, ...] = ()

    def accepts(self, value: Any) -> bool:
        """A value of the right type; a whole number such as 2.0 is an integer."""
        if not self.kind:
            return True
        if isinstance(value, bool):
            return self.kind == "boolean"
        if self.kind == "integer" and isinstance(value, float):
            return value.is_integer()
        return isinstance(value, KINDS[self.kind][1])


@dataclass(frozen=True, slots=True)
class Tool:
    """``parameters`` is None when the documentation does not list them in a way that can be read."""

    name: str
    parameters: dict[str, Parameter] | None = field(default=None)


def kind_of(value: Any) -> str:
    """In words: ``"a string"``, ``"null"``."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return KINDS["boolean"][0]
    return next(words for words, types in KINDS.values() if isinstance(value, types))


def alike(one: Any, other: Any) -> bool:
    """Of one kind, or both numbers."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (one, other))
    return numbers or kind_of(one) == kind_of(other)


def collection_name(prompt: str) -> str:
    """The name of the collection of tools: ``"Axolotl"``; "" when the prompt gives none."""
    found = _NAME.search(prompt)
    return found[1].strip() if found else ""


@lru_cache(maxsize=4096)
def documented_tools(prompt: str) -> dict[str, Tool]:
    """Tools by name, in the order of the prompt."""
    tools: dict[str, Tool] = {}
    name = ""
    for line in prompt.splitlines():
        if line.startswith(_PARAMETERS):
            if name:
                tools[name] = Tool(name, _parameters(line.removeprefix(_PARAMETERS)))
            name = ""
        elif found := _TOOL.match(line):
            name = found[1]
    return tools


def _parameters(text: str) -> dict[str, Parameter] | None:
    try:
        listed = json.loads(text)
    except ValueError:
        return None
    if not isinstance(listed, dict):
        return None
    return {name: _parameter(words) for name, words in listed.items() if isinstance(words, str)}


def _parameter(words: str) -> Parameter:
    found, choices = _SPECIFIED.match(words), _CHOICES.search(words)
    if found is None:
        return Parameter()
    kind = found["kind"].lower()
    listed = tuple(choice.strip() for choice in choices[1].split(",")) if choices else ()
    return Parameter(kind if kind in KINDS else "", bool(found["required"]), listed)
