"""megatron-sdpo convert, both ways: every bit of the weights arrives, and a target is complete or not there."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_sdpo import cli
from megatron_sdpo import config as configuration
from megatron_sdpo.config import LayoutConfig
from megatron_sdpo.hf_config import read_hf_config
from megatron_sdpo.mcore import checkpoint
from megatron_sdpo.mcore.groups import initialize, shutdown
from megatron_sdpo.mcore.hf import save_hf
from megatron_sdpo.mcore.model import build_model
from tests.dist_checkpoint import differences
from tests.launch import ROOT
from tests.learner_setup import learn, make_batch, make_config, make_learner, write_models
from tests.tiny_model import write_tiny_checkpoint

# Dies at the moment at which the target would appear.
KILLED_AT_RENAME = """
import os, signal, sys
from megatron_sdpo import cli
target = sys.argv[-1]
sys.addaudithook(lambda event, args: os.kill(os.getpid(), signal.SIGKILL)
                 if event == "os.rename" and str(args[1]) == target else None)
if __name__ == "__main__":
    cli.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hugging Face directories in fp32 (one with a tied head) and bf16."""
    folder = tmp_path_factory.mktemp("convert")
    write_models(folder)
    write_tiny_checkpoint(folder / "bf16", seed=5, layers=2, dtype=torch.bfloat16)
    return folder


@pytest.fixture(scope="module")
def run_dir(folder: Path) -> Path:
    """A run in fp32 from the bf16 model, checkpoints of steps 1 and 2; ``expected-N`` has the weights of step N."""
    run = folder / "run"
    run.mkdir()
    config = dataclasses.replace(make_config(folder / "bf16"), run_dir=str(run))
    configuration.save(config, run / "config.json")
    groups = initialize(LayoutConfig(), seed=0, timeout_s=60)
    learner = make_learner(config, groups)
    for step in (1, 2):
        learn(learner, make_batch(step))
        checkpoint.save(learner, run / "checkpoints", cursor=step, keep=2)
        save_hf(learner.model, folder / f"expected-{step}", groups, config.layout, folder / "bf16")
    shutdown()
    return run


def _weights(path: Path) -> dict[str, Tensor]:
    return load_file(path / "model.safetensors")


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Exit code 2 and one sentence, which is returned."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(["convert", *map(str, arguments)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error
    return error


@pytest.mark.parametrize("name", ["llama", "qwen3-tied", "bf16"])
def test_a_hugging_face_directory_becomes_a_checkpoint(
    folder: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "new" / "checkpoint"
    cli.main(["convert", str(folder / name), str(target)])
    assert f"{folder / name} was written to {target} as a Megatron checkpoint" in capsys.readouterr().out
    assert list(target.parent.iterdir()) == [target]
    layout, dtype = LayoutConfig(), torch.bfloat16 if name == "bf16" else torch.float32
    groups = initialize(layout, seed=0, timeout_s=60)
    model = build_model(read_hf_config(folder / name), layout, groups, dtype)
    checkpoint.load_model(model, target)
    save_hf(model, tmp_path / "back", groups, layout, folder / name)
    shutdown()
    assert differences(_weights(tmp_path / "back"), _weights(folder / name)) == []


@pytest.mark.parametrize("step", [None, 1, 2])
def test_a_run_becomes_a_hugging_face_directory(
    folder: Path, run_dir: Path, tmp_path: Path, step: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "new" / "model"
    cli.main(["convert", str(run_dir), str(target), *([] if step is None else ["--step", str(step)])])
    assert f"step-{step or 2:08d} was written to {target} in Hugging Face format" in capsys.readouterr().out
    expected = folder / f"expected-{step or 2}"
    assert sorted(p.name for p in target.iterdir()) == sorted(p.name for p in expected.iterdir())
    assert differences(_weights(target), _weights(expected)) == []
    assert read_hf_config(target) == read_hf_config(expected)
    assert read_hf_config(target)["torch_dtype"] == "float32"


def test_a_killed_conversion_leaves_no_target(folder: Path, run_dir: Path, tmp_path: Path) -> None:
    jobs = {tmp_path / "checkpoint": folder / "bf16", tmp_path / "model": run_dir}
    _kill_at_rename([(source, target) for target, source in jobs.items()], tmp_path / "worker.py")
    for target, source in jobs.items():
        assert not target.exists()
        assert [path for path in tmp_path.iterdir() if target.name in path.name], "nothing had been written yet"
        cli.main(["convert", str(source), str(target)])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "model", "worker.py"]
    assert differences(_weights(tmp_path / "model"), _weights(folder / "expected-2")) == []


def _kill_at_rename(jobs: Sequence[tuple[Path, Path]], script: Path) -> None:
    script.write_text(KILLED_AT_RENAME)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), "convert", str(source), str(target)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for source, target in jobs
    ]
    try:
        assert [worker.wait(timeout=120) for worker in workers] == [-signal.SIGKILL] * len(jobs)
    finally:
        for worker in workers:
            try:
                os.killpg(worker.pid, signal.SIGKILL)
            except ProcessLookupError:
                worker.wait()


def test_what_cannot_be_converted_is_refused(
    folder: Path, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, taken = tmp_path / "target", tmp_path / "taken"
    taken.mkdir()
    for source in (folder / "llama", run_dir):
        assert "taken exists already; choose a new directory" in _refused(capsys, source, taken)
    assert "neither a run directory nor a Hugging Face directory" in _refused(capsys, taken, target)
    words = _refused(capsys, run_dir, target, "--step", "7")
    assert "has no complete checkpoint of step 7; there are: 1, 2" in words
    assert "has no steps; leave --step out" in _refused(capsys, folder / "llama", target, "--step", "7")
    (tmp_path / "file").touch()
    assert "cannot be written" in _refused(capsys, folder / "llama", tmp_path / "file" / "target")
    (taken / "config.json").write_text("{")
    assert "config.json is not JSON" in _refused(capsys, taken, target)
    assert not target.exists()
    assert list(taken.iterdir()) == [taken / "config.json"]


def test_a_directory_that_lacks_a_tensor_is_refused_by_its_name(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "llama", tmp_path / "broken")
    tensors = _weights(tmp_path / "broken")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "broken" / "model.safetensors")
    assert "model.layers.1.mlp.up_proj.weight" in _refused(capsys, tmp_path / "broken", tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]
