"""What commands about a recipe share: its arguments, and the configuration that they ask for."""

import argparse
import dataclasses
import json
from typing import Any, TypeAlias

from megatron_sdpo import config as configuration
from megatron_sdpo.config import Config
from recipes import recipe

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""Where a command's parser is added; argparse has no public name for it."""
RAW = argparse.RawDescriptionHelpFormatter
RECIPE_HELP = "a name that `megatron-sdpo recipes` lists, or module:function, a recipe of your own"


def add_recipe(command: argparse.ArgumentParser) -> None:
    """RECIPE, key=value, --layout and --run-dir, which ``read_config`` reads."""
    command.add_argument("recipe", help=RECIPE_HELP)
    command.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="change one configuration value, e.g. optim.lr=1e-3",
    )
    command.add_argument("--layout", help=configuration.LAYOUT_HELP)
    command.add_argument("--run-dir", help="where everything is written (short for run_dir=)")


def configuration_help() -> str:
    """Every key with its type and default."""
    keys = configuration.fields_by_name()
    lines = ["configuration keys (change them with key=value; `megatron-sdpo keys [WORD]` says what they mean):"]
    return "\n".join([*lines, *(f"  {key_line(key, *of_key)}" for key, of_key in keys.items())])


def key_line(key: str, kind: Any, default: Any) -> str:
    """Example: ``optim.lr    a number; default 1e-05``"""
    shown = "set by the recipe" if default is dataclasses.MISSING else f"default {json.dumps(default)}"
    return f"{key:36} {configuration.type_words(kind)}; {shown}"


def read_config(arguments: argparse.Namespace) -> Config:
    """The recipe with --layout, the overrides and --run-dir applied in this order, checked."""
    overrides = list(arguments.overrides)
    if arguments.layout is not None:
        overrides = [*configuration.layout_overrides(arguments.layout), *overrides]
    if arguments.run_dir is not None:
        overrides.append(f"run_dir={arguments.run_dir}")
    config = configuration.apply_overrides(recipe(arguments.recipe), overrides)
    configuration.check(config)
    return config


def trainer_words(config: Config) -> str:
    """The trainer's layout for the console. Example: ``tp2pp1dp1 on 2 rank(s)``"""
    return f"{configuration.layout_name(config.layout)} on {config.layout.world_size} rank(s)"


def with_model(config: Config, model: str | None) -> Config:
    """Of another model, if one is named."""
    if model is None:
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, path=model))
