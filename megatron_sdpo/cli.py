"""The command line: ``megatron-sdpo train | discover | evaluate | serve | convert | plan | replay | report``.

Exit codes: 0 done, 1 a running role failed, 2 the request cannot work (one sentence on standard error),
128 + n stopped by signal n.
"""

import argparse
import asyncio
import dataclasses
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_sdpo import __version__
from megatron_sdpo import config as configuration
from megatron_sdpo.config import Config, ConfigError
from megatron_sdpo.launch.local import DISCOVERY, REPLAY, Interrupted, RoleDied, run_locally
from megatron_sdpo.launch.preflight import check_engines, check_replay, check_run
from megatron_sdpo.launch.run_dir import RunDir
from megatron_sdpo.rollout.control import EngineError
from megatron_sdpo.tracking import read_metrics
from recipes import recipe, recipes


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    wrong = [argument for argument in rest if argument.startswith("-") or "=" not in argument]
    if wrong or (rest and not hasattr(parsed, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(wrong or rest)}")
    if rest:  # argparse stops collecting key=value at the first option
        parsed.overrides = [*parsed.overrides, *rest]
    try:
        parsed.run(parsed)
    except (ConfigError, EngineError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RoleDied as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except Interrupted as error:
        print(str(error), file=sys.stderr)
        sys.exit(128 + error.number)
    except KeyboardInterrupt:  # before there was anything to stop
        sys.exit(128 + signal.SIGINT)


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
    config = _config(arguments)
    check_run(config)
    RunDir(Path(config.run_dir)).check_kind(discovery=False)
    RunDir(Path(config.run_dir)).check_resumable(config)
    if arguments.dry_run:
        print(json.dumps(dataclasses.asdict(config), indent=2))
        return
    run_dir = RunDir(Path(config.run_dir))
    began = time.perf_counter()
    print(f"{config.name}: {config.steps} steps in {run_dir.path}, trainer {_trainer_words(config)}, ", end="")
    print(f"{config.engine.count} engine(s); starting takes about half a minute", flush=True)
    run_locally(config, run_dir)
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
        f"{config.name}: {', '.join(config.discovery.methods)} in {run_dir.path}, trainer {_trainer_words(config)}, ",
        end="",
    )
    print(f"{config.engine.count} engine(s); starting takes about half a minute", flush=True)
    run_locally(config, run_dir, DISCOVERY)
    from megatron_sdpo.report.discovery import summary_lines, write_discovery  # loads matplotlib

    page = write_discovery(run_dir.path)
    print("\n".join(summary_lines(run_dir.path)))
    print(f"finished in {time.perf_counter() - began:.0f} s")
    print(f"report  {page}\ncurve   {page.with_name('discovery.png')}\nnumbers {page.with_name('discovery.json')}")


def evaluate(arguments: argparse.Namespace) -> None:
    """One engine, the recipe's held-out questions, one JSON object."""
    from megatron_sdpo.launch.serving import evaluate_model  # loads aiohttp and the engine's client only when needed

    config = _with_model(_config(arguments), arguments.model)
    check_run(config, must_evaluate=True)
    evaluation = asyncio.run(evaluate_model(config))
    print(json.dumps(evaluation.metrics, indent=2))


def serve(arguments: argparse.Namespace) -> None:
    """Engines until interrupted."""
    from megatron_sdpo.launch.serving import serve_model

    config = _with_model(_config(arguments), arguments.model)
    if not arguments.run_dir:  # the recipe's own directory may hold a run, whose configuration it keeps
        config = dataclasses.replace(config, run_dir=f"{config.run_dir}-serve")
    check_engines(config)
    serve_model(config)


def convert(arguments: argparse.Namespace) -> None:
    """A run's checkpoint -> Hugging Face directory, or Hugging Face directory -> sharded checkpoint."""
    from megatron_sdpo.launch.convert import convert_checkpoint  # loads torch and megatron

    print(convert_checkpoint(arguments.source, arguments.target, arguments.step))


def report(arguments: argparse.Namespace) -> None:
    """One page and one picture of what a run directory holds."""
    from megatron_sdpo.report import write_report  # loads matplotlib
    from megatron_sdpo.report.discovery import write_discovery

    write = write_discovery if RunDir(arguments.run_dir).trials.is_dir() else write_report
    print(write(arguments.run_dir))


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
    print(f"replay of step {step} of {run_dir.path}, trainer {_trainer_words(config)}; log {own.logs / 'trainer.log'}")
    run_locally(dataclasses.replace(config, run_dir=str(own.path), debug=debug), own, REPLAY)


def plan(arguments: argparse.Namespace) -> None:
    """Memory, time and a verdict, from the configuration alone."""
    from megatron_sdpo.launch.planning import plan_words  # loads torch

    lengths = (arguments.prompt_tokens, arguments.response_tokens, arguments.teacher_prompt_tokens)
    config = _config(arguments)
    print(plan_words(config, arguments.nodes, arguments.gpu, arguments.architecture, lengths, arguments.suggest))


def _config(arguments: argparse.Namespace) -> Config:
    overrides = list(arguments.overrides)
    if arguments.layout is not None:
        overrides = [*configuration.layout_overrides(arguments.layout), *overrides]
    if arguments.run_dir is not None:
        overrides.append(f"run_dir={arguments.run_dir}")
    config = configuration.apply_overrides(recipe(arguments.recipe), overrides)
    configuration.check(config)
    return config


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
    config = _config(arguments)
    configuration.check_discovery(config)
    return dataclasses.replace(config, steps=config.discovery.budget // config.rollout.attempts_per_prompt)


def _trainer_words(config: Config) -> str:
    return f"{configuration.layout_name(config.layout)} on {config.layout.world_size} rank(s)"


def _with_model(config: Config, model: str | None) -> Config:
    if model is None:
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, path=model))


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="megatron-sdpo",
        formatter_class=raw,
        description="Post-train language models with SDPO: Megatron-core trains, SGLang generates.",
        epilog="Start with `megatron-sdpo train minipipe`: it needs two CPU cores and a few minutes.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser(
        "train",
        formatter_class=raw,
        help="run a recipe; the same command continues a run that was interrupted",
        description="Run a recipe on this machine: engines, coordinator and trainer ranks.\n"
        "The same command continues an interrupted run from its last checkpoint.",
        epilog=_configuration_help(),
    )
    _recipe_arguments(command)
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

    command = commands.add_parser(
        "discover",
        formatter_class=raw,
        help="solve hard questions one at a time by training on their own attempts; the same command continues",
        description="Test-time self-distillation: each question starts from the recipe's model and is trained on its\n"
        "own attempts until one succeeds or discovery.budget is spent, beside baselines that do not train.\n"
        "The same command continues an interrupted run; finished trials are not made again.",
        epilog=_configuration_help(),
    )
    _recipe_arguments(command)
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

    command = commands.add_parser("evaluate", help="score a model on a recipe's held-out questions")
    _recipe_arguments(command)
    command.add_argument("--model", help="Hugging Face directory; default: the recipe's model")
    command.set_defaults(run=evaluate)

    command = commands.add_parser("serve", help="start a recipe's engines and wait; the token is in RUN_DIR/token")
    _recipe_arguments(command)
    command.add_argument("--model", help="Hugging Face directory; default: the recipe's model")
    command.set_defaults(run=serve)

    command = commands.add_parser(
        "convert",
        help="run checkpoint -> Hugging Face directory, or Hugging Face directory -> Megatron checkpoint",
    )
    command.add_argument("source", type=Path, help="a run directory, or a Hugging Face directory")
    command.add_argument("target", type=Path, help="directory to write; must not exist")
    command.add_argument("--step", type=int, help="which checkpoint of the run; default: the newest")
    command.set_defaults(run=convert)

    command = commands.add_parser(
        "plan",
        help="what a recipe needs: memory by item, seconds by phase, whether it fits",
        description="Predict memory and time from the configuration and the model's config.json; nothing is started.",
    )
    _recipe_arguments(command)
    command.add_argument("--nodes", type=int, default=1, help="of eight GPUs each")
    command.add_argument("--gpu", default="h100-80gb", help="a100-80gb, h100-80gb, h200-141gb, b200-180gb")
    command.add_argument("--architecture", help="a published model by name, or a directory with a config.json")
    command.add_argument("--suggest", action="store_true", help="rank the layouts of as many trainer ranks")
    for name in ("prompt", "response", "teacher-prompt"):
        command.add_argument(f"--{name}-tokens", type=int, metavar="N", help="of an average sample")
    command.set_defaults(run=plan)

    command = commands.add_parser(
        "replay",
        formatter_class=raw,
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

    command = commands.add_parser("report", help="write RUN_DIR/report.html and curve.png")
    command.add_argument("run_dir", type=Path)
    command.set_defaults(run=report)
    return parser


def _recipe_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", help=f"one of: {', '.join(sorted(recipes()))}")
    command.add_argument(
        "overrides", nargs="*", metavar="key=value", help="change one configuration value, e.g. optim.lr=1e-3"
    )
    command.add_argument("--layout", help=configuration.LAYOUT_HELP)
    command.add_argument("--run-dir", help="where everything is written (short for run_dir=)")


def _configuration_help() -> str:
    lines = ["configuration keys (change them with key=value):"]
    for key, (kind, default) in configuration.fields_by_name().items():
        shown = "set by the recipe" if default is dataclasses.MISSING else f"default {json.dumps(default)}"
        lines.append(f"  {key:36} {configuration.type_words(kind)}; {shown}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
