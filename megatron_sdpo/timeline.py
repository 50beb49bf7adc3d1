"""Who did what when: every process writes its part, and the parts become one file for chrome://tracing and Perfetto.

A part is a file of JSON lines, each written at once, so that a killed process leaves what it did until then.
"""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

Track = tuple[str, str]
"""Whose line an event is drawn on: process and thread, by the names that are shown. ``("trainer rank 0", "phases")``"""


class Timeline:
    """One process's part. Calls may come from several threads.

    What is drawn on one track must nest; for what runs side by side there are ``lane``s.

    Example:
        timeline = Timeline(run_dir / "timeline", "coordinator")
        with timeline.span(("coordinator", "requests"), "batch", step=4):
            ...
    """

    def __init__(self, folder: Path, writer: str) -> None:
        """A new file in ``folder``, which may hold others of the same writer."""
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"{writer}-{time.time_ns()}.jsonl").open("w", buffering=1)
        self._lock = threading.Lock()
        self._lanes: set[Track] = set()
        self._write({"clock": _clock(), "offset": time.time_ns() // 1000 - _now(), "writer": writer})

    def begin(self, track: Track, name: str, **arguments: Any) -> None:
        """``arguments`` (JSON) are shown with the event."""
        self._write({"ph": "B", "track": track, "name": name, "args": arguments})

    def end(self, track: Track) -> None:
        """Of what began last on the track."""
        self._write({"ph": "E", "track": track})

    def count(self, track: Track, name: str, value: float) -> None:
        """A curve's next value."""
        self._write({"ph": "C", "track": track, "name": name, "args": {name: value}})

    @contextmanager
    def span(self, track: Track, name: str, **arguments: Any) -> Iterator[None]:
        self.begin(track, name, **arguments)
        try:
            yield
        finally:
            self.end(track)

    @contextmanager
    def lane(self, process: str, kind: str) -> Iterator[Track]:
        """A track that nobody else in a lane of this kind draws on within the block; as few as are needed."""
        with self._lock:
            number = next(n for n in range(len(self._lanes) + 1) if (process, f"{kind} {n}") not in self._lanes)
            track = (process, f"{kind} {number}")
            self._lanes.add(track)
        try:
            yield track
        finally:
            with self._lock:
                self._lanes.remove(track)

    def close(self) -> None:
        self._file.close()

    def _write(self, event: dict[str, Any]) -> None:
        with self._lock:  # also of the clock: a part is in the order of its times
            self._file.write(json.dumps({"ts": _now(), **event}) + "\n")


class PhaseTimeline:
    """Draws the phases of a rank (a ``phases.Follower``)."""

    def __init__(self, timeline: Timeline, track: Track) -> None:
        self._timeline, self._track = timeline, track

    def began(self, step: int, name: str) -> None:
        self._timeline.begin(self._track, name, step=step)

    def ended(self, step: int, name: str) -> None:
        self._timeline.end(self._track)


def write_timeline(run_dir: Path) -> Path | None:
    """``run_dir/timeline.json`` from the parts in ``run_dir/timeline/``; None where there are none.

    A process that was killed has its last events ended where its part ends. Works while the run goes on.
    """
    parts = [part for path in sorted((run_dir / "timeline").glob("*.jsonl")) if (part := _read(path))]
    if not parts:
        return None
    offsets: dict[str, int] = {}
    events: list[dict[str, Any]] = []
    for header, found in sorted(parts, key=lambda part: part[0]["ts"] + part[0]["offset"]):
        offset = offsets.setdefault(header["clock"], header["offset"])  # one for all processes with the same clock
        events += [{**event, "ts": event["ts"] + offset} for event in _ended(found)]
    first = min((event["ts"] for event in events), default=0)
    numbers = _numbers({tuple(event["track"]) for event in events})
    content = {
        "traceEvents": [*_names(numbers), *(_placed(event, numbers, first) for event in events)],
        "displayTimeUnit": "ms",
        "otherData": {"began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(first / 1e6))},
    }
    path, temporary = run_dir / "timeline.json", run_dir / ".timeline.json.tmp"
    temporary.write_text(json.dumps(content))
    temporary.replace(path)
    return path


def _now() -> int:
    """Microseconds on a clock that never goes back and that all processes of a machine share."""
    return time.monotonic_ns() // 1000


def _clock() -> str:
    """The same for two processes whose ``_now`` can be compared: one machine, not restarted in between."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return "unknown"


def _read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """Header and events; the last line may be cut off."""
    lines = []
    for line in path.read_text().split("\n"):
        with suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return (lines[0], lines[1:]) if lines else None


def _ended(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With an end for everything that began."""
    open_tracks: list[list[str]] = []
    for event in events:
        if event["ph"] == "B":
            open_tracks.append(event["track"])
        elif event["ph"] == "E":
            last = max(i for i, track in enumerate(open_tracks) if track == event["track"])
            del open_tracks[last]
    ends = [{"ph": "E", "track": track, "ts": events[-1]["ts"], "args": {"cut": True}} for track in open_tracks]
    return [*events, *ends]


def _numbers(tracks: set[Track]) -> dict[Track, tuple[int, int]]:
    """Track -> (pid, tid), in the order in which they are shown."""
    processes = sorted({process for process, _ in tracks}, key=_by_number)
    return {
        (process, thread): (pid, tid)
        for pid, process in enumerate(processes, 1)
        for tid, thread in enumerate(sorted((t for p, t in tracks if p == process), key=_by_number), 1)
    }


def _by_number(name: str) -> tuple[str, int]:
    """``group 9`` comes before ``group 10``."""
    words = name.rstrip("0123456789")
    return words, int(name[len(words) :] or -1)


def _names(numbers: dict[Track, tuple[int, int]]) -> list[dict[str, Any]]:
    named = []
    for (process, thread), (pid, tid) in numbers.items():
        where = {"ph": "M", "pid": pid, "tid": tid, "ts": 0}
        named.append({**where, "name": "process_name", "args": {"name": process}})
        named.append({**where, "name": "process_sort_index", "args": {"sort_index": pid}})
        named.append({**where, "name": "thread_name", "args": {"name": thread}})
        named.append({**where, "name": "thread_sort_index", "args": {"sort_index": tid}})
    return named


def _placed(event: dict[str, Any], numbers: dict[Track, tuple[int, int]], first: int) -> dict[str, Any]:
    process, thread = event["track"]
    pid, tid = numbers[process, thread]
    rest = {key: value for key, value in event.items() if key != "track"}
    return {**rest, "ts": event["ts"] - first, "pid": pid, "tid": tid}
