"""SciKnowEval: scientific reasoning as multiple choice (chemistry, physics, biology, materials).

The model reasons and then writes ``<answer>B</answer>``. The text after the last ``<answer>`` up to ``</answer>``,
without surrounding space, must be the letter and nothing else; an answer that is not closed is none.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_sdpo.tasks.dataset import DatasetTask, PromptRow, fields_of
from megatron_sdpo.tasks.rows import RowError
from megatron_sdpo.tasks.wording import after_thinking, quoted
from megatron_sdpo.types import Question, Verdict

_LETTERS = "ABCDEFGHIJ"
_OPTION = re.compile(rf"^([{_LETTERS}]): ", re.MULTILINE)

NO_ANSWER = "Incorrect format: there is no <answer>; end with <answer>, the letter of the right option, </answer>."
NOT_CLOSED = "Incorrect format: the last <answer> has no </answer> after it."
NO_LETTER = "Incorrect format: between <answer> and </answer> must be one of the letters {letters} alone, not {got}."


@dataclass(kw_only=True)
class SciKnowEval(DatasetTask):
    """``data`` holds a folder for each domain, ``<domain>/train.json`` and ``<domain>/test.json``."""

    domain: Literal["chemistry", "physics", "biology", "materials"]
    format_feedback: bool = False
    """Say what is wrong with the form of an answer. A wrong letter has no feedback either way."""

    def folder(self) -> Path:
        return Path(self.data) / self.domain

    def question(self, id: str, row: dict[str, Any]) -> Question:
        fields = fields_of(row, PromptRow)
        letters = option_letters(fields.prompt)
        if len(letters) < 2:
            raise RowError("the prompt has no options; write each on a line, from 'A: ' on")
        if fields.answer not in list(letters):
            raise RowError(f"the answer is {fields.answer!r}, not one of the letters {', '.join(letters)}")
        payload = {"answer": fields.answer, "letters": letters, "category": fields.category or self.domain}
        return Question(id, self.messages(fields), payload)

    def verify(self, question: Question, response: str) -> Verdict:
        """Reward 1 for the right letter in the right form, else 0."""
        text = after_thinking(response)
        answer = extracted(text)
        if answer == question.payload["answer"]:
            return Verdict(1.0)
        feedback = _format_error(text, answer, question.payload["letters"]) if self.format_feedback else ""
        return Verdict(0.0, feedback)


def option_letters(prompt: str) -> str:
    """The letters of the options: ``"ABCD"`` for a prompt with lines ``A: ...`` to ``D: ...``."""
    found = set(_OPTION.findall(prompt))
    count = next((i for i, letter in enumerate(_LETTERS) if letter not in found), len(_LETTERS))
    return _LETTERS[:count]


def extracted(response: str) -> str | None:
    """The text of the last answer without surrounding space; None when there is none, or it is not closed."""
    _, opened, rest = response.rpartition("<answer>")
    answer, closed, _ = rest.partition("</answer>")
    return answer.strip() if opened and closed else None


def _format_error(response: str, answer: str | None, letters: str) -> str:
    if answer is None:
        return NOT_CLOSED if "<answer>" in response else NO_ANSWER
    if answer in list(letters):
        return ""
    return NO_LETTER.format(letters=", ".join(letters), got=quoted(answer))
