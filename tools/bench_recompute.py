"""What recomputation saves and costs: peak memory and time of a training step, by setting.

    python tools/bench_recompute.py [--size 10m] [--sequences 16] [--length 256] [--rounds 5]

One trainer rank, next-token training (forward, backward, AdamW; fp32, one thread), all sequences in one micro-batch.
Memory is what operations allocate beyond weights, moments and gradients (live_memory.py); time is by CPU seconds of
this process, so that a busy machine matters little, and relative to no recomputation, round by round. Results belong in
tools/BENCHMARKS.md.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from bench_machine import machine
from bench_trainer import SIZES, drawn_model, drawn_samples
from live_memory import peak_bytes

from megatron_sdpo.config import Config, LayoutConfig, ModelConfig, TaskConfig, apply_overrides
from megatron_sdpo.mcore.groups import ParallelGroups, initialize, shutdown
from megatron_sdpo.mcore.learner import Learner
from megatron_sdpo.types import Batch

SETTINGS = {
    "none": (),
    "core_attn": ("layout.recompute=selective",),
    "layernorm": ("layout.recompute=selective", 'layout.recompute_modules=["layernorm"]'),
    "mlp": ("layout.recompute=selective", 'layout.recompute_modules=["mlp"]'),
    "all three": ("layout.recompute=selective", 'layout.recompute_modules=["core_attn","layernorm","mlp"]'),
    "full, uniform 1": ("layout.recompute=full",),
    "full, uniform 2": ("layout.recompute=full", "layout.recompute_num_layers=2"),
    "full, block 3": ("layout.recompute=full", "layout.recompute_method=block", "layout.recompute_num_layers=3"),
}


def step_of(path: Path, overrides: tuple[str, ...], tokens: int, groups: ParallelGroups) -> Callable[[Batch], object]:
    base = Config(
        name="bench",
        run_dir="unused",
        steps=1_000_000,
        model=ModelConfig(path=str(path), dtype="float32"),
        task=TaskConfig(name="minipipe"),
    )
    ours = ("objective.kind=next_token", "teacher.kind=live", f"layout.tokens_per_micro_batch={tokens}")
    config = apply_overrides(base, [*ours, *overrides])
    learner = Learner(config, groups)

    def step(batch: Batch) -> object:
        scores = learner.score_student(batch)
        return learner.train(batch, scores, learner.score_teacher(batch, scores))

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="10m")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", default="256")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = drawn_model(arguments.size, Path(folder))
        batch = Batch(0, drawn_samples(arguments.sequences, path, arguments.length), {}, 0)
        tokens = sum(len(s.prompt_ids) + len(s.response_ids) for s in batch.samples)
        groups = initialize(LayoutConfig(), seed=0, timeout_s=60)
        steps = {name: step_of(path, overrides, tokens, groups) for name, overrides in SETTINGS.items()}
        peaks, seconds = {}, {name: [] for name in steps}
        for name, step in steps.items():
            step(batch)  # moments and gradients are there from now on
            peaks[name] = peak_bytes(partial(step, batch), torch.device("cpu"))
        for _ in range(arguments.rounds):
            for name, step in steps.items():
                began = time.process_time()
                step(batch)
                seconds[name].append(time.process_time() - began)
    shutdown()
    print(machine())
    print(f"{arguments.size}, {len(batch.samples)} sequences of {tokens} tokens in one micro-batch")
    for name in steps:
        ratios = [a / b for a, b in zip(seconds[name], seconds["none"], strict=True)]
        memory = f"{peaks[name] / 2**20:7.1f} MiB ({peaks[name] / peaks['none']:.2f})"
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{name:18} {memory}, {statistics.median(ratios):.2f} times as long ({spread})")


if __name__ == "__main__":
    main()
