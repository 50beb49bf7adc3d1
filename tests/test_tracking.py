"""metrics.jsonl survives kills and resumes; the console says one line a step; trackers are optional."""

import dataclasses
import json
import logging
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sdpo.config import Config, ConfigError, ModelConfig, RolloutConfig, TaskConfig, TrackingConfig
from megatron_sdpo.launch.preflight import check_run
from megatron_sdpo.tracking import METRICS_FILE, Tracker, check_trackers, read_metrics
from recipes import recipe

ROOT = Path(__file__).parent.parent
CONFIG = Config(
    name="run",
    run_dir="runs/run",
    steps=28,
    model=ModelConfig(path="model"),
    task=TaskConfig(name="minipipe"),
    rollout=RolloutConfig(prompts_per_step=16, attempts_per_prompt=8),
)
STEP = {
    "verdict/reward": 0.42,
    "eval/accuracy": 0.71,
    "loss/divergence": 0.0123,
    "optim/grad_norm": 0.8,
    "time/generate": 0.9,
    "time/verify": 0.01,
    "time/score_student": 0.3,
    "time/score_teacher": 0.4,
    "time/train": 0.8,
    "time/sync": 0.1,
}


def steps_in(run_dir: Path) -> list[float | None]:
    return [row["step"] for row in read_metrics(run_dir)]


def written(run_dir: Path, steps: int) -> Tracker:
    tracker = Tracker(CONFIG, run_dir, is_writer=True)
    for step in range(steps):
        tracker.log(step, {"loss/divergence": 1.0 / (step + 1)})
    return tracker


def test_a_step_is_one_row_and_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Tracker(CONFIG, tmp_path, is_writer=True)
    tracker.log(0, {"eval/accuracy": 0.03, "time/evaluate": 1.2})
    tracker.log(12, STEP)
    tracker.log(13, {"optim/skipped_steps": 0.0})
    tracker.log(14, {"optim/skipped_steps": 2.0, "optim/grad_norm": 31.0})
    tracker.close()
    assert read_metrics(tmp_path) == [
        {"step": 0, "generations": 0, "eval/accuracy": 0.03, "time/evaluate": 1.2},
        {"step": 12, "generations": 12 * 16 * 8, **STEP},
        {"step": 13, "generations": 13 * 16 * 8, "optim/skipped_steps": 0.0},
        {"step": 14, "generations": 14 * 16 * 8, "optim/skipped_steps": 2.0, "optim/grad_norm": 31.0},
    ]
    text = (tmp_path / METRICS_FILE).read_text()
    assert all(list(row) == sorted(row) for row in map(json.loads, text.splitlines()))
    assert capsys.readouterr().out.splitlines() == [
        "step  0/28 | gens 0 | reward - | eval 0.03 | loss - | grad -",
        "step 12/28 | gens 1536 | reward 0.42 | eval 0.71 | loss 0.0123 | grad 0.80"
        " | gen 0.9 ver 0.0 stu 0.3 tea 0.4 trn 0.8 syn 0.1 s",
        "step 13/28 | gens 1664 | reward - | eval - | loss - | grad -",
        "step 14/28 | gens 1792 | reward - | eval - | loss - | grad 31.00 | skipped 2",
    ]


def test_a_warning_is_a_line_of_the_writer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for is_writer in (True, False):
        tracker = Tracker(CONFIG, tmp_path, is_writer)
        tracker.say("rank 3 is slow")
        tracker.close()
    assert capsys.readouterr().out == "warning: rank 3 is slow\n"


def test_a_value_that_is_not_finite_is_null_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker(CONFIG, tmp_path, is_writer=True)
    tracker.log(3, {"loss/divergence": float("nan"), "optim/grad_norm": float("-inf"), "optim/lr": 1e-3})
    tracker.close()
    (row,) = read_metrics(tmp_path)
    assert row == {"step": 3, "generations": 384, "loss/divergence": None, "optim/grad_norm": None, "optim/lr": 1e-3}
    assert "step 3: loss/divergence is nan; it is recorded as null" in caplog.text
    assert "NaN" not in (tmp_path / METRICS_FILE).read_text()


def test_only_the_writer_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Tracker(CONFIG, tmp_path, is_writer=False)
    tracker.log(1, STEP)
    tracker.truncate_after(0)
    tracker.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_resuming_drops_the_rows_beyond_the_checkpoint(tmp_path: Path) -> None:
    written(tmp_path, 6).close()
    before = read_metrics(tmp_path)
    tracker = Tracker(CONFIG, tmp_path, is_writer=True)
    tracker.truncate_after(3)
    assert read_metrics(tmp_path) == before[:4]
    tracker.log(4, {"loss/divergence": 9.0})
    tracker.close()
    assert steps_in(tmp_path) == [0, 1, 2, 3, 4]
    assert read_metrics(tmp_path)[-1]["loss/divergence"] == 9.0
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]


def test_a_step_is_not_recorded_twice(tmp_path: Path) -> None:
    written(tmp_path, 3).close()
    tracker = Tracker(CONFIG, tmp_path, is_writer=True)
    with pytest.raises(ValueError, match="step 2 is already recorded"):
        tracker.log(2, {})
    tracker.truncate_after(-1)
    tracker.log(0, {})
    tracker.close()
    assert steps_in(tmp_path) == [0]


@pytest.mark.parametrize("torn", ['{"generations": 512, "st', '{"step": "3"}', "\0\0\0\0", '{"generations": 512}'])
def test_a_torn_last_line_is_dropped_with_a_message(
    tmp_path: Path, torn: str, caplog: pytest.LogCaptureFixture
) -> None:
    written(tmp_path, 3).close()
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write(torn)
    assert steps_in(tmp_path) == [0, 1, 2]
    assert "its last line is cut" in caplog.text
    tracker = Tracker(CONFIG, tmp_path, is_writer=True)
    assert "dropped a last line" in caplog.text
    tracker.log(3, {})
    tracker.close()
    assert steps_in(tmp_path) == [0, 1, 2, 3]


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / METRICS_FILE).write_text('{"step": 0}\n{"step": 1}')
    tracker = Tracker(CONFIG, tmp_path, is_writer=True)
    tracker.log(2, {})
    tracker.close()
    assert steps_in(tmp_path) == [0, 1, 2]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_damaged_line_before_the_last_is_refused(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text('{"step": 0}\nrubbish\n{"step": 2}\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl line 2 is not a row of metrics"):
        read_metrics(tmp_path)


def test_a_run_without_steps_has_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


WORKER = """
import os, signal, sys
from pathlib import Path
from tests.test_tracking import STEP, CONFIG
from megatron_sdpo.tracking import Tracker
tracker = Tracker(CONFIG, Path(sys.argv[1]), is_writer=True)
for step in range(3):
    tracker.log(step, STEP)
if sys.argv[2] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
tracker.close()
"""


def test_a_logged_step_survives_a_kill(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WORKER, str(tmp_path), "kill"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60).returncode == -signal.SIGKILL
    assert steps_in(tmp_path) == [0, 1, 2]


def test_a_terminal_shows_a_bar_and_whole_lines(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "60"}
    command = [sys.executable, "-c", WORKER, str(tmp_path), "finish"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=theirs, stderr=subprocess.STDOUT, env=environment)
    os.close(theirs)
    output = b""
    try:
        while chunk := os.read(ours, 65536):
            output += chunk
    except OSError:  # Linux reports the other end's closing as an input/output error
        pass
    finally:
        os.close(ours)
        assert process.wait(timeout=60) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.decode())
    assert "steps" in text and "2/28" in text
    line = "step  2/28 | gens 256 | reward 0.42 | eval 0.71 | loss 0.0123 | grad 0.80"
    assert f"{line} | gen 0.9 ver 0.0 stu 0.3 tea 0.4 trn 0.8 syn 0.1 s\r\n" in text


def test_a_pipe_shows_lines_only(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WORKER, str(tmp_path), "finish"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3
    assert "\x1b" not in done.stdout


def test_tensorboard_gets_the_same_numbers_and_forgets_what_is_done_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = dataclasses.replace(CONFIG, tracking=TrackingConfig(tensorboard=True))
    first = Tracker(config, tmp_path, is_writer=True)
    for step in range(4):
        first.log(step, {"loss/divergence": float(step), "optim/grad_norm": float("nan")})
    first.close()
    second = Tracker(config, tmp_path, is_writer=True)
    second.truncate_after(1)
    second.log(2, {"loss/divergence": 7.0})
    second.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/divergence")] == [(0, 0.0), (1, 1.0), (2, 7.0)]
    assert "optim/grad_norm" not in events.Tags()["scalars"]


@pytest.mark.parametrize(
    ("tracking", "module", "sentence"),
    [
        (TrackingConfig(tensorboard=True), "torch.utils.tensorboard", "set tracking.tensorboard=false"),
        (TrackingConfig(wandb_project="study"), "wandb", "set tracking.wandb_project=none"),
    ],
)
def test_a_tracker_that_is_not_installed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracking: TrackingConfig, module: str, sentence: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # what the import system itself does for an absent module
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        Tracker(dataclasses.replace(CONFIG, tracking=tracking), tmp_path, is_writer=True)


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_tracker_that_is_missing_is_refused_before_a_run(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = TrackingConfig(tensorboard=True) if package == "tensorboard" else TrackingConfig(wandb_project="study")
    monkeypatch.setitem(sys.modules, package, None)  # not found
    with pytest.raises(ConfigError, match=r"not installed; pip install 'megatron-sdpo\[trackers\]', or set tracking"):
        check_run(dataclasses.replace(recipe("minipipe"), tracking=asked))
    check_trackers(TrackingConfig())
