"""The life of engine processes: ports, addresses, and that nothing outlives the one who started it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_sdpo.config import ConfigError
from megatron_sdpo.rollout.control import EngineError
from megatron_sdpo.rollout.fleet import Fleet, log_tail
from megatron_sdpo.rollout.fleet_files import read_address, read_engines
from tests.conftest import TOKEN, Engine, engine_config
from tests.test_engine import assert_log_probs_match, generate


def test_addresses_are_written(engine: Engine) -> None:
    assert read_engines(engine.run_dir) == (engine.address,)
    router = read_address(engine.run_dir, "router")
    assert router is not None
    assert router.url == engine.address.url
    assert read_address(engine.run_dir, "engine-1") is None


def test_a_taken_port_is_refused_at_once(engine: Engine, tmp_path: Path) -> None:
    port = int(engine.address.url.rpartition(":")[2])
    fleet = Fleet(engine_config(tmp_path, engine.checkpoint, port=port), tmp_path, TOKEN)
    with pytest.raises(ConfigError, match=rf"port {port} on 127\.0\.0\.1 .*set engine\.port"):
        fleet.start()


def test_a_foreign_host_is_refused_at_once(engine: Engine, tmp_path: Path) -> None:
    fleet = Fleet(engine_config(tmp_path, engine.checkpoint, host="192.0.2.1"), tmp_path, TOKEN)
    with pytest.raises(ConfigError, match=r"engine\.host 192\.0\.2\.1"):
        fleet.start()


def test_an_engine_that_dies_at_start_shows_the_end_of_its_log(engine: Engine, tmp_path: Path) -> None:
    config = engine_config(tmp_path, engine.checkpoint, extra_args=("--no-such-argument",))
    with pytest.raises(EngineError, match="engine-0 at start: ended with exit code 2") as caught:
        Fleet(config, tmp_path, TOKEN).start()
    assert "unrecognized arguments: --no-such-argument" in str(caught.value)
    assert read_engines(tmp_path) == ()


def test_the_end_of_a_log_fits_a_screen(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    log.write_text("\n".join([*(f"line {i}" for i in range(40)), "x" * 500, "the reason"]))
    *before, long, last = log_tail(log).splitlines()
    assert before == [f"line {i}" for i in range(27, 40)]
    assert long == "x" * 400 + " ... (100 more characters)"
    assert last == "the reason"


def test_nothing_survives_an_engine_that_is_killed(engine: Engine, tmp_path: Path) -> None:
    fleet = Fleet(engine_config(tmp_path, engine.checkpoint), tmp_path, TOKEN)
    with fleet:
        leader = fleet.process_ids()["engine-0"]
        assert len(session_members(leader)) >= 3  # server, scheduler, detokenizer
        assert fleet.dead() == ()
        os.kill(leader, signal.SIGKILL)
        wait_until(lambda: not session_members(leader))
        (ended,) = fleet.dead()
        assert (ended.name, ended.exit_code) == ("engine-0", -signal.SIGKILL)
        assert "ready to roll" in ended.log_tail


def test_stop_leaves_no_process_and_no_address(engine: Engine, tmp_path: Path) -> None:
    fleet = Fleet(engine_config(tmp_path, engine.checkpoint), tmp_path, TOKEN)
    fleet.start()
    leader = fleet.process_ids()["engine-0"]
    fleet.stop()
    assert session_members(leader) == []
    assert read_engines(tmp_path) == ()
    fleet.stop()


HOLDER = """
import sys
from pathlib import Path
from tests.conftest import engine_config
from megatron_sdpo.rollout.fleet import Fleet
run_dir, checkpoint = map(Path, sys.argv[1:])
Fleet(engine_config(run_dir, checkpoint), run_dir, "a-test-token").start()
"""


@pytest.mark.slow
def test_nothing_survives_the_process_that_started_the_engine(engine: Engine, tmp_path: Path) -> None:
    """It is killed while the engine's own children are still starting, the hardest moment."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path), str(engine.checkpoint)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    try:
        wait_until(lambda: any(len(session_members(child)) >= 3 for child in children(holder.pid)))
        (leader,) = children(holder.pid)
    finally:
        holder.kill()
        holder.wait()
    wait_until(lambda: not session_members(leader))


@pytest.mark.slow
def test_two_engines_behind_the_router(engine: Engine, tmp_path: Path) -> None:
    with Fleet(engine_config(tmp_path, engine.checkpoint, count=2), tmp_path, TOKEN) as fleet:
        leaders = list(fleet.process_ids().values())
        assert len(leaders) == 3
        router = read_address(tmp_path, "router")
        assert router is not None
        assert router.url not in {address.url for address in read_engines(tmp_path)}
        for _ in range(4):
            assert_log_probs_match(engine.checkpoint, generate([router]), 1.0)
        assert len(generate([router], n=2, seeds=[1, 2])) == 2
        with pytest.raises(EngineError) as caught:
            generate([router], token="wrong")
        assert caught.value.status == 401
        for name in ("engine-0", "engine-1"):
            assert "#new-seq: 4" in (tmp_path / "logs" / f"{name}.log").read_text()
        assert TOKEN not in (tmp_path / "logs" / "router.log").read_text()
    assert not any(session_members(leader) for leader in leaders)


def process_table() -> dict[int, tuple[str, int, int]]:
    """Process id -> (state, parent, session)."""
    table = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        table[int(path.parent.name)] = (fields[0], int(fields[1]), int(fields[3]))
    return table


def session_members(leader: int) -> list[int]:
    """The processes of a session that still run; ended ones that nobody has waited for do not count."""
    return [pid for pid, (state, _, session) in process_table().items() if session == leader and state not in "ZX"]


def children(parent: int) -> list[int]:
    return [pid for pid, (state, its_parent, _) in process_table().items() if its_parent == parent and state != "Z"]


def wait_until(condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"still waiting after {timeout_s} s"
        time.sleep(0.02)
