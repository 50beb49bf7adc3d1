"""Sandboxes started ahead, and the programs that wait for them."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from megatron_sdpo.config.sandbox import Limits, SandboxConfig
from megatron_sdpo.sandbox.isolation import Isolation
from megatron_sdpo.sandbox.process import Lost, SandboxProcess
from megatron_sdpo.sandbox.records import Outcome, Program, SandboxError

Outcomes = tuple[Outcome, ...]
TRIES = 2
"""Sandboxes in which an execution is tried before it is called lost."""


class LocalSandbox:
    """Executes programs on this machine, ``config.workers`` at a time, in the order in which they came.

    Safe to use from any thread and any event loop. A waiting program costs a few hundred bytes here; one that is
    cancelled, waiting or running, frees its place at once. Making one raises ConfigError where it cannot work.
    """

    def __init__(self, config: SandboxConfig) -> None:
        self.config = config
        self._isolation = Isolation(config)
        self._warm = _WarmPool(lambda: SandboxProcess(self._isolation, config.limits), config.warm)
        self._workers = ThreadPoolExecutor(config.workers, thread_name_prefix="sandbox")
        self._running: set[_Job] = set()

    @property
    def interpreter(self) -> str:
        """The Python that executes programs, as a path here."""
        return self._isolation.interpreter[0]

    def run_blocking(self, program: Program) -> Outcomes:
        """An outcome for each input, up to the first that is not "ok"; raises SandboxError when sandboxes fail."""
        return self._submit(program)[1].result()

    async def run(self, program: Program) -> Outcomes:
        """The same for an event loop; cancelling the call ends the program."""
        job, future = self._submit(program)
        try:
            return await asyncio.wrap_future(future)
        finally:
            job.cancel()  # nothing happens to one that is done

    def _submit(self, program: Program) -> "tuple[_Job, Future[Outcomes]]":
        job = _Job(program, self._take)
        return job, self._workers.submit(self._run, job)

    def _run(self, job: "_Job") -> Outcomes:
        self._running.add(job)
        try:
            return job.run()
        finally:
            self._running.discard(job)

    def _take(self, limits: Limits) -> SandboxProcess:
        if limits.file_bytes != self.config.limits.file_bytes:  # the size of a folder that is there from the start
            return SandboxProcess(self._isolation, limits)
        return self._warm.take()

    def close(self) -> None:
        """End what runs and waits: their calls raise CancelledError."""
        self._workers.shutdown(wait=False, cancel_futures=True)
        for job in tuple(self._running):
            job.cancel()
        self._workers.shutdown()
        self._warm.close()
        self._isolation.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Job:
    """One program on its way through a worker."""

    def __init__(self, program: Program, take: Callable[[Limits], SandboxProcess]) -> None:
        self._program, self._take = program, take
        self._lock = threading.Lock()
        self._cancelled = False
        self._sandbox: SandboxProcess | None = None

    def cancel(self) -> None:
        with self._lock:
            self._cancelled = True
            if self._sandbox is not None:
                self._sandbox.kill()

    def run(self) -> Outcomes:
        # a lone surrogate has no UTF-8: it goes in as Python's tolerant form and is a syntax error there
        source = self._program.source.encode("utf-8", "surrogatepass")
        if len(source) > self._program.limits.source_bytes:
            return (Outcome("source_limit"),)
        outcomes: list[Outcome] = []
        try:
            for data in self._program.inputs:
                outcomes.append(self._execute(source, data))
                if outcomes[-1].kind != "ok":
                    break
        finally:
            self._leave()
        return tuple(outcomes)

    def _execute(self, source: bytes, data: bytes) -> Outcome:
        for _ in range(TRIES):
            try:
                return self._enter(source).execute(self._program, data)
            except Lost:
                if self._cancelled:
                    raise CancelledError from None
                self._leave()
        return Outcome("lost")

    def _enter(self, source: bytes) -> SandboxProcess:
        """A sandbox that knows the program and has nothing of an earlier execution."""
        if self._sandbox is not None and self._sandbox.spent:
            self._leave()
        if self._sandbox is None:
            sandbox = self._take(self._program.limits)
            with self._lock:
                self._sandbox = sandbox
                if self._cancelled:
                    sandbox.kill()
            sandbox.load(self._program, source)
        return self._sandbox

    def _leave(self) -> None:
        with self._lock:
            sandbox, self._sandbox = self._sandbox, None
        if sandbox is not None:
            sandbox.close()


class _WarmPool:
    """Keeps ``size`` sandboxes started; one thread starts them, because a sandbox dies with the thread it came from."""

    def __init__(self, start: Callable[[], SandboxProcess], size: int) -> None:
        self._start, self._size = start, size
        self._changed = threading.Condition()
        self._ready: deque[SandboxProcess] = deque()
        self._error: Exception | None = None
        self._waiting = 0
        self._closed = False
        self._thread = threading.Thread(target=self._keep, name="sandbox-start", daemon=True)
        self._thread.start()

    def _keep(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or len(self._ready) < self._size + self._waiting)
                if self._closed:
                    return
            try:
                started = self._start()
            except Exception as error:  # whoever waits for a sandbox must be told, whatever it was
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._closed or self._error is None)
                continue
            with self._changed:
                self._ready.append(started)
                self._changed.notify_all()

    def take(self) -> SandboxProcess:
        """The one that was started first; raises SandboxError when none can be started."""
        with self._changed:
            self._waiting += 1
            self._changed.notify_all()
            try:
                self._changed.wait_for(lambda: self._ready or self._error or self._closed)
                if self._ready:
                    return self._ready.popleft()
                error, self._error = self._error, None  # the next one tries again
                raise SandboxError(str(error or "the sandbox is closed")) from error
            finally:
                self._waiting -= 1
                self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        for sandbox in self._ready:
            sandbox.kill()
        while self._ready:
            self._ready.popleft().close()
