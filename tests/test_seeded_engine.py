"""An engine that answers by seed: the same tokens and log-probs to the bit, whatever else it does and did."""

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_sdpo.rollout.client import EngineClient, Generated
from megatron_sdpo.rollout.control import EngineControl
from megatron_sdpo.rollout.cpu_sampling import murmur_hash32
from megatron_sdpo.rollout.fleet import Fleet
from megatron_sdpo.types import EngineAddress
from tests.conftest import TOKEN, engine_config
from tests.tiny_model import reference_distributions, reference_log_probs, write_tiny_checkpoint

PROMPTS = ([5, 17, 80, 33, 9, 61], [4, 28, 99, 12, 7, 50, 3, 90, 41], [77])
SEEDS = {0: (11, 12), 1: (2**62 + 5, 13), 2: (11, 14)}
WORD = 2**32 - 1


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("seeded") / "checkpoint", seed=0)


@pytest.fixture(scope="module")
def address(checkpoint: Path) -> Iterator[EngineAddress]:
    """The engine of a deterministic run."""
    config = replace(engine_config(checkpoint.parent, checkpoint), deterministic=True)
    fleet = Fleet(config, checkpoint.parent, TOKEN)
    fleet.start()
    try:
        yield fleet.engines[0]
    finally:
        for process_id in fleet.process_ids().values():  # no grace: nothing in it is worth waiting for
            with suppress(ProcessLookupError):
                os.killpg(process_id, signal.SIGKILL)
        fleet.stop()


def answers(address: EngineAddress, order: Sequence[int], noise: int = 0) -> dict[int, list[Generated]]:
    """By prompt; all requests, and ``noise`` others, are in flight at once."""

    async def once() -> dict[int, list[Generated]]:
        async with EngineClient([address], TOKEN, timeout_s=60.0) as client:

            async def ask(prompt: Sequence[int], seeds: Sequence[int]) -> list[Generated]:
                return await client.generate(prompt, n=len(seeds), max_new_tokens=24, temperature=1.0, seeds=seeds)

            others = [ask(PROMPTS[i % 3][::-1], (100 + i,)) for i in range(noise)]
            wanted = [ask(PROMPTS[i], SEEDS[i]) for i in order]
            found = await asyncio.gather(*others, *wanted)
            return dict(zip(order, found[noise:], strict=True))

    return asyncio.run(once())


def test_an_answer_follows_from_prompt_and_seed(address: EngineAddress, checkpoint: Path) -> None:
    first = answers(address, (0, 1, 2))
    assert answers(address, (2, 0, 1), noise=7) == first
    EngineControl(address, TOKEN, timeout_s=60.0).update_weights_from_disk(str(checkpoint), 0)
    assert answers(address, (1, 2, 0), noise=3) == first
    samples = [sample for group in first.values() for sample in group]
    assert len({sample.response_ids for sample in samples}) == len(samples)
    for place, group in first.items():
        for sample in group:
            reference = reference_log_probs(checkpoint, PROMPTS[place] + list(sample.response_ids), 1.0)
            torch.testing.assert_close(
                torch.tensor(sample.log_probs),
                reference[len(PROMPTS[place]) - 1 :],
                atol=1e-4,
                rtol=0,
                check_dtype=False,
            )


def test_seeds_draw_from_the_models_distribution(address: EngineAddress, checkpoint: Path) -> None:
    """First tokens of 400 seeds against the exact probabilities, by a chi-square statistic."""

    async def once() -> list[Generated]:
        async with EngineClient([address], TOKEN, timeout_s=120.0) as client:
            return await client.generate(PROMPTS[0], n=400, max_new_tokens=1, temperature=1.0, seeds=range(400))

    counts = Counter(sample.response_ids[0] for sample in asyncio.run(once()))
    probabilities = reference_distributions(checkpoint, PROMPTS[0])[-1].exp()
    expected = [400 * p for p in probabilities.tolist()]
    often = [token for token, count in enumerate(expected) if count >= 5]
    rest = 400 - sum(expected[token] for token in often)
    statistic = sum((counts[token] - expected[token]) ** 2 / expected[token] for token in often)
    statistic += (400 - sum(counts[token] for token in often) - rest) ** 2 / max(rest, 1.0)
    assert len(often) >= 5 and statistic < len(often) + 4 * (2 * len(often)) ** 0.5


def test_the_hash_is_murmurs() -> None:
    """Against its definition in Python's integers."""
    draw = random.Random(0)
    seeds = [0, 1, 2**63 - 1, 2**64 - 1, *(draw.getrandbits(64) for _ in range(20))]
    positions = [draw.randrange(10_000) for _ in seeds]
    found = murmur_hash32(torch.tensor(seeds, dtype=torch.uint64), torch.tensor(positions), torch.arange(50))
    assert found.dtype == torch.uint32
    expected = [
        [murmur(seed, position, column) for column in range(50)]
        for seed, position in zip(seeds, positions, strict=True)
    ]
    assert found.tolist() == expected


def murmur(seed: int, position: int, column: int) -> int:
    state = 0
    for word in (seed & WORD, seed >> 32, position, column):
        word = word * 0xCC9E2D51 & WORD
        word = (word << 15 | word >> 17) & WORD
        state ^= word * 0x1B873593 & WORD
        state = (state << 13 | state >> 19) & WORD
        state = (state * 5 + 0xE6546B64) & WORD
    state ^= 16
    state = (state ^ state >> 16) * 0x85EBCA6B & WORD
    state = (state ^ state >> 13) * 0xC2B2AE35 & WORD
    return state ^ state >> 16
