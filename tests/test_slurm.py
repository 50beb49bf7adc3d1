"""Whole jobs on a real Slurm: MiniPipe on two nodes, to the end whatever happens on the way."""

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from megatron_sdpo.tracking import read_metrics
from megatron_sdpo.types import Group
from tests.slurm_sandbox import Job, Sandbox, sandbox, why_not

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

SHORT = ("evaluation.every=0", "rollout.prompts_per_step=4", "optim.mini_batches=1")


@pytest.fixture(scope="module")
def slurm() -> Iterator[Sandbox]:
    if reason := why_not():
        pytest.skip(reason)
    with sandbox(nodes=3, prefix="t", number=1) as started:
        yield started


@pytest.fixture(autouse=True)
def no_job_stays(slurm: Sandbox) -> Iterator[None]:
    yield
    slurm.client("scancel", "--user=root")


def minipipe(slurm: Sandbox, folder: Path, *overrides: str, options: tuple[str, ...] = (), **settings: str) -> Job:
    return slurm.submit("sdpo_minipipe.sh", folder, *SHORT, *overrides, options=options, **settings)


def last_step(job: Job) -> int:
    path = job.run_dir / "metrics.jsonl"
    rows = read_metrics(job.run_dir) if path.exists() else []
    return int(rows[-1]["step"] or 0) if rows else 0


def status(job: Job) -> dict[str, object]:
    return json.loads((job.run_dir / "status.json").read_text())


def assert_complete(job: Job, steps: int) -> None:
    """Every step once, by attempts of its own weights: nothing was trained on twice."""
    assert status(job)["state"] == "finished", job.text()
    assert [row["step"] for row in read_metrics(job.run_dir)] == list(range(1, steps + 1))
    lines = [line for path in (job.run_dir / "attempts").glob("*.jsonl") for line in path.read_text().splitlines()]
    groups = [msgspec.json.decode(line, type=Group) for line in lines]
    assert sorted((g.step, g.slot) for g in groups) == [(step, slot) for step in range(steps) for slot in range(4)]
    assert all(a.weight_version == g.step for g in groups for a in g.attempts)
    assert (job.run_dir / "hf" / "model.safetensors").is_file()


def role(job: Job, module: str) -> psutil.Process:
    """A process of the job."""
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
        except psutil.Error:
            continue
        if f"megatron_sdpo.{module}" in command and (str(job.run_dir) in command or module.startswith("rollout")):
            return process
    raise AssertionError(f"{module} does not run")


def test_two_nodes_train_to_the_end_and_not_again(slurm: Sandbox, tmp_path: Path) -> None:
    job = minipipe(slurm, tmp_path, "steps=3")
    assert job.end() == "COMPLETED", job.text()
    assert_complete(job, 3)
    first = slurm.client("scontrol", "show", "hostnames", job.last["NodeList"]).split()[0]
    plan = json.loads((job.run_dir / "slurm" / "latest" / "plan.json").read_text())["nodes"]
    assert [(n["trainer_ranks"], n["engines"]) for n in plan] == [("0-1", []), ("none", ["engine-0"])]
    assert plan[0]["node"] == first and plan[1]["node"] != first
    assert {path.name for path in (job.run_dir / "preflight").iterdir()} == {f"{n['node']}.json" for n in plan}
    logs = job.run_dir / "logs"
    assert all((logs / name).stat().st_size >= 0 for name in ("trainer.log", "engine-0.log", "coordinator.log"))
    assert "preflight: the slowest all-reduce between neighbours has" in job.text()
    assert (job.run_dir / "code" / "megatron_sdpo" / "loop.py").is_file()
    rows, second = read_metrics(job.run_dir), minipipe(slurm, tmp_path, "steps=3")
    assert second.end(90) == "COMPLETED"
    assert read_metrics(job.run_dir) == rows and not (job.run_dir / "slurm" / "attempt-002" / "orders").exists()


def test_a_wrong_configuration_fails_at_once_with_the_sentence(slurm: Sandbox, tmp_path: Path) -> None:
    job = minipipe(slurm, tmp_path, "optim.lr=-1")
    assert job.end(60) == "FAILED"
    assert "error: optim.lr is -1.0; it must be at least 0" in job.text()
    (tmp_path / "nodes").mkdir()
    job = minipipe(slurm, tmp_path / "nodes", options=("--nodes=3",))
    assert job.end(60) == "FAILED"
    assert "error: the job has 3 nodes, but the recipe needs 1 for 2 trainer ranks and 1 for 1 engines" in job.text()
    assert job.last["Restarts"] == "0"


def test_the_tasks_of_an_array_have_directories_of_their_own(slurm: Sandbox, tmp_path: Path) -> None:
    job = minipipe(slurm, tmp_path, options=("--array=0-1",), SDPO_DRY_RUN="1")
    runs = [Path(f"{job.run_dir}-seed{task}") for task in range(2)]
    job.until(lambda: all((run / "slurm" / "attempt-001" / "plan.json").exists() for run in runs))
    job.until(lambda: all(json.loads((run / "status.json").read_text())["state"] == "planned" for run in runs))
    assert not job.run_dir.exists()


def test_the_time_limit_leads_to_a_checkpoint_and_a_requeue(slurm: Sandbox, tmp_path: Path) -> None:
    """The limit is moved so near that the warning is due; while the job waits in the queue, it is moved away."""
    steps = 200  # a minute at least: Slurm looks at the limits every half minute
    options = ("--time=20", "--signal=B:USR1@600")
    job = minipipe(slurm, tmp_path, f"steps={steps}", "checkpoint.every=1000", options=options)
    job.until(lambda: last_step(job) >= 2)
    hours, minutes, _ = map(int, job.look()["RunTime"].split(":"))
    slurm.client("scontrol", "update", f"JobId={job.number}", f"TimeLimit={hours * 60 + minutes + 10}")
    job.until(lambda: job.look()["Restarts"] == "1")
    slurm.client("scontrol", "update", f"JobId={job.number}", "TimeLimit=20")
    assert "got USR1" in job.text()
    assert re.search(r"attempt-001 interrupted at step [1-9]\d*: the time limit is near", job.text()), job.text()
    assert job.end(350) == "COMPLETED", job.text()
    assert job.last["Restarts"] == "1"
    assert_complete(job, steps)


def test_preemption_leads_to_a_checkpoint_and_a_requeue(slurm: Sandbox, tmp_path: Path) -> None:
    options = ("--partition=preempt",)
    job = minipipe(slurm, tmp_path, "steps=60", "checkpoint.every=1000", options=options)
    job.until(lambda: last_step(job) >= 2)
    slurm.client("sbatch", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=true")
    assert job.end(300) == "COMPLETED", job.text()
    assert job.last["Restarts"] == "1"
    assert "interrupted at step" in job.text() and "preempted" in job.text()
    assert_complete(job, 60)


@pytest.mark.parametrize("which", ["first", "last"])
def test_a_lost_node_leads_to_a_requeue_elsewhere(slurm: Sandbox, tmp_path: Path, which: str) -> None:
    """The last has the engine and the coordinator; with the first the batch script is gone, too."""
    job = minipipe(slurm, tmp_path, "steps=40", "checkpoint.every=2")
    job.until(lambda: last_step(job) >= 5)
    nodes = slurm.client("scontrol", "show", "hostnames", job.look()["NodeList"]).split()
    lost = nodes[0 if which == "first" else -1]
    slurm.control("kill-node", lost)
    try:
        job.until(lambda: int(job.look()["Restarts"]) >= 1, 120)
        assert job.end(300) == "COMPLETED", job.text()
        assert lost not in slurm.client("scontrol", "show", "hostnames", job.last["NodeList"]).split()
        assert_complete(job, 40)
        if which == "last":
            assert f"node {lost} was lost" in job.text()
    finally:
        slurm.control("start-node", lost)
        job.until(lambda: lost in slurm.client("sinfo", "-h", "-N", "-t", "idle", "-o", "%N"), 60)


def test_a_crash_shows_the_role_and_is_not_repeated(slurm: Sandbox, tmp_path: Path) -> None:
    """Nothing was saved since the start, so it would come again."""
    job = minipipe(slurm, tmp_path, "steps=1000", "checkpoint.every=1000")
    job.until(lambda: last_step(job) >= 1)
    os.kill(role(job, "launch.coordinator").pid, signal.SIGKILL)
    assert job.end(60) == "FAILED"
    assert "error: coordinator was ended by SIGKILL; it ran on node" in job.text()
    assert job.last["Restarts"] == "0"


def test_a_cancelled_job_stays_cancelled(slurm: Sandbox, tmp_path: Path) -> None:
    job = minipipe(slurm, tmp_path, "steps=1000", "checkpoint.every=1000")
    job.until(lambda: last_step(job) >= 1)
    job.cancel()
    job.until(lambda: "not put back" in job.text(), 60)
    assert job.end(60) == "CANCELLED"
    assert job.last["Restarts"] == "0"
    assert status(job)["state"] == "interrupted" and status(job)["step"] == last_step(job)  # it was saved all the same
