"""What goes into a sandbox and what comes out."""

from dataclasses import dataclass
from typing import Literal, Protocol

from megatron_sdpo.config.sandbox import Limits, SandboxConfig

OutcomeKind = Literal[
    "ok",
    "syntax_error",
    "runtime_error",
    "time_limit",
    "memory_limit",
    "output_limit",
    "source_limit",
    "lost",
]
"""How an execution ended. ok: by itself, without an uncaught exception (its answer may still be wrong); output_limit:
it printed, returned or stored too much; source_limit: its text is too long, and it was not executed; lost: its sandbox
ended twice without a word, as when the machine is out of memory."""


class SandboxError(RuntimeError):
    """The sandbox itself does not work: no program is to blame, so there is no verdict."""


@dataclass(frozen=True, slots=True)
class Program:
    """A Python program and what it is executed on, once for each of ``inputs``.

    Example: ``Program("print(int(input()) + 1)", (b"1", b"2"))`` reads standard input;
    ``Program("def add(a, b): return a + b", (b"1\\n2",), function="add")`` is called with one JSON value a line.

    The executions see neither each other's files nor processes. They stop after the first whose kind is not "ok".
    """

    source: str
    inputs: tuple[bytes, ...] = (b"",)
    function: str | None = None
    """The function, or the method of a class ``Solution``, that is called; None runs the program as a script."""
    limits: Limits = Limits()


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one execution ended.

    Example: ``Outcome("runtime_error", exit_code=1, error="ZeroDivisionError: division by zero\\n    ...")``

    ``exit_code`` is None when a ``signal`` ended it, and both are None for a program that was not executed.
    ``error`` is the exception and the last frames of its traceback in the program's own text. ``result`` is the JSON
    of what the function returned. ``peak_bytes`` is the largest resident memory of any one of its processes, the
    interpreter's own included.
    """

    kind: OutcomeKind
    stdout: bytes = b""
    stderr: bytes = b""
    exit_code: int | None = None
    signal: int | None = None
    cpu_s: float = 0.0
    wall_s: float = 0.0
    peak_bytes: int = 0
    error: str = ""
    result: bytes | None = None
    shown: str = ""
    """A returned value that is no JSON, as ``repr`` has it."""


class Sandbox(Protocol):
    """Where programs are executed: LocalSandbox, RemoteSandbox."""

    config: SandboxConfig

    def run_blocking(self, program: Program) -> tuple[Outcome, ...]:
        """An outcome for each input, up to the first that is not "ok"; raises SandboxError when sandboxes fail."""
        ...

    async def run(self, program: Program) -> tuple[Outcome, ...]:
        """The same for an event loop; cancelling the call ends the program."""
        ...

    def close(self) -> None:
        """End what runs and waits."""
        ...
