"""A task whose questions are a user's files: splits, system prompt, malformed rows, one class to inherit from.

The smallest task of this kind, whole::

    @dataclass(kw_only=True)
    class Capitals(DatasetTask):
        def question(self, id: str, row: dict[str, Any]) -> Question:
            fields = fields_of(row, PromptRow)
            return Question(id, self.messages(fields), {"answer": fields.answer})

        def verify(self, question: Question, response: str) -> Verdict:
            right = question.payload["answer"]
            return Verdict(1.0) if response.strip() == right else Verdict(0.0, "That is not its capital.")

``train_questions`` are what the model is trained on, ``eval_questions`` what it is judged by, and ``verify`` gets the
question: a task that tests differently in training and in evaluation puts different tests into the two questions.
"""

import hashlib
import logging
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

import msgspec

from megatron_sdpo.config import ConfigError
from megatron_sdpo.tasks.rows import RowError, Rows, find_rows
from megatron_sdpo.types import Message, Question, Verdict

logger = logging.getLogger(__name__)

NAMED_ROWS = 20
"""Malformed rows that are named one by one in the log; all are counted."""

F = TypeVar("F")


class PromptRow(msgspec.Struct):
    """What every row has, or may have; columns that no field names are left alone."""

    prompt: str
    answer: str
    system: str | None = None
    category: str | None = None
    """By which evaluation tables are divided."""


def fields_of(row: dict[str, Any], kind: type[F]) -> F:
    """The row's fields, checked against a struct (RowError). Rows as verl writes them are understood too."""
    try:
        return msgspec.convert(_flattened(row), type=kind)
    except msgspec.ValidationError as error:
        raise RowError(str(error)) from error


def _flattened(row: dict[str, Any]) -> dict[str, Any]:
    """verl's ``{"prompt": [messages], "reward_model": {"ground_truth": answer}}`` in this project's columns."""
    turns, judged = row.get("prompt"), row.get("reward_model")
    if not isinstance(turns, list) or not isinstance(judged, dict):
        return row
    texts = {turn.get("role"): turn.get("content") for turn in turns if isinstance(turn, dict)}
    if len(texts) != len(turns) or not texts.keys() <= {"system", "user"}:
        raise RowError("prompt must be a text, or one user message with or without a system message before it")
    flat = {"prompt": texts.get("user"), "system": texts.get("system"), "answer": judged.get("ground_truth")}
    return {**row, **flat}


class LazyQuestions(Sequence[Question]):
    """The usable rows of a split as questions, each made when it is asked for."""

    def __init__(self, rows: Rows, places: "array[int]", make: Callable[[int], Question]) -> None:
        self._rows, self._places, self._make = rows, places, make

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Question: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Question, ...]: ...

    def __getitem__(self, index: int | slice) -> Question | tuple[Question, ...]:
        if isinstance(index, slice):
            return tuple(map(self._at, self._places[index]))
        return self._at(self._places[index])

    def _at(self, place: int) -> Question:
        try:
            return self._make(place)
        except RowError as error:
            raise ConfigError(f"{self._rows.where(place)} has changed since it was checked: {error}") from error


@dataclass(kw_only=True)
class DatasetTask(ABC):
    """Questions from ``data``/train.* and ``data``/test.* (rows.py); either may be missing, not both.

    Malformed rows are named in the log by file and line; more than ``max_malformed_share`` of a file's rows raise
    ConfigError, as do held-out questions that are also trained on.
    """

    data: str
    """Folder with train and test."""
    system: str | None = None
    """System prompt in place of the rows' own; "" leaves it out."""
    max_malformed_share: float = 0.0
    """Share of a file's rows that may be malformed and are left out."""
    allow_overlap: bool = False
    """Accept held-out questions that are also trained on."""

    def __post_init__(self) -> None:
        check_malformed_share(self.max_malformed_share)
        self._train, train_prints = self._split("train")
        self._eval, eval_prints = self._split("test")
        folder = self.folder()
        if not self._train and not self._eval:
            raise ConfigError(f"{folder} has neither train nor test questions; put train.json or test.json there")
        both = train_prints & eval_prints
        if both and not self.allow_overlap:
            raise ConfigError(
                f"{len(both)} of {len(eval_prints)} held-out questions of {folder} are also trained on; remove them"
                " from train, or set task.options.allow_overlap=true"
            )

    def folder(self) -> Path:
        """Where train and test are."""
        return Path(self.data)

    @abstractmethod
    def question(self, id: str, row: dict[str, Any]) -> Question:
        """The question of a row; RowError when it cannot be one."""

    @abstractmethod
    def verify(self, question: Question, response: str) -> Verdict:
        """See ``types.Task``."""

    def train_questions(self) -> Sequence[Question]:
        return self._train

    def eval_questions(self) -> Sequence[Question]:
        return self._eval

    def messages(self, row: PromptRow) -> tuple[Message, ...]:
        """System prompt, where there is one, and the row's prompt."""
        if not row.prompt.strip():
            raise RowError("the prompt is empty")
        system = row.system if self.system is None else self.system
        return (*([Message("system", system)] if system else []), Message("user", row.prompt))

    def _split(self, split: str) -> tuple[Sequence[Question], set[bytes]]:
        """The questions of a split, and a fingerprint of what each asks."""
        rows = find_rows(self.folder(), split)
        if rows is None:
            return (), set()

        def make(place: int) -> Question:
            row = rows[place]
            number = row.get("idx", row.get("id", place))
            if not isinstance(number, int | str) or isinstance(number, bool):
                raise RowError(f"idx must be a whole number or a text, not {number!r}")
            return self.question(f"{split}/{number}", row)

        return _checked(rows, make, self.max_malformed_share)


def _checked(
    rows: Rows, make: Callable[[int], Question], max_malformed_share: float
) -> tuple[LazyQuestions, set[bytes]]:
    """Every row is made into a question once, and forgotten: what is left is which are good."""
    places, prints, malformed = array("Q"), set[bytes](), list[str]()
    place_of: dict[str, int] = {}
    for place in range(len(rows)):
        try:
            question = make(place)
            if question.id in place_of:
                raise RowError(f"the question {question.id!r} was already given at {rows.where(place_of[question.id])}")
        except (RowError, ConfigError) as error:
            malformed.append(f"{rows.where(place)}: {error}")
            continue
        place_of[question.id] = place
        places.append(place)
        prints.add(hashlib.blake2b(question.messages[-1].content.encode(), digest_size=16).digest())
    judge_malformed(malformed, len(rows), max_malformed_share)
    return LazyQuestions(rows, places, make), prints


def check_malformed_share(share: float) -> None:
    """Refuse what is no share."""
    if not 0.0 <= share < 1.0:
        raise ConfigError(f"task.options.max_malformed_share is {share:g}; set it to 0 or more, below 1")


def judge_malformed(malformed: Sequence[str], rows: int, share: float) -> None:
    """Say what is left out, each row with its place and reason; refuse (ConfigError) more than a share of the rows."""
    if len(malformed) > share * rows:
        raise ConfigError(
            f"{malformed[0]} ({len(malformed)} of {rows} rows are malformed; mend them, or let"
            f" task.options.max_malformed_share, now {share:g}, allow that many)"
        )
    for words in malformed[:NAMED_ROWS]:
        logger.warning("left out a malformed row: %s", words)
    if malformed:
        logger.warning("%d of %d rows are malformed and left out", len(malformed), rows)
