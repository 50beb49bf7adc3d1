"""Ranks that do not get on end the run in bounded time, with a line a rank."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_sdpo import config as configuration
from megatron_sdpo.chat import Chat
from megatron_sdpo.config import apply_overrides
from megatron_sdpo.launch.run_dir import RunDir
from megatron_sdpo.launch.watchdog import Place, Watchdog, position, report
from megatron_sdpo.rollout.journal import Journal
from megatron_sdpo.tasks import load_task
from megatron_sdpo.tracking import read_metrics
from recipes.minipipe import BASE_MODEL, minipipe
from tests.launch import ROOT, _free_port  # pyright: ignore[reportPrivateUsage]
from tests.test_end_to_end import assert_gone
from tests.test_half_runs import group

TIMEOUT_S = 20.0
"""Longer than a start may take on a busy machine."""
STEPS = 200
TOLD = "the trainer ranks did not get on within ranks.timeout_s 20 s in phase train of step 12; "
IN = "in phase train of step 12"
THERE = Place(0, "a", 12, "train", 31, 20.4, "learner.py:250 train", True, 40, True)


def told(*places: Place | None, silent: tuple[int, ...] = ()) -> list[str]:
    alive = [place is not None and rank not in silent for rank, place in enumerate(places)]
    first, *lines, last = report(places, alive, THERE, TIMEOUT_S).splitlines()
    assert first.startswith(TOLD) and last == "the Python stacks of the ranks that live are in the trainer's log"
    return [first.removeprefix(TOLD), *lines]


def test_a_silent_rank_has_not_arrived() -> None:
    stopped = Place(1, "b", 12, "score_teacher", 29, 3.0, "forward.py:97 _run", False, 9)
    assert told(THERE, stopped, None, silent=(1,)) == [
        "not arrived: ranks 1, 2",
        "rank 1 on b: step 12, phase score_teacher, for 3 s, silent, at forward.py:97 _run",
        "rank 2: has never shown itself, silent",
        "rank 0 on a: step 12, phase train, for 20 s, alive, at learner.py:250 train (in a collective)",
    ]


def test_a_rank_in_an_earlier_phase_or_in_no_collective_has_not_arrived() -> None:
    behind = replace(THERE, rank=1, phase="score_teacher", moves=30)
    assert told(THERE, behind)[0] == "not arrived: rank 1"
    elsewhere = replace(THERE, rank=1, in_collective=False)
    assert told(THERE, elsewhere)[0] == "not arrived: rank 1"
    outside = replace(THERE, rank=1, phase="", moves=32)
    found = told(THERE, outside)
    assert found[:2] == ["not arrived: rank 0", found[1]] and "rank 1 on a: outside all phases, for" in found[2]
    device = replace(THERE, in_collective=False)  # NCCL: nobody is seen in a collective
    assert told(device, replace(device, rank=1))[0] == "every rank is there, and their stacks tell where"


def test_hundreds_of_ranks_do_not_have_a_line_each() -> None:
    few = told(*[None, *[THERE] * 511])
    assert (few[0], len(few), few[-1]) == ("not arrived: rank 0", 18, "and 496 more ranks")
    many = told(*[None] * 100, *[THERE] * 412)
    assert many[0].endswith("14, 15 and 84 more") and len(many) == 19


def test_the_position_of_a_thread_is_a_line_of_the_package(tmp_path: Path) -> None:
    place, in_collective = position(sys._getframe())
    assert place.endswith("test_the_position_of_a_thread_is_a_line_of_the_package") and not in_collective
    assert position(None) == ("nowhere", False)


def test_a_watchdog_says_where_its_rank_is(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    watchdog = Watchdog(apply_overrides(minipipe(), ["ranks.timeout_s=1"]), run_dir, 0, 4)
    try:
        watchdog.began(7, "step")
        watchdog.began(7, "wait")
        seen = wait(lambda: (found := watchdog._read(0)) and found.phase == "wait" and found.seconds > 1.2 and found)
        assert (seen.rank, seen.step, seen.moves) == (0, 7, 2)  # waiting has no bound
        watchdog.ended(7, "wait")
        watchdog.ended(7, "step")
        after = wait(lambda: (found := watchdog._read(0)) and found.phase == "" and found)
        assert after.moves == 4 and after.ticks > seen.ticks
    finally:
        watchdog.close()
    assert not run_dir.hung.exists()
    wait(lambda: not any(t.name == "watchdog" for t in threading.enumerate()))


def wait(condition: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
    return found


class Started:
    """A training of two ranks on a made-up journal, under the launcher."""

    def __init__(self, folder: Path, module: str, never_enters: str = "") -> None:
        self.run_dir = RunDir(folder / "run")
        overrides = [
            "layout.world_size=2",
            "layout.tensor_parallel=2",
            f"steps={STEPS}",
            f"ranks.timeout_s={TIMEOUT_S}",
        ]
        overrides += ["evaluation.every=0", f"debug.from_journal={folder.parent / 'attempts'}"]
        overrides += ["rollout.prompts_per_step=1", "rollout.attempts_per_prompt=2", f"checkpoint.every={STEPS}"]
        self.run_dir.path.mkdir(parents=True)
        config = apply_overrides(minipipe(), [*overrides, f"run_dir={self.run_dir.path}"])
        configuration.save(config, self.run_dir.config)
        self.errors = folder / "stderr.txt"
        with self.errors.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.run_from_journal", str(self.run_dir.path), module],
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env={**os.environ, "OMP_NUM_THREADS": "1", "SECOND_RANK_NEVER_ENTERS": never_enters},
            )

    def ranks(self) -> dict[str, psutil.Process]:
        found = psutil.Process(self.process.pid).children(recursive=True)
        return {rank: p for p in found if (rank := p.environ().get("RANK")) is not None}

    def has_trained(self, steps: int) -> bool:
        assert self.process.poll() is None, self.errors.read_text()
        return len(read_metrics(self.run_dir.path)) >= steps

    def kill(self) -> None:
        if self.process.poll() is None:
            processes = psutil.Process(self.process.pid).children(recursive=True)
            for process in processes:
                process.kill()
            self.process.kill()
        self.process.wait()


@pytest.mark.timeout(600)
def test_a_stopped_rank_and_one_that_never_arrives_end_their_runs_by_name(tmp_path: Path) -> None:
    """Two runs beside each other, as each is mostly waited for."""
    write_journal(tmp_path)
    stopped = Started(tmp_path / "stopped", "megatron_sdpo.launch.trainer")
    hanging = Started(tmp_path / "hanging", "tests.hanging_trainer", "train")
    try:
        wait(lambda: stopped.has_trained(2), 300)
        processes = stopped.ranks()
        processes["1"].send_signal(signal.SIGSTOP)
        since = time.monotonic()
        assert stopped.process.wait(TIMEOUT_S + 120) == 1
        assert time.monotonic() - since > TIMEOUT_S
        assert_gone([*processes.values()])
        assert hanging.process.wait(300) == 1
    finally:
        stopped.kill()
        hanging.kill()
    first, silent, there = check_message(stopped)
    assert re.fullmatch(r".* in phase \w+ of step \d+; not arrived: rank 1", first), first
    assert re.fullmatch(r"rank 1 on \S+: .*, for \d+ s, silent, at .*", silent), silent
    assert re.fullmatch(r"rank 0 on \S+: step \d+, phase \w+, for \d+ s, alive, at \S+:\d+ .*", there), there
    log = (stopped.run_dir.logs / "trainer.log").read_text()
    assert "Python stacks of rank 0 on" in log and "Python stacks of rank 1" not in log

    first, absent, there = check_message(hanging)
    assert first.endswith("in phase train of step 1; not arrived: rank 1"), first
    assert re.fullmatch(r"rank 1 on \S+: step 1, phase train, for \d+ s, alive, at loop.py:\d+ train", absent), absent
    assert re.fullmatch(r"rank 0 on \S+: step 1, phase train, for \d+ s, alive, at .* \(in a collective\)", there), (
        there
    )
    log = (hanging.run_dir.logs / "trainer.log").read_text()
    assert "Python stacks of rank 0 on" in log and "Python stacks of rank 1 on" in log
    assert "in never_arrives" in log


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_rank_that_does_not_get_through_its_start_ends_the_run(tmp_path: Path) -> None:
    write_journal(tmp_path)
    run = Started(tmp_path / "hanging", "tests.hanging_trainer", "build")
    try:
        assert run.process.wait(300) == 1
    finally:
        run.kill()
    first, absent, _ = check_message(run)
    assert first.endswith("in phase build of step 0; not arrived: rank 1"), first
    assert re.fullmatch(r"rank 1 on \S+: step 0, phase build, for 2\d s, alive, at trainer.py:\d+ run", absent), absent
    assert read_metrics(run.run_dir.path) == []


def write_journal(folder: Path) -> None:
    tokens, journal = Chat(BASE_MODEL), Journal(folder / "attempts")
    question = load_task("minipipe", **minipipe().task.options).train_questions()[0]
    for step in range(STEPS):
        journal.append(group(step, 0, question, tokens))


def check_message(run: Started) -> list[str]:
    """The message's first line and that of each rank."""
    error, first, *lines, last = run.errors.read_text().splitlines()
    assert error == (
        "error: trainer hung; all roles were stopped, the same command continues from the last checkpoint."
    )
    assert first.startswith("the trainer ranks did not get on within ranks.timeout_s 20 s in phase ")
    assert last == "the Python stacks of the ranks that live are in the trainer's log" and len(lines) == 2
    return [first, *lines]


WAITS = """
import os, signal, sys
from pathlib import Path
import torch.distributed as dist
from megatron_sdpo.config import apply_overrides
from megatron_sdpo.launch.run_dir import RunDir
from megatron_sdpo.launch.watchdog import Watchdog
from megatron_sdpo.phases import Phases
from recipes.minipipe import minipipe
dist.init_process_group("gloo")
rank = dist.get_rank()
phases = Phases([Watchdog(apply_overrides(minipipe(), ["ranks.timeout_s=5"]), RunDir(Path(sys.argv[1])), rank, 2)])
dist.barrier()
if rank == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
with phases("wait"):
    dist.barrier()
"""


def test_the_first_rank_ends_when_it_waits_for_a_stopped_one_and_not_for_the_coordinator(tmp_path: Path) -> None:
    shared = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    shared["MASTER_PORT"] = str(_free_port())
    RunDir(tmp_path).logs.mkdir()
    command = [sys.executable, "-c", WAITS, str(tmp_path)]
    first, second = (
        subprocess.Popen(command, env={**shared, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    )
    try:
        said = first.communicate(timeout=90)[1]
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()
    assert first.returncode == 1, said
    named = "did not get on within ranks.timeout_s 5 s in phase wait of step 0; not arrived: rank 1\n"
    assert named in said and "rank 1 on " in said and ", silent, at " in said
