"""The MiniPipe language: thirteen list operations under four names each, machines, and their interpreter.

A *machine* is a dialect of a small shell: of the four names that exist for an operation it knows
exactly one. ``judge`` runs a pipeline such as ``above 2 | order | get 1`` on a machine, for real,
and reports the first error in the words of a shell. It is a pure function of its arguments.
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_sdpo.types import Verdict

Value = int | list[int]

# Saturating arithmetic: a pipeline of many squares stays cheap, and short enough to print.
LARGEST = 10**18
LONGEST_OPERAND = 9

SYNTAX_ERROR = "sh: syntax error"
NOT_FOUND = "sh: {name}: not found"
NOT_FOUND_HINT = "sh: {name}: not found, did you mean {right}?"
NOT_A_LIST = "sh: {name}: input is not a list"
MISSING_OPERAND = "sh: {name}: missing operand"
EXTRA_OPERAND = "sh: {name}: extra operand"
TEST_FAILED = "test failed: got {got}, expected {expected}"
MESSAGES = (SYNTAX_ERROR, NOT_FOUND, NOT_FOUND_HINT, NOT_A_LIST, MISSING_OPERAND, EXTRA_OPERAND, TEST_FAILED)
"""Every feedback text that a verifier can write, for those who must know its words."""

TESTS_PER_QUESTION = 6
TEST_LENGTH = 4

_COMMAND_NAME = re.compile(r"[A-Za-z_][A-Za-z_0-9]{0,39}")
_OPERAND = re.compile(rf"[0-9]{{1,{LONGEST_OPERAND}}}")


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation: how questions call it, how machines may call it, and what it computes.

    ``names`` run from the most to the least common in the pretraining corpus. ``apply`` takes the
    input list and the operand (0 for an operation without one). ``largest_drawn`` bounds the operand
    of generated questions, which start at ``smallest_drawn``.
    """

    english: str
    names: tuple[str, str, str, str]
    apply: Callable[[list[int], int], Value]
    takes_operand: bool = False
    reduces: bool = False
    smallest_drawn: int = 1
    largest_drawn: int = 9


def _bounded(value: int) -> int:
    return min(value, LARGEST)


def _at(values: list[int], index: int) -> int:
    return values[index] if 0 <= index < len(values) else 0


OPERATIONS: Mapping[str, Operation] = {
    "odd": Operation(
        "keep odd", ("odds", "keep_odd", "filter_odd", "where_odd"), lambda values, _: [v for v in values if v % 2]
    ),
    "even": Operation(
        "keep even",
        ("evens", "keep_even", "filter_even", "where_even"),
        lambda values, _: [v for v in values if v % 2 == 0],
    ),
    "gt": Operation(
        "keep over",
        ("over", "gt", "above", "larger"),
        lambda values, operand: [v for v in values if v > operand],
        takes_operand=True,
    ),
    "sq": Operation(
        "square", ("square", "sq", "squared", "power"), lambda values, _: [_bounded(v * v) for v in values]
    ),
    "add": Operation(
        "add",
        ("add", "plus", "inc", "shift"),
        lambda values, operand: [_bounded(v + operand) for v in values],
        takes_operand=True,
    ),
    "sort": Operation("sort", ("sort", "sorted", "order", "rank"), lambda values, _: sorted(values)),
    "rev": Operation("reverse", ("reverse", "rev", "reversed", "backwards"), lambda values, _: values[::-1]),
    "first": Operation(
        "first",
        ("first", "take", "head", "limit"),
        lambda values, operand: values[:operand],
        takes_operand=True,
        smallest_drawn=2,
        largest_drawn=4,
    ),
    "sum": Operation(
        "sum", ("sum", "total", "add_all", "fold_add"), lambda values, _: _bounded(sum(values)), reduces=True
    ),
    "max": Operation(
        "max", ("max", "largest", "biggest", "top"), lambda values, _: max(values, default=0), reduces=True
    ),
    "min": Operation(
        "min", ("min", "smallest", "lowest", "bottom"), lambda values, _: min(values, default=0), reduces=True
    ),
    "count": Operation("count", ("count", "len", "size", "length"), lambda values, _: len(values), reduces=True),
    # The machine subtracts its index base before it calls this one.
    "item": Operation(
        "item",
        ("item", "at", "get", "nth"),
        _at,
        takes_operand=True,
        reduces=True,
        smallest_drawn=1,
        largest_drawn=3,
    ),
}
LIST_OPERATIONS = tuple(key for key, operation in OPERATIONS.items() if not operation.reduces)
REDUCING_OPERATIONS = tuple(key for key, operation in OPERATIONS.items() if operation.reduces)
ALL_NAMES = tuple(name for operation in OPERATIONS.values() for name in operation.names)
_MEANING = {name: key for key, operation in OPERATIONS.items() for name in operation.names}


class Step(NamedTuple):
    """One step of a question or program: a key of ``OPERATIONS``, and its operand or None. ``Step("gt", 2)``"""

    operation: str
    operand: int | None = None


Steps = Sequence[Step]


@dataclass(frozen=True, slots=True)
class Machine:
    """Which of its four names each operation has here, and whether ``item`` counts from 0 or 1.

    Example: ``Machine({"odd": 2, "even": 1, ...}, 1)`` knows ``filter_odd``, not ``odds``.
    """

    ranks: Mapping[str, int]
    index_base: int = 1

    @classmethod
    def drawn(cls, seed: int, ranks: Sequence[int] = (1, 2), index_base: int = 1) -> "Machine":
        """The hidden machine of a seed; each operation takes the name of one of the popularity ``ranks`` (0 to 3)."""
        rng = random.Random(seed)
        return cls({key: rng.choice(ranks) for key in OPERATIONS}, index_base)

    def name(self, operation: str) -> str:
        """The one name under which this machine knows an operation."""
        return OPERATIONS[operation].names[self.ranks[operation]]


QUESTION_COUNTS_FROM = 1
"""``item 2`` in a question means the second element, whatever the machine counts from."""


def question_text(steps: Steps) -> str:
    """``[Step("gt", 2), Step("sort")]`` -> ``"keep over 2, sort"``"""
    return ", ".join(OPERATIONS[s.operation].english + ("" if s.operand is None else f" {s.operand}") for s in steps)


def reference_program(steps: Steps, machine: Machine) -> str:
    """The literal answer on a machine: ``"above 2 | order"``."""
    commands = []
    for operation, operand in steps:
        if operation == "item" and operand is not None:
            operand += machine.index_base - QUESTION_COUNTS_FROM
        commands.append(machine.name(operation) + ("" if operand is None else f" {operand}"))
    return " | ".join(commands)


def drawn_steps(rng: random.Random, smallest: int = 2, largest: int = 4) -> tuple[Step, ...]:
    """Between ``smallest`` and ``largest`` random steps; only the last may reduce the list to a number."""
    count = rng.randint(smallest, largest)
    steps: list[Step] = []
    while len(steps) < count - 1:
        key = rng.choice(LIST_OPERATIONS)
        if not steps or steps[-1].operation != key:
            steps.append(Step(key, _drawn_operand(rng, key)))
    key = rng.choice(REDUCING_OPERATIONS if rng.random() < 0.8 else LIST_OPERATIONS)
    steps.append(Step(key, _drawn_operand(rng, key, last=True)))
    return tuple(steps)


def _drawn_operand(rng: random.Random, key: str, last: bool = False) -> int | None:
    operation = OPERATIONS[key]
    if not operation.takes_operand:
        return None
    if last and not operation.reduces:  # small operands leave something of four digits to see
        return rng.randint(2, 4)
    return rng.randint(operation.smallest_drawn, operation.largest_drawn)


def sequences(smallest: int, largest: int) -> int:
    """How many different sequences of operations (operands aside) ``drawn_steps`` can draw."""
    last, lists = len(OPERATIONS), len(LIST_OPERATIONS)
    return sum(last * (lists * (lists - 1) ** (n - 2) if n > 1 else 1) for n in range(smallest, largest + 1))


def inputs_for(steps: Steps) -> list[list[int]]:
    """The input lists on which an answer to this question is tested; the same for every call."""
    rng = random.Random(question_text(steps))
    return [[rng.randint(0, 9) for _ in range(TEST_LENGTH)] for _ in range(TESTS_PER_QUESTION)]


def run(steps: Steps, values: list[int], index_base: int) -> Value:
    """What a pipeline computes; ``steps`` must be well formed (``parse``)."""
    result: Value = values
    for key, operand in steps:
        assert isinstance(result, list), "parse and drawn_steps let only the last step reduce"
        shift = index_base if key == "item" else 0
        result = OPERATIONS[key].apply(result, (operand or 0) - shift)
    return result


def parse(program: str, machine: Machine, hint: bool) -> tuple[Step, ...] | str:
    """The steps that a program means on a machine, or the text of its first error, from left to right.

    Digits may stand apart: decoders of digit-wise tokenizers write 12 as ``1 2``.
    """
    steps: list[Step] = []
    for command in program.split("|"):
        name, *rest = command.split() or [""]
        operand = "".join(rest)
        if not _COMMAND_NAME.fullmatch(name) or (rest and not _OPERAND.fullmatch(operand)):
            return SYNTAX_ERROR
        key = _MEANING.get(name)
        if key is None:
            return NOT_FOUND.format(name=name)
        if machine.name(key) != name:
            return (NOT_FOUND_HINT if hint else NOT_FOUND).format(name=name, right=machine.name(key))
        if steps and OPERATIONS[steps[-1].operation].reduces:
            return NOT_A_LIST.format(name=name)
        if OPERATIONS[key].takes_operand != bool(rest):
            return (EXTRA_OPERAND if rest else MISSING_OPERAND).format(name=name)
        steps.append(Step(key, int(operand) if rest else None))
    return tuple(steps)


def judge(steps: Steps, program: str, machine: Machine, hint: bool) -> Verdict:
    """Run ``program`` on ``machine`` and compare with what ``steps`` ask for on all test inputs.

    The reward is 1 (all equal, feedback "") or 0 (feedback is the first error). With ``hint`` a name
    that means something on another machine is answered by this machine's name for it.
    """
    parsed = parse(program, machine, hint)
    if isinstance(parsed, str):
        return Verdict(0.0, parsed)
    for values in inputs_for(steps):
        expected = run(steps, values, QUESTION_COUNTS_FROM)
        got = run(parsed, values, machine.index_base)
        if got != expected:
            return Verdict(0.0, TEST_FAILED.format(got=_shown(got), expected=_shown(expected)))
    return Verdict(1.0)


def _shown(value: Value) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)
