"""Recomputing activations changes memory and time, and no number."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_sdpo.config import ConfigError
from megatron_sdpo.mcore.groups import ParallelGroups
from tests.launch import run_ranks
from tests.learner_setup import make_batch, make_config, make_learner, write_models
from tests.recompute_setup import LAYERS, SETTINGS, calls_of_training, check_same, learner_of, long_batch, two_batches
from tools.live_memory import peak_bytes

MOST = {"core_attn": 0.96, "mlp": 0.75, "moe": 0.82, "layernorm": 0.95, "together": 0.85}
MOST |= {"uniform": 0.25, "uniform-2": 0.35, "block": 0.92}
"""Peak memory of a training pass, as a share of that without recomputation."""
TWO_RANKS = (
    *("tp2/llama/divided", "tp2/qwen3_moe/moe", "tp2-sp/llama/together", "pp2/llama/uniform-2", "pp2vp2/llama/block"),
    *("cp2/llama/core_attn", "cp2/llama/uniform", "dp2-overlap/llama/uniform"),
    *("dp2ep2-overlap/qwen3_moe/moe", "dp2ep2/qwen3_moe/uniform"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recompute")
    write_models(folder, models=LAYERS)
    return folder


def _again(setting: str, model: str) -> tuple[str, int]:
    """Which part of the layers is run more often, and how many times in all layers' one run."""
    if setting in ("divided", "uniform", "uniform-2"):
        return "layer", LAYERS[model]
    if setting == "block":
        return "layer", 1
    return ("core_attn" if setting == "together" else setting), LAYERS[model]


@pytest.mark.parametrize("setting", [s for s in SETTINGS if s not in ("none", "divided")])
def test_the_same_numbers_to_the_bit_and_less_memory(folder: Path, groups: ParallelGroups, setting: str) -> None:
    model = "qwen3_moe" if setting == "moe" else "llama"
    plain, again = (learner_of(folder, model, which, groups) for which in ("none", setting))
    check_same(setting, again, plain)
    batch, peaks = long_batch(), []
    for learner in (again, plain):
        student = learner.score_student(batch)
        teacher = learner.score_teacher(batch, student)
        peaks.append(peak_bytes(partial(learner.train, batch, student, teacher), torch.device("cpu")))
    assert peaks[0] <= MOST[setting] * peaks[1]

    part, runs = _again(setting, model)
    calls, calls_before = calls_of_training(again), calls_of_training(plain)
    assert calls[part] - calls_before[part] == 2 * runs  # two mini-batches
    assert calls_before["layer"] == 2 * LAYERS[model]


class Operations(TorchDispatchMode):
    """How many operations run that compute: those of a copied generator state do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += any(word in str(func) for word in ("mm", "attention", "norm", "silu", "mul", "add"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("setting", ["together", "mlp", "uniform", "block"])
def test_scoring_computes_nothing_again(folder: Path, groups: ParallelGroups, setting: str) -> None:
    batch, counts, peaks = make_batch(), [], []
    for which in (setting, "none"):
        learner = learner_of(folder, "llama", which, groups)
        student = learner.score_student(batch)
        with Operations() as operations:
            learner.score_teacher(batch, student)
        counts.append(operations.count)
        peaks.append(peak_bytes(partial(learner.score_teacher, batch, student), torch.device("cpu")))
    assert counts[0] == counts[1] > 0
    assert peaks[0] <= 1.01 * peaks[1]


@pytest.mark.parametrize(
    "ranks, arguments", [(2, TWO_RANKS), pytest.param(4, ("tp2pp2-sp/llama/uniform",), marks=pytest.mark.slow)]
)
def test_layouts_compute_again_what_one_process_computes_once(
    folder: Path, groups: ParallelGroups, ranks: int, arguments: tuple[str, ...]
) -> None:
    """Loss and gradient norm within 1e-5 of one process; the worker compares with the same layout without."""
    run_ranks("dist_recompute.py", ranks, [str(folder), *arguments], timeout=280)
    results = json.loads((folder / "results.json").read_text())
    assert list(results) == list(arguments)
    single = {model: two_batches(learner_of(folder, model, "none", groups))[0] for model in LAYERS}
    for argument, (metrics, calls, calls_before) in results.items():
        _, model, setting = argument.split("/")
        for ours, theirs in zip(metrics, single[model], strict=True):
            for key in ("loss/total", "optim/grad_norm"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-9), argument
        part, _ = _again(setting, model)
        more = calls[part] - calls_before.get(part, 0)
        assert more >= 1, argument
        if setting != "block":
            assert more == calls_before[part], argument


def test_what_the_modules_have_not_is_refused(folder: Path, groups: ParallelGroups) -> None:
    overrides = ("layout.recompute=selective", 'layout.recompute_modules=["moe_act"]')
    with pytest.raises(ConfigError, match="only Transformer Engine's grouped experts can compute again"):
        make_learner(make_config(folder / "qwen3_moe", overrides), groups)
