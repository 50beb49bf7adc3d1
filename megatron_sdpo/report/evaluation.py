"""What ``megatron-sdpo evaluate`` leaves behind: scores with intervals, by category, and every attempt to read.

``RUN_DIR/evaluations/001/`` (each evaluation has the next number) holds

* ``transcripts.jsonl``, one attempt a line, written as the attempts get ready,
* ``scores.json``: avg@n (mean reward) and pass@k (the probability that one of k attempts has reward 1, unbiased),
* ``scores.md``: the same as a table.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np

from megatron_sdpo.config import Config
from megatron_sdpo.discovery.statistics import CONFIDENCE, RESAMPLES, Floats, unbiased
from megatron_sdpo.types import Group

NO_CATEGORY = "none"


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over questions and the interval that resampling the questions gives; no interval for a single question.

    Example: ``Estimate(0.71, 0.66, 0.76)``
    """

    value: float
    low: float | None
    high: float | None

    def words(self) -> str:
        """In per cent: ``71.0 (66.0 to 76.0)``"""
        if self.low is None or self.high is None:
            return f"{100 * self.value:.1f}"
        return f"{100 * self.value:.1f} ({100 * self.low:.1f} to {100 * self.high:.1f})"


@dataclass(frozen=True, slots=True)
class Scores:
    """Of some questions, each attempted ``attempts`` times. ``passed`` maps k to pass@k."""

    questions: int
    attempts: int
    average: Estimate
    passed: Mapping[int, Estimate]
    cut_share: float
    """Attempts that ended at the limit of their length."""
    response_tokens: float


def scores(groups: Sequence[Group], seed: int = 0) -> Scores:
    """All groups together; they have the same number of attempts. ValueError when there is none."""
    if not groups:
        raise ValueError("scores need at least one question")
    count = len(groups[0].attempts)
    rewards_QN = np.array([[verdict.reward for verdict in group.verdicts] for group in groups], dtype=np.float64)
    passed_QK = np.stack([unbiased(count, int(solved), count) for solved in (rewards_QN >= 1.0).sum(axis=1)])
    ks = shown_ks(count)
    columns_QC = np.column_stack([rewards_QN.mean(axis=1), *(passed_QK[:, k - 1] for k in ks)])
    average, *passed = _estimates(columns_QC, seed)
    attempts = [attempt for group in groups for attempt in group.attempts]
    return Scores(
        questions=len(groups),
        attempts=count,
        average=average,
        passed=dict(zip(ks, passed, strict=True)),
        cut_share=sum(a.finish == "length" for a in attempts) / len(attempts),
        response_tokens=sum(len(a.response_ids) for a in attempts) / len(attempts),
    )


def shown_ks(count: int) -> list[int]:
    """The k of pass@k that are shown: 1, 2, 4 ... and the number of attempts."""
    return sorted({*(2**i for i in range(count.bit_length()) if 2**i <= count), count})


def _estimates(columns_QC: Floats, seed: int) -> list[Estimate]:
    """Mean of each column, and a bootstrap's interval: questions drawn with replacement, the middle ``CONFIDENCE``.

    A question's attempts stay together, so that their own spread is in that of the questions.
    """
    questions = len(columns_QC)
    means_C = columns_QC.mean(axis=0)
    if questions == 1:
        return [Estimate(float(mean), None, None) for mean in means_C]
    draw = np.random.default_rng(seed)
    resampled_RC = np.stack([columns_QC[draw.integers(questions, size=questions)].mean(0) for _ in range(RESAMPLES)])
    low_C, high_C = np.quantile(resampled_RC, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return [Estimate(float(m), float(lo), float(hi)) for m, lo, hi in zip(means_C, low_C, high_C, strict=True)]


def by_category(groups: Iterable[Group]) -> dict[str, list[Group]]:
    """Groups by the text under ``category`` in their question's payload, in alphabetical order."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        category = group.question.payload.get("category")
        found.setdefault(category if isinstance(category, str) else NO_CATEGORY, []).append(group)
    return dict(sorted(found.items()))


class EvaluationRecord:
    """The folder of one evaluation: ``add`` groups as they get ready, ``finish`` when all are there."""

    def __init__(self, run_dir: Path) -> None:
        """Makes the next folder in ``run_dir/evaluations``."""
        above = run_dir / "evaluations"
        above.mkdir(parents=True, exist_ok=True)
        taken = [int(path.name) for path in above.iterdir() if path.name.isdigit()]
        self.folder = above / f"{max(taken, default=0) + 1:03d}"
        self.folder.mkdir()
        self._groups: list[Group] = []
        self._transcripts: TextIO = (self.folder / "transcripts.jsonl").open("w", encoding="utf-8")

    def add(self, group: Group) -> None:
        """Write the attempts of a group down, readable: messages, response, reward, feedback."""
        self._groups.append(group)
        for index, (attempt, verdict) in enumerate(zip(group.attempts, group.verdicts, strict=True)):
            line = {
                "question": group.question.id,
                "category": group.question.payload.get("category"),
                "attempt": index,
                "reward": verdict.reward,
                "feedback": verdict.feedback,
                "response": attempt.text,
                "finish": attempt.finish,
                "response_tokens": len(attempt.response_ids),
                "messages": [dataclasses.asdict(message) for message in group.question.messages],
            }
            self._transcripts.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._transcripts.flush()

    def finish(self, config: Config) -> str:
        """Write the scores; returns the table."""
        self._transcripts.close()
        ordered = sorted(self._groups, key=lambda group: group.slot)  # the interval must not depend on who came first
        parts = {name: scores(groups) for name, groups in by_category(ordered).items()}
        total = scores(ordered)
        record = {
            "model": config.model.path,
            "task": dataclasses.asdict(config.task),
            "evaluation": dataclasses.asdict(config.evaluation),
            "max_new_tokens": config.rollout.max_new_tokens,
            "interval": f"the middle {CONFIDENCE:.0%} of {RESAMPLES} resamples of the questions",
            "all": dataclasses.asdict(total),
            "categories": {name: dataclasses.asdict(part) for name, part in parts.items()},
        }
        (self.folder / "scores.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        table = _table(total, parts)
        (self.folder / "scores.md").write_text(table)
        return table


def _table(total: Scores, parts: Mapping[str, Scores]) -> str:
    """Markdown, per cent with intervals, a category a line and all of them last."""
    heads = ["category", "questions", f"avg@{total.attempts}", *(f"pass@{k}" for k in total.passed), "cut", "tokens"]
    lines = [heads, ["---"] * len(heads)]
    for name, part in [*parts.items(), ("all", total)]:
        estimates = [part.average, *part.passed.values()]
        shown = [estimate.words() for estimate in estimates]
        lines.append([name, str(part.questions), *shown, f"{part.cut_share:.1%}", f"{part.response_tokens:.0f}"])
    table = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
    return f"{table}\n\nPer cent; in brackets the middle {CONFIDENCE:.0%} of {RESAMPLES} resamples of the questions.\n"
