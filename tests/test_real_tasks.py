"""``megatron-sdpo train`` and ``evaluate`` on real questions: long prompts, chat template, verdicts, engine, trainer.

A tiny random model that reads bytes answers nothing rightly; what counts is that the verifier's words reach the teacher
and the teacher's distribution the student. The public data sets are used where they are, made-up rows elsewhere.
"""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec
import pytest
from _pytest.outcomes import Skipped

from megatron_sdpo.chat import Chat
from megatron_sdpo.config import TeacherContextConfig
from megatron_sdpo.launch.run_dir import RunDir
from megatron_sdpo.rollout.journal import Journal
from megatron_sdpo.tasks.sciknoweval import NO_ANSWER
from megatron_sdpo.tasks.tooluse import NO_CALL
from megatron_sdpo.tracking import read_metrics
from tests.livecodebench_setup import SUM, write
from tests.sandbox_setup import skip_without_sandbox
from tests.task_data import SYSTEM, choice_row, real_data, tool_row, written
from tests.tiny_model import write_byte_checkpoint

STEPS = 2
SIZES = {"max_positions": 4096, "hidden_size": 48, "layers": 2, "heads": 2, "kv_heads": 2, "intermediate_size": 96}
DEFAULTS = {f.name: f.default for f in fields(TeacherContextConfig) if "template" in f.name}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_checkpoint(tmp_path_factory.mktemp("bytes") / "model", seed=3, **SIZES)


def shortest(rows: list[dict[str, Any]], count: int, *parts: str) -> list[dict[str, Any]]:
    """The public rows with the shortest prompts, or else made-up ones."""
    try:
        path = real_data(*parts)
    except Skipped:
        return rows[:count]
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted(found, key=lambda row: (len(row["prompt"]), row["idx"]))[:count]


def run(command: str, model: Path, run_dir: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    command_line = [
        *(sys.executable, "-m", "megatron_sdpo.cli", command, "minipipe", "--layout=tp1", f"--run-dir={run_dir}"),
        *(f"teacher_context.{name}={value}" for name, value in DEFAULTS.items()),
        *("rollout.prompts_per_step=2", "rollout.attempts_per_prompt=2", "rollout.max_new_tokens=24", f"steps={STEPS}"),
        *("model.max_length=3000", "teacher_context.max_prompt_tokens=3400", "engine.max_total_tokens=20000"),
        *(f"model.path={model}", "evaluation.every=0", "evaluation.attempts=2", "optim.mini_batches=1"),
        *settings,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command_line, capture_output=True, text=True, timeout=280, env=environment)


def assert_trained(run_dir: Path, model: Path, feedback: str, thinking: bool = False, part: bool = False) -> None:
    """Every step learnt something from the feedback, which answers long prompts in the model's chat format.

    ``part``: the feedback has more words than these.
    """
    rows = read_metrics(run_dir)
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["context/feedback"] == 1.0
        assert (row["loss/divergence"] or 0.0) > 1e-4
        assert (row["optim/grad_norm"] or 0.0) > 0.0
    tokens, groups = Chat(model, thinking), Journal(RunDir(run_dir).attempts).groups(0)
    assert len(groups) == 2
    for group in groups.values():
        for verdict in group.verdicts:
            assert verdict.reward == 0.0
            assert feedback in verdict.feedback if part else verdict.feedback == feedback
        for attempt in group.attempts:
            assert attempt.prompt_ids == tokens.prompt_ids(group.question.messages)
            assert len(attempt.prompt_ids) > 500


def test_training_on_scientific_questions(model: Path, tmp_path: Path) -> None:
    made_up = [{**choice_row(i), "system": 5 * SYSTEM} for i in range(0, 60, 10)]
    data = tmp_path / "data"
    for split, rows in (("train", made_up[:4]), ("test", made_up[4:])):
        chosen = shortest(rows, 4, "sciknoweval", "chemistry", f"{split}.json")
        written(data / "chemistry" / f"{split}.json", chosen)
    settings = ["task.name=sciknoweval", f'task.options={{"data": "{data}", "domain": "chemistry"}}']
    done = run("train", model, tmp_path / "run", *settings, "task.options.format_feedback=true")
    assert done.returncode == 0, done.stderr
    assert_trained(tmp_path / "run", model, NO_ANSWER)


@pytest.mark.slow
def test_training_on_tool_use_and_evaluating(model: Path, tmp_path: Path) -> None:
    made_up = [tool_row(i, [("findDogs", {"breed": "Pug", "limit": i})]) for i in range(6)]
    rows = shortest(made_up, 6, "tooluse", "test.json")
    written(tmp_path / "data" / "train.json", rows[:4])
    written(tmp_path / "data" / "test.json", rows[4:])
    settings = ["task.name=tooluse", f'task.options={{"data": "{tmp_path / "data"}"}}', "model.thinking=true"]
    done = run("train", model, tmp_path / "run", *settings)
    assert done.returncode == 0, done.stderr
    assert_trained(tmp_path / "run", model, NO_CALL, thinking=True)
    (tmp_path / "data" / "train.json").unlink()  # an evaluation needs none
    done = run("evaluate", tmp_path / "run" / "hf", tmp_path / "run", *settings)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["eval/accuracy"] == 0.0
    assert "| all | 2 | 0.0 (0.0 to 0.0) | 0.0 (0.0 to 0.0) |" in done.stderr
    folder = tmp_path / "run" / "evaluations" / "001"
    assert folder.as_posix() in done.stderr
    transcripts = [json.loads(line) for line in (folder / "transcripts.jsonl").read_text().split("\n")[:-1]]
    assert len(transcripts) == 4 and {line["feedback"] for line in transcripts} == {NO_CALL}
    assert json.loads((folder / "scores.json").read_text())["all"]["questions"] == 2


@pytest.mark.slow
def test_training_on_programs_that_are_executed(model: Path, tmp_path: Path) -> None:
    """In sandboxes of the coordinator's; what the teacher reads is what became of them there."""
    skip_without_sandbox()
    problems = [msgspec.structs.replace(SUM, id=f"sum-{i}", question=20 * f"{SUM.question} ({i}) ") for i in range(4)]
    settings = ["task.name=tests.coded_task:Coded", f'task.options={{"data": "{write(tmp_path, *problems)}"}}']
    done = run("train", model, tmp_path / "run", *settings, "sandbox.workers=1", "sandbox.warm=1")
    assert done.returncode == 0, done.stderr
    assert_trained(tmp_path / "run", model, "Output\nnot a number\n\nExpected\n", part=True)
