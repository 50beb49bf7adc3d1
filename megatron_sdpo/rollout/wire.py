"""Coordinator and trainer talk: ZeroMQ, one request and one answer at a time, msgpack inside, a token in front.

Requests of a training run's trainer: ``batch`` (a step), ``evaluate`` and ``published`` (a version); of a discovery's:
``baselines``, ``next_trial``, ``batch`` (a version) and ``trained`` (the numbers of a step).
"""

import hmac
from collections.abc import Awaitable, Callable
from typing import Any, Literal

import msgspec
import zmq
import zmq.asyncio

from megatron_sdpo.rollout.ports import port_range

Kind = Literal["batch", "evaluate", "published", "baselines", "next_trial", "trained"]
Argument = int | dict[str, float]
Handler = Callable[[Any], Awaitable[Any]]


class CoordinatorError(RuntimeError):
    """The coordinator could not answer; the message is its own."""


async def serve(host: str, token: str, handlers: dict[Kind, Handler], listening: Callable[[str], None]) -> None:
    """Answer requests until cancelled; ``listening`` is called with the address once it is bound.

    A request without the right token is answered with a refusal. An exception in a handler is sent to the
    requester and then raised here: a coordinator that failed does not go on.
    """
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.REP)
    socket.setsockopt(zmq.LINGER, 1000)
    if ":" in host:
        socket.setsockopt(zmq.IPV6, 1)
    bracketed = f"[{host}]" if ":" in host else host
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
        socket.close()
        context.term()


class CoordinatorClient:
    """The trainer's end. Calls block until the answer comes, however long generation takes."""

    def __init__(self, url: str, token: str) -> None:
        self._token = token.encode()
        self._socket = zmq.Context.instance().socket(zmq.REQ)
        self._socket.setsockopt(zmq.LINGER, 0)
        if "[" in url:
            self._socket.setsockopt(zmq.IPV6, 1)
        self._socket.connect(url)

    def ask(self, kind: Kind, argument: Argument) -> bytes:
        """The answer as msgpack bytes; raises CoordinatorError with the coordinator's words."""
        self._socket.send_multipart([self._token, kind.encode(), msgspec.msgpack.encode(argument)])
        status, payload = self._socket.recv_multipart()
        if status != b"ok":
            raise CoordinatorError(payload.decode())
        return payload

    def close(self) -> None:
        self._socket.close()


def _words(error: BaseException) -> str:
    """The message of the first real error in a group of them."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error) or repr(error)
