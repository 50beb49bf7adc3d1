"""Which rank is slow, by how much, and in which phase: in every row, and on the console when it lasts.

How long a rank was in a phase does not tell: ranks leave a collective together, so the slow one's time is everybody's.
What counts is its own work. Without a GPU that is the CPU time of its process, as waiting in gloo costs none; on a GPU
the time until its stream arrived at the end of the phase's kernels (not yet run on a GPU; where ranks meet in
collectives inside a phase, a whole group shares its slow rank's time).

A rank is compared with the other ranks of its pipeline stage, as stages have different work by layout; where a stage
is a single rank, with all others, and then the difference may be the layout's.
"""

import statistics
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_sdpo.config import RanksConfig
from megatron_sdpo.mcore import platform
from megatron_sdpo.mcore.groups import ParallelGroups
from megatron_sdpo.tracking import Tracker

PHASES = ("score_student", "score_teacher", "train")
"""Those in which ranks with the same layers have the same work."""


class OwnWork:
    """Measures this rank's work in each of ``PHASES`` (phases.Follower)."""

    def __init__(self) -> None:
        self._began: dict[str, Any] = {}
        self._ended: dict[str, Any] = {}

    def began(self, step: int, name: str) -> None:
        if name in PHASES:
            self._began[name] = _mark()

    def ended(self, step: int, name: str) -> None:
        if name in PHASES:
            self._ended[name] = _mark()

    def taken(self) -> list[float]:
        """Seconds by phase since this was last asked; [] when there was no step."""
        if not self._ended:
            return []
        seconds = [_between(self._began[name], self._ended[name]) if name in self._ended else 0.0 for name in PHASES]
        self._began, self._ended = {}, {}
        return seconds


def _mark() -> Any:
    if not torch.cuda.is_available():
        return time.process_time()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(began: Any, ended: Any) -> float:
    if not torch.cuda.is_available():
        return ended - began
    ended.synchronize()
    return began.elapsed_time(ended) / 1000.0


@dataclass(frozen=True, slots=True)
class Slowest:
    """The rank with the most work beyond the median of its likes.

    ``seconds`` beyond it by phase; ``share``: their sum in terms of that median, 0.3 is 30 % more.
    """

    rank: int
    share: float
    seconds: tuple[float, ...]


def slowest(work_RP: Sequence[Sequence[float]], stages_R: Sequence[int]) -> Slowest:
    """Of two ranks or more; ``work_RP`` are seconds by rank and phase, ``stages_R`` who is compared with whom."""
    members = {stage: [r for r, s in enumerate(stages_R) if s == stage] for stage in set(stages_R)}
    alike = {stage: ranks if len(ranks) > 1 else range(len(work_RP)) for stage, ranks in members.items()}
    phases = range(len(work_RP[0]))
    ordered = {stage: [sorted(work_RP[r][p] for r in ranks) for p in phases] for stage, ranks in alike.items()}

    def of(rank: int) -> Slowest:
        usual = [_median_of_others(ordered[stages_R[rank]][p], work_RP[rank][p]) for p in phases]
        beyond = tuple(own - others for own, others in zip(work_RP[rank], usual, strict=True))
        return Slowest(rank, sum(beyond) / max(sum(usual), 1e-9), beyond)

    return max((of(rank) for rank in range(len(work_RP))), key=lambda found: sum(found.seconds))


def _median_of_others(ordered: Sequence[float], own: float) -> float:
    """Of ``ordered`` without one that is ``own``."""
    place = bisect_left(ordered, own)
    others = len(ordered) - 1
    middle = [ordered[m + (m >= place)] for m in ((others - 1) // 2, others // 2)]
    return statistics.fmean(middle)


class StragglerLog:
    """The tracker, with the slowest rank in every row (types.MetricsLog). All ranks call ``log``, in step."""

    def __init__(self, config: RanksConfig, groups: ParallelGroups, work: OwnWork, tracker: Tracker) -> None:
        self._config, self._groups, self._work, self._tracker = config, groups, work, tracker
        self._stages = [rank // (groups.world_size // groups.pipeline_size) for rank in range(groups.world_size)]
        self._slow_rank, self._slow_steps = -1, 0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        own = self._work.taken()
        found = slowest(self._of_all(own), self._stages) if own and self._groups.world_size > 1 else None
        self._tracker.log(step, metrics if found is None else {**metrics, **_numbers(found)})
        if found is not None and self._lasts(found):
            self._tracker.say(_words(found, step, self._config.slow_steps))

    def _of_all(self, own: Sequence[float]) -> list[list[float]]:
        mine = torch.tensor(own, dtype=torch.float64, device=platform.device())
        everywhere = mine.new_empty(self._groups.world_size * len(own))
        dist.all_gather_into_tensor(everywhere, mine, group=self._groups.world)
        return everywhere.view(-1, len(own)).tolist()

    def _lasts(self, found: Slowest) -> bool:
        """Just now the same rank has been slow for long enough; not again while it stays so."""
        if found.share <= self._config.slow_share:
            self._slow_rank, self._slow_steps = -1, 0
            return False
        self._slow_steps = self._slow_steps + 1 if found.rank == self._slow_rank else 1
        self._slow_rank = found.rank
        return self._slow_steps == self._config.slow_steps


def _numbers(found: Slowest) -> dict[str, float]:
    by_phase = {f"perf/slowest_seconds/{name}": s for name, s in zip(PHASES, found.seconds, strict=True)}
    return {"perf/slowest_rank": found.rank, "perf/slowest_share": found.share, **by_phase}


def _words(found: Slowest, step: int, steps: int) -> str:
    seconds, phase = max(zip(found.seconds, PHASES, strict=True))
    return (
        f"step {step}: rank {found.rank} is slow, {steps} steps in a row: {found.share:.0%} more own work than its"
        f" likes, mostly in {phase} ({seconds:.2f} s more)"
    )
