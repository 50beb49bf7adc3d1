"""Test-time self-distillation on one page: one hard question, trained on its own attempts until one succeeds.

::

    coordinator, Trials                              trainer ranks, discover
    ─────────────────────────────────────            ─────────────────────────────────────────────
    baselines, all at once  ◄─────────────────────── base weights, published as version 0
    next trial  ───────────────────────────────────► back to the base: weights, optimizer, teacher
      G attempts by version v, journalled  ◄──────── published as version v
      one succeeds, or the budget is spent: end
      else contexts: the feedback alone, as there
      is no success to demonstrate ────────────────► scores, training passes, teacher: version v + 1

A trial is a question and a seed. Versions increase over the whole run: trial i owns those from ``first_version``.
A trial that was interrupted starts from the base again and is trained on its journalled attempts, which are not
sampled again, so it comes to where it was.
(Paper section 5; discovery@k is in statistics.py, what SDPO is compared with in baselines.py.)
"""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from megatron_sdpo.chat import Chat
from megatron_sdpo.config import Config
from megatron_sdpo.discovery.baselines import Baselines, as_trial, in_flight
from megatron_sdpo.discovery.record import BEST_OF_K, SDPO, Trial, TrialFiles, TrialId, planned
from megatron_sdpo.loop import as_batch, journalled
from megatron_sdpo.phases import Phases
from megatron_sdpo.rollout.journal import Journal
from megatron_sdpo.rollout.sampler import Asked, Sampler
from megatron_sdpo.types import Batch, Group, Question

if TYPE_CHECKING:  # the coordinator runs without torch
    from megatron_sdpo.mcore.learner import Learner
    from megatron_sdpo.reshard.publish import Publisher

R = TypeVar("R")
BASE_VERSION = 0
PATIENCE_S = 60.0
"""How long the trainer's ranks wait for the baselines before they ask again; no collective may last for ever."""


class TrialSource(Protocol):
    """The trainer's view of the coordinator."""

    def baselines(self) -> bool: ...

    def has_newcomers(self) -> bool:
        """Whether an engine that has taken another's place waits for weights."""
        ...

    def next_trial(self) -> int | None: ...

    def batch(self, version: int) -> Batch | None: ...

    def trained(self, numbers: dict[str, float]) -> None: ...


class Progress(Protocol):
    """Who is told how far the run is (progress.py)."""

    def reached(self, id: TrialId, attempts: int) -> None: ...

    def finished(self, trial: Trial) -> None: ...


def discover(source: TrialSource, learner: "Learner", publisher: "Publisher", phases: Phases) -> None:
    """Every trainer rank runs this, in step with the others, until no trial is left."""
    phases.step = BASE_VERSION
    with phases("sync"):
        publisher.publish(BASE_VERSION)
    while not _waited_for(source.baselines, phases):
        if source.has_newcomers():  # baselines last long, and nothing else is published meanwhile
            with phases("sync"):
                publisher.publish(BASE_VERSION)
    while (version := _waited_for(source.next_trial, phases)) is not None:
        phases.step = version
        with phases("reset"):
            learner.reset()
        with phases("sync"):
            synced = publisher.publish(version)
        phases.taken()
        while (batch := _waited_for(partial(source.batch, version), phases)) is not None:
            with phases("release"):
                publisher.release()
            with phases("score_student"):
                student = learner.score_student(batch)
            with phases("score_teacher"):
                teacher = learner.score_teacher(batch, student)
            with phases("train"):
                stats = learner.train(batch, student, teacher)
                learner.update_teacher()
            source.trained({**synced, **phases.taken(), **stats})
            version += 1
            phases.step = version
            with phases("sync"):
                synced = publisher.publish(version)


def _waited_for(ask: Callable[[], R], phases: Phases) -> R:
    """The coordinator's answer; waiting for it has no bound of its own."""
    with phases("wait"):
        return ask()


def first_version(number: int, config: Config) -> int:
    """Of the trial with this number (from 0); ``config.steps`` versions are a trial's own."""
    return BASE_VERSION + 1 + number * config.steps


class Trials:
    """The coordinator: every trial of ``planned``, finished ones left out."""

    def __init__(
        self,
        config: Config,
        questions: Sequence[Question],
        tokens: Chat,
        sampler: Sampler,
        attempts: Path,
        files: TrialFiles,
        progress: Progress,
    ) -> None:
        self._config, self._questions, self._tokens, self._sampler = config, questions, tokens, sampler
        self._attempts, self._files, self._progress = attempts, files, progress
        plan = planned(config, len(questions))
        self._baselines = [id for id in plan if id.method != SDPO]
        self._trained = [id for id in plan if id.method == SDPO]
        self._at_work: asyncio.Task[None] | None = None
        self._id = TrialId(SDPO, -1, -1)
        self._groups: list[Group] = []
        self._steps: list[dict[str, float]] = []

    async def baselines(self, _: object = None) -> bool:
        """Whether all are finished; they begin with the first call, which must find base weights in the engines."""
        if self._at_work is None:
            self._at_work = asyncio.create_task(self._make_baselines())
        done, _ = await asyncio.wait([self._at_work], timeout=PATIENCE_S)
        for task in done:
            task.result()
        return bool(done)

    async def next_trial(self, _: object = None) -> int | None:
        """The first version of the next trial that is not finished, or None."""
        for number, id in enumerate(self._trained):
            if not self._files.has(id):
                self._id, self._groups, self._steps = id, [], []
                return first_version(number, self._config)
        return None

    async def batch(self, version: int) -> Batch | None:
        """The attempts of a version, to be trained on; None when with them the trial has ended."""
        question, rollout = self._questions[self._id.question], self._config.rollout
        asked = Asked(version, 0, question, rollout.attempts_per_prompt, rollout.temperature)
        (group,), seconds = await journalled(version, [asked], self._sampler, self._journal(SDPO))
        self._groups.append(group)
        batch = as_batch(version, [group], self._config, self._tokens, seconds, cursor=0)
        self._steps.append({"version": float(version), **batch.metrics})
        self._progress.reached(self._id, len(self._groups) * rollout.attempts_per_prompt)
        solved = any(v.reward >= self._config.teacher_context.success_threshold for v in group.verdicts)
        if not solved and len(self._groups) < self._config.steps:
            return batch
        self._end(as_trial(self._id, question, self._groups, self._config, self._steps))
        return None

    async def trained(self, numbers: dict[str, float]) -> None:
        """What training on the latest batch gave."""
        self._steps[-1] |= numbers

    async def _make_baselines(self) -> None:
        parts = Baselines(self._config, self._sampler, self._tokens, in_flight(self._config))

        async def one(id: TrialId) -> None:
            question, journal = self._questions[id.question], self._journal(id.method)
            if id.method == BEST_OF_K:
                self._end(await parts.best_of_k(id, question, journal))
            else:
                number = id.seed * len(self._questions) + id.question
                self._end(await parts.multi_turn(id, question, journal, number))

        async with asyncio.TaskGroup() as tasks:
            for id in self._baselines:
                if not self._files.has(id):
                    tasks.create_task(one(id))

    def _end(self, trial: Trial) -> None:
        self._files.save(trial)
        self._progress.finished(trial)

    def _journal(self, method: str) -> Journal:
        return Journal(self._attempts / method)
