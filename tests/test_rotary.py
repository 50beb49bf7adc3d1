"""Rotary frequencies: equal to transformers' to the bit, and to Megatron's where Megatron can express them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from megatron_sdpo.hf_config import read_hf_config
from megatron_sdpo.mcore import platform
from megatron_sdpo.mcore.rotary import inverse_frequencies
from tests.hf_reference import rotary_frequencies
from tests.public_configs import DENSE

SCALED = [name for name in DENSE if name.startswith("Llama-3")]
SHORT = {"factor": 3.0, "low_freq_factor": 1.5, "high_freq_factor": 6.0, "original_max_position_embeddings": 64}


def _written(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _newer(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers 5 spells it."""
    rest = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")}
    scaling = config["rope_scaling"] or {"rope_type": "default"}
    return rest | {"rope_parameters": {**scaling, "rope_theta": config["rope_theta"]}}


@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize("changes", [{}, SHORT])
@pytest.mark.parametrize("name", [*SCALED, "Qwen3-0.6B"])
def test_frequencies_are_those_of_transformers(
    tmp_path: Path, name: str, changes: dict[str, float], newer: bool
) -> None:
    config = DENSE[name][0]
    if config["rope_scaling"]:
        config = config | {"rope_scaling": config["rope_scaling"] | changes}
    path = _written(tmp_path, _newer(config) if newer else config)
    ours = inverse_frequencies(read_hf_config(path))
    assert torch.equal(ours, rotary_frequencies(path))
    assert read_hf_config(path)["rope_theta"] == config["rope_theta"]


@pytest.mark.parametrize("name", SCALED)
def test_frequencies_are_megatrons_at_its_fixed_numbers(tmp_path: Path, name: str) -> None:
    platform.redirect_megatron()
    hf = read_hf_config(_written(tmp_path, DENSE[name][0]))
    d = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    theirs = RotaryEmbedding(
        d,
        1.0,
        rotary_base=hf["rope_theta"],
        rope_scaling=True,
        rope_scaling_factor=hf["rope_scaling"]["factor"],
        use_cpu_initialization=True,
    )
    torch.testing.assert_close(inverse_frequencies(hf), theirs.inv_freq, rtol=1e-6, atol=0)
    hf["rope_scaling"] = hf["rope_scaling"] | SHORT  # which Megatron has no argument for
    assert not torch.allclose(inverse_frequencies(hf), theirs.inv_freq)
