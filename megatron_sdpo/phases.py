"""The parts of a training step: how long each took, and who is told where this rank stands."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol


class Follower(Protocol):
    """Is told as this rank goes from phase to phase (a watchdog, a timeline, a profiler)."""

    def began(self, step: int, name: str) -> None: ...

    def ended(self, step: int, name: str) -> None:
        """Also of a phase that raised."""
        ...


class Phases:
    """Phases of one rank, one inside another; ``step`` is the version of the weights before the step.

    Example:
        phases = Phases([follower])
        with phases("train"):
            ...
        phases.taken()  # {"time/train": 1.2}
    """

    def __init__(self, followers: Sequence[Follower] = (), step: int = 0) -> None:
        self.step = step
        self._followers = followers
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Note how long the block took, unless it raised."""
        step = self.step
        with ExitStack() as ending:
            for follower in self._followers:
                follower.began(step, name)
                ending.callback(follower.ended, step, name)
            began = time.perf_counter()
            yield
            self._seconds[f"time/{name}"] = time.perf_counter() - began

    def taken(self) -> dict[str, float]:
        """The seconds of each phase since this was last asked, under ``time/NAME``."""
        taken, self._seconds = self._seconds, {}
        return taken
