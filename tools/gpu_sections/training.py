"""MiniPipe learned on a GPU without engines, checkpoints, and memory beside the planner's."""

import gc
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import torch
from live_memory import peak_bytes
from torch import Tensor

from gpu_sections.common import (
    DEVICE,
    SMALL,
    Finding,
    at_least,
    at_most,
    draw_batch,
    groups_of_one,
    holds,
    joined,
    learner_of,
    mixed_lengths,
    qwen3,
    step_of,
    write_model,
)
from megatron_sdpo import batching
from megatron_sdpo.batching import MicroBatch
from megatron_sdpo.chat import Chat
from megatron_sdpo.config import Config, Fp8Config, LayoutConfig
from megatron_sdpo.launch.trainer import NoEngines
from megatron_sdpo.loop import as_batch, train
from megatron_sdpo.mcore import checkpoint
from megatron_sdpo.mcore import optimizer as optim
from megatron_sdpo.mcore.forward import score
from megatron_sdpo.mcore.learner import Learner
from megatron_sdpo.phases import Phases
from megatron_sdpo.rollout.prompts import PromptStream
from megatron_sdpo.scaling.memory import rank_memory
from megatron_sdpo.tasks import load_task
from megatron_sdpo.types import Attempt, Batch, Evaluation, Group, Question
from recipes.minipipe import minipipe


class TrainerSamples:
    """Attempts by the learner's own model, in model.dtype, a forward pass a token (types.BatchSource).

    Where an engine is not at hand: the loop, the verifier, the contexts and the learner are those of every run.
    """

    def __init__(self, config: Config, learner: Learner) -> None:
        self._config, self._learner = config, learner
        self._task, self._tokens = (
            load_task(config.task.name, **config.task.options),
            Chat(config.model.path, config.model.thinking),
        )
        self._prompts = PromptStream(self._task.train_questions(), config.rollout.prompts_per_step, config.seed)
        self._generator = torch.Generator(learner.device).manual_seed(config.seed)
        self.seconds = 0.0

    def batch(self, step: int) -> Batch:
        questions = self._prompts.at(step)
        groups = self._groups(step, questions, self._config.rollout.attempts_per_prompt)
        return as_batch(step, groups, self._config, self._tokens, {}, self._prompts.cursor_after(step))

    def evaluate(self, version: int) -> Evaluation:
        groups = self._groups(version, self._task.eval_questions(), self._config.evaluation.attempts)
        rewards = [verdict.reward for group in groups for verdict in group.verdicts]
        return Evaluation(version, {"eval/accuracy": sum(rewards) / len(rewards)})

    def published(self, version: int) -> None:
        pass

    def _groups(self, step: int, questions: Sequence[Question], attempts: int) -> list[Group]:
        began = time.perf_counter()
        prompts = [self._tokens.prompt_ids(question.messages) for question in questions for _ in range(attempts)]
        found = self._sampled(prompts, self._config.rollout.max_new_tokens)
        groups = []
        for slot, question in enumerate(questions):
            mine = []
            for i in range(slot * attempts, (slot + 1) * attempts):
                ids, log_probs = found[i]
                finish = "stop" if ids[-1] == self._tokens.eos_id else "length"
                mine.append(Attempt(prompts[i], ids, log_probs, self._tokens.text(ids), finish, step))
            verdicts = tuple(self._task.verify(question, attempt.text) for attempt in mine)
            groups.append(Group(step, slot, question, tuple(mine), verdicts))
        self.seconds += time.perf_counter() - began
        return groups

    def _sampled(
        self, prompts: Sequence[tuple[int, ...]], most: int
    ) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
        ids: list[list[int]] = [[] for _ in prompts]
        log_probs: list[list[float]] = [[] for _ in prompts]
        open_, head = list(range(len(prompts))), self._learner._head()

        def draw(micro_batch: MicroBatch, hidden_NH: Tensor) -> tuple[list[int], list[float]]:
            last = torch.tensor(micro_batch.response_lengths, device=hidden_NH.device).cumsum(0) - 1
            log_p = head.logits(hidden_NH[last]).float().log_softmax(1)
            drawn = torch.multinomial(log_p.exp(), 1, generator=self._generator)
            return drawn[:, 0].tolist(), log_p.gather(1, drawn)[:, 0].tolist()

        for _ in range(most):
            # The last token of each response stands for the one that is drawn: its row predicts it.
            row = batching.pack([(i, prompts[i], (*ids[i], 0)) for i in open_], self._learner.device, self._learner.row)
            ((drawn, found),) = score(self._learner.model, [row], draw)
            for i, token, log_prob in zip(open_, drawn, found, strict=True):
                ids[i].append(token)
                log_probs[i].append(log_prob)
            open_ = [i for i in open_ if ids[i][-1] != self._tokens.eos_id]
            if not open_:
                break
        return [(tuple(a), tuple(b)) for a, b in zip(ids, log_probs, strict=True)]


class _NoCheckpoints:
    def save_if_due(self, cursor: int) -> dict[str, float]:
        return {}

    def finish(self) -> None:
        pass


class _Rows:
    def __init__(self) -> None:
        self.rows: list[Mapping[str, float]] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.rows.append(metrics)


def learned(name: str, config: Config) -> list[Finding]:
    """The recipe to its end, sampled by the trainer's own model."""
    learner, rows = Learner(config, groups_of_one()), _Rows()
    source, began = TrainerSamples(config, learner), time.perf_counter()
    train(config, source, learner, NoEngines(), _NoCheckpoints(), rows, Phases())
    scores = [row["eval/accuracy"] for row in rows.rows if "eval/accuracy" in row]
    steps = [row for row in rows.rows if "time/train" in row]
    seconds = time.perf_counter() - began
    mismatch = [row[key] for row in steps[-4:] for key in row if key == "loss/mismatch"]
    return [
        Finding(f"minipipe {name}: held-out accuracy before", scores[0]),
        at_least(f"minipipe {name}: after {len(steps)} batches", scores[-1], 0.95),
        Finding(f"minipipe {name}: seconds, of which sampling", f"{seconds:.1f}, {source.seconds:.1f}"),
        Finding(f"minipipe {name}: seconds of train() a batch", statistics.median(r["time/train"] for r in steps)),
        *([Finding(f"minipipe {name}: engine mismatch", statistics.mean(mismatch))] if mismatch else []),
        *(
            Finding(f"minipipe {name}: {key}", row[key])
            for row in steps[:1]
            for key in ("precision/floor",)
            if key in row
        ),
    ]


def minipipe_plain() -> list[Finding]:
    """In fp32 with the project's own modules, and in bf16 with Transformer Engine's."""
    base = replace(minipipe(), layout=LayoutConfig(tokens_per_micro_batch=4096))
    bf16 = replace(base, model=replace(base.model, dtype="bfloat16"))
    return learned("fp32", base) + learned("bf16", bf16)


def minipipe_fp8() -> list[Finding]:
    """Student and teacher in FP8: tensorwise by Transformer Engine; blockwise emulated, as its widths fit no block."""
    base = replace(minipipe(), layout=LayoutConfig(tokens_per_micro_batch=4096))
    bf16 = replace(base, model=replace(base.model, dtype="bfloat16"))
    tensorwise = replace(bf16, fp8=Fp8Config(student="tensorwise", teacher="tensorwise"))
    emulated = replace(bf16, fp8=Fp8Config(student="emulated", teacher="emulated"))
    return learned("tensorwise", tensorwise) + learned("emulated", emulated)


def checkpoints() -> list[Finding]:
    """Saved beside training, loaded into another learner, and both go on alike, to the bit.

    The writer is stopped until the next batch has been trained on: what it reads must be as it was, wherever it lies.
    """
    findings = []
    cases = {
        "fp8 off": (),
        "fp8 blockwise": ("fp8.student=blockwise", "fp8.teacher=blockwise"),
        "teacher in host memory": ("teacher.placement=offloaded",),
    }
    with tempfile.TemporaryDirectory() as name:
        model = write_model(Path(name) / "model", qwen3(**SMALL))
        batches = [draw_batch(SMALL["vocab_size"], mixed_lengths(8, seed=s), seed=s, step=s) for s in range(3)]
        for what, asked in cases.items():
            first = learner_of(model, *asked)
            step_of(first, batches[0])
            step_of(first, batches[1])
            folder = Path(name) / what
            saver = checkpoint.Saver(first, folder, first.config.checkpoint)
            began = time.perf_counter()
            saver.begin(cursor=2)
            stall = time.perf_counter() - began
            with _stopped_writer() as was_writing:
                straight = step_of(first, batches[2])
            saver.poll(wait=True)
            second = learner_of(model, *asked)
            resumed = checkpoint.load_latest(second, folder)
            again = step_of(second, batches[2])
            same = straight[0]["loss/total"] == again[0]["loss/total"]
            same = same and torch.equal(joined(straight[2]), joined(again[2]))
            findings += [
                Finding(f"{what}: stall of a save, s", stall),
                holds(f"{what}: its writer waited while a batch was trained on", was_writing),
                holds(f"{what}: found at step 2", resumed is not None and resumed.step == 2),
                holds(f"{what}: goes on to the bit", same),
            ]
    return findings


@contextmanager
def _stopped_writer() -> Iterator[bool]:
    """Whether there was one that had not finished; it goes on afterwards."""
    writers = multiprocessing.active_children()
    for writer in writers:
        os.kill(writer.pid or 0, signal.SIGSTOP)
    try:
        yield bool(writers)
    finally:
        for writer in writers:
            os.kill(writer.pid or 0, signal.SIGCONT)


def memory() -> list[Finding]:
    """What stands between the passes, and the peak of each, beside the planner's, within 10 %."""
    findings = []
    sizes = {
        "hidden_size": 2048,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 6144,
        "vocab_size": 32_000,
        "max_position_embeddings": 4096,
    }
    batch = draw_batch(sizes["vocab_size"], [(1, 4095, 1)] * 4)
    lengths = (  # those of the batch: the planner reads them
        *("layout.tokens_per_micro_batch=4096", "rollout.prompts_per_step=1", "rollout.attempts_per_prompt=4"),
        *("rollout.max_new_tokens=4095", "teacher_context.max_prompt_tokens=1"),
    )
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        model = write_model(Path(name) / "model", qwen3(**sizes))
        for what, overrides in (
            ("bf16", ()),
            ("bf16, full recompute", ("layout.recompute=full",)),
            ("blockwise", ("fp8.student=blockwise", "fp8.teacher=blockwise")),
        ):
            findings += _peaks(what, learner_of(model, *overrides, *lengths), batch)
            gc.collect()  # a learner is a ring of references
            torch.cuda.empty_cache()
    return findings


def _peaks(what: str, learner: Learner, batch: Batch) -> list[Finding]:
    """Of the second batch: the optimizer's moments are there from the first step on."""
    planned, gib, found = rank_memory(learner.config, learner.hf_config, 0), 2**30, {}
    student = learner.score_student(batch)
    teacher = learner.score_teacher(batch, student)
    learner.train(batch, student, teacher)
    gc.collect()
    torch.cuda.synchronize()
    stands = torch.cuda.memory_allocated()
    micro_batches, on_hidden = learner._passes(batch, range(len(batch.samples)), student, teacher)
    kept = []

    def watched(micro_batch: MicroBatch, hidden_NH: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        kept.append(torch.cuda.memory_allocated() - stands)
        return on_hidden(micro_batch, hidden_NH)

    passes = {
        "score_student": lambda: learner.score_student(batch),
        "score_teacher": lambda: learner.score_teacher(batch, student),
        "forward and backward": lambda: learner._accumulate(micro_batches, watched),
        "optimizer": lambda: optim.step(learner.optimizer, optim.gradient_norm(learner.optimizer)),
        "train": lambda: learner.train(batch, student, teacher),
    }
    for name, run in passes.items():
        found[name] = peak_bytes(run, DEVICE)
    shown = ", ".join(f"{name} {size / gib:.2f}" for name, size in found.items())
    parts = ", ".join(f"{field.name} {getattr(planned, field.name) / gib:.2f}" for field in fields(planned))
    peak, trains = stands + max(found.values()), stands + found["train"]
    standing, training = planned.standing + planned.scores, planned.standing + planned.scores + planned.training
    return [
        Finding(f"{what}: GiB beyond what stands, by pass", shown),
        Finding(
            f"{what}: GiB kept when the loss begins, planned", f"{max(kept) / gib:.2f}, {planned.activations / gib:.2f}"
        ),
        Finding(f"{what}: planned, GiB", parts),
        Finding(f"{what}: GiB that stand, planned", f"{stands / gib:.2f}, {standing / gib:.2f}"),
        Finding(f"{what}: GiB at the peak of train, planned", f"{trains / gib:.2f}, {training / gib:.2f}"),
        Finding(f"{what}: GiB at the peak of all passes, planned", f"{peak / gib:.2f}, {planned.total / gib:.2f}"),
        at_most(f"{what}: train, planned from peak, relative", abs(training / trains - 1), 0.1),
        at_most(f"{what}: all passes, planned from peak, relative", abs(planned.total / peak - 1), 0.1),
    ]
