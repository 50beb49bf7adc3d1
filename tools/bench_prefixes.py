"""What sharing the beginnings of siblings' prompts is worth: teacher's pass, whole step, and the step of GRPO.

    python tools/bench_prefixes.py [--size 1m|10m] [--solution 1000] [--question 50] [--own 0] [--response 128]
        [--siblings 8] [--questions 2] [--rounds 5] [--cpu-time]

Random weights and tokens. Teacher prompts are the question, a solution that all siblings of a question read, and
``own`` tokens of each; responses are between half and all of ``response`` tokens long. One rank, one thread, fp32, one
optimizer step a batch. Every round measures each side once; ratios are taken round by round. ``--cpu-time`` counts the
process's own, where the machine has other work. Results belong in tools/BENCHMARKS.md.
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
from bench_objectives import PASSES, seconds_of
from bench_trainer import SIZES, drawn_model

from megatron_sdpo.config import Config, LayoutConfig, ModelConfig, ObjectiveConfig, TaskConfig, TeacherConfig
from megatron_sdpo.mcore import groups as parallel
from megatron_sdpo.mcore.learner import Learner
from megatron_sdpo.types import Batch, Sample


def drawn_batch(arguments: argparse.Namespace, vocabulary: int) -> Batch:
    draw = random.Random(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(2, vocabulary) for _ in range(count))

    made = []
    for group in range(arguments.questions):
        question, solution = ids(arguments.question), ids(arguments.solution)
        for i in range(arguments.siblings):
            response = ids(draw.randint(max(1, arguments.response // 2), arguments.response))
            context = (*question, *solution, *ids(arguments.own))
            engine = (-7.0,) * len(response)
            made.append(Sample(f"0/{group}/{i}", group, question, response, engine, context, float(i % 2)))
    return Batch(0, tuple(made), {}, 0)


def sides_of(model: Path, arguments: argparse.Namespace) -> dict[str, Learner]:
    config = Config(
        name="bench",
        run_dir="unused",
        steps=1_000_000,
        model=ModelConfig(path=str(model), dtype="float32", max_length=4096),
        task=TaskConfig(name="none"),
        layout=LayoutConfig(tokens_per_micro_batch=arguments.budget),
        teacher=TeacherConfig(kind="frozen"),
        objective=ObjectiveConfig(kind="sdpo", top_k=20),
    )
    grpo = ObjectiveConfig(kind="grpo", advantage_std=True)
    groups = parallel.initialize(config.layout, seed=0, timeout_s=60)

    def learner(share: str, objective: ObjectiveConfig) -> Learner:
        layout = dataclasses.replace(config.layout, share_prefixes=share)  # pyright: ignore[reportArgumentType]
        return Learner(dataclasses.replace(config, layout=layout, objective=objective), groups)

    return {
        **{f"SDPO, {share}": learner(share, config.objective) for share in ("off", "teacher", "scoring")},
        **{f"GRPO, {share}": learner(share, grpo) for share in ("off", "scoring")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="1m")
    for name, default in (("solution", 1000), ("question", 50), ("own", 0), ("response", 128), ("budget", 8192)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("siblings", 8), ("questions", 2), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--cpu-time", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    with tempfile.TemporaryDirectory() as folder:
        sides = sides_of(drawn_model(arguments.size, Path(folder)), arguments)
        batch = drawn_batch(arguments, SIZES[arguments.size]["vocab_size"])
        for learner in sides.values():
            seconds_of(learner, batch, clock)
        gc.collect()
        gc.freeze()
        found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for _ in range(arguments.rounds):
            for name, learner in sides.items():
                found[name].append(seconds_of(learner, batch, clock))
    report(arguments, batch, sides, found)


def report(
    arguments: argparse.Namespace, batch: Batch, sides: dict[str, Learner], found: dict[str, list[dict[str, float]]]
) -> None:
    read = sum(len(s.teacher_prompt_ids or ()) + len(s.response_ids) for s in batch.samples)
    print(machine())
    print(f"{arguments.size}: {len(batch.samples)} samples, {read} tokens as the teacher reads them")
    for name, steps in found.items():
        tokens = sides[name].performance(batch, dict.fromkeys(map("time/{}".format, PASSES), 1.0))
        parts = "  ".join(f"{p} {statistics.median(s[p] for s in steps):.3f}" for p in PASSES)
        total = statistics.median(sum(s.values()) for s in steps)
        print(f"{name:14} {total:.3f} s  {parts}  spared {tokens['perf/shared_tokens']:.0f} tokens")
    totals = {name: [sum(s.values()) for s in steps] for name, steps in found.items()}
    teacher = {name: [s["score_teacher"] for s in steps] for name, steps in found.items()}
    for words, values, above, below in (
        ("teacher's pass", teacher, "SDPO, off", "SDPO, teacher"),
        ("SDPO's step", totals, "SDPO, off", "SDPO, teacher"),
        ("SDPO's step", totals, "SDPO, teacher", "SDPO, scoring"),
        ("SDPO against GRPO", totals, "SDPO, off", "GRPO, off"),
        ("SDPO against GRPO", totals, "SDPO, teacher", "GRPO, off"),
        ("SDPO against GRPO", totals, "SDPO, scoring", "GRPO, scoring"),
    ):
        ratios = [a / b for a, b in zip(values[above], values[below], strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{words}: {above} / {below}: {statistics.median(ratios):.2f} (median; {spread})")


if __name__ == "__main__":
    main()
