"""What NeMo-Run runs: plain functions, each one command of ``megatron-sdpo``. No nemo_run here.

``run.Partial(train, recipe="minipipe", ...)`` holds one of them with its arguments; ``command`` is what the functions
call and what jobs are told to run. A job needs the training environment only: NeMo-Run lives in another
(requirements/nemo.txt), because the two cannot be installed together.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import megatron_sdpo
from megatron_sdpo import config as configuration
from megatron_sdpo.config import Config, ConfigError
from megatron_sdpo.launch.run_dir import leaves
from recipes import recipe as recipe_of

CHECKOUT = Path(megatron_sdpo.__file__ or "").parents[1]
PYTHON = "MEGATRON_SDPO_PYTHON"
"""Environment variable: the Python of the training environment, where it is not the checkout's .venv."""


def train(
    recipe: str, config: Config | None = None, overrides: Sequence[str] = (), layout: str = "", run_dir: str = ""
) -> None:
    """``megatron-sdpo train``: ``config`` (default: the recipe's), changed by layout, overrides and run_dir.

    Example: ``train("minipipe", overrides=["optim.lr=5e-4"], layout="tp2", run_dir="runs/mine")``
    """
    start(train_command(recipe, config, overrides, layout, run_dir))


def train_command(
    recipe: str, config: Config | None = None, overrides: Sequence[str] = (), layout: str = "", run_dir: str = ""
) -> list[str]:
    return ["train", recipe, *settled(recipe, config, overrides, layout, run_dir)]


def convert(source: str, target: str) -> None:
    """``megatron-sdpo convert``: a run directory to a Hugging Face directory, or that to a sharded checkpoint."""
    start(convert_command(source, target))


def convert_command(source: str, target: str) -> list[str]:
    return ["convert", source, target]


def evaluate(
    recipe: str, config: Config | None = None, overrides: Sequence[str] = (), layout: str = "", model: str = ""
) -> None:
    """``megatron-sdpo evaluate``: the recipe's held-out questions, asked of ``model`` (default: the recipe's)."""
    start(evaluate_command(recipe, config, overrides, layout, model))


def evaluate_command(
    recipe: str, config: Config | None = None, overrides: Sequence[str] = (), layout: str = "", model: str = ""
) -> list[str]:
    return ["evaluate", recipe, *settled(recipe, config, overrides, layout), *([f"--model={model}"] if model else [])]


def report(run_dir: str) -> None:
    """``megatron-sdpo report``."""
    start(report_command(run_dir))


def report_command(run_dir: str) -> list[str]:
    return ["report", run_dir]


COMMANDS: Mapping[Callable[..., None], Callable[..., list[str]]] = {
    train: train_command,
    convert: convert_command,
    evaluate: evaluate_command,
    report: report_command,
}
"""Arguments of ``megatron-sdpo`` for each task."""


def settled(
    recipe: str, config: Config | None, overrides: Sequence[str], layout: str = "", run_dir: str = ""
) -> list[str]:
    """``key=value`` for all in which the asked-for configuration differs from the recipe's; ConfigError if it is wrong.

    So a mistake is found where the job is submitted, and not after it has waited in a queue.
    """
    base = recipe_of(recipe)
    given = [*(configuration.layout_overrides(layout) if layout else []), *overrides]
    given += [f"run_dir={run_dir}"] if run_dir else []
    wanted = configuration.apply_overrides(config or base, given)
    configuration.check(wanted)
    return changes(base, wanted)


def changes(base: Config, wanted: Config) -> list[str]:
    """The overrides that make ``wanted`` of ``base``; a task's options are one value."""
    before, after = leaves(dataclasses.asdict(base)), leaves(dataclasses.asdict(wanted))
    if wanted.task.name != base.task.name:
        before["task.options"] = {}  # another task starts without options
    return [f"{key}={json.dumps(value)}" for key, value in after.items() if before[key] != value]


def training_python() -> str:
    """The Python that has torch: $MEGATRON_SDPO_PYTHON, or that of ``make setup``; ConfigError without either."""
    named = os.environ.get(PYTHON)
    own = CHECKOUT / ".venv" / "bin" / "python"
    if named is None and not own.exists():
        raise ConfigError(f"there is no training environment at {own}; run `make setup`, or set {PYTHON}")
    return named or str(own)


def start(command: Sequence[str], **settings: Any) -> None:
    """Run ``megatron-sdpo`` in the training environment; SystemExit with its exit code when it fails."""
    paths = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [training_python(), "-m", "megatron_sdpo.cli", *command], env={**os.environ, "PYTHONPATH": paths}, **settings
    )
    if done.returncode:
        sys.exit(done.returncode)
