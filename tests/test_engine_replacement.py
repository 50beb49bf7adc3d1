"""An engine that ends or hangs while others serve: another takes its place, with the current weights."""

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import psutil
import pytest

from megatron_sdpo.rollout.control import EngineControl
from megatron_sdpo.rollout.fleet_files import is_publishing, read_address
from megatron_sdpo.tracking import read_metrics
from megatron_sdpo.types import Group
from tests.test_end_to_end import ROLES, Run, journal, last_step, start, until
from tests.test_liveness import scheduler_of

STEPS = 100
BOUND_S = 15.0


def engines(run: Run) -> dict[str, psutil.Process]:
    """The servers by name; not the processes that they start."""
    found: dict[str, psutil.Process] = {}
    for process in run.descendants():
        command = process.cmdline()
        if any(argument.endswith(ROLES["engine-0"]) for argument in command):
            seed = next(a for a in command if a.startswith("--random-seed="))
            found[f"engine-{seed.rpartition('=')[2]}"] = process
    return found


def kill(run: Run, run_dir: Path) -> None:
    engines(run)["engine-1"].kill()


def stop_generating(run: Run, run_dir: Path) -> None:
    """Its scheduler alone, with requests in hand."""
    leader, control = engines(run)["engine-1"].pid, control_of(run_dir, "engine-1")
    until(lambda: control.load()["num_running_reqs"] > 0, run)
    os.kill(scheduler_of(leader), signal.SIGSTOP)


def stop_publishing(run: Run, run_dir: Path) -> None:
    """All its processes, as soon as weights are being sent."""
    leader = engines(run)["engine-1"].pid
    until(lambda: not is_publishing(run_dir), run)
    while not is_publishing(run_dir):
        assert run.process.poll() is None, run.errors.read_text()
    os.killpg(leader, signal.SIGSTOP)


def control_of(run_dir: Path, name: str) -> EngineControl:
    address = read_address(run_dir, name)
    assert address is not None
    return EngineControl(address, (run_dir / "token").read_text(), timeout_s=30.0)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("lose", [kill, stop_generating, stop_publishing])
def test_a_lost_engine_is_replaced_and_serves_the_current_weights(
    tmp_path: Path, lose: Callable[[Run, Path], None]
) -> None:
    run_dir = tmp_path / "run"
    run = start(
        run_dir,
        *("--layout=tp1", "engine.count=2", f"steps={STEPS}", "evaluation.every=0", "checkpoint.every=50"),
        *("rollout.prompts_per_step=8", "optim.mini_batches=1", f"engine.hang_timeout_s={BOUND_S}"),
        "engine.start_timeout_s=600",
    )
    try:
        until(lambda: last_step(run_dir) >= 2, run, 600)
        before = last_step(run_dir)
        lose(run, run_dir)
        lost_at = time.monotonic()
        until(lambda: "and is replaced (1 of at most 3 times), others serve" in run.errors.read_text(), run)
        replaced_s = time.monotonic() - lost_at
        until(lambda: last_step(run_dir) >= before + 2, run)
        stepped_s = time.monotonic() - lost_at
        until(lambda: "engine-1 serves again" in run.errors.read_text(), run, 600)
        served_s = time.monotonic() - lost_at
        print(f"replaced after {replaced_s:.1f} s, next step after {stepped_s:.1f} s, serves after {served_s:.1f} s")
        successor = last_step(run_dir)
        until(lambda: last_step(run_dir) >= successor + 3, run)
        assert run.wait(500) == 0, run.errors.read_text()
    finally:
        run.kill()
    said = run.errors.read_text()
    print(said)
    assert ("engine-1 has ended (-9) and is" in said) == (lose is kill)
    if lose is not kill:
        assert re.search(
            r"^engine-1 hangs \((its (scheduler|HTTP server) has not answered|it has stood still) for 15 s",
            said,
            re.MULTILINE,
        )
        assert "stopped (SIGSTOP or a debugger): " in said and replaced_s > BOUND_S / 2
    if lose is stop_publishing:
        assert "; weights were being sent to it; " in said
    rows = read_metrics(run_dir)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert (rows[0]["rollout/engines_replaced"], rows[-1]["rollout/engines_replaced"]) == (0.0, 1.0)
    assert max(row["sync/probe_gap"] or 0.0 for row in rows) <= 1e-4
    groups = [msgspec.json.decode(line, type=Group) for lines in journal(run_dir).values() for line in lines]
    assert sorted((g.step, g.slot) for g in groups) == [(step, slot) for step in range(STEPS) for slot in range(8)]
    assert all(a.weight_version == g.step for g in groups for a in g.attempts)  # no engine answered with other weights
    version = re.search(r"engine-1 serves again, version (\d+)-", said)
    assert version is not None and int(version[1]) > 2
    log = (run_dir / "logs" / "engine-1.log").read_text()
    later = log[log.rindex("ready to roll") :]
    assert later.count("Prefill batch, #new-seq: 8") > 3  # questions, not probes
