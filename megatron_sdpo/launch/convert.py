"""Weights from one format to the other, in one process."""

import json
from pathlib import Path
from typing import Any

import torch

from megatron_sdpo import config as configuration
from megatron_sdpo.config import ConfigError, LayoutConfig
from megatron_sdpo.hf_config import read_hf_config
from megatron_sdpo.mcore import checkpoint
from megatron_sdpo.mcore import groups as parallel
from megatron_sdpo.mcore.groups import ParallelGroups
from megatron_sdpo.mcore.hf import load_hf, save_hf
from megatron_sdpo.mcore.model import build_model

_WHOLE = LayoutConfig()


def convert_checkpoint(source: Path, target: Path, step: int | None) -> str:
    """Direction by what ``source`` is; a sentence on what was written. The target appears complete or not at all.

    A run directory becomes a Hugging Face directory (``step``: which of its checkpoints, default the newest), in the
    dtype that the run trains; a Hugging Face directory becomes a sharded Megatron checkpoint of its weights, in the
    dtype that its config.json states. Weights keep every bit. ConfigError for what cannot be converted.
    """
    settings = _settings(source)
    is_run = "run_dir" in settings
    if step is not None and not is_run:
        raise ConfigError(f"{source} is a Hugging Face directory and has no steps; leave --step out")
    _check_target(target)
    found = checkpoint.find(source / "checkpoints", step) if is_run else None
    groups = parallel.initialize(_WHOLE, seed=0, timeout_s=600)
    try:
        return _from_run(source, found, target, groups) if found else _from_hf(source, target, groups)
    finally:
        parallel.shutdown()


def _from_run(run_dir: Path, found: Path, target: Path, groups: ParallelGroups) -> str:
    model_config = configuration.load(run_dir / "config.json").model
    model = build_model(read_hf_config(model_config.path), _WHOLE, groups, getattr(torch, model_config.dtype))
    checkpoint.load_model(model, found)
    save_hf(model, target, groups, _WHOLE, model_config.path)
    return f"{found} was written to {target} in Hugging Face format"


def _from_hf(source: Path, target: Path, groups: ParallelGroups) -> str:
    hf_config = read_hf_config(source)
    dtype = getattr(torch, hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32")
    model = build_model(hf_config, _WHOLE, groups, dtype)
    try:
        load_hf(model, source, groups, _WHOLE)
    except ValueError as error:  # names the tensor that is wrong
        raise ConfigError(str(error)) from error
    checkpoint.save_model(model, target)
    return f"{source} was written to {target} as a Megatron checkpoint"


def _settings(source: Path) -> dict[str, Any]:
    file = source / "config.json"
    if not file.is_file():
        raise ConfigError(f"{source} is neither a run directory nor a Hugging Face directory: it has no config.json")
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file} is not JSON (line {error.lineno}: {error.msg})") from error


def _check_target(target: Path) -> None:
    if target.exists():
        raise ConfigError(f"{target} exists already; choose a new directory")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{target} cannot be written ({error.strerror}); choose another directory") from error
