"""Spikes of the gradient norm: what a norm far beyond its neighbours means, by configuration.

A spike is a norm above ``factor`` times the median of the last ``window`` accepted norms. The median, because one spike
that was accepted (the policy was off, or the factor higher) does not move it. There is no judgement before ``window``
norms are there, nor while their median is zero.

A norm that was not accepted does not enter the history, so a level that has risen for good is not taken for the new
normal: after ``patience`` skipped steps in a row the next spike stops the run.
"""

import statistics
from dataclasses import dataclass, replace

from megatron_sdpo.config import SpikeConfig


@dataclass(frozen=True, slots=True)
class History:
    """The norms so far; a checkpoint keeps it. Example: ``History((0.8, 0.9), skipped=1)``"""

    norms: tuple[float, ...] = ()
    """Accepted, oldest first, at most ``window``."""
    skipped: int = 0
    """Steps skipped in a row until now."""


@dataclass(frozen=True, slots=True)
class Judged:
    """``action`` is what to do with the step; ``history`` is what is known after it; ``words`` tell a spike."""

    action: str
    """accept, skip or stop."""
    history: History
    words: str = ""


def judge(history: History, norm: float, config: SpikeConfig) -> Judged:
    """The norm of a step, before it is made."""
    median = statistics.median(history.norms) if len(history.norms) >= config.window else 0.0
    if config.policy == "off" or not 0.0 < config.factor * median < norm:
        return Judged("accept", History((*history.norms, norm)[-config.window :]))
    words = f"{norm:.4g}, {norm / median:.1f} times the median {median:.4g} of the last {config.window} accepted norms"
    if config.policy == "skip" and history.skipped < config.patience:
        return Judged("skip", replace(history, skipped=history.skipped + 1), words)
    if config.policy == "skip":
        words += f", after {history.skipped} skipped steps in a row (spikes.patience)"
    return Judged("stop", history, words)
