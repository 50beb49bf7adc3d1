"""Commands that run side by side, and end together when this process is told to."""

import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType


class SideBySide:
    """``run`` in as many threads as there are commands at a time, inside ``listening`` in the main thread.

    ``signal`` is the first SIGINT or SIGTERM that came: what runs is told to end, and nothing more ought to be started.
    """

    def __init__(self) -> None:
        self.stopping = threading.Event()
        self.signal = 0
        self._running: set[subprocess.Popen[bytes]] = set()

    def run(self, command: Sequence[str], output: int, environment: Mapping[str, str]) -> int:
        """The exit code. ``output`` is a file descriptor that gets everything the command says."""
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,  # the terminal's Ctrl-C is this process's to pass on
        )
        self._running.add(process)
        if self.stopping.is_set():  # while it was started
            process.terminate()
        try:
            return process.wait()
        finally:
            self._running.discard(process)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """SIGINT and SIGTERM are passed on as SIGTERM, meanwhile."""

        def stop(number: int, frame: FrameType | None) -> None:
            self.signal = self.signal or number
            self.stopping.set()
            for process in [*self._running]:
                process.terminate()

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
