"""What LiveCodeBench calls right, and the words about what is not.

Nothing here raises, whatever a response or a program says.
"""

import json
import re
import signal
from collections.abc import Sequence
from decimal import Decimal, DecimalException

from megatron_sdpo.sandbox import Outcome, OutcomeKind
from megatron_sdpo.tasks.livecodebench_data import Case
from megatron_sdpo.tasks.wording import after_thinking

NO_BLOCK = "Incorrect Format: Put your code inside a ```python ... ``` block."
OPEN_BLOCK = "Incorrect Format: The code block is not closed. Try again with a shorter response."
VALUE_CHARACTERS = 250
INPUT_LINES = 8
DEBUG_LINES = 10
FEEDBACK_CHARACTERS = 2000
WRONG_ANSWERS = 2

_TITLES: dict[OutcomeKind, str] = {
    "syntax_error": "Syntax Error",
    "runtime_error": "Runtime Error",
    "time_limit": "Time Limit Exceeded",
    "memory_limit": "Memory Limit Exceeded",
    "output_limit": "Output Limit Exceeded",
    "source_limit": "Source Limit Exceeded",
    "lost": "Runtime Error",
}
_BLOCK = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)


def code_of(response: str) -> tuple[str | None, str]:
    """The longest fenced block after the thinking, or None and what is wrong.

    Example: ``code_of("Sure:\\n```python\\nprint(1)\\n```")`` is ``("print(1)\\n", "")``.
    """
    answer = after_thinking(response)
    blocks = _BLOCK.findall(answer)
    if blocks:
        return max(blocks, key=len), ""
    return None, OPEN_BLOCK if re.search(r"```[^\n`]*\n", answer) else NO_BLOCK


def same_output(printed: str, expected: str) -> bool:
    """Line by line without outer white space, and where a line differs, number by number as exact decimals."""
    ours = [line.strip() for line in printed.strip().split("\n")]
    theirs = [line.strip() for line in expected.strip().split("\n")]
    return len(ours) == len(theirs) and all(a == b or _same_numbers(a, b) for a, b in zip(ours, theirs, strict=True))


def _same_numbers(ours: str, theirs: str) -> bool:
    try:
        return list(map(Decimal, ours.split())) == list(map(Decimal, theirs.split()))
    except (DecimalException, ValueError):
        return False


def same_result(result: bytes | None, expected: str) -> bool:
    """Equal JSON values; 1 and 1.0 are equal, a tuple is a list."""
    try:
        return result is not None and json.loads(result) == json.loads(expected)
    except (ValueError, RecursionError):
        return False


def is_right(outcome: Outcome, test: Case, function: str | None) -> bool:
    """Whether an execution ended well with the expected answer."""
    if outcome.kind != "ok":
        return False
    if function is not None:
        return same_result(outcome.result, test.output)
    return same_output(outcome.stdout.decode("utf-8", "replace"), test.output)


def feedback(outcomes: Sequence[Outcome], tests: Sequence[Case], function: str | None) -> str:
    """What went wrong in words, "" when nothing did: how the last execution failed, otherwise wrong answers."""
    if outcomes and outcomes[-1].kind != "ok":
        return shorten(_failure(outcomes[-1], tests[len(outcomes) - 1]), FEEDBACK_CHARACTERS)
    wrong = [i for i, outcome in enumerate(outcomes) if not is_right(outcome, tests[i], function)]
    wrong.sort(key=lambda i: len(tests[i].input) + len(tests[i].output))
    texts = [_wrong_answer(i, outcomes[i], tests[i], function) for i in wrong[:WRONG_ANSWERS]]
    return shorten("\n\n".join(texts), FEEDBACK_CHARACTERS)


def hidden_feedback(outcome: Outcome) -> str:
    """The same of a test that must not be shown."""
    title = "Wrong Answer" if outcome.kind == "ok" else _TITLES[outcome.kind]
    return f"The program passes the public tests, but not a hidden one: {title}"


def _failure(outcome: Outcome, test: Case) -> str:
    title = _TITLES[outcome.kind]
    if outcome.kind == "source_limit":
        return f"{title}: The program is too long."
    if outcome.kind == "syntax_error":
        return f"{title}\n{outcome.error}"
    words = outcome.error if outcome.kind == "runtime_error" else ""
    if outcome.kind == "lost":
        words = "The program brought down the machine on which it ran."
    elif outcome.kind == "runtime_error" and outcome.signal is not None:
        words = f"The program was ended by signal {_signal_name(outcome.signal)}."
    elif outcome.kind == "runtime_error" and not words:
        words = f"The program ended with exit code {outcome.exit_code}."
    head = f"{title}\n{words}" if words else title
    return f"{head}\n\nLast Executed Input\n{_shown_input(test)}{_debug_output(outcome)}"


def _wrong_answer(i: int, outcome: Outcome, test: Case, function: str | None) -> str:
    if function is None:
        got = outcome.stdout.decode("utf-8", "replace").strip() or "(nothing)"
    else:
        got = outcome.shown if outcome.result is None else outcome.result.decode("utf-8", "replace")
    return (
        f"Test Case {i + 1}: Wrong Answer\n\nInput\n{_shown_input(test)}\n\nOutput\n{shorten(got)}"
        f"\n\nExpected\n{shorten(test.output.strip())}{_debug_output(outcome)}"
    )


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else str(number)


def _shown_input(test: Case) -> str:
    return _shown_lines(test.input.strip() or "(empty)", INPUT_LINES)


def _debug_output(outcome: Outcome) -> str:
    text = outcome.stderr.decode("utf-8", "replace").strip()
    return f"\n\nDebug Output\n{_shown_lines(text, DEBUG_LINES)}" if text else ""


def _shown_lines(text: str, most: int) -> str:
    """The first lines and the last one, each shortened."""
    lines = text.split("\n")
    if len(lines) > most:
        left_out = len(lines) - most
        lines = [*lines[: most - 1], f"... ({left_out} lines left out) ...", lines[-1]]
    return "\n".join(map(shorten, lines))


def shorten(text: str, most: int = VALUE_CHARACTERS) -> str:
    """A text of at most ``most`` characters, cut in the middle: ``shorten("a" * 1000, 40)`` keeps both ends."""
    if len(text) <= most:
        return text
    mark = f" ... ({len(text)} characters) ... "
    head = (most - len(mark) + 1) // 2
    return text[:head] + mark + text[len(text) - (most - len(mark) - head) :]
