"""Pretraining documents for the MiniPipe base model: answers, retries and copies on *random* machines.

The base model so knows every command name, does not know which machine it is on, and has learned to
use a demonstration or an error text. Contexts are made by the same chat template and the same teacher
templates as in training with SDPO, so that both agree token for token.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_sdpo.tasks.minipipe import ATTEMPT_TEMPLATE, FEEDBACK_TEMPLATE, SOLUTION_TEMPLATE, TEACHER_TEMPLATE
from megatron_sdpo.tasks.minipipe_language import (
    ALL_NAMES,
    OPERATIONS,
    Machine,
    Step,
    Steps,
    drawn_steps,
    judge,
    question_text,
    reference_program,
)
from megatron_sdpo.types import Message, Sample, Tokens

MIXTURE: Mapping[str, float] = {"copy": 0.1, "solution": 0.25, "plain": 0.15, "feedback": 0.4, "feedbacks": 0.1}
"""Shares of the kinds of document: a pure copy drill (no question; it makes copying appear early), question and
solution, question alone, question and one feedback, question and two or three feedbacks."""

NAME_POPULARITY = (0.36, 0.32, 0.2, 0.12)
SOLUTION_MARK = "<sol>"

HINT_SHARE = 0.5
ATTEMPT_SHOWN_SHARE = 0.3
CORRUPT_SHARE = 0.1
FIXED_SHARE = 0.4
"""In documents with several feedbacks, how many of a later attempt's names are already right."""
TRIES_TO_FAIL = 20


class Encoder(Tokens, Protocol):
    """What a corpus needs of chat.Chat."""

    def encode(self, text: str) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class Document:
    """A text as token ids, and which of them are learned: ``loss_spans`` are half-open, in order, disjoint.

    Example: ``Document("plain", (2, 40, 4, 31, 44, 1), ((3, 6),))`` learns the answer ``(31, 44, 1)``.
    """

    kind: str
    ids: tuple[int, ...]
    loss_spans: tuple[tuple[int, int], ...]

    def samples(self, name: str) -> tuple[Sample, ...]:
        """One next-token sample a span: everything before the span is its prompt. Together they have the
        document's gradient, because attention is causal."""
        return tuple(
            Sample(f"{name}/{i}", 0, self.ids[:start], self.ids[start:end], (), None, 0.0)
            for i, (start, end) in enumerate(self.loss_spans)
        )


def documents(seed: int, tokens: Encoder, mixture: Mapping[str, float] = MIXTURE) -> Iterator[Document]:
    """Endless random documents; the same seed gives the same ones."""
    rng = random.Random(seed)
    while True:
        yield drawn_document(rng, tokens, mixture)


def drawn_document(rng: random.Random, tokens: Encoder, mixture: Mapping[str, float] = MIXTURE) -> Document:
    """One random document."""
    kind = rng.choices(list(mixture), list(mixture.values()))[0]
    if kind == "copy":
        copied = _random_commands(rng)
        return _document(kind, tokens, copied, content=teacher_content("", copied).lstrip(), learn_solution=False)
    steps = drawn_steps(rng)
    machine = random_machine(rng)
    answer = reference_program(steps, machine)
    question = question_text(steps)
    if kind == "solution":
        return _document(kind, tokens, answer, content=teacher_content(question, answer), learn_solution=True)
    failures = {"plain": 0, "feedback": 1, "feedbacks": rng.randint(2, 3)}[kind]
    feedback = _failures_text(rng, steps, machine, failures)
    content = teacher_content(question, feedback=feedback) if feedback else question
    return _document(kind, tokens, answer, content=content, learn_solution=False)


def teacher_content(question: str, solution: str = "", feedback: str = "") -> str:
    """The user message that a teacher reads; ``feedback`` is already in its template, maybe several times and each
    after the attempt that it is about."""
    shown = SOLUTION_TEMPLATE.format(solution=solution) if solution else ""
    return TEACHER_TEMPLATE.format(prompt=question, solution=shown, attempt="", feedback=feedback)


def random_machine(rng: random.Random) -> Machine:
    """A machine as the corpus sees them: popular names more often, counting from 0 in most."""
    ranks = {key: rng.choices(range(len(NAME_POPULARITY)), NAME_POPULARITY)[0] for key in OPERATIONS}
    return Machine(ranks, rng.choices((0, 1), (0.7, 0.3))[0])


def corrupted(rng: random.Random, steps: Steps) -> tuple[Step, ...]:
    """The steps with one missing, one replaced, or two exchanged."""
    changed = list(steps)
    how, place = rng.randrange(3), rng.randrange(len(changed))
    if how == 0 and len(changed) > 1:
        changed.pop(place)
    elif how == 1:
        changed[place] = drawn_steps(rng)[-1 if place == len(changed) - 1 else 0]
    else:
        other = rng.randrange(len(changed))
        changed[place], changed[other] = changed[other], changed[place]
    return tuple(changed)


def _document(kind: str, tokens: Encoder, answer: str, content: str, learn_solution: bool) -> Document:
    prompt = tokens.prompt_ids((Message("user", content),))
    ids = (*prompt, *tokens.encode(answer), tokens.eos_id)
    spans = [(len(prompt), len(ids))]
    if learn_solution:  # a demonstration is text of the corpus, too
        (mark,) = tokens.encode(SOLUTION_MARK)
        start = prompt.index(mark) + 1
        spans.insert(0, (start, start + len(tokens.encode(answer))))
    return Document(kind, ids, tuple(spans))


def _random_commands(rng: random.Random) -> str:
    commands = []
    for _ in range(rng.randint(2, 5)):
        operand = f" {rng.randint(1, 9)}" if rng.random() < 0.3 else ""
        commands.append(rng.choice(ALL_NAMES) + operand)
    return " | ".join(commands)


def _failures_text(rng: random.Random, steps: Steps, machine: Machine, count: int) -> str:
    """``count`` feedbacks (each in its template) of failed attempts at ``steps``, some with the attempt shown."""
    hint = rng.random() < HINT_SHARE
    failures: list[tuple[str, str]] = []
    for _ in range(count):
        failure = _failure(rng, steps, machine, hint, retry=count > 1)
        if failure is not None:
            failures.append(failure)
    show_attempts = rng.random() < ATTEMPT_SHOWN_SHARE
    return "".join(
        (ATTEMPT_TEMPLATE.format(attempt=attempt) if show_attempts else "")
        + FEEDBACK_TEMPLATE.format(feedback=feedback)
        for attempt, feedback in failures
    )


def _failure(rng: random.Random, steps: Steps, machine: Machine, hint: bool, retry: bool) -> tuple[str, str] | None:
    """A wrong attempt and its feedback; None when luck made every try right."""
    for _ in range(TRIES_TO_FAIL):
        guess = random_machine(rng)
        if retry:  # like real retries, which keep what they have learned
            known = {step.operation for step in steps if rng.random() < FIXED_SHARE}
            ranks = {key: (machine if key in known else guess).ranks[key] for key in OPERATIONS}
            guess = Machine(ranks, guess.index_base)
        attempted: Sequence[Step] = corrupted(rng, steps) if rng.random() < CORRUPT_SHARE else steps
        attempt = reference_program(attempted, guess)
        verdict = judge(steps, attempt, machine, hint)
        if verdict.reward == 0:
            return attempt, verdict.feedback
    return None
