"""``recipes``, ``keys``, ``plan``, ``metrics`` and ``report``: what there is, what a run would need, what it was."""

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path

from megatron_sdpo.cli.configuring import RAW, Commands, add_recipe, key_line, read_config
from megatron_sdpo.config import ConfigError, fields_by_name, layout_name, meanings
from megatron_sdpo.launch.run_dir import RunDir
from megatron_sdpo.measures import LARGEST, MEASURES, Measure, in_order, measure, shown
from megatron_sdpo.tracking import METRICS_FILE, read_metrics
from recipes import recipes


def add_recipes(commands: Commands) -> None:
    command = commands.add_parser("recipes", help="list the recipes: objective, model, task, trainer ranks, engines")
    command.set_defaults(run=list_recipes)


def list_recipes(arguments: argparse.Namespace) -> None:
    """A line each, aligned."""
    lines = [("recipe", "objective", "model", "task", "ranks", "layout", "engines")]
    for name, make in recipes().items():
        config = make()
        model, layout, engine = Path(config.model.path).name, config.layout, config.engine
        engines = f"{engine.count}" + (f" of {engine.tensor_parallel} GPUs" if engine.tensor_parallel > 1 else "")
        what = (config.objective.kind, model, config.task.name)
        lines.append((name, *what, str(layout.world_size), layout_name(layout), engines))
    _print_aligned(lines)


def _print_aligned(lines: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())


def add_keys(commands: Commands) -> None:
    command = commands.add_parser(
        "keys",
        help="what every configuration key means",
        description="What configuration keys mean, with type and default: all, or those with a WORD in their name or\n"
        "meaning (`keys teacher.`, `keys fp8`, `keys memory`).",
        formatter_class=RAW,
    )
    command.add_argument("words", nargs="*", metavar="WORD", help="keys that have all of these")
    command.set_defaults(run=list_keys)


def list_keys(arguments: argparse.Namespace) -> None:
    """By section; what a key means below it."""
    keys, said, section = fields_by_name(), meanings(), ""
    found = [key for key in keys if all(word.lower() in f"{key} {said[key]}".lower() for word in arguments.words)]
    if not found:
        raise ConfigError(f"no configuration key has {' and '.join(arguments.words)} in its name or meaning")
    for key in found:
        above = key.rpartition(".")[0]
        if above != section:
            print(f"\n{above}: {textwrap.fill(said[above], 110, subsequent_indent='    ')}")
            section = above
        print(f"  {key_line(key, *keys[key])}")
        if said[key]:
            print(textwrap.indent(textwrap.fill(said[key], 106, break_on_hyphens=False), " " * 6))


def add_plan(commands: Commands) -> None:
    command = commands.add_parser(
        "plan",
        help="what a recipe needs: memory by item, seconds by phase, whether it fits",
        description="Predict memory and time from the configuration and the model's config.json; nothing is started.",
    )
    add_recipe(command)
    command.add_argument("--nodes", type=int, help="of eight GPUs each; default: as many as the recipe fills")
    command.add_argument("--gpu", default="h100-80gb", help="a100-80gb, h100-80gb, h200-141gb, b200-180gb")
    command.add_argument("--architecture", help="a published model by name, or a directory with a config.json")
    command.add_argument(
        "--colocated", action="store_true", help="as if engines and trainer took turns on the same GPUs"
    )
    command.add_argument("--suggest", action="store_true", help="rank the layouts of as many trainer ranks")
    for name in ("prompt", "response", "teacher-prompt"):
        command.add_argument(f"--{name}-tokens", type=int, metavar="N", help="of an average sample")
    command.set_defaults(run=plan)


def plan(arguments: argparse.Namespace) -> None:
    """Memory, time and a verdict, from the configuration alone."""
    from megatron_sdpo.launch.planning import plan_words  # loads torch

    lengths = (arguments.prompt_tokens, arguments.response_tokens, arguments.teacher_prompt_tokens)
    config = read_config(arguments)
    asked = (arguments.architecture, lengths, arguments.suggest, arguments.colocated)
    print(plan_words(config, arguments.nodes, arguments.gpu, *asked))


def add_metrics(commands: Commands) -> None:
    command = commands.add_parser(
        "metrics",
        help="what every number of metrics.jsonl means, and what a run's are",
        description="What every number of metrics.jsonl means, its unit, and, with RUN_DIR, its last value there.",
    )
    command.add_argument("run_dir", type=Path, nargs="?", metavar="RUN_DIR")
    command.set_defaults(run=metrics)


def metrics(arguments: argparse.Namespace) -> None:
    """A line for each number: of a run those that it records."""
    if arguments.run_dir is None:
        lines = [("key", "unit", "meaning"), *((key, m.unit, m.words) for key, m in MEASURES.items())]
        _print_aligned(lines)
        print(f"A name with {LARGEST} is the largest of all tokens instead of their mean.")
        return
    rows = read_metrics(arguments.run_dir)
    if not rows:
        raise ConfigError(f"{arguments.run_dir} has no {METRICS_FILE} with a row; pass the directory of a run")
    last = {key: value for row in rows for key, value in row.items()}
    lines = [("key", "last value", "unit", "meaning")]
    for key in in_order(last):
        found = measure(key) or Measure("", "")
        lines.append((key, shown(last[key]), found.unit, found.words))
    _print_aligned(lines)


def add_report(commands: Commands) -> None:
    command = commands.add_parser(
        "report",
        help="write RUN_DIR/report.html and curve.png; of several runs one page that compares them",
        description="Write report.html and curve.png into RUN_DIR, also of a run that goes on or was killed.\n"
        "Of several runs: their curves in one picture and the settings in which they differ, as --out.",
        formatter_class=RAW,
    )
    command.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR")
    command.add_argument("--out", type=Path, metavar="FILE.html", help="of several runs; default: comparison.html")
    command.set_defaults(run=report)


def report(arguments: argparse.Namespace) -> None:
    """One page and one picture of what run directories hold."""
    from megatron_sdpo.report import write_comparison, write_report  # loads matplotlib
    from megatron_sdpo.report.discovery import write_discovery

    run_dirs = arguments.run_dirs
    if len(run_dirs) > 1:
        print(write_comparison(run_dirs, arguments.out or Path("comparison.html")))
        return
    if arguments.out is not None:
        raise ConfigError("--out is for several runs; one run's report is RUN_DIR/report.html")
    write = write_discovery if RunDir(run_dirs[0]).trials.is_dir() else write_report
    print(write(run_dirs[0]))
