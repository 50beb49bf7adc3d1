"""One step of a run again: taken apart without a trace, with the numbers that it had, failing as it failed."""

import re
import shutil
from pathlib import Path

import pytest

from megatron_sdpo.chat import Chat
from megatron_sdpo.config import LayoutConfig
from megatron_sdpo.launch.replay_trainer import compared, found_words
from megatron_sdpo.mcore import checkpoint
from megatron_sdpo.mcore.groups import ParallelGroups
from megatron_sdpo.mcore.inspection import Found
from megatron_sdpo.rollout.journal import Journal
from megatron_sdpo.tasks import load_task
from recipes.minipipe import BASE_MODEL, minipipe
from tests.dist_checkpoint import flip
from tests.dist_replay import check_inspection
from tests.launch import run_ranks
from tests.test_half_runs import assert_equal_to_the_bit, group, replayed, train


def test_taking_a_step_apart_changes_nothing(folder: Path, groups: ParallelGroups) -> None:
    check_inspection(folder, groups, LayoutConfig())


@pytest.mark.parametrize(
    "layouts", [("pp2vp2",), pytest.param(("dp2-overlap", "cp2", "tp2-sp"), marks=pytest.mark.slow)]
)
def test_nor_under_layouts(folder: Path, layouts: tuple[str, ...]) -> None:
    run_ranks("dist_replay.py", 2, [str(folder), *layouts], timeout=300)


def test_what_is_said_of_a_micro_batch() -> None:
    found = Found(1, 2, 3, 4, (("5/0/0", "5/0/1"), tuple(f"5/1/{i}" for i in range(10))), (0.25, 0.5), 1.5)
    assert found_words(found).splitlines() == [
        "mini-batch 1/2, micro-batch 3/4: gradient norm 1.5",
        "  data rank 0: loss 0.25, 2 samples 5/0/0 5/0/1",
        f"  data rank 1: loss 0.5, 10 samples {' '.join(f'5/1/{i}' for i in range(8))} and 2 more",
    ]


def test_numbers_are_compared_to_the_bit() -> None:
    recorded = {"step": 3, "generations": 9, "a": 0.1 + 0.2, "b": None, "time/train": 1.0, "eval/accuracy": 0.5}
    assert compared({"a": 0.1 + 0.2, "b": float("nan"), "time/train": 2.0, "c": 1.0}, recorded, 3) == (
        "row 3 of metrics.jsonl: 2 of 2 numbers are equal to the bit"
    )
    first, line = compared({"a": 0.3, "b": float("inf")}, recorded, 3).splitlines()
    assert first.startswith("row 3 of metrics.jsonl: 1 of 2 ")
    assert line.split() == ["a", "0.3", "here,", "0.30000000000000004", "recorded"]
    assert compared({}, None, 3) == "metrics.jsonl has no row 3 to compare with: the run has not got there"


def test_a_step_that_cannot_be_replayed_is_refused(tmp_path: Path) -> None:
    assert "cannot read the configuration" in replayed(tmp_path, 0).stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_is_only_read_and_fails_again_as_it_failed(tmp_path: Path) -> None:
    tokens, journal = Chat(BASE_MODEL), Journal(tmp_path / "other" / "attempts")
    questions = load_task("minipipe", **minipipe().task.options).train_questions()
    for step in range(4):
        for slot in (0, 1):
            journal.append(group(step, slot, questions[2 * step + slot], tokens))
    source = f"--from-journal={tmp_path / 'other'}"
    run_dir, broken = tmp_path / "run", tmp_path / "broken"

    done = train(source, f"--run-dir={run_dir}", "steps=4", "--deterministic", "checkpoint.every=2")
    assert done.returncode == 0, done.stderr
    whole = contents(run_dir)
    done = replayed(run_dir, 3)
    assert "begins with the checkpoint of step 2, 1 steps before this one" in done.stdout
    assert_equal_to_the_bit(done.stdout, row=4)
    assert contents(run_dir) == whole
    flip(run_dir / "checkpoints" / "step-00000002" / "__0_0.distcp")
    damaged = contents(run_dir)
    done = replayed(run_dir, 2)
    assert "begins with the model's directory, 2 steps before this one" in done.stdout
    assert_equal_to_the_bit(done.stdout, row=3)
    assert contents(run_dir) == damaged and checkpoint.steps(run_dir / "checkpoints") == [2, 4]
    done = replayed(run_dir, 4)
    assert (done.returncode, done.stderr) == (2, "error: the run has steps 0 to 3, not 4; set --step to one of them\n")

    settings = ("optim.mini_batches=2", "optim.lr=1e30", "rollout.attempts_per_prompt=2")
    done = train(source, f"--run-dir={broken}", *settings)
    assert done.returncode == 1
    sentence = re.search(r"(training stopped at step 0, .*as before that step); the batch is in", done.stderr)
    assert sentence is not None, done.stderr
    shutil.rmtree(tmp_path / "other")  # the batch of a failure is enough
    done = replayed(broken, 0)
    assert (done.returncode, done.stderr) == (0, "")
    assert "step 0, a batch kept at its failure:" in done.stdout
    assert done.stdout.endswith(f"it fails again: {sentence[1]}\n")
    assert "mini-batch 2/2, micro-batch 1/1: gradient norm nan" in done.stdout
    done = replayed(broken, 0, "--detect-anomaly")
    assert done.returncode == 1 and "the run itself was only read" in done.stderr
    assert re.search(r"Function '\w+' returned nan values in its \d+th output. \(at samples 0/\d/\d", done.stderr)


def contents(run_dir: Path) -> dict[str, bytes]:
    files = [path for path in run_dir.rglob("*") if path.is_file() and "replay" not in path.parts]
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in files}
