"""How long a save keeps training waiting: at once against beside training, in seconds and as a share of a step.

    python tools/bench_checkpoint.py [--rounds 7] [--hidden 256] [--layers 4]

One rank trains a Llama-shaped model of random weights on one fixed batch (SDPO, EMA teacher, AdamW, fp32). Rounds
alternate between no save, a save at once and a save beside training; each save is followed by steps until it is
complete. Stall is how long the call took; slower is how much longer the steps beside a save took than those without.
Results belong in tools/BENCHMARKS.md.
"""

import argparse
import gc
import random
import statistics
import tempfile
import time
from pathlib import Path

from bench_machine import machine

from megatron_sdpo.config import CheckpointConfig, Config, LayoutConfig, ModelConfig, TaskConfig, TeacherConfig
from megatron_sdpo.mcore import checkpoint
from megatron_sdpo.mcore import groups as parallel
from megatron_sdpo.mcore.learner import Learner
from megatron_sdpo.types import Batch, Sample

VOCABULARY = 4096


def drawn_batch(samples: int, tokens: int) -> Batch:
    """Samples of ``tokens`` response tokens, every one with a teacher context."""
    draw = random.Random(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(2, VOCABULARY) for _ in range(count))

    made = [Sample(str(i), i, ids(16), ids(tokens), (-2.0,) * tokens, ids(32), 0.0) for i in range(samples)]
    return Batch(0, tuple(made), {}, 0)


def step(learner: Learner, batch: Batch) -> float:
    """All passes of the loop, and the seconds they took."""
    began = time.perf_counter()
    student = learner.score_student(batch)
    learner.train(batch, student, learner.score_teacher(batch, student))
    learner.update_teacher()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(arguments, Path(folder))


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    from tests.tiny_model import write_tiny_checkpoint

    hidden = arguments.hidden
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "head_dim": hidden // 8,
        "layers": arguments.layers,
    }
    model = write_tiny_checkpoint(folder / "model", 0, vocab_size=VOCABULARY, heads=8, kv_heads=8, std=0.02, **sizes)
    config = Config(
        name="bench",
        run_dir="unused",
        steps=1_000_000,
        model=ModelConfig(path=str(model), dtype="float32", max_length=256),
        task=TaskConfig(name="none"),
        teacher=TeacherConfig(kind="ema", update_rate=0.05),
    )
    groups = parallel.initialize(LayoutConfig(), seed=0, timeout_s=60)
    learner, batch = Learner(config, groups), drawn_batch(arguments.samples, arguments.tokens)
    step(learner, batch)
    savers = {
        name: checkpoint.Saver(learner, folder / name, CheckpointConfig(keep=1, asynchronous=name == "beside"))
        for name in ("at once", "beside")
    }
    gc.collect()
    gc.freeze()  # as the trainer does: what was built is never looked through again
    plain: list[float] = []
    stalls: dict[str, list[float]] = {name: [] for name in savers}
    work: dict[str, list[float]] = {name: [] for name in savers}
    background: list[float] = []
    during: list[float] = []
    for _ in range(arguments.rounds):
        plain += [step(learner, batch) for _ in range(2)]
        for name, saver in savers.items():
            began, worked = time.perf_counter(), time.process_time()
            saver.begin(cursor=0)
            stalls[name].append(time.perf_counter() - began)
            work[name].append(time.process_time() - worked)
            while name == "beside":
                during.append(step(learner, batch))
                if (seconds := saver.poll()) is not None:
                    background.append(seconds)
                    break
    size = sum(path.stat().st_size for path in (folder / "beside").rglob("*") if path.is_file())
    _print(size, sum(p.numel() for p in learner.model.parameters()), plain, stalls, work, background, during)
    parallel.shutdown()


def _print(
    size: int,
    parameters: int,
    plain: list[float],
    stalls: dict[str, list[float]],
    work: dict[str, list[float]],
    background: list[float],
    during: list[float],
) -> None:
    usual = statistics.median(plain)
    print(machine())
    print(f"{parameters / 1e6:.1f}M parameters, {size / 1e6:.0f} MB a checkpoint, medians of {len(background)} rounds")
    print(f"a step without a save    {_words(plain)}")
    for name, seconds in stalls.items():
        share = f"{statistics.median(seconds) / usual:6.1%} of a step"
        print(f"stall, {name:17} {_words(seconds)}, {share}; CPU {statistics.median(work[name]):.3f} s")
    print(f"writing beside training  {_words(background)}")
    print(f"a step beside a save     {_words(during)}, {statistics.median(during) / usual - 1:+.1%}")


def _words(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):7.3f} s ({min(seconds):.3f} to {max(seconds):.3f})"


if __name__ == "__main__":
    main()
