"""What doctor says of this machine, and of this machine with one thing broken: by PATH, environment or packages."""

import json
import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_sdpo.config import apply_overrides
from megatron_sdpo.launch import doctor_machine, doctor_software
from megatron_sdpo.launch.doctor import Finding, Needs, examine, fails, print_table, probe
from megatron_sdpo.launch.doctor_machine import judge_clocks
from recipes import recipe

NAMES = [check.__name__ for check in (*doctor_software.CHECKS, *doctor_machine.CHECKS)]


def doctor(folder: Path, *arguments: str, code: int = 0, **variables: str) -> dict[str, Finding]:
    """Findings by name of ``megatron-sdpo doctor --json``, which must end with ``code``."""
    done = subprocess.run(
        [sys.executable, "-m", "megatron_sdpo.cli", "doctor", "--json", *arguments],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return {found["name"]: Finding(**found) for found in json.loads(done.stdout)}


def machine(*overrides: str, run_dir: Path = Path()) -> Needs:
    return Needs(apply_overrides(recipe("minipipe"), list(overrides)), run_dir)


def program(folder: Path, name: str, text: str) -> str:
    """A fake program, and the PATH on which it comes first."""
    bin_dir = folder / "bin"
    bin_dir.mkdir(exist_ok=True)
    (bin_dir / name).write_text(f"#!/bin/sh\n{text}\n")
    (bin_dir / name).chmod(0o755)
    return f"{bin_dir}{os.pathsep}{os.environ['PATH']}"


def package(folder: Path, name: str, files: dict[str, str], version: str) -> str:
    """A fake installed package, and the PYTHONPATH on which it comes first."""
    for file, text in files.items():
        path = folder / "site" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    info = folder / "site" / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return os.pathsep.join([str(folder / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.mark.timeout(300)
def test_this_machine_is_ready_for_minipipe(tmp_path: Path) -> None:
    found = doctor(tmp_path, "--recipe=minipipe")
    assert [name.replace(" ", "_") for name in found] == NAMES
    for name in ("python", "packages", "torch", "sglang", "disk", "ports", "clock"):
        assert found[name].state == "ok", found[name]
    assert found["torch"].seen.startswith("2.13.0")
    assert all(finding.todo for finding in found.values() if finding.state != "ok")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(300)
@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has GPUs")
def test_a_machine_without_what_a_recipe_needs_fails_with_what_to_do(tmp_path: Path) -> None:
    """The fakes: packages that do not load, a driver whose GPUs torch does not see, a bwrap that may do nothing."""
    te = {"transformer_engine/__init__.py": "raise RuntimeError('cudnn shared object not found.')\n"}
    apex = {"apex/__init__.py": "", "apex/models.py": ""}
    paths = package(tmp_path, "transformer-engine", te, "2.11.0")
    package(tmp_path, "apex", apex, "0.9.10.dev0")
    program(tmp_path, "nvidia-smi", "echo 'NVIDIA H100 80GB HBM3, 535.183.01'")
    path = program(tmp_path, "bwrap", '[ "$1" = --version ] && { echo bubblewrap 0.8.0; exit; }; echo "no" >&2; exit 1')
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        overrides = [
            "model.dtype=bfloat16",
            "fp8.student=blockwise",
            f"engine.port={port}",
            "checkpoint.keep=100000000",
        ]
        found = doctor(tmp_path, "--recipe=minipipe", *overrides, code=1, PATH=path, PYTHONPATH=paths)
    expected = {
        "gpu": ("1 by the driver (NVIDIA H100 80GB HBM3, 535.183.01), none by torch", "install a CUDA build of torch"),
        "nccl": ("not in this torch", "install the CUDA build of torch"),
        "transformer engine": ("does not load: RuntimeError: cudnn shared object not found.", "uninstall it"),
        "fp8": ("no GPU", "emulated"),
        "apex": ("PyPI's apex, an unrelated package", "NVIDIA's repository"),
        "ports": (f"port {port} on 127.0.0.1 cannot be used", "set engine.port"),
        "disk": ("GB for checkpoints", "lower checkpoint.keep"),
    }
    for name, (seen, todo) in expected.items():
        assert found[name].state == "fail", found[name]
        assert seen in found[name].seen and todo in found[name].todo, found[name]
    assert (found["sandbox"].state, found["sandbox"].seen) == ("warn", "no")  # this recipe executes no programs
    assert "user namespaces" in found["sandbox"].todo


def test_packages_of_other_versions_and_missing_ones_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor_software.packages(Needs(None, tmp_path)).state == "ok"
    package(tmp_path, "numpy", {}, "1.26.0")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    found = doctor_software.packages(Needs(None, tmp_path))
    assert (found.state, found.seen) == ("fail", "numpy 1.26.0, not <3,>=2.2") and "make setup" in found.todo
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    assert "no torch, no megatron-core" in doctor_software.packages(Needs(None, tmp_path)).seen


def test_an_installed_package_knows_its_requirements_without_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = doctor_software.requirements()
    monkeypatch.setattr(doctor_software.megatron_sdpo, "__file__", "/nowhere/megatron_sdpo/__init__.py")
    installed = doctor_software.requirements()
    for extra in ("", "engine", "gpu"):
        assert {need.name for need in installed[extra]} == {need.name for need in checkout[extra]}


def test_a_core_of_transformer_engine_for_another_cuda_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "transformer-engine", {"transformer_engine/__init__.py": ""}, "2.11.0")
    for cuda in ("cu12", "cu13"):
        package(tmp_path, f"transformer-engine-{cuda}", {}, "2.11.0")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    found = doctor_software.transformer_engine(Needs(None, tmp_path))
    assert found.state == "fail" and "CUDA 12 is loaded" in found.seen and "transformer-engine-cu12" in found.todo


def test_the_table_says_the_same_in_words(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    print_table([Finding("disk", "fail", "[0] GB free", "set another run_dir"), Finding("python", "ok", "3.11.7")])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[2].split() == ["fail", "disk", "[0]", "GB", "free", "set", "another", "run_dir"]
    assert lines[3:] == ["ok     python   3.11.7", "1 ok, 1 fail"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe=maxipipe"], "there is no recipe 'maxipipe'"),
        (["--recipe=minipipe", "optim.lrr=1"], "did you mean optim.lr?"),
        (["optim.lr=1"], "there is nothing to override; set --recipe"),
    ],
)
def test_a_request_that_cannot_work_is_refused(tmp_path: Path, arguments: list[str], words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_sdpo.cli", "doctor", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "") and words in done.stderr


def test_a_check_that_breaks_and_one_that_is_absent(tmp_path: Path) -> None:
    def broken(needs: Needs) -> Finding:
        raise KeyError("what")

    def absent(needs: Needs) -> Finding:
        return Finding("absent", "absent", "nothing", "nothing")

    found = examine(Needs(None, tmp_path), [absent, broken, absent])
    assert [finding.state for finding in found] == ["absent", "fail", "absent"] and "KeyError('what')" in found[1].seen
    assert fails(found) and not fails(found[:1])


def test_a_probe_gives_what_is_printed_or_why_not() -> None:
    assert probe("print('noise'); print('{\"a\": 1}')") == {"a": 1}
    assert probe("raise RuntimeError('so')") == {"error": "RuntimeError: so"}
    assert probe("import os; os.kill(os.getpid(), 11)") == {"error": "ended by signal 11"}
    assert probe("import time; time.sleep(60)", timeout_s=1) == {"error": "no answer within 1 s"}


def test_needs_follow_from_the_recipe() -> None:
    assert machine().gpus == 0 and machine().fp8 == () and not machine().executes_programs
    big = machine("model.dtype=bfloat16", "engine.count=2", "fp8.student=blockwise", "fp8.teacher=emulated")
    assert big.gpus == 2 + 2 and big.fp8 == ("blockwise",)
    assert machine("model.dtype=bfloat16", "layout.world_size=64").gpus == 8  # of one node
    assert Needs(None, Path()).gpus == 0


def test_few_open_files_are_told(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert before[1] == resource.RLIM_INFINITY or before[1] >= doctor_machine.LEAST_FILES
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        found = doctor_machine.limits(Needs(None, tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert (found.state, found.seen) == ("warn", "256 open files") and "ulimit -n 4096" in found.todo


def test_ports_that_the_kernel_hands_out_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    monkeypatch.setenv("MEGATRON_SDPO_PORTS", f"{first}-{last}")
    found = doctor_machine.ports(Needs(None, tmp_path))
    assert found.state == "warn" and f"outside {first}-{last}" in found.todo
    monkeypatch.setenv("MEGATRON_SDPO_PORTS", "many")
    assert doctor_machine.ports(Needs(None, tmp_path)).state == "fail"


def test_a_place_that_cannot_be_written_fails(tmp_path: Path) -> None:
    found = doctor_machine.disk(Needs(None, Path("/proc/runs")))
    assert (found.state, found.todo) == ("fail", "set another run_dir")
    assert doctor_machine.disk(Needs(None, tmp_path / "not" / "yet")).state in ("ok", "warn")


def test_an_old_bwrap_and_none_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", program(tmp_path, "bwrap", "echo bubblewrap 0.4.1"))
    assert "0.8 or newer" in doctor_machine.sandbox(Needs(None, tmp_path)).todo
    monkeypatch.setenv("PATH", str(tmp_path))
    found = doctor_machine.sandbox(Needs(None, tmp_path))
    assert (found.state, found.seen) == ("absent", "no bwrap")


def test_clocks_are_judged_by_what_starting_cannot_explain() -> None:
    told = judge_clocks({"n1": 100.0, "n2": 98.5, "n3": 112.0}, before=99.0, after=104.0)
    assert told == {"n1": 0.0, "n2": -0.5, "n3": 8.0}


def test_clocks_of_a_jobs_nodes_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = Needs(None, tmp_path)
    assert doctor_machine.clock(needs).state == "ok"
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    for ahead, state, words in ((0, "ok", "2 node(s) and the file system"), (100, "warn", "n2 is 9")):
        text = f'echo "n1 {time.time()}"; echo "n2 $(($(date +%s) + {ahead})).5"; sleep 1'
        monkeypatch.setenv("PATH", program(tmp_path, "srun", text))
        found = doctor_machine.clock(needs)
        assert found.state == state and words in found.seen, found
    monkeypatch.setenv("PATH", program(tmp_path, "srun", "echo no such job >&2; exit 1"))
    assert doctor_machine.clock(needs).state == "warn"


def test_nothing_of_a_check_stays_behind(tmp_path: Path) -> None:
    doctor_machine.clock(Needs(None, tmp_path))
    assert list(tmp_path.iterdir()) == []
    assert not [p for p in psutil.Process().children(recursive=True) if "bwrap" in p.name()]
