"""Questions from a user's JSON-lines file, read strictly: a line is right or it is refused by number.

One question a line, either form::

    {"id": "q1", "prompt": "keep over 2, sum", "payload": {"operations": [["gt", 2], ["sum", null]]}}
    {"id": "q2", "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]}
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from megatron_sdpo.config import ConfigError
from megatron_sdpo.types import Message, Question


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    id: str
    prompt: str | None = None
    messages: tuple[Message, ...] | None = None
    payload: dict[str, Any] = {}


def read_questions(path: str | Path, check: Callable[[Question], None] | None = None) -> tuple[Question, ...]:
    """All questions of a file, in its order.

    ``check`` looks at each question and raises ConfigError for a payload that its task cannot use;
    its sentence is reported with the file and the line, like every other refusal.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the questions file {path}: {error.strerror}") from error
    questions: list[Question] = []
    line_of: dict[str, int] = {}
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n") if data.strip() else [], start=1):
        try:
            question = _question(line)
            if check is not None:
                check(question)
            if question.id in line_of:
                raise ConfigError(f"the id {question.id!r} was already used on line {line_of[question.id]}")
        except ConfigError as error:
            raise ConfigError(f"{path}, line {number}: {error}") from error
        line_of[question.id] = number
        questions.append(question)
    if not questions:
        raise ConfigError(f"the questions file {path} is empty; write one JSON object a line")
    return tuple(questions)


def _question(line: bytes) -> Question:
    if not line.strip():
        raise ConfigError("the line is empty; write one JSON object a line")
    try:
        row = msgspec.json.decode(line, type=_Line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"not a question: {error}") from error
    if not row.id:
        raise ConfigError("the id is empty")
    if (row.prompt is None) == (row.messages is None):
        raise ConfigError("give either prompt or messages")
    messages = row.messages if row.prompt is None else (Message("user", row.prompt),)
    if not messages or messages[-1].role != "user" or not messages[-1].content.strip():
        raise ConfigError("the last message must be the user's and must not be empty")
    return Question(row.id, messages, row.payload)
