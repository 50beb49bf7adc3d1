"""Worker of test_checkpoint.py.

Under torchrun, ``straight FOLDER`` trains four batches on each of ``RUNS`` and saves after two; ``resumed FOLDER``,
in new processes, continues from there, under the same layout to the same bits, and under other layouts. ``train FOLDER
RUN`` and ``continue FOLDER RUN LAYOUT`` do so for one run.
Alone, ``killed FOLDER MODEL POINT`` continues a run and kills itself at a point of its next save.
"""

import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_sdpo.config import CheckpointConfig, LayoutConfig
from megatron_sdpo.mcore import checkpoint
from megatron_sdpo.mcore import optimizer as optim
from megatron_sdpo.mcore.groups import ParallelGroups, initialize, shutdown
from megatron_sdpo.mcore.hf import save_hf
from megatron_sdpo.mcore.learner import Learner
from tests.dist_learner import parse
from tests.learner_setup import learn, make_batch, make_config, make_learner

RUNS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "tp2": ("tp2-sp", "llama", ()),
    "pp2": ("pp2vp2", "qwen3-tied", ("optim.mini_batches=2", "guard.signal=accuracy")),
    "dp2": ("dp2", "llama", ("optim.mini_batches=2",)),
    "tp2-bf16": ("tp2", "llama", ("model.dtype=bfloat16",)),
    "divided": (
        "dp2-overlap",
        "qwen3-tied",
        ("optim.mini_batches=2", "guard.signal=accuracy", "spikes.policy=skip", "spikes.window=3"),
    ),
    "divided-bf16": ("cp2-do", "llama", ("model.dtype=bfloat16",)),
}
"""Name -> (layout, model, overrides)."""
FOUR_RANKS = {"tp2pp2": ("tp2pp2-sp", "qwen3-tied", ("optim.mini_batches=2",))}
"""The same, trained by themselves."""
ACCURACIES = (0.9, 0.5)
"""Held-out, after each batch before the save: a run that resumes without them would not be damped."""
CHANGES = (
    *(("tp2", "pp2"), ("tp2", "cp2"), ("pp2", "tp2-sp-do"), ("pp2", "dp2-overlap")),
    *(("divided", "tp2"), ("divided", "pp2vp2-do")),
)
"""(run, layout under which it continues)."""
JOURNAL = {1: 3, 2: 1}
RESUMED = checkpoint.Resumed(step=2, cursor=6, journal=JOURNAL)


def state_of(learner: Learner) -> dict[str, Any]:
    """Everything that training depends on."""
    return {
        "weights": dict(learner.model.state_dict()),
        "optimizer": [part.optimizer.state_dict() for part in optim.parts(learner.optimizer)],
        "teacher": learner.teacher.tensors,
        "rng": torch.get_rng_state(),
        "step": learner.step,
        "history": (learner.history.rewards, learner.history.accuracies),
        "norms": (learner.norms.norms, learner.norms.skipped),
    }


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two nested states differ, by one bit or more."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for key in a for d in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{where}/{i}")]
    if torch.is_tensor(a) and torch.is_tensor(b):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [where]
    return [] if a == b else [where]


def run_learner(folder: Path, run: str, groups: ParallelGroups, layout: LayoutConfig, taught: bool) -> Learner:
    _, model, overrides = (RUNS | FOUR_RANKS)[run]
    config = make_config(folder / model, overrides, layout)
    return make_learner(config, groups, folder / f"{model}-teacher" if taught else None)


def straight(folder: Path, run: str) -> None:
    layout_name, model, _ = (RUNS | FOUR_RANKS)[run]
    layout = parse(layout_name)
    groups = initialize(layout, seed=1, timeout_s=60)
    learner = run_learner(folder, run, groups, layout, taught=True)
    for step, accuracy in enumerate(ACCURACIES):
        learn(learner, make_batch(step))
        learner.evaluated(accuracy)
    torch.rand(3 + groups.rank)
    (folder / run).mkdir(exist_ok=True)
    torch.save(state_of(learner), folder / run / f"saved-{groups.rank}.pt")
    save_hf(learner.model, folder / run / "hf", groups, layout, folder / model)
    saver = checkpoint.Saver(learner, folder / run / "checkpoints", CheckpointConfig())
    saver.begin(cursor=6, journal=JOURNAL)
    metrics = [learn(learner, make_batch(step)) for step in (2, 3)]
    saver.poll(wait=True)
    torch.save(state_of(learner), folder / run / f"end-{groups.rank}.pt")
    (folder / run / "metrics.json").write_text(json.dumps(metrics))


def resumed(folder: Path, run: str) -> None:
    layout = parse(RUNS[run][0])
    groups = initialize(layout, seed=2, timeout_s=60)
    learner = run_learner(folder, run, groups, layout, taught=False)
    assert checkpoint.load_latest(learner, folder / run / "checkpoints") == RESUMED
    saved, end = (torch.load(folder / run / f"{name}-{groups.rank}.pt") for name in ("saved", "end"))
    assert differences(state_of(learner), saved) == []
    metrics = [learn(learner, make_batch(step)) for step in (2, 3)]
    assert differences(state_of(learner), end) == []
    assert json.loads((folder / run / "metrics.json").read_text()) == metrics


def changed(folder: Path, run: str, name: str) -> None:
    """Leaves what the test compares: the loaded weights, and what training said from there on."""
    groups = initialize(parse(name), seed=2, timeout_s=60)
    continue_elsewhere(folder, run, groups, parse(name), folder / run / name)


def continue_elsewhere(folder: Path, run: str, groups: ParallelGroups, layout: LayoutConfig, out: Path) -> None:
    learner = run_learner(folder, run, groups, layout, taught=False)
    assert checkpoint.load_latest(learner, folder / run / "checkpoints") == RESUMED
    save_hf(learner.model, out, groups, layout, folder / (RUNS | FOUR_RANKS)[run][1])
    metrics = [learn(learner, make_batch(step)) for step in (2, 3)]
    (out / "metrics.json").write_text(json.dumps(metrics))


def disturbed(folder: Path, run: str) -> None:
    """A damaged checkpoint, and a writer that is killed, are everybody's."""
    groups = initialize(parse(RUNS[run][0]), seed=2, timeout_s=60)
    checkpoints = folder / run / "disturbed"
    if groups.rank == 0:
        for step in (2, 3, 4):
            shutil.copytree(folder / run / "checkpoints" / "step-00000002", checkpoints / f"step-{step:08d}")
        flip(checkpoints / "step-00000003" / "__1_0.distcp")
        (checkpoints / "step-00000004" / "__0_0.distcp").unlink()
    dist.barrier()
    learner = run_learner(folder, run, groups, parse(RUNS[run][0]), taught=False)
    resumed = checkpoint.load_latest(learner, checkpoints)
    assert resumed is not None and (resumed.step, resumed.cursor) == (2, 6)
    assert [words.split("disturbed/")[1] for words in resumed.refused] == [
        "step-00000004/__0_0.distcp is missing",
        "step-00000003/__1_0.distcp is not as it was written (its digest is another)",
    ]
    left = ["step-00000002", "step-00000003.damaged", "step-00000004.damaged"]
    assert sorted(path.name for path in checkpoints.iterdir()) == left
    saver = checkpoint.Saver(learner, checkpoints, CheckpointConfig())
    learn(learner, make_batch(2))
    saver.begin(cursor=9)
    if groups.rank == 1:
        (writer,) = multiprocessing.active_children()
        os.kill(writer.pid or 0, signal.SIGKILL)
    try:
        saver.poll(wait=True)
        raise AssertionError("a killed writer was not noticed")
    except checkpoint.CheckpointError as error:
        assert str(error) == "the checkpoint could not be written: rank 1: its writer ended with exit code -9"
    assert checkpoint.steps(checkpoints) == [2]


def flip(path: Path) -> None:
    """One bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def killed(folder: Path, model: Path, point: str) -> None:
    """``point``: "writing" (before the index of the files), "renaming", "deleting" (half way through an older one),
    "background" (while a process beside this one writes).
    """
    groups = initialize(LayoutConfig(), seed=0, timeout_s=60)
    learner = make_learner(make_config(model), groups)
    assert checkpoint.load_latest(learner, folder) is not None
    learn(learner, make_batch(1))
    if point == "background":
        checkpoint.Saver(learner, folder, CheckpointConfig()).begin(cursor=6)
        (writer,) = multiprocessing.active_children()
        os.kill(writer.pid or 0, signal.SIGSTOP)
        (folder / "writer").write_text(str(writer.pid))
        os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(_kill_at(point))
    checkpoint.save(learner, folder, cursor=6, keep=1)
    raise AssertionError(f"the save ended without passing the point {point!r}")


def _kill_at(point: str) -> Callable[[str, tuple[Any, ...]], None]:
    deleted: list[Any] = []

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "os.remove":
            deleted.append(args[0])
        reached = {
            "writing": event == "open" and str(args[0]).endswith(".metadata.tmp"),
            "renaming": event == "os.rename" and str(args[0]).endswith(".writing"),
            "deleting": event == "os.remove" and len(deleted) == 2,
        }
        if reached[point]:
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


def main() -> None:
    mode, folder = sys.argv[1], Path(sys.argv[2])
    if mode == "killed":
        killed(folder, Path(sys.argv[3]), sys.argv[4])
    dist.init_process_group("gloo")
    if mode in ("train", "continue"):
        {"train": straight, "continue": changed}[mode](folder, *sys.argv[3:])
        shutdown()
        return
    for run in RUNS:
        {"straight": straight, "resumed": resumed}[mode](folder, run)
        parallel_state.destroy_model_parallel()
    if mode == "resumed":
        disturbed(folder, "tp2")
        parallel_state.destroy_model_parallel()
    for run, layout in CHANGES if mode == "resumed" else ():
        changed(folder, run, layout)
        parallel_state.destroy_model_parallel()
    shutdown()


if __name__ == "__main__":  # checkpoint writers start processes which import this module again
    main()
