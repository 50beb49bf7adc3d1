"""What a finished trial leaves behind: ``trials/METHOD-qQUESTION-sSEED.json``, one file each, whole or not there."""

import os
from dataclasses import dataclass
from pathlib import Path

import msgspec

from megatron_sdpo.config import Config, ConfigError
from megatron_sdpo.types import Question

BEST_OF_K = "best_of_k"
SDPO = "sdpo"


@dataclass(frozen=True, slots=True)
class TrialId:
    """Which trial: ``question`` is the place among the run's questions. Example: ``TrialId("sdpo", 3, 1)``"""

    method: str
    question: int
    seed: int


@dataclass(frozen=True, slots=True)
class Exchange:
    """An attempt and what the verifier said. Example: ``Exchange("over 2", 0.0, "sh: over: not found")``"""

    text: str
    reward: float
    feedback: str


@dataclass(frozen=True, slots=True)
class Trial:
    """One finished trial.

    Example: ``Trial(TrialId("sdpo", 3, 1), question, attempts=64, successes=1, first_success=57, path=..., steps=...)``

    ``first_success`` counts attempts from 1 and is None when there was none; ``attempts`` were made in all (the last
    batch is sampled as a whole). ``path`` is the discovering attempt after the failures just before it, oldest first.
    ``steps`` has the numbers of each training step, or of the whole trial where nothing is trained.
    """

    id: TrialId
    question: Question
    attempts: int
    successes: int
    first_success: int | None
    path: tuple[Exchange, ...]
    steps: tuple[dict[str, float], ...]


class TrialFiles:
    """The finished trials of a run directory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def has(self, id: TrialId) -> bool:
        return self._path(id).exists()

    def save(self, trial: Trial) -> None:
        """On disk when this returns; a kill leaves the whole file or none."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._path(trial.id)
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(trial), indent=1) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    def load(self, id: TrialId) -> Trial:
        return _read(self._path(id))

    def all(self) -> list[Trial]:
        """By method, seed and question."""
        trials = [_read(path) for path in self._folder.glob("*.json")]
        return sorted(trials, key=lambda trial: (trial.id.method, trial.id.seed, trial.id.question))

    def _path(self, id: TrialId) -> Path:
        return self._folder / f"{id.method}-q{id.question:04d}-s{id.seed}.json"


def planned(config: Config, questions: int) -> list[TrialId]:
    """Every trial of a run in the order of their turn; all questions have one before any has the next seed."""
    discovery = config.discovery
    trials: list[TrialId] = []
    for method in discovery.methods:
        names = [f"multi_turn-{n}" for n in discovery.multi_turn_memory] if method == "multi_turn" else [method]
        seeds = 1 if method == BEST_OF_K else discovery.seeds  # its attempts are independent: more of them say the same
        trials += [TrialId(name, q, seed) for name in names for seed in range(seeds) for q in range(questions)]
    return trials


def memory_of(id: TrialId) -> int:
    """How many feedbacks a turn of a multi_turn trial reads."""
    return int(id.method.removeprefix("multi_turn-"))


def _read(path: Path) -> Trial:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Trial)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a finished trial ({error}); remove it and the trial is made again") from error
