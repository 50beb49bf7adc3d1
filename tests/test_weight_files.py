"""What is wrong with a checkpoint's files, and too little room for a run, are told before anything is started."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_sdpo.config import ConfigError, apply_overrides
from megatron_sdpo.launch import preflight
from megatron_sdpo.launch.preflight import check_engines, check_run, checkpoint_bytes
from megatron_sdpo.launch.weight_files import INDEX, count_weights
from recipes.minipipe import BASE_MODEL, minipipe

ROOT = Path(__file__).parent.parent
WEIGHTS = 371_040
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1487160\n"
WHOLE = "model.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """MiniPipe's, in two files and an index."""
    shutil.copytree(BASE_MODEL, tmp_path / "model")
    whole = tmp_path / "model" / WHOLE
    tensors = load_file(whole)
    whole.unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, tmp_path / "model" / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
    (tmp_path / "model" / INDEX).write_text(json.dumps(index))
    return tmp_path / "model"


def test_weights_are_counted(model: Path) -> None:
    assert count_weights(Path(BASE_MODEL)) == count_weights(model) == WEIGHTS
    (model / "other.safetensors").write_text("of somebody else")  # the index does not name it
    assert count_weights(model) == WEIGHTS


def test_a_checkpoint_is_as_large_as_planned() -> None:
    config = minipipe()
    assert checkpoint_bytes(config) == 16 * WEIGHTS
    assert checkpoint_bytes(apply_overrides(config, ["objective.kind=grpo"])) == 12 * WEIGHTS


def cut(file: Path) -> None:
    os.truncate(file, 5000)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda file: file.unlink(), f"{INDEX} of .* names 1 file.s. that are not there, such as b.safetensors"),
        (lambda file: file.write_text(POINTER), r"b.safetensors \(72 bytes\) is not a safetensors file: Git LFS"),
        (lambda file: file.write_bytes(b""), r"b.safetensors \(0 bytes\) is not a safetensors file"),
        (lambda file: file.write_bytes(bytes([2, 0, 0, 0, 0, 0, 0, 0]) + b"[]"), "is not a safetensors file"),
        (cut, "b.safetensors has 5,000 bytes of [0-9,]+: it was cut; download the whole checkpoint"),
    ],
)
def test_files_that_are_not_whole_are_refused(model: Path, spoil: Callable[[Path], None], words: str) -> None:
    config = apply_overrides(minipipe(), [f"model.path={model}", f"run_dir={model.parent / 'run'}"])
    check_run(config)
    spoil(model / "b.safetensors")
    for check in (check_run, check_engines):
        with pytest.raises(ConfigError, match=words):
            check(config)


def test_a_run_directory_without_room_for_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = apply_overrides(minipipe(), [f"run_dir={tmp_path / 'run'}"])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage._replace(free=5_000_000))
    with pytest.raises(ConfigError, match=r"0.005 GB free, and one checkpoint takes 0.00594 GB; make room or set"):
        check_run(config)
    check_run(config, must_evaluate=True)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage._replace(free=0, total=0))
    check_run(config)  # a file system that does not tell


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_disk_that_gets_full_is_named(tmp_path: Path) -> None:
    """On a file system of 8 MB: two checkpoints, of which one is deleted when the other is whole, do not fit."""
    own = ["unshare", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=8m tmpfs {tmp_path}"
    if subprocess.run([*own, mount], capture_output=True).returncode:
        pytest.skip("this user may mount nothing")
    train = f"{sys.executable} -m megatron_sdpo.cli train minipipe --layout tp1 --run-dir {tmp_path}/run"
    train += " steps=8 checkpoint.every=1 evaluation.every=0"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*own, f"{mount} && exec {train}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 1
    assert f"The disk of {tmp_path}/run is full (" in done.stderr and "MB free): make room." in done.stderr
