"""Recreate the MiniPipe base model: next-token training on the MiniPipe corpus, through the project's own trainer.

    python tools/pretrain_minipipe.py --out megatron_sdpo/data/minipipe-base

About six minutes on one core. The ladder of sizes: ``--width 48 --out models/minipipe-w48``, and so on.
"""

import argparse
import random
import tempfile
import time
from pathlib import Path

import torch
from make_minipipe_tokenizer import WIDTH, write_config, write_initial_weights, write_tokenizer

from megatron_sdpo.chat import Chat
from megatron_sdpo.config import (
    Config,
    LayoutConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    TaskConfig,
    TeacherConfig,
    check,
)
from megatron_sdpo.tasks.minipipe_corpus import Document, drawn_document
from megatron_sdpo.types import Batch, Sample


def config(model: Path, steps: int, lr: float) -> Config:
    return Config(
        name="minipipe-pretrain",
        run_dir=str(model),
        steps=steps,
        model=ModelConfig(path=str(model), dtype="float32", max_length=128),
        task=TaskConfig(name="minipipe"),
        layout=LayoutConfig(tokens_per_micro_batch=2048),
        teacher=TeacherConfig(kind="live"),
        objective=ObjectiveConfig(kind="next_token"),
        optim=OptimConfig(lr=lr, lr_decay="linear", min_lr_ratio=0.05, warmup_steps=100, beta2=0.98, eps=1e-8),
    )


def sample(document: Document, name: str) -> Sample:
    """One sample a document; what stands between a demonstration and the answer is learned along with them."""
    start, end = document.loss_spans[0][0], document.loss_spans[-1][1]
    return Sample(name, 0, document.ids[:start], document.ids[start:end], (), None, 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory that receives the trained checkpoint")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--documents", type=int, default=32, help="documents a step")
    parser.add_argument("--lr", type=float, help="default: 3e-3 at the usual width, and in inverse proportion to it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=WIDTH, help="of the model, a multiple of 16")
    arguments = parser.parse_args()

    from megatron_sdpo.mcore import groups as parallel
    from megatron_sdpo.mcore.hf import save_hf
    from megatron_sdpo.mcore.learner import Learner

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder)
        write_tokenizer(start)
        write_config(start, arguments.width)
        write_initial_weights(start / "model.safetensors", arguments.seed, arguments.width)
        run = config(start, arguments.steps, arguments.lr or 3e-3 * WIDTH / arguments.width)
        check(run)
        groups = parallel.initialize(run.layout, arguments.seed, timeout_s=120)
        learner = Learner(run, groups)
        chat = Chat(start)
        rng = random.Random(arguments.seed)
        began = time.perf_counter()
        for step in range(run.steps):
            samples = tuple(sample(drawn_document(rng, chat), f"{step}/{i}") for i in range(arguments.documents))
            batch = Batch(step, samples, {}, 0)
            student = learner.score_student(batch)
            metrics = learner.train(batch, student, learner.score_teacher(batch, student))
            if (step + 1) % 100 == 0:
                seconds = time.perf_counter() - began
                print(f"step {step + 1}/{run.steps} | loss {metrics['loss/total']:.3f} | {seconds:.0f} s", flush=True)
        save_hf(learner.model, arguments.out, groups, run.layout, start)
        parallel.shutdown()


if __name__ == "__main__":
    main()
