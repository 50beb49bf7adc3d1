"""One sandbox from outside: started, given one program and its inputs, ended."""

import json
import os
import secrets
import socket
import struct
import subprocess
import time
from contextlib import suppress
from typing import Any

from megatron_sdpo.config.sandbox import Limits
from megatron_sdpo.sandbox.isolation import Isolation
from megatron_sdpo.sandbox.records import Outcome, OutcomeKind, Program, SandboxError
from megatron_sdpo.sandbox.seccomp import filter_program

START_S = 60.0
"""A sandbox that has not said by then that it is ready does not work."""
GRACE_S = 10.0
"""Beyond the limit on the clock, for the first process inside to notice and to answer."""
_LONGEST_HEADER = 1 << 16
_STOPPED: dict[str, OutcomeKind] = {
    "cpu": "time_limit",
    "wall": "time_limit",
    "memory": "memory_limit",
    "output": "output_limit",
    "files": "output_limit",
}
_SIGXCPU = 24


class Lost(Exception):
    """The sandbox ended, or fell silent, before it answered."""


class SandboxProcess:
    """A started sandbox; ``execute`` may be called until it is ``spent``."""

    def __init__(self, isolation: Isolation, limits: Limits) -> None:
        self.limits = limits
        self.spent = False
        self._ready = self._killed = False
        self._most_bytes = 0
        ours, theirs = socket.socketpair()
        self._socket_bytes = 2 * ours.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)  # with what the kernel adds
        contained = isolation.config.backend == "bubblewrap"
        given = [_readable(data) for data in (filter_program(), isolation.script)] if contained else [-1, -1]
        try:
            self._process = subprocess.Popen(
                isolation.command(limits, *given),
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=subprocess.PIPE,
                pass_fds=given if contained else (),
                cwd="/",
                env={"PATH": os.environ.get("PATH", os.defpath)} if contained else isolation.variables(),
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            raise SandboxError(f"no sandbox could be started: {error}") from error
        finally:
            theirs.close()
            for descriptor in given if contained else ():
                os.close(descriptor)
        self._socket = ours

    def wait_ready(self) -> None:
        """Return when the sandbox waits for a program; one that does not start raises SandboxError."""
        if self._ready:
            return
        try:
            self._read(time.monotonic() + START_S)
        except Lost:
            if self._killed:
                raise
            self.kill()
            assert self._process.stderr is not None
            said = self._process.stderr.read(2000).decode(errors="replace").strip()
            raise SandboxError(f"no sandbox could be started: {said or 'it said nothing'}") from None
        self._ready = True

    def load(self, program: Program, source: bytes) -> None:
        """Hand over the program; before the first ``execute``."""
        self.wait_ready()
        names = ("cpu_s", "wall_s", "memory_bytes", "processes", "file_bytes", "output_bytes")
        limits = {name: getattr(program.limits, name) for name in names} | {"socket_bytes": self._socket_bytes}
        self._most_bytes = 3 * program.limits.output_bytes
        self._write({"function": program.function, "limits": limits}, source)

    def execute(self, program: Program, data: bytes) -> Outcome:
        """The outcome for one input; raises Lost."""
        nonce = secrets.token_hex(16)
        self._write({"nonce": nonce}, data)
        answer, body = self._read(time.monotonic() + program.limits.wall_s + GRACE_S)
        try:
            self.spent = bool(answer["dirty"])
            return _outcome(answer, body, nonce, program.limits)
        except (KeyError, TypeError, ValueError) as error:
            raise Lost("it answered something else") from error

    def _write(self, header: dict[str, Any], data: bytes) -> None:
        text = json.dumps({**header, "bytes": len(data)}).encode()
        try:
            self._socket.settimeout(GRACE_S)
            self._socket.sendall(struct.pack("<I", len(text)) + text)
            self._socket.sendall(data)
        except OSError as error:
            raise Lost(str(error)) from error

    def _read(self, deadline: float) -> tuple[dict[str, Any], bytes]:
        (length,) = struct.unpack("<I", self._exactly(4, deadline))
        if length > _LONGEST_HEADER:
            raise Lost("it answered something else")
        try:
            header = json.loads(self._exactly(length, deadline))
            size = sum(header.get("lengths", ()))
        except (ValueError, TypeError, AttributeError) as error:
            raise Lost("it answered something else") from error
        if not 0 <= size <= self._most_bytes:
            raise Lost("it answered something else")
        return header, self._exactly(size, deadline)

    def _exactly(self, size: int, deadline: float) -> bytes:
        parts: list[bytes] = []
        try:
            while size:
                self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
                part = self._socket.recv(min(size, 1 << 20))
                if not part:
                    raise Lost("it ended")
                parts.append(part)
                size -= len(part)
        except OSError as error:
            raise Lost(str(error)) from error
        return b"".join(parts)

    def kill(self) -> None:
        """End everything in it. May be called at any time, from any thread, and again."""
        self._killed = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if self._ready:
            self._process.kill()  # the first process inside dies with bubblewrap, and all others with that one
        # one that is still starting must not lose bubblewrap half-way, which would leave its child waiting for ever;
        # it ends by itself as soon as it finds nobody to be ready for

    def close(self) -> None:
        """``kill``, and give back what it held here."""
        self.kill()
        try:
            self._process.wait(START_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._socket.close()
        assert self._process.stderr is not None
        self._process.stderr.close()


def _readable(data: bytes) -> int:
    """A descriptor from which data can be read; it must be short enough for a pipe to hold."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    try:
        if os.write(writing, data) < len(data):
            raise SandboxError("no sandbox could be started: a pipe is too small")
    finally:
        os.close(writing)
    return reading


def _outcome(answer: dict[str, Any], body: bytes, nonce: str, limits: Limits) -> Outcome:
    """What the first process inside reported, made one kind; the program's own words weigh last."""
    out, err, _ = (int(length) for length in answer["lengths"])
    stdout, stderr, said = body[:out], body[out : out + err], body[out + err :]
    message = _message(said, nonce)
    status, cpu = int(answer["status"]), float(answer["cpu_s"])
    code = None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    signal = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    error, result = _text(message, "error"), message.get("result")
    kind: OutcomeKind = "ok"
    if answer["stopped"] is not None:
        kind = _STOPPED[answer["stopped"]]
    elif cpu > limits.cpu_s or signal == _SIGXCPU:
        kind = "time_limit"
    elif signal is not None:
        kind = "runtime_error"
    elif error:
        said_kind = message.get("kind")
        kind = said_kind if said_kind in ("syntax_error", "memory_limit") else "runtime_error"
    elif code and not message:  # os._exit; sys.exit is an end like any other
        kind = "runtime_error"
    return Outcome(
        kind,
        stdout,
        stderr,
        exit_code=code,
        signal=signal,
        cpu_s=cpu,
        wall_s=float(answer["wall_s"]),
        peak_bytes=int(answer["peak_bytes"]),
        error=error,
        result=result.encode("utf-8", "surrogatepass") if isinstance(result, str) else None,
        shown=_text(message, "shown"),
    )


def _message(said: bytes, nonce: str) -> dict[str, Any]:
    """What the program's side said of its end; nothing when it was cut short, or wrote something else there."""
    _, found, text = said.rpartition(nonce.encode())
    try:
        message = json.loads(text) if found else {}
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}


def _text(message: dict[str, Any], key: str) -> str:
    """What is said there, as text that every encoding can carry."""
    return str(message.get(key, "")).encode("utf-8", "replace").decode()
