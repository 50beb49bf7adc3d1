"""Coordinator and trainer on the wire, both ends real: records, refusals, failures."""

import asyncio
import dataclasses
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import zmq

from megatron_sdpo.launch.run_dir import RunDir, wait_for
from megatron_sdpo.rollout.wire import BEAT_S, CoordinatorClient, CoordinatorError, Handler, Kind, serve
from megatron_sdpo.types import Batch, Evaluation, Sample, decode
from tests.launch import ROOT

SAMPLE = Sample("4/0/1", 0, (5, 9, 6), (31, 44, 1), (-0.7, -1.2, -0.1), (5, 9, 2, 40), 0.5)
BATCH = Batch(4, (SAMPLE, dataclasses.replace(SAMPLE, teacher_prompt_ids=None)), {"verdict/reward": 0.5}, 32)
EVALUATION = Evaluation(4, {"eval/accuracy": 1 / 3})


async def batch(step: int) -> Batch:
    return dataclasses.replace(BATCH, step=step)


async def evaluate(version: int) -> Evaluation:
    return dataclasses.replace(EVALUATION, version=version)


async def published(version: int) -> None:
    return None


HANDLERS: dict[Kind, Handler] = {"batch": batch, "evaluate": evaluate, "published": published}


def talk_to(
    talk: Callable[[str], None], handlers: dict[Kind, Handler] = HANDLERS, host: str = "127.0.0.1", ends: bool = False
) -> BaseException | None:
    """Run ``talk(url)`` in a thread beside a server; what ended the server, or None when it had to be cancelled.

    ``ends``: the server must end by itself.
    """

    async def run() -> BaseException | None:
        bound: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        server = asyncio.create_task(serve(host, "right", handlers, bound.set_result))
        await asyncio.to_thread(talk, await bound)
        if ends:
            await asyncio.wait([server], timeout=10)
        server.cancel()
        (ending,) = await asyncio.gather(server, return_exceptions=True)
        return None if isinstance(ending, asyncio.CancelledError) else ending

    return asyncio.run(run())


def client_of(url: str, token: str) -> CoordinatorClient:
    """A client of a coordinator that shows life with every look."""
    beats = itertools.count()
    return CoordinatorClient(url, token, lambda: next(beats), timeout_s=10.0)


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    "host", ["127.0.0.1", pytest.param("::1", marks=pytest.mark.skipif(not has_ipv6(), reason="no IPv6"))]
)
def test_records_arrive_as_they_were_sent(host: str) -> None:
    def talk(url: str) -> None:
        with closing(client_of(url, "right")) as client:
            assert decode(client.ask("published", 4), type(None)) is None
            assert decode(client.ask("batch", 4), Batch) == BATCH
            assert decode(client.ask("evaluate", 2**40), Evaluation) == dataclasses.replace(EVALUATION, version=2**40)
            assert decode(client.ask("batch", 5), Batch).step == 5

    assert talk_to(talk, host=host) is None


@pytest.mark.parametrize("token", ["wrong", "", "right ", "Right"])
def test_a_wrong_token_is_refused_and_the_server_lives_on(token: str) -> None:
    asked: list[int] = []

    async def counted(step: int) -> Batch:
        asked.append(step)
        return BATCH

    def talk(url: str) -> None:
        with closing(client_of(url, token)) as stranger, pytest.raises(CoordinatorError, match="wrong token"):
            stranger.ask("batch", 4)
        with closing(client_of(url, "right")) as client:
            client.ask("batch", 5)

    assert talk_to(talk, {"batch": counted}) is None
    assert asked == [5]


@pytest.mark.parametrize("frames", [[b""], [b"right"], [b"right", b"batch"], [b"right", b"batch", b"\x04", b""]])
def test_a_request_of_another_form_is_refused(frames: list[bytes]) -> None:
    def talk(url: str) -> None:
        with zmq.Context.instance().socket(zmq.REQ) as stranger:
            stranger.connect(url)
            stranger.send_multipart(frames)
            assert stranger.recv_multipart() == [b"error", b"refused: wrong token"]

    assert talk_to(talk) is None


def test_a_failure_reaches_the_requester_in_its_own_words_and_ends_the_server() -> None:
    failure = RuntimeError("engine-0 /generate: out of memory")

    async def failing(step: int) -> Batch:
        raise ExceptionGroup("unhandled errors in a TaskGroup", [ExceptionGroup("inner", [failure])])

    def talk(url: str) -> None:
        with closing(client_of(url, "right")) as client:
            client.ask("published", 4)
            with pytest.raises(CoordinatorError) as error:
                client.ask("batch", 4)
            assert str(error.value) == str(failure)

    ending = talk_to(talk, {**HANDLERS, "batch": failing}, ends=True)
    assert isinstance(ending, ExceptionGroup)
    assert ending.subgroup(lambda error: error is failure) is not None


def test_a_failure_without_words_still_says_what_it_is() -> None:
    async def failing(step: int) -> Batch:
        raise KeyError

    def talk(url: str) -> None:
        with closing(client_of(url, "right")) as client, pytest.raises(CoordinatorError, match="KeyError"):
            client.ask("batch", 4)

    assert isinstance(talk_to(talk, {"batch": failing}, ends=True), KeyError)


COORDINATOR = """
import asyncio, sys
from pathlib import Path
from megatron_sdpo.launch.run_dir import RunDir
from megatron_sdpo.rollout.wire import serve

async def batch(step):
    (run_dir.path / "asked").touch()
    await asyncio.sleep(3600)

run_dir = RunDir(Path(sys.argv[1]))
said = run_dir.publish_address
asyncio.run(serve("127.0.0.1", "right", {"batch": batch}, lambda url: said("coordinator", url),
                  lambda beat: said("coordinator-beat", str(beat))))
"""


def test_a_coordinator_that_works_is_waited_for_and_one_that_hangs_is_not(tmp_path: Path) -> None:
    """A real process, stopped while it has a batch to make."""
    run_dir = RunDir(tmp_path)
    run_dir.addresses.mkdir()
    coordinator = subprocess.Popen([sys.executable, "-c", COORDINATOR, str(tmp_path)], cwd=ROOT)
    try:
        url = wait_for(run_dir.coordinator_address, "the coordinator", 60)
        stopped_at: list[float] = []

        def stop_it_later() -> None:
            """Not before the client has waited for longer than a silent coordinator is waited for."""
            wait_for(lambda: (tmp_path / "asked").exists(), "the request", 60)
            first = int(wait_for(run_dir.coordinator_beat, "a beat", 60))
            wait_for(lambda: int(run_dir.coordinator_beat() or 0) >= first + 3, "beats", 60)
            os.kill(coordinator.pid, signal.SIGSTOP)
            stopped_at.append(time.monotonic())

        stopper = threading.Thread(target=stop_it_later)
        stopper.start()
        with closing(CoordinatorClient(url, "right", run_dir.coordinator_beat, timeout_s=4.0)) as client:
            with pytest.raises(CoordinatorError) as caught:
                client.ask("batch", 3)
        stopper.join()
        assert str(caught.value) == (
            "the coordinator hangs: asked for 'batch', it has shown no life for 4 s (ranks.timeout_s)"
        )
        assert 4.0 - BEAT_S < time.monotonic() - stopped_at[0] < 4.0 + 3 * BEAT_S
    finally:
        coordinator.kill()
        coordinator.wait()
