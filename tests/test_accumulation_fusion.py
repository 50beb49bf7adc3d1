"""Fused gradient accumulation: only where its kernel is, and refused where it is asked for without."""

from pathlib import Path
from typing import Literal

import pytest
import torch

from megatron_sdpo.config import ConfigError, LayoutConfig
from megatron_sdpo.hf_config import read_hf_config
from megatron_sdpo.mcore.model import transformer_config
from tests.learner_setup import write_models

Choice = Literal["auto", "on", "off"]


def _is_fused(folder: Path, choice: Choice) -> bool:
    layout = LayoutConfig(gradient_accumulation_fusion=choice)
    return transformer_config(read_hf_config(folder / "llama"), layout, torch.float32).gradient_accumulation_fusion


def test_without_the_kernel(tmp_path: Path) -> None:
    write_models(tmp_path, models={"llama": 2})
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, so the kernel whose absence this tests may be installed")
    assert not _is_fused(tmp_path, "auto") and not _is_fused(tmp_path, "off")
    with pytest.raises(ConfigError, match=r"install the extra apex with APEX_CPP_EXT=1 APEX_CUDA_EXT=1, or set layout"):
        _is_fused(tmp_path, "on")


def test_with_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of its name, and torch that says that there is a GPU: only the choice is tested, not the kernel."""
    write_models(tmp_path, models={"llama": 2})
    (tmp_path / "fused_weight_gradient_mlp_cuda.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert _is_fused(tmp_path, "auto") and _is_fused(tmp_path, "on") and not _is_fused(tmp_path, "off")
