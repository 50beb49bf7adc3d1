"""The keys of the sandbox, in which programs that a model wrote are executed."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one execution of a program may use; sandbox/ says how each limit is held."""

    cpu_s: float = 6.0
    """Processor time of all its processes together."""
    wall_s: float = 30.0
    """Time on the clock. Far above cpu_s, so that a busy machine changes no verdict."""
    memory_bytes: int = 1024**3
    """Address space of each process, and resident memory of all together."""
    processes: int = 32
    """Processes and threads at one time."""
    file_bytes: int = 16 * 1024**2
    """Size of its temporary folder, and of each file in it."""
    output_bytes: int = 4 * 1024**2
    """Standard output, standard error and a function's result, each."""
    source_bytes: int = 1024**2
    """The program's text; a longer one is not executed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SandboxConfig:
    """Where programs that a model wrote are executed."""

    backend: Literal["bubblewrap", "remote", "unsafe-none"] = "bubblewrap"
    """bubblewrap: on this machine, each in namespaces of its own; remote: by the service at ``url``; unsafe-none: as
    plain processes with the rights of this one, so that a program may read, change and send whatever you may."""
    workers: int = 2
    """Programs that run at one time, each on up to one core. Answers are judged by rollout.verify_workers threads, of
    which each waits for its program: set both to the same number, at most the cores that the coordinator's machine (or
    that of the service) has to spare."""
    warm: int = 2
    """Sandboxes that are started ahead; each serves one program. More than ``workers`` gain nothing."""
    bwrap: str = "bwrap"
    """bubblewrap's program: a name on the PATH, or a path."""
    python: str | None = None
    """The interpreter that runs programs; None is this one."""
    packages: tuple[str, ...] = ("numpy",)
    """Packages of this environment that programs may import besides the standard library."""
    url: str | None = None
    """remote: the address of the service, http://HOST:PORT."""
    token_file: str | None = None
    """remote: a file that holds the service's token."""
    limits: Limits = Limits()
