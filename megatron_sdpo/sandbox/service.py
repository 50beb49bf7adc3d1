"""A sandbox over HTTP, for machines that may not make namespaces of their own: containers, shared login nodes.

    python -m megatron_sdpo.sandbox.service --token-file sandbox.token --port 8700 sandbox.workers=8

``POST /run`` takes a Program and answers its Outcomes, both as msgpack; ``GET /health`` answers when the self-test has
passed. Both want the token of the file (made at the first start, readable by its owner alone) as a bearer. The service
speaks plain HTTP on the loopback address by default: let it listen elsewhere only inside a network that you trust. A
client that hangs up ends its program.
"""

import argparse
import asyncio
import hmac
import os
import secrets
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import msgspec
from aiohttp import web

from megatron_sdpo.config import ConfigError, SandboxConfig
from megatron_sdpo.config.reading import read_section
from megatron_sdpo.sandbox.pool import LocalSandbox
from megatron_sdpo.sandbox.records import Program, Sandbox, SandboxError
from megatron_sdpo.sandbox.selftest import check_local

LARGEST_REQUEST = 1 << 30
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def application(sandbox: Sandbox, token: str) -> web.Application:
    """The service's two answers, for who knows the token."""

    @web.middleware
    async def authorised(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            return web.Response(status=401, text="the token is missing or wrong")
        return await handler(request)

    async def run(request: web.Request) -> web.Response:
        try:
            program = msgspec.msgpack.decode(await request.read(), type=Program)
        except msgspec.MsgspecError as error:
            return web.Response(status=400, text=f"not a program: {error}")
        try:
            outcomes = await sandbox.run(program)
        except SandboxError as error:
            return web.Response(status=503, text=str(error))
        return web.Response(body=msgspec.msgpack.encode(outcomes), content_type="application/msgpack")

    async def health(_: web.Request) -> web.Response:
        return web.Response(text="ok")

    app = web.Application(middlewares=[authorised], client_max_size=LARGEST_REQUEST)
    app.add_routes([web.post("/run", run), web.get("/health", health)])
    return app


def token_of(path: Path) -> str:
    """The file's token; a file that is not there is made, for its owner alone."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        token = path.read_text().strip()
        if not token:
            raise ConfigError(f"the token file {path} is empty; remove it, and a token is made") from None
        return token
    with os.fdopen(descriptor, "w") as file:
        file.write(token := secrets.token_hex(32))
    return token


async def serve(config: SandboxConfig, host: str, port: int, token: str, listening: Callable[[str], None]) -> None:
    """Answer until SIGINT or SIGTERM; ``listening`` is told the address."""
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # in the background of a script SIGINT is ignored unless asked for
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    with LocalSandbox(config) as sandbox:
        runner = web.AppRunner(application(sandbox, token), access_log=None, handler_cancellation=True)
        await runner.setup()
        try:
            site = web.TCPSite(runner, host, port)
            await site.start()
            listening(f"http://{host}:{runner.addresses[0][1]}")
            await stopped.wait()
        finally:
            await runner.cleanup()


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 2 for what cannot work."""
    parser = argparse.ArgumentParser(prog="python -m megatron_sdpo.sandbox.service", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default %(default)s)")
    parser.add_argument("--port", type=int, default=8700, help="0 takes a free one (default %(default)s)")
    parser.add_argument("--token-file", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="sandbox.KEY=VALUE")
    given = parser.parse_args(arguments)
    try:
        config = read_section("sandbox", SandboxConfig(), given.overrides)
        if config.backend == "remote":
            raise ConfigError("the service executes programs itself; leave sandbox.backend=remote out")
        check_local(config)
        token = token_of(given.token_file)
    except ConfigError as error:
        print(f"sandbox service: {error}", file=sys.stderr)
        return 2

    def listening(url: str) -> None:
        print(f"listening at {url}, token in {given.token_file}", flush=True)

    asyncio.run(serve(config, given.host, given.port, token, listening))
    return 0


if __name__ == "__main__":
    sys.exit(main())
