"""The run directory: one run at a time, one experiment for good, a secret that stays one."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_sdpo import config as configuration
from megatron_sdpo.config import Config, ConfigError, apply_overrides
from megatron_sdpo.launch.run_dir import RunDir, wait_for
from recipes.minipipe import minipipe

HOLDER = """
import sys
from pathlib import Path
from megatron_sdpo.launch.run_dir import RunDir
with RunDir(Path(sys.argv[1])).locked():
    print("held", flush=True)
    sys.stdin.read()
"""


def config(*overrides: str) -> Config:
    return apply_overrides(minipipe(), overrides)


def started(path: Path, *overrides: str, progress: str | None = "attempts/step-00000000.jsonl") -> RunDir:
    """A run directory as a start leaves it; ``progress`` is a file that the run wrote."""
    run_dir = RunDir(path)
    run_dir.prepare(config(*overrides))
    if progress is not None:
        (path / progress).touch()
    return run_dir


def contents(path: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in sorted(path.rglob("*"))}


def test_a_directory_is_held_by_one_process(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run_dir.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError) as error, run_dir.locked():
            pass
        assert str(error.value) == f"another process is running in {run_dir.path}; stop it or set another run_dir"
    finally:
        holder.kill()  # a lock must not outlive its holder, however that ends
        holder.communicate()
    with run_dir.locked():
        pass


@pytest.mark.parametrize("below", ["file", "file/run"])
def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    run_dir = RunDir(tmp_path / below)
    for attempt in (lambda: run_dir.locked().__enter__(), lambda: run_dir.prepare(config())):
        with pytest.raises(ConfigError, match="cannot be written"):
            attempt()
    assert contents(tmp_path) == {"file": b""}


def test_a_fresh_directory_has_everything(tmp_path: Path) -> None:
    run_dir = started(tmp_path / "run", progress=None)
    folders = ["addresses", "attempts", "checkpoints", "logs", "ranks"]
    assert sorted(contents(run_dir.path)) == sorted([*folders, "config.json", "token"])
    assert configuration.load(run_dir.config) == config()
    assert not run_dir.has_progress()


def test_the_token_is_the_users_own_and_new_at_each_start(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        run_dir = started(tmp_path)
        run_dir.token_file.chmod(0o644)
        first = run_dir.token()
        run_dir.prepare(config())
    finally:
        os.umask(umask)
    assert run_dir.token_file.stat().st_mode & 0o777 == 0o600
    assert len(first) >= 32 and run_dir.token() != first


@pytest.mark.parametrize("progress", ["attempts/step-00000000.jsonl", "checkpoints/step-00000004"])
@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["optim.lr=0.5"], "optim.lr=0.001, not 0.5;"),
        (["seed=3", "optim.lr=0.5"], "seed=0, not 3 (and 1 more);"),
        (["task.options.machine_seed=2"], "task.options={'machine_seed': 1}, not {'machine_seed': 2};"),
        (["rollout.prompts_per_step=4"], "rollout.prompts_per_step=16, not 4;"),
        (["deterministic=true"], "deterministic=False, not True;"),
    ],
)
def test_another_experiment_is_refused_and_nothing_is_touched(
    tmp_path: Path, overrides: Sequence[str], key: str, progress: str
) -> None:
    run_dir = started(tmp_path, progress=progress)
    before = contents(tmp_path)
    with pytest.raises(ConfigError) as error:
        run_dir.prepare(config(*overrides))
    assert str(error.value).startswith(f"{tmp_path} holds a run with {key}")
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "override",
    [
        *("steps=99", "checkpoint.every=1", "evaluation.every=0", "engine.count=2", "publish.probe_tokens=8", "name=x"),
        *("layout.recompute=full", "teacher.placement=resident", "debug.timeline=true", "debug.profile_steps=[1]"),
        "layout.tensor_parallel=1",
    ],
)
def test_what_does_not_change_the_experiment_may_change(tmp_path: Path, override: str) -> None:
    run_dir = started(tmp_path)
    run_dir.prepare(config(override))
    assert configuration.load(run_dir.config) == config(override) != config()


def test_a_deterministic_run_keeps_its_layout(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.prepare(config("deterministic=true"))
    (tmp_path / "attempts" / "step-00000000.jsonl").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds a run with layout.tensor_parallel=2, not 1;"):
        run_dir.prepare(config("deterministic=true", "layout.tensor_parallel=1"))
    run_dir.prepare(config("deterministic=true", "layout.recompute=full"))


def test_a_run_of_an_earlier_version_goes_on_but_does_not_become_deterministic(tmp_path: Path) -> None:
    run_dir = started(tmp_path)
    saved = json.loads(run_dir.config.read_text())
    del saved["deterministic"], saved["checkpoint"]["asynchronous"], saved["checkpoint"]["keep_every"]
    run_dir.config.write_text(json.dumps(saved))
    with pytest.raises(ConfigError, match="holds a run with deterministic=False, not True"):
        run_dir.prepare(config("deterministic=true"))
    run_dir.prepare(config("checkpoint.asynchronous=false"))
    assert not configuration.load(run_dir.config).deterministic


def test_before_there_is_progress_everything_may_change(tmp_path: Path) -> None:
    run_dir = started(tmp_path, progress=None)
    run_dir.prepare(config("optim.lr=0.5"))
    assert configuration.load(run_dir.config).optim.lr == 0.5


def test_a_start_forgets_what_the_last_one_left(tmp_path: Path) -> None:
    run_dir = started(tmp_path)
    run_dir.publish_address("coordinator", "tcp://127.0.0.1:1")
    assert contents(run_dir.addresses) == {"coordinator": b"tcp://127.0.0.1:1"}
    run_dir.report_failure("trainer", RuntimeError("old"))
    (run_dir.logs / "trainer.log").write_text("kept")
    run_dir.prepare(config())
    assert contents(run_dir.addresses) == {}
    assert run_dir.failure_of("trainer") is None
    assert contents(run_dir.logs) == {"earlier-1": None, "earlier-1/trainer.log": b"kept"}
    (run_dir.logs / "trainer.log").write_text("of the second start")
    run_dir.prepare(config())
    assert contents(run_dir.logs / "earlier-2") == {"trainer.log": b"of the second start"}


def test_the_first_failure_of_a_role_is_kept_in_its_own_words(tmp_path: Path) -> None:
    run_dir = started(tmp_path)
    nested = ExceptionGroup("group", [ExceptionGroup("inner", [RuntimeError("the cause"), ValueError("another")])])
    run_dir.report_failure("coordinator", nested)
    run_dir.report_failure("coordinator", RuntimeError("what followed"))
    run_dir.report_failure("trainer", KeyError())
    assert run_dir.failure_of("coordinator") == "the cause"
    assert run_dir.failure_of("trainer") == "KeyError()"
    assert run_dir.failure_of("engine-0") is None


def test_waiting_ends_with_what_is_found_or_says_what_did_not_come() -> None:
    found = iter([None, None, "address"])
    assert wait_for(lambda: next(found), "the engines", timeout_s=30) == "address"
    with pytest.raises(TimeoutError, match="the engines did not appear in the run directory within 0 s"):
        wait_for(lambda: None, "the engines", timeout_s=0)
