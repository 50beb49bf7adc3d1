"""Files that are written beside training, that rot, and that are kept or not."""

import mmap
import multiprocessing
import os
import shutil
import signal
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from megatron_sdpo.config import CheckpointConfig
from megatron_sdpo.launch.run_dir import RunDir
from megatron_sdpo.launch.trainer import DueCheckpoints, resumed_words
from megatron_sdpo.mcore import checkpoint, manifest
from megatron_sdpo.mcore.groups import ParallelGroups
from megatron_sdpo.mcore.learner import Learner
from megatron_sdpo.rollout.journal import Journal
from tests.dist_checkpoint import differences, flip, state_of
from tests.learner_setup import learn, make_batch, make_config, make_learner
from tests.test_journal import group


def new_learner(folder: Path, groups: ParallelGroups, *overrides: str) -> Learner:
    return make_learner(make_config(folder / "llama", overrides), groups)


@pytest.fixture(scope="module")
def two(folder: Path, groups: ParallelGroups) -> Path:
    """A folder with checkpoints of steps 1 and 2."""
    learner = new_learner(folder, groups)
    for step in range(2):
        learn(learner, make_batch(step))
        checkpoint.save(learner, folder / "two", cursor=3 * step + 3, keep=2)
    return folder / "two"


def copied(state: Any) -> Any:
    """A deep copy that no later step reaches."""
    if isinstance(state, dict):
        return {key: copied(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(map(copied, state))
    return state.detach().clone() if torch.is_tensor(state) else state


def lock_pages(learner: Learner, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with CUDA: a fork shares page-locked memory, and who gives it back finds something else there."""

    def copied_from_device(write_buckets: list[Any], non_blocking: bool) -> list[Any]:
        return [(path, key, (data, [(i, locked(x)) for i, x in pairs])) for path, key, (data, pairs) in write_buckets]

    def locked(x: torch.Tensor) -> torch.Tensor:
        if x.is_shared():
            return x
        memory = mmap.mmap(-1, x.nbytes)
        copy = torch.frombuffer(memory, dtype=torch.uint8).view(x.dtype).view(x.shape).copy_(x)
        weakref.finalize(copy, memory.__setitem__, slice(None), b"?" * x.nbytes)
        return copy

    for tensor in learner.teacher.tensors:  # as teacher.placement=offloaded has it
        tensor.share_memory_()
    monkeypatch.setattr(torch.Tensor, "is_pinned", torch.Tensor.is_shared)
    monkeypatch.setattr(FileSystemWriterAsync, "preload_tensors", staticmethod(copied_from_device))


@pytest.mark.parametrize("page_locked", [False, True])
def test_what_is_written_beside_training_is_what_it_was_at_the_start(
    folder: Path, groups: ParallelGroups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page_locked: bool
) -> None:
    """The writer is held until training has changed every tensor."""
    learner = new_learner(folder, groups)
    if page_locked:
        lock_pages(learner, monkeypatch)
    learn(learner, make_batch(0))
    before = copied(state_of(learner))
    saver = checkpoint.Saver(learner, tmp_path, CheckpointConfig(keep=1))
    assert saver.poll() is None
    saver.begin(cursor=3, journal={0: 3})
    (writer,) = multiprocessing.active_children()
    os.kill(writer.pid or 0, signal.SIGSTOP)
    learn(learner, make_batch(1))
    assert saver.poll() is None and checkpoint.steps(tmp_path) == []
    os.kill(writer.pid or 0, signal.SIGCONT)
    saver.begin(cursor=6)  # waits for the first
    assert checkpoint.steps(tmp_path) == [1]
    loaded = new_learner(folder, groups)
    assert checkpoint.load_latest(loaded, tmp_path) == checkpoint.Resumed(1, 3, {0: 3})
    assert differences(state_of(loaded), before) == []
    seconds = saver.poll(wait=True)
    assert seconds is not None and seconds > 0.0
    assert saver.poll(wait=True) is None and multiprocessing.active_children() == []
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_a_killed_writer_stops_the_run_and_leaves_the_last_checkpoint(
    folder: Path, groups: ParallelGroups, tmp_path: Path
) -> None:
    learner = new_learner(folder, groups)
    saver = checkpoint.Saver(learner, tmp_path, CheckpointConfig(keep=1))
    saver.begin(cursor=0)
    saver.poll(wait=True)
    learn(learner, make_batch(0))
    saver.begin(cursor=3)
    (writer,) = multiprocessing.active_children()
    os.kill(writer.pid or 0, signal.SIGKILL)
    with pytest.raises(checkpoint.CheckpointError, match="could not be written: rank 0: its writer ended with exit"):
        saver.poll(wait=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000000", "step-00000001.writing"]
    again = checkpoint.Saver(learner, tmp_path, CheckpointConfig(keep=1))
    again.begin(cursor=3)
    again.poll(wait=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001"]


def test_the_manifest_says_what_the_checkpoint_is(folder: Path, two: Path) -> None:
    found = manifest.read(two / "step-00000002")
    assert found is not None
    assert (found.facts["step"], found.facts["cursor"], found.facts["world_size"]) == (2, 6, 1)
    assert found.facts["layout"]["tensor_parallel"] == 1
    assert found.facts["versions"]["torch"] == torch.__version__
    other = make_config(folder / "llama", ("optim.lr=0.5",))
    assert found.facts["config"] != manifest.digest_of_json({"name": other.name})
    assert sorted(found.files) == sorted(p.name for p in (two / "step-00000002").iterdir() if p.name != manifest.FILE)


def test_a_manifest_that_says_something_else_is_found(two: Path, tmp_path: Path) -> None:
    """Still JSON, and all files as they were."""
    shutil.copytree(two / "step-00000002", tmp_path / "step-00000002")
    file = tmp_path / "step-00000002" / manifest.FILE
    file.write_text(file.read_text().replace('"cursor": 6', '"cursor": 7'))
    with pytest.raises(checkpoint.CheckpointError, match=r"manifest\.json is not as it was written \(its digest"):
        checkpoint.check_intact(tmp_path / "step-00000002")


@pytest.mark.parametrize(("at_most", "step"), [(2, 2), (1, 1), (0, None)])
def test_a_run_is_looked_at_as_it_was_at_a_step(
    folder: Path, groups: ParallelGroups, two: Path, at_most: int, step: int | None
) -> None:
    resumed = checkpoint.load_latest(new_learner(folder, groups), two, at_most=at_most)
    assert (resumed and resumed.step) == step


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("harm", [flip, truncate, Path.unlink])
def test_any_harm_to_any_file_is_found_and_the_checkpoint_before_is_used(
    folder: Path, groups: ParallelGroups, two: Path, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    learner = new_learner(folder, groups)
    for number, name in enumerate(sorted(path.name for path in (two / "step-00000002").iterdir())):
        damaged = shutil.copytree(two, tmp_path / str(number))
        harm(damaged / "step-00000002" / name)
        with pytest.raises(checkpoint.CheckpointError, match=name):
            checkpoint.load_model(learner.model, damaged / "step-00000002")
        resumed = checkpoint.load_latest(learner, damaged)
        assert resumed is not None and resumed.step == 1 and learner.step == 1
        (sentence,) = resumed.refused
        assert sentence.startswith(str(damaged / "step-00000002" / name))
        assert sorted(path.name for path in damaged.iterdir()) == ["step-00000001", "step-00000002.damaged"]


def test_when_none_is_intact_nothing_is_loaded_and_nothing_is_lost(
    folder: Path, groups: ParallelGroups, two: Path, tmp_path: Path
) -> None:
    damaged = shutil.copytree(two, tmp_path / "checkpoints")
    truncate(damaged / "step-00000001" / "common.pt")
    flip(damaged / "step-00000002" / "__0_1.distcp")
    learner = new_learner(folder, groups)
    before = copied(state_of(learner))
    with pytest.raises(checkpoint.CheckpointError) as error:
        checkpoint.load_latest(learner, damaged)
    assert "__0_1.distcp is not as it was written" in str(error.value) and "common.pt has" in str(error.value)
    assert sorted(path.name for path in damaged.iterdir()) == ["step-00000001", "step-00000002"]
    assert differences(state_of(learner), before) == []
    shutil.rmtree(damaged / "step-00000001")
    (damaged / "step-00000002").rename(damaged / "step-00000002.damaged")
    with pytest.raises(checkpoint.CheckpointError, match=r"only step-00000002\.damaged are left"):
        checkpoint.load_latest(learner, damaged)


def test_checkpoints_of_earlier_versions_load(folder: Path, groups: ParallelGroups, two: Path, tmp_path: Path) -> None:
    """They have no manifest, and no word that there should be one."""
    old = shutil.copytree(two, tmp_path / "checkpoints") / "step-00000002"
    (old / manifest.FILE).unlink()
    common = torch.load(old / "common.pt")
    del common["has_manifest"], common["progress"]["journal"]
    torch.save(common, old / "common.pt")
    assert checkpoint.load_latest(new_learner(folder, groups), old.parent) == checkpoint.Resumed(2, 6)


def test_some_are_kept_for_good(folder: Path, groups: ParallelGroups, tmp_path: Path) -> None:
    """By the run's own rule: every second step, the last two, and every fourth for good."""
    run_dir = RunDir(tmp_path)
    overrides = ("steps=9", "checkpoint.every=2", "checkpoint.keep=1", "checkpoint.keep_every=4")
    learner = new_learner(folder, groups, *overrides)
    due = DueCheckpoints(learner.config, learner, run_dir)
    learn(learner, make_batch(0))
    found = {}
    for step in range(9):
        Journal(run_dir.attempts).append(group(step, 0))
        learner.step = step + 1
        found[step + 1] = due.save_if_due(cursor=step)
    due.finish()
    assert checkpoint.steps(run_dir.checkpoints) == [4, 8, 9]
    keys = {step: list(metrics) for step, metrics in found.items() if metrics}
    assert set(keys) <= set(range(3, 10)) and set(map(tuple, keys.values())) == {("time/checkpoint_background",)}
    resumed = checkpoint.load_latest(learner, run_dir.checkpoints)
    assert resumed is not None and resumed == checkpoint.Resumed(9, 8, {8: 1})
    Journal(run_dir.attempts).append(group(9, 0))
    assert resumed_words(resumed, Journal(run_dir.attempts)) == [
        "resumed from the checkpoint of step 9; journalled ahead of it: 1 groups of 1 steps"
    ]
    (run_dir.attempts / "step-00000008.jsonl").unlink()
    assert resumed_words(resumed, Journal(run_dir.attempts))[0] == (
        "the journal of step 8 has lost 1 of 1 groups (trained on already)"
    )
