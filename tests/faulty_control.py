"""A real engine's control with faults made on purpose."""

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from megatron_sdpo.rollout.control import EngineControl, EngineError
from megatron_sdpo.types import EngineAddress


class FaultyControl(EngineControl):
    """Behaves as the base class until ``fail`` arms a fault. ``made`` are the names of the calls so far.

    ``leader`` is the process id that leads the engine's processes, where they are to be killed or stopped.
    """

    def __init__(self, address: EngineAddress, token: str, timeout_s: float, leader: int | None) -> None:
        super().__init__(address, token, timeout_s)
        self.leader = leader
        self.made: list[str] = []
        self.fail(None)

    def fail(self, call: str | None, nth: int = 1, how: str = "refuse", times: int = 1) -> None:
        """From now on the ``nth`` use of ``call``, and the ``times - 1`` uses after it, fail; None: nothing does.

        ``how``: ``refuse`` before the engine hears of it, ``late`` after it has done it, ``lie`` in the answer,
        ``hang`` for ever, ``die`` as a process; ``kill`` or ``stop`` the engine before it hears of it.
        """
        self._call_name, self._hits, self._how, self._count = call, range(nth, nth + times), how, 0

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name.startswith("_") or not callable(found) or name == "fail":
            return found
        return lambda *arguments, **options: self._made(name, found, arguments, options)

    def _made(self, name: str, call: Callable[..., Any], arguments: Any, options: Any) -> Any:
        self.made.append(name)
        self._count += name == self._call_name
        if name != self._call_name or self._count not in self._hits:
            return call(*arguments, **options)
        if self._how == "refuse":
            raise EngineError(self.address.name, f"/{name}", "refused on purpose")
        if self._how == "hang":
            threading.Event().wait()
        if self._how == "die":
            os._exit(9)
        if self._how in ("kill", "stop"):
            assert self.leader is not None
            os.killpg(self.leader, signal.SIGKILL if self._how == "kill" else signal.SIGSTOP)
        answer = call(*arguments, **options)
        if self._how == "late":
            raise EngineError(self.address.name, f"/{name}", "failed on purpose, late")
        return answer + "0" if isinstance(answer, str) else [value + 0.01 for value in answer]
