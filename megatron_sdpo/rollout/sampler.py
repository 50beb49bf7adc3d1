"""Question -> attempts -> verdicts: one group, and many at once."""

import asyncio
import hashlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from megatron_sdpo.rollout.client import EngineClient
from megatron_sdpo.types import Attempt, Group, Question, Task, Tokens, Verdict


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked for. Example: ``Asked(step=4, slot=0, question=q, attempts=8, temperature=1.0)``"""

    step: int
    slot: int
    question: Question
    attempts: int
    temperature: float
    purpose: Literal["train", "evaluate"] = "train"
    top_p: float = 1.0

    def seed(self, seed: int, attempt: int) -> int:
        """From 0 to 2**63 - 1: of one attempt in a run of that seed; another for every attempt of the run."""
        place = f"{seed}/{self.purpose}/{self.step}/{self.slot}/{attempt}"
        return int.from_bytes(hashlib.blake2b(place.encode(), digest_size=8).digest(), "little") >> 1


class VerifierError(RuntimeError):
    """The task's verifier raised, or its verdict is none; the message names the question."""


class Sampler:
    """Attempts by the engines, judged by the task's verifier in ``verify_workers`` threads.

    ``max_new_tokens`` bounds a response. With a ``seed``, engines that listen to seeds give the same attempts each
    time (``Asked.seed``). A verifier that raises, or returns no reward in [0, 1],
    raises VerifierError: silence would be a reward of zero.
    """

    def __init__(
        self,
        client: EngineClient,
        tokens: Tokens,
        task: Task,
        max_new_tokens: int,
        verify_workers: int,
        seed: int | None = None,
    ) -> None:
        self._client, self._tokens, self._task, self._seed = client, tokens, task, seed
        self._max_new_tokens = max_new_tokens
        self._verifiers = ThreadPoolExecutor(verify_workers, thread_name_prefix="verify")

    async def groups(
        self, asked: Sequence[Asked], finished: Callable[[Group], None] = lambda group: None
    ) -> tuple[list[Group], dict[str, float]]:
        """All groups in the order asked, and ``time/generate``, ``time/verify`` in seconds.

        Everything is in flight at once; ``finished`` is called with each group as it gets ready. Generation ends
        with the last response; what verification takes beyond that is its time.
        """
        if not asked:
            return [], {"time/generate": 0.0, "time/verify": 0.0}
        began = time.perf_counter()
        generated_at: list[float] = []

        async def one(ask: Asked) -> Group:
            group = await self._group(ask, lambda: generated_at.append(time.perf_counter()))
            finished(group)
            return group

        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(one(ask)) for ask in asked]
        ended = time.perf_counter()
        return [task.result() for task in running], {
            "time/generate": max(generated_at) - began,
            "time/verify": ended - max(generated_at),
        }

    async def _group(self, ask: Asked, generated: Callable[[], None]) -> Group:
        """``generated`` is called when the attempts are there, and not yet judged."""
        attempts = await self._attempts(ask)
        generated()
        return Group(ask.step, ask.slot, ask.question, attempts, await self._verdicts(ask.question, attempts))

    async def _attempts(self, ask: Asked) -> tuple[Attempt, ...]:
        prompt_ids = self._tokens.prompt_ids(ask.question.messages)
        seeds = None if self._seed is None else [ask.seed(self._seed, i) for i in range(ask.attempts)]
        generated = await self._client.generate(
            prompt_ids,
            n=ask.attempts,
            max_new_tokens=self._max_new_tokens,
            temperature=ask.temperature,
            top_p=ask.top_p,
            seeds=seeds,
        )
        return tuple(
            Attempt(
                prompt_ids=prompt_ids,
                response_ids=g.response_ids,
                engine_log_probs=g.log_probs,
                text=self._tokens.text(g.response_ids),
                finish=g.finish,
                weight_version=g.weight_version,
            )
            for g in generated
        )

    async def _verdicts(self, question: Question, attempts: Sequence[Attempt]) -> tuple[Verdict, ...]:
        loop = asyncio.get_running_loop()
        judged = [loop.run_in_executor(self._verifiers, self._judge, question, a.text) for a in attempts]
        return tuple(await asyncio.gather(*judged))

    def _judge(self, question: Question, response: str) -> Verdict:
        try:
            verdict = self._task.verify(question, response)
        except Exception as error:  # a user's verifier may fail in any way; the cause stays attached
            raise VerifierError(f"the verifier failed on an answer to question {question.id!r}: {error!r}") from error
        if not (isinstance(verdict, Verdict) and 0.0 <= verdict.reward <= 1.0):
            raise VerifierError(f"the verifier gave {verdict!r} for question {question.id!r}; a reward lies in [0, 1]")
        return verdict
