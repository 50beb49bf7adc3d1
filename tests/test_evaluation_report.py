"""avg@n and pass@k with their intervals, by category, and the files of an evaluation."""

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest

from megatron_sdpo.config import Config, ModelConfig, TaskConfig
from megatron_sdpo.report.evaluation import Estimate, EvaluationRecord, by_category, scores, shown_ks
from megatron_sdpo.types import Attempt, Group, Message, Question, Verdict

CONFIG = Config(name="x", run_dir="", steps=1, model=ModelConfig(path="m"), task=TaskConfig(name="sciknoweval"))


def group(slot: int, rewards: list[float], category: str | None = "a", tokens: int = 3) -> Group:
    attempts = tuple(
        Attempt((1,), (2,) * tokens, (-1.0,) * tokens, f"answer {i} \u2028", "length" if i else "stop", 0)
        for i in range(len(rewards))
    )
    verdicts = tuple(Verdict(reward, "" if reward else "no") for reward in rewards)
    payload = {} if category is None else {"category": category}
    return Group(0, slot, Question(f"test/{slot}", (Message("user", "What?"),), payload), attempts, verdicts)


def drawn(questions: int, attempts: int, seed: int) -> list[Group]:
    draw = random.Random(seed)
    shares = [draw.random() for _ in range(questions)]
    return [group(i, [float(draw.random() < p) for _ in range(attempts)]) for i, p in enumerate(shares)]


def test_scores_are_what_counting_all_choices_gives() -> None:
    groups = drawn(12, 6, seed=3)
    found = scores(groups)
    rewards = [[v.reward for v in g.verdicts] for g in groups]
    assert found.average.value == pytest.approx(np.mean(rewards))
    assert list(found.passed) == [1, 2, 4, 6] == shown_ks(6)
    for k, estimate in found.passed.items():
        by_hand = [np.mean([max(chosen) for chosen in itertools.combinations(r, k)]) for r in rewards]
        assert estimate.value == pytest.approx(np.mean(by_hand))
    assert found.passed[1].value == pytest.approx(found.average.value)
    assert (found.questions, found.attempts, found.response_tokens, found.cut_share) == (12, 6, 3.0, 5 / 6)


def test_a_part_of_the_reward_counts_in_the_average_alone() -> None:
    found = scores([group(0, [0.5, 0.5]), group(1, [1.0, 0.0])])
    assert found.average.value == 0.5
    assert [e.value for e in found.passed.values()] == [0.25, 0.5]


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    """100 data sets of 60 questions whose true mean reward is one half: 90 of the intervals should hold it."""
    held = 0
    for seed in range(100):
        average = scores(drawn(60, 4, seed)).average
        assert average.low is not None and average.high is not None
        held += average.low <= 0.5 <= average.high
    assert 82 <= held <= 97


def test_one_question_has_no_interval() -> None:
    found = scores([group(0, [1.0, 0.0])])
    assert found.average == Estimate(0.5, None, None) and found.average.words() == "50.0"
    with pytest.raises(ValueError, match="at least one question"):
        scores([])


def test_groups_by_category() -> None:
    groups = [group(0, [1.0], "b"), group(1, [1.0], None), group(2, [0.0], "a"), group(3, [0.0], "b")]
    assert {name: [g.slot for g in part] for name, part in by_category(groups).items()} == {
        "a": [2],
        "b": [0, 3],
        "none": [1],
    }


def test_the_files_of_an_evaluation(tmp_path: Path) -> None:
    groups = [group(0, [1.0, 0.0], "waves"), group(1, [0.0, 0.0], "heat | cold"), group(2, [1.0, 1.0], "waves")]
    tables = []
    for order in (groups, groups[::-1]):  # as they come
        record = EvaluationRecord(tmp_path)
        for g in order:
            record.add(g)
        assert len((record.folder / "transcripts.jsonl").read_text().split("\n")) == 7  # before the end
        tables.append(record.finish(CONFIG))
    assert tables[0] == tables[1]
    assert sorted(path.name for path in (tmp_path / "evaluations").iterdir()) == ["001", "002"]
    folder = tmp_path / "evaluations" / "001"
    first = json.loads((folder / "transcripts.jsonl").read_text().split("\n")[1])
    assert first == {
        "question": "test/0",
        "category": "waves",
        "attempt": 1,
        "reward": 0.0,
        "feedback": "no",
        "response": "answer 1 \u2028",
        "finish": "length",
        "response_tokens": 3,
        "messages": [{"role": "user", "content": "What?"}],
    }
    record = json.loads((folder / "scores.json").read_text())
    assert record["all"]["average"]["value"] == 0.5
    assert record["categories"]["waves"]["passed"]["2"]["value"] == 1.0
    lines = (folder / "scores.md").read_text().splitlines()
    assert lines[0] == "| category | questions | avg@2 | pass@1 | pass@2 | cut | tokens |"
    assert lines[2] == "| heat / cold | 1 | 0.0 | 0.0 | 0.0 | 50.0% | 3 |"
    assert lines[3].startswith("| waves | 2 | 75.0 (50.0 to 100.0) | 75.0 (50.0 to 100.0) | 100.0 (100.0 to 100.0) |")
    assert lines[4].startswith("| all | 3 | 50.0 (")
