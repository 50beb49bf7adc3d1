"""Launch recipes with NeMo-Run: ``python -m megatron_sdpo.launch.nemo train | pipeline | sweep | study``.

::

    python -m megatron_sdpo.launch.nemo train recipe=minipipe layout=tp1 run.executor=local --yes
    python -m megatron_sdpo.launch.nemo train -f minipipe 'config.optim.lr*=2' run.executor=slurm run.executor.nodes=2
    python -m megatron_sdpo.launch.nemo pipeline -f minipipe source=runs/other run.executor=slurm --detach --yes
    python -m megatron_sdpo.launch.nemo sweep -f minipipe 'grid={"optim.lr": [1e-3, 5e-4], "seed": [0, 1]}' --dryrun
    python -m megatron_sdpo.launch.nemo study study=ladder 'sizes=["8B"]' run.executor=slurm run.executor.nodes=2

``directory`` is the run directory (NeMo-Run keeps names that begin with run for itself).
With ``-f RECIPE`` every key is ``config.…``, with NeMo-Run's operators; ``recipe=NAME`` with
``'overrides=["optim.lr=1e-3"]'`` is the command line's way. ``--dryrun`` prints what would run. Without an executor
the jobs run on this machine.

Runs in an environment of its own (``make nemo-setup``); the jobs run in the training environment. Exit codes: 0 every
job succeeded, 1 one did not, 2 the request cannot work.
"""

import functools
import json
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import nemo_run as run
from nemo_run.cli.cli_parser import type_parser

from megatron_sdpo.config import Config, ConfigError
from megatron_sdpo.config.reading import read_value
from megatron_sdpo.launch import nemo_executors, nemo_tasks
from megatron_sdpo.launch.nemo_experiments import Step, editable, launch, run_steps, study_steps
from megatron_sdpo.launch.nemo_experiments import pipeline as pipeline_steps
from megatron_sdpo.launch.nemo_experiments import sweep as sweep_steps
from recipes import recipe as recipe_of
from recipes import recipes

EXECUTORS = (nemo_executors.local, nemo_executors.slurm)
_GRID = '{"optim.lr": [1e-3, 5e-4]}'
_outcome: list[int] = []
"""The exit code, once there is one: NeMo-Run's own command line swallows that of what it calls."""


def train(
    ctx: run.cli.RunContext,
    recipe: str = "",
    config: Config | None = None,
    overrides: list[str] = [],  # noqa: B006 (NeMo-Run reads the type of a default and copies it)
    layout: str = "",
    directory: str = "",
    python: str = "",
) -> None:
    """One training run. python: of the training environment, where the job runs."""
    task = _task(recipe, config, overrides, layout, directory)
    _launch(ctx, task.recipe, lambda: run_steps(task), python)


def pipeline(
    ctx: run.cli.RunContext,
    recipe: str = "",
    config: Config | None = None,
    overrides: list[str] = [],  # noqa: B006
    layout: str = "",
    directory: str = "",
    python: str = "",
    source: str = "",
) -> None:
    """convert (source: a run directory to start from), train, evaluate, report, each after the one before."""
    task = _task(recipe, config, overrides, layout, directory)
    _launch(ctx, f"{task.recipe}-pipeline", lambda: pipeline_steps(task, source), python)


def sweep(
    ctx: run.cli.RunContext,
    recipe: str = "",
    config: Config | None = None,
    overrides: list[str] = [],  # noqa: B006
    layout: str = "",
    directory: str = "",
    python: str = "",
    grid: str = "{}",
) -> None:
    """One run for each point of grid, a JSON object of key to list of values."""
    task = _task(recipe, config, overrides, layout, directory)
    _launch(ctx, f"{task.recipe}-sweep", lambda: sweep_steps(task, read_grid(grid)), python)


def study(
    ctx: run.cli.RunContext,
    study: str = "",
    arms: list[str] = [],  # noqa: B006
    sizes: list[str] = [],  # noqa: B006
    seeds: list[int] = [],  # noqa: B006
    out: str = "",
    python: str = "",
) -> None:
    """A scaling study's runs, a job each, on as many nodes as the executor has: sizes that take others, by themselves.
    ``megatron-sdpo study NAME --report`` reads them."""
    _launch(ctx, f"{study}-study", lambda: study_steps(study, out, arms, sizes, seeds), python)


def read_grid(text: str) -> dict[str, Any]:
    try:
        grid = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f'grid is not JSON ({error.msg}): {text}; write it as {{"optim.lr": [1e-3, 5e-4]}}'
        ) from error
    if not isinstance(grid, dict):
        raise ConfigError(f'grid is {text}; write it as {{"optim.lr": [1e-3, 5e-4]}}')
    return grid


def _task(recipe: str, config: Config | None, overrides: list[str], layout: str, directory: str) -> run.Partial:
    if isinstance(recipe, functools.partial):  # recipe=NAME is, to NeMo-Run, what -f NAME makes
        recipe, config = recipe.keywords["recipe"], config or recipe.keywords["config"]
    return run.Partial(
        nemo_tasks.train, recipe=recipe, config=config, overrides=overrides, layout=layout, run_dir=directory
    )


def _launch(ctx: run.cli.RunContext, title: str, build: Callable[[], Mapping[str, Step]], python: str) -> None:
    executor = ctx.executor or run.LocalExecutor(packager=run.Packager())
    try:
        codes = launch(title.replace(":", "-"), build(), executor, python, dryrun=ctx.dryrun, detach=ctx.detach)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        _outcome.append(2)
        return
    for name, code in codes.items():
        print(f"{name} {'succeeded' if code == 0 else f'failed ({code})' if code else 'did not finish'}")
    _outcome.append(int(any(code != 0 for code in codes.values())))


COMMANDS = {"train": train, "pipeline": pipeline, "sweep": sweep, "study": study}


def register() -> None:
    """What a user names on the command line: recipes as ``-f`` (with _ for -), and values as the package reads them."""
    for name in recipes():
        for command in (train, pipeline, sweep):
            run.cli.factory(_recipe_factory(name, command), target=command, name=name.replace("-", "_"))

    def read(text: str, kind: Any) -> Any:
        return read_value("this key", text, kind)

    for kind in (types.UnionType, tuple):  # of which NeMo-Run knows nothing: float | None, tuple[int, ...]
        type_parser.register_parser(kind)(read)


def _recipe_factory(name: str, command: Callable[..., None]) -> Callable[[], run.Partial]:
    def factory() -> run.Partial:
        return run.Partial(command, recipe=name, config=editable(recipe_of(name)))

    return factory


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(__doc__, file=sys.stdout if sys.argv[1:] in (["--help"], ["-h"]) else sys.stderr)
        return 0 if sys.argv[1:] in (["--help"], ["-h"]) else 2
    command = COMMANDS[sys.argv.pop(1)]
    register()
    run.cli.main(run.cli.entrypoint(command, type="experiment"))
    if not _outcome:  # help was shown, or what is wrong has been said
        return 0 if {"--help", "-h"} & set(sys.argv) else 2
    return _outcome[0]


if __name__ == "__main__":
    sys.exit(main())
