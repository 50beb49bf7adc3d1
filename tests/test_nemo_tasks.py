"""What NeMo-Run's jobs run, in the environment where they run; NeMo-Run itself is in test_nemo.py."""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sdpo.config import ConfigError, apply_overrides, fields_by_name
from megatron_sdpo.launch.nemo_step import Record, read_record
from megatron_sdpo.launch.nemo_tasks import (
    PYTHON,
    changes,
    convert_command,
    evaluate_command,
    report,
    report_command,
    train,
    train_command,
    training_python,
)
from recipes import recipe, recipes

ROOT = Path(__file__).parent.parent
OVERRIDES = (
    *("optim.lr=0.125", "engine.max_total_tokens=none", 'name="7"', "deterministic=true", "debug.profile_steps=[1,2]"),
    *(
        "task.name=maths",
        "task.options.hint=false",
        "objective.kind=grpo",
        "teacher_context.template={prompt}{solution}{feedback}\n'\"é",
    ),
)


@settings(deadline=None)
@given(st.sampled_from(sorted(recipes())), st.lists(st.sampled_from(OVERRIDES), unique=True))
def test_a_configuration_is_the_recipe_and_its_changes(name: str, overrides: list[str]) -> None:
    wanted = apply_overrides(recipe(name), overrides)
    assert apply_overrides(recipe(name), changes(recipe(name), wanted)) == wanted
    assert changes(wanted, wanted) == []


def test_every_leaf_can_be_changed() -> None:
    base = recipe("minipipe")
    for key in fields_by_name():
        value = base
        for part in key.split("."):
            value = getattr(value, part)
        if type(value) is int:
            wanted = apply_overrides(base, [f"{key}={value + 1}"])
            found = changes(base, wanted)
            assert len(found) == 1 and apply_overrides(base, found) == wanted


def test_commands_are_those_that_a_user_would_type() -> None:
    config = dataclasses.replace(recipe("minipipe"), steps=3)
    assert train_command("minipipe", config, ["optim.lr=0.5"], "tp1", "runs/x") == [
        "train",
        "minipipe",
        *('run_dir="runs/x"', "steps=3", "layout.tensor_parallel=1", "layout.world_size=1", "optim.lr=0.5"),
    ]
    assert evaluate_command("minipipe", model="runs/x/hf") == ["evaluate", "minipipe", "--model=runs/x/hf"]
    assert convert_command("runs/x", "model") == ["convert", "runs/x", "model"]
    assert report_command("runs/x") == ["report", "runs/x"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"recipe": "maxipipe"}, "there is no recipe 'maxipipe'"),
        ({"recipe": "minipipe", "overrides": ["optim.lrr=1"]}, "did you mean optim.lr?"),
        ({"recipe": "minipipe", "layout": "fast"}, "is not a layout"),
        ({"recipe": "minipipe", "overrides": ["optim.lr=-1"]}, "optim.lr"),
    ],
)
def test_a_mistake_is_refused_before_a_job_is_submitted(arguments: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        train_command(**arguments)


def test_tasks_run_the_command_line_of_the_training_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(PYTHON, sys.executable)
    with pytest.raises(SystemExit, match="2"):
        report(str(tmp_path))
    assert "is not a run directory" in capfd.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        train("minipipe", overrides=["model.path=nowhere"], run_dir=str(tmp_path / "run"))
    assert "model.path nowhere is not a directory" in capfd.readouterr().err


def test_without_a_training_environment_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PYTHON, raising=False)
    monkeypatch.setattr("megatron_sdpo.launch.nemo_tasks.CHECKOUT", Path("/nowhere"))
    with pytest.raises(ConfigError, match=r"run `make setup`, or set MEGATRON_SDPO_PYTHON"):
        training_python()


def program(folder: Path, text: str) -> list[str]:
    """nemo_step arguments that run a little program instead of megatron-sdpo."""
    (folder / "little.py").write_text(text)
    return ["--module", "little"]


def step(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_sdpo.launch.nemo_step", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{folder}"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_step_leaves_its_end_and_its_output(tmp_path: Path) -> None:
    little = program(tmp_path, "import sys\nprint('so', sys.argv[1:])\nsys.exit(int(sys.argv[1]))\n")
    done = step(tmp_path, "--record=r/a.json", "--output=r/a.txt", *little, "--", "0", "--x")
    assert (done.returncode, done.stdout) == (0, "so ['0', '--x']\n")
    assert (tmp_path / "r" / "a.txt").read_text() == done.stdout
    record = read_record(tmp_path / "r" / "a.json")
    assert record is not None and (record.command, record.exit_code) == (["0", "--x"], 0) and record.seconds > 0
    failed = step(tmp_path, "--record=r/b.json", "--output=r/b.txt", *little, "--", "7")
    assert failed.returncode == 7
    record = read_record(tmp_path / "r" / "b.json")
    assert record is not None and (record.command, record.exit_code) == (["7"], 7)
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == ["a.json", "a.txt", "b.json"]


def test_a_step_runs_only_after_those_that_it_needs(tmp_path: Path) -> None:
    little = program(tmp_path, "from pathlib import Path\nPath('ran').touch()\n")
    for before, words in (
        (None, "has not finished"),
        (Record(["a"]), "has not finished"),
        (Record(["a"], 3), "failed (3)"),
    ):
        if before is not None:
            before.save(tmp_path / "a.json")
        done = step(tmp_path, "--record=b.json", "--after=a.json", *little, "--", "x")
        assert done.returncode == 2 and f"a {words}, so b is not run" in done.stderr
        assert not (tmp_path / "ran").exists()
        record = read_record(tmp_path / "b.json")
        assert record is not None and record.exit_code == 2
    Record(["a"], 0).save(tmp_path / "a.json")
    assert step(tmp_path, "--record=b.json", "--after=a.json", *little, "--", "x").returncode == 0
    assert (tmp_path / "ran").exists()


def test_a_step_is_made_once_where_that_is_asked_for(tmp_path: Path) -> None:
    little = program(tmp_path, "print('again')\n")
    once = ("--record=a.json", "--once", *little, "--")
    assert step(tmp_path, *once, "x").stdout == "again\n"
    assert step(tmp_path, *once, "x").stdout == "a is done already\n"
    assert step(tmp_path, *once, "y").stdout == "again\n"  # another command


def test_one_node_of_several_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    little = program(tmp_path, "raise SystemExit(5)\n")
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert step(tmp_path, "--record=a.json", *little, "--", "x").returncode == 5
    assert not (tmp_path / "a.json").exists()


def test_signals_reach_what_a_step_runs(tmp_path: Path) -> None:
    text = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(9))\n"
        "print('ready', flush=True)\ntime.sleep(60)\n"
    )
    for number, code in ((signal.SIGUSR1, 9), (signal.SIGTERM, 128 + signal.SIGTERM)):
        arguments = ["--record", str(tmp_path / "a.json"), *program(tmp_path, text), "--", "x"]
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_sdpo.launch.nemo_step", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"},
            stdout=subprocess.PIPE,
            text=True,
        )
        with process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.send_signal(number)
            assert process.wait(timeout=30) == code
        record = read_record(tmp_path / "a.json")
        assert record is not None and record.exit_code == code
