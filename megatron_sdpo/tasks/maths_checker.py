"""Processes that compare mathematical answers: bounded in processor time and memory, shared by threads.

math-verify bounds its time by ``signal.alarm``, which works in a main thread only and cannot interrupt a computation
inside C. Here each comparison runs in the main thread of a process of its own (maths_worker.py), which the kernel ends
when it has used its processor time. Time on the clock plays no part, so a verdict does not depend on the load.
"""

import logging
import os
import select
import signal
import subprocess
import sys
import threading
import weakref
from contextlib import suppress
from typing import IO

import msgspec

from megatron_sdpo.tasks.wording import shortened

logger = logging.getLogger(__name__)

CPU_SECONDS = 3
"""Processor time that one comparison may take, rounded up to the kernel's whole seconds."""
STUCK_SECONDS = 600.0
"""On the clock: a process that answers neither way is taken for broken."""


class Comparison(msgspec.Struct, frozen=True):
    """``read``: what the answer was read as, None when it could not be. ``gave_up``: it took too much to find out."""

    equal: bool
    read: str | None
    right_is_readable: bool = True
    gave_up: bool = False


class CheckerError(RuntimeError):
    """The processes that compare cannot be started."""


class Checker:
    """As many processes as threads ask at once; each is started when it is first needed."""

    def __init__(self) -> None:
        self._idle: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _close, self._idle)

    def compare(self, right: str, answer: str) -> Comparison:
        """Whether two LaTeX texts mean the same. Raises CheckerError only when no process can be started."""
        request = msgspec.json.encode([_valid(right), _valid(answer)]) + b"\n"
        for _ in range(2):  # a process may also be killed by what has nothing to do with the question
            with self._lock:
                process = self._idle.pop() if self._idle else None
            process = process or _started()
            line = _exchange(process, request)
            if line:
                with self._lock:
                    self._idle.append(process)
                return msgspec.json.decode(line, type=Comparison)
            ended_by = _ended(process)
            if ended_by == -signal.SIGXCPU:
                return Comparison(False, None, gave_up=True)
            logger.warning("a process that compares answers ended with %s at %r", ended_by, shortened(answer))
        return Comparison(False, None, gave_up=True)

    def close(self) -> None:
        """End the processes that wait for a question."""
        with self._lock:
            _close(self._idle)
            self._idle.clear()


def _started() -> subprocess.Popen[bytes]:
    """A process that has loaded what it needs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_sdpo.tasks.maths_worker", str(CPU_SECONDS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
    )
    if not _exchange(process, b""):
        process.kill()
        _, words = process.communicate()
        raise CheckerError(f"the process that compares answers did not start: {words.decode(errors='replace')[-500:]}")
    return process


def _exchange(process: subprocess.Popen[bytes], request: bytes) -> bytes:
    """The next line that a process writes, after it was sent a request; b"" when it has ended, or is stuck."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(request)
        process.stdin.flush()
    except OSError:
        return b""
    if not select.select([process.stdout], [], [], STUCK_SECONDS)[0]:
        process.kill()
    return _line(process.stdout)


def _line(pipe: IO[bytes]) -> bytes:
    line = pipe.readline()
    return line if line.endswith(b"\n") else b""


def _ended(process: subprocess.Popen[bytes]) -> int:
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with suppress(OSError):  # a request that it did not read
                pipe.close()
    return process.wait()


def _close(idle: list[subprocess.Popen[bytes]]) -> None:
    for process in idle:
        process.kill()
        _ended(process)


def _valid(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
