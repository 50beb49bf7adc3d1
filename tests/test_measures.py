"""Every number of a row of metrics.jsonl is described, and nothing is described that no code writes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sdpo.launch.stragglers import PHASES as COMPARED
from megatron_sdpo.measures import MEASURES, Measure, in_order, measure, shown
from megatron_sdpo.teacher_context import _COUNTED  # pyright: ignore[reportPrivateUsage]
from megatron_sdpo.tracking import Tracker
from tests.test_report import config_for, make_run

PACKAGE = Path(__file__).parent.parent / "megatron_sdpo"
FAMILIES = sorted({key.partition("/")[0] for key in MEASURES if "/" in key})
AWAY = ("measures.py", "report/", "cli/", "discovery/", "tasks/")
"""Who reads the numbers, and what has slashes of another meaning."""


def written() -> set[str]:
    """The keys that stand in the source, and those that are made of a list there."""
    text = "".join(
        path.read_text()
        for path in sorted(PACKAGE.rglob("*.py"))
        if not path.relative_to(PACKAGE).as_posix().startswith(AWAY)
    )
    keys = set(re.findall(rf'"((?:{"|".join(FAMILIES)})/\w+)"', text))
    phases = set(re.findall(r'phases\("(\w+)"\)', (PACKAGE / "loop.py").read_text()))
    keys |= {f"time/{name}" for name in phases}
    keys |= {f"context/{name}" for name in _COUNTED}
    return keys | {f"perf/slowest_seconds/{name}" for name in COMPARED} | {"step", "generations"}


def test_what_is_written_is_described_and_the_other_way_round() -> None:
    assert written() == set(MEASURES)


def test_every_family_of_keys_is_known() -> None:
    """A key of a new family would escape the comparison above: the trainer's row is made of these parts."""
    assert {"rollout", "verdict", "context", "loss", "optim", "sync", "time", "flops", "perf", "eval", "precision"} == {
        *FAMILIES
    }


def test_a_maximum_is_that_of_its_mean() -> None:
    assert measure("loss/divergence/max") == Measure(
        "nats", "largest of all tokens: between student and teacher (objective.alpha says which)"
    )
    assert measure("loss/nothing") is None and measure("loss/nothing/max") is None
    order = in_order(["zzz", "loss/mismatch/max", "eval/accuracy", "loss/mismatch", "step"])
    assert order == ["step", "eval/accuracy", "loss/mismatch", "loss/mismatch/max", "zzz"]


@pytest.mark.parametrize(
    ("value", "text"), [(None, "not finite"), (1024, "1,024"), (0.5, "0.5"), (1.23456e-7, "1.235e-07"), (2.0, "2")]
)
def test_values_for_people(value: float | None, text: str) -> None:
    assert shown(value) == text


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "megatron_sdpo.cli", *map(str, arguments)]
    return subprocess.run(program, capture_output=True, text=True, timeout=60)


def test_the_command(tmp_path: Path) -> None:
    every = command("metrics")
    assert every.returncode == 0, every.stderr
    assert [line.split()[0] for line in every.stdout.splitlines()[1:-1]] == list(MEASURES)
    tracker = Tracker(config_for(tmp_path), tmp_path, is_writer=True)
    tracker.log(1, {"verdict/reward": 0.25, "eval/accuracy": 0.5})
    tracker.log(2, {"verdict/reward": 0.75, "own/number": 3.0})
    tracker.close()
    own = command("metrics", tmp_path)
    lines = {line.split()[0]: line.split()[1:] for line in own.stdout.splitlines()}
    assert lines["verdict/reward"][:2] == ["0.75", "reward"] and lines["eval/accuracy"][0] == "0.5"
    assert lines["own/number"] == ["3"]
    nothing = command("metrics", tmp_path / "absent")
    assert nothing.returncode == 2 and "has no metrics.jsonl with a row; pass the directory of a run" in nothing.stderr


def test_runs_are_compared_by_the_command(tmp_path: Path) -> None:
    a, b, out = make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=3), tmp_path / "both.html"
    done = command("report", a, b, "--out", out)
    assert (done.returncode, done.stdout) == (0, f"{out}\n"), done.stderr
    assert "seed" in out.read_text() and out.with_suffix(".png").exists()
    refused = command("report", a, "--out", out)
    assert refused.returncode == 2 and "--out is for several runs" in refused.stderr
