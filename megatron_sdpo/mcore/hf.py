"""Hugging Face checkpoints: into each rank's shard, reading only its slices, and back to one directory."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_sdpo import fp8_format
from megatron_sdpo.config import ConfigError, LayoutConfig
from megatron_sdpo.hf_config import read_hf_config
from megatron_sdpo.mcore import names, platform
from megatron_sdpo.mcore.groups import ParallelGroups
from megatron_sdpo.mcore.model import Model, chunks_of
from megatron_sdpo.mcore.safetensors_writer import INDEX, SafetensorsWriter

SHARD_BYTES = 4 << 30
# Besides the weights and config.json, an exported directory has these when its source has them.
_COMPANIONS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template*"),
    *("generation_config.json", "LICENSE*"),
)


class DiskTensor:
    """A tensor in a safetensors file, read slice by slice."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self.shape = tuple(handle.get_shape())

    def __getitem__(self, slices: Any, /) -> Tensor:
        return self._handle[slices]


class HfCheckpoint(Mapping[str, DiskTensor]):
    """The tensors of a checkpoint directory by name, left on disk. A context manager.

    Tensors that a model of this config derives or shares are not listed: old rotary ``inv_freq`` buffers, and the
    head beside a tied embedding (which must then equal it).
    """

    def __init__(self, path: str | Path, hf_config: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        where = _files_by_tensor(self.path)
        if lost := sorted(file for file in set(where.values()) if not (self.path / file).is_file()):
            raise ConfigError(f"{path} has no {lost[0]}, which its {INDEX} names; use a complete checkpoint")
        self._where = {name: file for name, file in where.items() if not name.endswith("rotary_emb.inv_freq")}
        if hf_config.get("tie_word_embeddings"):
            self._drop_tied_head()

    def __enter__(self) -> "HfCheckpoint":
        return self

    def __exit__(self, *error: Any) -> None:
        self.release()

    def __getitem__(self, name: str) -> DiskTensor:
        return DiskTensor(self._open(name).get_slice(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def release(self) -> None:
        """Close the files, whose pages count as this process's memory once read; the next read opens its own again."""
        self._files.clear()
        self._stack.close()

    def _open(self, name: str) -> Any:
        file = self._where[name]
        if file not in self._files:
            self._files[file] = self._stack.enter_context(_opened(self.path / file))
        return self._files[file]

    def _drop_tied_head(self) -> None:
        if "lm_head.weight" not in self._where:
            return
        head, embedding = (self._open(n).get_tensor(n) for n in ("lm_head.weight", "model.embed_tokens.weight"))
        if not torch.equal(head, embedding):
            raise ConfigError(
                f"{self.path} says tie_word_embeddings but its lm_head.weight differs from its embedding;"
                " set tie_word_embeddings to false in its config.json"
            )
        del self._where["lm_head.weight"]


def load_hf(model: Model, path: str | Path, groups: ParallelGroups, layout: LayoutConfig) -> None:
    """Fill every parameter of this rank's stages from a checkpoint directory, cast to the parameter's dtype.

    Reads only this rank's slices. Raises ValueError that names a tensor which is unknown, missing or of another
    shape than the config says, and ConfigError for a config that is not supported.
    """
    hf_config = read_hf_config(path)
    with HfCheckpoint(path, hf_config) as checkpoint, torch.no_grad():
        names.check_names(checkpoint, hf_config)
        for number, chunk in zip(groups.own_stages, chunks_of(model), strict=True):
            stage = _stage_parameters(hf_config, layout, number, groups)
            targets = canonical_parameters(chunk, groups)
            stage = {local: tensors for local, tensors in stage.items() if _is_held(tensors[0], groups)}
            if targets.keys() != stage.keys():
                wrong = min(targets.keys() ^ stage.keys())
                raise ValueError(f"the model and the checkpoint {path} disagree on the parameter {wrong!r}")
            for local, tensors in stage.items():
                place = groups.tensor_place(tensors[0].expert is not None)
                shard = names.read_shard(checkpoint, tensors, hf_config, *place)
                if shard.shape != targets[local].shape:
                    raise ValueError(f"{path} gives {local} the shape {tuple(shard.shape)}, the model has another")
                targets[local].copy_(shard)


def save_hf(
    model: Model,
    path: str | Path,
    groups: ParallelGroups,
    layout: LayoutConfig,
    source_dir: str | Path,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the whole model as a Hugging Face directory, from rank 0; every rank must call this.

    Weights keep the model's dtype; config.json (with that dtype) and tokenizer files come from ``source_dir``. The
    directory appears complete or not at all; an earlier one at ``path`` is replaced. Rank 0 holds one parameter more
    than its own at a time; ``shard_bytes`` is the size of a file.
    """
    hf_config = read_hf_config(source_dir)
    tensors = _gathered(model, hf_config, groups, layout)
    if groups.rank == 0:
        write_directory(tensors, hf_config, next(model.parameters()).dtype, Path(path), Path(source_dir), shard_bytes)
    else:
        for _ in tensors:  # nothing is yielded here: this rank only sends
            raise AssertionError("only rank 0 receives")
    dist.barrier(group=groups.world)


def stage_layers(hf_config: Mapping[str, Any], layout: LayoutConfig, stage: int) -> range:
    """The layers (numbers of the whole model) of a stage; an interleaved pipeline has several on each rank."""
    per_stage = hf_config["num_hidden_layers"] // (layout.pipeline_parallel * layout.virtual_pipeline)
    return range(stage * per_stage, (stage + 1) * per_stage)


def _stage_parameters(
    hf_config: Mapping[str, Any], layout: LayoutConfig, stage: int, groups: ParallelGroups
) -> dict[str, tuple[names.HfTensor, ...]]:
    layers = stage_layers(hf_config, layout, stage)
    return names.stage_parameters(hf_config, layers, stage == 0, stage == groups.stages - 1)


def _is_held(tensor: names.HfTensor, groups: ParallelGroups) -> bool:
    """Whether this rank has it, if it is of one of its stages."""
    return tensor.expert_rank(groups.expert_size) in (None, groups.expert_rank)


def canonical_parameters(model: Model, groups: ParallelGroups) -> dict[str, torch.nn.Parameter]:
    """The parameters under the local names of names.py, whichever layer spec built the model.

    Those of several stages on one rank have the number of the stage on this rank before their names: ``1.decoder...``
    """
    first_expert = groups.expert_rank * ((model.config.num_moe_experts or 0) // groups.expert_size)
    return {names.canonical(name, first_expert): parameter for name, parameter in model.named_parameters()}


def _gathered(
    model: Model, hf_config: Mapping[str, Any], groups: ParallelGroups, layout: LayoutConfig
) -> Iterator[tuple[str, Tensor]]:
    """Rank 0 yields every (HF name, whole tensor); the other ranks that hold a first copy of a shard send it.

    Point to point with contiguous tensors: gloo's scatter and gather go wrong, silently, with others.
    """
    chunks = [canonical_parameters(chunk, groups) for chunk in chunks_of(model)]
    own = dict(zip(groups.own_stages, chunks, strict=True))
    for stage in range(groups.stages):
        for local, tensors in _stage_parameters(hf_config, layout, stage, groups).items():
            if tensors[0].stage(groups.stages) != stage:
                continue  # the last stage's copy of a tied embedding
            mine = own[stage][local].detach() if stage in own and _is_held(tensors[0], groups) else None
            shards = _to_rank_0(mine, tensors, stage, groups, next(model.parameters()).dtype)
            if groups.rank == 0:
                pieces: list[list[Tensor]] = [names.split(tensors, shard, hf_config) for shard in shards]
                for tensor, whole in zip(tensors, zip(*pieces, strict=True), strict=True):
                    yield tensor.name, names.join(tensor, whole)


def _to_rank_0(
    mine: Tensor | None, tensors: tuple[names.HfTensor, ...], stage: int, groups: ParallelGroups, dtype: torch.dtype
) -> list[Tensor]:
    """All tensor ranks' shards of one parameter, on rank 0 (one shard if it is replicated); [] on other ranks."""
    expert_rank = tensors[0].expert_rank(groups.expert_size)
    _, size = groups.tensor_place(expert_rank is not None)
    shards = []
    for source in groups.holders(stage % groups.pipeline_size, tensors[0].tp_axis is not None, expert_rank):
        if source == groups.rank == 0:
            assert mine is not None
            shards.append(mine)
        elif groups.rank == 0:
            shape = names.local_shape(tensors, size)
            buffer = torch.empty(shape, dtype=dtype, device=platform.device())
            dist.recv(buffer, source, group=groups.world)
            shards.append(buffer)
        elif groups.rank == source:
            assert mine is not None
            dist.send(mine.contiguous(), 0, group=groups.world)
    return shards


def write_directory(
    tensors: Iterable[tuple[str, Tensor]],
    hf_config: Mapping[str, Any],
    dtype: torch.dtype,
    path: Path,
    source: Path,
    shard_bytes: int = SHARD_BYTES,
    fp8_kept: int | None = None,
) -> None:
    """Every tensor of the model, config.json and companions into a directory beside ``path``, which takes its place.

    ``fp8_kept``: the tensors come in block FP8 (fp8_format.py), but for so many layers at each end.
    """
    building, old = (path.with_name(f".{path.name}.{what}") for what in ("building", "old"))
    for leftover in (building, old):
        shutil.rmtree(leftover, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        _fill(building, tensors, hf_config, dtype, source, shard_bytes, fp8_kept)
    except BaseException:
        shutil.rmtree(building)
        raise
    if path.exists():
        os.rename(path, old)
    os.rename(building, path)
    shutil.rmtree(old, ignore_errors=True)


def _fill(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    hf_config: Mapping[str, Any],
    dtype: torch.dtype,
    source: Path,
    shard_bytes: int,
    fp8_kept: int | None,
) -> None:
    shapes = {name: tensor.shape for name, tensor in names.hf_layout(hf_config).items()}
    others: dict[str, torch.dtype] = {}
    if fp8_kept is not None:
        n_layers = hf_config["num_hidden_layers"]
        codes = {n: shape for n, shape in shapes.items() if fp8_format.is_quantized(n, n_layers, fp8_kept)}
        scales = {fp8_format.scale_name(name): fp8_format.scale_shape(shape) for name, shape in codes.items()}
        shapes |= scales
        others = {**dict.fromkeys(codes, torch.float8_e4m3fn), **dict.fromkeys(scales, torch.float32)}
    with SafetensorsWriter(folder, shapes, dtype, shard_bytes, others) as writer:
        for name, tensor in tensors:
            writer.write(name, tensor)
    config = json.loads((source / "config.json").read_text())
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
    if fp8_kept is not None:
        config[fp8_format.KEY] = fp8_format.quantization_config(hf_config, fp8_kept)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for pattern in _COMPANIONS:
        for file in source.glob(pattern):
            shutil.copyfile(file, folder / file.name)


def _files_by_tensor(path: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index or else from the one or more files there are."""
    if (path / INDEX).is_file():
        return json.loads((path / INDEX).read_text())["weight_map"]
    where: dict[str, str] = {}
    for file in sorted(path.glob("*.safetensors")):
        with _opened(file) as handle:
            where |= dict.fromkeys(handle.keys(), file.name)
    if not where:
        raise ConfigError(f"{path} has no *.safetensors file; set model.path to a complete checkpoint")
    return where


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ConfigError(f"{file} is not a whole safetensors file ({error})") from error
