"""Trials: what ends one, what is never sampled twice, what a turn with memory reads, and in which order ranks act."""

import asyncio
import dataclasses
import itertools
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from megatron_sdpo.chat import Chat
from megatron_sdpo.config import Config, DiscoveryConfig, RolloutConfig
from megatron_sdpo.discovery import Trials, discover, first_version
from megatron_sdpo.discovery.baselines import Memory
from megatron_sdpo.discovery.progress import Console, trial_words
from megatron_sdpo.discovery.record import Exchange, Trial, TrialFiles, TrialId, planned
from megatron_sdpo.phases import Phases
from megatron_sdpo.rollout.client import EngineClient
from megatron_sdpo.rollout.journal import JournalError
from megatron_sdpo.rollout.sampler import Sampler
from megatron_sdpo.tasks.minipipe import MiniPipe
from megatron_sdpo.types import Batch
from recipes.minipipe import minipipe
from tests.fake_engine import EOS_ID, FakeEngine, Ids

TASK = MiniPipe(train_size=2, eval_size=1)
QUESTIONS = TASK.train_questions()
CONFIG = dataclasses.replace(
    minipipe(),
    steps=3,
    rollout=RolloutConfig(attempts_per_prompt=4, max_new_tokens=24),
    discovery=DiscoveryConfig(budget=12, seeds=2, best_of_k_samples=14, multi_turn_memory=(2,)),
)
CHAT = Chat(CONFIG.model.path)
PLAIN = [CHAT.prompt_ids(question.messages) for question in QUESTIONS]
STEP = 3


def right(question: int) -> Ids:
    return (*CHAT.encode(TASK.reference(QUESTIONS[question])), EOS_ID)


def wrong(number: int) -> Ids:
    """A program that fails, another for each number."""
    return (*CHAT.encode(f"over {number % 10}"), EOS_ID)


class Recorder:
    """discovery.Progress that keeps what it is told."""

    def __init__(self) -> None:
        self.trials: list[Trial] = []

    def reached(self, id: TrialId, attempts: int) -> None: ...

    def finished(self, trial: Trial) -> None:
        self.trials.append(trial)


class Parts:
    """The coordinator of a discovery with an engine of its own; use it as an asynchronous context manager."""

    def __init__(self, folder: Path, config: Config = CONFIG) -> None:
        self.folder, self.config = folder, config
        self.engine = FakeEngine(lambda prompt_ids, i: wrong(i))
        self.files, self.told = TrialFiles(folder / "trials"), Recorder()

    async def __aenter__(self) -> "Parts":
        await self.engine.__aenter__()
        self.client = EngineClient([self.engine.address], "token", timeout_s=30)
        await self.client.__aenter__()
        sampler = Sampler(self.client, CHAT, TASK, self.config.rollout.max_new_tokens, verify_workers=2)
        self.trials = Trials(self.config, QUESTIONS, CHAT, sampler, self.folder / "attempts", self.files, self.told)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.client.__aexit__(None, None, None)
        await self.engine.__aexit__(None, None, None)


def within(parts: Parts, what: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        async with parts:
            await what()

    asyncio.run(run())


def solves_at(parts: Parts, question: int, trial: int, step: int, index: int) -> None:
    """The engine fails, except for one attempt of one version."""
    version = first_version(trial, CONFIG) + step

    def respond(prompt_ids: Ids, i: int) -> Sequence[int]:
        return right(question) if (parts.engine.version, i) == (version, index) else wrong(i)

    parts.engine.respond = respond


async def go_through(parts: Parts, batches: int = 1000) -> list[Batch]:
    """What the trainer asks for, at most so many batches of it."""
    seen: list[Batch] = []
    while (version := await parts.trials.next_trial()) is not None:
        while True:
            parts.engine.version = version
            batch = await parts.trials.batch(version)
            if batch is None:
                break
            seen.append(batch)
            if len(seen) == batches:
                return seen
            await parts.trials.trained({"loss/sdpo": 1.0 / version})
            version += 1
    return seen


def test_a_trial_ends_at_its_first_success_or_with_its_budget(tmp_path: Path) -> None:
    parts = Parts(tmp_path)

    async def run() -> None:
        solves_at(parts, question=1, trial=1, step=1, index=2)
        batches = await go_through(parts)
        # The last group of a trial is not trained on: 2 batches of each spent trial, 1 of the solved one
        assert [b.step for b in batches] == [1, 2, 4, 7, 8, 10, 11]
        for batch in batches:
            assert [s.id for s in batch.samples] == [f"{batch.step}/0/{i}" for i in range(4)]
            assert batch.metrics["rollout/staleness"] == 0
            assert batch.metrics["context/feedback"] == 1.0  # no demonstration exists
        assert parts.engine.asked == [PLAIN[0]] * 3 + [PLAIN[1]] * 2 + [PLAIN[0]] * 3 + [PLAIN[1]] * 3

    within(parts, run)
    found = {(t.id.question, t.id.seed): t for t in parts.files.all()}
    assert {k: (t.attempts, t.successes, t.first_success) for k, t in found.items()} == {
        (0, 0): (12, 0, None),
        (1, 0): (8, 1, 4 + 2 + 1),
        (0, 1): (12, 0, None),
        (1, 1): (12, 0, None),
    }
    solved = found[1, 0]
    assert [e.reward for e in solved.path] == [0, 0, 0, 1]
    assert solved.path[-1].text == TASK.reference(QUESTIONS[1])
    assert [step["version"] for step in solved.steps] == [4, 5]
    assert solved.steps[0]["loss/sdpo"] == 0.25 and "loss/sdpo" not in solved.steps[1]
    assert solved.steps[1]["verdict/reward"] == 0.25
    assert [t.id for t in parts.told.trials] == [TrialId("sdpo", q, s) for s in (0, 1) for q in (0, 1)]
    assert trial_words(solved).endswith("seed 0  solved at attempt 7")
    assert trial_words(found[0, 0]).endswith("not solved in 12 attempts")


@pytest.mark.parametrize("batches", [1, 2, 3, 5])
def test_an_interrupted_discovery_ends_with_the_same_trials(tmp_path: Path, batches: int) -> None:
    """The second start samples what the first had not journalled, and nothing else."""
    straight, first, second = (Parts(tmp_path / name) for name in ("straight", "broken", "broken"))
    for parts in (straight, first, second):
        solves_at(parts, question=1, trial=1, step=1, index=2)
    within(straight, lambda: _ignored(go_through(straight)))
    within(first, lambda: _ignored(go_through(first, batches)))
    within(second, lambda: _ignored(go_through(second)))
    assert untimed(second.files.all()) == untimed(straight.files.all())
    assert first.engine.asked + second.engine.asked == straight.engine.asked
    for name in ("straight", "broken"):
        journals = sorted((tmp_path / name / "attempts" / "sdpo").iterdir())
        assert [path.read_bytes().count(b"\n") for path in journals] == [1] * 11


def test_a_journal_of_other_questions_is_refused(tmp_path: Path) -> None:
    within(parts := Parts(tmp_path), lambda: _ignored(go_through(parts, 1)))
    other = Parts(tmp_path)

    async def run() -> None:
        other.trials._questions = QUESTIONS[::-1]
        with pytest.raises(JournalError, match="use a new one"):
            await go_through(other)

    within(other, run)


def baselines(parts: Parts) -> None:
    async def run() -> None:
        while not await parts.trials.baselines():
            pass

    within(parts, run)


def test_baselines_count_all_attempts_and_take_turns(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    turns: list[Ids] = []

    def respond(prompt_ids: Ids, i: int) -> Sequence[int]:
        if prompt_ids in PLAIN:
            return right(0) if i == 3 else wrong(i)  # of 14 = 4 + 4 + 4 + 2 attempts at question 0: three
        turns.append(prompt_ids)
        return right(0) if len(turns) > 3 else wrong(len(turns))

    parts.engine.respond = respond
    baselines(parts)
    found = {(t.id.method, t.id.question, t.id.seed): t for t in parts.files.all()}
    assert set(found) == {(id.method, id.question, id.seed) for id in planned(CONFIG, 2) if id.method != "sdpo"}
    best = found["best_of_k", 0, 0]
    assert (best.attempts, best.successes, best.first_success) == (14, 3, 4)
    assert (found["best_of_k", 1, 0].attempts, found["best_of_k", 1, 0].successes) == (14, 0)
    for seed in (0, 1):
        spent = found["multi_turn-2", 1, seed]
        assert (spent.attempts, spent.first_success) == (12, None)
        solved = found["multi_turn-2", 0, seed]
        assert solved.first_success == solved.attempts
    assert parts.engine.asked.count(PLAIN[0]) == 4 + 2  # the chunks of best_of_k, and the first turn of each seed


@pytest.mark.parametrize("journalled", [0.3, 0.8])
def test_interrupted_baselines_are_continued(tmp_path: Path, journalled: float) -> None:
    straight, second = Parts(tmp_path / "straight"), Parts(tmp_path / "broken")
    baselines(straight)
    for path in sorted((tmp_path / "straight" / "attempts").rglob("*.jsonl")):
        lines = path.read_bytes().splitlines(keepends=True)
        kept = lines[: int(journalled * len(lines))]
        copy = tmp_path / "broken" / path.relative_to(tmp_path / "straight")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(b"".join(kept) + lines[-1][:20])  # and one that the kill cut
    baselines(second)
    assert second.files.all() == straight.files.all()
    for path in (tmp_path / "straight" / "attempts").rglob("*.jsonl"):
        copy = tmp_path / "broken" / path.relative_to(tmp_path / "straight")
        assert sorted(copy.read_bytes().splitlines()) == sorted(path.read_bytes().splitlines())
    assert len(second.engine.asked) < len(straight.engine.asked)
    third = Parts(tmp_path / "broken")
    baselines(third)
    assert third.engine.asked == []


def test_a_baseline_that_fails_ends_the_coordinator(tmp_path: Path) -> None:
    parts = Parts(tmp_path)

    def respond(prompt_ids: Ids, i: int) -> Sequence[int]:
        raise RuntimeError("the engine broke")

    async def run() -> None:
        parts.engine.respond = respond
        with pytest.raises(BaseExceptionGroup):
            await parts.trials.baselines()

    within(parts, run)


def memory(most: int, longest: int) -> Memory:
    context = dataclasses.replace(CONFIG.teacher_context, max_prompt_tokens=longest)
    return Memory(QUESTION, most, dataclasses.replace(CONFIG, teacher_context=context), CHAT)


QUESTION = dataclasses.replace(
    QUESTIONS[0], messages=(dataclasses.replace(QUESTIONS[0].messages[0], content="keep over 2, sort"),)
)


def read(memory: Memory) -> str:
    return CHAT.text(CHAT.prompt_ids(memory.asked().messages))


def test_a_turn_reads_the_question_and_the_latest_feedbacks() -> None:
    three = memory(most=3, longest=96)
    assert read(three) == "<q> keep over 2 , sort <a>"
    three.add("sh: over: not found")
    assert read(three) == "<q> keep over 2 , sort <fb> sh : over : not found <again> <a>"
    three.add("")  # nothing to remember
    for name in ("gt", "larger", "sort"):
        three.add(f"sh: {name}: not found")
    assert read(three) == (
        "<q> keep over 2 , sort <fb> sh : gt : not found <fb> sh : larger : not found"
        " <fb> sh : sort : not found <again> <a>"
    )
    assert three.forgotten_for_length == 0


def test_what_does_not_fit_is_forgotten_oldest_first_for_good_and_counted() -> None:
    full = "<q> keep over 2 , sort <fb> sh : gt : not found <fb> sh : larger : not found <again> <a>"
    many = memory(most=1000, longest=len(CHAT.encode(full)))
    for name in ("over", "gt", "larger"):
        many.add(f"sh: {name}: not found")
    assert read(many) == full
    assert many.forgotten_for_length == 1
    many.add("test failed: got " + "1" * 40)  # longer than all the room
    assert read(many) == "<q> keep over 2 , sort <a>"
    assert many.forgotten_for_length == 4
    many.add("sh: over: not found")
    assert read(many) == "<q> keep over 2 , sort <fb> sh : over : not found <again> <a>"


def test_the_models_length_bounds_the_memory_too() -> None:
    short = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, max_length=24 + 2 + 16))
    one = Memory(QUESTION, 5, short, CHAT)  # 16 tokens of prompt are left; one feedback makes 15
    one.add("sh: over: not found")
    one.add("sh: gt: not found")
    assert read(one) == "<q> keep over 2 , sort <fb> sh : gt : not found <again> <a>"
    assert one.forgotten_for_length == 1


def test_trials_are_read_back_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    files = TrialFiles(tmp_path)
    id = TrialId("sdpo", 3, 1)
    trial = Trial(id, QUESTIONS[0], 8, 1, 7, (Exchange("over 2", 0.0, "no"), Exchange("gt 2", 1.0, "")), ({"a": 0.5},))
    assert not files.has(id) and files.all() == []
    files.save(trial)
    assert files.has(id) and files.all() == [trial] == [files.load(id)]
    assert [path.name for path in tmp_path.iterdir()] == ["sdpo-q0003-s1.json"]
    (tmp_path / "sdpo-q0003-s1.json").write_text("{")
    with pytest.raises(ValueError, match=r"sdpo-q0003-s1\.json is not a finished trial"):
        files.all()


def test_without_a_terminal_each_finished_trial_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(total=12, done=8, budget=16)
    for question, first in ((3, 7), (4, None)):
        console.reached(TrialId("sdpo", question, 1), 8)
        console.finished(Trial(TrialId("sdpo", question, 1), QUESTIONS[0], 16, 0, first, (), ()))
    console.close()
    assert capsys.readouterr().out == (
        " 9/12  sdpo          train/0  seed 1  solved at attempt 7\n"
        "10/12  sdpo          train/0  seed 1  not solved in 16 attempts\n"
    )


def test_more_seeds_leave_the_numbers_of_earlier_trials() -> None:
    more = dataclasses.replace(CONFIG, discovery=dataclasses.replace(CONFIG.discovery, seeds=5))
    few, many = ([id for id in planned(c, 2) if id.method == "sdpo"] for c in (CONFIG, more))
    assert many[: len(few)] == few
    versions = [first_version(number, CONFIG) for number in range(len(many))]
    assert versions[0] == 1  # 0 are the base weights of the baselines
    assert [b - a for a, b in itertools.pairwise(versions)] == [CONFIG.steps] * 9


class Followed:
    """The phases that were begun (phases.Follower)."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, str]] = []

    def began(self, step: int, name: str) -> None:
        self.seen.append((step, name))

    def ended(self, step: int, name: str) -> None:
        pass


class Ranks:
    """Source, learner and publisher in one, which keep the order in which they are called."""

    def __init__(self, batches: dict[int, int]) -> None:
        self.batches, self.waits, self.called = batches, [False, False, True], list[str]()
        self.next = iter([*batches, None])
        self.sent: list[int] = []
        self.newcomers = [False, False]

    def has_newcomers(self) -> bool:
        return self.newcomers.pop(0)

    def baselines(self) -> bool:
        self.called.append("baselines")
        return self.waits.pop(0)

    def next_trial(self) -> int | None:
        return next(self.next)

    def batch(self, version: int) -> Batch | None:
        start = max(first for first in self.batches if first <= version)
        self.called.append(f"batch {version}")
        return Batch(version, (), {}, 0) if version < start + self.batches[start] else None

    def trained(self, numbers: dict[str, float]) -> None:
        assert {"loss/sdpo", "sync/seconds", "time/train"} <= set(numbers)
        self.called.append("trained")

    def reset(self) -> None:
        self.called.append("reset")

    def score_student(self, batch: Batch) -> str:
        return f"student {batch.step}"

    def score_teacher(self, batch: Batch, student: str) -> str:
        return f"teacher {batch.step}"

    def train(self, batch: Batch, student: str, teacher: str) -> dict[str, float]:
        assert (student, teacher) == (f"student {batch.step}", f"teacher {batch.step}")
        self.called.append(f"train {batch.step}")
        return {"loss/sdpo": 0.1}

    def update_teacher(self) -> None:
        self.called.append("teach")

    def release(self) -> None:
        self.called.append("release")

    def publish(self, version: int) -> dict[str, float]:
        self.sent.append(version)
        self.called.append(f"publish {version}")
        return {"sync/seconds": 0.1}


def test_ranks_begin_each_trial_at_the_base_and_versions_only_grow() -> None:
    ranks: Any = Ranks({1: 2, 4: 0, 7: 1})
    followed = Followed()
    discover(ranks, cast(Any, ranks), cast(Any, ranks), Phases([followed]))
    assert ranks.called == [
        *("publish 0", "baselines", "baselines", "baselines"),
        *("reset", "publish 1", "batch 1", "release", "train 1", "teach", "trained", "publish 2", "batch 2"),
        *("release", "train 2", "teach", "trained", "publish 3", "batch 3"),
        *("reset", "publish 4", "batch 4"),
        *("reset", "publish 7", "batch 7", "release", "train 7", "teach", "trained", "publish 8", "batch 8"),
    ]
    assert ranks.sent == sorted(set(ranks.sent))
    waits = [(step, name) for step, name in followed.seen if name == "wait"]
    assert waits == [(step, "wait") for step in (0, 0, 0, 0, 1, 2, 3, 3, 4, 4, 7, 8, 8)]
    names = ("sync", "reset", "release", "score_student", "score_teacher", "train")
    assert [name for step, name in followed.seen if step == 7 and name != "wait"] == [*("reset", "sync"), *names[2:]]
    assert {name for _, name in followed.seen} == {"wait", *names}  # a watchdog bounds all but the waiting


def test_an_engine_that_comes_while_baselines_are_made_gets_the_base_weights() -> None:
    ranks: Any = Ranks({1: 0})
    ranks.newcomers = [True, False]
    discover(ranks, cast(Any, ranks), cast(Any, ranks), Phases())
    assert ranks.called[:5] == ["publish 0", "baselines", "publish 0", "baselines", "baselines"]


async def _ignored(work: Awaitable[object]) -> None:
    await work


def untimed(trials: Sequence[Trial]) -> list[Trial]:
    """Without how long things took."""
    return [
        dataclasses.replace(
            trial, steps=tuple({k: v for k, v in step.items() if not k.startswith("time/")} for step in trial.steps)
        )
        for trial in trials
    ]
