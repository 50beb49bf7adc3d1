"""megatron-sdpo convert, both ways: every bit of the weights arrives, and a target is complete or not there."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_sdpo import cli
from megatron_sdpo import config as configuration
from megatron_sdpo.config import LayoutConfig
from megatron_sdpo.fp8_format import KEY, is_quantized, quantization_config, scale_name
from megatron_sdpo.hf_config import read_hf_config
from megatron_sdpo.mcore import checkpoint, names
from megatron_sdpo.mcore.groups import initialize, shutdown
from megatron_sdpo.mcore.hf import HfCheckpoint, save_hf
from megatron_sdpo.mcore.model import build_model
from megatron_sdpo.mcore.safetensors_writer import SafetensorsWriter
from megatron_sdpo.quantization import CODES, of_blocks
from megatron_sdpo.reshard.quantize import quantized
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
    write_tiny_checkpoint(folder / "qwen3_moe", seed=6, family="qwen3_moe", kv_heads=2)
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


@pytest.mark.parametrize("name", ["llama", "qwen3-tied", "bf16", "qwen3_moe"])
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
    checkpoint.save_model(model, tmp_path / "megatrons")
    shutdown()
    assert differences(_weights(tmp_path / "back"), _weights(folder / name)) == []
    assert _described(target) == _described(tmp_path / "megatrons")


def _described(checkpoint: Path) -> dict[str, Any]:
    """Everything that a sharded checkpoint says of its content, but where the bytes are."""
    found: dict[str, Any] = {
        name: (stored.size, stored.properties.dtype, sorted((c.offsets, c.sizes) for c in stored.chunks))
        if isinstance(stored, TensorStorageMetadata)
        else type(stored)
        for name, stored in FileSystemReader(checkpoint).read_metadata().state_dict_metadata.items()
    }
    return {
        **found,
        "format": (checkpoint / "metadata.json").read_text(),
        "common": torch.load(checkpoint / "common.pt"),
    }


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


@pytest.mark.parametrize("source", ["run", "llama", "qwen3_moe", "qwen3-tied", "bf16"])
def test_either_becomes_a_directory_in_fp8(
    folder: Path, run_dir: Path, tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The codes and scales that publishing sends, in a directory that safetensors and an engine can read."""
    target = tmp_path / "new" / "in-fp8"
    cli.main(["convert", "--fp8", str(folder / source), str(target)])
    said_then = capsys.readouterr().out
    assert f"was written to {target} in Hugging Face format, FP8" in said_then
    plain = folder / "expected-2" if source == "run" else folder / source
    hf_config, exact = read_hf_config(plain), _weights(plain)
    assert ("evaluate and serve will refuse it" in said_then) == (hf_config["model_type"] == "llama")
    sent, found = dict(quantized(hf_config, 0, list(exact.items()))), _weights(target)
    assert differences(found, sent) == []
    codes = [name for name, tensor in found.items() if tensor.dtype == CODES]
    assert set(codes) == {name for name in exact if is_quantized(name, hf_config["num_hidden_layers"], 0)}
    for name in codes:
        back = of_blocks(found[name], found[scale_name(name)])
        assert (back - exact[name].float()).abs().max() <= exact[name].float().abs().max() / 16, name
    said = json.loads((target / "config.json").read_text())
    assert said[KEY] == quantization_config(hf_config, 0)
    assert read_hf_config(target, fp8=True) == {**hf_config, KEY: said[KEY]}
    assert {p.name for p in target.iterdir()} == {p.name for p in plain.iterdir()}
    words = _refused(capsys, target, tmp_path / "again")
    assert "is of a checkpoint in FP8, which engines alone can use" in words


def test_layers_can_stay_out_of_fp8(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = folder / "qwen3-tied"
    cli.main(["convert", "--fp8", "--high-precision-layers=1", str(source), str(tmp_path / "kept")])
    layers = read_hf_config(source)["num_hidden_layers"]
    kept = {name.split(".")[2] for name, tensor in _weights(tmp_path / "kept").items() if tensor.dtype == CODES}
    assert kept == {str(layer) for layer in range(1, layers - 1)}
    target = tmp_path / "target"
    assert "2 layers at each end leave none of 4" in _refused(
        capsys, "--fp8", f"--high-precision-layers={layers // 2}", source, target
    )
    assert "--high-precision-layers is about FP8; add --fp8" in _refused(
        capsys, "--high-precision-layers=1", source, target
    )
    assert not target.exists()


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


def test_half_a_directory_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file cut short, one that the index names and nobody has written, and one of another shape."""
    source = tmp_path / "source"
    shutil.copytree(folder / "llama", source)
    whole = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors is not a whole safetensors file" in _refused(capsys, source, tmp_path / "target")
    (source / "model.safetensors").write_bytes(whole)
    weight_map = dict.fromkeys(_weights(source), "model.safetensors") | {"lm_head.weight": "model-2.safetensors"}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "has no model-2.safetensors, which its" in _refused(capsys, source, tmp_path / "target")
    (source / "model.safetensors.index.json").unlink()
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(settings | {"intermediate_size": 82}))
    assert "its config says (82, 48)" in _refused(capsys, source, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_checkpoint_of_another_model_is_refused(
    folder: Path, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    config = configuration.load(run_dir / "config.json")
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(folder / "llama")))
    configuration.save(other, tmp_path / "run" / "config.json")
    assert "of shape (104, 96), the run's model (104, 48)" in _refused(capsys, tmp_path / "run", tmp_path / "target")
    assert not (tmp_path / "target").exists()
    part = next((tmp_path / "run" / "checkpoints" / "step-00000002").glob("*.distcp"))
    part.unlink()
    configuration.save(config, tmp_path / "run" / "config.json")
    assert part.name in _refused(capsys, tmp_path / "run", tmp_path / "target")
    assert not (tmp_path / "target").exists()


# Peak resident memory of the process, libraries included, before and after a conversion.
MEASURED = """
import sys
from pathlib import Path
from megatron_sdpo.launch.convert import convert_checkpoint

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

if __name__ == "__main__":
    before = peak()
    print(convert_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), None))
    print("peak", before, peak())
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """1.3 GB of weights in three files, there and back; the largest parameters have 34 MB."""
    source, run = tmp_path / "source", tmp_path / "run"
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "layers": 20, "heads": 16, "kv_heads": 8, "head_dim": 64}
    _write_large(source, **sizes)
    run.mkdir()
    configuration.save(dataclasses.replace(make_config(source), run_dir=str(run)), run / "config.json")
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    assert size > 1.3e9
    for job in ((source, run / "checkpoints" / "step-00000001"), (run, tmp_path / "back")):
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, *map(str, job)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        before, peak = map(int, done.stdout.splitlines()[-1].split()[1:])
        print(f"{size / 1e9:.2f} GB of weights: {before / 1e6:.0f} MB before, at most {peak / 1e6:.0f} MB")
        assert peak - before < 0.4 * size  # pages of one of the three files, which the kernel frees when it likes to
    for file in sorted(source.glob("*.safetensors")):
        with (
            safe_open(file, framework="pt") as ours,
            safe_open(tmp_path / "back" / "model.safetensors", "pt") as theirs,
        ):
            for name in ours.keys():  # noqa: SIM118
                assert torch.equal(ours.get_tensor(name), theirs.get_tensor(name)), name


def _write_large(path: Path, **sizes: int) -> None:
    """A checkpoint as write_tiny_checkpoint makes, of these sizes, without holding it."""
    write_tiny_checkpoint(path, seed=1, vocab_size=8_000)
    settings = json.loads((path / "config.json").read_text())
    renamed = {"layers": "num_hidden_layers", "heads": "num_attention_heads", "kv_heads": "num_key_value_heads"}
    settings |= {renamed.get(key, key): value for key, value in sizes.items()}
    (path / "config.json").write_text(json.dumps(settings))
    (path / "model.safetensors").unlink()
    shapes = {name: tensor.shape for name, tensor in names.hf_layout(read_hf_config(path)).items()}
    with SafetensorsWriter(path, shapes, torch.float32, 500_000_000) as writer:
        for i, (name, shape) in enumerate(shapes.items()):
            writer.write(name, torch.randn(shape, generator=torch.Generator().manual_seed(i)))


def test_the_writer_is_read_by_safetensors(tmp_path: Path) -> None:
    shapes = {"a": (3, 5), "b": (7,), "c": (2, 2)}
    values = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    for most, files in (
        (1 << 30, ["model.safetensors"]),
        (30, [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]),
    ):
        folder = tmp_path / str(most)
        folder.mkdir()
        with SafetensorsWriter(folder, shapes, torch.bfloat16, most) as writer:
            for name in ("c", "a", "b"):
                writer.write(name, values[name])
        assert sorted(path.name for path in folder.glob("*.safetensors")) == files
        with HfCheckpoint(folder, {}) as found:
            assert found.keys() == values.keys()
            for name, value in values.items():
                assert torch.equal(found[name][:], value)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * (15 + 7 + 4)


def test_the_writer_refuses_what_it_was_not_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="b and 0 more were not written"):
        with SafetensorsWriter(tmp_path, {"a": (2,), "b": (2,)}, torch.float32, 1 << 30) as writer:
            writer.write("a", torch.zeros(2))
            for name, tensor, words in (
                ("a", torch.zeros(2), "a came twice"),
                ("c", torch.zeros(2), "c is not a tensor of this model"),
                ("b", torch.zeros(3), "b is torch.float32 of shape"),
                ("b", torch.zeros(2).bfloat16(), "b is torch.bfloat16"),
            ):
                with pytest.raises(ValueError, match=words):
                    writer.write(name, tensor)
