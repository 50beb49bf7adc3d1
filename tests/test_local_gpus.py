"""Which GPUs of one machine are the trainer's and which the engines'."""

from pathlib import Path

import pytest
import torch

from megatron_sdpo.config import ConfigError, apply_overrides
from megatron_sdpo.launch.local import first_gpu_of_engines, gpus_here, gpus_of_torch
from megatron_sdpo.rollout.fleet import Fleet, Share
from recipes import recipe

BASE = ("layout.tensor_parallel=2", "layout.world_size=4", "engine.count=2", "engine.tensor_parallel=2")


@pytest.mark.parametrize(
    ("gpus", "overrides", "first"),
    [
        (0, (), 0),
        (8, (), 4),
        (16, (), 4),
        (4, ("publish.backend=gloo",), 0),
        (4, ("publish.backend=ipc",), 0),
        (8, ("publish.backend=ipc",), 4),
        (8, ("publish.backend=ipc", "engine.release_memory=true"), 0),
        (2, ("debug.rollout_only=true",), 0),
    ],
)
def test_engines_follow_the_trainer(gpus: int, overrides: tuple[str, ...], first: int) -> None:
    config = apply_overrides(recipe("minipipe"), [*BASE, *overrides])
    assert first_gpu_of_engines(config, gpus) == first


@pytest.mark.parametrize(("gpus", "overrides"), [(7, ()), (4, ()), (3, ("publish.backend=ipc",))])
def test_too_few_are_refused(gpus: int, overrides: tuple[str, ...]) -> None:
    config = apply_overrides(recipe("minipipe"), [*BASE, *overrides])
    with pytest.raises(ConfigError, match=rf"4 trainer rank.* 4 GPU.* more than the {gpus} GPU.* publish\.backend=ipc"):
        first_gpu_of_engines(config, gpus)


def test_nccl_without_gpus_is_refused() -> None:
    config = apply_overrides(recipe("minipipe"), [*BASE, "publish.backend=nccl"])
    assert first_gpu_of_engines(config, 8) == 4
    with pytest.raises(ConfigError, match="torch sees none here; set it to auto"):
        first_gpu_of_engines(config, 0)


def test_an_engine_is_told_its_gpu(tmp_path: Path) -> None:
    config = apply_overrides(recipe("minipipe"), list(BASE))
    fleet = Fleet(config, tmp_path, "token", Share(range(2), "127.0.0.1", first_gpu=4))
    told = [next(a for a in fleet._engine_arguments(i, 20_000) if "base-gpu-id" in a) for i in range(2)]
    assert told == ["--base-gpu-id=4", "--base-gpu-id=6"]


def test_what_the_environment_hides_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    for visible, count in (("", 0), ("-1", 0), ("3", 1), ("0,1,5", 3)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert gpus_here() == count


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU that torch uses: here the case is one that it does not")
def test_gpus_that_torch_cannot_use_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert gpus_here() == 2 and gpus_of_torch() == 0
