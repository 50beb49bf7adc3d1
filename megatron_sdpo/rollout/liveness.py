"""Whether engines live: one that hangs keeps its port, its requests and its GPUs, and says nothing.

Threads ask each engine two things: its HTTP server, how much there is to do, and through it its scheduler
(``/server_info``), which answers between two batches, while it is paused and without its memory too; ``/health`` would
have it generate, which it cannot then. One question of a kind is under way at a time, and an answer is a sign of life.
An engine that gives none for ``engine.hang_timeout_s`` hangs.

While weights are sent, a scheduler waits inside one call for the senders and for the other engines, however well it is
itself. Then its silence does not count, unless the system says that one of its processes is stopped; the HTTP server
has to answer all the time.

Time counts only while somebody looks: a machine that stood still as a whole does not make its engines hang.
"""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil

from megatron_sdpo.rollout.control import EngineControl, EngineError
from megatron_sdpo.rollout.fleet_files import ROUTER
from megatron_sdpo.types import EngineAddress

LONGEST_TICK_S = 5.0
"""At most so long between an answer and the next question."""


class Liveness:
    """Of the processes of a fleet, each from ``watch`` to ``forget``; a router has no scheduler.

    Example:
        liveness = Liveness("token", timeout_s=180.0, is_publishing=lambda: False)
        liveness.watch(address, leader=4711)
        liveness.hung()  # {"engine-1": "its scheduler has not answered for 180 s (engine.hang_timeout_s), ..."}
    """

    def __init__(self, token: str, timeout_s: float, is_publishing: Callable[[], bool]) -> None:
        """``is_publishing``: whether weights are being sent to the engines."""
        self._token, self._timeout_s, self._is_publishing = token, timeout_s, is_publishing
        self._watched: dict[str, _Watched] = {}
        self._looked = time.monotonic()

    def watch(self, address: EngineAddress, leader: int) -> None:
        """From now on, ``leader`` being the process whose session holds all the engine's processes."""
        self.forget(address.name)
        self._watched[address.name] = _Watched(address, self._token, leader, self._timeout_s)

    def forget(self, name: str) -> None:
        """Nothing where it is not watched."""
        if (watched := self._watched.pop(name, None)) is not None:
            watched.close()

    def forget_all(self) -> None:
        for name in list(self._watched):
            self.forget(name)

    def hung(self) -> dict[str, str]:
        """Who hangs, and what is known of it. Returns at once; call it again and again."""
        now, is_publishing = time.monotonic(), self._is_publishing()
        passed, self._looked = now - self._looked, now
        found = {name: watched.look(passed, is_publishing) for name, watched in self._watched.items()}
        return {name: words for name, words in found.items() if words is not None}


class _Pulse:
    """A question that is asked for ever, by a thread of its own; how long it has had no answer."""

    def __init__(self, ask: Callable[[], bool], tick_s: float) -> None:
        self.silent_s = 0.0
        self._ask, self._tick_s = ask, tick_s
        self._answers = self._seen = 0
        self._closed = threading.Event()
        threading.Thread(target=self._run, name="pulse", daemon=True).start()

    def look(self, passed: float, is_excused: bool = False) -> None:
        """``passed``: seconds since the last look."""
        answers = self._answers
        self.silent_s = 0.0 if is_excused or answers != self._seen else self.silent_s + passed
        self._seen = answers

    def close(self) -> None:
        """Ask no more; who waits for an answer waits on, in a thread that keeps nothing from ending."""
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(self._tick_s):
            self._answers += self._ask()


class _Watched:
    """One process that serves HTTP, and the scheduler behind it."""

    def __init__(self, address: EngineAddress, token: str, leader: int, timeout_s: float) -> None:
        self._control = EngineControl(address, token, timeout_s)
        self._leader, self._timeout_s = leader, timeout_s
        self._tick_s = min(LONGEST_TICK_S, timeout_s / 10)
        self._load: dict[str, Any] = {}
        self._stopped: list[str] = []
        self._stopped_s = self._since_listed = 0.0
        has_scheduler = address.name != ROUTER
        self._server = _Pulse(self._ask_load if has_scheduler else self._ask_router, self._tick_s)
        self._scheduler = _Pulse(self._ask_scheduler, self._tick_s) if has_scheduler else None

    def close(self) -> None:
        self._server.close()
        if self._scheduler is not None:
            self._scheduler.close()

    def look(self, passed: float, is_publishing: bool) -> str | None:
        """What is wrong, or None."""
        passed = min(passed, self._tick_s)  # of a gap in which nobody looked, a tick counts
        self._server.look(passed)
        self._look_for_stopped(passed, is_publishing)
        bound = f"{self._timeout_s:g} s (engine.hang_timeout_s)"
        if self._scheduler is not None:
            self._scheduler.look(passed, is_excused=is_publishing)
        scheduler_s = 0.0 if self._scheduler is None else self._scheduler.silent_s
        if max(self._server.silent_s, scheduler_s) > self._timeout_s:
            # Of a process that stands still as a whole, the scheduler's last answer may be the earlier one.
            if self._server.silent_s > self._timeout_s / 2:
                return self._words(f"its HTTP server has not answered for {bound}", is_publishing)
            words = f"its scheduler has not answered for {bound}, though its HTTP server does"
            return self._words(words, is_publishing)
        if self._stopped_s > self._timeout_s:
            return self._words(f"it has stood still for {bound}", is_publishing)
        return None

    def _look_for_stopped(self, passed: float, is_publishing: bool) -> None:
        """Only where nothing else tells: a list of processes is not for nothing."""
        if not is_publishing:
            self._stopped, self._stopped_s, self._since_listed = [], 0.0, 0.0
            return
        self._since_listed += passed
        if self._since_listed >= self._tick_s:
            before, self._stopped = self._stopped, stopped_processes(self._leader)
            self._stopped_s = self._stopped_s + self._since_listed if before and self._stopped else 0.0
            self._since_listed = 0.0

    def _words(self, wrong: str, is_publishing: bool) -> str:
        doing = [wrong]
        if is_publishing:
            doing.append("weights were being sent to it")
        if self._load:
            running, waiting = self._load.get("num_running_reqs"), self._load.get("num_waiting_reqs")
            doing.append(f"as it last said, {running} requests were running and {waiting} waiting")
        if stopped := self._stopped or stopped_processes(self._leader):
            doing.append(f"stopped (SIGSTOP or a debugger): {', '.join(stopped)}")
        return "; ".join(doing)

    def _ask_load(self) -> bool:
        try:
            self._load = self._control.load() or self._load
        except EngineError as error:
            return error.status is not None  # whatever it says, it answers
        return True

    def _ask_router(self) -> bool:
        return self._control.answers()

    def _ask_scheduler(self) -> bool:
        try:
            self._control.ask_scheduler()
        except EngineError:
            return False
        return True


def stopped_processes(leader: int) -> list[str]:
    """Those of a session that a signal, or a debugger, has stopped. Example: ``["4711 sglang::scheduler"]``"""
    found: list[str] = []
    for process in psutil.process_iter(["status", "name"]):
        with suppress(ProcessLookupError, PermissionError):
            if os.getsid(process.pid) == leader and process.info["status"] in _STOPPED:
                found.append(f"{process.pid} {process.info['name']}")
    return found


_STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
