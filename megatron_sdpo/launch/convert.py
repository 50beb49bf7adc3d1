"""Weights from one format to the other, in one process."""

import json
from pathlib import Path

import torch

from megatron_sdpo import config as configuration
from megatron_sdpo.config import ConfigError, LayoutConfig
from megatron_sdpo.mcore import checkpoint
from megatron_sdpo.mcore import groups as parallel
from megatron_sdpo.mcore.hf import load_hf, save_hf
from megatron_sdpo.mcore.model import build_model, read_hf_config


def convert_checkpoint(source: Path, target: Path, step: int | None) -> str:
    """Direction by what ``source`` is; a sentence on what was written. The target appears complete or not at all.

    A run directory becomes a Hugging Face directory (``step``: which of its checkpoints, default the newest); a
    Hugging Face directory becomes a sharded Megatron checkpoint of its weights.
    """
    if target.exists():
        raise ConfigError(f"{target} exists already; choose a new directory")
    if not (source / "config.json").is_file():
        raise ConfigError(f"{source} is neither a run directory nor a Hugging Face directory: it has no config.json")
    layout = LayoutConfig()
    is_run = "run_dir" in json.loads((source / "config.json").read_text())
    model_path = configuration.load(source / "config.json").model.path if is_run else str(source)
    hf_config = read_hf_config(model_path)
    groups = parallel.initialize(layout, seed=0, timeout_s=600)
    try:
        model = build_model(hf_config, layout, groups, _dtype(hf_config))
        if is_run:
            path = checkpoint.find(source / "checkpoints", step)
            checkpoint.load_model(model, path)
            save_hf(model, target, groups, layout, model_path)
            return f"{path} was written to {target} in Hugging Face format"
        load_hf(model, source, groups, layout)
        checkpoint.save_model(model, target)
        return f"{source} was written to {target} as a Megatron checkpoint"
    finally:
        parallel.shutdown()


def _dtype(hf_config: dict[str, object]) -> torch.dtype:
    return getattr(torch, str(hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32"))
