"""What a batch job decides before anything starts: which node does what, what a node finds, which nodes are not fit."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sdpo.config import Config, ConfigError, apply_overrides
from megatron_sdpo.launch.cluster.facts import Facts, GpuFacts, gpu_settings, has_nvlink, ib_adapters, query_gpus
from megatron_sdpo.launch.cluster.health import Measured, judge_facts, judge_measured
from megatron_sdpo.launch.cluster.node import plan_of, role_commands, run_order
from megatron_sdpo.launch.cluster.site import Site, read_job, read_site
from megatron_sdpo.launch.cluster.split import split
from megatron_sdpo.launch.run_dir import RunDir
from megatron_sdpo.launch.status import (
    Status,
    newest_checkpoint,
    read_status,
    request_stop,
    stop_requested,
    write_status,
)
from megatron_sdpo.rollout.ports import RANGE, take_ports
from recipes import recipe

H100S = Site(gpus_per_node=8)


def config(*overrides: str) -> Config:
    return apply_overrides(recipe("minipipe"), overrides)


def names(count: int) -> tuple[str, ...]:
    return tuple(f"n{i + 1}" for i in range(count))


def big() -> Config:
    sizes = ("layout.tensor_parallel=8", "layout.pipeline_parallel=2", "layout.world_size=32")
    return config(*sizes, "engine.count=5", "engine.tensor_parallel=4")


# --- the split ---


def test_trainers_come_first_and_engines_fill_their_nodes() -> None:
    plan = split(big(), [names(7)], H100S)
    assert [node.ranks for node in plan.trainers] == [range(0, 8), range(8, 16), range(16, 24), range(24, 32)]
    assert [node.engines for node in plan.nodes[4:]] == [range(0, 2), range(2, 4), range(4, 5)]
    assert [node.name for node in plan.nodes if node.is_coordinator] == ["n5"]


def test_nodes_without_gpus_hold_what_the_site_says() -> None:
    plan = split(config("layout.world_size=4"), [names(2)], Site())
    assert [(list(n.ranks), list(n.engines)) for n in plan.nodes] == [([0, 1, 2, 3], []), ([], [0])]
    plan = split(config("layout.world_size=4"), [names(3)], Site(ranks_per_node=2))
    assert [list(n.ranks) for n in plan.nodes] == [[0, 1], [2, 3], []]


@pytest.mark.parametrize(
    ("groups", "overrides", "words"),
    [
        ([names(6)], (), r"has 6 nodes, but the recipe needs 4 for 32 trainer ranks and 3 for 5 engines.*--nodes=7"),
        ([names(3), names(4)], (), r"has 3 \+ 4 nodes, but the recipe needs 4 for trainers \+ 3 for engines"),
        ([names(7)], ("engine.tensor_parallel=16",), r"engine\.tensor_parallel 16 is more than the 8 GPUs of a node"),
        ([names(7)], ("layout.world_size=36",), r"layout\.world_size 36 does not fill nodes of 8"),
        ([names(7)], ("debug.rollout_only=true",), r"debug\.rollout_only runs on one machine"),
        ([names(7)], ("publish.backend=ipc",), r"publish\.backend=ipc is for engines on the trainer's own GPUs"),
    ],
)
def test_what_does_not_fill_the_nodes_is_refused(groups: list, overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        split(apply_overrides(big(), overrides), groups, H100S)


def test_every_node_gets_its_part_of_the_order() -> None:
    plan = split(big(), [names(7)], H100S)
    order = run_order(plan.nodes, "10.0.0.1:20100")
    assert [plan_of(order, node.name) for node in plan.nodes] == [(node, names(4)) for node in plan.nodes]
    own, trainers = plan_of(order, "n3")
    command = role_commands(own, trainers, "10.0.0.1:20100", RunDir(Path("/runs/a")))["trainer-n3"]
    assert command[3:] == [
        *("--nnodes=4", "--node-rank=2", "--nproc-per-node=8", "--master-addr=10.0.0.1", "--master-port=20100"),
        *("-m", "megatron_sdpo.launch.trainer", "/runs/a"),
    ]
    assert list(role_commands(plan.of("n5"), trainers, "10.0.0.1:20100", RunDir(Path("/runs/a")))) == ["coordinator"]


# --- the environment of a job ---


def test_the_site_is_read_strictly() -> None:
    given = {"SDPO_GPUS_PER_NODE": "8", "SDPO_NODE_TIMEOUT_S": "30", "SDPO_MEASURE": "0", "SDPO_FABRIC": "", "X": "y"}
    assert read_site(given) == Site(gpus_per_node=8, node_timeout_s=30.0, measure=False)
    for name, text, words in (
        ("SDPO_RETRIES", "many", "set it to a number"),
        ("SDPO_RETRIES", "-1", "set it to 0 or more"),
        ("SDPO_DRY_RUN", "yes", "set it to 0 or 1"),
    ):
        with pytest.raises(ConfigError, match=f"{name} is .*{words}"):
            read_site({name: text})


def test_a_job_knows_its_place() -> None:
    given = {
        "SDPO_RUN_DIR": "/runs/a",
        "SDPO_ATTEMPT": "attempt-002",
        "SDPO_NODES": "n1,n2 n7",
        "SLURMD_NODENAME": "n7",
    }
    job = read_job({**given, "SLURM_RESTART_COUNT": "1"})
    assert (job.nodes, job.groups, job.is_first, job.is_restart) == (
        ("n1", "n2", "n7"),
        (("n1", "n2"), ("n7",)),
        False,
        True,
    )
    with pytest.raises(ConfigError, match="SDPO_RUN_DIR is not set; start this by"):
        read_job({k: v for k, v in given.items() if k != "SDPO_RUN_DIR"})
    with pytest.raises(ConfigError, match="node n9 is not among"):
        read_job({**given, "SLURMD_NODENAME": "n9"})


def test_ports_come_from_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RANGE, "23456-23460")
    assert sorted(take_ports("127.0.0.1", 0, 5)) == [23456, 23457, 23458, 23459, 23460]
    with pytest.raises(ConfigError, match=r"of ports 23456-23460 on 127\.0\.0\.1 only 5 are free, not 6"):
        take_ports("127.0.0.1", 0, 6)
    monkeypatch.setenv(RANGE, "23460-23456")
    with pytest.raises(ConfigError, match="set it to two ports"):
        take_ports("127.0.0.1", 0, 1)


# --- what a node finds ---

SMI = """#!/bin/sh
if [ "$1" = topo ]; then
  printf '\\tGPU0\\tGPU1\\tNIC0\\nGPU0\\tX\\t%s\\tPIX\\nGPU1\\t%s\\tX\\tPIX\\n' "$LINK" "$LINK"; exit
fi
echo "0, NVIDIA H100 80GB HBM3, 550.54.15, 9.0, [N/A], 1980, $SLOW"
echo "1, NVIDIA H100 80GB HBM3, 550.54.15, 9.0, $ECC, 1980, $SLOW"
"""


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    path = tmp_path / "nvidia-smi"
    path.write_text(SMI)
    path.chmod(0o755)
    for name, value in {"LINK": "NV18", "ECC": "0", "SLOW": "Not Active"}.items():
        monkeypatch.setenv(name, value)
    return str(path)


def test_gpus_are_asked(nvidia_smi: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus, driver = query_gpus(nvidia_smi)
    assert gpus == tuple(GpuFacts(i, "NVIDIA H100 80GB HBM3", "9.0", 0, 1980, False) for i in range(2))
    assert driver == "550.54.15" and has_nvlink(nvidia_smi)
    monkeypatch.setenv("ECC", "3")
    monkeypatch.setenv("SLOW", "Active")
    monkeypatch.setenv("LINK", "SYS")
    gpus, _ = query_gpus(nvidia_smi)
    assert (gpus[1].ecc_errors, gpus[1].is_slowed) == (3, True) and not has_nvlink(nvidia_smi)


def port(sysfs: Path, name: str, state: str, layer: str) -> None:
    folder = sysfs / name / "ports" / "1"
    folder.mkdir(parents=True)
    (folder / "state").write_text(f"{state}\n")
    (folder / "link_layer").write_text(f"{layer}\n")


def test_nccl_is_told_what_is_there(tmp_path: Path) -> None:
    gpus = (GpuFacts(0, "H100", "9.0", 0, 1980, False), GpuFacts(1, "H100", "9.0", 0, 1980, False))
    assert gpu_settings(gpus, True, tmp_path)["NCCL_IB_DISABLE"] == "1"
    port(tmp_path, "mlx5_9", "4: ACTIVE", "Ethernet")
    assert ib_adapters(tmp_path) == ["mlx5_9:1"]
    for name, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN"), ("mlx5_2", "4: ACTIVE")):
        port(tmp_path, name, state, "InfiniBand")
    settings = gpu_settings(gpus, True, tmp_path)
    assert settings["NCCL_IB_HCA"] == "=mlx5_0:1,mlx5_2:1" and settings["NCCL_NVLS_ENABLE"] == "1"
    assert gpu_settings(gpus, False, tmp_path)["NCCL_NVLS_ENABLE"] == "0"
    assert gpu_settings((replace(gpus[0], compute="8.0"),), True, tmp_path)["NCCL_NVLS_ENABLE"] == "0"


# --- which nodes are not fit ---


def facts(node: str, **changes: object) -> Facts:
    gpus = tuple(GpuFacts(i, "H100", "9.0", 0, 1980, False) for i in range(8))
    sound = Facts(node, "canary", "10.0.0.1", "eth0", {"torch": "2.13.0"}, gpus)
    return replace(sound, **changes)  # pyright: ignore[reportArgumentType]


def test_sound_nodes_pass_and_others_are_named() -> None:
    site = replace(H100S, min_sm_clock_mhz=1900)
    found = {node: facts(node) for node in names(3)}
    assert judge_facts(found, names(3), "canary", site) == []
    bad = facts("n3").gpus[0]
    for change, words in (
        ({"canary": "older"}, "node n3 does not see what the first node wrote"),
        ({"problem": "nvidia-smi failed"}, "node n3 could not look at itself: nvidia-smi failed"),
        ({"versions": {"torch": "2.12.0"}}, "node n3 has torch 2.12.0 where others have 2.13.0"),
        ({"versions": {}}, "node n3 has torch not at all where others have 2.13.0"),
        ({"gpus": facts("n3").gpus[1:]}, "node n3 has 7 GPUs, not SDPO_GPUS_PER_NODE 8"),
        (
            {"gpus": (replace(bad, ecc_errors=2), *found["n3"].gpus[1:])},
            "node n3 has 2 uncorrected ECC errors on GPU 0",
        ),
        ({"gpus": (replace(bad, is_slowed=True), *found["n3"].gpus[1:])}, "node n3 slows GPU 0 down"),
        ({"gpus": (replace(bad, max_sm_clock_mhz=1200), *found["n3"].gpus[1:])}, "node n3 allows GPU 0 only 1200 MHz"),
        ({"gpus": (replace(bad, name="A100"), *found["n3"].gpus[1:])}, "node n3 has GPUs of several kinds: A100, H100"),
    ):
        (unfit,) = judge_facts({**found, "n3": facts("n3", **change)}, names(3), "canary", site)
        assert str(unfit).startswith(words), unfit
    (unfit,) = judge_facts({"n1": found["n1"], "n3": found["n3"]}, names(3), "canary", site)
    assert str(unfit).startswith("node n2 has not shown itself")


def test_a_node_is_slow_when_it_is_so_with_every_neighbour() -> None:
    site = replace(H100S, min_node_gb_s=300.0, min_network_gb_s=40.0)
    measured = {
        "n1": Measured(380.0, {"n2": 45.0}),
        "n2": Measured(250.0, {"n1": 45.0, "n3": 9.0}),
        "n3": Measured(380.0, {"n2": 9.0, "n4": 8.0}),
        "n4": Measured(380.0, {"n3": 8.0, "n5": 45.0}),
    }
    assert [str(unfit) for unfit in judge_measured(measured, names(5), site)] == [
        "node n2 all-reduces 250 GB/s inside itself, below SDPO_MIN_NODE_GB_S 300",
        "node n3 all-reduces 9 GB/s with its neighbours, below SDPO_MIN_NETWORK_GB_S 40",
        "node n5 has not measured its all-reduces in time",
    ]
    assert judge_measured({n: Measured(None, {}) for n in names(2)}, names(2), H100S) == []


# --- how a run stands ---


def test_the_status_says_how_a_run_stands_and_a_request_that_it_should_stop(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    assert read_status(run_dir) is None and newest_checkpoint(run_dir) == 0
    status = Status("interrupted", "attempt-002", 'a "word", and {others}', step=12, retries=1)
    write_status(run_dir, status)
    assert read_status(run_dir) == status
    script = f'SDPO_RUN_DIR={tmp_path}; source slurm/job.sh; echo "$(field state) $(field attempt)"'
    told = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    assert told.stdout == "interrupted attempt-002\n"
    for name in ("step-00000004", "step-00000012", "step-00000016.writing", "step-00000020.damaged"):
        (run_dir.checkpoints / name).mkdir(parents=True)
    assert newest_checkpoint(run_dir) == 12
    assert stop_requested(run_dir) is None
    request_stop(run_dir, "the time limit is near")
    request_stop(run_dir, "another reason")
    assert stop_requested(run_dir) == "the time limit is near"


@pytest.mark.parametrize("task", [None, 3])
def test_the_tasks_of_an_array_are_runs_of_their_own_seed(tmp_path: Path, task: int | None) -> None:
    """The stand-in for srun says what it would run, and leaves the status that a finished job does."""
    programs = {
        "srun": 'echo "${@: -3}"; echo "$SDPO_RUN_DIR"\n'
        'echo "{\\"state\\": \\"finished\\", \\"attempt\\": \\"$SDPO_ATTEMPT\\"}" >"$SDPO_RUN_DIR/status.json"',
        "scontrol": "echo node1",
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    root = Path(__file__).parents[1]
    own = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1"}
    own |= {"SDPO_HOME": str(root), "SDPO_RUN_DIR": str(tmp_path / "run"), "SLURM_JOB_CPUS_PER_NODE": "4"}
    own |= {} if task is None else {"SLURM_ARRAY_TASK_ID": str(task)}
    script = "source slurm/job.sh; run_job minipipe steps=2"
    told = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=root, env=own, timeout=60)
    assert told.returncode == 0, told.stderr
    run_dir = tmp_path / ("run" if task is None else "run-seed3")
    given = "cluster.node minipipe steps=2" if task is None else "minipipe seed=3 steps=2"
    assert f"{given}\n{run_dir}\n" in told.stdout


HEARING = """
import multiprocessing, os, signal, sys
from megatron_sdpo.rollout import lifeline
lifeline.tie_to_parent()
if __name__ == "__main__":
    multiprocessing.get_context("spawn").Event()  # starts the helper process
    os.kill(os.getpid(), signal.SIGTERM)
    print("lives")
"""


@pytest.mark.parametrize("kept", [True, False])
def test_what_a_nodes_process_has_blocked_stays_blocked_for_its_roles(tmp_path: Path, kept: bool) -> None:
    (tmp_path / "role.py").write_text(HEARING)
    own = {k: v for k, v in os.environ.items() if k != "MEGATRON_SDPO_PARENT"}
    if kept:
        own["MEGATRON_SDPO_KEEP_BLOCKED"] = "1"
    blocked = "import signal, subprocess, sys; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM});"
    blocked += f"print(subprocess.run([sys.executable, {str(tmp_path / 'role.py')!r}]).returncode)"
    own["PYTHONPATH"] = str(Path(__file__).parents[1])
    told = subprocess.run([sys.executable, "-c", blocked], env=own, capture_output=True, text=True, timeout=60)
    assert told.stdout == ("lives\n0\n" if kept else "-15\n"), told.stderr
