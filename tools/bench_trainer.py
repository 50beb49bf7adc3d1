"""Training tokens a second of one trainer rank, against plain transformers + AdamW on the same model and batch.

    python tools/bench_trainer.py [--size minipipe|1m|10m] [--sequences 128] [--length 27|16-512] [--rounds 7]

Sizes: MiniPipe's base model, or a Llama of random weights with about so many parameters. Lengths: of MiniPipe's
documents, one for all, or drawn between two (log-uniform). All sides do a next-token step: forward, backward, gradient
clipping, AdamW; fp32, one thread. The trainer packs the sequences; transformers pads them on the right; the third side
is the trainer with every sequence filled up to the longest, which shows what packing is worth. Rounds alternate between
the sides; ratios are taken round by round and their median printed, so that a drifting machine does not matter. Results
belong in tools/BENCHMARKS.md.
"""

import argparse
import gc
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_machine import machine
from torch import Tensor

from megatron_sdpo.chat import Chat
from megatron_sdpo.config import (
    Config,
    LayoutConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    TaskConfig,
    TeacherConfig,
)
from megatron_sdpo.hf_config import read_hf_config
from megatron_sdpo.rollout import cpu_platform
from megatron_sdpo.tasks.minipipe_corpus import drawn_document
from megatron_sdpo.types import Batch, Sample

BASE_MODEL = Path(__file__).parents[1] / "megatron_sdpo" / "data" / "minipipe-base"
LR, WEIGHT_DECAY = 1e-5, 0.01
OURS, FILLED_UP, THEIRS = "megatron_sdpo", "megatron_sdpo, filled up", "transformers"
SIZES: dict[str, dict[str, Any]] = {
    "1m": {"hidden_size": 128, "intermediate_size": 352, "head_dim": 32, "layers": 4, "vocab_size": 1024},
    "10m": {"hidden_size": 320, "intermediate_size": 864, "head_dim": 80, "layers": 6, "vocab_size": 4096},
}


def drawn_model(size: str, folder: Path) -> Path:
    """The Hugging Face directory of a size; random weights are written to ``folder``."""
    if size not in SIZES:
        return BASE_MODEL
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.tiny_model import write_tiny_checkpoint

    return write_tiny_checkpoint(
        folder / size, seed=0, std=0.02, heads=4, kv_heads=4, max_positions=4096, **SIZES[size]
    )


def drawn_samples(count: int, model: Path, length: str | None) -> tuple[Sample, ...]:
    """Documents of the MiniPipe corpus, trained on from the second token on; or random ids of the lengths asked for."""
    rng = random.Random(0)
    if length is None:
        tokens = Chat(model)
        ids = [drawn_document(rng, tokens).ids for _ in range(count)]
    else:
        least, most = (math.log(int(part)) for part in (length.split("-") * 2)[:2])
        lengths = [round(math.exp(rng.uniform(least, most))) for _ in range(count)]
        vocabulary = read_hf_config(model)["vocab_size"]
        ids = [tuple(rng.randrange(1, vocabulary) for _ in range(n)) for n in lengths]
    return tuple(Sample(str(i), i, d[:1], d[1:], (), None, 0.0) for i, d in enumerate(ids))


def filled_up(samples: tuple[Sample, ...]) -> tuple[Sample, ...]:
    """All as long as the longest: the prompt, which costs no head, has what is missing."""
    longest = max(len(s.response_ids) for s in samples)
    return tuple(replace(s, prompt_ids=s.prompt_ids * (1 + longest - len(s.response_ids))) for s in samples)


def trainer_step(path: Path) -> Callable[[Batch], float]:
    """A step of the project's learner."""
    from megatron_sdpo.mcore import groups as parallel
    from megatron_sdpo.mcore.learner import Learner

    config = Config(
        name="bench",
        run_dir="unused",
        steps=1_000_000,
        model=ModelConfig(path=str(path), dtype="float32", max_length=128),
        task=TaskConfig(name="minipipe"),
        layout=LayoutConfig(tokens_per_micro_batch=4096),
        teacher=TeacherConfig(kind="live"),
        objective=ObjectiveConfig(kind="next_token"),
        optim=OptimConfig(lr=LR, weight_decay=WEIGHT_DECAY),
    )
    learner = Learner(config, parallel.initialize(config.layout, seed=0, timeout_s=60))

    def step(batch: Batch) -> float:
        scores = learner.score_student(batch)
        return learner.train(batch, scores, learner.score_teacher(batch, scores))["loss/total"]

    return step


def transformers_step(path: Path, samples: tuple[Sample, ...]) -> Callable[[], float]:
    """The same step, as one would write it with transformers."""
    if not torch.cuda.is_available():
        cpu_platform.provide_torchvision_operators()  # a CPU torchvision cannot be imported without
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    ids = [torch.tensor([*s.prompt_ids, *s.response_ids]) for s in samples]
    ids_BT = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=0)
    labels_BT = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-100)

    def step() -> float:
        logits_BTV: Tensor = model(ids_BT).logits  # padded on the right and causal: no mask is needed
        loss = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("minipipe", *SIZES), default="minipipe")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="steps timed together in a round")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", help="27: of one length, so that nobody pads; 16-512: between the two")
    parser.add_argument("--profile", choices=(OURS, FILLED_UP, THEIRS), help="show where a side's time goes")
    arguments = parser.parse_args()
    if arguments.size in SIZES and arguments.length is None:
        parser.error(
            f"--size {arguments.size} has random weights, to which MiniPipe's documents mean nothing; add --length"
        )
    with tempfile.TemporaryDirectory() as folder:
        measure(arguments, drawn_model(arguments.size, Path(folder)))


def measure(arguments: argparse.Namespace, model: Path) -> None:
    torch.set_num_threads(1)
    samples = drawn_samples(arguments.sequences, model, arguments.length)
    tokens = sum(len(s.prompt_ids) + len(s.response_ids) for s in samples)
    step = trainer_step(model)
    batches = {OURS: Batch(0, samples, {}, 0), FILLED_UP: Batch(0, filled_up(samples), {}, 0)}
    sides = {name: partial(step, batch) for name, batch in batches.items()} | {
        THEIRS: transformers_step(model, samples)
    }
    first = {name: side() for name, side in sides.items()}
    assert abs(first[OURS] - first[THEIRS]) < 1e-4, f"the sides do not train the same: {first}"
    gc.collect()
    gc.freeze()  # as the trainer does: what was built is never looked through again
    if arguments.profile:
        show_profile(sides[arguments.profile], arguments.steps)
        return
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(arguments.rounds):
        for name, side in sides.items():
            began = time.perf_counter()
            for _ in range(arguments.steps):
                side()
            rates[name].append(tokens * arguments.steps / (time.perf_counter() - began))
    print(machine())
    print(f"{arguments.size}, {len(samples)} sequences of {tokens} tokens, 1 thread, {arguments.rounds} rounds")
    for name, rate in rates.items():
        print(f"{name:24} {statistics.median(rate):8.0f} tokens/s (median; {min(rate):.0f} to {max(rate):.0f})")
    for other, goal in ((THEIRS, ", goal 1.0"), (FILLED_UP, "")):
        ratios = [a / b for a, b in zip(rates[OURS], rates[other], strict=True)]
        words = f"{statistics.median(ratios):8.2f} (median; {min(ratios):.2f} to {max(ratios):.2f}){goal}"
        print(f"{'against ' + other:24} {words}")


def show_profile(step: Callable[[], float], steps: int) -> None:
    """Milliseconds a step of each operator, its own time; slowed by being watched."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(steps):
            step()
    rows = sorted(profile.key_averages(), key=lambda row: -row.self_cpu_time_total)
    print(f"{'all':50} {sum(row.self_cpu_time_total for row in rows) / steps / 1e3:8.2f} ms a step")
    for row in rows[:30]:
        print(f"{row.key:50} {row.self_cpu_time_total / steps / 1e3:8.2f} {row.count / steps:7.1f} times")


if __name__ == "__main__":
    main()
