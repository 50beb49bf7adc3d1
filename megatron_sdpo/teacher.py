"""Teacher weights: an fp32 copy of the student that follows slowly (EMA), never (frozen) or is the student (live).

A trust-region teacher holds the initial weights as a frozen one does; its logits are mixed with the student's.
Where the copy is, and what stands beside it (``teacher.placement``), changes memory and time, and no number.

The copy is fp32 because the average moves by ``update_rate`` times a step's change, which is below the
resolution of bf16: a bf16 average stays where it is and silently becomes a frozen teacher.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, Protocol

import torch
from torch import Tensor


@torch.no_grad()
def ema_update(teacher: Sequence[Tensor], student: Sequence[Tensor], update_rate: float) -> None:
    """``teacher = (1 - update_rate) * teacher + update_rate * student``, in place and in fp32.

    Rate 0 leaves the teacher, rate 1 copies the student, both to the bit. The student may have another
    float dtype or device; it is computed where the student is, one tensor at a time. ``ValueError``, before
    anything is written, when the rate is outside [0, 1], the lists or shapes differ, or a teacher tensor is not fp32.
    """
    if not 0.0 <= update_rate <= 1.0:
        raise ValueError(f"update_rate is {update_rate}; it must lie between 0 and 1")
    check_shapes(teacher, student)
    for index, average in enumerate(teacher):
        if average.dtype != torch.float32:
            raise ValueError(f"teacher tensor {index} is {average.dtype}; an average must be kept in float32 to move")
    for average, weight in zip(teacher, student, strict=True):
        moved = average.to(weight.device)
        moved.lerp_(weight.detach().to(torch.float32), update_rate)
        if moved is not average:
            average.copy_(moved)


def mixed_logits(initial_NV: Tensor, student_NV: Tensor, mixture: float) -> Tensor:
    """Logits of the trust-region teacher: q_initial^(1 - mixture) * q_student^mixture, normalised (paper eq. 10).

    Two shards of the same vocabulary entries; fp32 at least. The mixture's own log-sum-exp is needed for any
    log-prob of it, so it must be formed on every entry before anything is reduced. An entry that does not exist
    (-inf in both) stays so.
    """
    dtype = torch.promote_types(initial_NV.dtype, torch.float32)
    mixed_NV = initial_NV.to(dtype).lerp(student_NV.to(dtype), mixture)
    return mixed_NV.masked_fill_(initial_NV == -torch.inf, -torch.inf)


class Places(Protocol):
    """Where a model's weights lie, whole or divided over ranks.

    Within each of the blocks the model computes with other weights, afterwards with its own again, to the bit.
    """

    def holding(self, weights: Sequence[Tensor]) -> AbstractContextManager[None]:
        """With ``weights``, cast to the model's dtype."""
        ...

    def overwritten(self, weights: Sequence[Tensor]) -> AbstractContextManager[None]:
        """The same with nothing beside the model on its device: its own weights wait in host memory."""
        ...

    def copies(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """``weights`` as the model holds its own, whole and cast; for ``showing``."""
        ...

    def showing(self, copies: Sequence[Tensor]) -> AbstractContextManager[None]:
        """With ``copies``, of which nothing is copied."""
        ...


class Parameters:
    """``Places`` of parameters that this rank holds whole: their storage is exchanged.

    Weights are cast to each parameter's dtype; fp32 parameters share the storage of ``weights``, so nobody may write
    to them meanwhile. The parameters' own storage is set aside, not copied, and comes back at its old address.
    ``ValueError`` when weights are not those of the same model.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters

    def holding(self, weights: Sequence[Tensor]) -> AbstractContextManager[None]:
        return self.showing(self.copies(weights))

    def copies(self, weights: Sequence[Tensor]) -> list[Tensor]:
        check_shapes(weights, self._parameters)
        return [w.detach().to(p.device, p.dtype) for w, p in zip(weights, self._parameters, strict=True)]

    @contextmanager
    def showing(self, copies: Sequence[Tensor]) -> Iterator[None]:
        own = [parameter.data for parameter in self._parameters]
        try:
            for parameter, copy in zip(self._parameters, copies, strict=True):
                parameter.data = copy
            yield
        finally:
            for parameter, data in zip(self._parameters, own, strict=True):
                parameter.data = data

    @contextmanager
    def overwritten(self, weights: Sequence[Tensor]) -> Iterator[None]:
        check_shapes(weights, self._parameters)
        own = [on_host(parameter) for parameter in self._parameters]
        try:
            _write(self._parameters, weights)
            yield
        finally:
            _write(self._parameters, own)


@torch.no_grad()
def _write(parameters: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.copy_(weight)


def on_host(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy in host memory; pinned where it comes from a GPU."""
    held = torch.empty(x.shape, dtype=dtype or x.dtype, device="cpu", pin_memory=x.is_cuda)
    return held.copy_(x.detach())


class TeacherWeights:
    """The weights that teach, and their way into a model and out of it.

    Example:
        teacher = TeacherWeights(masters, "ema", update_rate=0.05)
        with torch.no_grad(), teacher.swapped_in(places):  # or list(model.parameters())
            teacher_logits = model(teacher_ids)
        teacher.update(masters)  # once per generation batch, after its optimizer steps
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        kind: Literal["ema", "frozen", "live", "trust_region"],
        update_rate: float = 0.05,
        placement: Literal["swapped", "resident", "offloaded"] = "swapped",
    ) -> None:
        """Copy ``weights`` (the fp32 masters where there are any) to fp32; ``live`` copies nothing."""
        self.kind = kind
        self.update_rate = update_rate
        self.placement = placement
        self._copies: list[Tensor] | None = None
        """resident: as the model would hold the weights; None once these may have changed."""
        self._copied: list[int] = []
        """Of what state of the weights: torch counts the writes to each."""
        self._in_model = False
        self._tensors: list[Tensor] = [] if kind == "live" else [self._held(weight) for weight in weights]

    def _held(self, weight: Tensor) -> Tensor:
        if self.placement == "offloaded":
            return on_host(weight, torch.float32)
        return weight.detach().to(torch.float32, copy=True)

    @property
    def tensors(self) -> list[Tensor]:
        """fp32, in the order of ``weights``. A checkpoint saves these and loads by ``copy_`` into them.

        Whoever asks for them may write into them, but no longer than until the next swap.
        """
        self._copies = None
        return self._tensors

    def reset(self, weights: Sequence[Tensor]) -> None:
        """Begin again at ``weights``, as a new object would."""
        for tensor, weight in zip(self.tensors, weights if self._tensors else (), strict=True):
            tensor.copy_(weight.detach())

    def update(self, masters: Sequence[Tensor], damping: float = 1.0) -> None:
        """One EMA step towards the student's master weights, at ``damping`` times the rate; nothing for other kinds."""
        if self._in_model:
            raise RuntimeError("the teacher's weights are in the model; update them after the swap has ended")
        if self.kind == "ema":
            ema_update(self.tensors, masters, self.update_rate * damping)

    @contextmanager
    def swapped_in(self, places: Places | Sequence[Tensor]) -> Iterator[None]:
        """Within the block the model at ``places`` (or these whole parameters) has the teacher's weights.

        Afterwards the student's are back bit-identical, also when the block raises. ``RuntimeError`` for a swap
        inside a swap, ``ValueError`` when the places do not match the teacher.
        """
        if self._in_model:
            raise RuntimeError("the teacher's weights are already in the model; swaps cannot be nested")
        if isinstance(places, Sequence):
            places = Parameters(places)
        self._in_model = True
        try:
            with self._shown(places):
                yield
        finally:
            self._in_model = False

    def _shown(self, places: Places) -> AbstractContextManager[None]:
        if self.kind == "live":
            return nullcontext()
        if self.placement == "offloaded":
            return places.overwritten(self._tensors)
        if self.placement == "swapped":
            return places.holding(self._tensors)
        states = [tensor._version for tensor in self._tensors]
        if self._copies is None:
            self._copies, self._copied = places.copies(self._tensors), states
        if states != self._copied:
            raise RuntimeError("the teacher's weights were changed through tensors asked for before the last swap")
        return places.showing(self._copies)


def check_shapes(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> None:
    """``ValueError`` unless both are weights of the same model."""
    if len(teacher) != len(student):
        raise ValueError(f"the teacher has {len(teacher)} tensors and the student {len(student)}")
    for index, (a, b) in enumerate(zip(teacher, student, strict=True)):
        if a.shape != b.shape:
            raise ValueError(f"tensor {index} is {tuple(a.shape)} in the teacher and {tuple(b.shape)} in the student")
