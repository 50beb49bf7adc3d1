"""A trainer without engines, on what a journal holds; engines without a trainer, filling one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megatron_sdpo.chat import Chat
from megatron_sdpo.mcore import checkpoint
from megatron_sdpo.rollout.journal import Journal
from megatron_sdpo.tasks import load_task
from megatron_sdpo.tracking import read_metrics
from megatron_sdpo.types import Attempt, Group, Question
from recipes.minipipe import BASE_MODEL, minipipe
from tests.test_determinism import SETTINGS, attempts, finished
from tests.test_end_to_end import start

STEPS = 2
SMALL = ("rollout.prompts_per_step=2", "rollout.attempts_per_prompt=2", f"steps={STEPS}", "checkpoint.every=1")


def train(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_sdpo.cli", "train", "minipipe", "--layout=tp1", *SMALL, *arguments],
        capture_output=True,
        text=True,
        timeout=250,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def replayed(run_dir: Path, step: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_sdpo.cli", "replay", str(run_dir), f"--step={step}", *arguments],
        capture_output=True,
        text=True,
        timeout=250,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def group(step: int, slot: int, question: Question, tokens: Chat) -> Group:
    """Two attempts at a question, made up and judged by its verifier."""
    task = load_task("minipipe", **minipipe().task.options)
    prompt_ids = tokens.prompt_ids(question.messages)
    made = []
    for text in ("sort", "item sort keep"):
        ids = (*tokens.encode(text), tokens.eos_id)
        made.append(Attempt(prompt_ids, ids, (-1.5,) * len(ids), text, "stop", step))
    return Group(step, slot, question, tuple(made), tuple(task.verify(question, a.text) for a in made))


@pytest.fixture(scope="module")
def journalled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory that holds attempts at ``STEPS`` steps."""
    folder = tmp_path_factory.mktemp("other")
    tokens, journal = Chat(BASE_MODEL), Journal(folder / "attempts")
    questions = load_task("minipipe", **minipipe().task.options).train_questions()
    for step in range(STEPS):
        for slot in (1, 0):
            journal.append(group(step, slot, questions[2 * step + slot], tokens))
    return folder


def test_a_run_goes_on_under_another_layout(journalled: Path, tmp_path: Path) -> None:
    straight, changed = tmp_path / "straight", tmp_path / "changed"
    given = (
        f"--from-journal={journalled}",
        "optim.lr_decay=constant",
    )  # else the rate depends on how many steps follow
    for run_dir, settings in (
        (straight, ("--layout=tp1",)),
        (changed, ("--layout=tp1", "steps=1")),
        (changed, ("--layout=pp2", "layout.recompute=full")),
    ):
        done = train(*given, f"--run-dir={run_dir}", *settings)
        assert done.returncode == 0, done.stderr
    assert "resumed from the checkpoint of step 1" in done.stdout
    rows, expected = read_metrics(changed), read_metrics(straight)
    assert [row["step"] for row in rows] == [1, 2]
    for key in ("loss/total", "optim/grad_norm"):
        assert rows[1][key] == pytest.approx(expected[1][key], rel=1e-4)
    found, wanted = (load_file(run_dir / "hf" / "model.safetensors") for run_dir in (changed, straight))
    before = load_file(Path(BASE_MODEL) / "model.safetensors")
    moved = max(float((wanted[key] - before[key]).abs().max()) for key in wanted)
    assert max(float((found[key] - wanted[key]).abs().max()) for key in wanted) <= 1e-2 * moved


def test_a_trainer_needs_only_a_journal(journalled: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done = train(f"--from-journal={journalled}", f"--run-dir={run_dir}", "steps=3")
    assert done.returncode == 2
    assert "attempts has 0 groups of step 2, not rollout.prompts_per_step 2; set steps=2" in done.stderr
    assert not run_dir.exists()
    done = train(f"--from-journal={journalled}", f"--run-dir={run_dir}", "--deterministic")
    assert done.returncode == 0, done.stderr
    rows = read_metrics(run_dir)
    assert [row["step"] for row in rows] == [1, 2]
    assert all((row["optim/grad_norm"] or 0.0) > 0.0 and row["context/feedback"] == 1.0 for row in rows)
    assert checkpoint.steps(run_dir / "checkpoints") == [1, 2]
    assert [path.name for path in (run_dir / "logs").glob("*.log")] == ["trainer.log"]
    assert (run_dir / "hf" / "model.safetensors").is_file()
    done = replayed(run_dir, 1)
    assert done.returncode == 0, done.stderr
    assert "begins with the checkpoint of step 1, 0 steps before this one" in done.stdout
    assert_equal_to_the_bit(done.stdout, row=2)


def assert_equal_to_the_bit(said: str, row: int) -> None:
    found = re.search(rf"row {row} of metrics.jsonl: (\d+) of (\d+) numbers are equal to the bit\n", said)
    assert found is not None and found[1] == found[2] and int(found[2]) > 15, said


def test_no_journal_is_refused(tmp_path: Path) -> None:
    done = train(f"--from-journal={tmp_path / 'nowhere'}", f"--run-dir={tmp_path / 'run'}")
    assert (done.returncode, "nowhere is not a directory" in done.stderr) == (2, True)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_halves_make_the_whole(tmp_path: Path) -> None:
    """Attempts of the first step are those of a whole run; training on a whole run's journal gives its weights."""
    runs = {name: tmp_path / name / "run" for name in ("whole", "sampled", "trained")}
    for run_dir in runs.values():
        run_dir.parent.mkdir()
    finished(start(runs["whole"], *SETTINGS, "steps=3"))
    finished(start(runs["sampled"], *SETTINGS, "steps=2", "--rollout-only"))
    finished(start(runs["trained"], *SETTINGS, "steps=3", f"--from-journal={runs['whole']}"))
    whole, sampled = (attempts(runs[name]) for name in ("whole", "sampled"))
    assert len(sampled) == 8 and all(sampled[0, slot] == whole[0, slot] for slot in range(4))
    assert {a.weight_version for group in sampled.values() for a in group.attempts} == {0}
    assert not (runs["sampled"] / "hf").exists()
    found, expected = (load_file(runs[name] / "hf" / "model.safetensors") for name in ("trained", "whole"))
    assert all(found[key].equal(expected[key]) for key in expected)
