r"""Mathematics: the last ``\boxed{...}`` of a response is compared with the right answer by math-verify.

``\boxed{\frac12}``, ``\boxed{0.5}`` and ``\boxed{1/2}`` are one value. The feedback says how the answer was read. The
comparison runs in processes of its own (maths_checker.py): an answer like ``9^{9^{9^9}}`` costs its time and no more.
"""

import importlib.util
import logging
from dataclasses import dataclass
from typing import Any

from megatron_sdpo.config import ConfigError
from megatron_sdpo.tasks.dataset import DatasetTask, PromptRow, fields_of
from megatron_sdpo.tasks.maths_checker import Checker, Comparison
from megatron_sdpo.tasks.rows import RowError
from megatron_sdpo.tasks.wording import after_thinking, inline
from megatron_sdpo.types import Message, Question, Verdict

logger = logging.getLogger(__name__)

LONGEST_ANSWER = 1000
"""Characters; what a competition asks for is far shorter."""

_BOX = r"\boxed{"
NO_BOX = r"There is no \boxed{} in the answer; put the result into one."
NOT_CLOSED = r"The last \boxed{ is not closed."
EMPTY = r"The last \boxed{} is empty."
TOO_LONG = rf"What the last \boxed{{}} holds is longer than {LONGEST_ANSWER} characters; put only the result into it."
UNREADABLE = "The boxed answer {answer} cannot be read as mathematics."
TOO_HARD = "The boxed answer {answer} is too hard to compare; simplify it."
WRONG = "The boxed answer {answer} was read as {read}, which is not the right result."


@dataclass(kw_only=True)
class Maths(DatasetTask):
    """``data`` holds train and test; ``answer`` is LaTeX, by itself or in a ``\\boxed{}``, or a plain number."""

    instruction: str = r"Please reason step by step, and put your final answer within \boxed{}."
    """Added to prompts that do not speak of a box."""

    def __post_init__(self) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ConfigError(
                "the task 'maths' needs math-verify, which is not installed; install megatron-sdpo[tasks]"
            )
        super().__post_init__()
        self._checker = Checker()
        self._warned: set[str] = set()

    def question(self, id: str, row: dict[str, Any]) -> Question:
        fields = fields_of(row, PromptRow)
        answer = _plain(last_boxed(fields.answer) or fields.answer)
        if not answer or len(answer) > LONGEST_ANSWER:
            raise RowError(f"the answer has {len(answer)} characters; it must have 1 to {LONGEST_ANSWER}")
        *earlier, asked = self.messages(fields)
        if self.instruction and _BOX.rstrip("{") not in asked.content:
            asked = Message("user", f"{asked.content}\n{self.instruction}")
        return Question(id, (*earlier, asked), {"answer": answer, "category": fields.category or "maths"})

    def verify(self, question: Question, response: str) -> Verdict:
        """Reward 1 for an equal value (or the same text), else 0 and how the answer was read."""
        text = after_thinking(response)
        boxed = last_boxed(text)
        if boxed is None:
            return Verdict(0.0, NOT_CLOSED if _BOX in text else NO_BOX)
        answer, right = _plain(boxed), question.payload["answer"]
        if not answer or len(answer) > LONGEST_ANSWER:
            return Verdict(0.0, TOO_LONG if answer else EMPTY)
        if answer == right:
            return Verdict(1.0)
        if _is_order(right) and answer.isalpha() and answer.upper() != right:
            return Verdict(0.0, WRONG.format(answer=inline(answer), read=inline(answer)))
        compared = self._checker.compare(right, answer)
        return self._verdict(question, answer, compared)

    def close(self) -> None:
        """End the processes that compare; they also end with this one."""
        self._checker.close()

    def _verdict(self, question: Question, answer: str, compared: Comparison) -> Verdict:
        if compared.equal:
            return Verdict(1.0)
        if not compared.right_is_readable and question.id not in self._warned:
            self._warned.add(question.id)
            logger.warning("the right answer of %r cannot be read, so only the same text counts", question.id)
        shown = inline(answer)
        if compared.gave_up:
            return Verdict(0.0, TOO_HARD.format(answer=shown))
        if compared.read is None:
            return Verdict(0.0, UNREADABLE.format(answer=shown))
        return Verdict(0.0, WRONG.format(answer=shown, read=compared.read))


def last_boxed(text: str) -> str | None:
    r"""What the last ``\boxed{...}`` holds, braces balanced; None when there is none or it is not closed."""
    _, opened, rest = text.rpartition(_BOX)
    if not opened:
        return None
    depth, escaped = 1, False
    for place, character in enumerate(rest):
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif character in "{}":
            depth += 1 if character == "{" else -1
            if depth == 0:
                return rest[:place]
    return None


def _is_order(answer: str) -> bool:
    """``BCA``, which math-verify would take for a product, equal to ``ABC``."""
    return len(answer) > 2 and answer.isascii() and answer.isalpha() and answer.isupper()


def _plain(answer: str) -> str:
    """Without the space and the dollar signs around it, but for a dollar that is meant; nor the end of a sentence,
    which math-verify cannot read after a number."""
    inner = answer.strip().strip("$").strip()
    if inner.endswith("\\") and answer.rstrip().endswith("\\$"):
        inner += "$"
    return inner.removesuffix(".").rstrip() if not inner.endswith("..") else inner
