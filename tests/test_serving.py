"""Engines without a trainer that hang: evaluate ends with a sentence, or goes on where others serve."""

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from megatron_sdpo.launch.local import RoleDied
from megatron_sdpo.launch.serving import while_engines_last
from megatron_sdpo.rollout.client import EngineClient, Generated
from megatron_sdpo.rollout.control import EngineControl
from megatron_sdpo.rollout.fleet import Fleet
from tests.conftest import TOKEN, Engine, engine_config
from tests.launch import ROOT
from tests.test_end_to_end import assert_gone
from tests.test_fleet import wait_until
from tests.test_liveness import PATIENCE_S, scheduler_of

BOUND_S = 15.0


async def stop_when_busy(control: EngineControl, leader: int) -> float:
    """Its scheduler, with requests in hand; when that was."""
    while (await asyncio.to_thread(control.load))["num_running_reqs"] == 0:
        await asyncio.sleep(0.02)
    os.kill(scheduler_of(leader), signal.SIGSTOP)
    return time.monotonic()


async def ask(fleet: Fleet, prompts: int, tokens: int) -> list[Generated]:
    """Two responses to each prompt, all at once."""
    assert fleet.router is not None
    async with EngineClient([fleet.router], TOKEN, timeout_s=300.0) as client:
        asked = [
            client.generate([5, 17, 80, 3 + i], n=2, max_new_tokens=tokens, temperature=1.0) for i in range(prompts)
        ]
        return [generated for answer in await asyncio.gather(*asked) for generated in answer]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_engines_alone_are_replaced_and_nothing_asked_is_lost_until_one_cannot_be(
    engine: Engine, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two hangs with requests in hand, is replaced, and serves again; then it hangs too often, and so does the
    router, of which there is one."""
    config = engine_config(tmp_path, engine.checkpoint, count=2, hang_timeout_s=BOUND_S)
    with Fleet(config, tmp_path, TOKEN, alone=True) as fleet:

        async def hang() -> list[Generated]:
            running = fleet.process_ids()
            control = EngineControl(fleet.engines[1], TOKEN, timeout_s=30.0)
            asking = asyncio.create_task(ask(fleet, prompts=8, tokens=400))
            stopped_at = await stop_when_busy(control, running["engine-1"])
            answers = await asking
            print(f"answered {time.monotonic() - stopped_at:.1f} s after the stop", file=sys.stderr)
            return answers

        answers = asyncio.run(while_engines_last(fleet, hang(), "all was stopped"))
        assert len(answers) == 16
        said = capfd.readouterr().err
        print(said)
        assert "engine-1 hangs (its scheduler has not answered for 15 s (engine.hang_timeout_s)" in said
        assert "is replaced (1 of at most 3 times), others serve" in said

        def serves_again() -> bool:
            assert fleet.tend() == ()
            return f"engine-1 serves again, version of {config.model.path}" in capfd.readouterr().err

        wait_until(serves_again, 300.0)
        before = (tmp_path / "logs" / "engine-1.log").read_text().count("Prefill batch")
        assert len(asyncio.run(ask(fleet, prompts=8, tokens=16))) == 16
        assert (tmp_path / "logs" / "engine-1.log").read_text().count("Prefill batch") > before

        monkeypatch.setattr("megatron_sdpo.rollout.fleet.MOST_RESTARTS", 1)
        os.kill(scheduler_of(fleet.process_ids()["engine-1"]), signal.SIGSTOP)
        os.killpg(fleet.process_ids()["router"], signal.SIGSTOP)
        with pytest.raises(RoleDied, match=r"^(engine-1|router) was ended by SIGKILL; all was stopped"):
            asyncio.run(while_engines_last(fleet, asyncio.sleep(3600), "all was stopped"))
        wait_until(lambda: len(fleet.tend()) == 2, PATIENCE_S)
        lost = {ended.name: ended.log_tail.splitlines() for ended in fleet.tend()}
        hung = f"has not answered for {BOUND_S:g} s (engine.hang_timeout_s)"
        assert lost["router"][0].startswith(f"it hung: its HTTP server {hung}")
        assert lost["engine-1"][0].startswith(f"it hung: its scheduler {hung}")
        assert lost["engine-1"][1] == "it had been replaced already, as often as an engine is in a run: 1 times"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_evaluate_ends_with_a_sentence_when_its_engine_hangs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_sdpo.cli", "evaluate", "minipipe", f"run_dir={tmp_path / 'run'}"]
    command += [f"engine.hang_timeout_s={BOUND_S}", "engine.start_timeout_s=300", "evaluation.attempts=64"]
    errors = tmp_path / "stderr.txt"
    with errors.open("w") as stderr:
        run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=stderr)
    try:
        written = tmp_path / "run" / "evaluations" / "001" / "transcripts.jsonl"
        wait_until(lambda: run.poll() is not None or written.exists(), 300.0)
        assert run.poll() is None, errors.read_text()
        processes = psutil.Process(run.pid).children(recursive=True)
        (leader,) = psutil.Process(run.pid).children()
        os.killpg(leader.pid, signal.SIGSTOP)
        stopped_at = time.monotonic()
        assert run.wait(BOUND_S + 60) == 1
        print(f"ended {time.monotonic() - stopped_at:.1f} s after the stop")
        assert_gone(processes)
    finally:
        run.kill()
        run.wait()
    said = errors.read_text()
    print(said)
    assert "error: engine-0 was ended by SIGKILL; what was answered is in " in said
    assert "it hung: its HTTP server has not answered for 15 s (engine.hang_timeout_s)" in said
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_is_served_can_be_talked_to_in_words(tmp_path: Path) -> None:
    """As a client of OpenAI's would, with the token; without it nobody is answered."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "megatron_sdpo.cli", "serve", "minipipe", f"--run-dir={tmp_path / 'served'}"]
    serving = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        assert serving.stdout is not None
        said = list(itertools.takewhile(lambda line: not line.startswith("token in"), serving.stdout))
        url = said[0].split()[1]
        token = (tmp_path / "served" / "token").read_text().strip()
        question = {"role": "user", "content": "keep over 2, sort, item 1"}
        asked = json.dumps({"model": "minipipe", "messages": [question], "max_tokens": 16}).encode()
        head = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
        request = urllib.request.Request(f"{url}/v1/chat/completions", asked, head)
        with urllib.request.urlopen(request, timeout=60) as answer:
            message = json.loads(answer.read())["choices"][0]["message"]
        assert message["role"] == "assistant" and message["content"].strip()
        del head["Authorization"]
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(urllib.request.Request(f"{url}/v1/chat/completions", asked, head), timeout=60)
        serving.send_signal(signal.SIGINT)
        assert serving.wait(60) == 0
    finally:
        serving.kill()
