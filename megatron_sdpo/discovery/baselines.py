"""What SDPO is compared with, by the same engines, verifier and journal, and without training.

best_of_k asks the plain question again and again; multi_turn puts the feedback on its latest attempts into the prompt.
"""

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from megatron_sdpo.chat import Chat
from megatron_sdpo.config import Config
from megatron_sdpo.discovery.record import Exchange, Trial, TrialId, memory_of
from megatron_sdpo.rollout.journal import Journal, JournalError
from megatron_sdpo.rollout.prompts import ENGINE_RESERVE
from megatron_sdpo.rollout.sampler import Asked, Sampler
from megatron_sdpo.teacher_context import contextual
from megatron_sdpo.types import Group, Question, Tokens

FAILURES_SHOWN = 3
"""Failed attempts that a trial's record keeps before the discovering one."""


class Memory:
    """The feedbacks that the next turn reads: at most ``most`` of the latest, fewer when the prompt would be too long.

    What was forgotten once stays forgotten, oldest first; ``forgotten_for_length`` counts those that ``most`` had
    room for.
    """

    def __init__(self, question: Question, most: int, config: Config, tokens: Tokens) -> None:
        self._question, self._most, self._config, self._tokens = question, most, config.teacher_context, tokens
        room = config.model.max_length - config.rollout.max_new_tokens - ENGINE_RESERVE
        self._longest = min(config.teacher_context.max_prompt_tokens, room)
        self._feedbacks: deque[str] = deque()
        self.forgotten_for_length = 0

    def add(self, feedback: str) -> None:
        """A verifier that said nothing leaves nothing to remember."""
        if not feedback.strip():
            return
        self._feedbacks.append(feedback)
        if len(self._feedbacks) > self._most:
            self._feedbacks.popleft()
        while self._feedbacks and len(self._tokens.prompt_ids(self.asked().messages)) > self._longest:
            self._feedbacks.popleft()
            self.forgotten_for_length += 1

    def asked(self) -> Question:
        """The question as the next turn asks it: plain as long as there is nothing to remember."""
        if not self._feedbacks:
            return self._question
        return replace(self._question, messages=contextual(self._question, self._config, feedbacks=self._feedbacks))


@dataclass(frozen=True, slots=True)
class Baselines:
    """The parts that both baselines use. ``turns`` bounds what is in flight."""

    config: Config
    sampler: Sampler
    tokens: Chat
    turns: asyncio.Semaphore

    async def best_of_k(self, id: TrialId, question: Question, journal: Journal) -> Trial:
        """All attempts, whatever they find: the estimator wants the number of successes among them."""
        size, samples = self.config.rollout.attempts_per_prompt, self.config.discovery.best_of_k_samples
        finished = journal.groups(id.question)

        async def chunk(slot: int, first: int) -> Group:
            return await self._group(finished, slot, question, min(size, samples - first), id.question, journal)

        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(chunk(*place)) for place in enumerate(range(0, samples, size))]
        return as_trial(id, question, [task.result() for task in running], self.config)

    async def multi_turn(self, id: TrialId, question: Question, journal: Journal, number: int) -> Trial:
        """One attempt after the other until the first success; ``number`` is the trial's place in its journal."""
        finished = journal.groups(number)
        memory = Memory(question, memory_of(id), self.config, self.tokens)
        groups: list[Group] = []
        solved = False
        while not solved and len(groups) < self.config.discovery.budget:
            group = await self._group(finished, len(groups), memory.asked(), 1, number, journal)
            groups.append(group)
            memory.add(group.verdicts[0].feedback)
            solved = group.verdicts[0].reward >= self.config.teacher_context.success_threshold
        forgotten = {"multi_turn/forgotten_for_length": float(memory.forgotten_for_length)}
        return as_trial(id, question, groups, self.config, steps=(forgotten,))

    async def _group(
        self, finished: dict[int, Group], slot: int, question: Question, attempts: int, step: int, journal: Journal
    ) -> Group:
        """From the journal, or sampled and journalled."""
        if slot in finished:
            found = finished[slot]
            if (found.question, len(found.attempts)) != (question, attempts):
                raise JournalError(
                    f"the journal of trial {step} answers another prompt at place {slot} than {question.id!r} asks;"
                    " the run directory belongs to another task or configuration, use a new one"
                )
            return found
        async with self.turns:
            asked = Asked(step, slot, question, attempts, self.config.rollout.temperature)
            (group,), _ = await self.sampler.groups([asked], finished=journal.append)
            return group


def as_trial(
    id: TrialId, question: Question, groups: Sequence[Group], config: Config, steps: Iterable[dict[str, float]] = ()
) -> Trial:
    """What a trial's groups say, in the order in which they were made."""
    made = [
        Exchange(attempt.text, verdict.reward, verdict.feedback)
        for group in groups
        for attempt, verdict in zip(group.attempts, group.verdicts, strict=True)
    ]
    threshold = config.teacher_context.success_threshold
    successes = [place for place, exchange in enumerate(made) if exchange.reward >= threshold]
    first = successes[0] if successes else None
    path = () if first is None else tuple(made[max(0, first - FAILURES_SHOWN) : first + 1])
    number = None if first is None else first + 1
    return Trial(id, question, len(made), len(successes), number, path, tuple(steps))


def in_flight(config: Config) -> asyncio.Semaphore:
    """As many groups at once as keep the engines busy."""
    running = config.engine.count * config.engine.max_running_requests
    return asyncio.Semaphore(max(1, running // config.rollout.attempts_per_prompt))
