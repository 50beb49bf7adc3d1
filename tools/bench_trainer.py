"""Training tokens a second of one trainer rank, against plain transformers + AdamW on the same model and batch.

    python tools/bench_trainer.py [--rounds 7] [--sequences 128]

Both sides do a next-token step: forward, backward, gradient clipping, AdamW; fp32, one thread. The trainer packs the
sequences, transformers pads them on the right. Rounds alternate between the two; the ratio is taken round by round and
its median printed, so that a drifting machine does not matter. Results belong in tools/BENCHMARKS.md.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

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
from megatron_sdpo.rollout import cpu_platform
from megatron_sdpo.tasks.minipipe_corpus import drawn_document
from megatron_sdpo.types import Batch, Sample

BASE_MODEL = Path(__file__).parents[1] / "megatron_sdpo" / "data" / "minipipe-base"
LR, WEIGHT_DECAY = 1e-5, 0.01


def drawn_samples(count: int, tokens: Chat, length: int | None) -> tuple[Sample, ...]:
    """Documents of the MiniPipe corpus, trained on from the second token on; or random ids, all of one length."""
    rng = random.Random(0)
    if length is None:
        ids = [drawn_document(rng, tokens).ids for _ in range(count)]
    else:
        ids = [tuple(rng.randrange(1, tokens.vocab_size) for _ in range(length)) for _ in range(count)]
    return tuple(Sample(str(i), i, d[:1], d[1:], (), None, 0.0) for i, d in enumerate(ids))


def trainer_step(samples: tuple[Sample, ...]) -> Callable[[], float]:
    """A step of the project's learner."""
    from megatron_sdpo.mcore import groups as parallel
    from megatron_sdpo.mcore.learner import Learner

    config = Config(
        name="bench",
        run_dir="unused",
        steps=1_000_000,
        model=ModelConfig(path=str(BASE_MODEL), dtype="float32", max_length=128),
        task=TaskConfig(name="minipipe"),
        layout=LayoutConfig(tokens_per_micro_batch=4096),
        teacher=TeacherConfig(kind="live"),
        objective=ObjectiveConfig(kind="next_token"),
        optim=OptimConfig(lr=LR, weight_decay=WEIGHT_DECAY),
    )
    learner = Learner(config, parallel.initialize(config.layout, seed=0, timeout_s=60))
    batch = Batch(0, samples, {}, 0)

    def step() -> float:
        scores = learner.score_student(batch)
        return learner.train(batch, scores, learner.score_teacher(batch, scores))["loss/total"]

    return step


def transformers_step(samples: tuple[Sample, ...]) -> Callable[[], float]:
    """The same step, as one would write it with transformers."""
    if not torch.cuda.is_available():
        cpu_platform.provide_torchvision_operators()  # a CPU torchvision cannot be imported without
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(BASE_MODEL, dtype=torch.float32, attn_implementation="sdpa")
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
        return float(loss)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="steps timed together in a round")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, help="sequences of one length, so that transformers pads nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    samples = drawn_samples(arguments.sequences, Chat(BASE_MODEL), arguments.length)
    tokens = sum(len(s.prompt_ids) + len(s.response_ids) for s in samples)
    sides = {"megatron_sdpo": trainer_step(samples), "transformers": transformers_step(samples)}
    first = {name: step() for name, step in sides.items()}
    assert abs(first["megatron_sdpo"] - first["transformers"]) < 1e-4, f"the sides do not train the same: {first}"
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(arguments.rounds):
        for name, step in sides.items():
            began = time.perf_counter()
            for _ in range(arguments.steps):
                step()
            rates[name].append(tokens * arguments.steps / (time.perf_counter() - began))
    print(machine())
    print(f"{arguments.sequences} sequences, {tokens} tokens a step, 1 thread, {arguments.rounds} rounds")
    for name, rate in rates.items():
        low, high = min(rate), max(rate)
        print(f"{name:14} {statistics.median(rate):8.0f} tokens/s (median; {low:.0f} to {high:.0f})")
    ratios = [a / b for a, b in zip(rates["megatron_sdpo"], rates["transformers"], strict=True)]
    print(f"ratio          {statistics.median(ratios):8.2f} (median; {min(ratios):.2f} to {max(ratios):.2f}), goal 0.7")


if __name__ == "__main__":
    main()
