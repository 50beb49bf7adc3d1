"""The first process inside a sandbox: it executes a program on one input after another and says how each ended.

It is started as a script where nothing else of this package is, so it imports the standard library alone. It speaks
with process.py over standard input and output in frames: the length of a JSON header (4 bytes), the header, then
bytes whose lengths the header holds. It says ``ready``, reads the program once, then an input, answers, reads the next.

Every execution is a fork: the child takes its limits upon itself and becomes the program; this process reads what it
prints, watches the clock, the processor time and the memory of everything that the child started, and in the end kills
all of it. As process 1 of its namespace it cannot be killed from inside, and as it is not dumpable (and the filter
allows no ptrace) its memory cannot be reached. What it knows is the program and one input at a time; expected answers
never come here.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import gc
import json
import math
import os
import random
import resource
import select
import signal
import struct
import sys
import threading
import time
import types
import typing

NAMES = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics"),
    *("itertools", "functools", "operator", "io", "sys", "json", "builtins", "typing"),
)
PRELUDE: dict[str, typing.Any] = {}
"""The names that LiveCodeBench gives to every program; loaded before a program comes."""

Record = typing.Dict[str, typing.Any]  # noqa: UP006 (the interpreter inside may be older)
"""A header, or what it holds."""

FILE = "solution.py"
FRAMES = 3
WATCH_S = 0.02
"""Between two looks at what the program uses."""
TEXT = 2000
"""Characters of an exception's text."""
RESERVE = 16 << 20
"""Bytes of address space that a program gets beyond its limit to say how it ended."""
FILES = 2000
"""Files, folders and links in the temporary folder."""
TICKS = os.sysconf("SC_CLK_TCK")
CONTAINED = os.getpid() == 1
"""Process 1 of a namespace of its own: only then is everything else in sight the program's."""


def read_exactly(size: int) -> bytes:
    parts = []
    while size:
        part = os.read(0, min(size, 1 << 20))
        if not part:
            os._exit(0)  # the other side is done with this sandbox
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def read_frame() -> tuple[Record, bytes]:
    header = json.loads(read_exactly(struct.unpack("<I", read_exactly(4))[0]))
    return header, read_exactly(header["bytes"])


def write_frame(header: Record, *parts: bytes) -> None:
    text = json.dumps(header).encode()
    view = memoryview(b"".join((struct.pack("<I", len(text)), text, *parts)))
    while view:
        view = view[os.write(1, view) :]


# --- the child: the program itself


def become(program: Record, source: bytes, data: bytes, header: Record, pipes: list[int]) -> typing.NoReturn:
    """Never returns."""
    for target, pipe in enumerate(pipes):
        os.dup2(pipe, target)
    os.closerange(4, 1 << 16)
    os.setsid()
    set_dumpable(1)
    take_limits(program["limits"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    random.seed(0)
    message = {"exit": 0}
    try:
        message = run(program["function"], source, data)
    except SystemExit as end:
        message = {"exit": end.code if isinstance(end.code, int) else int(end.code is not None)}
        if message["exit"] == 1 and end.code != 1:
            print(end.code, file=sys.stderr)
    except BaseException as error:
        message = fault(error, source)
    finally:
        try:
            threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue] as at the end of any program: other threads end first
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException as error:
            message = fault(error, source)
        with open(3, "wb", closefd=False) as channel:
            channel.write(header["nonce"].encode() + json.dumps(message).encode())
        os._exit(message["exit"] & 255)


def take_limits(limits: Record) -> None:
    memory, file_bytes = limits["memory_bytes"], limits["file_bytes"]
    cpu = math.ceil(limits["cpu_s"])
    for name, soft, hard in (
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_CPU, cpu, cpu + 1),
        (resource.RLIMIT_FSIZE, file_bytes, file_bytes),
        (resource.RLIMIT_NOFILE, 128, 128),
        (resource.RLIMIT_STACK, memory // 2, memory // 2),
        (resource.RLIMIT_MEMLOCK, 0, 0),
        (resource.RLIMIT_MSGQUEUE, 0, 0),
        (resource.RLIMIT_NPROC, limits["processes"] + 1, limits["processes"] + 1),  # one is this sandbox's first
        (resource.RLIMIT_AS, memory, memory + RESERVE),
    ):
        if CONTAINED or name != resource.RLIMIT_NPROC:  # outside it would count all processes of the user
            most = resource.getrlimit(name)[1]
            if most != resource.RLIM_INFINITY:
                soft, hard = min(soft, most), min(hard, most)
            resource.setrlimit(name, (soft, hard))
    with open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")  # the machine's memory is missing: the program goes first


def run(function: str | None, source: bytes, data: bytes) -> Record:
    module = types.ModuleType("__main__")
    namespace = module.__dict__
    namespace.update(PRELUDE, __name__="__main__", __file__=FILE)
    sys.setrecursionlimit(50000)
    sys.modules["__main__"] = module
    sys.argv = [FILE]
    try:
        code = compile(source, FILE, "exec")
    except BaseException as error:  # a NUL byte is a ValueError, deep nesting a MemoryError or RecursionError
        return fault(error, source, "syntax_error")
    exec(code, namespace)
    if function is None:
        return {"exit": 0}
    arguments = [json.loads(line) for line in data.decode("utf-8", "surrogateescape").split("\n")]
    result = find(namespace, function)(*arguments)
    try:
        return {"exit": 0, "result": json.dumps(result, default=plain)}
    except (TypeError, ValueError, RecursionError):
        return {"exit": 0, "shown": repr(result)}


def find(namespace: Record, name: str) -> typing.Any:
    solution = namespace.get("Solution")
    if isinstance(solution, type) and hasattr(solution, name):
        return getattr(solution(), name)
    if callable(namespace.get(name)):
        return namespace[name]
    raise NameError(f"there is no function {name!r}, nor a class Solution that has it")


def plain(value: typing.Any) -> typing.Any:
    """A number or an array of numpy as JSON has it."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError


def fault(error: BaseException, source: bytes, kind: str = "runtime_error") -> Record:
    """What is said of an uncaught exception."""
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    kind = "memory_limit" if isinstance(error, MemoryError) and kind == "runtime_error" else kind
    return {"error": describe(error, source), "kind": kind, "exit": 1}


def describe(error: BaseException, source: bytes) -> str:
    """The exception and its last frames in the program's own text."""
    try:
        text = str(error)[:TEXT]
    except BaseException:
        text = "(its text cannot be made)"
    lines = source.split(b"\n")
    frames, place = [], error.__traceback__
    while place is not None:
        if place.tb_frame.f_code.co_filename == FILE:
            frames.append((place.tb_lineno, place.tb_frame.f_code.co_name))
        place = place.tb_next
    if isinstance(error, SyntaxError) and error.filename == FILE and error.lineno:
        frames, text = [(error.lineno, "<module>")], str(error.msg)[:TEXT]
    shown = [f"{type(error).__name__}: {text}" if text else type(error).__name__]
    for number, name in frames[-FRAMES:]:
        line = lines[number - 1].decode("utf-8", "replace").strip()[:200] if number <= len(lines) else ""
        shown += [f"    {line}", f"Line {number} in {name[:100]} (Solution.py)"]
    return "\n".join(shown)


# --- the parent: everything that the child may use


def execute(program: Record, source: bytes, data: bytes, header: Record) -> None:
    """Fork the program, watch it until it ends or has to, kill what is left of it."""
    ends = [os.pipe() for _ in range(4)]  # its standard input, output, error; what it says of its own end
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            become(program, source, data, header, [ends[0][0], *(end[1] for end in ends[1:])])
        finally:  # it has no memory left to say how it ended
            os._exit(70)
    for end in (ends[0][0], *(end[1] for end in ends[1:])):
        os.close(end)
    outputs = {end[0]: bytearray() for end in ends[1:]}
    for descriptor in (ends[0][1], *outputs):
        os.set_blocking(descriptor, False)
    watched = Watched(child, program["limits"], started)
    feed = memoryview(data if program["function"] is None else b"")
    stopped = attend(watched, ends[0][1], feed, outputs)
    wall = time.monotonic() - started
    status, cpu, peak = reap(child)
    for descriptor, text in outputs.items():  # what was still in the pipes
        drain(descriptor, text, program["limits"]["output_bytes"])
        os.close(descriptor)
    stdout, stderr, message = outputs.values()
    dirty = CONTAINED and bool(os.listdir("/tmp"))
    answer = {"status": status, "stopped": stopped, "cpu_s": cpu, "wall_s": wall, "peak_bytes": peak, "dirty": dirty}
    limit = program["limits"]["output_bytes"]
    if stopped is None and max(map(len, outputs.values())) > limit:
        answer["stopped"] = "output"
    parts = [bytes(text[:limit]) for text in (stdout, stderr, message)]
    write_frame({**answer, "lengths": [len(part) for part in parts]}, *parts)


class Watched:
    """What the program's processes use, looked at now and then."""

    def __init__(self, child: int, limits: Record, started: float) -> None:
        self.child, self.limits, self.started = child, limits, started
        self.ended = os.pidfd_open(child)
        self.looked = started

    def excess(self) -> str | None:
        """Which limit is passed, or None."""
        now = time.monotonic()
        if now - self.started > self.limits["wall_s"]:
            return "wall"
        if now - self.looked < WATCH_S:
            return None
        self.looked = now
        cpu, memory = usage(self.child, self.limits["socket_bytes"])
        if cpu > self.limits["cpu_s"]:
            return "cpu"
        if memory > self.limits["memory_bytes"]:
            return "memory"
        if CONTAINED:
            folder = os.statvfs("/tmp")
            if folder.f_files - folder.f_ffree > FILES:
                return "files"
        return None


def usage(child: int, socket_bytes: int) -> tuple[float, int]:
    """Processor seconds of all processes of the program, and bytes of memory that is theirs alone, swapped out or not.

    Memory that several hold needs no count: seccomp.py lets them share none but files of the limited folder. Sockets
    count as if they were full.
    """
    cpu, memory = 0, sockets() * socket_bytes // 1024
    for name in os.listdir("/proc") if CONTAINED else [str(child)]:
        if not name.isdigit() or name == "1":
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
            with open(f"/proc/{name}/status", "rb") as file:
                sizes = [line.split()[1] for line in file if line.startswith((b"RssAnon:", b"VmSwap:"))]
        except OSError:  # it has ended
            continue
        cpu += sum(map(int, fields[11:15]))
        memory += sum(map(int, sizes))
    return cpu / TICKS, memory * 1024


def sockets() -> int:
    """Those of the sandbox's own network namespace, whoever holds them: pairs, as the filter lets no others be made."""
    if not CONTAINED:
        return 0
    with open("/proc/self/net/unix", "rb") as file:
        return len(file.readlines()) - 1


def attend(watched: Watched, feed_to: int, feed: memoryview, outputs: dict[int, bytearray]) -> str | None:
    """Carry input and output until the program ends or passes a limit; which limit, or None."""
    poll, limit = select.poll(), watched.limits["output_bytes"]
    poll.register(watched.ended, select.POLLIN)
    for descriptor in outputs:
        poll.register(descriptor, select.POLLIN)
    if feed:
        poll.register(feed_to, select.POLLOUT)
    else:
        os.close(feed_to)
    try:
        while True:
            for descriptor, _ in poll.poll(WATCH_S * 1000):
                if descriptor == watched.ended:
                    return None
                if descriptor == feed_to:
                    feed = feed_some(poll, feed_to, feed)
                elif not read_some(descriptor, outputs[descriptor]):
                    poll.unregister(descriptor)
                elif len(outputs[descriptor]) > limit:
                    return "output"
            if excess := watched.excess():
                return excess
    finally:
        os.close(watched.ended)
        if feed:
            os.close(feed_to)


def feed_some(poll: select.poll, descriptor: int, feed: memoryview) -> memoryview:
    try:
        feed = feed[os.write(descriptor, feed[: 1 << 16]) :]
    except BlockingIOError:
        return feed
    except BrokenPipeError:  # it does not want to know more
        feed = feed[:0]
    if not feed:
        poll.unregister(descriptor)
        os.close(descriptor)
    return feed


def read_some(descriptor: int, text: bytearray) -> bool:
    """Whether there may be more."""
    try:
        part = os.read(descriptor, 1 << 16)
    except BlockingIOError:
        return True
    text += part
    return bool(part)


def drain(descriptor: int, text: bytearray, limit: int) -> None:
    while len(text) <= limit:
        try:
            part = os.read(descriptor, 1 << 16)
        except BlockingIOError:
            return
        if not part:
            return
        text += part


def reap(child: int) -> tuple[int, float, int]:
    """Kill all that is left; the program's status, processor seconds and largest process of all."""
    if CONTAINED:
        signal_all = functools.partial(os.kill, -1, signal.SIGKILL)
    else:
        signal_all = functools.partial(os.killpg, child, signal.SIGKILL)
    ended, status, spent = os.wait4(child, os.WNOHANG)
    if not ended:
        try:
            os.kill(child, signal.SIGKILL)  # its session may not be its own yet
            signal_all()
        except ProcessLookupError:
            pass
        ended, status, spent = os.wait4(child, 0)
    cpu, peak = spent.ru_utime + spent.ru_stime, spent.ru_maxrss
    while True:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            signal_all()
        try:
            ended, _, spent = os.wait4(-1, 0 if CONTAINED else os.WNOHANG)
        except ChildProcessError:
            return status, cpu, peak * 1024
        if not ended:
            return status, cpu, peak * 1024
        cpu, peak = cpu + spent.ru_utime + spent.ru_stime, max(peak, spent.ru_maxrss)


def set_dumpable(value: int) -> None:
    """prctl(PR_SET_DUMPABLE): 0 closes /proc/PID and the memory behind it to processes of the same user."""
    if CONTAINED and libc.prctl(4, value, 0, 0, 0):
        os._exit(3)


def main() -> typing.NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # process 1 has no handler, so no signal from inside reaches it
    sys.path[0] = ""
    builtins.exit = builtins.quit = sys.exit
    exec("".join(f"from {name} import *\n" for name in NAMES) + f"import {', '.join(NAMES)}", PRELUDE)
    set_dumpable(0)
    nowhere = os.open("/dev/null", os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    gc.collect()
    gc.freeze()
    write_frame({"ready": True})
    program, source = read_frame()
    while True:
        header, data = read_frame()
        execute(program, source, data, header)


if CONTAINED:
    import ctypes

    libc = ctypes.CDLL(None)

if __name__ == "__main__":
    main()
