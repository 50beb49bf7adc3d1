"""Coordinator and trainer talk: ZeroMQ, one request and one answer at a time, msgpack inside, a token in front.

Requests of a training run's trainer: ``batch`` (a step), ``evaluate`` and ``published`` (a version); of a discovery's:
``baselines``, ``next_trial``, ``batch`` (a version) and ``trained`` (the numbers of a step).
"""

import asyncio
import hmac
import itertools
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Literal

import msgspec
import zmq
import zmq.asyncio

from megatron_sdpo.rollout.ports import port_range

Kind = Literal["batch", "evaluate", "published", "baselines", "next_trial", "trained"]
Argument = int | dict[str, float]
Handler = Callable[[Any], Awaitable[Any]]


BEAT_S = 2.0
"""So often a coordinator shows that it lives."""


class CoordinatorError(RuntimeError):
    """The coordinator could not answer; the message is its own."""


async def serve(
    host: str,
    token: str,
    handlers: dict[Kind, Handler],
    listening: Callable[[str], None],
    lives: Callable[[int], None] = lambda beat: None,
) -> None:
    """Answer requests until cancelled; ``listening`` is called with the address once it is bound.

    ``lives`` is called every ``BEAT_S`` with a count that goes on, as long as the event loop does.

    A request without the right token is answered with a refusal. An exception in a handler is sent to the
    requester and then raised here: a coordinator that failed does not go on.
    """
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.REP)
    socket.setsockopt(zmq.LINGER, 1000)
    if ":" in host:
        socket.setsockopt(zmq.IPV6, 1)
    bracketed = f"[{host}]" if ":" in host else host
    beating = asyncio.create_task(_beat(lives))
    try:
        allowed = port_range()
        port = socket.bind_to_random_port(f"tcp://{bracketed}", allowed.start, allowed.stop, max_tries=len(allowed))
        listening(f"tcp://{bracketed}:{port}")
        while True:
            frames = await socket.recv_multipart()
            if len(frames) != 3 or not hmac.compare_digest(frames[0], token.encode()):
                await socket.send_multipart([b"error", b"refused: wrong token"])
                continue
            try:
                answer = await handlers[frames[1].decode()](msgspec.msgpack.decode(frames[2], type=Argument))  # pyright: ignore
            except Exception as error:
                await socket.send_multipart([b"error", _words(error).encode()])
                raise
            await socket.send_multipart([b"ok", msgspec.msgpack.encode(answer)])
    finally:
        beating.cancel()
        socket.close()
        context.term()


async def _beat(lives: Callable[[int], None]) -> None:
    for beat in itertools.count():
        with suppress(OSError):  # a disk that is full for a moment: silence until then
            lives(beat)
        await asyncio.sleep(BEAT_S)


class CoordinatorClient:
    """The trainer's end. Calls block until the answer comes, however long generation takes.

    Unless the coordinator hangs: ``beat`` gives its latest sign of life, and a call raises CoordinatorError when that
    has stayed the same for ``timeout_s``.
    """

    def __init__(self, url: str, token: str, beat: Callable[[], object], timeout_s: float) -> None:
        self._token, self._beat, self._timeout_s = token.encode(), beat, timeout_s
        self._socket = zmq.Context.instance().socket(zmq.REQ)
        self._socket.setsockopt(zmq.LINGER, 0)
        if "[" in url:
            self._socket.setsockopt(zmq.IPV6, 1)
        self._socket.connect(url)

    def ask(self, kind: Kind, argument: Argument) -> bytes:
        """The answer as msgpack bytes; raises CoordinatorError with the coordinator's words."""
        self._socket.send_multipart([self._token, kind.encode(), msgspec.msgpack.encode(argument)])
        self._wait(kind)
        status, payload = self._socket.recv_multipart()
        if status != b"ok":
            raise CoordinatorError(payload.decode())
        return payload

    def close(self) -> None:
        self._socket.close()

    def _wait(self, kind: Kind) -> None:
        """Until there is an answer. Time counts only while this process runs."""
        silent_s, seen = 0.0, self._beat()
        while not self._socket.poll(1000 * min(BEAT_S, self._timeout_s / 4)):
            beat = self._beat()
            silent_s = 0.0 if beat != seen else silent_s + min(BEAT_S, self._timeout_s / 4)
            seen = beat
            if silent_s > self._timeout_s:
                raise CoordinatorError(
                    f"the coordinator hangs: asked for {kind!r}, it has shown no life for {self._timeout_s:g} s"
                    " (ranks.timeout_s)"
                )


def _words(error: BaseException) -> str:
    """The message of the first real error in a group of them."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error) or repr(error)
