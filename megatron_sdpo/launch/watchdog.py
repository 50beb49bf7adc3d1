"""Ranks that wait for one another for ever are ended in bounded time, and told apart.

A rank that was stopped, lost its node, or went another way than the others leaves them in a collective, which says
nothing. So every rank has a thread that writes, every few seconds, where its rank is into ``RUN_DIR/ranks/``: step,
phase, for how long, and which line its main thread is at. The file's count of these ticks is the sign of life; no two
clocks are compared.

Whoever finds itself in one phase for longer than ``ranks.timeout_s`` marks the run as hung. At their next tick all
ranks write the Python stacks of their threads to the log; the one that marked it reads how the others stand, leaves a
message with a line a rank, and ends; the launcher, or torchrun, ends the rest. Waiting for the coordinator ("wait"),
and what lies between steps (evaluation), are not bounded: what answers there has time limits of its own. But the others
wait there for the first rank, so they end when it has shown no life for as long; and it ends itself when it has waited
for one of them all that time.

A process that is stopped as a whole and continued later (``scontrol suspend``) is not hung: time counts only while the
thread runs. A rank alone that holds the interpreter's lock for ever is not noticed: its thread does not run either.
"""

import faulthandler
import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from megatron_sdpo.config import Config
from megatron_sdpo.launch.run_dir import RunDir

WAITING = ("", "wait")
"""Phases without a bound; "" is outside all."""
LONGEST_TICK_S = 10.0
PATIENCE_S = 10.0
"""How long a rank that lives may need to show it, besides its ticks."""
LINES = 16
"""At most so many ranks have a line of their own."""
_COLLECTIVES = ("torch/distributed/", "pipeline_parallel/p2p_communication.py")
"""Where a main thread that waits for other ranks is: gloo. Under NCCL it waits for its device, anywhere (not yet run on
a GPU)."""


class HungError(RuntimeError):
    """Ranks did not get on in a phase."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank is, in its own words. Example: ``Place(1, "node7", 12, "train", 31, 1803.0, "learner.py:250 …")``"""

    rank: int
    host: str
    step: int
    phase: str
    moves: int
    """Phases begun and ended so far: of two ranks, the one with fewer is behind."""
    seconds: float
    at: str
    """The line of its main thread."""
    in_collective: bool
    ticks: int
    has_shown_stacks: bool = False


class Watchdog:
    """Follows the phases of one rank (phases.Follower), from construction to ``close``."""

    def __init__(self, config: Config, run_dir: RunDir, rank: int, ranks: int) -> None:
        """``rank`` of ``ranks``; ``ranks.timeout_s`` of the configuration bounds each phase."""
        self._run_dir, self._rank, self._ranks, self._timeout_s = run_dir, rank, ranks, config.ranks.timeout_s
        self.tick_s = min(LONGEST_TICK_S, self._timeout_s / 20)
        self._stack: list[tuple[int, str]] = []
        self._moves, self._now = 0, (0, 0, "")  # moves, step, phase: replaced as a whole, for the other thread
        self._ticks, self._host = 0, socket.gethostname()
        self._main = threading.get_ident()
        self._closed = threading.Event()
        run_dir.ranks.mkdir(exist_ok=True)
        self._write(self._place(self._now, 0.0))  # a rank that stops before its first tick has a host already
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def began(self, step: int, name: str) -> None:
        self._stack.append((step, name))
        self._moved()

    def ended(self, step: int, name: str) -> None:
        self._stack.pop()
        self._moved()

    def close(self) -> None:
        """What this rank does from here on is not watched."""
        self._closed.set()

    def _moved(self) -> None:
        self._moves += 1
        self._now = (self._moves, *(self._stack[-1] if self._stack else (0, "")))

    def _watch(self) -> None:
        seen, seconds, last = self._now, 0.0, time.monotonic()
        shown, silent = 0, 0.0  # by the first rank
        held = 0.0  # the first rank by the others, while it seems to wait for the coordinator
        while not self._closed.wait(self.tick_s):
            now, time_s = self._now, time.monotonic()
            passed = min(time_s - last, 2 * self.tick_s)  # of a gap in which this thread did not run, two ticks count
            stays = now is seen
            seconds = seconds + passed if stays else 0.0
            ticks = first.ticks if (first := self._read(0)) else 0
            silent = silent + passed if ticks == shown else 0.0
            seen, last, shown = now, time_s, ticks
            place = self._place(now, seconds)
            self._write(place)
            held = held + passed if stays and self._rank == 0 and place.in_collective else 0.0
            waited = max(silent, held) if now[2] in WAITING else seconds
            overdue = waited > self._timeout_s
            if overdue and self._marks_hung():
                self._report(now, seconds)
            elif self._is_hung():
                self._end_with_the_others(now, seconds)

    def _place(self, now: tuple[int, int, str], seconds: float, has_shown_stacks: bool = False) -> Place:
        moves, step, phase = now
        at, in_collective = position(sys._current_frames().get(self._main))
        self._ticks += 1
        return Place(
            self._rank, self._host, step, phase, moves, seconds, at, in_collective, self._ticks, has_shown_stacks
        )

    def _write(self, place: Place) -> None:
        path = self._file(self._rank)
        temporary = path.with_suffix(".tmp")
        with suppress(OSError):  # a disk that is full for a moment: this rank only looks silent until then
            temporary.write_text(json.dumps(asdict(place)))
            temporary.replace(path)

    def _file(self, rank: int) -> Path:
        return self._run_dir.ranks / f"{rank:05d}.json"

    def _read(self, rank: int) -> Place | None:
        try:
            return Place(**json.loads(self._file(rank).read_text()))
        except (OSError, ValueError):  # not there, or not for a moment
            return None

    def _read_all(self) -> list[Place | None]:
        return [self._read(rank) for rank in range(self._ranks)]

    def _marks_hung(self) -> bool:
        """Whether this rank is the first, as far as it can tell: it ends in any case."""
        try:
            self._run_dir.hung.touch(exist_ok=False)
        except FileExistsError:
            return False
        except OSError:
            return True
        return True

    def _is_hung(self) -> bool:
        try:
            return self._run_dir.hung.exists()
        except OSError:
            return False

    def _report(self, now: tuple[int, int, str], seconds: float) -> None:
        try:
            self._show_stacks()
            failure = HungError(self._asked_of_all(now, seconds))
            self._run_dir.report_failure("trainer", failure)
            print(f"rank {self._rank}: {failure}", file=sys.stderr, flush=True)
        finally:  # whatever could not be written: this rank has hung
            os._exit(1)

    def _asked_of_all(self, now: tuple[int, int, str], seconds: float) -> str:
        """The report, once every rank has shown its stacks or has not in good time."""
        before = self._read_all()
        own = self._place(now, seconds, has_shown_stacks=True)
        deadline = time.monotonic() + PATIENCE_S + 3 * self.tick_s
        after = before
        others = [rank for rank in range(self._ranks) if rank != self._rank]
        while time.monotonic() < deadline and not all((p := after[r]) and p.has_shown_stacks for r in others):
            time.sleep(self.tick_s / 2)
            after = self._read_all()
        after[self._rank] = own
        return report(after, [_lives(*both) for both in zip(before, after, strict=True)], own, self._timeout_s)

    def _end_with_the_others(self, now: tuple[int, int, str], seconds: float) -> None:
        self._show_stacks()
        self._write(self._place(now, seconds, has_shown_stacks=True))
        time.sleep(2 * (PATIENCE_S + 3 * self.tick_s))  # the one that reports has ended long before, and this with it
        os._exit(1)

    def _show_stacks(self) -> None:
        """In one piece: many ranks write to the same log."""
        with tempfile.TemporaryFile() as file:
            file.write(f"Python stacks of rank {self._rank} on {self._host}, which did not get on:\n".encode())
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            os.write(sys.stderr.fileno(), file.read())


def _lives(before: Place | None, after: Place | None) -> bool:
    """Whether a rank has shown life since the run was marked as hung."""
    return after is not None and (after.has_shown_stacks or before is None or after.ticks > before.ticks)


def position(frame: FrameType | None) -> tuple[str, bool]:
    """The line of this package that a thread is at (or its innermost), and whether it waits for other ranks there."""
    inner, in_collective = frame, False
    while frame is not None:
        in_collective |= any(place in frame.f_code.co_filename for place in _COLLECTIVES)
        if "megatron_sdpo" in Path(frame.f_code.co_filename).parts[-3:-1]:
            inner = frame
            break
        frame = frame.f_back
    if inner is None:
        return "nowhere", False
    return f"{Path(inner.f_code.co_filename).name}:{inner.f_lineno} {inner.f_code.co_name}", in_collective


def report(places: Sequence[Place | None], alive: Sequence[bool], own: Place, timeout_s: float) -> str:
    """Who has not arrived where ``own`` is, and a line for each rank in question, those first; all, if few.

    Not arrived: a rank that is silent; one that is in an earlier phase than the foremost; and, where some wait in a
    collective, one that does not.
    """
    living = [place for place, lives in zip(places, alive, strict=True) if place is not None and lives]
    foremost = max(place.moves for place in living)
    waits = any(place.in_collective for place in living if place.moves == foremost)
    absent = [
        rank
        for rank, (place, lives) in enumerate(zip(places, alive, strict=True))
        if place is None or not lives or place.moves < foremost or (waits and not place.in_collective)
    ]
    where = f"phase {own.phase} of step {own.step}"
    who = f"not arrived: {_numbers(absent)}" if absent else "every rank is there, and their stacks tell where"
    rest = [rank for rank in range(len(places)) if rank not in absent]
    shown = [*absent[:LINES], *rest[: max(1, LINES - len(absent))]]
    lines = [_line(rank, places[rank], alive[rank]) for rank in shown]
    more = [f"and {len(places) - len(shown)} more ranks"] if len(shown) < len(places) else []
    return "\n".join(
        [
            f"the trainer ranks did not get on within ranks.timeout_s {timeout_s:g} s in {where}; {who}",
            *lines,
            *more,
            "the Python stacks of the ranks that live are in the trainer's log",
        ]
    )


def _line(rank: int, place: Place | None, lives: bool) -> str:
    if place is None:
        return f"rank {rank}: has never shown itself, silent"
    where = f"step {place.step}, phase {place.phase}" if place.phase else "outside all phases"
    return (
        f"rank {rank} on {place.host}: {where}, for {place.seconds:.0f} s, {'alive' if lives else 'silent'},"
        f" at {place.at}{' (in a collective)' if place.in_collective else ''}"
    )


def _numbers(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - LINES} more" if len(ranks) > LINES else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:LINES]))}{more}"
