"""The command line: ``megatron-sdpo COMMAND``.

===============  ================================================================
configuring.py   what commands about a recipe share: its arguments, its overrides
training.py      train, discover, replay
models.py        evaluate, serve, convert
pages.py         recipes, keys, plan, metrics, report
studies.py       study
doctor.py        doctor
===============  ================================================================

Exit codes: 0 done, 1 a running role failed (or ``doctor`` found what fails), 2 the request cannot work (one sentence
on standard error), 128 + n stopped by signal n.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from megatron_sdpo import __version__
from megatron_sdpo.cli import models, pages, studies, training
from megatron_sdpo.cli.doctor import add_doctor
from megatron_sdpo.config import ConfigError, fields_by_name
from megatron_sdpo.launch.local import Interrupted, RoleDied
from megatron_sdpo.rollout.control import EngineError


def main(arguments: Sequence[str] | None = None) -> None:
    _find_modules_here()
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    wrong = [argument for argument in rest if argument.startswith("-") or "=" not in argument]
    if wrong or (rest and not hasattr(parsed, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(wrong or rest)}{_key_meant(wrong)}")
    if rest:  # argparse stops collecting key=value at the first option
        parsed.overrides = [*parsed.overrides, *rest]
    try:
        parsed.run(parsed)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has enough: ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor is there an error when Python ends
        sys.exit(128 + signal.SIGPIPE)
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


def _key_meant(options: Sequence[str]) -> str:
    """``--optim.lr=1`` and ``--steps 3`` are keys elsewhere."""
    keys = [key for option in options if (key := option.lstrip("-").partition("=")[0]) in fields_by_name()]
    return f" (configuration keys have no dashes: {keys[0]}=VALUE)" if keys else ""


def _find_modules_here() -> None:
    """A task or recipe of the user's own, ``sums:Sums``, lies in the working directory: that is on the path of
    ``python -m``, as which all roles run, but not on that of an installed command."""
    if not sys.flags.safe_path and "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-sdpo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Post-train language models with SDPO: Megatron-core trains, SGLang generates.",
        epilog="Start with `megatron-sdpo train minipipe`: it needs two CPU cores and a few minutes.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    pages.add_recipes(commands)
    pages.add_keys(commands)
    training.add_train(commands)
    training.add_discover(commands)
    models.add_evaluate(commands)
    models.add_serve(commands)
    models.add_convert(commands)
    pages.add_plan(commands)
    add_doctor(commands)
    training.add_replay(commands)
    pages.add_metrics(commands)
    pages.add_report(commands)
    studies.add_study(commands)
    return parser
