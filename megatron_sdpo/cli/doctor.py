"""``doctor``: is this machine ready?"""

import argparse
import sys
from pathlib import Path

from megatron_sdpo import config as configuration
from megatron_sdpo.cli.configuring import RAW, RECIPE_HELP, Commands
from recipes import recipe


def add_doctor(commands: Commands) -> None:
    command = commands.add_parser(
        "doctor",
        formatter_class=RAW,
        help="look at this machine: versions, GPUs, FP8, engines, sandbox, disk, ports, clocks; say what to do",
        description="Look at this machine and say what to do. With a recipe, judge by what it needs.\n"
        "The exit code is 0 when nothing fails, else 1; what is optional and absent does not fail.",
    )
    command.add_argument("--recipe", metavar="NAME", help=RECIPE_HELP)
    command.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="of the recipe")
    command.add_argument("--layout", help="of the recipe, as in train")
    command.add_argument("--run-dir", help="where the run will be written; default: the recipe's, or runs")
    command.add_argument("--json", action="store_true", help="a JSON list of name, state, seen, todo")
    command.set_defaults(run=doctor)


def doctor(arguments: argparse.Namespace) -> None:
    """One line for each thing; exit code 1 if one fails."""
    from megatron_sdpo.launch import doctor_machine, doctor_software  # loads packaging
    from megatron_sdpo.launch.doctor import Needs, as_json, examine, fails, print_table

    config = None
    if arguments.recipe is None and (arguments.overrides or arguments.layout):
        raise configuration.ConfigError("there is nothing to override; set --recipe to the recipe that is meant")
    if arguments.recipe is not None:
        given = [*(configuration.layout_overrides(arguments.layout) if arguments.layout else []), *arguments.overrides]
        given += [f"run_dir={arguments.run_dir}"] if arguments.run_dir else []
        config = configuration.apply_overrides(recipe(arguments.recipe), given)
        configuration.check(config)
    run_dir = Path(config.run_dir if config is not None else arguments.run_dir or "runs")
    findings = examine(Needs(config, run_dir), (*doctor_software.CHECKS, *doctor_machine.CHECKS))
    print(as_json(findings)) if arguments.json else print_table(findings)
    if fails(findings):
        sys.exit(1)
