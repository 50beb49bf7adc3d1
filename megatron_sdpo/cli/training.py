"""``train``, ``discover`` and ``replay``: all roles, to the end."""

import argparse
import dataclasses
import json
import shutil
import time
from pathlib import Path

from megatron_sdpo import config as configuration
from megatron_sdpo.cli.configuring import RAW, Commands, add_recipe, configuration_help, read_config, trainer_words
from megatron_sdpo.config import Config, ConfigError
from megatron_sdpo.launch.local import DISCOVERY, REPLAY, TRAINING, Program, RoleDied, run_locally
from megatron_sdpo.launch.preflight import check_replay, check_run
from megatron_sdpo.launch.run_dir import RunDir
from megatron_sdpo.tracking import read_metrics

FULL = 32_000_000
"""Bytes free below which a disk counts as full: what is written at one time may be as much."""


def add_train(commands: Commands) -> None:
    command = commands.add_parser(
        "train",
        formatter_class=RAW,
        help="run a recipe; the same command continues a run that was interrupted",
        description="Run a recipe on this machine: engines, coordinator and trainer ranks.\n"
        "The same command continues an interrupted run from its last checkpoint.",
        epilog=configuration_help(),
    )
    add_recipe(command)
    command.add_argument(
        "--deterministic",
        action="store_true",
        help="the same numbers each time, also after a kill; slower (short for deterministic=true)",
    )
    command.add_argument(
        "--from-journal",
        type=Path,
        metavar="DIR",
        help="without engines, on the attempts that the run in DIR has journalled (short for debug.from_journal=)",
    )
    command.add_argument(
        "--rollout-only",
        action="store_true",
        help="without a trainer: journal the attempts of all steps (short for debug.rollout_only=true)",
    )
    command.add_argument(
        "--dry-run", action="store_true", help="check everything, print the configuration, start nothing"
    )
    command.set_defaults(run=train)


def train(arguments: argparse.Namespace) -> None:
    """Preflight, all roles, report."""
    if arguments.deterministic:
        arguments.overrides = [*arguments.overrides, "deterministic=true"]
    if arguments.from_journal is not None:
        below = arguments.from_journal / "attempts"
        journal = below if below.is_dir() else arguments.from_journal
        arguments.overrides = [*arguments.overrides, f"debug.from_journal={journal}", "evaluation.every=0"]
    if arguments.rollout_only:
        arguments.overrides = [*arguments.overrides, "debug.rollout_only=true", "evaluation.every=0"]
    config = read_config(arguments)
    check_run(config)
    RunDir(Path(config.run_dir)).check_kind(discovery=False)
    RunDir(Path(config.run_dir)).check_resumable(config)
    if arguments.dry_run:
        print(json.dumps(dataclasses.asdict(config), indent=2))
        return
    run_dir = RunDir(Path(config.run_dir))
    began = time.perf_counter()
    print(f"{config.name}: {config.steps} steps in {run_dir.path}, trainer {trainer_words(config)}, ", end="")
    print(f"{config.engine.count} engine(s); starting takes about half a minute", flush=True)
    _run(config, run_dir, TRAINING)
    from megatron_sdpo.report import write_report  # loads matplotlib

    report = write_report(run_dir.path)
    scores = [row["eval/accuracy"] for row in read_metrics(run_dir.path) if row.get("eval/accuracy") is not None]
    if scores:
        print(f"held-out accuracy: {scores[0]:.1%} before, {scores[-1]:.1%} after")
    print(f"finished in {time.perf_counter() - began:.0f} s")
    print(f"report  {report}\ncurve   {report.with_name('curve.png')}")
    if config.debug.rollout_only:
        print(f"journal {run_dir.attempts}")
    else:
        print(f"model   {run_dir.exported} (Hugging Face format)")


def _run(config: Config, run_dir: RunDir, program: Program) -> None:
    """All roles to their end. On a full disk one may end without a word, as it cannot write its log either."""
    try:
        run_locally(config, run_dir, program)
    except RoleDied as error:
        disk = shutil.disk_usage(run_dir.path)
        if disk.free > FULL or not disk.total:
            raise
        words = f"The disk of {run_dir.path} is full ({disk.free / 1e6:.1f} MB free): make room."
        raise RoleDied(f"{error}\n{words}") from error


def add_discover(commands: Commands) -> None:
    command = commands.add_parser(
        "discover",
        formatter_class=RAW,
        help="solve hard questions one at a time by training on their own attempts; the same command continues",
        description="Test-time self-distillation: each question starts from the recipe's model and is trained on its\n"
        "own attempts until one succeeds or discovery.budget is spent, beside baselines that do not train.\n"
        "The same command continues an interrupted run; finished trials are not made again.",
        epilog=configuration_help(),
    )
    add_recipe(command)
    command.add_argument(
        "--questions", metavar="FILE", help="questions as JSON lines (short for task.options.questions=FILE)"
    )
    command.add_argument(
        "--methods", metavar="NAMES", help="some of best_of_k,multi_turn,sdpo (short for discovery.methods=[...])"
    )
    command.add_argument(
        "--dry-run", action="store_true", help="check everything, print the configuration, start nothing"
    )
    command.set_defaults(run=discover)


def discover(arguments: argparse.Namespace) -> None:
    """Preflight, all roles, what was found."""
    config = _discovery_config(arguments)
    check_run(config)
    run_dir = RunDir(Path(config.run_dir))
    run_dir.check_kind(discovery=True)
    run_dir.check_resumable(config)
    if arguments.dry_run:
        print(json.dumps(dataclasses.asdict(config), indent=2))
        return
    began = time.perf_counter()
    print(
        f"{config.name}: {', '.join(config.discovery.methods)} in {run_dir.path}, trainer {trainer_words(config)}, ",
        end="",
    )
    print(f"{config.engine.count} engine(s); starting takes about half a minute", flush=True)
    _run(config, run_dir, DISCOVERY)
    from megatron_sdpo.report.discovery import summary_lines, write_discovery  # loads matplotlib

    page = write_discovery(run_dir.path)
    print("\n".join(summary_lines(run_dir.path)))
    print(f"finished in {time.perf_counter() - began:.0f} s")
    print(f"report  {page}\ncurve   {page.with_name('discovery.png')}\nnumbers {page.with_name('discovery.json')}")


def _discovery_config(arguments: argparse.Namespace) -> Config:
    """With the schedule of one trial."""
    given = {"task.options.questions": arguments.questions}
    if arguments.methods is not None:
        given["discovery.methods"] = json.dumps([name for name in arguments.methods.split(",") if name])
    arguments.overrides = [f"{k}={v}" for k, v in given.items() if v is not None] + arguments.overrides
    if any(override.startswith("steps=") for override in arguments.overrides):
        raise ConfigError(
            "the steps of a trial are discovery.budget / rollout.attempts_per_prompt; set discovery.budget instead of"
            " steps"
        )
    config = read_config(arguments)
    configuration.check_discovery(config)
    return dataclasses.replace(config, steps=config.discovery.budget // config.rollout.attempts_per_prompt)


def add_replay(commands: Commands) -> None:
    command = commands.add_parser(
        "replay",
        formatter_class=RAW,
        help="run one step of a run again, micro-batch by micro-batch",
        description="Run one step of a run again, from the newest checkpoint before it and the journal: losses,\n"
        "samples and gradient norms of each micro-batch, and whether the numbers are those of metrics.jsonl.\n"
        "A batch that training stopped at (RUN_DIR/failures/) is used for its step.",
    )
    command.add_argument("run_dir", type=Path)
    command.add_argument(
        "--step",
        type=int,
        required=True,
        metavar="S",
        help="the batch, as messages and failures/ count: it makes weights S into S + 1, whose row is S + 1",
    )
    command.add_argument(
        "--detect-anomaly",
        action="store_true",
        help="have autograd name the operation whose backward pass made a NaN (the log shows where it was called)",
    )
    command.set_defaults(run=replay)


def replay(arguments: argparse.Namespace) -> None:
    """One step of a run once more, taken apart; the run's directory is only read, but for ``replay/`` in it."""
    run_dir, step = RunDir(arguments.run_dir), arguments.step
    config = configuration.load(run_dir.config)
    run_dir.check_kind(discovery=False)
    journal = Path(config.debug.from_journal or run_dir.attempts)
    check_replay(run_dir, config, journal, step)
    from megatron_sdpo.launch.replay_trainer import Request  # loads torch and megatron

    own = run_dir.replay(step)
    Request(str(run_dir.path), step, arguments.detect_anomaly).save(own.path)
    debug = dataclasses.replace(config.debug, from_journal=str(journal))
    print(f"replay of step {step} of {run_dir.path}, trainer {trainer_words(config)}; log {own.logs / 'trainer.log'}")
    run_locally(dataclasses.replace(config, run_dir=str(own.path), debug=debug), own, REPLAY)
