"""Trainer seconds a token over batches of 1k to 32k tokens: what a step costs beside its tokens.

    python tools/bench_batch_sizes.py [--size 1m] [--objective sdpo] [--length 128] [--rounds 5]

One rank, one thread, sequences of one length, one optimizer step a batch. Every round measures all sizes, each by as
many steps as make the same number of tokens; medians over rounds. Results belong in tools/BENCHMARKS.md.
"""

import argparse
import dataclasses
import gc
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from bench_machine import machine
from bench_trainer import SIZES, drawn_model

from megatron_sdpo.config import Config, LayoutConfig, ModelConfig, ObjectiveConfig, TaskConfig, TeacherConfig
from megatron_sdpo.mcore import groups as parallel
from megatron_sdpo.mcore.learner import Learner
from megatron_sdpo.types import Batch, Sample

THOUSANDS = (1, 2, 4, 8, 16, 32)


def drawn_batch(sequences: int, length: int, vocabulary: int) -> Batch:
    """A quarter of each sequence is its prompt; the teacher's prompt is as long."""
    draw = random.Random(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(2, vocabulary) for _ in range(count))

    prompt = length // 4
    response = length - prompt
    made = [
        Sample(str(i), i // 8, ids(prompt), ids(response), (-7.0,) * response, ids(prompt), float(i % 2))
        for i in range(sequences)
    ]
    return Batch(0, tuple(made), {}, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="1m")
    parser.add_argument("--objective", choices=("sdpo", "grpo", "next_token"), default="sdpo")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        measure(arguments, drawn_model(arguments.size, Path(folder)))


def measure(arguments: argparse.Namespace, model: Path) -> None:
    config = Config(
        name="bench",
        run_dir="unused",
        steps=1_000_000,
        model=ModelConfig(path=str(model), dtype="float32", max_length=arguments.length),
        task=TaskConfig(name="none"),
        layout=LayoutConfig(tokens_per_micro_batch=4096),
        teacher=TeacherConfig(kind="ema"),
        objective=dataclasses.replace(ObjectiveConfig(), kind=arguments.objective, top_k=20),
    )
    learner = Learner(config, parallel.initialize(config.layout, seed=0, timeout_s=60))
    vocabulary = SIZES[arguments.size]["vocab_size"]
    batches = {k: drawn_batch(k * 1024 // arguments.length, arguments.length, vocabulary) for k in THOUSANDS}

    def step(batch: Batch) -> None:
        student = learner.score_student(batch)
        learner.train(batch, student, learner.score_teacher(batch, student))
        learner.update_teacher()

    step(batches[4])
    gc.collect()
    gc.freeze()
    found: dict[int, list[float]] = {k: [] for k in batches}
    for _ in range(arguments.rounds):
        for k, batch in batches.items():
            repeats = max(THOUSANDS) // k
            began = time.perf_counter()
            for _ in range(repeats):
                step(batch)
            found[k].append((time.perf_counter() - began) / repeats / k / 1024)
    print(machine())
    print(f"{arguments.size}, {arguments.objective}, sequences of {arguments.length}, {arguments.rounds} rounds")
    usual = statistics.median(statistics.median(seconds) for seconds in found.values())
    for k, seconds in found.items():
        each = statistics.median(seconds)
        spread = f"{min(seconds) * 1e6:.0f} to {max(seconds) * 1e6:.0f}"
        print(f"{k:3}k tokens: {each * 1e6:7.1f} us a token ({spread}), {each / usual - 1:+.1%} of the middle one")


if __name__ == "__main__":
    main()
