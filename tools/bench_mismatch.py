"""How far an engine's probabilities are from the trainer's, and that importance weights take the difference out.

    python tools/bench_mismatch.py [--samples 32768] [--model DIR] [KEY=VALUE ...]

One engine of its own serves what one trainer rank publishes; keys are those of a configuration (fp8.student,
engine.fp8, model.dtype ...). Two measurements:

* of sampled responses to the task's questions: |difference| of log-probs per token; KL(engine || trainer), estimated
  without bias and with little noise as ``w - 1 - log w``, w = p_trainer / p_engine; and the mean of w, which is 1 if
  the log-probs that the engine reports are those that it samples by.
* of first tokens after random contexts, many samples each: do they come from the trainer's distribution? The squared
  deviations of their frequencies, in units of their variance, are about 1 on average if they do, and far above if not
  (Pearson's statistic per degree of freedom); the same of frequencies weighted by w as the objective weights tokens,
  and with w cut at ``objective.engine_mismatch_cap``.

Results belong in tools/BENCHMARKS.md.
"""

import argparse
import asyncio
import math
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from bench_machine import machine

from megatron_sdpo.chat import Chat
from megatron_sdpo.config import Config, apply_overrides, check
from megatron_sdpo.launch.local import first_gpu_of_engines, gpus_of_torch
from megatron_sdpo.launch.run_dir import RunDir
from megatron_sdpo.launch.trainer import publisher_for
from megatron_sdpo.mcore import groups as parallel
from megatron_sdpo.mcore.learner import Learner
from megatron_sdpo.rollout.client import EngineClient, Generated
from megatron_sdpo.rollout.fleet import Fleet, Share
from megatron_sdpo.tasks import load_task
from recipes import recipe

CONTEXTS, CONTEXT_TOKENS, QUESTIONS = 4, 24, 64
AT_ONCE = 1024
LEAST_EXPECTED = 5.0
"""Samples that a token must be expected to have to count for itself; rarer ones count together."""


@dataclass(frozen=True)
class Drawn:
    """First tokens after one context, with the trainer's probability of each entry of the vocabulary."""

    trainer_V: list[float]
    tokens: Counter[int]
    engine_V: dict[int, float]
    """As the engine reported them."""

    def statistic(self, cap: float | None) -> tuple[float, int]:
        """Squared deviations of (weighted) frequencies from the trainer's, each over its variance; and how many."""
        count = self.tokens.total()
        rare = [0.0, 0.0, 0.0]
        found, bins = 0.0, -1
        for token, p in enumerate(self.trainer_V):
            weight = 1.0
            if cap is not None:
                weight = min(cap, p / self.engine_V[token]) if token in self.engine_V else 1.0
            seen, variance = weight * self.tokens[token], weight * count * p
            if count * p < LEAST_EXPECTED:
                rare = [rare[0] + seen, rare[1] + count * p, rare[2] + variance]
                continue
            found, bins = found + (seen - count * p) ** 2 / variance, bins + 1
        if rare[1] >= LEAST_EXPECTED:
            found, bins = found + (rare[0] - rare[1]) ** 2 / rare[2], bins + 1
        return found, bins


def configuration(folder: Path, model: str | None, overrides: Sequence[str]) -> Config:
    alone = ("layout.tensor_parallel=1", "layout.world_size=1")
    base = apply_overrides(recipe("minipipe"), [*alone, f"run_dir={folder}", "publish.probe_tolerance=5.0"])
    config = apply_overrides(base, [*([f"model.path={model}"] if model else []), *overrides])
    check(config)
    return config


async def first_tokens(client: EngineClient, learner: Learner, config: Config, samples: int) -> list[Drawn]:
    vocabulary = learner.hf_config["vocab_size"]
    contexts = torch.randint(2, vocabulary - 1, (CONTEXTS, CONTEXT_TOKENS), generator=torch.Generator().manual_seed(7))
    found = []
    for context in contexts.tolist():
        with learner.precision.of(config.fp8.student):
            trainer_V = [math.exp(learner.log_probs([*context, token])[-1]) for token in range(vocabulary)]
        drawn = []
        for _ in range(samples // (CONTEXTS * AT_ONCE)):
            drawn += await client.generate(context, n=AT_ONCE, max_new_tokens=1, temperature=1.0)
        # An engine computes a batch of other size in another order: a mean of what it reported, token by token.
        reported: dict[int, list[float]] = {}
        for one in drawn:
            reported.setdefault(one.response_ids[0], []).append(math.exp(one.log_probs[0]))
        engine_V = {token: sum(values) / len(values) for token, values in reported.items()}
        found.append(Drawn(trainer_V, Counter(one.response_ids[0] for one in drawn), engine_V))
    return found


async def responses(client: EngineClient, config: Config, tokens: Chat) -> list[tuple[tuple[int, ...], Generated]]:
    task = load_task(config.task.name, **config.task.options)
    prompts = [tokens.prompt_ids(q.messages) for q in list(task.eval_questions())[:QUESTIONS]]
    kept = config.rollout.max_new_tokens
    answers = [await client.generate(ids, n=16, max_new_tokens=kept, temperature=1.0) for ids in prompts]
    return [(ids, one) for ids, group in zip(prompts, answers, strict=True) for one in group]


def of_responses(learner: Learner, config: Config, found: Sequence[tuple[tuple[int, ...], Generated]]) -> str:
    logs = []
    for ids, one in found[:: max(1, len(found) // 512)]:
        with learner.precision.of(config.fp8.student):
            own = learner.log_probs([*ids, *one.response_ids])[-len(one.response_ids) :]
        logs += [trainer - engine for trainer, engine in zip(own, one.log_probs, strict=True)]
    log_w = torch.tensor(logs, dtype=torch.float64)
    w = log_w.exp()
    kl, error = (w - 1 - log_w).mean(), w.std() / math.sqrt(len(w))
    return (
        f"{len(w)} tokens of responses: |difference| mean {log_w.abs().mean():.2e}, largest {log_w.abs().max():.2e};"
        f" KL(engine || trainer) {kl:.2e} nats a token; mean weight {w.mean():.5f} +- {error:.5f}"
    )


def of_first_tokens(drawn: Sequence[Drawn], cap: float) -> str:
    def per_bin(bound: float | None) -> str:
        parts = [one.statistic(bound) for one in drawn]
        bins = sum(n for _, n in parts)
        return f"{sum(x for x, _ in parts) / bins:.2f}"

    kl = [sum(q * math.log(q / one.trainer_V[v]) for v, q in one.engine_V.items()) for one in drawn]
    return (
        f"{sum(one.tokens.total() for one in drawn)} first tokens after {len(drawn)} contexts, KL(engine || trainer)"
        f" {sum(kl) / len(kl):.2e}: deviation from the trainer's distribution, 1 if there is none: {per_bin(None)};"
        f" weighted {per_bin(math.inf)}; weighted, cut at {cap:g}: {per_bin(cap)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=32_768)
    parser.add_argument("--model", help="default: MiniPipe's base model")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as name:
        config = configuration(Path(name), arguments.model, arguments.overrides)
        run_dir = RunDir(Path(name))
        run_dir.prepare(config)
        share = Share(range(1), config.engine.host, first_gpu=first_gpu_of_engines(config, gpus_of_torch()))
        with Fleet(config, run_dir.path, run_dir.token(), share) as fleet:
            groups = parallel.initialize(config.layout, config.seed, timeout_s=120)
            learner = Learner(config, groups)
            publisher = publisher_for(learner, run_dir, config, run_dir.token())
            began = time.perf_counter()
            synced = publisher.publish(1)
            print(f"published {synced['sync/bytes'] / 1e6:.2f} MB in {time.perf_counter() - began:.2f} s,", end=" ")
            print(f"probe gap {synced['sync/probe_gap']:.2e}")

            async def sampled() -> tuple[list[Drawn], list[tuple[tuple[int, ...], Generated]]]:
                async with EngineClient(fleet.engines, run_dir.token(), 300.0) as client:
                    tokens = Chat(config.model.path, config.model.thinking)
                    first = await first_tokens(client, learner, config, arguments.samples)
                    return first, await responses(client, config, tokens)

            first, found = asyncio.run(sampled())
            print(of_responses(learner, config, found))
            print(of_first_tokens(first, config.objective.engine_mismatch_cap or math.inf))
            publisher.close()
        parallel.shutdown()


if __name__ == "__main__":
    main()
