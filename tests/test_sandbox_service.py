"""The sandbox as a service: real HTTP on the loopback address, programs executed by the process that listens."""

import asyncio
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from megatron_sdpo.config import ConfigError, SandboxConfig
from megatron_sdpo.sandbox import Program, RemoteSandbox, SandboxError, check_sandbox, lent, say_uneven_workers
from megatron_sdpo.sandbox import remote as remote_module
from megatron_sdpo.tasks.minipipe import MiniPipe
from tests.sandbox_setup import SMALL, skip_without_sandbox


@dataclass
class Service:
    process: subprocess.Popen[str]
    config: SandboxConfig


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    skip_without_sandbox()
    token = tmp_path_factory.mktemp("service") / "token"
    command = [sys.executable, "-m", "megatron_sdpo.sandbox.service", "--port", "0", "--token-file", str(token)]
    # as a script's "service &": SIGINT is ignored where nobody asks for it
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = subprocess.Popen([*command, "sandbox.workers=1"], stdout=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, ignored)
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"listening at (http://127\.0\.0\.1:\d+),", line)
    assert found, line
    assert token.stat().st_mode & 0o777 == 0o600
    yield Service(process, SandboxConfig(backend="remote", url=found[1], token_file=str(token), workers=4))
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 0


@pytest.fixture
def remote(service: Service) -> Iterator[RemoteSandbox]:
    sandbox = RemoteSandbox(service.config)
    yield sandbox
    sandbox.close()


class Executes:
    sandbox: object = None

    def use_sandbox(self, sandbox: object) -> None:
        self.sandbox = sandbox


def test_programs_are_executed_as_here(remote: RemoteSandbox, service: Service) -> None:
    outcomes = remote.run_blocking(Program("print(1 // int(input()))", (b"1", b"0"), limits=SMALL))
    assert [o.kind for o in outcomes] == ["ok", "runtime_error"] and outcomes[0].stdout == b"1\n"
    assert outcomes[1].error.startswith("ZeroDivisionError")
    assert remote.run_blocking(Program("def f(a): return [a]", (b"3",), "f", SMALL))[0].result == b"[3]"
    assert remote.run_blocking(Program("print('\udc80')", limits=SMALL))[0].kind == "syntax_error"
    assert remote.run_blocking(Program("#" * 2**21, limits=SMALL))[0].kind == "source_limit"
    task = Executes()
    check_sandbox(task, service.config)
    with lent(task, service.config):
        assert isinstance(task.sandbox, RemoteSandbox)


def test_a_cancelled_program_frees_its_place_at_the_service(remote: RemoteSandbox) -> None:
    async def scenario() -> float:
        sleeper = asyncio.create_task(remote.run(Program("import time\ntime.sleep(15)", limits=SMALL)))
        await asyncio.sleep(1.0)
        started = time.monotonic()
        sleeper.cancel()
        (outcome,) = await remote.run(Program("print(1)", limits=SMALL))  # the service has one worker
        assert outcome.stdout == b"1\n"
        return time.monotonic() - started

    assert asyncio.run(scenario()) < 10


def test_who_does_not_know_the_token_is_refused(service: Service, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("guess")
    config = replace(service.config, token_file=str(tmp_path / "token"))
    with pytest.raises(ConfigError, match=r"the token is missing or wrong; set sandbox\.token_file"):
        check_sandbox(Executes(), config)
    sandbox = RemoteSandbox(config)
    with pytest.raises(SandboxError, match="the token is missing or wrong"):
        sandbox.run_blocking(Program("print(1)"))
    sandbox.close()


def test_a_service_that_is_not_there_is_refused_at_the_start_and_no_verdict_later(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_module, "PAUSE_S", 0.01)
    config = replace(service.config, url="http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"does not answer .* start it with python -m"):
        check_sandbox(Executes(), config)
    sandbox = RemoteSandbox(config)
    with pytest.raises(SandboxError, match="executed no program"):
        sandbox.run_blocking(Program("print(1)"))
    sandbox.close()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"url": "https://x:1"}, "write it as http://HOST:PORT"),
        ({"token_file": "/no/such/file"}, "cannot read sandbox.token_file"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path: Path, changes: dict[str, str], words: str) -> None:
    (tmp_path / "token").write_text("x")
    config = SandboxConfig(backend="remote", url="http://127.0.0.1:9", token_file=str(tmp_path / "token"))
    with pytest.raises(ConfigError, match=words):
        RemoteSandbox(replace(config, **changes))  # pyright: ignore[reportArgumentType]


def test_the_service_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_sdpo.sandbox.service", "--token-file", str(tmp_path / "token")]
    for override, words in (
        ("sandbox.backend=remote", "the service executes programs itself"),
        ("sandbox.bwrap=none-such", "is not installed"),
        ("sandbox.wrokers=3", "sets no key of sandbox"),
    ):
        done = subprocess.run([*command, override], capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and words in done.stderr
    assert not (tmp_path / "token").exists()


def test_sandboxes_that_wait_and_threads_that_wait_are_said(caplog: pytest.LogCaptureFixture) -> None:
    say_uneven_workers(Executes(), SandboxConfig(workers=2), 16)
    say_uneven_workers(Executes(), SandboxConfig(workers=8), 2)
    say_uneven_workers(Executes(), SandboxConfig(workers=2), 2)
    say_uneven_workers(MiniPipe(train_size=1, eval_size=1), SandboxConfig(workers=2), 16)
    waiting, unused = caplog.messages
    assert "only 2 programs run at one time, the others wait for a sandbox; raise sandbox.workers to 16" in waiting
    assert "the other sandboxes stay unused; raise rollout.verify_workers to 8" in unused


def test_a_task_that_executes_nothing_needs_no_sandbox() -> None:
    config = SandboxConfig(bwrap="none-such")
    task = MiniPipe(train_size=1, eval_size=1)
    check_sandbox(task, config)
    with lent(task, config):
        pass
    with pytest.raises(ConfigError, match=r"executes programs that the model writes, and sandbox.bwrap 'none-such'"):
        check_sandbox(Executes(), config)
