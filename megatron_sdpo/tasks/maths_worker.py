"""Compares one pair of answers after another: ``python -m megatron_sdpo.tasks.maths_worker CPU_SECONDS``.

Reads ``["right", "answer"]`` a line, writes a ``Comparison`` a line, the first before any question when it is ready.
"""

import logging
import math
import os
import resource
import signal
import sys
import time
from typing import Any

import msgspec

from megatron_sdpo.tasks.maths_checker import Comparison
from megatron_sdpo.tasks.wording import shortened

MEMORY_BYTES = 2 * 1024**3


def compare(right: str, answer: str) -> Comparison:
    """What math-verify makes of the two; whatever it raises is a no."""
    from math_verify import verify  # an optional package, which importing this module must not need

    try:
        wanted, given = _parsed(right), _parsed(answer)
        equal = verify(wanted, given, timeout_seconds=None)
        return Comparison(bool(equal), _words(given), _words(wanted) is not None)
    except Exception:  # parsers of a foreign language fail in any way; MemoryError and RecursionError are among them
        return Comparison(False, None, gave_up=True)


def _parsed(latex: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    latex_only = [LatexExtractionConfig()]
    return parse(rf"\boxed{{{latex}}}", extraction_config=latex_only, parsing_timeout=None)  # pyright: ignore


def _words(parsed: list[Any]) -> str | None:
    """The value as text; None when only the text itself was found."""
    values = [value for value in parsed if not isinstance(value, str)]
    if not values:
        return None
    try:
        return shortened(str(values[0]))
    except ValueError:  # a number with thousands of digits
        return "a very long number"


def _limit_time(cpu_seconds: int) -> None:
    """So much processor time more than was used up to now; then the kernel ends this process."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = math.ceil(time.process_time()) + cpu_seconds
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def main(cpu_seconds: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks; this one ends with its pipe
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # ending it by its time limit would leave one behind
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    answer = compare("1", "1")
    while True:
        out.write(msgspec.json.encode(answer) + b"\n")
        out.flush()
        line = sys.stdin.buffer.readline()
        if not line:
            return
        _limit_time(cpu_seconds)
        answer = compare(*msgspec.json.decode(line, type=tuple[str, str]))


if __name__ == "__main__":
    main(int(sys.argv[1]))
