"""MiniPipe: write a shell pipeline for an English spec, on a machine whose command names are hidden.

``keep over 2, sort, item 1`` is answered by ``above 2 | order | get 1`` on a machine that happens to
know these names. The question never says which names those are; only the verifier's errors, or a
sibling's success, tell. Training and held-out questions share no sequence of operations, so what is
learned is the machine, not the answers.
"""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from megatron_sdpo.config import ConfigError
from megatron_sdpo.tasks.jsonl import read_questions
from megatron_sdpo.tasks.minipipe_language import (
    LONGEST_OPERAND,
    OPERATIONS,
    Machine,
    Step,
    Steps,
    drawn_steps,
    judge,
    question_text,
    reference_program,
    sequences,
)
from megatron_sdpo.types import Message, Question, Verdict

TEACHER_TEMPLATE = "{prompt}{solution}{attempt}{feedback} <again>"
SOLUTION_TEMPLATE = " <sol> {solution}"
ATTEMPT_TEMPLATE = " <att> {attempt}"
FEEDBACK_TEMPLATE = " <fb> {feedback}"
"""Teacher contexts of the MiniPipe base model; its pretraining documents are written with the same four."""

TRAIN_SEED = 4242
EVAL_SEED = 777
MOST_OPERATIONS = 16


@dataclass(kw_only=True)
class MiniPipe:
    """The task (types.Task). Options that cannot work raise ConfigError."""

    machine_seed: int = 1
    """Which hidden machine; every seed is another one."""
    ranks: tuple[int, ...] = (1, 2)
    """Popularity ranks (0 most common, 3 rarest) that the machine's names are drawn from."""
    index_base: int = 1
    """What the machine's ``item`` counts from, 0 or 1."""
    hint: bool = True
    """Answer a name of another machine with ``did you mean ...?``."""
    train_size: int = 600
    eval_size: int = 80
    min_ops: int = 2
    max_ops: int = 4
    """Shortest and longest question, in operations."""
    question_seed: int = 0
    """Which questions, held out and trained on. 0 is the standard set; no other seed asks a sequence that set 0 of
    the same sizes holds out, so settings chosen there have not seen what they are judged by."""
    questions: str | None = None
    """A JSON-lines file (tasks/jsonl.py) of training questions to use instead of drawn ones; the payload is
    ``{"operations": [["gt", 2], ["sum", null]]}``."""

    def __post_init__(self) -> None:
        self._check_options()
        sizes = (self.eval_size, self.min_ops, self.max_ops)
        held_out = drawn_questions(EVAL_SEED, *sizes)
        never_trained = {sequence(steps) for steps in held_out}
        if self.question_seed:
            held_out = drawn_questions(EVAL_SEED + self.question_seed, *sizes, never_trained)
            never_trained |= {sequence(steps) for steps in held_out}

        def check(question: Question) -> None:
            if sequence(payload_steps(question)) in never_trained:
                raise ConfigError("its operations are those of a held-out question; remove the line")

        if self.questions is None:
            seed = TRAIN_SEED + self.question_seed
            drawn = drawn_questions(seed, self.train_size, self.min_ops, self.max_ops, never_trained)
            train = tuple(as_question(f"train/{i}", steps) for i, steps in enumerate(drawn))
        else:
            train = read_questions(self.questions, check)
        assert never_trained.isdisjoint(sequence(payload_steps(q)) for q in train)
        self.machine = Machine.drawn(self.machine_seed, self.ranks, self.index_base)
        self._train = train
        self._eval = tuple(as_question(f"eval/{i}", steps) for i, steps in enumerate(held_out))

    def _check_options(self) -> None:
        if not self.ranks or not set(self.ranks) <= set(range(4)):
            raise ConfigError(f"MiniPipe's ranks are {list(self.ranks)}; give one or more of 0, 1, 2, 3")
        if self.index_base not in (0, 1):
            raise ConfigError(f"MiniPipe's index_base is {self.index_base}; it must be 0 or 1")
        if not 1 <= self.min_ops <= self.max_ops <= MOST_OPERATIONS:
            raise ConfigError(
                f"MiniPipe's questions have {self.min_ops} to {self.max_ops} operations;"
                f" set 1 <= min_ops <= max_ops <= {MOST_OPERATIONS}"
            )
        if self.train_size < 1 or self.eval_size < 1:
            raise ConfigError("MiniPipe's train_size and eval_size must be at least 1")
        held_out = self.eval_size * (2 if self.question_seed else 1)
        wanted = held_out + (self.train_size if self.questions is None else 0)
        available = sequences(self.min_ops, self.max_ops)
        if wanted > available // 2:  # drawing the last rare ones would take long
            raise ConfigError(
                f"MiniPipe has {available} sequences of {self.min_ops} to {self.max_ops} operations, too few for"
                f" {wanted} different questions; ask for at most {available // 2} or raise max_ops"
            )

    def train_questions(self) -> Sequence[Question]:
        return self._train

    def eval_questions(self) -> Sequence[Question]:
        return self._eval

    def verify(self, question: Question, response: str) -> Verdict:
        """Run the response on the hidden machine; reward 1 or 0, feedback is the first error's text."""
        return judge(payload_steps(question), response, self.machine, self.hint)

    def reference(self, question: Question) -> str:
        """The literal answer on the hidden machine. For tests and diagnosis: no training text contains it."""
        return reference_program(payload_steps(question), self.machine)


def sequence(steps: Steps) -> tuple[str, ...]:
    """The operations without their operands: what training and held-out questions do not share."""
    return tuple(step.operation for step in steps)


def drawn_questions(
    seed: int, count: int, min_ops: int, max_ops: int, exclude: Collection[tuple[str, ...]] = ()
) -> list[tuple[Step, ...]]:
    """``count`` random questions, no two with the same sequence of operations, none with an excluded one."""
    rng = random.Random(seed)
    seen = set(exclude)
    drawn: list[tuple[Step, ...]] = []
    while len(drawn) < count:
        steps = drawn_steps(rng, min_ops, max_ops)
        if sequence(steps) not in seen:
            seen.add(sequence(steps))
            drawn.append(steps)
    return drawn


def as_question(id: str, steps: Steps) -> Question:
    """``Question(id, (Message("user", "keep over 2, sum"),), {"operations": [["gt", 2], ["sum", None]]})``"""
    return Question(id, (Message("user", question_text(steps)),), {"operations": [list(step) for step in steps]})


def payload_steps(question: Question) -> tuple[Step, ...]:
    """The steps that a question asks for; ConfigError when its payload does not hold MiniPipe operations."""
    operations = question.payload.get("operations")
    if not isinstance(operations, list) or not 1 <= len(operations) <= MOST_OPERATIONS:
        raise ConfigError(f"payload.operations must be a list of 1 to {MOST_OPERATIONS} [operation, operand] pairs")
    steps = tuple(_payload_step(entry) for entry in operations)
    for step in steps[:-1]:
        if OPERATIONS[step.operation].reduces:
            raise ConfigError(f"payload.operations: {step.operation!r} makes a number, so it can only come last")
    return steps


def _payload_step(entry: object) -> Step:
    if not isinstance(entry, list | tuple) or len(entry) != 2:
        raise ConfigError(f"payload.operations: {entry!r} is not an [operation, operand] pair")
    key, operand = entry
    if not isinstance(key, str) or key not in OPERATIONS:
        raise ConfigError(f"payload.operations: unknown operation {key!r}; there are {', '.join(OPERATIONS)}")
    if not OPERATIONS[key].takes_operand:
        if operand is not None:
            raise ConfigError(f"payload.operations: {key!r} takes no operand; write [{key!r}, null]")
    elif type(operand) is not int or not 0 < operand < 10**LONGEST_OPERAND:  # a bool is an int, too
        raise ConfigError(f"payload.operations: {key!r} needs a positive whole number, not {operand!r}")
    return Step(key, operand)
