"""Finished groups on disk before anybody trains on them: ``attempts/step-00000004.jsonl``, one group a line.

A run that was killed finds here what had been finished: those groups are used, not sampled again, and
since a group belongs to one step, none is trained on twice.
"""

import logging
import os
from pathlib import Path

import msgspec

from megatron_sdpo.types import Group

logger = logging.getLogger(__name__)


class JournalError(RuntimeError):
    """A journal file holds something that this program did not write."""


class Journal:
    """The groups of every step, appended one by one; each is on disk when ``append`` returns."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def append(self, group: Group) -> None:
        with self._path(group.step).open("ab") as file:
            file.write(msgspec.json.encode(group) + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def groups(self, step: int) -> dict[int, Group]:
        """Slot -> finished group. A last line that a kill cut is dropped from the file, with a warning.

        Raises JournalError, naming file and line, for any other line that is not a group of this step, or a
        slot that occurs twice.
        """
        path = self._path(step)
        if not path.exists():
            return {}
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            logger.warning("%s: dropped a last line that was cut while it was written", path)
            os.truncate(path, whole)
        found: dict[int, Group] = {}
        for number, line in enumerate(data[:whole].splitlines(), start=1):
            try:
                group = msgspec.json.decode(line, type=Group)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise JournalError(f"{path} line {number} is not a group: {error}") from error
            if group.step != step or group.slot in found:
                raise JournalError(f"{path} line {number} holds step {group.step} slot {group.slot} out of place")
            found[group.slot] = group
        return found

    def counts(self, first: int) -> dict[int, int]:
        """Step -> whole groups on disk, of the steps from ``first`` on that have any."""
        found = {int(path.stem.removeprefix("step-")): path for path in self._folder.glob("step-*.jsonl")}
        counts = {step: path.read_bytes().count(b"\n") for step, path in sorted(found.items()) if step >= first}
        return {step: count for step, count in counts.items() if count}

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}.jsonl"
