"""How verifiers quote what a model wrote: short, on one line, and always valid text."""

import json
from typing import Any

QUOTED_CHARACTERS = 120


def quoted(text: str, limit: int = QUOTED_CHARACTERS) -> str:
    """``quoted('a\\nb')`` is ``"a\\nb"`` in double quotes; a long text loses its middle."""
    return json.dumps(shortened(text, limit), ensure_ascii=False)


def shortened(text: str, limit: int = QUOTED_CHARACTERS) -> str:
    """At most ``limit`` characters and an ellipsis in their middle. Half a surrogate pair becomes a question mark."""
    if len(text) > limit:
        text = f"{text[: limit - limit // 2]} … {text[-(limit // 2) :]}"
    return text.encode("utf-8", "replace").decode()


def inline(text: str, limit: int = QUOTED_CHARACTERS) -> str:
    """As ``quoted``, without escapes: LaTeX stays what it is, and runs of space become one."""
    return f'"{" ".join(shortened(text, limit).split())}"'


def as_json(value: Any, limit: int = QUOTED_CHARACTERS) -> str:
    """A JSON value as text, shortened."""
    return shortened(json.dumps(value, ensure_ascii=False), limit)


def after_thinking(text: str) -> str:
    """The answer proper, where a model thinks first: what follows the last ``</think>``, up to a ``<think>`` that was
    not closed. A thought that was cut is no answer, whatever it holds."""
    return text.rpartition("</think>")[2].partition("<think>")[0]
