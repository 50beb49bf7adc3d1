"""Sharded checkpoints of everything that training depends on, written and found atomically.

``checkpoints/step-00000012/`` appears by rename only when it is complete, and leaves by rename before its files are
deleted, so whatever has that name can be loaded; the newest one is where a run resumes, under the same layout or
another.
"""

import multiprocessing
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as megatron_groups
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch import Tensor

from megatron_sdpo.config import ConfigError
from megatron_sdpo.guard import History
from megatron_sdpo.mcore import optimizer as optim
from megatron_sdpo.mcore.learner import Learner
from megatron_sdpo.mcore.model import Model
from megatron_sdpo.rollout import lifeline

_NAME = re.compile(r"step-(\d{8})$")
_TEMPORARY = ".writing"
_CONDEMNED = ".deleting"


@dataclass(frozen=True, slots=True)
class Resumed:
    """What a loaded checkpoint says besides tensors. Example: ``Resumed(step=12, cursor=192)``"""

    step: int
    cursor: int


def steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(int(m[1]) for path in folder.iterdir() if (m := _NAME.match(path.name)))


def save(learner: Learner, folder: Path, cursor: int, keep: int) -> Path:
    """Write ``step-N`` from all ranks, then delete all but the newest ``keep``. Blocks until the files are complete."""
    final = folder / f"step-{learner.step:08d}"
    temporary = final.with_name(final.name + _TEMPORARY)

    def prepare() -> None:
        for leftover in (*folder.glob(f"*{_TEMPORARY}"), *folder.glob(f"*{_CONDEMNED}")):  # of a killed writer
            shutil.rmtree(leftover)
        temporary.mkdir(parents=True)

    _on_first_rank(learner, prepare)
    state = _tensors(learner)
    state["progress"] = {"step": learner.step, "cursor": cursor}
    state["history"] = asdict(learner.history)
    state["adam"] = {"steps": optim.steps(learner.optimizer), "rate": optim.rate(learner.optimizer)}
    state["world_size"] = learner.groups.world_size
    _save(state, str(temporary))

    def finish() -> None:
        if final.exists():  # written again after a resume from an older one
            _remove(final)
        temporary.rename(final)
        for step in steps(folder)[:-keep]:
            _remove(folder / f"step-{step:08d}")

    _on_first_rank(learner, finish)
    return final


def load_latest(learner: Learner, folder: Path) -> Resumed | None:
    """Load the newest complete checkpoint into model, optimizer, teacher, guard and generators; None without one.

    The layout may have changed since. Generator states belong to ranks: in a world of another size they stay as the
    seed set them.
    """
    found = steps(folder)
    if not found:
        return None
    path = folder / f"step-{found[-1]:08d}"
    template = _tensors(learner)
    common = dist_checkpointing.load_common_state_dict(str(path))
    if "adam" not in common:
        raise ConfigError(f"{path} was written by an earlier version, which kept the optimizer otherwise; start anew")
    if common["world_size"] != learner.groups.world_size:
        del template["rng"]
    state: Any = dist_checkpointing.load(template, str(path))
    with torch.no_grad():
        learner.model.load_state_dict(state["model"])
        for kind, pieces in _pieces(learner).items():
            for piece, loaded in zip(pieces, learner.weights.cut(state[kind]), strict=True):
                piece.copy_(loaded)
    optim.set_steps(learner.optimizer, state["adam"]["steps"])
    optim.set_rates(learner.optimizer, state["adam"]["rate"], learner.config.optim.weight_decay)
    if "rng" in state:
        torch.set_rng_state(state["rng"])
    progress = Resumed(**state["progress"])
    learner.step = progress.step
    learner.history = History(**state["history"])
    return progress


def find(folder: Path, step: int | None) -> Path:
    """The checkpoint of a step, or the newest; ConfigError when it is not there."""
    found = steps(folder)
    if not found or (step is not None and step not in found):
        wanted = "" if step is None else f" of step {step}"
        raise ConfigError(
            f"{folder} has no complete checkpoint{wanted}; there are: {', '.join(map(str, found)) or 'none'}"
        )
    return folder / f"step-{found[-1] if step is None else step:08d}"


def load_model(model: Model, path: Path) -> None:
    """Only the weights of the student, from a checkpoint written under any layout."""
    template = {"model": model.sharded_state_dict(prefix="", metadata=_metadata())}
    state: Any = dist_checkpointing.load(template, str(path))
    with torch.no_grad():
        model.load_state_dict(state["model"])


def save_model(model: Model, path: Path) -> None:
    """Only the weights, into a new directory that appears complete or not at all."""
    temporary = path.with_name(path.name + _TEMPORARY)
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed writer
    temporary.mkdir(parents=True)
    _save({"model": model.sharded_state_dict(prefix="", metadata=_metadata())}, str(temporary))
    temporary.rename(path)


def _save(state: dict[str, Any], path: str) -> None:
    """Megatron's save, whose helper process ends when this one does: Megatron's own would outlive a kill."""
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        manager.start(lifeline.end_with, (os.getpid(),))
        filesystem_async._results_queue = manager.Queue()
    dist_checkpointing.save(state, path)


def _metadata() -> dict[str, Any]:
    return {"dp_cp_group": megatron_groups.get_data_parallel_group(with_context_parallel=True)}


def _tensors(learner: Learner) -> dict[str, Any]:
    """The sharded state: the template of a load and the content of a save.

    Everything is stored as the model's parameters are, so a checkpoint of any layout, with the optimizer divided over
    data ranks or not, is one of every other.
    """
    model = learner.model.sharded_state_dict(prefix="", metadata=_metadata())
    state: dict[str, Any] = {"model": model}
    for kind, pieces in _pieces(learner).items():
        whole = learner.weights.joined(pieces)
        state[kind] = {name: _like(model[name], _KEYS[kind], tensor) for name, tensor in whole.items()}
    groups = learner.groups
    state["rng"] = ShardedObject("rng", torch.get_rng_state(), (groups.world_size,), (groups.rank,))
    return state


_KEYS = {
    "masters": "optimizer.state.fp32_param.",
    "exp_avg": "optimizer.state.exp_avg.",
    "exp_avg_sq": "optimizer.state.exp_avg_sq.",
    "teacher": "teacher.",
}
"""Kind of tensor -> what its keys begin with, before the parameter's."""


def _pieces(learner: Learner) -> dict[str, Sequence[Tensor]]:
    """What is saved besides the model, as ``learner.weights`` has it."""
    masters = learner.weights.masters()
    pieces: dict[str, Sequence[Tensor]] = dict(optim.moments(learner.optimizer, masters))
    if learner.model.config.params_dtype != torch.float32:  # else the model has them
        pieces["masters"] = masters
    if learner.teacher.kind != "live":
        pieces["teacher"] = learner.teacher.tensors
    return pieces


def _like(shard: Any, prefix: str, tensor: Tensor) -> Any:
    """A tensor to be stored as a parameter's ``shard`` is, under another key."""
    dtype = {} if isinstance(shard, ShardedTensorFactory) else {"dtype": tensor.dtype}
    return replace(shard, key=prefix + shard.key, data=tensor.detach(), **dtype)


def _remove(path: Path) -> None:
    """Delete a checkpoint; killed on the way, it leaves nothing that has a checkpoint's name."""
    condemned = path.rename(path.with_name(path.name + _CONDEMNED))
    shutil.rmtree(condemned)


def _on_first_rank(learner: Learner, action: Callable[[], None]) -> None:
    if learner.groups.rank == 0:
        action()
    dist.barrier(group=learner.groups.world)
