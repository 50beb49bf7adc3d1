"""Many questions at once: order, readiness, and failures that end the run instead of becoming rewards."""

import asyncio
import math
import time
from collections.abc import Callable, Sequence

import pytest
from aiohttp import web

from megatron_sdpo.chat import Chat
from megatron_sdpo.config import EvaluationConfig
from megatron_sdpo.evaluate import evaluate
from megatron_sdpo.rollout.client import EngineClient
from megatron_sdpo.rollout.control import EngineError
from megatron_sdpo.rollout.sampler import Asked, Sampler, VerifierError
from megatron_sdpo.types import Group, Message, Question, Verdict
from recipes.minipipe import BASE_MODEL
from tests.fake_engine import EOS_ID, FakeEngine, Ids

CHAT = Chat(BASE_MODEL)
QUESTIONS = [Question(f"q{i}", (Message("user", f"keep over {i}"),)) for i in range(4)]
PROMPTS = [CHAT.prompt_ids(question.messages) for question in QUESTIONS]


class Judge:
    """A task of QUESTIONS; rewards the first attempt."""

    def __init__(self, verify: Callable[[Question, str], Verdict] | None = None) -> None:
        self._verify = verify

    def train_questions(self) -> Sequence[Question]:
        return QUESTIONS

    def eval_questions(self) -> Sequence[Question]:
        return QUESTIONS

    def verify(self, question: Question, response: str) -> Verdict:
        if self._verify is not None:
            return self._verify(question, response)
        return Verdict(float(response == "sort"), f"{question.id}: {response}")


def respond(prompt_ids: Ids, i: int) -> Sequence[int]:
    """The first response ends its turn, the others are cut."""
    return (*CHAT.encode("sort"), EOS_ID) if i == 0 else CHAT.encode("sort item")


async def sampled(
    engine: FakeEngine, task: Judge, questions: int, finished: Callable[[Group], None] = lambda group: None
) -> tuple[list[Group], dict[str, float]]:
    async with engine, EngineClient([engine.address], "token", timeout_s=30) as client:
        sampler = Sampler(client, CHAT, task, max_new_tokens=8, verify_workers=2)
        asked = [Asked(4, slot, QUESTIONS[slot], attempts=2, temperature=1.0) for slot in range(questions)]
        return await sampler.groups(asked, finished)


def test_attempts_and_verdicts_belong_together() -> None:
    engine = FakeEngine(respond)
    engine.version = 3
    groups, _ = asyncio.run(sampled(engine, Judge(), 4))
    for slot, group in enumerate(groups):
        assert (group.step, group.slot, group.question) == (4, slot, QUESTIONS[slot])
        assert [a.prompt_ids for a in group.attempts] == [PROMPTS[slot]] * 2
        assert [a.text for a in group.attempts] == ["sort", "sort item"]
        assert [a.finish for a in group.attempts] == ["stop", "length"]
        assert [a.response_ids for a in group.attempts] == [respond(PROMPTS[slot], i) for i in range(2)]
        assert [len(a.engine_log_probs) for a in group.attempts] == [2, 2]
        assert {a.weight_version for a in group.attempts} == {3}
        assert group.verdicts == (Verdict(1.0, f"q{slot}: sort"), Verdict(0.0, f"q{slot}: sort item"))


def test_an_evaluation_samples_as_it_is_told_to() -> None:
    engine = FakeEngine(respond)

    async def run() -> None:
        async with engine, EngineClient([engine.address], "token", timeout_s=30) as client:
            sampler = Sampler(client, CHAT, Judge(), max_new_tokens=8, verify_workers=2)
            await evaluate(sampler, QUESTIONS, EvaluationConfig(attempts=2, temperature=0.6, top_p=0.95), version=3)
            await sampler.groups([Asked(4, 0, QUESTIONS[0], attempts=2, temperature=1.0)])
            first: list[Group] = []
            await evaluate(sampler, QUESTIONS, EvaluationConfig(attempts=1, questions=1), 3, first.append)
            assert [group.question for group in first] == [QUESTIONS[0]]

    asyncio.run(run())
    assert [(s["temperature"], s["top_p"]) for s in engine.sampling] == [(0.6, 0.95)] * 4 + [(1.0, 1.0)] * 2


def test_every_attempt_of_a_seeded_run_has_a_seed_of_its_own() -> None:
    asked = [
        Asked(step, slot, QUESTIONS[slot], 2, 1.0, purpose)
        for purpose in ("train", "evaluate")
        for step in (3, 4)
        for slot in range(4)
    ]
    expected = {ask.seed(7, attempt) for ask in asked for attempt in range(2)}
    assert len(expected) == 32 and min(expected) >= 0 and max(expected) < 2**63
    assert expected.isdisjoint(ask.seed(8, attempt) for ask in asked for attempt in range(2))
    assert asked[0].seed(7, 0) == 7128182494432539630  # the same on every machine, for good

    async def run(seed: int | None) -> list[int | None]:
        engine = FakeEngine(respond)
        async with engine, EngineClient([engine.address], "token", timeout_s=30) as client:
            await Sampler(client, CHAT, Judge(), 8, 1, seed).groups(asked)
        return engine.seeds

    assert sorted(map(int, filter(None, asyncio.run(run(7))))) == sorted(expected)
    assert asyncio.run(run(None)) == [None] * 16


def test_groups_are_reported_when_ready_and_returned_as_asked() -> None:
    """Each answer waits for the group after it to be finished, so they get ready from the last to the first."""

    async def run() -> tuple[list[int], list[int]]:
        done = [asyncio.Event() for _ in range(5)]
        done[4].set()
        ready: list[int] = []

        async def before(prompt_ids: Ids) -> None:
            await done[PROMPTS.index(prompt_ids) + 1].wait()

        def finished(group: Group) -> None:
            ready.append(group.slot)
            done[group.slot].set()

        engine = FakeEngine(respond)
        engine.before = before
        groups, _ = await sampled(engine, Judge(), 4, finished)
        return ready, [group.slot for group in groups]

    assert asyncio.run(run()) == ([3, 2, 1, 0], [0, 1, 2, 3])


@pytest.mark.parametrize("refusal", [web.HTTPBadRequest, web.HTTPInternalServerError])
def test_an_engine_error_ends_it_all(refusal: type[web.HTTPException]) -> None:
    """One refusal is enough: the other requests would never be answered."""

    async def before(prompt_ids: Ids) -> None:
        if prompt_ids == PROMPTS[2]:
            raise refusal(text='{"error": {"message": "out of memory"}}', content_type="application/json")
        await asyncio.Event().wait()

    engine, ready = FakeEngine(respond), []
    engine.before = before
    with pytest.raises(ExceptionGroup) as error:
        asyncio.run(sampled(engine, Judge(), 4, ready.append))
    (cause,) = error.value.exceptions
    assert isinstance(cause, EngineError)
    assert str(cause) == "fake /generate: out of memory"
    assert ready == []


@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf, None, 0.01, "-1"])
def test_what_is_no_log_prob_is_refused(value: object) -> None:
    """Null is how an engine's JSON may spell NaN."""
    engine = FakeEngine(respond)
    engine.log_prob = lambda place: value if place == 1 else -0.5
    with pytest.raises(ExceptionGroup) as error:
        asyncio.run(sampled(engine, Judge(), 1))
    (cause,) = error.value.exceptions
    words = "fake /generate: response token 1 of 2 has log-prob"
    assert isinstance(cause, EngineError) and str(cause) == f"{words} {value}, which is no log-probability"


def test_a_log_prob_may_be_rounded_above_zero() -> None:
    engine = FakeEngine(respond)
    engine.log_prob = lambda place: 1e-7
    (group,), _ = asyncio.run(sampled(engine, Judge(), 1))
    assert group.attempts[0].engine_log_probs == (1e-7, 1e-7)


def test_a_slow_engine_is_given_up() -> None:
    async def run() -> None:
        async def before(prompt_ids: Ids) -> None:
            await asyncio.Event().wait()

        engine = FakeEngine(respond)
        engine.before = before
        async with engine, EngineClient([engine.address], "token", timeout_s=0.2) as client:
            sampler = Sampler(client, CHAT, Judge(), 8, 1)
            await sampler.groups([Asked(0, 0, QUESTIONS[0], 1, 1.0)])

    with pytest.raises(ExceptionGroup) as error:
        asyncio.run(run())
    assert "no answer" in str(error.value.exceptions[0])


def test_a_verifier_that_raises_is_not_a_reward_of_zero() -> None:
    def verify(question: Question, response: str) -> Verdict:
        if question.id == "q1":
            raise LookupError("no such table")
        return Verdict(1.0)

    ready: list[Group] = []
    with pytest.raises(ExceptionGroup) as error:
        asyncio.run(sampled(FakeEngine(respond), Judge(verify), 2, ready.append))
    (cause,) = error.value.exceptions
    assert isinstance(cause, VerifierError)
    assert "question 'q1'" in str(cause) and "no such table" in str(cause)
    assert isinstance(cause.__cause__, LookupError)
    assert "q1" not in [group.question.id for group in ready]


@pytest.mark.parametrize("verdict", [Verdict(float("nan")), Verdict(1.5), Verdict(-0.1), 1.0, None])
def test_a_verdict_out_of_range_is_refused(verdict: Verdict) -> None:
    with pytest.raises(ExceptionGroup) as error:
        asyncio.run(sampled(FakeEngine(respond), Judge(lambda question, response: verdict), 1))
    assert isinstance(error.value.exceptions[0], VerifierError)


def test_times_of_generation_and_of_what_verification_takes_beyond_it() -> None:
    def verify(question: Question, response: str) -> Verdict:
        time.sleep(0.1)
        return Verdict(0.0)

    async def before(prompt_ids: Ids) -> None:
        await asyncio.sleep(0.05)

    engine = FakeEngine(respond)
    engine.before = before
    _, seconds = asyncio.run(sampled(engine, Judge(verify), 1))
    assert seconds.keys() == {"time/generate", "time/verify"}
    assert seconds["time/generate"] >= 0.05
    assert seconds["time/verify"] >= 0.1


def test_nothing_asked_is_nothing_done() -> None:
    engine = FakeEngine(respond)
    assert asyncio.run(sampled(engine, Judge(), 0)) == ([], {"time/generate": 0.0, "time/verify": 0.0})
    assert engine.asked == []
