"""A discovery whose ranks or engines hang in the middle of it: the run ends by name, or goes on with another engine."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megatron_sdpo.rollout.control import EngineControl
from megatron_sdpo.rollout.fleet_files import read_address
from tests.test_discovery_end_to_end import journalled, start
from tests.test_end_to_end import ROLES, assert_gone
from tests.test_liveness import scheduler_of

BOUND_S = 20.0


def until(condition: Callable[[], bool], run: subprocess.Popen[bytes], run_dir: Path, timeout_s: float = 600.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert run.poll() is None, output(run_dir)
        assert time.monotonic() < deadline, f"the run did not get there: {output(run_dir)}"
        time.sleep(0.05)


def output(run_dir: Path) -> str:
    return (run_dir.parent / "output.txt").read_text()


def end(run: subprocess.Popen[bytes]) -> None:
    """With everything that it has started."""
    if run.poll() is None:
        processes = psutil.Process(run.pid).children(recursive=True)
        run.kill()
        run.wait()
        assert_gone(processes)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_rank_that_is_stopped_in_a_trial_ends_the_discovery(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run = start(run_dir, "tp2", f"ranks.timeout_s={BOUND_S}", 'discovery.methods=["sdpo"]')
    try:
        until(lambda: len(journalled(run_dir, "sdpo")) >= 1, run, run_dir)
        processes = psutil.Process(run.pid).children(recursive=True)
        (second,) = (p for p in processes if p.environ().get("RANK") == "1" and "torchrun" not in " ".join(p.cmdline()))
        second.send_signal(signal.SIGSTOP)
        since = time.monotonic()
        assert run.wait(BOUND_S + 120) == 1
        print(f"ended {time.monotonic() - since:.1f} s after the stop")
        assert_gone(processes)
    finally:
        end(run)
    said = output(run_dir)
    assert "error: trainer hung; all roles were stopped" in said
    named = r"did not get on within ranks\.timeout_s 20 s in phase \w+ of step \d+; not arrived: rank 1$"
    assert re.search(named, said, re.MULTILINE), said
    assert re.search(r"^rank 1 on \S+: .*, silent, at ", said, re.MULTILINE), said
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_an_engine_that_hangs_while_baselines_are_made_is_replaced_and_serves_in_them(tmp_path: Path) -> None:
    """Nothing is published meanwhile, but for it."""
    run_dir = tmp_path / "run"
    more = ("engine.count=2", f"engine.hang_timeout_s={BOUND_S}", "discovery.best_of_k_samples=200000")
    run = start(run_dir, "tp1", *more, 'discovery.methods=["best_of_k"]')
    try:
        until(lambda: sum(map(len, journalled(run_dir, "best_of_k").values())) > 0, run, run_dir)
        address = read_address(run_dir, "engine-1")
        assert address is not None
        control = EngineControl(address, (run_dir / "token").read_text(), timeout_s=30.0)
        until(lambda: control.load()["num_running_reqs"] > 0, run, run_dir)
        os.kill(scheduler_of(engine_1(run).pid), signal.SIGSTOP)
        since = time.monotonic()
        until(lambda: "is replaced (1 of at most 3 times)" in output(run_dir), run, run_dir)
        print(f"replaced {time.monotonic() - since:.1f} s after the stop")
        until(lambda: "engine-1 serves again, version 0-" in output(run_dir), run, run_dir)
        print(f"serves again {time.monotonic() - since:.1f} s after the stop")
        log = run_dir / "logs" / "engine-1.log"
        before = log.read_text().count("Decode batch")
        until(lambda: log.read_text().count("Decode batch") > before + 3, run, run_dir)
        journal = journalled(run_dir, "best_of_k")
        run.send_signal(signal.SIGTERM)
        assert run.wait(60) == 128 + signal.SIGTERM
    finally:
        end(run)
    assert "engine-1 hangs (its scheduler has not answered for 20 s" in output(run_dir)
    for name, content in journal.items():
        assert journalled(run_dir, "best_of_k")[name].startswith(content)


def engine_1(run: subprocess.Popen[bytes]) -> psutil.Process:
    """The second engine's server."""
    (found,) = (
        p
        for p in psutil.Process(run.pid).children()
        if any(a.endswith(ROLES["engine-0"]) for a in p.cmdline()) and "--random-seed=1" in p.cmdline()
    )
    return found
