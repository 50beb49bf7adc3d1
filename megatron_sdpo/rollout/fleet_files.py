"""What a fleet and its users tell each other through ``RUN_DIR/addresses/``: who is where, and who serves what.

``engine-0.json ...``, ``router.json`` and ``replaced-engine-0.json ...`` (how often, where it was) are written by the
fleets of the machines, ``confirmed.json`` and ``publishing`` (there while weights are sent) by the trainer.
``log_tail`` is for the logs beside them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from megatron_sdpo.rollout.control import EngineControl
from megatron_sdpo.types import EngineAddress

TAIL_LINES = 15
TAIL_WIDTH = 400
"""Characters shown of a line of a log: SGLang writes all its settings, pages of them, into one line."""
ROUTER = "router"


@dataclass(frozen=True, slots=True)
class Confirmed:
    """The engines that serve the newest version. Example: ``Confirmed("7-705bea216cbd0425", ("http://10.0.0.7:20011",))``"""

    stamp: str
    urls: tuple[str, ...]


class RunningFleet:
    """The engines of a run as the trainer sees them (reshard.publish.Fleet)."""

    def __init__(self, run_dir: Path, connect: Callable[[EngineAddress], EngineControl]) -> None:
        self._run_dir, self._connect = run_dir, connect

    def control(self, address: EngineAddress) -> EngineControl:
        return self._connect(address)

    def engines(self) -> tuple[EngineAddress, ...]:
        """Who is there to be sent weights to, which begins now and lasts until ``confirm`` (or ends the run)."""
        _publishing(self._run_dir).touch()
        return read_engines(self._run_dir)

    def all_of(self, count: int) -> tuple[EngineAddress, ...] | None:
        """All engines of a run of so many, or None while some are missing."""
        found = read_engines(self._run_dir)
        return found if len(found) == count else None

    def confirm(self, stamp: str, engines: Sequence[EngineAddress]) -> None:
        confirmed = Confirmed(stamp, tuple(address.url for address in engines))
        _write_atomically(_confirmed(self._run_dir), msgspec.json.encode(confirmed))
        _publishing(self._run_dir).unlink(missing_ok=True)


def write_address(run_dir: Path, address: EngineAddress) -> None:
    _write_atomically(run_dir / "addresses" / f"{address.name}.json", msgspec.json.encode(address))


def read_address(run_dir: Path, name: str) -> EngineAddress | None:
    """What a fleet wrote for ``name`` (``engine-0``, ``router``), or None when it is not there (yet)."""
    try:
        data = (run_dir / "addresses" / f"{name}.json").read_bytes()
    except FileNotFoundError:
        return None
    return msgspec.json.decode(data, type=EngineAddress)


def read_engines(run_dir: Path) -> tuple[EngineAddress, ...]:
    """The engines (not the router) of the running fleet, in order; empty when there is none (yet)."""
    names = [path.stem for path in (run_dir / "addresses").glob("engine-*.json")]
    names.sort(key=lambda name: int(name.removeprefix("engine-")))
    found = [read_address(run_dir, name) for name in names]
    return tuple(address for address in found if address is not None)


def read_confirmed(run_dir: Path) -> Confirmed | None:
    """None before anything was published."""
    try:
        return msgspec.json.decode(_confirmed(run_dir).read_bytes(), type=Confirmed)
    except FileNotFoundError:
        return None


def has_newcomers(run_dir: Path) -> bool:
    """Whether an engine waits for the version that the others serve."""
    confirmed = read_confirmed(run_dir)
    return confirmed is not None and any(address.url not in confirmed.urls for address in read_engines(run_dir))


def is_publishing(run_dir: Path) -> bool:
    """Whether the trainer is sending weights, or checking them."""
    return _publishing(run_dir).exists()


def note_replacements(run_dir: Path, name: str, count: int) -> None:
    """How often an engine has been replaced since this start of the run."""
    _write_atomically(run_dir / "addresses" / f"replaced-{name}.json", msgspec.json.encode(count))


def read_replacements(run_dir: Path) -> int:
    """Of all engines."""
    paths = (run_dir / "addresses").glob("replaced-*.json")
    return sum(msgspec.json.decode(path.read_bytes(), type=int) for path in paths)


def _publishing(run_dir: Path) -> Path:
    return run_dir / "addresses" / "publishing"


def _confirmed(run_dir: Path) -> Path:
    return run_dir / "addresses" / "confirmed.json"


def _write_atomically(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def log_tail(log: Path) -> str:
    """The last lines of a log; of a long one its beginning, and how much was left out."""
    lines = log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
    return "\n".join(
        line if len(line) <= TAIL_WIDTH else f"{line[:TAIL_WIDTH]} ... ({len(line) - TAIL_WIDTH} more characters)"
        for line in lines
    )
