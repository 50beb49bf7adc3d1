"""A whole discovery on real parts, killed outright on its way and continued by the same command."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import psutil
import pytest

from megatron_sdpo.discovery.record import TrialFiles
from megatron_sdpo.types import Group
from tests.launch import ROOT
from tests.test_end_to_end import assert_gone

QUESTIONS = (  # the first takes several steps, so that a kill finds its trial on the way
    {
        "id": "hard/0",
        "prompt": "keep over 1, reverse, sort, item 2",
        "payload": {"operations": [["gt", 1], ["rev", None], ["sort", None], ["item", 2]]},
    },
    {"id": "easy/1", "prompt": "keep over 2, sum", "payload": {"operations": [["gt", 2], ["sum", None]]}},
)


def start(run_dir: Path, layout: str, *overrides: str) -> subprocess.Popen[bytes]:
    questions = run_dir.parent / "questions.jsonl"
    questions.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    command = [sys.executable, "-m", "megatron_sdpo.cli", "discover", "minipipe-discovery", "--layout", layout]
    command += ["--questions", str(questions), "--run-dir", str(run_dir), "engine.start_timeout_s=600"]
    command += ["discovery.budget=48", "discovery.best_of_k_samples=50", "discovery.seeds=2"]
    command += ["discovery.multi_turn_memory=[3]", *overrides]
    with (run_dir.parent / "output.txt").open("ab") as output:
        return subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )


def journalled(run_dir: Path, method: str) -> dict[str, bytes]:
    """File name -> content of a method's journal."""
    return {path.name: path.read_bytes() for path in sorted((run_dir / "attempts" / method).glob("*.jsonl"))}


def kill_when(run_dir: Path, layout: str, method: str, files: int) -> None:
    """Start, and kill the command and nothing else once the method has so many journal files."""
    run = start(run_dir, layout)
    try:
        deadline = time.monotonic() + 900
        while len(journalled(run_dir, method)) < files:
            assert run.poll() is None, (run_dir.parent / "output.txt").read_text()
            assert time.monotonic() < deadline, "the run did not get there"
            time.sleep(0.02)
        roles = psutil.Process(run.pid).children(recursive=True)
        run.send_signal(signal.SIGKILL)
        run.wait()
        assert_gone(roles)
    finally:
        run.kill()


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("layout", ["tp1", "tp2"])
def test_a_killed_discovery_goes_on_where_it_was(tmp_path: Path, layout: str) -> None:
    run_dir = tmp_path / "run"
    kill_when(run_dir, layout, "multi_turn-3", files=1)
    kill_when(run_dir, layout, "sdpo", files=3)
    before = {m: journalled(run_dir, m) for m in ("best_of_k", "multi_turn-3", "sdpo")}
    finished = {path.name: path.read_bytes() for path in (run_dir / "trials").glob("*.json")}
    run = start(run_dir, layout)
    assert run.wait(1200) == 0, (run_dir.parent / "output.txt").read_text()
    for method, files in before.items():  # nothing was lost, nothing sampled a second time
        for name, content in files.items():
            assert journalled(run_dir, method)[name].startswith(content.rpartition(b"\n")[0])
    for name, content in finished.items():
        assert (run_dir / "trials" / name).read_bytes() == content
    check_trials(run_dir)
    assert all((run_dir / name).is_file() for name in ("discovery.json", "discovery.png", "discovery.html"))


def check_trials(run_dir: Path) -> None:
    trials = TrialFiles(run_dir / "trials").all()
    ids = [(t.id.method, t.id.seed, t.id.question) for t in trials]
    both = [(seed, question) for seed in (0, 1) for question in (0, 1)]
    assert ids == [("best_of_k", 0, 0), ("best_of_k", 0, 1)] + [(m, *p) for m in ("multi_turn-3", "sdpo") for p in both]
    assert [t.attempts for t in trials[:2]] == [50, 50]
    versions: list[float] = []
    for trial in (t for t in trials if t.id.method == "sdpo"):
        groups = [
            msgspec.json.decode(
                (run_dir / "attempts" / "sdpo" / f"step-{int(step['version']):08d}.jsonl").read_bytes(), type=Group
            )
            for step in trial.steps
        ]
        rewards = [verdict.reward for group in groups for verdict in group.verdicts]
        assert len(rewards) == trial.attempts
        first = rewards.index(1.0) + 1 if 1.0 in rewards else None
        assert first == trial.first_success
        assert first is None or (trial.attempts - 8 < first <= trial.attempts)  # stopped with the group that succeeded
        for step, group in zip(trial.steps, groups, strict=True):
            assert {attempt.weight_version for attempt in group.attempts} == {int(step["version"])}
        assert all("loss/total" in step for step in trial.steps[:-1]) and "loss/total" not in trial.steps[-1]
        versions += [step["version"] for step in trial.steps]
    assert versions == sorted(set(versions))
