"""The client of service.py: the same two methods as a LocalSandbox has, programs executed elsewhere."""

import asyncio
import http.client
import socket
import threading
import time
import urllib.parse
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import msgspec

from megatron_sdpo.config import ConfigError
from megatron_sdpo.config.sandbox import SandboxConfig
from megatron_sdpo.sandbox.records import Outcome, Program, SandboxError

TRIES = 4
PAUSE_S = 1.0
QUEUE_S = 1800.0
"""A program may wait so long for its turn at the service, besides its own limits."""


class RemoteSandbox:
    """Executes programs by the service at ``config.url``, ``config.workers`` at a time. Safe to use from any thread."""

    def __init__(self, config: SandboxConfig) -> None:
        self.config = config
        if not config.url or not config.token_file:
            raise ConfigError("sandbox.backend=remote needs sandbox.url and sandbox.token_file; set both")
        address = urllib.parse.urlsplit(config.url)
        if address.scheme != "http" or not address.hostname or not address.port:
            raise ConfigError(f"sandbox.url is {config.url}; write it as http://HOST:PORT")
        self._host, self._port = address.hostname, address.port
        try:
            self._token = Path(config.token_file).read_text().strip()
        except OSError as error:
            raise ConfigError(f"cannot read sandbox.token_file {config.token_file}: {error.strerror}") from error
        self._workers = ThreadPoolExecutor(config.workers, thread_name_prefix="remote-sandbox")

    def check(self) -> None:
        """ConfigError unless the service answers and knows the token."""
        try:
            status, body = _Call(self._host, self._port).ask("GET", "/health", self._token, b"", 30.0)
        except (OSError, http.client.HTTPException) as error:
            raise ConfigError(
                f"the sandbox service at {self.config.url} does not answer ({error}); start it with"
                " python -m megatron_sdpo.sandbox.service, or set sandbox.url to where it is"
            ) from error
        if status != 200:
            words = body.decode(errors="replace")[:200]
            raise ConfigError(
                f"the sandbox service at {self.config.url} refuses: {words}; set sandbox.token_file to its"
            )

    def run_blocking(self, program: Program) -> tuple[Outcome, ...]:
        """As LocalSandbox.run_blocking; a service that does not answer raises SandboxError."""
        call = _Call(self._host, self._port)
        return self._workers.submit(self._run, program, call).result()

    async def run(self, program: Program) -> tuple[Outcome, ...]:
        """As LocalSandbox.run."""
        call = _Call(self._host, self._port)
        try:
            return await asyncio.wrap_future(self._workers.submit(self._run, program, call))
        finally:
            call.cancel()

    def _run(self, program: Program, call: "_Call") -> tuple[Outcome, ...]:
        body = msgspec.msgpack.encode(_without_surrogates(program))
        timeout = program.limits.wall_s * len(program.inputs) + QUEUE_S
        problem = ""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(PAUSE_S)
            try:
                status, answer = call.ask("POST", "/run", self._token, body, timeout)
                if status == 200:
                    return msgspec.msgpack.decode(answer, type=tuple[Outcome, ...])
                problem = answer.decode(errors="replace")[:300]
                if status in (400, 401):
                    break
            except (OSError, http.client.HTTPException, msgspec.MsgspecError) as error:
                problem = f"{type(error).__name__}: {error}"
            if call.cancelled:
                raise CancelledError
        raise SandboxError(f"the sandbox service at {self.config.url} executed no program: {problem}")

    def close(self) -> None:
        """Wait for what runs; what waits is given up."""
        self._workers.shutdown(cancel_futures=True)


class _Call:
    """One request, which another thread may give up."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._lock = threading.Lock()
        self._connection: http.client.HTTPConnection | None = None
        self.cancelled = False

    def ask(self, method: str, path: str, token: str, body: bytes, timeout: float) -> tuple[int, bytes]:
        """Status and body of the answer; raises OSError or HTTPException."""
        connection = http.client.HTTPConnection(self._host, self._port, timeout=30.0)
        try:
            connection.connect()
            with self._lock:
                if self.cancelled:
                    raise ConnectionAbortedError("the call was cancelled")
                self._connection = connection
            connection.sock.settimeout(timeout)
            connection.request(method, path, body, {"Authorization": f"Bearer {token}"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            with self._lock:
                self._connection = None
            connection.close()

    def cancel(self) -> None:
        with self._lock:
            self.cancelled = True
            if self._connection is not None and self._connection.sock is not None:
                with suppress(OSError):
                    self._connection.sock.shutdown(socket.SHUT_RDWR)


def _without_surrogates(program: Program) -> Program:
    """Text that msgpack can carry: half a character becomes a NUL, which is a syntax error all the same."""
    source = program.source
    if any("\ud800" <= character <= "\udfff" for character in source):
        source = "".join("\0" if "\ud800" <= character <= "\udfff" else character for character in source)
    return Program(source, program.inputs, program.function, program.limits)
