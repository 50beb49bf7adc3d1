"""Choose the hard questions of the recipe minipipe-discovery: those that its base model solves, but rarely.

    python tools/choose_hard_questions.py megatron_sdpo/data/minipipe-hard.jsonl

The first ``--candidates`` questions that the recipe's task draws (its own machine, lengths and names) are each
attempted ``--samples`` times by a real engine; a question beyond the window's upper end is given up at once. The first
``--count`` inside the window are written as JSON lines (tasks/jsonl.py), with what was measured in their payload.
Choosing and judging need different attempts: ``megatron-sdpo discover`` samples its baselines anew.
"""

import argparse
import asyncio
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_sdpo.chat import Chat
from megatron_sdpo.config import Config, apply_overrides
from megatron_sdpo.launch.run_dir import RunDir
from megatron_sdpo.rollout.client import EngineClient
from megatron_sdpo.rollout.fleet import Fleet
from megatron_sdpo.rollout.sampler import Asked, Sampler
from megatron_sdpo.tasks import load_task
from megatron_sdpo.types import Question
from recipes import recipe

CHUNK = 128
AT_ONCE = 4
"""Questions in flight."""


@dataclass(frozen=True)
class Measured:
    question: Question
    passes: int
    samples: int

    @property
    def rate(self) -> float:
        return self.passes / self.samples


async def measure(question: Question, sampler: Sampler, samples: int, highest: float) -> Measured:
    """Attempts until ``samples`` are made or more than ``highest`` of them are certain to pass."""
    passes = made = 0
    while made < samples and passes <= highest * samples:
        groups, _ = await sampler.groups([Asked(0, 0, question, min(CHUNK, samples - made), 1.0)])
        passes += sum(verdict.reward > 0 for verdict in groups[0].verdicts)
        made += len(groups[0].verdicts)
    return Measured(question, passes, made)


async def measure_all(
    config: Config, router_token: str, fleet: Fleet, arguments: argparse.Namespace
) -> tuple[list[Measured], float]:
    task = load_task(config.task.name, **config.task.options)
    assert fleet.router is not None
    began = time.perf_counter()
    turns = asyncio.Semaphore(AT_ONCE)
    async with EngineClient([fleet.router], router_token) as client:
        sampler = Sampler(
            client, Chat(config.model.path, config.model.thinking), task, config.rollout.max_new_tokens, 2
        )

        async def one(question: Question) -> Measured:
            async with turns:
                found = await measure(question, sampler, arguments.samples, arguments.highest)
                print(f"{found.passes:4d} of {found.samples:5d}  {question.messages[-1].content}", flush=True)
                return found

        measured = await asyncio.gather(*map(one, task.train_questions()[: arguments.candidates]))
    return measured, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipe", default="minipipe-discovery")
    parser.add_argument("--candidates", type=int, default=40)
    parser.add_argument("--count", type=int, default=12, help="questions to keep at most")
    parser.add_argument("--samples", type=int, default=2048, help="attempts at each candidate")
    parser.add_argument("--lowest", type=float, default=5e-4, help="least pass rate to keep")
    parser.add_argument("--highest", type=float, default=4e-3, help="greatest pass rate to keep")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        drawn = ["task.options.questions=none", f"run_dir={folder}", "engine.start_timeout_s=1200"]
        config = apply_overrides(recipe(arguments.recipe), drawn)
        run_dir = RunDir(Path(folder))
        run_dir.prepare(config)
        with Fleet(config, run_dir.path, run_dir.token()) as fleet:
            measured, seconds = asyncio.run(measure_all(config, run_dir.token(), fleet, arguments))
    inside = [m for m in measured if arguments.lowest <= m.rate <= arguments.highest]
    lines = [
        {
            "id": f"hard/{i}",
            "prompt": m.question.messages[-1].content,
            "payload": {**m.question.payload, "base_passes": m.passes, "base_samples": m.samples},
        }
        for i, m in enumerate(inside[: arguments.count])
    ]
    arguments.out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    attempts = sum(m.samples for m in measured)
    easy, never = sum(m.rate > arguments.highest for m in measured), sum(m.passes == 0 for m in measured)
    print(f"{attempts} attempts in {seconds:.0f} s ({attempts / seconds:.0f} a second)")
    print(f"{len(measured)} candidates: {easy} easier, {len(inside)} inside, {never} never solved; {len(lines)} kept")


if __name__ == "__main__":
    main()
