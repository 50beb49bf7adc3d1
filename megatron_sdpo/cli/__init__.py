"""The command line: ``megatron-sdpo train | discover | evaluate | serve | convert | plan | doctor | replay |
report | study``.

===============  ================================================================
configuring.py   what commands about a recipe share: its arguments, its overrides
training.py      train, discover, replay
models.py        evaluate, serve, convert
pages.py         plan, report
studies.py       study
doctor.py        doctor
===============  ================================================================

Exit codes: 0 done, 1 a running role failed (or ``doctor`` found what fails), 2 the request cannot work (one sentence
on standard error), 128 + n stopped by signal n.
"""

import argparse
import signal
import sys
from collections.abc import Sequence

from megatron_sdpo import __version__
from megatron_sdpo.cli import models, pages, studies, training
from megatron_sdpo.cli.doctor import add_doctor
from megatron_sdpo.config import ConfigError
from megatron_sdpo.launch.local import Interrupted, RoleDied
from megatron_sdpo.rollout.control import EngineError


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-sdpo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Post-train language models with SDPO: Megatron-core trains, SGLang generates.",
        epilog="Start with `megatron-sdpo train minipipe`: it needs two CPU cores and a few minutes.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    training.add_train(commands)
    training.add_discover(commands)
    models.add_evaluate(commands)
    models.add_serve(commands)
    models.add_convert(commands)
    pages.add_plan(commands)
    add_doctor(commands)
    training.add_replay(commands)
    pages.add_report(commands)
    studies.add_study(commands)
    return parser
