"""A whole run on real parts (SGLang engine, coordinator, two trainer ranks), killed three times on its way.

One chain, because every start costs half a minute: a role is killed outright, the command must end by
itself within 30 s, name the role and leave no process behind; the same command then continues.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil
import pytest
from safetensors.torch import load_file

from megatron_sdpo.measures import measure
from megatron_sdpo.tracking import read_metrics
from megatron_sdpo.types import Batch, Group

STEPS = 8
ROLES = {"engine-0": "rollout.engine_main", "coordinator": "launch.coordinator", "trainer": "launch.trainer"}


@dataclass
class Run:
    """One start of the command."""

    process: subprocess.Popen[str]
    errors: Path

    def descendants(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def role(self, name: str) -> psutil.Process:
        """The process of a role; of the trainer, the rank that is not first."""
        found = [p for p in self.descendants() if any(a.endswith(ROLES[name]) for a in p.cmdline())]
        ranks = [p for p in found if p.environ().get("LOCAL_RANK") == "1"]
        return (ranks or found)[0]

    def wait(self, timeout_s: float) -> int:
        """Exit code; everything that is still there after the time is killed first."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def kill(self) -> None:
        for process in [*self.descendants()]:
            process.kill()
        self.process.kill()
        self.process.wait()


def start(run_dir: Path, *overrides: str) -> Run:
    errors = run_dir.parent / "stderr.txt"
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "megatron_sdpo.cli",
                "train",
                "minipipe",
                f"--run-dir={run_dir}",
                f"steps={STEPS}",
                "checkpoint.every=2",
                "evaluation.every=8",
                "teacher.kind=ema",
                *overrides,
            ],
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    return Run(process, errors)


def until(condition: Callable[[], bool], run: Run, timeout_s: float = 180) -> None:
    """Poll for something that the run does; fails at once when the run ends before."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert run.process.poll() is None, f"the run ended early: {run.errors.read_text()}"
        assert time.monotonic() < deadline, "the run did not get there"
        time.sleep(0.05)


def last_step(run_dir: Path) -> int:
    rows = read_metrics(run_dir)
    return int(rows[-1]["step"] or 0) if rows else -1


def journal(run_dir: Path) -> dict[str, list[str]]:
    """File name -> whole lines."""
    return {p.name: p.read_text().split("\n")[:-1] for p in sorted((run_dir / "attempts").glob("*.jsonl"))}


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=5)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []


@pytest.mark.timeout(600)
def test_killed_roles_end_the_run_and_the_same_command_continues(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    finished_before: dict[str, list[str]] = {}
    for role, step in (("engine-0", 1), ("coordinator", 3), ("trainer", 5)):
        run = start(run_dir)
        try:
            until(lambda step=step: last_step(run_dir) >= step, run)
            processes = run.descendants()
            assert len(processes) >= 6  # engine, its workers, coordinator, torchrun, two ranks
            killed_at = time.monotonic()
            run.role(role).kill()
            assert run.wait(30) == 1
            assert time.monotonic() - killed_at < 30
        finally:
            run.kill()
        message = run.errors.read_text()
        assert message.startswith(f"error: {role} "), message
        assert "Traceback" not in message
        assert_gone(processes)
        finished_before = journal(run_dir)
        assert finished_before
    run = start(run_dir)
    try:
        assert run.wait(240) == 0, run.errors.read_text()
    finally:
        run.kill()
    assert_complete(run_dir, finished_before)


def assert_complete(run_dir: Path, finished_before: dict[str, list[str]]) -> None:
    rows = read_metrics(run_dir)
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    assert [key for row in rows for key in row if measure(key) is None] == []
    for name, lines in finished_before.items():  # what was finished is still there, in place, unchanged
        assert journal(run_dir)[name][: len(lines)] == lines
    groups = [msgspec.json.decode(line, type=Group) for lines in journal(run_dir).values() for line in lines]
    assert sorted((g.step, g.slot) for g in groups) == [(step, slot) for step in range(STEPS) for slot in range(16)]
    assert all(a.weight_version == g.step for g in groups for a in g.attempts)  # on-policy, across the restarts
    first, last = rows[0]["eval/accuracy"], rows[-1]["eval/accuracy"]
    assert first is not None and last is not None
    assert first < 0.1 and last > 0.25
    assert max(row["sync/probe_gap"] or 0.0 for row in rows[1:]) <= 1e-4
    assert all((run_dir / name).is_file() for name in ("report.html", "curve.png", "hf/tokenizer.json"))
    exported = load_file(run_dir / "hf" / "model.safetensors")
    assert sum(t.numel() for t in exported.values()) == 371_040


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_command_itself_can_be_ended_and_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    run_dir = tmp_path / "run"
    run = start(run_dir)
    try:
        until(lambda: last_step(run_dir) >= 1, run)
        processes = run.descendants()
        run.process.send_signal(number)
        code = run.wait(30)
    finally:
        run.kill()
    assert_gone(processes)
    if number == signal.SIGTERM:
        assert code == 128 + signal.SIGTERM
        assert "continues from the last checkpoint" in run.errors.read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", ["pp2", "tp1", "tp2pp2"])
def test_other_layouts_learn_too(tmp_path: Path, layout: str) -> None:
    run_dir = tmp_path / "run"
    run = start(run_dir, f"--layout={layout}", "steps=12", "evaluation.every=12")
    try:
        assert run.wait(600) == 0, run.errors.read_text()
    finally:
        run.kill()
    assert (read_metrics(run_dir)[-1]["eval/accuracy"] or 0.0) > 0.5


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_emulated_fp8_learns_as_well(tmp_path: Path) -> None:
    """Student and teacher on block-quantised numbers, tensor parallel 2: within 2 points of the same run in fp32."""
    scores = []
    for name, fp8 in (("fp32", ()), ("fp8", ("fp8.student=emulated", "fp8.teacher=emulated"))):
        run_dir = tmp_path / name
        run = start(run_dir, *fp8, "steps=28", "evaluation.every=28", "teacher.kind=frozen")
        try:
            assert run.wait(800) == 0, run.errors.read_text()
        finally:
            run.kill()
        rows = read_metrics(run_dir)
        scores.append(rows[-1]["eval/accuracy"] or 0.0)
        assert ("precision/floor" in rows[1]) == (name == "fp8")
    assert scores[0] > 0.95 and scores[1] > scores[0] - 0.02


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_engines_behind_the_router(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run = start(run_dir, "--layout=tp1", "engine.count=2", "rollout.max_staleness=1")
    try:
        assert run.wait(400) == 0, run.errors.read_text()
    finally:
        run.kill()
    rows = read_metrics(run_dir)
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    assert max(row["sync/probe_gap"] or 0.0 for row in rows[1:]) <= 1e-4
    assert json.loads((run_dir / "config.json").read_text())["engine"]["count"] == 2
    served = [(run_dir / "logs" / f"engine-{i}.log").stat().st_size for i in range(2)]
    assert min(served) > 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_weights_that_leave_the_numbers_end_the_run_with_their_batch(tmp_path: Path) -> None:
    """The first of two optimizer steps is so long that the second has no gradient."""
    run_dir = tmp_path / "run"
    run = start(run_dir, "optim.mini_batches=2", "optim.lr=1e30", "evaluation.every=0")
    try:
        assert run.wait(300) == 1, run.errors.read_text()
    finally:
        run.kill()
    kept, message = run_dir / "failures" / "step-00000000.msgpack", run.errors.read_text()
    assert message.startswith("error: trainer ended with exit code 1") and "Traceback" not in message
    sentence = message.splitlines()[1]
    before = "training stopped at step 0, before an optimizer step: the gradient norm of the mini-batch of samples"
    named = re.match(rf"{before} (0/\d+/\d+),.* is nan, with finite losses;", sentence)
    assert sentence.endswith(f"as before that step; the batch is in {kept}")
    batch = msgspec.msgpack.decode(kept.read_bytes(), type=Batch)
    assert len(batch.samples) == 128 and named is not None and named[1] in {sample.id for sample in batch.samples}
