"""Batches: when generation may start, what is never sampled twice, and what a batch holds."""

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from aiohttp import web

from megatron_sdpo.chat import Chat
from megatron_sdpo.config import Config, EvaluationConfig, RolloutConfig
from megatron_sdpo.launch.coordinator import Coordinator
from megatron_sdpo.loop import make_batch
from megatron_sdpo.rollout.client import EngineClient
from megatron_sdpo.rollout.journal import Journal, JournalError
from megatron_sdpo.rollout.prompts import PromptStream
from megatron_sdpo.rollout.sampler import Sampler
from megatron_sdpo.tasks.minipipe import MiniPipe
from megatron_sdpo.types import Batch, Question
from recipes.minipipe import minipipe
from tests.fake_engine import EOS_ID, FakeEngine, Ids

TASK = MiniPipe(train_size=6, eval_size=2)
CONFIG = dataclasses.replace(
    minipipe(),
    steps=5,
    rollout=RolloutConfig(prompts_per_step=4, attempts_per_prompt=2, max_new_tokens=24),
    evaluation=EvaluationConfig(attempts=1),
)
CHAT = Chat(CONFIG.model.path)
BY_PROMPT = {CHAT.prompt_ids(q.messages): q for q in (*TASK.train_questions(), *TASK.eval_questions())}


def staleness(steps: int) -> Config:
    return dataclasses.replace(CONFIG, rollout=dataclasses.replace(CONFIG.rollout, max_staleness=steps))


def respond(prompt_ids: Ids, i: int) -> Sequence[int]:
    """The first of two attempts is right at questions of even number, all others are wrong."""
    question = BY_PROMPT[prompt_ids]
    right = i == 0 and int(question.id.split("/")[1]) % 2 == 0
    return (*CHAT.encode(TASK.reference(question) if right else "nonsense"), EOS_ID)


def asked_by(stream: PromptStream, step: int) -> set[Ids]:
    return {CHAT.prompt_ids(question.messages) for question in stream.at(step)}


class Parts:
    """A coordinator with an engine of its own; use it as an asynchronous context manager."""

    def __init__(self, config: Config, journal: Path) -> None:
        self.config = config
        self.engine = FakeEngine(respond)
        self.journal = Journal(journal)
        self.stream = PromptStream(TASK.train_questions(), config.rollout.prompts_per_step, config.seed)

    async def __aenter__(self) -> "Parts":
        await self.engine.__aenter__()
        self.client = EngineClient([self.engine.address], "token", timeout_s=30)
        await self.client.__aenter__()
        self.sampler = Sampler(self.client, CHAT, TASK, self.config.rollout.max_new_tokens, verify_workers=2)
        self.coordinator = Coordinator(self.config, TASK, CHAT, self.sampler, self.journal)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.client.__aexit__(None, None, None)
        await self.engine.__aexit__(None, None, None)

    def trained_on(self) -> list[Ids]:
        """Prompts of training questions, in order of arrival at the engine."""
        return [prompt for prompt in self.engine.asked if BY_PROMPT[prompt].id.startswith("train/")]

    def steps_asked(self) -> list[set[Ids]]:
        size, asked = self.config.rollout.prompts_per_step, self.trained_on()
        return [set(asked[i : i + size]) for i in range(0, len(asked), size)]

    async def settle(self) -> None:
        """Let whatever may start reach the engine: a request made now arrives after it."""
        await self.coordinator.evaluate(0)


def make(journal: Path, config: Config = CONFIG, prepare: Callable[[FakeEngine], None] = lambda engine: None) -> Batch:
    """The batch of step 0, by fresh parts over the journal."""

    async def run() -> Batch:
        async with Parts(config, journal) as parts:
            prepare(parts.engine)
            return await make_batch(0, config, parts.stream, parts.sampler, parts.journal, CHAT)

    return asyncio.run(run())


def test_without_staleness_generation_waits_for_the_weights(tmp_path: Path) -> None:
    async def run() -> None:
        async with Parts(CONFIG, tmp_path) as parts:
            await parts.settle()
            assert parts.trained_on() == []
            for version in range(3):
                parts.engine.version = version
                await parts.coordinator.published(version)
                batch = await parts.coordinator.batch(version)
                assert (batch.step, batch.cursor) == (version, 4 * (version + 1))
                assert batch.metrics["rollout/staleness"] == 0
                await parts.settle()
                assert parts.steps_asked() == [asked_by(parts.stream, step) for step in range(version + 1)]

    asyncio.run(run())


def test_with_staleness_generation_runs_ahead_in_order_and_no_further(tmp_path: Path) -> None:
    async def run() -> None:
        async with Parts(staleness(2), tmp_path) as parts:
            await parts.coordinator.published(0)
            await parts.coordinator.batch(2)
            await parts.settle()
            assert parts.steps_asked() == [asked_by(parts.stream, step) for step in range(3)]
            assert [(await parts.coordinator.batch(step)).step for step in range(3)] == [0, 1, 2]
            parts.engine.version = 1
            await parts.coordinator.published(1)
            batch = await parts.coordinator.batch(3)
            assert batch.metrics["rollout/staleness"] == 2
            await parts.settle()
            assert parts.steps_asked() == [asked_by(parts.stream, step) for step in range(4)]

    asyncio.run(run())


def test_a_step_is_generated_only_after_the_one_before(tmp_path: Path) -> None:
    async def run() -> None:
        async with Parts(staleness(2), tmp_path) as parts:
            held, last = asyncio.Event(), parts.stream.at(0)[-1]

            async def before(prompt_ids: Ids) -> None:
                if BY_PROMPT[prompt_ids] == last:
                    await held.wait()

            parts.engine.before = before
            await parts.coordinator.published(0)
            await parts.settle()
            assert parts.steps_asked() == [asked_by(parts.stream, 0)]
            held.set()
            await parts.coordinator.batch(2)
            assert parts.steps_asked() == [asked_by(parts.stream, step) for step in range(3)]

    asyncio.run(run())


def test_generation_ends_with_the_last_step_and_a_resumed_run_starts_in_the_middle(tmp_path: Path) -> None:
    async def run() -> None:
        async with Parts(staleness(2), tmp_path) as parts:
            await parts.coordinator.published(3)
            await parts.coordinator.batch(4)
            await parts.coordinator.published(4)
            await parts.coordinator.published(5)
            await parts.settle()
            assert parts.steps_asked() == [asked_by(parts.stream, step) for step in (3, 4)]

    asyncio.run(run())


def test_a_failure_while_running_ahead_is_told_when_its_batch_is_asked_for(tmp_path: Path) -> None:
    async def run() -> None:
        async with Parts(staleness(1), tmp_path) as parts:

            async def before(prompt_ids: Ids) -> None:
                if prompt_ids not in asked_by(parts.stream, 0):
                    raise web.HTTPInternalServerError(text="no memory")

            parts.engine.before = before
            await parts.coordinator.published(0)
            assert (await parts.coordinator.batch(0)).step == 0
            with pytest.raises(ExceptionGroup) as error:
                await parts.coordinator.batch(1)
            assert "no memory" in str(error.value.exceptions[0])

    asyncio.run(run())


def test_a_batch_holds_every_attempt_with_what_its_teacher_reads(tmp_path: Path) -> None:
    batch = make(tmp_path)
    questions = PromptStream(TASK.train_questions(), 4, CONFIG.seed).at(0)
    assert [s.id for s in batch.samples] == [f"0/{slot}/{i}" for slot in range(4) for i in range(2)]
    assert [s.group for s in batch.samples] == [0, 0, 1, 1, 2, 2, 3, 3]
    even = [int(q.id.split("/")[1]) % 2 == 0 for q in questions]
    assert [s.reward for s in batch.samples] == [float(right and i == 0) for right in even for i in range(2)]
    for sample in batch.samples:
        solved = even[sample.group]
        if solved and sample.id.endswith("/0"):  # the only success has nobody to learn from
            assert sample.teacher_prompt_ids is None
            continue
        assert sample.teacher_prompt_ids is not None
        shown = CHAT.text(sample.teacher_prompt_ids)
        assert ("<sol>" in shown) == solved and ("<fb>" in shown) != solved
    contexts = {key: value for key, value in batch.metrics.items() if key.startswith("context/")}
    assert contexts["context/demonstration"] == contexts["context/none"] == sum(even) / 8
    assert contexts["context/feedback"] == (8 - 2 * sum(even)) / 8
    assert (
        sum(value for key, value in contexts.items() if key not in ("context/shortened", "context/attempt_shown")) == 1
    )
    assert batch.metrics["verdict/reward"] == sum(even) / 8
    assert batch.metrics["verdict/solved_questions"] == sum(even) / 4
    assert batch.metrics["rollout/cut_share"] == 0
    assert batch.metrics["rollout/response_tokens"] == sum(len(s.response_ids) for s in batch.samples) / 8
    assert batch.metrics["time/generate"] > 0
    assert 0 < sum(even) < 4  # both kinds of question were there


@pytest.mark.parametrize("finished", [0, 1, 3, 4])
def test_what_is_journalled_is_not_sampled_again(tmp_path: Path, finished: int) -> None:
    """A run that was killed after some groups: the next one asks for the rest, and the batch is the same."""
    whole = make(tmp_path / "whole")
    (written,) = (tmp_path / "whole").glob("*.jsonl")
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / written.name).write_text("".join(written.read_text().splitlines(True)[:finished]))
    engines: list[FakeEngine] = []
    again = make(tmp_path / "killed", prepare=engines.append)
    assert len(engines[0].asked) == 4 - finished
    assert again.samples == whole.samples
    assert again.cursor == whole.cursor
    assert untimed(again) == untimed(whole)
    assert Journal(tmp_path / "killed").groups(0) == Journal(tmp_path / "whole").groups(0)


def untimed(batch: Batch) -> dict[str, float]:
    return {key: value for key, value in batch.metrics.items() if not key.startswith("time/")}


def test_finished_groups_are_kept_when_another_fails(tmp_path: Path) -> None:
    stream = PromptStream(TASK.train_questions(), 4, CONFIG.seed)
    failing = CHAT.prompt_ids(stream.at(0)[3].messages)

    def prepare(engine: FakeEngine) -> None:
        async def before(prompt_ids: Ids) -> None:
            if prompt_ids == failing:
                while len(Journal(tmp_path).groups(0)) < 3:
                    await asyncio.sleep(0.01)
                raise web.HTTPInternalServerError(text="died")

        engine.before = before

    with pytest.raises(ExceptionGroup):
        make(tmp_path, prepare=prepare)
    engines: list[FakeEngine] = []
    batch = make(tmp_path, prepare=engines.append)
    assert engines[0].asked == [failing]
    assert batch.samples == make(tmp_path / "whole").samples


@pytest.mark.parametrize(
    "other",
    [
        dataclasses.replace(CONFIG, seed=1),
        dataclasses.replace(CONFIG, rollout=dataclasses.replace(CONFIG.rollout, prompts_per_step=2)),
    ],
)
def test_the_journal_of_another_run_is_refused(tmp_path: Path, other: Config) -> None:
    make(tmp_path)
    engines: list[FakeEngine] = []
    with pytest.raises(JournalError, match="belongs to another task, seed or batch size"):
        make(tmp_path, other, engines.append)
    assert engines[0].asked == []


def test_the_journal_of_changed_questions_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's file of questions may have changed under the same ids."""
    make(tmp_path)
    texts = [question.messages for question in TASK.train_questions()]
    changed = [Question(q.id, m, q.payload) for q, m in zip(TASK.train_questions(), texts[1:] + texts[:1], strict=True)]
    monkeypatch.setattr(TASK, "_train", tuple(changed))
    with pytest.raises(JournalError, match="belongs to another task"):
        make(tmp_path)
