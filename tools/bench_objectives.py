"""A trainer step of SDPO against one of GRPO, on the same attempts; and what is left of it beside generation.

    megatron-sdpo train minipipe --layout tp1 steps=6 --run-dir runs/timed
    python tools/bench_objectives.py runs/timed [--rounds 5] [--cpu-time]

All learners train on the batches that the run has journalled: same model, optimizer, mini-batches; one rank, one
thread; SDPO with and without sharing the beginnings of siblings' prompts. Rounds alternate. How long a step waited for
attempts and to publish weights is the run's own record (median of its steps but the first), added to all sides. Results
belong in tools/BENCHMARKS.md.
"""

import argparse
import dataclasses
import gc
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench_machine import machine

from megatron_sdpo import config as configuration
from megatron_sdpo.config import Config, LayoutConfig, ObjectiveConfig
from megatron_sdpo.flops import batch_flops
from megatron_sdpo.hf_config import read_hf_config
from megatron_sdpo.launch.trainer import JournalSource
from megatron_sdpo.mcore import groups as parallel
from megatron_sdpo.mcore.learner import Learner
from megatron_sdpo.rollout.journal import Journal
from megatron_sdpo.tracking import read_metrics
from megatron_sdpo.types import Batch

NOT_SHARED = "SDPO, nothing shared"
PASSES = ("score_student", "score_teacher", "train")


def seconds_of(learner: Learner, batch: Batch, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Of each pass over a batch."""
    marks = [clock()]
    student = learner.score_student(batch)
    marks.append(clock())
    teacher = learner.score_teacher(batch, student)
    marks.append(clock())
    learner.train(batch, student, teacher)
    learner.update_teacher()
    marks.append(clock())
    return dict(zip(PASSES, (b - a for a, b in itertools.pairwise(marks)), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true", help="of this process, where the machine has other work")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sdpo = dataclasses.replace(
        configuration.load(arguments.run_dir / "config.json"), layout=LayoutConfig(tokens_per_micro_batch=4096)
    )
    grpo = dataclasses.replace(sdpo, objective=ObjectiveConfig(kind="grpo", advantage_std=True))
    source = JournalSource(sdpo, Journal(arguments.run_dir / "attempts"))
    batches = [source.batch(step) for step in range(sdpo.steps)]
    groups = parallel.initialize(sdpo.layout, seed=0, timeout_s=60)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    plain = dataclasses.replace(sdpo, layout=dataclasses.replace(sdpo.layout, share_prefixes="off"))
    configs = {"SDPO": sdpo, NOT_SHARED: plain, "GRPO": grpo}
    learners = {name: Learner(config, groups) for name, config in configs.items()}
    for learner in learners.values():
        seconds_of(learner, batches[0])
    gc.collect()
    gc.freeze()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in learners}
    for _ in range(arguments.rounds):
        for batch in batches[1:]:
            for name, learner in learners.items():
                found[name].append(seconds_of(learner, batch, clock))
    _print(arguments.run_dir, configs, batches, found)


def _print(
    run_dir: Path, configs: dict[str, Config], batches: list[Batch], found: dict[str, list[dict[str, float]]]
) -> None:
    rows = read_metrics(run_dir)[2:]
    around = statistics.median((row["time/wait"] or 0.0) + (row["time/sync"] or 0.0) for row in rows)
    hf_config, trained = read_hf_config(configs["SDPO"].model.path), batches[1:]
    print(machine())
    print(f"{len(batches) - 1} batches of {len(batches[0].samples)} attempts, {len(found['SDPO'])} steps a side")
    for name, steps in found.items():
        parts = "  ".join(f"{p} {statistics.median(s[p] for s in steps):.3f}" for p in PASSES)
        flops = sum(batch_flops(hf_config, b.samples, configs[name].objective) for b in trained) / len(trained)
        whole = f"{flops / 1e9:.1f} GFLOP if nothing is shared"
        print(f"{name}: {statistics.median(sum(s.values()) for s in steps):.3f} s ({parts}), {whole}")
    totals = {name: [sum(s.values()) for s in steps] for name, steps in found.items()}
    for words, extra, goal in (("trainer", 0.0, 1.6), (f"with {around:.2f} s of generation and sync", around, 1.1)):
        for side in ("SDPO", NOT_SHARED):
            ratios = [(a + extra) / (b + extra) for a, b in zip(totals[side], totals["GRPO"], strict=True)]
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            print(f"{side} / GRPO, {words}: {statistics.median(ratios):.3f} (median; {spread}), goal at most {goal}")


if __name__ == "__main__":
    main()
