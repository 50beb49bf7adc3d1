"""The command that starts ``inside.py`` in namespaces of its own, by bubblewrap.

What the program sees: the system's programs and libraries, its interpreter and the named packages, all read-only; a
``/proc`` of its own process namespace; a few devices; an empty ``/tmp`` of limited size. Nothing else of the file
system, no network, no variable of this process's environment. bubblewrap takes every capability away, forbids further
user namespaces and gaining privileges, and loads the filter of seccomp.py.

A root user's sandboxes run as an unprivileged user of the machine (``UNPRIVILEGED``), because the limit on processes
binds nobody who is root outside. An interpreter below a folder that this user may not enter (/root) is then mounted
once more in a mount namespace of the sandbox, where it can be reached.
"""

import importlib.util
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megatron_sdpo.config import ConfigError
from megatron_sdpo.config.sandbox import Limits, SandboxConfig

UNPRIVILEGED = 65534
INSIDE_ID = 1000
"""User and group as the program sees them."""
OLDEST_BWRAP = (0, 8)
"""The first with --disable-userns."""
INSIDE = Path(__file__).parent / "inside.py"
PACKAGES = "/packages"
_SCRIPT = "/sandbox/inside.pyc"
_SYSTEM = ("/usr", "/lib", "/lib64", "/lib32", "/bin", "/sbin", "/etc/ld.so.cache", "/etc/alternatives")
_DEVICES = ("full", "null", "random", "urandom")
"""Not zero: mapped by several, it is memory that no process is charged for."""

_FIND_PYTHON = (
    "import sys; print(sys.executable, sys.base_prefix, sys.base_exec_prefix, *sys.version_info[:2], sep='\\n')"
)
_COMPILE = """
import importlib.util, marshal, sys
code = compile(sys.stdin.buffer.read(), "inside.py", "exec")
sys.stdout.buffer.write(importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(code))
"""


@dataclass
class Isolation:
    """How a configuration's sandboxes are started; making one raises ConfigError where that cannot work."""

    config: SandboxConfig

    def __post_init__(self) -> None:
        if self.config.backend == "bubblewrap":
            self._bwrap = _find_bwrap(self.config.bwrap)
        _ = self.interpreter, self.packages, self.script  # what cannot be found is refused here
        self._folder = tempfile.TemporaryDirectory(prefix="sandbox-")
        if self.config.backend == "bubblewrap" and os.geteuid() == 0:
            self._find_helpers()

    @cached_property
    def interpreter(self) -> tuple[str, tuple[str, ...]]:
        """The interpreter without links, and the folders that it needs."""
        python = self.config.python or sys.executable
        try:
            found = subprocess.run([python, "-S", "-c", _FIND_PYTHON], capture_output=True, text=True, timeout=30)
        except OSError as error:
            raise ConfigError(f"sandbox.python {python} cannot be started: {error.strerror}") from error
        if found.returncode:
            raise ConfigError(f"sandbox.python {python} is no Python interpreter: {found.stderr.strip()[-200:]}")
        executable, prefix, exec_prefix, *version = found.stdout.split("\n")[:5]
        if tuple(map(int, version)) < (3, 9):
            raise ConfigError(f"sandbox.python {python} is Python {'.'.join(version)}; set it to 3.9 or newer")
        return os.path.realpath(executable), tuple(dict.fromkeys((prefix, exec_prefix)))

    @cached_property
    def script(self) -> bytes:
        """inside.py as byte code of the interpreter, which thousands of sandboxes then need not compile."""
        command = [self.interpreter[0], "-S", "-c", _COMPILE]
        done = subprocess.run(command, input=INSIDE.read_bytes(), capture_output=True, timeout=60)
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip()[-200:]
            raise ConfigError(f"sandbox.python {command[0]} cannot read this package's own code: {said}")
        return done.stdout

    @cached_property
    def packages(self) -> dict[str, str]:
        """Place in the sandbox -> folder or file here, of the packages that programs may import."""
        places: dict[str, str] = {}
        for name in self.config.packages:
            spec = importlib.util.find_spec(name) if re.fullmatch(r"\w+", name) else None
            if spec is None or not spec.origin:
                raise ConfigError(
                    f"sandbox.packages names {name!r}, which this environment does not have; install it or take it out"
                )
            origin = Path(spec.origin)
            source = origin.parent if spec.submodule_search_locations else origin
            libraries = source.parent / f"{name}.libs"  # where wheels keep shared libraries
            for path in (source, *([libraries] if libraries.is_dir() else [])):
                places[f"{PACKAGES}/{path.name}"] = str(path)
        return places

    def variables(self) -> dict[str, str]:
        """The whole environment of a program."""
        return {
            "PATH": "/usr/bin:/bin",
            "HOME": "/tmp",
            "LANG": "C.UTF-8",
            "PYTHONHASHSEED": "0",  # the same program answers the same
            "PYTHONPATH": PACKAGES if self.config.backend == "bubblewrap" else ":".join(self._package_folders()),
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }

    def _package_folders(self) -> list[str]:
        return list(dict.fromkeys(str(Path(source).parent) for source in self.packages.values()))

    def command(self, limits: Limits, seccomp: int, inside: int) -> list[str]:
        """The command line; the filter and the byte code of inside.py are read from two descriptors."""
        python = [self.interpreter[0], "-S", "-s", "-B"]
        if self.config.backend == "unsafe-none":
            return [*python, str(INSIDE)]
        mounts, moved = self._mounts()
        options = [*self._options(limits), "--seccomp", str(seccomp), *mounts, "--ro-bind-data", str(inside), _SCRIPT]
        return [*self._as_unprivileged(moved), self._bwrap, *options, *_FINAL, *python, _SCRIPT]

    def _options(self, limits: Limits) -> list[str]:
        options = ["--unshare-user", "--unshare-all", "--disable-userns"]
        options += ["--uid", str(INSIDE_ID), "--gid", str(INSIDE_ID), "--hostname", "sandbox", "--cap-drop", "ALL"]
        options += ["--die-with-parent", "--new-session", "--as-pid-1", "--clearenv"]
        for name, value in self.variables().items():
            options += ["--setenv", name, value]
        options += ["--dir", "/dev"]
        for device in _DEVICES:
            options += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
        return [*options, "--proc", "/proc", "--size", str(limits.file_bytes), "--perms", "0700", "--tmpfs", "/tmp"]

    def _mounts(self) -> tuple[list[str], dict[str, str]]:
        """bubblewrap's options for what is read-only; source -> reachable place of what it could not reach."""
        options: list[str] = []
        for path in _SYSTEM:
            if os.path.islink(path):
                options += ["--symlink", os.readlink(path), path]
            elif os.path.exists(path):
                options += ["--ro-bind", path, path]
        sources = {prefix: prefix for prefix in self.interpreter[1] if not prefix.startswith("/usr")}
        sources |= self.packages
        moved: dict[str, str] = {}
        for place, source in sources.items():
            if os.geteuid() == 0 and not _open_to_all(source):
                moved[source] = str(Path(self._folder.name) / str(len(moved)))
            options += ["--ro-bind", moved.get(source, source), place]
        return options, moved

    def _find_helpers(self) -> None:
        os.chmod(self._folder.name, 0o755)
        _, moved = self._mounts()
        for source, place in moved.items():
            if os.path.isdir(source):
                os.mkdir(place)
            else:
                Path(place).touch()
        for name in ("setpriv", "unshare", "mount"):
            if not shutil.which(name):
                raise ConfigError(f"a root user's sandboxes need {name}, which is not installed; install util-linux")

    @staticmethod
    def _as_unprivileged(moved: dict[str, str]) -> list[str]:
        """What comes before bubblewrap for a root user."""
        if os.geteuid() != 0:
            return []
        drop = ["setpriv", "--reuid", str(UNPRIVILEGED), "--regid", str(UNPRIVILEGED), "--clear-groups"]
        if not moved:
            return drop
        pairs = [word for pair in moved.items() for word in pair]
        mount = 'mount --bind "$1" "$2" && shift 2 && ' * len(moved)
        return ["unshare", "--mount", "--propagation", "private", "sh", "-c", f'{mount}exec "$@"', "sh", *pairs, *drop]

    def close(self) -> None:
        self._folder.cleanup()


_FINAL = ["--remount-ro", "/", "--chdir", "/tmp", "--"]


def _open_to_all(path: str) -> bool:
    """Whether every user may enter each folder of a path."""
    real = Path(os.path.realpath(path))
    return all(os.stat(folder).st_mode & stat.S_IXOTH for folder in (real, *real.parents) if os.path.isdir(folder))


def _find_bwrap(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise ConfigError(
            f"this task executes programs that the model writes, and sandbox.bwrap {name!r} is not installed;"
            " install the package bubblewrap of your distribution, or set sandbox.backend=remote and sandbox.url"
        )
    said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30).stdout
    version = tuple(map(int, re.findall(r"\d+", said)[:2]))
    if version < OLDEST_BWRAP:
        raise ConfigError(
            f"sandbox.bwrap {path} is {said.strip()}; version {'.'.join(map(str, OLDEST_BWRAP))} or newer is needed"
        )
    return path
