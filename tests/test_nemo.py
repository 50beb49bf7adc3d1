"""NeMo-Run, as a user has it: processes of its own environment, whose jobs run in this one (make test-nemo)."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_sdpo.launch.nemo_step import read_record
from megatron_sdpo.tracking import read_metrics
from recipes import recipes

ROOT = Path(__file__).parent.parent
NEMO = ROOT / ".venv-nemo" / "bin" / "python"
ABSENT = pytest.mark.skipif(not NEMO.exists(), reason="nemo_run is in an environment of its own: make nemo-setup")
SHORT = '["steps=1","evaluation.every=0","evaluation.questions=8"]'
ACCOUNT = ("run.executor=slurm", "run.executor.account=acct")
SANDBOX = {
    "SANDBOX_BRIDGE": "nrbr0",
    "SANDBOX_SUBNET": "10.83.0",
    "SANDBOX_PREFIX": "m",
    "SANDBOX_PORT": "19417",
    "NODES": "2",
}


def environment(folder: Path) -> dict[str, str]:
    own = {"NEMORUN_HOME": str(folder / "home"), "MEGATRON_SDPO_PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    return {**os.environ, **own, "OMP_NUM_THREADS": "1", "COLUMNS": "400", "NO_COLOR": "1", "SBATCH_ACCOUNT": ""}


def nemo(folder: Path, *arguments: str, timeout_s: float = 120, **variables: str) -> subprocess.CompletedProcess[str]:
    """``python -m megatron_sdpo.launch.nemo`` in ``folder``."""
    return subprocess.run(
        [str(NEMO), "-m", "megatron_sdpo.launch.nemo", *arguments],
        cwd=folder,
        env=environment(folder) | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def program(folder: Path, text: str) -> dict:
    """What a Python program in NeMo-Run's environment prints, as JSON."""
    done = subprocess.run(
        [str(NEMO), "-c", text], cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@ABSENT
def test_a_recipe_is_dry_run_for_slurm_from_the_command_line(tmp_path: Path) -> None:
    """The one test of the quick suite, with all forms of an override, where NeMo-Run's environment is there."""
    arguments = ["-f", "minipipe_grpo", "config.optim.lr*=2", "config.engine.max_total_tokens=none", "layout=tp1"]
    arguments += ["config.debug.profile_steps=[0,1]", 'overrides=["task.options.hint=false"]', "run.executor=slurm"]
    arguments += ["run.executor.nodes=2", "run.executor.account=acct", "run.executor.time=01:00:00"]
    done = nemo(tmp_path, "train", *arguments, "--dryrun", "--yes")
    assert done.returncode == 0, done.stdout + done.stderr
    run_line = next(line for line in done.stdout.splitlines() if line.startswith("exec "))
    for word in ("minipipe-grpo", "optim.lr=0.002", "engine.max_total_tokens=null", "layout.world_size=1"):
        assert word in run_line.split(), word
    assert "'debug.profile_steps=[0, 1]'" in run_line and '"hint": false' in run_line
    for flag in ("account=acct", "nodes=2", "ntasks-per-node=1", "gpus-per-node=8", "time=01:00:00", "mem=0"):
        assert f"#SBATCH --{flag}" in done.stdout
    assert "#SBATCH --exclusive" in done.stdout and "job-name=minipipe-grpo.train" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} <= {"home"}  # only NeMo-Run's own


@ABSENT
@pytest.mark.nemo
def test_recipes_load_there_without_what_trains(tmp_path: Path) -> None:
    found = program(
        tmp_path,
        "import json, sys\nfrom recipes import recipe, recipes\nfrom megatron_sdpo.config import check\n"
        "for name in recipes():\n    check(recipe(name))\n"
        "print(json.dumps([sorted(recipes()), sorted({'torch', 'megatron', 'sglang', 'ray'} & set(sys.modules))]))",
    )
    assert found == [sorted(recipes()), []]


@ABSENT
@pytest.mark.nemo
def test_a_partial_holds_the_whole_recipe_and_builds_what_it_holds(tmp_path: Path) -> None:
    found = program(
        tmp_path,
        "import dataclasses, json\nfrom recipes import recipe, recipes\n"
        "from megatron_sdpo.launch.nemo_experiments import partial, configuration_of\n"
        "same = [configuration_of(partial(name)) == recipe(name) for name in recipes()]\n"
        "task = partial('minipipe')\ntask.config.optim.lr *= 2\ntask.config.objective.kind = 'grpo'\n"
        "lr, kind = configuration_of(task).optim.lr, configuration_of(task).objective.kind\n"
        "print(json.dumps([same, lr, kind, recipe('minipipe').optim.lr]))",
    )
    same, lr, kind, before = found
    assert all(same) and (lr, kind) == (2 * before, "grpo")


@ABSENT
@pytest.mark.nemo
def test_a_sweep_has_a_run_for_each_point_in_a_directory_of_its_own(tmp_path: Path) -> None:
    found = program(
        tmp_path,
        "import json\nfrom megatron_sdpo.launch.nemo_experiments import partial, sweep, configuration_of\n"
        "grid = {'optim.lr': [1e-3, 5e-4], 'objective.kind': ['grpo', 'sdpo']}\n"
        "steps = sweep(partial('minipipe', run_dir='runs/s'), grid)\n"
        "configs = [configuration_of(step.task) for step in steps.values()]\n"
        "print(json.dumps([[c.optim.lr, c.objective.kind, c.run_dir] for c in configs]))",
    )
    assert found == [
        [0.001, "grpo", "runs/s/optim.lr=0.001,objective.kind=grpo"],
        [0.001, "sdpo", "runs/s/optim.lr=0.001,objective.kind=sdpo"],
        [0.0005, "grpo", "runs/s/optim.lr=0.0005,objective.kind=grpo"],
        [0.0005, "sdpo", "runs/s/optim.lr=0.0005,objective.kind=sdpo"],
    ]


@ABSENT
@pytest.mark.nemo
def test_a_study_is_a_run_for_each_of_its_cells(tmp_path: Path) -> None:
    found = program(
        tmp_path,
        "import json\nfrom megatron_sdpo.launch.nemo_experiments import configuration_of, study_steps\n"
        "steps = study_steps('ladder', 'runs/s', ['grpo'], ['8B', '14B'], [3])\n"
        "configs = [configuration_of(step.task) for step in steps.values()]\n"
        "print(json.dumps([[*steps], [[c.model.path, c.objective.kind, c.seed, c.run_dir] for c in configs]]))",
    )
    assert found == [
        ["grpo-8B-seed3", "grpo-14B-seed3"],
        [
            ["models/Qwen3-8B", "grpo", 3, "runs/s/grpo-8B-seed3"],
            ["models/Qwen3-14B", "grpo", 3, "runs/s/grpo-14B-seed3"],
        ],
    ]


@ABSENT
@pytest.mark.nemo
def test_a_pipeline_evaluates_what_it_exports_in_full_precision(tmp_path: Path) -> None:
    found = program(
        tmp_path,
        "import json\nfrom megatron_sdpo.launch.nemo_experiments import partial, pipeline, configuration_of\n"
        "steps = pipeline(partial('minipipe', overrides=['engine.fp8=blockwise', 'steps=2'], run_dir='runs/p'))\n"
        "made = [configuration_of(steps[name].task) for name in ('train', 'evaluate')]\n"
        "print(json.dumps([[c.engine.fp8, c.steps] for c in made]))",
    )
    assert found == [["blockwise", 2], ["off", 2]]


@ABSENT
@pytest.mark.nemo
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "recipe=maxipipe"], "there is no recipe 'maxipipe'; the recipes are"),
        (["train", "-f", "maxipipe"], "No matching factory found for: maxipipe"),
        (["train", "-f", "minipipe", "config.optim.lrr=1"], "lrr"),
        (["train", "-f", "minipipe", "config.steps=few"], "few"),
        (["train", "recipe=minipipe", 'overrides=["optim.lrr=1"]'], "did you mean optim.lr?"),
        (["train", "recipe=minipipe", "run.executor=slurm"], "Slurm wants an account"),
        (
            ["train", "recipe=minipipe", *ACCOUNT, "run.executor.container_image=x.sqsh"],
            "which Python the container has is not known",
        ),
        (["sweep", "recipe=minipipe"], "the grid is empty"),
        (["sweep", "recipe=minipipe", 'grid={"optim.lr": [1, 1]}'], "give a list of one or more different ones"),
        (["study", "study=mine"], "there is no study 'mine'; the studies are ladder, minipipe-ladder"),
        (["study", "study=ladder", 'sizes=["9B"]'], "the study ladder has no size '9B'"),
        (["fly"], "Launch recipes with NeMo-Run"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, arguments: list[str], words: str) -> None:
    done = nemo(tmp_path, *arguments, *(["--yes"] if len(arguments) > 1 else []))
    assert done.returncode == 2, done.stdout + done.stderr
    assert words in done.stdout + done.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"home"}


def scores(run_dir: Path) -> dict[str, float]:
    return json.loads((run_dir / "nemo" / "evaluation.json").read_text())


@ABSENT
@pytest.mark.nemo
@pytest.mark.timeout(600)
def test_a_pipeline_on_this_machine_runs_in_order_and_stops_at_a_failure(tmp_path: Path) -> None:
    first = ("pipeline", "recipe=minipipe", "layout=tp1", f"overrides={SHORT}", "directory=runs/one")
    done = nemo(tmp_path, *first, "run.executor=local", "--yes", timeout_s=300)
    assert done.returncode == 0, done.stdout + done.stderr
    one = tmp_path / "runs" / "one"
    assert len(read_metrics(one)) == 1 and (one / "report.html").exists()
    assert 0 <= scores(one)["eval/accuracy"] <= 1
    for name in ("train", "evaluate", "report"):
        record = read_record(one / "nemo" / f"{name}.json")
        assert record is not None and record.exit_code == 0 and record.command[0] == name
    # once more from there; training fails, so nothing after it runs, and the conversion before it did
    broken = '["steps=1","engine.extra_args=[\\"--no-such-flag\\"]"]'
    second = ("pipeline", "recipe=minipipe", "layout=tp1", f"overrides={broken}", "directory=runs/two")
    done = nemo(tmp_path, *second, "source=runs/one", "run.executor=local", "--yes", timeout_s=300)
    assert done.returncode == 1, done.stdout + done.stderr
    two = tmp_path / "runs" / "two"
    ends = {path.stem: read_record(path) for path in (two / "nemo").glob("*.json")}
    assert {name: record and record.exit_code for name, record in ends.items()} == {
        "convert": 0,
        "train": 2,
        "evaluate": 2,
        "report": 2,
    }
    assert (two / "nemo" / "model" / "model.safetensors").exists() and not (two / "report.html").exists()
    assert "train failed (2), so evaluate is not run" in done.stdout + done.stderr


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    """Environment variables of a real Slurm of two nodes on this machine, by tools/slurm_sandbox.sh."""
    if os.geteuid() != 0 or shutil.which("slurmctld") is None:
        pytest.skip("a real Slurm takes root and Debian's Slurm packages: tools/slurm_sandbox.sh install")
    folder = Path(tempfile.mkdtemp(prefix="nemo-slurm-"))  # munge's user may not enter pytest's folders
    folder.chmod(0o755)
    settings = {**SANDBOX, "SANDBOX_DIR": str(folder)}
    tool = str(ROOT / "tools" / "slurm_sandbox.sh")
    variables = {**os.environ, **settings}
    try:
        subprocess.run([tool, "up"], env=variables, check=True, timeout=60, stdout=subprocess.DEVNULL)
        yield {"SLURM_CONF": str(folder / "slurm.conf")}
    finally:
        subprocess.run([tool, "down"], env=variables, check=True, timeout=60, stdout=subprocess.DEVNULL)
        shutil.rmtree(folder)


@ABSENT
@pytest.mark.nemo
@pytest.mark.slurm
@pytest.mark.timeout(600)
def test_a_pipeline_on_slurm_is_waited_for(tmp_path: Path, slurm: dict[str, str]) -> None:
    place = ("run.executor=slurm", "run.executor.account=acct", "--yes")
    arguments = ("pipeline", "recipe=minipipe", "layout=tp1", f"overrides={SHORT}", "directory=runs/one", *place)
    done = nemo(tmp_path, *arguments, timeout_s=500, **slurm)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("train", "evaluate", "report"):
        assert f"is {name}\n" in done.stdout and f"{name} succeeded\n" in done.stdout
    assert len(read_metrics(tmp_path / "runs" / "one")) == 1 and scores(tmp_path / "runs" / "one")["eval/accuracy"] >= 0


@ABSENT
@pytest.mark.nemo
@pytest.mark.slurm
@pytest.mark.timeout(300)
def test_on_slurm_nothing_runs_after_a_failure_and_nothing_is_left_in_the_queue(
    tmp_path: Path, slurm: dict[str, str]
) -> None:
    place = ("run.executor=slurm", "run.executor.account=acct", "--yes")
    arguments = ("pipeline", "recipe=minipipe", 'overrides=["model.path=/nowhere"]', "directory=runs/one", *place)
    done = nemo(tmp_path, *arguments, timeout_s=200, **slurm)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "train failed (2)\nevaluate did not finish\nreport did not finish\n" in done.stdout
    queue = subprocess.run(["squeue", "-h"], env={**os.environ, **slurm}, capture_output=True, text=True, timeout=30)
    assert (queue.returncode, queue.stdout) == (0, "")


@ABSENT
@pytest.mark.nemo
@pytest.mark.slurm
@pytest.mark.timeout(600)
def test_a_run_on_two_nodes_of_slurm_is_the_job_of_the_batch_scripts(tmp_path: Path, slurm: dict[str, str]) -> None:
    place = ("run.executor=slurm", "run.executor.account=acct", "run.executor.nodes=2", "run.executor.gpus_per_node=0")
    arguments = ("train", "recipe=minipipe", "layout=tp1", f"overrides={SHORT}", "directory=runs/one", *place, "--yes")
    done = nemo(tmp_path, *arguments, timeout_s=500, **slurm)
    assert done.returncode == 0, done.stdout + done.stderr
    one = tmp_path / "runs" / "one"
    record = read_record(one / "nemo" / "train.json")
    assert record is not None and record.exit_code == 0 and record.command[:2] == ["train", "minipipe"]
    assert len(read_metrics(one)) == 1
    assert json.loads((one / "status.json").read_text())["state"] == "finished"
    facts = {path.stem for path in (one / "slurm" / "attempt-001" / "facts").glob("*.json")}
    assert facts == {"m1", "m2"}


@ABSENT
@pytest.mark.nemo
def test_a_run_on_this_machine_ends_with_the_command_that_started_it(tmp_path: Path) -> None:
    """Ctrl-C stops the job and its roles."""
    arguments = ("train", "recipe=minipipe", "layout=tp1", "directory=runs/one", "run.executor=local", "--yes")
    process = subprocess.Popen(
        [str(NEMO), "-m", "megatron_sdpo.launch.nemo", *arguments],
        cwd=tmp_path,
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            if "starting takes about half a minute" in line:
                break
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        os.killpg(process.pid, 2)
        process.stdout.read()
        process.wait(timeout=60)
    assert process.returncode != 0
    _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []
