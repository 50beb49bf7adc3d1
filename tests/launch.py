"""Start a worker script on several ranks, as a user would: torchrun over gloo on this machine."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_ranks(script: str | Path, nproc: int, args: Sequence[str] = (), timeout: float = 120) -> str:
    """Run ``torchrun --nproc-per-node nproc script args`` and return its output (stdout and stderr, in order).

    ``script`` is relative to tests/. A failure or a run longer than ``timeout`` seconds raises AssertionError with
    the end of the output; no process outlives the call.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(nproc), "--master-addr"]
    command += ["127.0.0.1", "--master-port", str(_free_port()), str(ROOT / "tests" / script), *args]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"{script} on {nproc} ranks ran longer than {timeout} s:\n{_tail(output)}") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise AssertionError(f"{script} on {nproc} ranks exited with {process.returncode}:\n{_tail(output)}")
    return output


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _tail(output: str, lines: int = 60) -> str:
    return "\n".join(output.splitlines()[-lines:])
