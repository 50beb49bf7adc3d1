"""The weights of this rank's model as its optimizer holds them: whole on every data rank, or divided over them.

*Pieces* are lists of tensors in one order: the optimizer's fp32 master weights, its moments, a teacher. Under the
replicated optimizer a piece is a whole parameter. Under the distributed optimizer the gradient and weight buffers are
cut into as many equal parts as there are ranks with the same weights, wherever parameters begin; a rank's piece is the
flat part of a parameter that it owns, and a parameter of which it owns nothing has none. Experts that are divided over
ranks have buffers of their own: fewer ranks hold the same ones.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sdpo.teacher import Parameters, Places, check_shapes, on_host


class Weights(Places):
    """What both kinds can do. ``named`` are the model's parameters."""

    named: dict[str, torch.nn.Parameter]

    @abstractmethod
    def masters(self) -> list[Tensor]:
        """The fp32 pieces that the optimizer steps."""

    @abstractmethod
    def joined(self, pieces: Sequence[Tensor]) -> dict[str, Tensor]:
        """Pieces -> whole tensors by parameter name, on every data rank (which must call it together)."""

    @abstractmethod
    def cut(self, whole: Mapping[str, Tensor]) -> list[Tensor]:
        """The inverse of ``joined``, without communication; views."""

    @abstractmethod
    def gather(self) -> None:
        """Finish what still travels: afterwards every parameter has its newest value on every rank."""


class WholeWeights(Parameters, Weights):
    """Of the replicated optimizer."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.named = dict(model.named_parameters())
        super().__init__(list(self.named.values()))

    def masters(self) -> list[Tensor]:
        return [getattr(parameter, "main_param", parameter) for parameter in self.named.values()]

    def joined(self, pieces: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.named, pieces, strict=True))

    def cut(self, whole: Mapping[str, Tensor]) -> list[Tensor]:
        return [whole[name] for name in self.named]

    def gather(self) -> None:
        """Nothing travels."""


@dataclass(frozen=True, slots=True)
class _Piece:
    name: str
    parameter: torch.nn.Parameter
    inside: slice
    """Of the flat parameter."""
    master: Tensor
    bucket: Any
    place: slice
    """In this rank's part of the bucket."""

    def of(self, whole: Tensor) -> Tensor:
        return whole.detach().view(-1)[self.inside]


class DividedWeights(Weights):
    """Of the distributed optimizer."""

    def __init__(self, model: torch.nn.Module, chunks: Sequence[Any], parts: Sequence[Any]) -> None:
        """``chunks`` are Megatron's DDP around ``model`` or its parts; ``parts`` its distributed optimizers."""
        self.named = dict(model.named_parameters())
        self._chunks = chunks
        self._buffers = [buffer for chunk in chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers]
        found = {piece.name: piece for part in parts for piece in self._pieces_of(part)}
        self._pieces = [found[name] for name in self.named if name in found]

    def _pieces_of(self, part: Any) -> Iterator[_Piece]:
        names = {parameter: name for name, parameter in self.named.items()}
        kinds = (
            (part.model_fp32_groups, part.shard_fp32_groups),
            (part.model_float16_groups, part.shard_fp32_from_float16_groups),
        )
        rank, size = part.data_parallel_group.rank(), part.data_parallel_group.size()
        for models, masters in kinds:
            for parameter, master in zip(chain(*models), chain(*masters), strict=True):
                ranges = part._get_model_param_range_map(parameter)
                buffer = next(buffer for buffer in self._buffers if parameter in buffer.param_index_map)
                bucket = buffer.param_to_bucket[parameter]
                mine = rank * (bucket.grad_data.numel() // size)
                inside, place = ranges["param"], ranges["gbuf_world_in_bucket"]
                yield _Piece(
                    names[parameter],
                    parameter,
                    slice(inside.start, inside.end),
                    master,
                    bucket,
                    slice(place.start - mine, place.end - mine),
                )

    def masters(self) -> list[Tensor]:
        return [piece.master for piece in self._pieces]

    def joined(self, pieces: Sequence[Tensor]) -> dict[str, Tensor]:
        """On the host, in the pieces' dtype; one bucket after the other."""
        dtype = pieces[0].dtype if pieces else torch.float32
        whole = self._gathered(pieces, lambda bucket: torch.empty_like(bucket.grad_data, dtype=dtype), torch.Tensor.cpu)
        return {name: whole[parameter] for name, parameter in self.named.items()}

    def _gathered(
        self,
        pieces: Sequence[Tensor],
        room: Callable[[Any], Tensor],
        kept: Callable[[Tensor], Tensor] = lambda flat: flat,
    ) -> dict[Tensor, Tensor]:
        """Pieces -> whole tensors by parameter, each bucket into what ``room`` gives for it, ``kept`` as it says."""
        whole: dict[Tensor, Tensor] = {}
        for buffer in self._buffers:
            for bucket in buffer.buckets:
                flat = room(bucket)
                mine = flat.new_zeros(len(flat) // buffer.data_parallel_group.size())
                for piece, values in zip(self._pieces, pieces, strict=True):
                    if piece.bucket is bucket:
                        mine[piece.place] = values.detach()
                dist.all_gather_into_tensor(flat, mine, group=buffer.data_parallel_group)
                flat = kept(flat)
                for parameter in bucket.params_list:
                    start = buffer.param_index_map[parameter][0] - bucket.offset
                    whole[parameter] = flat[start : start + parameter.numel()].view(parameter.shape)
        return whole

    def cut(self, whole: Mapping[str, Tensor]) -> list[Tensor]:
        return [piece.of(whole[piece.name]) for piece in self._pieces]

    def gather(self) -> None:
        for chunk in self._chunks:
            chunk.start_param_sync(force_sync=True)

    def holding(self, weights: Sequence[Tensor]) -> AbstractContextManager[None]:
        """The parameter buffers hold ``weights``: each rank casts its pieces into them and all are gathered.

        Beside the buffers only this rank's pieces of the student are kept, in the model's dtype (under fp32 they are
        the master weights themselves), and put back and gathered afterwards.
        """
        return self._holding(weights, torch.clone)

    def overwritten(self, weights: Sequence[Tensor]) -> AbstractContextManager[None]:
        """As ``holding``, with the pieces of the student in host memory."""
        return self._holding(weights, on_host)

    @contextmanager
    def _holding(self, weights: Sequence[Tensor], set_aside: Callable[[Tensor], Tensor]) -> Iterator[None]:
        inside = [piece.of(piece.parameter) for piece in self._pieces]
        check_shapes(weights, inside)
        self.gather()  # else a gather that is under way would be taken for that of the new weights
        own = [set_aside(piece) for piece in inside]
        try:
            self._write(inside, weights)
            yield
        finally:
            self._write(inside, own)

    @torch.no_grad()
    def _write(self, inside: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        for piece, value in zip(inside, values, strict=True):
            piece.copy_(value)
        self.gather()

    @torch.no_grad()
    def copies(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Gathered over the data ranks, which must call it together; the buffers are not touched."""
        check_shapes(weights, [piece.master for piece in self._pieces])
        whole = self._gathered(weights, lambda bucket: torch.empty_like(bucket.param_data))
        return [whole[parameter] for parameter in self.named.values()]

    def showing(self, copies: Sequence[Tensor]) -> AbstractContextManager[None]:
        """A gather of the model's own weights that is under way goes on, into the buffers."""
        return Parameters(list(self.named.values())).showing(copies)
