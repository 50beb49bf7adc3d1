"""A real Slurm with several nodes on this machine, and the jobs that tests submit to it."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "tools" / "slurm_sandbox.sh"
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter")


def why_not() -> str | None:
    """Why this machine cannot have it."""
    if os.geteuid() != 0:
        return "a Slurm with several nodes on one machine needs root"
    if subprocess.run(["unshare", "--net", "--mount", "--uts", "true"], capture_output=True).returncode:
        return "this machine does not let root make namespaces, which are the nodes"
    missing = [name for name in NEEDED if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    return f"{', '.join(missing)} not installed; tools/slurm_sandbox.sh install" if missing else None


def has_pyxis() -> bool:
    """What tools/fake_pyxis.c needs to be built is here."""
    return shutil.which("gcc") is not None and Path("/usr/include/slurm/spank.h").exists()


@dataclass
class Sandbox:
    """Commands of its clients and its nodes."""

    settings: dict[str, str]

    def control(self, *arguments: str) -> str:
        """slurm_sandbox.sh itself."""
        return _run([str(SCRIPT), *arguments], self.settings)

    def client(self, *command: str) -> str:
        return _run(list(command), {"SLURM_CONF": f"{self.settings['SANDBOX_DIR']}/slurm.conf"})

    def submit(
        self, script: str, folder: Path, *arguments: str, options: tuple[str, ...] = (), **settings: str
    ) -> "Job":
        """``sbatch options slurm/script arguments`` from the checkout, with SDPO_* ``settings``."""
        output, run_dir = folder / "job.out", folder / "run"
        own = {
            "SLURM_CONF": f"{self.settings['SANDBOX_DIR']}/slurm.conf",
            "SDPO_PYTHON": sys.executable,
            "SDPO_RUN_DIR": str(run_dir),
            "SDPO_NODE_TIMEOUT_S": "10",
            **settings,
        }
        command = ["sbatch", "--parsable", f"--output={output}", *options, f"slurm/{script}", *arguments]
        number = _run(command, own).strip().partition(";")[0].partition("+")[0]
        return Job(self, number, output, run_dir)


@dataclass
class Job:
    """One that was submitted."""

    sandbox: Sandbox
    number: str
    output: Path
    run_dir: Path
    last: dict[str, str] = field(default_factory=dict)

    def look(self) -> dict[str, str]:
        """What Slurm says: JobState, Restarts, NodeList ..."""
        words = self.sandbox.client("scontrol", "-o", "show", "job", self.number).splitlines()[0]
        self.last = dict(re.findall(r"(\w+)=(\S*)", words))
        return self.last

    def until(self, condition: Callable[[], bool], timeout_s: float = 180) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"{self.look()}\n{self.text()}"
            time.sleep(0.3)

    def end(self, timeout_s: float = 240) -> str:
        """The state in which it ended."""
        self.until(
            lambda: self.look()["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"), timeout_s
        )
        return self.last["JobState"]

    def text(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def cancel(self) -> None:
        self.sandbox.client("scancel", self.number)


@contextmanager
def sandbox(nodes: int, prefix: str, number: int) -> Iterator[Sandbox]:
    """``prefix`` of the nodes' names and ``number`` keep it apart from others on this machine."""
    folder = tempfile.mkdtemp(prefix="slurm-test-")
    os.chmod(folder, 0o755)  # munge runs as another user
    settings = {
        "SANDBOX_DIR": folder,
        "SANDBOX_BRIDGE": f"sltest{number}",
        "SANDBOX_SUBNET": f"10.91.{number}",
        "SANDBOX_PREFIX": prefix,
        "SANDBOX_PORT": str(18_817 + 10 * number),
        "NODES": str(nodes),
        "GPUS": "8",
        "SLURMD_TIMEOUT": "15",
        "KILLWAIT": "15",
        "PYXIS": "1" if has_pyxis() else "",
    }
    found = Sandbox(settings)
    try:
        found.control("up")
        yield found
    finally:
        found.control("down")
        shutil.rmtree(folder)


def _run(command: list[str], settings: dict[str, str]) -> str:
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    own = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **settings}
    own.pop("PYTHONPATH", None)  # the job brings its own copy of the code
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout
