"""The run directory, through which the roles find their configuration and each other."""

import dataclasses
import fcntl
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from megatron_sdpo import config as configuration
from megatron_sdpo.config import Config, ConfigError

_MAY_CHANGE = (
    *("steps", "run_dir", "name", "checkpoint.", "evaluation.", "tracking.", "publish.", "engine.", "spikes."),
    "ranks.",
    *("discovery.methods", "discovery.seeds"),
    *("layout.recompute", "layout.distribute_saved_activations", "teacher.placement"),
    *("debug.timeline", "debug.profile"),
)
"""What a resumed run may change; anything else would make it another experiment under the same name."""
_MAY_CHANGE_IF_NEARLY_THE_SAME = ("layout.",)
"""What changes the last digits only, so not of a deterministic run."""

POLL_S = 0.1

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RunDir:
    """Paths inside a run directory. Example: ``RunDir(Path("runs/minipipe-tp2")).checkpoints``"""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def attempts(self) -> Path:
        return self.path / "attempts"

    @property
    def trials(self) -> Path:
        return self.path / "trials"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def failures(self) -> Path:
        """Batches that training stopped at: ``step-00000012.msgpack``, read by ``types.decode(data, Batch)``."""
        return self.path / "failures"

    def failure(self, step: int) -> Path:
        return self.failures / f"step-{step:08d}.msgpack"

    def replay(self, step: int) -> "RunDir":
        """What ``megatron-sdpo replay`` writes when it runs a step of this run again."""
        return RunDir(self.path / "replay" / f"step-{step:08d}")

    @property
    def timeline(self) -> Path:
        """Each process's part of it (``timeline.write_timeline``)."""
        return self.path / "timeline"

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    @property
    def exported(self) -> Path:
        return self.path / "hf"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def addresses(self) -> Path:
        return self.path / "addresses"

    @property
    def ranks(self) -> Path:
        """Where each trainer rank says where it is (launch/watchdog.py)."""
        return self.path / "ranks"

    @property
    def hung(self) -> Path:
        """Exists from when a rank has found that the ranks do not get on."""
        return self.ranks / "hung"

    @property
    def slurm(self) -> Path:
        """``attempt-N/`` for each start of a batch job: its plan, what its nodes say, its logs (launch/cluster/)."""
        return self.path / "slurm"

    @property
    def token_file(self) -> Path:
        return self.path / "token"

    def token(self) -> str:
        return self.token_file.read_text()

    def prepare(self, config: Config) -> None:
        """Make the directory, or check that the run in it is this one; save the configuration, forget old addresses.

        A new token each time: processes of an earlier start cannot take part in this one.
        """
        try:
            for folder in (self.path, self.attempts, self.checkpoints, self.logs, self.addresses):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._not_writable(error) from error
        self.check_resumable(config)
        self._set_logs_aside()
        self.ranks.mkdir(exist_ok=True)
        for stale in (*self.addresses.iterdir(), *self.ranks.iterdir(), *self.logs.glob("*.failure")):
            stale.unlink()
        self.token_file.unlink(missing_ok=True)
        descriptor = os.open(self.token_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_urlsafe(32))
        configuration.save(config, self.config)

    def _set_logs_aside(self) -> None:
        """``logs/X.log`` is always of the newest start; those of earlier ones are in ``logs/earlier-N/``."""
        logs = list(self.logs.glob("*.log"))
        if not logs:
            return
        earlier = self.logs / f"earlier-{len(list(self.logs.glob('earlier-*'))) + 1}"
        earlier.mkdir()
        for log in logs:
            log.rename(earlier / log.name)

    def check_resumable(self, config: Config) -> None:
        """Refuse to continue another run (ConfigError): one with progress, whose settings differ in what they mean."""
        if self.config.exists() and self.has_progress():
            _check_same_run(configuration.load(self.config), config, self.path)

    def check_kind(self, discovery: bool) -> None:
        """Refuse to train where a discovery is, and the other way round (ConfigError): they would share a journal."""
        trained = any(self.attempts.glob("step-*.jsonl")) or (
            self.checkpoints.is_dir() and any(self.checkpoints.iterdir())
        )
        discovered = any(self.attempts.glob("*/*.jsonl"))
        if trained if discovery else discovered:
            held, wanted = ("a training run", "a discovery") if discovery else ("a discovery", "a training run")
            raise ConfigError(f"{self.path} holds {held}, not {wanted}; set another run_dir")

    def report_failure(self, role: str, failure: BaseException) -> None:
        """Leave the words of a role's first failure for whoever started it (``failure_of``)."""
        while isinstance(failure, BaseExceptionGroup):
            failure = failure.exceptions[0]
        with suppress(FileExistsError), (self.logs / f"{role}.failure").open("x") as file:
            file.write(str(failure) or repr(failure))

    def failure_of(self, role: str) -> str | None:
        path = self.logs / f"{role}.failure"
        return path.read_text() if path.exists() else None

    def has_progress(self) -> bool:
        """Something was sampled or trained here; until then the configuration may still change freely."""
        folders = [folder for folder in (self.attempts, self.checkpoints) if folder.is_dir()]
        return any(path.is_file() for folder in folders for path in folder.rglob("*"))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory; ConfigError when another start of the same run does."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / "lock").open("a")
        except OSError as error:
            raise self._not_writable(error) from error
        with lock as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"another process is running in {self.path}; stop it or set another run_dir"
                ) from None
            yield

    def _not_writable(self, error: OSError) -> ConfigError:
        return ConfigError(f"run_dir {self.path} cannot be written ({error.strerror}); set another run_dir")

    def coordinator_address(self) -> str | None:
        """Where the coordinator listens, once it does."""
        path = self.addresses / "coordinator"
        return path.read_text() if path.exists() else None

    def coordinator_beat(self) -> str | None:
        """What changes while the coordinator lives (rollout/wire.py); None before it has begun."""
        path = self.addresses / "coordinator-beat"
        return path.read_text() if path.exists() else None

    def publish_address(self, name: str, address: str) -> None:
        """Say where a role listens, atomically."""
        temporary = self.addresses / f".{name}.tmp"
        temporary.write_text(address)
        temporary.replace(self.addresses / name)


def wait_for(find: Callable[[], T | None], what: str, timeout_s: float) -> T:
    """Poll the shared run directory until ``find`` gives something; TimeoutError names what did not come."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = find()
        if found:
            return found
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not appear in the run directory within {timeout_s:.0f} s")
        time.sleep(POLL_S)


def _check_same_run(old: Config, new: Config, path: Path) -> None:
    before, after = leaves(dataclasses.asdict(old)), leaves(dataclasses.asdict(new))
    free = _MAY_CHANGE if new.deterministic else _MAY_CHANGE + _MAY_CHANGE_IF_NEARLY_THE_SAME
    changed = [key for key in after if before.get(key) != after[key] and not key.startswith(free)]
    if changed:
        key = changed[0]
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise ConfigError(
            f"{path} holds a run with {key}={before.get(key)!r}, not {after[key]!r}{more};"
            " set another run_dir, or the same value to continue that run"
        )


def leaves(tree: dict[str, object], prefix: str = "") -> dict[str, object]:
    """``dataclasses.asdict`` of a configuration by dotted key; a task's options are one value."""
    found: dict[str, object] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and key != "options":
            found |= leaves(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found
