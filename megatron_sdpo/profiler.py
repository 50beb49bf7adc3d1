"""torch.profiler over chosen steps of chosen ranks."""

from collections.abc import Collection
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

_NOT_OURS = ("step", "wait")
"""What has no work of the trainer's own: a profile begins after the wait for a batch."""
ROWS = 25
"""Of the table."""


class Profiler:
    """Profiles what ``steps`` do after their batch has come (a ``phases.Follower``).

    Writes, as each of these steps ends, ``folder/step-N-rank-M.json`` (a Chrome trace, the phases in it by name) and
    beside it, as .txt, the operators that took longest by themselves. ``details``: with shapes and memory, slower.
    """

    def __init__(self, folder: Path, rank: int, steps: Collection[int], details: bool = False) -> None:
        self._folder, self._rank, self._steps, self._details = folder, rank, steps, details
        self._inside = False
        self._profile: profile | None = None
        self._ranges: list[record_function] = []

    def began(self, step: int, name: str) -> None:
        if name == "step":
            self._inside = step in self._steps
        if not self._inside or name in _NOT_OURS:
            return
        if self._profile is None:
            self._profile = self._started()
        self._ranges.append(record_function(name))
        self._ranges[-1].__enter__()

    def ended(self, step: int, name: str) -> None:
        if name == "step":
            self._inside = False  # a checkpoint and an evaluation carry the step's number too
            done, self._profile = self._profile, None
            if done is not None:
                done.stop()
                self._write(done, f"step-{step}-rank-{self._rank}")
        elif self._inside and name not in _NOT_OURS:
            self._ranges.pop().__exit__(None, None, None)

    def _started(self) -> profile:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():  # not yet run on a GPU
            activities.append(ProfilerActivity.CUDA)
        started = profile(activities=activities, record_shapes=self._details, profile_memory=self._details)
        started.start()
        return started

    def _write(self, done: profile, name: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        done.export_chrome_trace(str(self._folder / f"{name}.json"))
        where = "cuda" if torch.cuda.is_available() else "cpu"
        averages = done.key_averages(group_by_input_shape=self._details)
        table = averages.table(sort_by=f"self_{where}_time_total", row_limit=ROWS)
        (self._folder / f"{name}.txt").write_text(table)
