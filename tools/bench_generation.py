"""Attempts a second through the coordinator's own path, against SGLang's benchmark client on the same server.

    python tools/bench_generation.py [--rounds 5]

One engine serves MiniPipe's base model with an end token that is never sampled, so every response has exactly
``--new-tokens`` tokens on both sides. Ours is ``make_batch`` as a run calls it: 128 attempts sampled with log-probs,
judged, journalled to disk, given teacher contexts. SGLang's is ``sglang.bench_serving`` with 128 random prompts of
the same length, log-probs on, no streaming, all at once. Rounds alternate; the ratio is taken round by round.
``--attempts 1`` asks 128 different questions instead of 16 questions 8 times (which share their prompt's cache).
Results belong in tools/BENCHMARKS.md.
"""

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from bench_machine import machine

from megatron_sdpo.chat import Chat
from megatron_sdpo.config import Config
from megatron_sdpo.launch.run_dir import RunDir
from megatron_sdpo.loop import make_batch
from megatron_sdpo.rollout.client import EngineClient
from megatron_sdpo.rollout.fleet import Fleet
from megatron_sdpo.rollout.journal import Journal
from megatron_sdpo.rollout.prompts import PromptStream
from megatron_sdpo.rollout.sampler import Sampler
from megatron_sdpo.tasks import load_task
from recipes import recipe

ATTEMPTS = 128
NEVER_SAMPLED = 103  # a reserved word of the vocabulary
# The client imports `datasets` for prompts that are not drawn at random; it is not installed here.
BENCH_CLIENT = (
    "import sys, types; sys.modules['datasets'] = types.SimpleNamespace(load_dataset=None);"
    "from megatron_sdpo.rollout import cpu_platform; cpu_platform.install();"
    "import runpy; runpy.run_module('sglang.bench_serving', run_name='__main__')"
)


def endless_model(folder: Path) -> Path:
    """A copy of the base model whose responses do not end by themselves."""
    model = folder / "model"
    shutil.copytree(recipe("minipipe").model.path, model)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps({**settings, "eos_token_id": NEVER_SAMPLED}))
    return model


async def coordinator_seconds(config: Config, run_dir: RunDir, fleet: Fleet, step: int) -> float:
    """One batch, from prompts to samples."""
    task = load_task(config.task.name, **config.task.options)
    tokens = Chat(config.model.path, config.model.thinking)
    prompts = PromptStream(task.train_questions(), config.rollout.prompts_per_step, config.seed)
    assert fleet.router is not None
    async with EngineClient([fleet.router], run_dir.token()) as client:
        sampler = Sampler(client, tokens, task, config.rollout.max_new_tokens, config.rollout.verify_workers)
        began = time.perf_counter()
        batch = await make_batch(step, config, prompts, sampler, Journal(run_dir.attempts), tokens)
        seconds = time.perf_counter() - began
    lengths = {len(sample.response_ids) for sample in batch.samples}
    assert len(batch.samples) == ATTEMPTS and lengths == {config.rollout.max_new_tokens}, lengths
    return seconds


def bench_client_seconds(config: Config, run_dir: RunDir, fleet: Fleet, prompt_tokens: int, folder: Path) -> float:
    """The duration that SGLang's client reports for the same number of requests."""
    assert fleet.router is not None
    host, port = fleet.router.url.removeprefix("http://").rsplit(":", 1)
    result = folder / "bench.jsonl"
    result.unlink(missing_ok=True)
    options = {
        "backend": "sglang",
        "host": host,
        "port": port,
        "dataset-name": "random-ids",
        "random-input-len": prompt_tokens,
        "random-output-len": config.rollout.max_new_tokens,
        "random-range-ratio": 1.0,
        "num-prompts": ATTEMPTS,
        "tokenizer": config.model.path,
        "model": config.model.path,
        "temperature": config.rollout.temperature,
        "warmup-requests": 8,
        "output-file": result,
    }
    command = [f"--{name}={value}" for name, value in options.items()]
    flags = ["--return-logprob", "--disable-stream", "--tokenize-prompt", "--disable-tqdm"]
    subprocess.run(
        [sys.executable, "-c", BENCH_CLIENT, *command, *flags],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OPENAI_API_KEY": run_dir.token(), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    report = json.loads(result.read_text().splitlines()[-1])
    assert report["completed"] == ATTEMPTS, report
    return float(report["duration"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--attempts", type=int, default=8, help="attempts at each question; 128 in all")
    arguments = parser.parse_args()
    config = recipe("minipipe")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = replace(
            config,
            run_dir=str(folder / "run"),
            model=replace(config.model, path=str(endless_model(folder))),
            rollout=replace(
                config.rollout,
                prompts_per_step=ATTEMPTS // arguments.attempts,
                attempts_per_prompt=arguments.attempts,
                max_new_tokens=arguments.new_tokens,
            ),
        )
        run_dir = RunDir(Path(config.run_dir))
        run_dir.prepare(config)
        questions = load_task(config.task.name, **config.task.options).train_questions()
        tokens = Chat(config.model.path, config.model.thinking)
        prompt_tokens = round(statistics.mean(len(tokens.prompt_ids(q.messages)) for q in questions))
        ours: list[float] = []
        theirs: list[float] = []
        with Fleet(config, run_dir.path, run_dir.token()) as fleet:
            asyncio.run(coordinator_seconds(config, run_dir, fleet, 0))  # warm-up
            for step in range(1, arguments.rounds + 1):
                ours.append(ATTEMPTS / asyncio.run(coordinator_seconds(config, run_dir, fleet, step)))
                theirs.append(ATTEMPTS / bench_client_seconds(config, run_dir, fleet, prompt_tokens, folder))
    print(machine())
    print(f"{ATTEMPTS} attempts of {arguments.new_tokens} tokens, {arguments.attempts} at each question")
    for side, rates in {"coordinator": ours, "SGLang's client": theirs}.items():
        print(f"{side:16} {statistics.median(rates):6.1f} attempts/s (median; {min(rates):.1f} to {max(rates):.1f})")
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    low, high = min(ratios), max(ratios)
    print(f"ratio            {statistics.median(ratios):6.2f} (median; {low:.2f} to {high:.2f}), goal 0.9")


if __name__ == "__main__":
    main()
