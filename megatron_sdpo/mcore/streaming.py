"""Whole checkpoints from one format to the other in one process, a parameter in memory at a time.

Megatron's own save and load hold the whole model. Here the model is built without memory for its weights, which says
what lies where; torch's writer asks for each tensor when its turn comes, and torch's reader is asked for each.
"""

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as megatron_groups
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_sdpo.config import ConfigError
from megatron_sdpo.mcore import names
from megatron_sdpo.mcore.groups import ParallelGroups
from megatron_sdpo.mcore.hf import HfCheckpoint, write_directory
from megatron_sdpo.mcore.model import build_unallocated

Advance = Callable[[int], None]
"""Told the bytes of every tensor that has been written."""
_HELD_BYTES = 64 << 20
"""Bytes read of the source's files before their pages are given back."""


def total_bytes(hf_config: Mapping[str, Any], dtype: torch.dtype) -> int:
    """Of all weights."""
    return sum(prod(tensor.shape) for tensor in names.hf_layout(hf_config).values()) * dtype.itemsize


def import_hf(
    source: Path, hf_config: dict[str, Any], dtype: torch.dtype, groups: ParallelGroups, target: Path, advance: Advance
) -> None:
    """A Hugging Face directory -> a sharded checkpoint of its weights in ``target``, an empty directory.

    ValueError names a tensor that is unknown, missing or misshapen; ConfigError a file that is not whole.
    """
    made_of = names.stage_parameters(hf_config, range(hf_config["num_hidden_layers"]), first=True, last=True)
    with HfCheckpoint(source, hf_config) as checkpoint:
        names.check_names(checkpoint, hf_config)
        names.check_shapes(checkpoint, hf_config)  # now, not after an hour of writing
        read = 0

        def value_of(name: str) -> Tensor:
            nonlocal read
            value = names.read_shard(checkpoint, made_of[names.canonical(name)], hf_config, 0, 1)
            if value.untyped_storage().nbytes() != value.nbytes:  # a part of the file, whose pages it would hold
                value = value.clone()
            read += value.nbytes
            if read > _HELD_BYTES:
                checkpoint.release()
                read = 0
            return value.to(dtype)

        state = _sharded(hf_config, groups, dtype)
        strategy = _Streaming(state, value_of, advance)
        dist_checkpointing.save({"model": state}, str(target), strategy)


def export_hf(
    checkpoint: Path,
    hf_config: dict[str, Any],
    dtype: torch.dtype,
    groups: ParallelGroups,
    target: Path,
    source: Path,
    advance: Advance,
) -> None:
    """The student's weights of a sharded checkpoint -> a Hugging Face directory, complete or not at all.

    config.json and tokenizer files are those of ``source``.
    """
    write_directory(stored(checkpoint, hf_config, dtype, groups, advance), hf_config, dtype, target, source)


def stored(
    checkpoint: Path, hf_config: dict[str, Any], dtype: torch.dtype, groups: ParallelGroups, advance: Advance
) -> Iterator[tuple[str, Tensor]]:
    """The student's weights of a sharded checkpoint under their Hugging Face names, one parameter at a time."""
    sharded, reader = _sharded(hf_config, groups, dtype), _Reader(checkpoint)
    for name, made_of in names.parameters(hf_config).items():
        pieces = names.split(made_of, reader.value(sharded[name]), hf_config)
        for tensor, piece in zip(made_of, pieces, strict=True):
            yield tensor.name, piece
            advance(piece.nbytes)


def read(source: Path, hf_config: dict[str, Any], dtype: torch.dtype, advance: Advance) -> Iterator[tuple[str, Tensor]]:
    """The same of a Hugging Face directory, cast. ValueError and ConfigError as ``import_hf``."""
    with HfCheckpoint(source, hf_config) as checkpoint:
        names.check_names(checkpoint, hf_config)
        names.check_shapes(checkpoint, hf_config)
        held = 0
        for name in names.hf_layout(hf_config):
            value = checkpoint[name][:].to(dtype)
            yield name, value
            advance(value.nbytes)
            held += value.nbytes
            if held > _HELD_BYTES:
                checkpoint.release()
                held = 0


def _sharded(hf_config: dict[str, Any], groups: ParallelGroups, dtype: torch.dtype) -> dict[str, Any]:
    """Megatron's description of every saved thing by name, tensors without memory."""
    model = build_unallocated(hf_config, groups, dtype)
    metadata = {"dp_cp_group": megatron_groups.get_data_parallel_group(with_context_parallel=True)}
    return cast("dict[str, Any]", model.sharded_state_dict(prefix="", metadata=metadata))


class _Reader:
    """Single parameters of a sharded checkpoint that any layout has written."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint, self.files = checkpoint, FileSystemReader(checkpoint)
        metadata = self.files.read_metadata()
        self.files.set_up_storage_reader(metadata, is_coordinator=True)
        self.stored = metadata.state_dict_metadata
        self._chunks: dict[str, dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}

    def value(self, entry: ShardedTensor | ShardedTensorFactory) -> Tensor:
        pieces = [self._read(piece) for piece in _pieces(entry, entry.data)]
        return pieces[0] if isinstance(entry, ShardedTensor) else entry.merge_fn(cast(Any, pieces))

    def _read(self, piece: ShardedTensor) -> Tensor:
        stored = self.stored.get(piece.key)
        if not isinstance(stored, TensorStorageMetadata):
            raise ConfigError(f"{self.checkpoint} has no {piece.key}; it is not a checkpoint of the run's model")
        there, here = tuple(stored.size), tuple(piece.global_shape)
        padded = piece.allow_shape_mismatch and there[1:] == here[1:]  # another padding of the vocabulary
        if there != here and not padded:
            raise ConfigError(f"{self.checkpoint} has {piece.key} of shape {there}, the run's model {here}")
        wanted = ChunkStorageMetadata(torch.Size(piece.global_offset), _sizes(piece))
        near = replace(stored, chunks=self._near(piece, stored))
        items = create_read_items_for_chunk_list(piece.key, near, [wanted])
        target = torch.empty(wanted.sizes, dtype=piece.dtype)
        if sum(prod(item.lengths) for item in items) != target.numel():
            raise ConfigError(f"{self.checkpoint} lacks a part of {piece.key}; use a complete checkpoint")
        try:
            self.files.read_data(LoadPlan(items), cast(LoadPlanner, _Into(target))).wait()
        except FileNotFoundError as error:
            raise ConfigError(f"{error.filename} is gone; use a complete checkpoint") from error
        return target.view(piece.local_shape)

    def _near(self, piece: ShardedTensor, stored: TensorStorageMetadata) -> list[ChunkStorageMetadata]:
        """The stored chunks of the same layer (and expert): there are many, and torch would look at each."""
        stacked = piece.prepend_axis_num
        if piece.key not in self._chunks:
            by_place = self._chunks[piece.key] = {}
            for chunk in stored.chunks:
                by_place.setdefault(tuple(chunk.offsets[:stacked]), []).append(chunk)
        return self._chunks[piece.key].get(tuple(piece.global_offset[:stacked]), [])


class _Into:
    """As much of a load planner as torch's reader asks for: everything goes into one tensor."""

    def __init__(self, target: Tensor) -> None:
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        return narrow_tensor_by_index(self.target, read_item.dest_offsets, read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """It has been written into the target."""


class _Streaming(SaveShardedStrategy):
    """Saves Megatron's usual format, with each parameter made when it is written."""

    def __init__(self, state: Mapping[str, Any], value_of: Callable[[str], Tensor], advance: Advance) -> None:
        super().__init__("torch_dist", 1)
        # As they are now: saving puts the pieces in the place of a factory, without the way to make them.
        self.state, self.value_of, self.advance = dict(state), value_of, advance

    def can_handle_sharded_objects(self) -> bool:
        return True

    def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
        source = _Source(self.state, self.value_of, self.advance)
        writer = FileSystemWriter(checkpoint_dir, per_thread_copy_ahead=0)
        writer.set_up_storage_writer(is_coordinator=True)
        plans, metadata = create_default_global_save_plan([writer.prepare_local_plan(source.plan())])
        (plan,) = writer.prepare_global_plan(plans)
        writer.finish(metadata, [writer.write_data(plan, cast(SavePlanner, source)).wait()])


class _Source:
    """As much of a save planner as torch's writer asks for: what there is, and each tensor when its turn comes."""

    def __init__(self, state: Mapping[str, Any], value_of: Callable[[str], Tensor], advance: Advance) -> None:
        self.state, self.value_of, self.advance = state, value_of, advance
        self.places: dict[MetadataIndex, tuple[str, int]] = {}
        """Where a write comes from: a name in ``state``, and which of its pieces."""
        self.held: tuple[str, list[ShardedTensor]] | None = None

    def plan(self) -> SavePlan:
        items = []
        for name, entry in self.state.items():
            pieces = [entry] if isinstance(entry, ShardedObject) else _pieces(entry, entry.data)
            for i, piece in enumerate(pieces):
                item = _object_item(piece) if isinstance(piece, ShardedObject) else _tensor_item(piece)
                if item.index in self.places:
                    raise ValueError(f"{name} is saved where {self.places[item.index][0]} is")
                self.places[item.index] = name, i
                items.append(item)
        return SavePlan(items)

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        name, i = self.places[write_item.index]
        entry = self.state[name]
        if isinstance(entry, ShardedObject):
            data = io.BytesIO()
            torch.save([entry.data], data)
            return data
        if self.held is None or self.held[0] != name:
            self.held = None  # before the next is made
            self.held = name, _pieces(entry, self.value_of(name))
        piece = self.held[1][i]
        assert piece.data is not None
        self.advance(piece.data.nbytes)
        return piece.data.reshape(_sizes(piece))


def _pieces(entry: ShardedTensor | ShardedTensorFactory, value: Tensor | None) -> list[ShardedTensor]:
    """What a parameter is saved as, when it has this value; a fused one in its parts."""
    if isinstance(entry, ShardedTensor):
        return [replace(entry, data=value)]
    assert value is not None
    return cast("list[ShardedTensor]", replace(entry, data=value).build())


def _sizes(piece: ShardedTensor) -> torch.Size:
    """With the axes that stack layers (and experts) under one key."""
    return torch.Size((1,) * piece.prepend_axis_num + tuple(piece.local_shape))


def _tensor_item(piece: ShardedTensor) -> WriteItem:
    offsets = torch.Size(piece.global_offset)
    return WriteItem(
        index=MetadataIndex(piece.key, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offsets, sizes=_sizes(piece)),
            properties=TensorProperties(dtype=piece.dtype),
            size=torch.Size(piece.global_shape),
        ),
    )


def _object_item(piece: ShardedObject) -> WriteItem:
    return WriteItem(index=MetadataIndex(piece.unique_key), type=WriteItemType.BYTE_IO)
