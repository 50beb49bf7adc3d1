"""discovery@k: the probability that at least one of the first k attempts at a question is correct.

Pure functions of what the trials found. A question's own value is estimated in one of two ways, by how its attempts
came about; a method's value is the mean over questions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
CONFIDENCE = 0.9
RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Independent:
    """Attempts at one question that do not depend on each other. Example: ``Independent(samples=2048, correct=3)``"""

    samples: int
    correct: int

    def curve(self, budget: int) -> Floats:
        """discovery@1 ... discovery@budget, without bias."""
        return unbiased(self.samples, self.correct, budget)

    def resampled(self, draw: np.random.Generator) -> "Independent":
        return Independent(self.samples, int(draw.binomial(self.samples, self.correct / self.samples)))


@dataclass(frozen=True, slots=True)
class Sequential:
    """Trials of one question whose attempts depend on earlier ones: each trial's first success, counted from 1.

    Example: ``Sequential((57, None, 12))`` is three trials, the second of which spent its budget.
    """

    first_successes: tuple[int | None, ...]

    def curve(self, budget: int) -> Floats:
        """Share of the trials that had succeeded by attempt 1 ... budget."""
        found = np.zeros(budget)
        for first in self.first_successes:
            if first is not None and first <= budget:
                found[first - 1 :] += 1.0
        return found / len(self.first_successes)

    def resampled(self, draw: np.random.Generator) -> "Sequential":
        count = len(self.first_successes)
        return Sequential(tuple(self.first_successes[i] for i in draw.integers(count, size=count)))


Found = Independent | Sequential


@dataclass(frozen=True, slots=True)
class Curve:
    """Mean over questions of discovery@1 ... discovery@budget, with the bounds of its interval. Arrays ``[budget]``."""

    mean: Floats
    low: Floats
    high: Floats

    def changes(self) -> list[int]:
        """The k that show the curve and its bounds as steps: 1, each k at which one of them moves, the budget."""
        lines = np.stack([self.mean, self.low, self.high])
        moved = np.flatnonzero(np.any(np.diff(lines) != 0.0, axis=0)) + 2
        return sorted({1, *moved.tolist(), self.mean.size})

    def attempts_to(self, share: float) -> int | None:
        """The smallest k whose discovery@k is at least ``share``; None within the budget."""
        return _attempts_to(self.mean, share)


def unbiased(samples: int, correct: int, budget: int) -> Floats:
    """1 - C(n - c, k) / C(n, k) for k = 1 ... budget: the mean over all k-subsets of n attempts, c of them correct.

    As a running product, because the binomials overflow. ``ValueError`` when more attempts are asked about than
    there are: nothing is known of them.
    """
    if not 0 <= correct <= samples or not 1 <= budget <= samples:
        raise ValueError(f"{correct} of {samples} attempts cannot tell what {budget} attempts find")
    k = np.arange(budget)
    none_found: Floats = np.cumprod(np.maximum(samples - correct - k, 0) / (samples - k), dtype=np.float64)
    return 1.0 - none_found


def discovery_curve(found: Sequence[Found], budget: int, seed: int = 0) -> Curve:
    """One entry of ``found`` a question. The interval is a bootstrap's: questions are drawn with replacement, and in
    each draw the question's own trials (or attempts) too; the middle ``CONFIDENCE`` of ``RESAMPLES`` such means.
    """
    if not found:
        raise ValueError("a curve needs at least one question")
    mean = np.mean([question.curve(budget) for question in found], axis=0)
    draw = np.random.default_rng(seed)
    means = np.empty((RESAMPLES, budget))
    for row in means:
        chosen = [found[i].resampled(draw) for i in draw.integers(len(found), size=len(found))]
        row[:] = np.mean([question.curve(budget) for question in chosen], axis=0)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return Curve(mean, low, high)


def mean_attempts(curve: Floats) -> float:
    """Mean attempts until the first success, where a trial without one counts its whole budget.

    The expectation of min(first success, budget) is the sum over k < budget of P(no success in the first k attempts).
    """
    return 1.0 + float(np.sum(1.0 - curve[:-1]))


def shown_at(budget: int) -> list[int]:
    """The k that a table shows: 1, 4, 16 ... and the budget."""
    return sorted(
        {*(4**i for i in range(20) if 4**i <= budget), *(8 * 4**i for i in range(20) if 8 * 4**i <= budget), budget}
    )


def drawn_at(budget: int, points: int = 80) -> list[int]:
    """The k that a curve is drawn at: every one at first, then evenly on a logarithmic axis."""
    spread = np.geomspace(1, budget, points)
    return sorted({round(float(k)) for k in spread})


def _attempts_to(curve: Floats, share: float) -> int | None:
    reached = np.flatnonzero(curve >= share - 1e-12)
    return int(reached[0]) + 1 if reached.size else None
