"""Save, die, load, go on: to the bit under the same layout, and elsewhere as near as another order of sums allows."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from megatron_sdpo.config import ConfigError, LayoutConfig
from megatron_sdpo.hf_config import read_hf_config
from megatron_sdpo.mcore import checkpoint
from megatron_sdpo.mcore.groups import ParallelGroups
from megatron_sdpo.mcore.hf import save_hf
from megatron_sdpo.mcore.learner import Learner
from megatron_sdpo.mcore.model import build_model
from tests.dist_checkpoint import CHANGES, RUNS, continue_elsewhere, differences, state_of
from tests.launch import ROOT, run_ranks
from tests.learner_setup import comparable, learn, make_batch, make_config, make_learner

KILLED_AT = ("writing", "renaming", "deleting", "background")


@pytest.fixture(scope="module")
def straight(folder: Path) -> Path:
    """The runs of dist_checkpoint.py, trained in one go and saved on the way."""
    run_ranks("dist_checkpoint.py", 2, ["straight", str(folder)], timeout=200)
    return folder


@pytest.fixture(scope="module")
def one_step(folder: Path, groups: ParallelGroups) -> Path:
    """A checkpoint folder after one batch."""
    learner = make_learner(make_config(folder / "llama"), groups, folder / "llama-teacher")
    learn(learner, make_batch(0))
    checkpoint.save(learner, folder / "one-step", cursor=3, keep=1)
    return folder / "one-step"


def _untaught(folder: Path, groups: ParallelGroups, *overrides: str) -> Learner:
    return make_learner(make_config(folder / "llama", overrides), groups)


def _check_continued(folder: Path, run: str, out: Path) -> None:
    """Weights arrive to the bit. What follows also depends on the teacher, and the last batch on Adam's moments."""
    assert differences(load_file(out / "model.safetensors"), load_file(folder / run / "hf" / "model.safetensors")) == []
    found, expected = (json.loads((path / "metrics.json").read_text()) for path in (out, folder / run))
    for ours, theirs in zip(found, expected, strict=True):
        assert comparable(ours) == pytest.approx(comparable(theirs), rel=1e-5, abs=1e-9)


def test_new_processes_continue_to_the_bit_and_under_other_layouts(straight: Path) -> None:
    run_ranks("dist_checkpoint.py", 2, ["resumed", str(straight)], timeout=200)
    for run, layout in CHANGES:
        _check_continued(straight, run, straight / run / layout)


def test_a_guard_that_has_seen_a_fall_goes_on_damping(straight: Path) -> None:
    """What new processes and other layouts are held to above, in the run that watches and in one that does not."""
    for run, damping in (("pp2", 0.1), ("divided", 0.1), ("dp2", 1.0)):
        metrics = json.loads((straight / run / "metrics.json").read_text())
        assert [m["optim/guard"] for m in metrics] == [damping, damping]


@pytest.mark.parametrize("run", RUNS)
def test_weights_alone_load_into_one_process(straight: Path, groups: ParallelGroups, tmp_path: Path, run: str) -> None:
    model_path = straight / RUNS[run][1]
    dtype = torch.bfloat16 if run.endswith("bf16") else torch.float32
    model = build_model(read_hf_config(model_path), LayoutConfig(), groups, dtype)
    checkpoint.load_model(model, checkpoint.find(straight / run / "checkpoints", 2))
    save_hf(model, tmp_path / "hf", groups, LayoutConfig(), model_path)
    found, expected = (load_file(path / "hf" / "model.safetensors") for path in (tmp_path, straight / run))
    assert differences(found, expected) == []


@pytest.mark.parametrize("run", ["tp2", "pp2", "divided"])
def test_one_process_continues_what_two_began(straight: Path, groups: ParallelGroups, run: str) -> None:
    continue_elsewhere(straight, run, groups, LayoutConfig(), straight / run / "single")
    _check_continued(straight, run, straight / run / "single")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_four_ranks_began_goes_on_under_four_two_and_one(folder: Path, groups: ParallelGroups) -> None:
    run = "tp2pp2"
    run_ranks("dist_checkpoint.py", 4, ["train", str(folder), run], timeout=200)
    for layout, ranks in (("pp4", 4), ("dp2-do", 2)):
        run_ranks("dist_checkpoint.py", ranks, ["continue", str(folder), run, layout], timeout=200)
    continue_elsewhere(folder, run, groups, LayoutConfig(), folder / run / "single")
    for out in ("pp4", "dp2-do", "single"):
        _check_continued(folder, run, folder / run / out)


def test_a_killed_writer_leaves_the_newest_complete_checkpoint(
    folder: Path, groups: ParallelGroups, one_step: Path, tmp_path: Path
) -> None:
    for point in KILLED_AT:
        shutil.copytree(one_step, tmp_path / point)
    _kill_writers(tmp_path, folder / "llama")
    assert checkpoint.steps(tmp_path / "writing") == [1]
    assert (tmp_path / "writing" / "step-00000002.writing").is_dir()
    assert checkpoint.steps(tmp_path / "renaming") == [1]
    assert (tmp_path / "renaming" / "step-00000002.writing" / "metadata.json").is_file()
    assert checkpoint.steps(tmp_path / "deleting") == [2]
    assert (tmp_path / "deleting" / "step-00000001.deleting").is_dir()
    writer = tmp_path / "background" / "writer"
    psutil.wait_procs([p for p in psutil.process_iter() if p.pid == int(writer.read_text())], timeout=10)
    assert not psutil.pid_exists(int(writer.read_text()))
    writer.unlink()
    assert checkpoint.steps(tmp_path / "background") == [1]
    assert (tmp_path / "background" / "step-00000002.writing").is_dir()
    for point, step in zip(KILLED_AT, (1, 1, 2, 1), strict=True):
        learner = _untaught(folder, groups)
        assert checkpoint.load_latest(learner, tmp_path / point) == checkpoint.Resumed(step, 3 * step)
        checkpoint.save(learner, tmp_path / point, cursor=3 * step, keep=1)  # over one that is there
        assert [path.name for path in (tmp_path / point).iterdir()] == [f"step-{step:08d}"]
        assert checkpoint.load_latest(learner, tmp_path / point) == checkpoint.Resumed(step, 3 * step)


def _kill_writers(folder: Path, model: Path) -> None:
    """One process for each point, at the same time; each must die by its own signal."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    writers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.dist_checkpoint", "killed", str(folder / point), str(model), point],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=(folder / f"{point}.txt").open("w"),
            start_new_session=True,
        )
        for point in KILLED_AT
    ]
    try:
        for point, writer in zip(KILLED_AT, writers, strict=True):
            assert writer.wait(timeout=150) == -signal.SIGKILL, (folder / f"{point}.txt").read_text()[-3000:]
    finally:
        for writer in writers:
            try:
                os.killpg(writer.pid, signal.SIGKILL)
            except ProcessLookupError:
                writer.wait()


def test_the_newest_are_kept(folder: Path, groups: ParallelGroups, tmp_path: Path) -> None:
    learner = _untaught(folder, groups)
    assert checkpoint.load_latest(learner, tmp_path / "none") is None
    for step in range(4):
        learn(learner, make_batch(step))
        path = checkpoint.save(learner, tmp_path, cursor=step, keep=2)
        assert path == tmp_path / f"step-{step + 1:08d}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]
    assert checkpoint.find(tmp_path, None).name == "step-00000004"
    assert checkpoint.find(tmp_path, 3).name == "step-00000003"
    with pytest.raises(ConfigError, match="no complete checkpoint of step 0; there are: 3, 4"):
        checkpoint.find(tmp_path, 0)
    with pytest.raises(ConfigError, match="no complete checkpoint; there are: none"):
        checkpoint.find(tmp_path / "none", None)


def test_bf16_weights_have_fp32_masters_which_the_teacher_follows(
    folder: Path, groups: ParallelGroups, tmp_path: Path
) -> None:
    overrides = ("model.dtype=bfloat16", "optim.lr=1e-5", "teacher.update_rate=0.25")
    learner = _untaught(folder, groups, *overrides)
    before = [master.detach().clone() for master in learner.weights.masters()]
    teacher = [weight.clone() for weight in learner.teacher.tensors]
    assert differences(teacher, before) == []
    metrics = learn(learner, make_batch(0))
    assert metrics["optim/grad_norm"] > 0
    unmoved = 0
    for parameter, master, old, taught in zip(
        learner.model.parameters(), learner.weights.masters(), before, learner.teacher.tensors, strict=True
    ):
        assert (parameter.dtype, master.dtype, taught.dtype) == (torch.bfloat16, torch.float32, torch.float32)
        assert torch.equal(parameter, master.bfloat16())
        torch.testing.assert_close(taught, 0.75 * old + 0.25 * master.detach(), rtol=0, atol=3e-7)
        unmoved += int((parameter == old.bfloat16()).sum() - (master == old).sum())
    assert unmoved > 0, "no master moved by less than its bf16 copy can show: the step is too large for this test"
    checkpoint.save(learner, tmp_path, cursor=3, keep=1)
    again = _untaught(folder, groups, *overrides)
    assert differences(state_of(again), state_of(learner)) != []
    assert checkpoint.load_latest(again, tmp_path) == checkpoint.Resumed(1, 3)
    assert differences(state_of(again), state_of(learner)) == []
    assert differences(again.weights.masters(), learner.weights.masters()) == []
