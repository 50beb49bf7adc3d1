"""One real engine for the whole test session; models, and a process alone, for a file of tests."""

import os
import signal
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from megatron_sdpo.config import Config, EngineConfig, LayoutConfig, ModelConfig, TaskConfig
from megatron_sdpo.rollout.fleet import Fleet
from megatron_sdpo.types import EngineAddress
from tests.tiny_model import write_tiny_checkpoint

if TYPE_CHECKING:
    from megatron_sdpo.mcore.groups import ParallelGroups

TOKEN = "a-test-token"
MARK = "MEGATRON_SDPO_TEST_SESSION"
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # its workers, where torch compiles, outlive their use


@dataclass(frozen=True, slots=True)
class Engine:
    """A running engine that was started with ``checkpoint`` (Llama, fp32) and serves 512 positions."""

    address: EngineAddress
    token: str
    checkpoint: Path
    run_dir: Path


def engine_config(run_dir: Path, checkpoint: Path, **engine: object) -> Config:
    """A configuration that a ``Fleet`` can start with; ``engine`` are fields of EngineConfig."""
    settings = {"max_running_requests": 128, "start_timeout_s": 300.0} | engine
    return Config(
        name="test",
        run_dir=str(run_dir),
        steps=1,
        model=ModelConfig(path=str(checkpoint), dtype="float32", max_length=512),
        task=TaskConfig(name="none"),
        engine=EngineConfig(**settings),  # pyright: ignore[reportArgumentType]
    )


@pytest.fixture(scope="session", autouse=True)
def nothing_stays_behind() -> Iterator[None]:
    """Every process that the tests start, directly or not, has ended when they have.

    Except what multiprocessing keeps for this very process, which ends with it.
    """
    mark = uuid.uuid4().hex
    os.environ[MARK] = mark
    yield
    own = {os.getpid(), *(p.pid for p in psutil.Process().children() if "multiprocessing" in " ".join(p.cmdline()))}
    left = [p for p in psutil.process_iter() if p.pid not in own and _environment(p).get(MARK) == mark]
    _, alive = psutil.wait_procs(left, timeout=10)
    described = [f"{p.pid} {' '.join(p.cmdline())}" for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    for process in alive:
        process.kill()
    assert described == []


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:  # gone, or somebody else's
        return {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small models of learner_setup.py; a file that needs others has a fixture of this name."""
    from tests.learner_setup import write_models  # loads torch and megatron

    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


@pytest.fixture(scope="module")
def groups() -> Iterator["ParallelGroups"]:
    """This process alone."""
    from megatron_sdpo.mcore.groups import initialize, shutdown

    yield initialize(LayoutConfig(), seed=0, timeout_s=60)
    shutdown()


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Shared by all tests: one that changes the weights must not count on those it finds."""
    folder = tmp_path_factory.mktemp("engine")
    checkpoint = write_tiny_checkpoint(folder / "checkpoint", seed=0)
    fleet = Fleet(engine_config(folder, checkpoint), folder, TOKEN)
    fleet.start()
    try:
        yield Engine(fleet.engines[0], TOKEN, checkpoint, folder)
    finally:
        for process_id in fleet.process_ids().values():  # no grace: nothing in it is worth waiting for
            with suppress(ProcessLookupError):
                os.killpg(process_id, signal.SIGKILL)
        fleet.stop()
