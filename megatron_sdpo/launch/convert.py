"""Weights from one format to the other, in one process that holds a layer of them at a time."""

import json
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from torch import Tensor

from megatron_sdpo import config as configuration
from megatron_sdpo import fp8_format
from megatron_sdpo.config import ConfigError, LayoutConfig
from megatron_sdpo.hf_config import read_hf_config
from megatron_sdpo.mcore import checkpoint, streaming
from megatron_sdpo.mcore import groups as parallel
from megatron_sdpo.mcore.groups import ParallelGroups
from megatron_sdpo.mcore.hf import write_directory
from megatron_sdpo.mcore.streaming import Advance
from megatron_sdpo.reshard.quantize import encoded

_TEMPORARY = ".writing"


@dataclass(frozen=True, slots=True)
class Fp8:
    """A Hugging Face directory in block FP8 is asked for, as FP8 engines serve it."""

    kept: int | None = None
    """Layers at each end that stay as they are; None: as many as in the run (fp8.high_precision_layers), or none."""


def convert_checkpoint(source: Path, target: Path, step: int | None, fp8: Fp8 | None = None) -> str:
    """Direction by what ``source`` is; a sentence on what was written. The target appears complete or not at all.

    A run directory becomes a Hugging Face directory (``step``: which of its checkpoints, default the newest), in the
    dtype that the run trains; a Hugging Face directory becomes a sharded Megatron checkpoint of its weights, in the
    dtype that its config.json states. Weights keep every bit. With ``fp8`` either becomes a Hugging Face directory in
    FP8 (fp8_format.py), of the codes that publishing sends; what is not quantised keeps that dtype. A parameter or a
    layer is in memory at a time, whatever the size of the model. ConfigError for what cannot be converted.
    """
    settings = _settings(source)
    is_run = "run_dir" in settings
    if step is not None and not is_run:
        raise ConfigError(f"{source} is a Hugging Face directory and has no steps; leave --step out")
    _check_target(target)
    found = checkpoint.find(source / "checkpoints", step) if is_run else None
    if fp8 and not found:
        return _in_fp8(source, target, fp8)
    groups = parallel.initialize(LayoutConfig(), seed=0, timeout_s=600)
    try:
        return _from_run(source, found, target, groups, fp8) if found else _from_hf(source, target, groups)
    finally:
        parallel.shutdown()


def _from_run(run_dir: Path, found: Path, target: Path, groups: ParallelGroups, fp8: Fp8 | None) -> str:
    config = configuration.load(run_dir / "config.json")
    model_config = config.model
    model, dtype = Path(model_config.path), getattr(torch, model_config.dtype)
    hf_config = read_hf_config(model)
    size = streaming.total_bytes(hf_config, dtype)
    began = time.perf_counter()
    try:
        checkpoint.check_intact(found)
    except checkpoint.CheckpointError as error:
        raise ConfigError(str(error)) from error
    with _bar(size) as advance:
        if fp8 is None:
            streaming.export_hf(found, hf_config, dtype, groups, target, model, advance)
        else:
            kept = config.fp8.high_precision_layers if fp8.kept is None else fp8.kept
            tensors = streaming.stored(found, hf_config, dtype, groups, advance)
            _write_fp8(tensors, hf_config, dtype, kept, target, model)
    form = "Hugging Face format" if fp8 is None else "Hugging Face format, FP8"
    return f"{found} was written to {target} in {form}{_amount(size, began)}{_unserved(hf_config) if fp8 else ''}"


def _in_fp8(source: Path, target: Path, fp8: Fp8) -> str:
    """A Hugging Face directory -> another, in FP8."""
    hf_config = read_hf_config(source)
    dtype = _dtype_of(hf_config)
    size = streaming.total_bytes(hf_config, dtype)
    began = time.perf_counter()
    try:
        with _bar(size) as advance:
            tensors = streaming.read(source, hf_config, dtype, advance)
            _write_fp8(tensors, hf_config, dtype, fp8.kept or 0, target, source)
    except ConfigError:
        raise
    except ValueError as error:  # names the tensor that is wrong
        raise ConfigError(str(error)) from error
    return f"{source} was written to {target} in Hugging Face format, FP8{_amount(size, began)}{_unserved(hf_config)}"


def _unserved(hf_config: dict[str, Any]) -> str:
    """What to know of a directory in FP8 that is for other software alone."""
    why = fp8_format.why_not_served(hf_config)
    return "" if why is None else f"; evaluate and serve will refuse it: {why}"


def _write_fp8(
    tensors: Iterable[tuple[str, Tensor]],
    hf_config: dict[str, Any],
    dtype: torch.dtype,
    kept: int,
    target: Path,
    source: Path,
) -> None:
    n_layers = hf_config["num_hidden_layers"]
    if not 0 <= 2 * kept < n_layers:
        raise ConfigError(f"{kept} layers at each end leave none of {n_layers} for FP8; set --high-precision-layers")
    made = (pair for name, tensor in tensors for pair in encoded(hf_config, kept, name, tensor))
    write_directory(made, hf_config, dtype, target, source, fp8_kept=kept)


def _from_hf(source: Path, target: Path, groups: ParallelGroups) -> str:
    hf_config = read_hf_config(source)
    dtype = _dtype_of(hf_config)
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


def _dtype_of(hf_config: dict[str, Any]) -> torch.dtype:
    return getattr(torch, hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32")


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
