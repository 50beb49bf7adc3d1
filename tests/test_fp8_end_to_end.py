"""``train``, ``convert --fp8`` and ``evaluate`` with student, teacher and engine in FP8, emulated on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sdpo.tasks.sciknoweval import NO_ANSWER
from megatron_sdpo.tracking import read_metrics
from tests.task_data import SYSTEM, choice_row, written
from tests.test_real_tasks import assert_trained, run
from tests.tiny_model import write_byte_checkpoint

SIZES = {"max_positions": 4096, "hidden_size": 128, "layers": 2, "heads": 2, "kv_heads": 2, "head_dim": 128}
FP8 = ("engine.fp8=blockwise", "fp8.student=emulated", "fp8.teacher=emulated", "publish.probe_tolerance=0.5")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_in_fp8_from_end_to_end(tmp_path: Path) -> None:
    model = write_byte_checkpoint(tmp_path / "model", seed=3, family="qwen3", intermediate_size=256, std=0.05, **SIZES)
    rows = [{**choice_row(i), "system": 5 * SYSTEM} for i in range(0, 60, 10)]
    for split, chosen in (("train", rows[:4]), ("test", rows[4:])):
        written(tmp_path / "data" / "chemistry" / f"{split}.json", chosen)
    settings = ["task.name=sciknoweval", f'task.options={{"data": "{tmp_path / "data"}", "domain": "chemistry"}}']
    settings.append("task.options.format_feedback=true")
    done = run("train", model, tmp_path / "run", *settings, *FP8)
    assert done.returncode == 0, done.stderr
    assert_trained(tmp_path / "run", model, NO_ANSWER)
    for row in read_metrics(tmp_path / "run"):
        assert 0.0 < (row["loss/mismatch"] or 0.0) < 1e-3, "importance weights have next to nothing to correct"
        assert (row["sync/probe_gap"] or 0.0) < 0.05
    refused = run("evaluate", tmp_path / "run" / "hf", tmp_path / "run", *settings, *FP8)
    assert refused.returncode == 2 and "megatron-sdpo convert --fp8" in refused.stderr
    convert = ["convert", "--fp8", str(tmp_path / "run"), str(tmp_path / "in-fp8")]
    subprocess.run([sys.executable, "-m", "megatron_sdpo.cli", *convert], check=True)
    done = run("evaluate", tmp_path / "in-fp8", tmp_path / "run", *settings, *FP8)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["eval/accuracy"] == 0.0
