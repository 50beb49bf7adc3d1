"""``evaluate``, ``serve`` and ``convert``: a model without training it."""

import argparse
import asyncio
import dataclasses
import json
from pathlib import Path

from megatron_sdpo.cli.configuring import Commands, add_recipe, read_config, with_model
from megatron_sdpo.config import ConfigError
from megatron_sdpo.launch.preflight import check_engines, check_run


def add_evaluate(commands: Commands) -> None:
    command = commands.add_parser("evaluate", help="score a model on a recipe's held-out questions")
    add_recipe(command)
    command.add_argument("--model", help="Hugging Face directory; default: the recipe's model")
    command.set_defaults(run=evaluate)


def evaluate(arguments: argparse.Namespace) -> None:
    """One engine, the recipe's held-out questions, one JSON object."""
    from megatron_sdpo.launch.serving import evaluate_model  # loads aiohttp and the engine's client only when needed

    config = with_model(read_config(arguments), arguments.model)
    check_run(config, must_evaluate=True)
    evaluation = asyncio.run(evaluate_model(config))
    print(json.dumps(evaluation.metrics, indent=2))


def add_serve(commands: Commands) -> None:
    command = commands.add_parser("serve", help="start a recipe's engines and wait; the token is in RUN_DIR/token")
    add_recipe(command)
    command.add_argument("--model", help="Hugging Face directory; default: the recipe's model")
    command.set_defaults(run=serve)


def serve(arguments: argparse.Namespace) -> None:
    """Engines until interrupted."""
    from megatron_sdpo.launch.serving import serve_model

    config = with_model(read_config(arguments), arguments.model)
    if not arguments.run_dir:  # the recipe's own directory may hold a run, whose configuration it keeps
        config = dataclasses.replace(config, run_dir=f"{config.run_dir}-serve")
    check_engines(config)
    serve_model(config)


def add_convert(commands: Commands) -> None:
    command = commands.add_parser(
        "convert",
        help="run checkpoint -> Hugging Face directory, or Hugging Face directory -> Megatron checkpoint; or to FP8",
    )
    command.add_argument("source", type=Path, help="a run directory, or a Hugging Face directory")
    command.add_argument("target", type=Path, help="directory to write; must not exist")
    command.add_argument("--step", type=int, help="which checkpoint of the run; default: the newest")
    command.add_argument(
        "--fp8", action="store_true", help="write a Hugging Face directory in block FP8, as FP8 engines serve it"
    )
    command.add_argument(
        "--high-precision-layers",
        type=int,
        metavar="N",
        help="with --fp8: so many of the first and of the last layers stay as they are; default: as in the run, or 0",
    )
    command.set_defaults(run=convert)


def convert(arguments: argparse.Namespace) -> None:
    """A run's checkpoint -> Hugging Face directory, or Hugging Face directory -> sharded checkpoint; or FP8."""
    from megatron_sdpo.launch.convert import Fp8, convert_checkpoint  # loads torch and megatron

    kept = arguments.high_precision_layers
    if kept is not None and not arguments.fp8:
        raise ConfigError("--high-precision-layers is about FP8; add --fp8, or leave it out")
    fp8 = Fp8(kept) if arguments.fp8 else None
    print(convert_checkpoint(arguments.source, arguments.target, arguments.step, fp8))
