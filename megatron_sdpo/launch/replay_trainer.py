"""A trainer rank that runs one step of a finished or failed run again: started by ``megatron-sdpo replay``.

It begins with the newest checkpoint at or before the step (else with the model's directory), trains from the journal up
to it without engines and without writing checkpoints, and takes it apart. The run's directory is only read; what this
one writes is in ``RUN_DIR/replay/step-N/``.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_sdpo import config as configuration
from megatron_sdpo.config import Config, ConfigError
from megatron_sdpo.launch.role import play
from megatron_sdpo.launch.run_dir import RunDir
from megatron_sdpo.launch.trainer import JournalSource, NoEngines, start, watchdog_of
from megatron_sdpo.loop import train
from megatron_sdpo.mcore import checkpoint
from megatron_sdpo.mcore import groups as parallel
from megatron_sdpo.mcore.finite import StoppedError
from megatron_sdpo.mcore.inspection import Found, InspectedLearner
from megatron_sdpo.phases import Phases
from megatron_sdpo.rollout.journal import Journal
from megatron_sdpo.tracking import Row, read_metrics
from megatron_sdpo.types import Batch, Evaluation, decode

REQUEST = "replay.json"
NAMED = 8
"""At most so many samples of a micro-batch are named."""
_OF_THIS_START = ("time/", "perf/", "sync/", "eval/")
"""Numbers that a replay does not have, or has of itself."""


@dataclass(frozen=True, slots=True)
class Request:
    """What ``megatron-sdpo replay`` asks for; in ``replay.json`` of the replay's directory."""

    run_dir: str
    step: int
    detect_anomaly: bool

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / REQUEST).write_text(json.dumps(dataclasses.asdict(self)))


class ReplaySource(JournalSource):
    """The batches of a run, and the accuracies that it recorded (the collapse guard may have gone by them)."""

    def __init__(self, config: Config, run_dir: RunDir, journal: Journal, step: int) -> None:
        super().__init__(config, journal)
        self._wanted, self._kept = config.rollout.prompts_per_step, run_dir.failure(step)
        self._counts, self._step = journal.counts(0), step
        self._rows = {int(row["step"] or 0): row for row in read_metrics(run_dir.path)}

    def batch(self, step: int) -> Batch:
        if step == self._step and self._kept.exists():
            return decode(self._kept.read_bytes(), Batch)
        if self._counts.get(step, 0) != self._wanted:
            raise ConfigError(
                f"the journal has {self._counts.get(step, 0)} of {self._wanted} groups of step {step}; only what is"
                " whole can be replayed"
            )
        return super().batch(step)

    def evaluate(self, version: int) -> Evaluation:
        accuracy = self._rows.get(version, {}).get("eval/accuracy")
        return Evaluation(version, {"eval/accuracy": math.nan if accuracy is None else accuracy})


class NoCheckpoints:
    """Nothing is kept of a replay (types.Checkpoints)."""

    def save_if_due(self, cursor: int) -> dict[str, float]:
        return {}

    def finish(self) -> None:
        pass


class LastRow:
    """The numbers of the newest step (types.MetricsLog)."""

    def __init__(self) -> None:
        self.row: dict[str, float] = {}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.row = dict(metrics)


def run(own_dir: RunDir) -> None:
    """Build the parts, get to the step, run it, say what was found."""
    config = configuration.load(own_dir.config)
    request = Request(**json.loads((own_dir.path / REQUEST).read_text()))
    run_dir, step = RunDir(Path(request.run_dir)), request.step
    watchdog = watchdog_of(config, own_dir)
    phases = Phases([watchdog])
    with phases("start"):
        groups = start(config)

    def say(words: str) -> None:
        if groups.rank == 0:
            print(words, flush=True)

    with phases("build"):
        learner = InspectedLearner(config, groups, step, lambda found: say(found_words(found)), request.detect_anomaly)
    with phases("resume"):
        resumed = checkpoint.load_latest(learner, run_dir.checkpoints, at_most=step)
    begins = "the model's directory" if resumed is None else f"the checkpoint of step {resumed.step}"
    say(f"begins with {begins}, {step - learner.step} steps before this one are trained from the journal")
    source = ReplaySource(config, run_dir, Journal(Path(config.debug.from_journal or "")), step)
    say(f"step {step}, {'a batch kept at its failure' if run_dir.failure(step).exists() else 'as journalled'}:")
    rows = LastRow()
    until = dataclasses.replace(config, steps=step + 1)  # of the loop; the learner's rates keep the run's
    try:
        train(until, source, learner, NoEngines(), NoCheckpoints(), rows, phases)
        recorded = next((row for row in read_metrics(run_dir.path) if row["step"] == step + 1), None)
        say(compared(rows.row, recorded, step + 1))
    except StoppedError as failure:  # on all ranks
        say(f"it fails again: {failure}")
    watchdog.close()
    parallel.shutdown()


def found_words(found: Found) -> str:
    """``mini-batch 1/2, micro-batch 3/4: gradient norm 0.8123`` and a line for each data rank."""
    lines = [
        f"mini-batch {found.mini_batch}/{found.mini_batches}, micro-batch {found.micro_batch}/{found.micro_batches}:"
        f" gradient norm {found.norm:.6g}"
    ]
    for rank, (ids, loss) in enumerate(zip(found.samples, found.losses, strict=True)):
        more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
        lines.append(f"  data rank {rank}: loss {loss:.6g}, {len(ids)} samples {' '.join(ids[:NAMED])}{more}")
    return "\n".join(lines)


def compared(replayed: Mapping[str, float], recorded: Row | None, row: int) -> str:
    """Whether the numbers of the step are those that the run recorded, to the bit; a line for each that is not."""
    if recorded is None:
        return f"metrics.jsonl has no row {row} to compare with: the run has not got there"
    own = {key: value if math.isfinite(value) else None for key, value in replayed.items()}
    keys = [key for key in sorted(own.keys() & recorded.keys()) if not key.startswith(_OF_THIS_START)]
    other = [key for key in keys if own[key] != recorded[key]]
    table = [f"  {key:32} {own[key]} here, {recorded[key]} recorded" for key in other]
    equal = f"row {row} of metrics.jsonl: {len(keys) - len(other)} of {len(keys)} numbers are equal to the bit"
    return "\n".join([equal, *table])


if __name__ == "__main__":
    play("trainer", run)
