"""A deterministic run, killed on its way and continued, is to the bit the run that nobody disturbed."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from megatron_sdpo.mcore import checkpoint, manifest
from megatron_sdpo.tracking import read_metrics
from megatron_sdpo.types import Group
from tests.dist_checkpoint import differences
from tests.test_end_to_end import Run, assert_gone, journal, start, until

STEPS, KILLED_IN = 6, 4
SETTINGS = (
    *(
        "--deterministic",
        "--layout=tp1",
        "engine.start_timeout_s=600",
        f"steps={STEPS}",
        "rollout.prompts_per_step=4",
        "rollout.attempts_per_prompt=4",
    ),
    *(
        "checkpoint.every=2",
        "checkpoint.keep=9",
        "evaluation.every=3",
        "evaluation.questions=6",
        "evaluation.attempts=2",
    ),
)


def finished(run: Run) -> None:
    try:
        assert run.wait(400) == 0, run.errors.read_text()
    finally:
        run.kill()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_and_continued_equals_straight(tmp_path: Path) -> None:
    straight, resumed = tmp_path / "straight" / "run", tmp_path / "resumed" / "run"
    for run_dir in (straight, resumed):
        run_dir.parent.mkdir()
    finished(start(straight, *SETTINGS))
    run = start(resumed, *SETTINGS)
    try:  # in the middle of a step's generation, one step after a checkpoint
        until(lambda: len(journal(resumed).get(f"step-{KILLED_IN:08d}.jsonl", [])) > 0, run, timeout_s=400)
        processes = run.descendants()
    finally:
        run.kill()
    assert_gone(processes)
    begun = len(journal(resumed)[f"step-{KILLED_IN:08d}.jsonl"])
    assert 0 < begun < 4 and not (resumed / "hf").exists()
    finished(start(resumed, *SETTINGS))
    assert (resumed / "logs" / "earlier-1").is_dir()
    assert_same(straight, resumed)


def assert_same(a: Path, b: Path) -> None:
    """Attempts, metrics but for times, checkpoints."""
    assert attempts(a) == attempts(b)
    assert len(attempts(a)) == 4 * STEPS
    assert [untimed(row) for row in read_metrics(a)] == [untimed(row) for row in read_metrics(b)]
    ours, theirs = (load_file(path / "hf" / "model.safetensors") for path in (a, b))
    assert differences(ours, theirs) == []
    assert checkpoint.steps(a / "checkpoints") == checkpoint.steps(b / "checkpoints") == [2, 4, 6]
    for step in checkpoint.steps(a / "checkpoints"):
        ours, theirs = (saved(path / "checkpoints" / f"step-{step:08d}") for path in (a, b))
        assert differences(ours, theirs) == []


def attempts(run_dir: Path) -> dict[tuple[int, int], Group]:
    groups = [msgspec.json.decode(line, type=Group) for lines in journal(run_dir).values() for line in lines]
    return {(group.step, group.slot): group for group in groups}


def saved(folder: Path) -> dict[str, Any]:
    """Every tensor and generator, as digests of their files, and the rest, but for how far the coordinator was."""
    found = manifest.read(folder)
    assert found is not None
    common = torch.load(folder / "common.pt")
    del common["progress"]["journal"]
    digests = {name: digest for name, digest in found.files.items() if name.endswith(".distcp")}
    assert digests and common["history"]["rewards"]
    return digests | common


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value for key, value in row.items() if not key.startswith(("time/", "perf/")) and key != "sync/seconds"
    }
