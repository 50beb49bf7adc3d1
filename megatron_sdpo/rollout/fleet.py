"""The engines of a run, and the router in front of them: start, watch, end."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

import megatron_sdpo
from megatron_sdpo.config import Config
from megatron_sdpo.rollout import lifeline
from megatron_sdpo.rollout.control import EngineControl, EngineError
from megatron_sdpo.rollout.fleet_arguments import engine_arguments, router_arguments
from megatron_sdpo.rollout.fleet_files import (
    ROUTER,
    is_publishing,
    log_tail,
    note_replacements,
    read_address,
    read_confirmed,
    read_engines,
    write_address,
)
from megatron_sdpo.rollout.liveness import Liveness
from megatron_sdpo.rollout.ports import http_url, take_ports
from megatron_sdpo.types import EngineAddress

POLL_S = 0.2
GRACE_S = 5.0
"""How long processes have to end by themselves before they are killed."""
MOST_RESTARTS = 3
"""So often an engine is replaced; one that ends again and again is not to be helped."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A process of the fleet that has ended. Example: ``Ended("engine-1", -9, "... last lines of its log")``

    ``exit_code`` is negative for the signal that ended it.
    """

    name: str
    exit_code: int
    log_tail: str


@dataclass(frozen=True, slots=True)
class _Running:
    address: EngineAddress
    process: subprocess.Popen[bytes]
    log: Path


@dataclass(slots=True)
class _Joining:
    """An engine in the place of one that has ended, which the router does not know yet."""

    deadline: float
    """Until when it must answer."""
    is_announced: bool = False
    """It answers, and has told the trainer where; it waits for weights."""


@dataclass(frozen=True, slots=True)
class Share:
    """What one machine runs of a fleet. Example: ``Share(range(0, 2), "10.0.0.7", has_router=True)``"""

    engines: range
    host: str
    """Address that they bind to, by which the other roles reach them."""
    has_router: bool = True
    """Whoever has the router waits for the engines of the other machines."""
    first_gpu: int = 0
    """Of this machine's, the first that engines take; those before it are the trainer's."""


class Fleet:
    """``config.engine.count`` engines, or this machine's ``share`` of them, and with two or more of them a router.

    Writes ``run_dir/logs/<name>.log`` and, once all answer, ``run_dir/addresses/<name>.json`` for
    ``engine-0 ...`` and for ``router``: the address for generation, which with a single engine is
    that engine's own. The processes end with the *thread* that called ``start``, even if it is killed.
    ``alone``: nobody publishes to these engines, which serve ``model.path``; ``text``: in words too.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        token: str,
        share: Share | None = None,
        alone: bool = False,
        text: bool = False,
    ) -> None:
        self._config = config
        self._alone = alone or config.debug.rollout_only
        self._text = text
        self._share = share or Share(range(config.engine.count), config.engine.host)
        self._run_dir = run_dir
        self._logs = run_dir / "logs"
        self._addresses = run_dir / "addresses"
        self._token = token
        self._running: list[_Running] = []
        self._joining: dict[str, _Joining] = {}
        self._restarts: Counter[str] = Counter()
        self._liveness = Liveness(token, config.engine.hang_timeout_s, lambda: is_publishing(run_dir))
        self._hung: dict[str, str] = {}
        """Killed because they hang, and what was known of that."""
        self.engines: tuple[EngineAddress, ...] = ()
        self.router: EngineAddress | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start everything and wait until it answers.

        Raises ``ConfigError`` when a port is taken, and ``EngineError``, which shows the end of the
        log, when a process ends or is not ready within ``engine.start_timeout_s``; nothing is left
        running then.
        """
        engine, share = self._config.engine, self._share
        names = [f"engine-{i}" for i in share.engines]
        first = engine.port and engine.port + share.engines.start
        ports = take_ports(share.host, first, len(names))
        addresses = [
            EngineAddress(name, http_url(share.host, port), engine.tensor_parallel)
            for name, port in zip(names, ports, strict=True)
        ]
        self._logs.mkdir(parents=True, exist_ok=True)
        self._addresses.mkdir(parents=True, exist_ok=True)
        self._forget_addresses()
        self.engines = tuple(addresses)
        try:
            for i, address, port in zip(share.engines, addresses, ports, strict=True):
                self._launch(address, "engine_main", self._engine_arguments(i, port))
            self._wait_until_healthy()
            self._announce(*self.engines)
            if share.has_router:
                self.router = self._start_router()
                self._announce(self.router)
            for running in self._running:
                self._liveness.watch(running.address, running.process.pid)
        except BaseException:
            self.stop()
            raise

    def _start_router(self) -> EngineAddress:
        """Where attempts are asked for, once it answers and knows all engines of the run."""
        engine = self._config.engine
        found = self._wait_for_all_engines()
        if engine.count == 1:
            return EngineAddress(ROUTER, found[0].url, engine.tensor_parallel)
        first = engine.port and engine.port + engine.count
        (port,) = take_ports(self._share.host, first, 1)
        router = EngineAddress(ROUTER, http_url(self._share.host, port), engine.tensor_parallel)
        self._launch(router, "router_main", router_arguments(self._config, self._share.host, port, found))
        self._wait_until_healthy()
        return router

    def _wait_for_all_engines(self) -> tuple[EngineAddress, ...]:
        """Those of other machines may need longer than these."""
        timeout_s = self._config.engine.start_timeout_s
        deadline = time.monotonic() + timeout_s
        while len(found := read_engines(self._run_dir)) < self._config.engine.count:
            self._refuse_dead()
            if time.monotonic() > deadline:
                message = f"{len(found)} of {self._config.engine.count} engines are there after {timeout_s:g} s"
                raise EngineError(ROUTER, "at start", message + " (engine.start_timeout_s)")
            time.sleep(POLL_S)
        return found

    def _announce(self, *addresses: EngineAddress) -> None:
        for address in addresses:
            write_address(self._run_dir, address)

    def stop(self, grace_s: float = GRACE_S) -> None:
        """End every process: asked first, killed with all its children after ``grace_s``. May be called twice."""
        self._forget_addresses()
        self._liveness.forget_all()
        for running in self._running:
            running.process.terminate()  # its children are its own to end
        _wait(grace_s, lambda: all(r.process.poll() is not None for r in self._running))
        for running in self._running:
            with suppress(ProcessLookupError):  # the whole group has ended
                os.killpg(running.process.pid, signal.SIGKILL)
            running.process.wait()
        left = [r.address.name for r in self._running if not _wait(GRACE_S, lambda r=r: not _lives(r.process.pid))]
        self._running.clear()
        if left:
            raise EngineError(", ".join(left), "at stop", f"killed, but processes still run after {GRACE_S:g} s")

    def dead(self) -> tuple[Ended, ...]:
        """The processes that have ended although nobody stopped them."""
        polled = [(running, running.process.poll()) for running in self._running]
        return tuple(
            Ended(running.address.name, code, log_tail(running.log)) for running, code in polled if code is not None
        )

    def tend(self) -> tuple[Ended, ...]:
        """Replace engines that have ended, or hang, while others serve; the ends that cannot be made good.

        Call it again and again; it returns at once. Who hangs (liveness.py), or was left out by the trainer, is killed
        and so has ended. A new engine, at another port, is told to the trainer as soon as it answers; the router learns
        of it when the trainer has confirmed that it serves a version.
        """
        for name, words in (self._left_out() | self._liveness.hung()).items():
            self._kill(name, words)
        lost = tuple(self._explained(ended) for ended in self.dead() if not self._replace(ended))
        for running in self._running:
            if running.address.name in self._joining:
                self._help_to_join(running, self._joining[running.address.name])
        return lost

    def _left_out(self) -> dict[str, str]:
        """Who runs, but has not got a version that others have."""
        confirmed = None if self._alone else read_confirmed(self._run_dir)
        if confirmed is None:
            return {}
        behind = [
            running.address.name
            for running in self._running
            if running.address.url not in confirmed.urls and running.process.poll() is None
        ]
        words = f"the trainer could not send it version {confirmed.stamp}, which others serve"
        return {name: words for name in behind if name != ROUTER and name not in self._joining}

    def _kill(self, name: str, words: str) -> None:
        """With all its processes: one that is stopped does not hear anything else."""
        self._liveness.forget(name)
        self._hung[name] = words
        process = self._named(name).process
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        if not _wait(GRACE_S, lambda: process.poll() is not None):
            raise EngineError(name, "hangs", f"{words}; it was killed, but still runs after {GRACE_S:g} s")

    def _named(self, name: str) -> _Running:
        return next(running for running in self._running if running.address.name == name)

    def _explained(self, ended: Ended) -> Ended:
        """With what is known besides the log."""
        known = [f"it hung: {self._hung[ended.name]}"] if ended.name in self._hung else []
        if self._restarts[ended.name] == MOST_RESTARTS:
            known.append(f"it had been replaced already, as often as an engine is in a run: {MOST_RESTARTS} times")
        return replace(ended, log_tail="\n".join([*known, ended.log_tail]))

    def _replace(self, ended: Ended) -> bool:
        """Whether another engine is on its way in the place of this one."""
        old = self._named(ended.name)
        others = [a for a in read_engines(self._run_dir) if a.name != ended.name and not self._control(a).is_gone()]
        router = read_address(self._run_dir, ROUTER)
        if ended.name == ROUTER or router is None or not others or self._restarts[ended.name] == MOST_RESTARTS:
            return False
        self._restarts[ended.name] += 1
        note_replacements(self._run_dir, ended.name, self._restarts[ended.name])
        words = self._hung.pop(ended.name, None)
        how = f"has ended ({ended.exit_code})" if words is None else f"hangs ({words}), was killed"
        count = f"{self._restarts[ended.name]} of at most {MOST_RESTARTS} times"
        print(f"{ended.name} {how} and is replaced ({count}), others serve", file=sys.stderr, flush=True)
        self._liveness.forget(ended.name)
        with suppress(ProcessLookupError):  # what it leaves behind, on its GPUs too
            os.killpg(old.process.pid, signal.SIGKILL)
        self._running.remove(old)
        (self._addresses / f"{ended.name}.json").unlink(missing_ok=True)
        with suppress(EngineError):  # of a router that has just ended, which the next look finds
            self._control(router).remove_worker(old.address.url)
        (port,) = take_ports(self._share.host, 0, 1)
        address = EngineAddress(ended.name, http_url(self._share.host, port), old.address.tensor_parallel)
        self._joining[ended.name] = _Joining(time.monotonic() + self._config.engine.start_timeout_s)
        self._launch(address, "engine_main", self._engine_arguments(int(ended.name.removeprefix("engine-")), port))
        return True

    def _help_to_join(self, running: _Running, joining: _Joining) -> None:
        address, router = running.address, read_address(self._run_dir, ROUTER)
        if not joining.is_announced:
            if self._control(address).health(timeout_s=2.0):
                joining.is_announced = True
                self._announce(address)
                self._liveness.watch(address, running.process.pid)
            elif time.monotonic() > joining.deadline:
                running.process.kill()  # seen as ended at the next look
        elif router and (stamp := self._serves(address)):
            self._control(router).add_worker(address.url)
            del self._joining[address.name]
            print(f"{address.name} serves again, version {stamp}", file=sys.stderr, flush=True)

    def _serves(self, address: EngineAddress) -> str | None:
        """The version that an engine is known to serve, if it is."""
        if self._alone:
            return f"of {self._config.model.path}"
        confirmed = read_confirmed(self._run_dir)
        return confirmed.stamp if confirmed and address.url in confirmed.urls else None

    def _control(self, address: EngineAddress) -> EngineControl:
        return EngineControl(address, self._token, timeout_s=10.0)

    def process_ids(self) -> dict[str, int]:
        """Process id by name; each leads a session of its own, which holds all the processes it started."""
        return {running.address.name: running.process.pid for running in self._running}

    def _engine_arguments(self, i: int, port: int) -> list[str]:
        gpu = self._share.first_gpu + (i - self._share.engines.start) * self._config.engine.tensor_parallel
        return engine_arguments(self._config, i, self._share.host, port, gpu, self._text)

    def _launch(self, address: EngineAddress, module: str, arguments: Sequence[str]) -> None:
        log = self._logs / f"{address.name}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", f"megatron_sdpo.rollout.{module}", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                start_new_session=True,
            )
        self._running.append(_Running(address, process, log))

    def _environment(self) -> dict[str, str]:
        checkout = str(Path(megatron_sdpo.__file__ or "").parents[1])
        paths = [checkout, *filter(None, [os.environ.get("PYTHONPATH")])]
        own = {
            "MEGATRON_SDPO_TOKEN": self._token,
            lifeline.PARENT: str(os.getpid()),
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
        }
        # More threads than free cores make a small model on a CPU several times slower.
        return {"OMP_NUM_THREADS": "1"} | dict(os.environ) | own

    def _wait_until_healthy(self) -> None:
        timeout_s = self._config.engine.start_timeout_s
        deadline = time.monotonic() + timeout_s
        waiting = list(self._running)
        while waiting:
            self._refuse_dead()
            waiting = [running for running in waiting if not self._is_ready(running.address)]
            if waiting and time.monotonic() > deadline:
                late = waiting[0]
                message = f"not ready after engine.start_timeout_s = {timeout_s:g} s; the end of its log:\n"
                raise EngineError(late.address.name, "at start", message + log_tail(late.log))
            if waiting:
                time.sleep(POLL_S)

    def _refuse_dead(self) -> None:
        for ended in self.dead():
            message = f"ended with exit code {ended.exit_code}; the end of its log:\n{ended.log_tail}"
            raise EngineError(ended.name, "at start", message)

    def _is_ready(self, address: EngineAddress) -> bool:
        control = EngineControl(address, self._token)
        if address.name == ROUTER:  # it answers /health before it has found the engines
            return control.healthy_workers() == self._config.engine.count
        return control.health(timeout_s=2.0)

    def _forget_addresses(self) -> None:
        """Those of this machine."""
        names = [f"engine-{i}" for i in self._share.engines] + [ROUTER] * self._share.has_router
        for name in names:
            (self._addresses / f"{name}.json").unlink(missing_ok=True)


def check_ports(config: Config) -> None:
    """Refuse ports that cannot be taken (``ConfigError``), before anything is started."""
    engine = config.engine
    take_ports(engine.host, engine.port, engine.count + (engine.count > 1))


def _wait(timeout_s: float, condition: Callable[[], bool]) -> bool:
    """Whether ``condition`` came true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S / 4)
    return True


def _lives(session: int) -> bool:
    """Whether a process of the session runs; ended ones that their parent has not waited for do not count."""
    for process in psutil.process_iter(["status"]):
        with suppress(ProcessLookupError, PermissionError):
            if os.getsid(process.pid) == session and process.info["status"] != psutil.STATUS_ZOMBIE:
                return True
    return False
