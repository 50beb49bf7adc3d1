"""A mixture of experts trains under every layout as in one process; what its configuration may say."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_sdpo.config import ConfigError, LayoutConfig
from megatron_sdpo.hf_config import read_hf_config
from megatron_sdpo.mcore import checkpoint
from megatron_sdpo.mcore.groups import ParallelGroups, initialize, shutdown
from megatron_sdpo.mcore.hf import load_hf
from megatron_sdpo.mcore.model import build_model
from megatron_sdpo.mcore.streaming import export_hf
from tests.dist_checkpoint import differences
from tests.dist_family import cases_of, continue_from, train_cases
from tests.launch import run_ranks
from tests.learner_setup import write_models
from tests.tiny_model import write_tiny_checkpoint

MODEL = "qwen3_moe"
LAYOUTS = ("tp2pp1dp1", pytest.param("tp1pp2dp1", marks=pytest.mark.slow))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    write_models(folder, models={MODEL: 2})
    return folder


@pytest.fixture(scope="module")
def groups() -> Iterator[ParallelGroups]:
    """This process alone."""
    yield initialize(LayoutConfig(), seed=0, timeout_s=60)
    shutdown()


@pytest.fixture(scope="module")
def single(folder: Path, groups: ParallelGroups) -> dict[str, list[dict[str, float]]]:
    return train_cases(folder, MODEL, groups, LayoutConfig(), folder / "single", cases_of(MODEL))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_train_save_and_publish_as_one(
    folder: Path, groups: ParallelGroups, single: dict[str, list[dict[str, float]]], layout: str
) -> None:
    run_ranks("dist_family.py", 2, [layout, str(folder), MODEL], timeout=200)
    out, source = folder / layout, load_file(folder / MODEL / "model.safetensors")
    for case, found in torch.load(out / f"{MODEL}.pt").items():
        for ours, theirs in zip(found, single[case], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-9), case
        one, two = (load_file(path / MODEL / case / "model.safetensors") for path in (folder / "single", out))
        assert one.keys() == two.keys() == source.keys()
        moved, apart = (
            math.sqrt(sum((one[name].double() - other[name].double()).pow(2).sum().item() for name in one))
            for other in (source, two)
        )
        assert apart <= 1e-5 * moved, case
    sent: dict[str, Any] = {}
    for part in sorted(out.glob("*-sent-*.pt")):
        sent |= torch.load(part)
    assert differences(sent, source) == []
    saved = out / "checkpoints" / MODEL
    weights, metrics = continue_from(folder, MODEL, saved, groups, LayoutConfig(), out / "continued")
    expected_weights, expected_metrics = torch.load(out / f"{MODEL}-continued.pt")
    assert differences(weights, expected_weights) == []
    hf, converted = read_hf_config(folder / MODEL), out / f"{MODEL}-converted"
    export_hf(checkpoint.find(saved, None), hf, torch.float32, groups, converted, folder / MODEL, lambda _: None)
    assert differences(load_file(converted / "model.safetensors"), expected_weights) == []
    assert metrics == pytest.approx(expected_metrics, rel=1e-5, abs=1e-9)


def test_no_auxiliary_loss_is_added(folder: Path, groups: ParallelGroups) -> None:
    """The checkpoint's router_aux_loss_coef is of its pre-training."""
    hf = read_hf_config(folder / MODEL)
    assert hf["router_aux_loss_coef"] > 0
    config = build_model(hf, LayoutConfig(), groups, torch.float32).config
    assert (config.moe_router_load_balancing_type, config.moe_aux_loss_coeff, config.moe_z_loss_coeff) == (
        "none",
        0,
        None,
    )


def test_weights_of_chosen_experts_may_be_left_as_they_are(tmp_path: Path, groups: ParallelGroups) -> None:
    """norm_topk_prob changes the model, and both ways load."""
    path = write_tiny_checkpoint(tmp_path / "model", seed=3, family="qwen3_moe", kv_heads=2)
    settings = json.loads((path / "config.json").read_text())
    scales = []
    for normalised in (True, False):
        (path / "config.json").write_text(json.dumps(settings | {"norm_topk_prob": normalised}))
        model = build_model(read_hf_config(path), LayoutConfig(), groups, torch.float32)
        load_hf(model, path, groups, LayoutConfig())
        layer: Any = model.decoder.layers[0]
        probs_TE, _ = layer.mlp.router(torch.randn(5, 1, 96, generator=torch.Generator().manual_seed(1)))
        scales.append(probs_TE.sum(1))
    torch.testing.assert_close(scales[0], torch.ones(5))
    assert (scales[1] < 0.999).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]"),
        ({"norm_topk_prob": None}, "does not say norm_topk_prob"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9; it must lie between 2 and num_experts=8"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok=1; it must lie between 2"),
        (
            {"shared_expert_intermediate_size": 32},
            "shared_expert_intermediate_size=32, which this package does not know",
        ),
        ({"num_local_experts": 4}, "num_experts and num_local_experts, which differ"),
    ],
)
def test_experts_that_are_not_built_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = write_tiny_checkpoint(tmp_path / "model", seed=1, family="qwen3_moe")
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | change))
    with pytest.raises(ConfigError, match=words):
        read_hf_config(path)


def test_transformers_newer_spelling_is_the_same_model(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path / "model", seed=1, family="qwen3_moe")
    before = read_hf_config(path)
    settings = json.loads((path / "config.json").read_text())
    settings["num_local_experts"] = settings.pop("num_experts")
    (path / "config.json").write_text(json.dumps(settings))
    assert read_hf_config(path) == before


def test_a_dense_model_has_no_experts(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path / "model", seed=1, family="qwen3")
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | {"num_experts": 8}))
    with pytest.raises(ConfigError, match="num_experts=8, which this package does not know"):
        read_hf_config(path)
