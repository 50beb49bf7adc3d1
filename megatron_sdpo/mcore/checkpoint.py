"""Sharded checkpoints of everything that training depends on, written and found atomically.

``checkpoints/step-00000012/`` appears by rename only when the files of all ranks are complete and listed, with their
digests, in its manifest; it leaves by rename before its files are deleted. So whatever has that name was whole once.
A run resumes from the newest one that still is, under the same layout or another.
"""

import dataclasses
import json
import platform as python_platform
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as megatron_groups
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor

import megatron_sdpo
from megatron_sdpo import spikes
from megatron_sdpo.config import CheckpointConfig, ConfigError
from megatron_sdpo.guard import History
from megatron_sdpo.mcore import generators, manifest, platform
from megatron_sdpo.mcore import optimizer as optim
from megatron_sdpo.mcore.background_save import Save, WriteError
from megatron_sdpo.mcore.groups import ParallelGroups
from megatron_sdpo.mcore.learner import Learner
from megatron_sdpo.mcore.manifest import Digest, Manifest
from megatron_sdpo.mcore.model import Model

_NAME = re.compile(r"step-(\d{8})$")
_TEMPORARY = ".writing"
_CONDEMNED = ".deleting"
_DAMAGED = ".damaged"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or none of those that are there can be trusted; raised on all ranks."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """What a loaded checkpoint says besides tensors. Example: ``Resumed(step=12, cursor=192, journal={11: 16})``

    ``journal``: how many groups of which step were on disk when it was written, from the last one trained on.
    ``refused``: what was wrong with newer checkpoints, a sentence each.
    """

    step: int
    cursor: int
    journal: dict[int, int] = field(default_factory=dict)
    refused: tuple[str, ...] = ()


def steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(int(m[1]) for path in folder.iterdir() if (m := _NAME.match(path.name)))


class Saver:
    """Writes the checkpoints of a run, at most one at a time. All ranks call its methods, in step with each other."""

    def __init__(self, learner: Learner, folder: Path, config: CheckpointConfig) -> None:
        self._learner, self._folder, self._config = learner, folder, config
        self._save: Save | None = None
        self._facts: dict[str, Any] = {}

    def begin(self, cursor: int, journal: Mapping[int, int] | None = None) -> None:
        """Start to write ``step-N``; the learner may go on training when this returns.

        One that is still being written is waited for first. Without ``checkpoint.asynchronous`` this one is, too.
        ``journal`` is what the first rank knows of it.
        """
        self.poll(wait=True)
        learner = self._learner
        box: list[Any] = [dict(journal or {})]
        dist.broadcast_object_list(box, src=0, group=learner.groups.world)
        journal = box[0]
        temporary = self._final(learner.step, _TEMPORARY)

        def prepare() -> None:
            for leftover in (*self._folder.glob(f"*{_TEMPORARY}"), *self._folder.glob(f"*{_CONDEMNED}")):
                shutil.rmtree(leftover)  # of a killed writer
            temporary.mkdir(parents=True)

        _on_first_rank(learner.groups, prepare)
        state = _tensors(learner)
        state["progress"] = {"step": learner.step, "cursor": cursor, "journal": journal}
        state["history"] = asdict(learner.history)
        state["norms"] = asdict(learner.norms)
        state["adam"] = {"steps": optim.steps(learner.optimizer), "rate": optim.rate(learner.optimizer)}
        state["world_size"] = learner.groups.world_size
        state["has_manifest"] = True
        self._facts = {"step": learner.step, "cursor": cursor, "journal": journal, **_facts(learner)}
        self._save = Save(state, temporary, self._config.asynchronous)
        if not self._config.asynchronous:
            self.poll(wait=True)

    def poll(self, wait: bool = False) -> float | None:
        """Give a checkpoint its name once all ranks have written their files, and delete those that are not kept.

        Seconds that writing took beside training, at the call in which it gets its name, else None. ``wait`` until
        then. Raises CheckpointError when a rank could not write; the checkpoints before are untouched.
        """
        if self._save is None or not _all_written(self._save, self._learner.groups, wait):
            return None
        save, self._save = self._save, None
        written = save.finish()
        parts: list[Any] = [None] * self._learner.groups.world_size
        dist.all_gather_object(parts, (written.digests, written.seconds), group=self._learner.groups.world)
        digests = {name: found for digests, _ in parts for name, found in digests.items()}
        _on_first_rank(self._learner.groups, lambda: self._publish(digests))
        return max(seconds for _, seconds in parts)

    def _publish(self, digests: dict[str, Digest]) -> None:
        step = self._facts["step"]
        temporary, final = self._final(step, _TEMPORARY), self._final(step)
        _write_manifest(temporary, self._facts, digests)
        if final.exists():  # written again after a resume from an older one
            _remove(final)
        temporary.rename(final)
        manifest.sync_folder(self._folder)
        for old in _not_kept(steps(self._folder), self._config):
            _remove(self._final(old))

    def _final(self, step: int, suffix: str = "") -> Path:
        return self._folder / f"step-{step:08d}{suffix}"


def save(learner: Learner, folder: Path, cursor: int, keep: int) -> Path:
    """Write ``step-N`` from all ranks, then delete all but the newest ``keep``. Blocks until the files are complete."""
    Saver(learner, folder, CheckpointConfig(keep=keep, asynchronous=False)).begin(cursor)
    return folder / f"step-{learner.step:08d}"


def load_latest(learner: Learner, folder: Path, at_most: int | None = None) -> Resumed | None:
    """Load the newest intact checkpoint into model, optimizer, teacher, guard and generators; None without any.

    The layout may have changed since. Generator states belong to ranks: in a world of another size they stay as the
    seed set them. A checkpoint that is not as it was written is set aside, as ``step-N.damaged``, and the one before
    is taken; CheckpointError, with nothing touched, when none is left.

    Under ``at_most`` a run is only looked at: later steps do not count, no file is touched, and None means to begin
    with the model's directory.
    """
    path, refused = _newest_intact(learner.groups, folder, at_most)
    if path is None:
        return None
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
        generators.set_states(state["rng"])
    progress = Resumed(**state["progress"], refused=tuple(refused))
    learner.step = progress.step
    learner.history = History(**state["history"])
    learner.norms = spikes.History(**state.get("norms", {}))  # of an earlier version's checkpoint nothing is known
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


def check_intact(path: Path) -> None:
    """CheckpointError, which names the files, when a checkpoint is not as it was written."""
    if damage := _damage(path):
        raise CheckpointError(f"the checkpoint cannot be used: {'; '.join(damage)}")


def load_model(model: Model, path: Path) -> None:
    """Only the weights of the student, from a checkpoint written under any layout; CheckpointError if damaged."""
    check_intact(path)
    template = {"model": model.sharded_state_dict(prefix="", metadata=_metadata())}
    state: Any = dist_checkpointing.load(template, str(path))
    with torch.no_grad():
        model.load_state_dict(state["model"])


def save_model(model: Model, path: Path) -> None:
    """Only the weights, into a new directory that appears complete or not at all."""
    temporary = path.with_name(path.name + _TEMPORARY)
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed writer
    temporary.mkdir(parents=True)
    save = Save({"model": model.sharded_state_dict(prefix="", metadata=_metadata())}, temporary, asynchronous=False)
    _write_manifest(temporary, {"versions": versions()}, save.finish().digests)
    temporary.rename(path)


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
    state["rng"] = ShardedObject("rng", generators.states(), (groups.world_size,), (groups.rank,))
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


def _facts(learner: Learner) -> dict[str, Any]:
    config = dataclasses.asdict(learner.config)
    return {
        "world_size": learner.groups.world_size,
        "layout": config["layout"],
        "config": manifest.digest_of_json(config),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of what a run's numbers may depend on."""
    return {
        "megatron_sdpo": megatron_sdpo.__version__,
        "python": python_platform.python_version(),
        "torch": torch.__version__,
        "megatron-core": version("megatron-core"),
    }


def _write_manifest(folder: Path, facts: Mapping[str, Any], digests: Mapping[str, Digest]) -> None:
    """``digests`` of the files that were digested as they were written; the small others are read here."""
    others = (path for path in folder.iterdir() if path.name not in digests)
    files = {**digests, **{path.name: manifest.digest_durable(path) for path in others}}
    manifest.write(folder, Manifest(json.loads(json.dumps(facts)), files))


def _not_kept(found: list[int], config: CheckpointConfig) -> list[int]:
    """Of the steps, oldest first: all but the newest and those kept for good."""
    return [s for s in found[: -config.keep] if config.keep_every is None or s % config.keep_every]


def _all_written(save: Save, groups: ParallelGroups, wait: bool) -> bool:
    """Whether the files of every rank are complete, the same answer on all; CheckpointError when one has failed."""
    failure = None
    missing = False
    try:
        missing = not save.is_written(wait)
    except WriteError as error:
        failure = f"rank {groups.rank}: {error}"
    seen = torch.tensor([float(missing), float(failure is not None)], device=platform.device())
    dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=groups.world)
    if seen[1]:
        failures: list[Any] = [None] * groups.world_size
        dist.all_gather_object(failures, failure, group=groups.world)
        raise CheckpointError(f"the checkpoint could not be written: {'; '.join(filter(None, failures))}")
    return not seen[0]


def _newest_intact(groups: ParallelGroups, folder: Path, at_most: int | None) -> tuple[Path | None, list[str]]:
    """The same on all ranks: the checkpoint to load, if there is one, and what is wrong with those that are newer."""
    looks = at_most is not None
    box: list[Any] = [(steps(folder), sorted(path.name for path in folder.glob(f"*{_DAMAGED}*")))]
    dist.broadcast_object_list(box, src=0, group=groups.world)
    found, set_aside = box[0]
    found = [step for step in found if at_most is None or step <= at_most]
    refused: dict[Path, list[str]] = {}
    for step in reversed(found):
        path = folder / f"step-{step:08d}"
        damage = _damage(path, groups)
        if not damage:
            if not looks:
                _on_first_rank(groups, lambda: [_set_aside(damaged) for damaged in refused])
            return path, [sentence for sentences in refused.values() for sentence in sentences]
        refused[path] = damage
    if (refused or set_aside) and not looks:
        words = "; ".join(sentence for sentences in refused.values() for sentence in sentences[:1])
        words = words or f"only {', '.join(set_aside)} are left"
        raise CheckpointError(
            f"no checkpoint in {folder} is intact ({words}); nothing was changed: put an intact copy back, or move"
            f" {folder} away to train again from step 0 on the attempts that are journalled"
        )
    return None, [sentence for sentences in refused.values() for sentence in sentences]


def _damage(path: Path, groups: ParallelGroups | None = None) -> list[str]:
    """What is wrong with a checkpoint, the same on all ranks of ``groups``, which share the reading."""
    rank, size = (groups.rank, groups.world_size) if groups else (0, 1)
    try:
        found = manifest.read(path)
        if found is not None:
            mine = manifest.damage(path, found, sorted(found.files)[rank::size])
        else:
            mine = _damage_without_manifest(path) if rank == 0 else []
    except (ValueError, OSError) as error:
        mine = [str(error)] if rank == 0 else []
    if groups is None:
        return mine
    everywhere: list[Any] = [None] * size
    dist.all_gather_object(everywhere, mine, group=groups.world)
    return [sentence for sentences in everywhere for sentence in sentences]


def _damage_without_manifest(path: Path) -> list[str]:
    """Earlier versions wrote none; theirs are taken as they are."""
    try:
        common = dist_checkpointing.load_common_state_dict(str(path))
    except Exception as error:  # whatever torch makes of a file that is not one
        return [f"{path / manifest.FILE} is missing, and the rest cannot be read ({type(error).__name__})"]
    return [f"{path / manifest.FILE} is missing"] if common.get("has_manifest") else []


def _set_aside(path: Path) -> None:
    """Keep a damaged checkpoint, under a name by which it is not found."""
    for number in range(1, 1000):
        target = path.with_name(path.name + _DAMAGED + (f"-{number}" if number > 1 else ""))
        if not target.exists():
            path.rename(target)
            return


def _remove(path: Path) -> None:
    """Delete a checkpoint; killed on the way, it leaves nothing that has a checkpoint's name."""
    condemned = path.rename(path.with_name(path.name + _CONDEMNED))
    shutil.rmtree(condemned)


def _on_first_rank(groups: ParallelGroups, action: Callable[[], object]) -> None:
    if groups.rank == 0:
        action()
    dist.barrier(group=groups.world)
