"""Engines that hang: real ones, whose processes are stopped, and everything that only looks like it."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from megatron_sdpo.reshard.background import background
from megatron_sdpo.rollout.control import EngineControl, EngineError
from megatron_sdpo.rollout.fleet import Fleet
from megatron_sdpo.rollout.fleet_files import RunningFleet, has_newcomers, is_publishing, write_address
from megatron_sdpo.rollout.liveness import Liveness
from megatron_sdpo.types import EngineAddress
from tests.conftest import TOKEN, Engine, engine_config
from tests.test_fleet import session_members, wait_until

BOUND_S = 4.0
PATIENCE_S = 60.0
"""Within which things happen on a busy machine."""


def leader_of(address: EngineAddress) -> int:
    """The process that listens at an address."""
    port = address.url.rpartition(":")[2]
    (leader,) = {p.pid for p in psutil.process_iter() if f"--port={port}" in _command(p)}
    return leader


def scheduler_of(leader: int) -> int:
    (found,) = [pid for pid in session_members(leader) if "scheduler" in psutil.Process(pid).name()]
    return found


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


class Watched:
    """An engine under ``Liveness``, looked at all the time. ``found``: what was last said of it."""

    def __init__(self, address: EngineAddress) -> None:
        self.is_publishing = False
        self._liveness = Liveness(TOKEN, BOUND_S, lambda: self.is_publishing)
        self._liveness.watch(address, leader_of(address))
        self.found: str | None = None
        self._name, self._closed = address.name, threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        while not self._closed.wait(0.05):
            self.found = self._liveness.hung().get(self._name)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        self._liveness.forget_all()

    def lives_on(self, seconds: float) -> None:
        """For so long nothing is said of it."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.found is None
            time.sleep(0.05)

    def says(self) -> tuple[str, float]:
        """What is found, and after how many seconds."""
        since = time.monotonic()
        wait_until(lambda: self.found is not None, PATIENCE_S)
        assert self.found is not None
        return self.found, time.monotonic() - since


@contextmanager
def stopped(send: Callable[[int, int], None], process_id: int) -> Iterator[None]:
    send(process_id, signal.SIGSTOP)
    try:
        yield
    finally:
        send(process_id, signal.SIGCONT)


@contextmanager
def generating(engine: Engine, answers: list[Any]) -> Iterator[None]:
    """Within the block 16 responses are being generated; afterwards all are in ``answers``."""
    control = EngineControl(engine.address, engine.token, timeout_s=120.0)
    body = {
        "input_ids": [[5, 17, 80, 33]] * 16,
        "sampling_params": {"temperature": 1.0, "max_new_tokens": 450, "ignore_eos": True},
    }
    thread = threading.Thread(target=lambda: answers.extend(control._call("POST", "/generate", body)))
    thread.start()
    try:
        wait_until(lambda: control.load()["num_running_reqs"] == 16)
        yield
    finally:
        thread.join()


def test_a_stopped_engine_hangs_until_it_goes_on(engine: Engine) -> None:
    leader = leader_of(engine.address)
    scheduler, answers = scheduler_of(leader), list[Any]()
    who = f"{scheduler} {psutil.Process(scheduler).name()}"
    with closing(Watched(engine.address)) as watched:
        with generating(engine, answers):
            with stopped(os.kill, scheduler):
                said, seconds = watched.says()
        assert said == (
            f"its scheduler has not answered for {BOUND_S:g} s (engine.hang_timeout_s), though its HTTP server does;"
            " as it last said, 16 requests were running and 0 waiting;"
            f" stopped (SIGSTOP or a debugger): {who}"
        )
        assert BOUND_S / 2 < seconds < BOUND_S + 10
        assert len(answers) == 16
        wait_until(lambda: watched.found is None)
        with stopped(os.killpg, leader):
            said, _ = watched.says()
        assert said.startswith(f"its HTTP server has not answered for {BOUND_S:g} s (engine.hang_timeout_s); ")
        assert who in said and f"{leader} " in said.partition("debugger): ")[2]
        wait_until(lambda: watched.found is None)
        watched.is_publishing = True
        with stopped(os.kill, scheduler):
            said, _ = watched.says()
        assert said.startswith(f"it has stood still for {BOUND_S:g} s (engine.hang_timeout_s); weights were being sent")
        assert said.endswith(f"debugger): {who}")
        wait_until(lambda: watched.found is None)


def test_an_engine_that_pauses_or_waits_for_weights_does_not_hang(engine: Engine) -> None:
    control = EngineControl(engine.address, engine.token, timeout_s=60.0)
    with closing(Watched(engine.address)) as watched:
        control.flush_when_idle()
        control.release_memory()
        control.pause_generation("retract")
        watched.lives_on(1.5 * BOUND_S)
        control.continue_generation()
        control.resume_memory()
        control.update_weights_from_disk(str(engine.checkpoint), 0)
        watched.is_publishing = True
        store = TCPStore("127.0.0.1", 0, 2, True, timedelta(seconds=60), wait_for_workers=False)
        joining = background(
            partial(
                control.init_weights_update_group,
                master_address="127.0.0.1",
                master_port=store.port,
                rank_offset=1,
                world_size=2,
                group_name="nobody-comes",
                backend="gloo",
            )
        )
        watched.lives_on(1.5 * BOUND_S)
        assert not joining.done()
        watched.is_publishing = False  # the same silence, now without a reason
        said, seconds = watched.says()
        assert "its scheduler has not answered" in said and "stopped" not in said and seconds > BOUND_S / 2
        del store
        assert isinstance(joining.exception(60), EngineError)
        wait_until(lambda: watched.found is None)


def test_a_machine_that_stood_still_makes_nobody_hang(engine: Engine) -> None:
    liveness = Liveness(TOKEN, 2.0, lambda: False)
    liveness.watch(engine.address, leader_of(engine.address))
    time.sleep(2.5)  # nobody looks
    assert liveness.hung() == {}
    liveness.forget_all()


def test_an_engine_that_hangs_alone_is_killed_and_ends_the_fleet_by_name(engine: Engine, tmp_path: Path) -> None:
    fleet = Fleet(engine_config(tmp_path, engine.checkpoint, hang_timeout_s=BOUND_S), tmp_path, TOKEN)
    with fleet:
        leader = fleet.process_ids()["engine-0"]
        assert fleet.tend() == ()
        os.killpg(leader, signal.SIGSTOP)
        since = time.monotonic()
        while not (lost := fleet.tend()):
            assert time.monotonic() - since < PATIENCE_S
            time.sleep(0.1)
        (ended,) = lost
        assert (ended.name, ended.exit_code) == ("engine-0", -signal.SIGKILL)
        first, *rest = ended.log_tail.splitlines()
        assert first.startswith(f"it hung: its HTTP server has not answered for {BOUND_S:g} s")
        assert any("ready to roll" in line for line in rest)
        wait_until(lambda: not session_members(leader))


def test_the_trainer_says_that_it_publishes(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "addresses").mkdir()
    write_address(tmp_path, engine.address)
    fleet = RunningFleet(tmp_path, lambda address: EngineControl(address, TOKEN))
    assert fleet.all_of(1) == (engine.address,) and not is_publishing(tmp_path) and not has_newcomers(tmp_path)
    assert fleet.engines() == (engine.address,) and is_publishing(tmp_path)
    fleet.confirm("1-a", [engine.address])
    assert not is_publishing(tmp_path) and not has_newcomers(tmp_path)
    write_address(tmp_path, EngineAddress("engine-1", "http://127.0.0.1:1", 1))
    assert has_newcomers(tmp_path)
