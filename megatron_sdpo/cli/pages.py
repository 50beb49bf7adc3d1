"""``plan`` and ``report``: what a run would need, what a run was."""

import argparse
from pathlib import Path

from megatron_sdpo.cli.configuring import Commands, add_recipe, read_config
from megatron_sdpo.launch.run_dir import RunDir


def add_plan(commands: Commands) -> None:
    command = commands.add_parser(
        "plan",
        help="what a recipe needs: memory by item, seconds by phase, whether it fits",
        description="Predict memory and time from the configuration and the model's config.json; nothing is started.",
    )
    add_recipe(command)
    command.add_argument("--nodes", type=int, default=1, help="of eight GPUs each")
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


def add_report(commands: Commands) -> None:
    command = commands.add_parser("report", help="write RUN_DIR/report.html and curve.png")
    command.add_argument("run_dir", type=Path)
    command.set_defaults(run=report)


def report(arguments: argparse.Namespace) -> None:
    """One page and one picture of what a run directory holds."""
    from megatron_sdpo.report import write_report  # loads matplotlib
    from megatron_sdpo.report.discovery import write_discovery

    write = write_discovery if RunDir(arguments.run_dir).trials.is_dir() else write_report
    print(write(arguments.run_dir))
