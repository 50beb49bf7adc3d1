"""Weights from one format to the other, in one process that holds a layer of them at a time."""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_sdpo import config as configuration
from megatron_sdpo.config import ConfigError, LayoutConfig
from megatron_sdpo.hf_config import read_hf_config
from megatron_sdpo.mcore import checkpoint, streaming
from megatron_sdpo.mcore import groups as parallel
from megatron_sdpo.mcore.groups import ParallelGroups
from megatron_sdpo.mcore.streaming import Advance

_TEMPORARY = ".writing"


def convert_checkpoint(source: Path, target: Path, step: int | None) -> str:
    """Direction by what ``source`` is; a sentence on what was written. The target appears complete or not at all.

    A run directory becomes a Hugging Face directory (``step``: which of its checkpoints, default the newest), in the
    dtype that the run trains; a Hugging Face directory becomes a sharded Megatron checkpoint of its weights, in the
    dtype that its config.json states. Weights keep every bit. A parameter or a layer is in memory at a time, whatever
    the size of the model. ConfigError for what cannot be converted.
    """
    settings = _settings(source)
    is_run = "run_dir" in settings
    if step is not None and not is_run:
        raise ConfigError(f"{source} is a Hugging Face directory and has no steps; leave --step out")
    _check_target(target)
    found = checkpoint.find(source / "checkpoints", step) if is_run else None
    groups = parallel.initialize(LayoutConfig(), seed=0, timeout_s=600)
    try:
        return _from_run(source, found, target, groups) if found else _from_hf(source, target, groups)
    finally:
        parallel.shutdown()


def _from_run(run_dir: Path, found: Path, target: Path, groups: ParallelGroups) -> str:
    model_config = configuration.load(run_dir / "config.json").model
    model, dtype = Path(model_config.path), getattr(torch, model_config.dtype)
    hf_config = read_hf_config(model)
    size = streaming.total_bytes(hf_config, dtype)
    began = time.perf_counter()
    try:
        checkpoint.check_intact(found)
    except checkpoint.CheckpointError as error:
        raise ConfigError(str(error)) from error
    with _bar(size) as advance:
        streaming.export_hf(found, hf_config, dtype, groups, target, model, advance)
    return f"{found} was written to {target} in Hugging Face format{_amount(size, began)}"


def _from_hf(source: Path, target: Path, groups: ParallelGroups) -> str:
    hf_config = read_hf_config(source)
    dtype = getattr(torch, hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32")
    size = streaming.total_bytes(hf_config, dtype)
    began = time.perf_counter()
    temporary = target.with_name(target.name + _TEMPORARY)
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed conversion
    temporary.mkdir()
    try:
        with _bar(size) as advance:
            streaming.import_hf(source, hf_config, dtype, groups, temporary, advance)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, ValueError):  # names the tensor that is wrong
            raise ConfigError(str(error)) from error
        raise
    temporary.rename(target)
    return f"{source} was written to {target} as a Megatron checkpoint{_amount(size, began)}"


@contextmanager
def _bar(size: int) -> Iterator[Advance]:
    """A progress bar of ``size`` bytes on standard error, where a person sees it."""
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(TextColumn("converting"), *columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("converting", total=size)
        yield lambda more: progress.advance(task, more)


def _amount(size: int, began: float) -> str:
    return f" ({size / 1e9:.3g} GB of weights in {time.perf_counter() - began:.1f} s)"


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
