"""Ports that this machine has free, out of a range that the site allows."""

import os
import random
import socket
from contextlib import ExitStack, suppress

from megatron_sdpo.config import ConfigError

RANGE = "MEGATRON_SDPO_PORTS"
"""Environment variable: where free ports are looked for, e.g. ``20000-31999``, both included."""
_USUAL = range(20_000, 32_000)
"""Below those that the kernel hands out, or a stranger's connection could be given an engine's port while the engine is
still loading."""


def port_range() -> range:
    """The ports that may be taken; ConfigError when ``RANGE`` does not say which."""
    given = os.environ.get(RANGE)
    if not given:
        return _USUAL
    first, _, last = given.partition("-")
    if not (first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last) < 65536):
        raise ConfigError(f"{RANGE} is {given!r}; set it to two ports, e.g. 20000-31999")
    return range(int(first), int(last) + 1)


def take_ports(host: str, first: int, count: int) -> list[int]:
    """``first, first + 1 ...``, or free ones when ``first`` is 0; a taken port is refused."""
    with ExitStack() as held:  # all held at once, or the same free port could come twice
        if first:
            return [_bind(held, host, first + i) for i in range(count)]
        _bind(held, host, 0)  # an address that is not this machine's is refused here
        allowed, ports = port_range(), list[int]()
        for port in random.SystemRandom().sample(allowed, len(allowed)):
            if len(ports) == count:
                break
            with suppress(ConfigError):
                ports.append(_bind(held, host, port))
        if len(ports) < count:
            raise ConfigError(
                f"of ports {allowed.start}-{allowed.stop - 1} on {host} only {len(ports)} are free, not {count}; set"
                f" {RANGE} to a larger range"
            )
        return ports


def _bind(held: ExitStack, host: str, port: int) -> int:
    """Hold a port until ``held`` is closed; ConfigError when it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = held.enter_context(socket.socket(family, socket.SOCK_STREAM))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1)
    except OSError as error:
        raise ConfigError(_port_words(host, port, error)) from error
    return listener.getsockname()[1]


def _port_words(host: str, port: int, error: OSError) -> str:
    if port == 0 or isinstance(error, socket.gaierror):
        return f"cannot bind to engine.host {host} ({error.strerror}); set it to an address of this machine"
    return (
        f"port {port} on {host} cannot be used ({error.strerror}); set engine.port to another first port,"
        " or to 0 to take free ones"
    )


def http_url(host: str, port: int) -> str:
    """Example: ``http_url("::1", 31000)`` is ``"http://[::1]:31000"``."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
