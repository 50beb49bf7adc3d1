"""What the machine and its neighbours allow: sandbox, disk, memory, limits, ports, clocks."""

import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from megatron_sdpo.config import ConfigError, SandboxConfig
from megatron_sdpo.launch.doctor import Finding, Needs
from megatron_sdpo.launch.preflight import checkpoint_bytes
from megatron_sdpo.rollout.fleet import check_ports
from megatron_sdpo.rollout.ports import port_range
from megatron_sdpo.sandbox.selftest import check_local

OLDEST_BWRAP = (0, 8)
"""The first with --disable-userns."""
LEAST_FREE = 10e9
"""Bytes free on a disk below which even logs and journals of a long run come near its end."""
LEAST_SHARED = 1e9
LEAST_FILES = 4096
"""Open files: a coordinator holds a connection for each request that is under way."""
SKEW_S = 2.0
"""Clocks further apart put logs, timelines and signs of life of different nodes into a wrong order."""


def sandbox(needs: Needs) -> Finding:
    """bubblewrap, whether this user may make the namespaces that it needs, and whether the sandbox holds."""
    bad = "fail" if needs.executes_programs else "warn"
    config = needs.config.sandbox if needs.config is not None else SandboxConfig()
    if config.backend != "bubblewrap":
        state = "warn" if config.backend == "unsafe-none" else "ok"
        return Finding("sandbox", state, f"sandbox.backend={config.backend}", "" if state == "ok" else "set bubblewrap")
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        state = "fail" if needs.executes_programs else "absent"
        return Finding("sandbox", state, "no bwrap", "tasks that execute code need it: install bubblewrap")
    told = subprocess.run([bwrap, "--version"], capture_output=True, text=True, timeout=30).stdout.strip()
    numbers = tuple(map(int, re.findall(r"\d+", told)[:2]))
    if numbers < OLDEST_BWRAP:
        return Finding("sandbox", bad, told or "bwrap does not tell its version", "install bubblewrap 0.8 or newer")
    own = ["--unshare-user", "--unshare-pid", "--unshare-net", "--ro-bind", "/", "/", "--die-with-parent", "true"]
    done = subprocess.run([bwrap, *own], capture_output=True, text=True, timeout=30)
    if done.returncode:
        words = done.stderr.strip().splitlines()
        todo = "allow unprivileged user namespaces (sysctl kernel.unprivileged_userns_clone, user.max_user_namespaces,"
        todo += " kernel.apparmor_restrict_unprivileged_userns; in a container, its seccomp profile)"
        return Finding("sandbox", bad, words[-1] if words else f"bwrap ended with {done.returncode}", todo)
    try:
        check_local(config)
    except ConfigError as error:
        return Finding("sandbox", bad, told, str(error))
    return Finding("sandbox", "ok", f"{told}, its own test passed")


def disk(needs: Needs) -> Finding:
    """Free space where the run is written, against what its checkpoints will take."""
    place = _existing(needs.run_dir)
    try:
        _file_system_skew(place)
    except OSError as error:
        return Finding("disk", "fail", f"{place} cannot be written ({error.strerror})", "set another run_dir")
    free = shutil.disk_usage(place).free
    seen = f"{free / 1e9:.0f} GB free for {needs.run_dir}"
    try:
        wanted = _checkpoint_bytes(needs)
    except ConfigError as error:
        return Finding("disk", "fail", f"{seen}; {error}", "mend model.path")
    if wanted > free:
        seen += f", of {wanted / 1e9:.0f} GB for checkpoints"
        return Finding("disk", "fail", seen, "set another run_dir, or lower checkpoint.keep")
    if free < LEAST_FREE:
        return Finding("disk", "warn", seen, f"have {LEAST_FREE / 1e9:.0f} GB or more, or set another run_dir")
    return Finding("disk", "ok", seen + (f"; checkpoints take {wanted / 1e9:.2g} GB" if wanted else ""))


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def _checkpoint_bytes(needs: Needs) -> float:
    """Those that are kept and one more while it is written; 0 without a recipe, or where its model is not there."""
    if needs.config is None or not Path(needs.config.model.path).is_dir():
        return 0.0
    return checkpoint_bytes(needs.config) * (needs.config.checkpoint.keep + 1)


def memory(needs: Needs) -> Finding:
    """Main memory, and the shared part of it through which ranks of a machine speak."""
    free, shared = psutil.virtual_memory().available, shutil.disk_usage("/dev/shm")
    seen = f"{free / 1e9:.0f} GB free, /dev/shm {shared.total / 1e9:.1f} GB"
    if shared.free < LEAST_SHARED:
        todo = f"have {LEAST_SHARED / 1e9:.0f} GB or more free there (in a container: --shm-size)"
        return Finding("memory", "fail" if needs.gpus else "warn", seen, todo)
    return Finding("memory", "ok", seen)


def limits(needs: Needs) -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = "unlimited" if soft == resource.RLIM_INFINITY else str(soft)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft != resource.RLIM_INFINITY and soft < LEAST_FILES:
        todo = f"ulimit -n {LEAST_FILES}" if hard >= LEAST_FILES or hard == resource.RLIM_INFINITY else "raise nofile"
        return Finding("limits", "warn", f"{files} open files", f"{todo}: each open request holds one")
    if needs.gpus and locked != resource.RLIM_INFINITY:
        return Finding("limits", "warn", f"{locked} bytes of locked memory", "ulimit -l unlimited, for RDMA")
    return Finding("limits", "ok", f"{files} open files")


def ports(needs: Needs) -> Finding:
    """Those that the recipe asks for, or free ones; and that the kernel gives none of them to strangers."""
    try:
        allowed = port_range()
        if needs.config is not None:
            check_ports(needs.config)
    except ConfigError as error:
        return Finding("ports", "fail", str(error).partition(";")[0], str(error).partition("; ")[2])
    file = Path("/proc/sys/net/ipv4/ip_local_port_range")
    first, last = map(int, file.read_text().split())
    seen = f"{allowed.start}-{allowed.stop - 1}"
    if allowed.start <= last and first < allowed.stop:
        todo = f"set MEGATRON_SDPO_PORTS to a range outside {first}-{last}, which the kernel hands out"
        return Finding("ports", "warn", seen, todo)
    return Finding("ports", "ok", seen)


def clock(needs: Needs) -> Finding:
    """This machine's clock against the file system's of the run directory and, inside a job, against all nodes'."""
    try:
        skews = {"the file system": _file_system_skew(_existing(needs.run_dir))}
    except OSError as error:
        return Finding("clock", "fail", f"{needs.run_dir} cannot be written ({error.strerror})", "set another run_dir")
    inside = "SLURM_JOB_ID" in os.environ and shutil.which("srun") is not None
    if inside:
        try:
            skews |= _node_skews()
        except (subprocess.SubprocessError, ValueError) as error:
            return Finding("clock", "warn", f"srun does not tell the nodes' clocks: {error}", "look at srun's words")
    worst = max(skews, key=lambda name: abs(skews[name]))
    seen = f"{worst} is {abs(skews[worst]):.1f} s {'ahead' if skews[worst] > 0 else 'behind'}"
    if abs(skews[worst]) > SKEW_S:
        return Finding("clock", "warn", seen, "synchronise the clocks (chronyc tracking, timedatectl)")
    if inside:
        return Finding("clock", "ok", f"{len(skews) - 1} node(s) and the file system within {SKEW_S:.0f} s")
    return Finding("clock", "ok", f"the file system within {SKEW_S:.0f} s; run inside a job to compare nodes")


def _file_system_skew(folder: Path) -> float:
    """Seconds by which a file that is written now seems to come from the future; OSError if none can be written."""
    before = time.time()
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
        file.write(b"x")
        file.flush()
        os.fsync(file.fileno())
        written = os.stat(file.name).st_mtime
    after = time.time()
    return min(0.0, written - before) + max(0.0, written - after)


def _node_skews() -> dict[str, float]:
    """By node; what starting the processes may have taken is no skew."""
    program = "import os, time; print(os.environ.get('SLURMD_NODENAME'), time.time())"
    command = ["srun", "--overlap", "--ntasks-per-node=1", sys.executable, "-c", program]
    before = time.time()
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    return judge_clocks({node: float(at) for node, at in map(str.split, told.splitlines())}, before, time.time())


def judge_clocks(told: Mapping[str, float], before: float, after: float) -> dict[str, float]:
    """What clocks showed at some instant between ``before`` and ``after`` -> by how much they must be wrong."""
    return {node: min(0.0, at - before) + max(0.0, at - after) for node, at in told.items()}


CHECKS = (sandbox, disk, memory, limits, ports, clock)
