"""An engine that is lost while others serve: the run goes on, and another takes its place with the current weights."""

import re
from pathlib import Path

import msgspec
import psutil
import pytest

from megatron_sdpo.tracking import read_metrics
from megatron_sdpo.types import Group
from tests.test_end_to_end import ROLES, Run, journal, last_step, start, until

STEPS = 100


def engines(run: Run) -> dict[str, psutil.Process]:
    """The servers by name; not the processes that they start."""
    found: dict[str, psutil.Process] = {}
    for process in run.descendants():
        command = process.cmdline()
        if any(argument.endswith(ROLES["engine-0"]) for argument in command):
            seed = next(a for a in command if a.startswith("--random-seed="))
            found[f"engine-{seed.rpartition('=')[2]}"] = process
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_lost_engine_is_replaced_and_serves_the_current_weights(tmp_path: Path) -> None:
    """Killed twice, the second time as soon as its successor serves."""
    run_dir = tmp_path / "run"
    run = start(
        run_dir,
        *("--layout=tp1", "engine.count=2", f"steps={STEPS}", "evaluation.every=0", "checkpoint.every=50"),
        *("rollout.prompts_per_step=8", "optim.mini_batches=1"),
    )
    try:
        until(lambda: last_step(run_dir) >= 2, run)
        engines(run)["engine-1"].kill()
        until(lambda: "engine-1 serves again" in run.errors.read_text(), run)
        successor = last_step(run_dir)
        until(lambda: last_step(run_dir) >= successor + 3, run)
        assert run.wait(500) == 0, run.errors.read_text()
    finally:
        run.kill()
    rows = read_metrics(run_dir)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert max(row["sync/probe_gap"] or 0.0 for row in rows) <= 1e-4
    groups = [msgspec.json.decode(line, type=Group) for lines in journal(run_dir).values() for line in lines]
    assert sorted((g.step, g.slot) for g in groups) == [(step, slot) for step in range(STEPS) for slot in range(8)]
    assert all(a.weight_version == g.step for g in groups for a in g.attempts)  # no engine answered with other weights
    version = re.search(r"engine-1 serves again, version (\d+)-", run.errors.read_text())
    assert version is not None and int(version[1]) > 2
    log = (run_dir / "logs" / "engine-1.log").read_text()
    later = log[log.rindex("ready to roll") :]
    assert later.count("Prefill batch, #new-seq: 8") > 3  # questions, not probes
