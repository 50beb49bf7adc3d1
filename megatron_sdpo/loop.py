"""SDPO on one page.

::

    coordinator, make_batch                          trainer ranks, train
    ─────────────────────────────────────            ─────────────────────────────────────────────
    prompts                                          student forward: old log-probs, top-K support
      │  attempts by the engines (weights v)           │  teacher forward at that support:
      │  verdicts: reward and words                    │    the same model's EMA, reading feedback
      │  journalled, then                              │  training passes: divergence, AdamW
      │  teacher contexts: a sibling's success,        │  EMA teacher follows
      ▼    or else the feedback                        ▼
    batch v ───────────────────────────────────────► weights v + 1 ──► engines (published, checked)

The two functions run in different processes; ``batch v`` crosses between them (rollout/wire.py). With
``rollout.max_staleness`` n the coordinator may be n batches ahead, with 0 the two take turns.
GRPO and plain next-token training are the same loop: their learner has less to score.
"""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_sdpo.chat import Chat
from megatron_sdpo.config import Config
from megatron_sdpo.phases import Phases
from megatron_sdpo.rollout.journal import Journal, JournalError
from megatron_sdpo.rollout.prompts import PromptStream
from megatron_sdpo.rollout.sampler import Asked, Sampler
from megatron_sdpo.teacher_context import build_contexts
from megatron_sdpo.types import Batch, BatchSource, Checkpoints, Group, MetricsLog, Question, Sample, WeightsPublisher

if TYPE_CHECKING:  # the coordinator runs make_batch without torch
    from megatron_sdpo.mcore.learner import Learner


async def make_batch(
    step: int, config: Config, prompts: PromptStream, sampler: Sampler, journal: Journal, tokens: Chat
) -> Batch:
    """Attempts at the step's questions, judged, journalled, and given a teacher context each."""
    asked = [
        Asked(step, slot, question, config.rollout.attempts_per_prompt, config.rollout.temperature)
        for slot, question in enumerate(prompts.at(step))
    ]
    groups, seconds = await journalled(step, asked, sampler, journal)
    return as_batch(step, groups, config, tokens, seconds, prompts.cursor_after(step))


async def journalled(
    step: int, asked: Sequence[Asked], sampler: Sampler, journal: Journal
) -> tuple[list[Group], dict[str, float]]:
    """The groups asked for, one a slot from 0, all on disk; and the seconds that sampling took."""
    groups = journal.groups(step)  # finished before an interruption: used, never sampled again
    _check_same_questions(groups, [ask.question for ask in asked])
    sampled, seconds = await sampler.groups([a for a in asked if a.slot not in groups], finished=journal.append)
    groups |= {group.slot: group for group in sampled}
    return [groups[ask.slot] for ask in asked], seconds


def as_batch(
    step: int, groups: Sequence[Group], config: Config, tokens: Chat, seconds: dict[str, float], cursor: int
) -> Batch:
    """Every attempt with its teacher context, and what was measured of them all."""
    samples: list[Sample] = []
    counts: Counter[str] = Counter()
    for group in groups:
        contexts, counted = build_contexts(group, config.teacher_context, tokens, config.seed)
        counts.update(counted)
        for index, (attempt, verdict, context) in enumerate(zip(group.attempts, group.verdicts, contexts, strict=True)):
            samples.append(
                Sample(
                    id=f"{step}/{group.slot}/{index}",
                    group=group.slot,
                    prompt_ids=attempt.prompt_ids,
                    response_ids=attempt.response_ids,
                    engine_log_probs=attempt.engine_log_probs,
                    teacher_prompt_ids=context.prompt_ids,
                    reward=verdict.reward,
                )
            )
    shares = {key: count / len(samples) for key, count in counts.items()}
    return Batch(step, tuple(samples), {**_rollout_metrics(step, groups), **shares, **seconds}, cursor)


def train(
    config: Config,
    source: BatchSource,
    learner: "Learner",
    publisher: WeightsPublisher,
    checkpoints: Checkpoints,
    metrics_log: MetricsLog,
    phases: Phases,
) -> None:
    """Every trainer rank runs this, in step with the others, from ``learner.step`` to ``config.steps``."""
    with phases("sync"):
        publisher.publish(learner.step)  # the engines never sample from unknown weights
        source.published(learner.step)
    if learner.step == 0 and (evaluated := _evaluate(config, source, learner)):
        metrics_log.log(0, evaluated)
    seconds: dict[str, float] = {}
    while learner.step < config.steps:
        phases.step = learner.step
        with phases("step"):
            with phases("wait"):
                batch = source.batch(learner.step)
                publisher.release()  # engines on the trainer's own GPUs make room
            with phases("score_student"):
                student = learner.score_student(batch)
            with phases("score_teacher"):
                teacher = learner.score_teacher(batch, student)
            with phases("train"):
                stats = learner.train(batch, student, teacher)
                learner.update_teacher()
            with phases("sync"):
                synced = publisher.publish(learner.step)
                source.published(learner.step)
        evaluated = _evaluate(config, source, learner)
        seconds |= phases.taken()
        costs = learner.performance(batch, seconds)
        metrics_log.log(learner.step, {**batch.metrics, **stats, **synced, **evaluated, **costs, **seconds})
        with phases("checkpoint"):  # after the row: a resumed run has the row of every step that it skips
            written = checkpoints.save_if_due(batch.cursor)
        seconds = {**phases.taken(), **written}
    with phases("checkpoint"):
        checkpoints.finish()


def _evaluate(config: Config, source: BatchSource, learner: "Learner") -> dict[str, float]:
    """Held-out scores of the current version, where they are due."""
    every, version = config.evaluation.every, learner.step
    if every == 0 or (version % every != 0 and version != config.steps):
        return {}
    metrics = source.evaluate(version).metrics
    learner.evaluated(metrics["eval/accuracy"])
    return metrics


def _check_same_questions(groups: dict[int, Group], questions_P: Sequence[Question]) -> None:
    for slot, group in groups.items():
        asked = questions_P[slot] if 0 <= slot < len(questions_P) else None
        if asked is None or (group.question.id, group.question.messages) != (asked.id, asked.messages):
            raise JournalError(
                f"the journal of step {group.step} answers {group.question.id!r} at slot {slot}, which this run does"
                " not ask; the run directory belongs to another task, seed or batch size, use a new one"
            )


def _rollout_metrics(step: int, groups: Sequence[Group]) -> dict[str, float]:
    attempts = [attempt for group in groups for attempt in group.attempts]
    rewards = [[verdict.reward for verdict in group.verdicts] for group in groups]
    return {
        "rollout/response_tokens": sum(len(a.response_ids) for a in attempts) / len(attempts),
        "rollout/cut_share": sum(a.finish == "length" for a in attempts) / len(attempts),
        "rollout/staleness": sum(step - a.weight_version for a in attempts) / len(attempts),
        "verdict/reward": sum(map(sum, rewards)) / len(attempts),
        "verdict/solved_questions": sum(max(r) > 0 for r in rewards) / len(groups),
    }
