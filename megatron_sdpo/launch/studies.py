"""A scaling study's runs on this machine, one beside the other, or as commands for Slurm."""

import os
import shlex
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import megatron_sdpo
from megatron_sdpo import config as configuration
from megatron_sdpo.config import Config, ConfigError
from megatron_sdpo.flops import layer_parameters
from megatron_sdpo.hf_config import read_hf_config
from megatron_sdpo.launch.planning import architecture
from megatron_sdpo.launch.run_dir import RunDir
from megatron_sdpo.launch.side_by_side import SideBySide
from megatron_sdpo.scaling.planner import nodes_of
from megatron_sdpo.scaling.runs import FILE, Manifest, read_manifest, steps_done
from megatron_sdpo.scaling.study import Cell, Study
from recipes import recipe

CHECKOUT = Path(megatron_sdpo.__file__ or "").parents[1]


def manifest_of(study: Study, cells: Sequence[Cell], folder: Path) -> Manifest:
    """The study with these cells, and those that ``folder`` has already. ConfigError for a cell that cannot be."""
    configs = {cell.name: config_of(cell) for cell in cells}
    try:
        models = {cell.size: read_hf_config(architecture(None, configs[cell.name])) for cell in cells}
    except ConfigError as error:
        raise ConfigError(f"{error}; the study needs {study.needs}" if study.needs else str(error)) from error
    manifest = Manifest(
        study=study.name,
        title=study.title,
        levels=study.levels,
        cells=tuple(cells),
        parameters={size: hf["num_hidden_layers"] * layer_parameters(hf) for size, hf in models.items()},
        steps={name: config.steps for name, config in configs.items()},
    )
    return manifest.joined(read_manifest(folder)) if (folder / FILE).exists() else manifest


def config_of(cell: Cell) -> Config:
    """What the cell trains, checked."""
    config = configuration.apply_overrides(recipe(cell.recipe), list(cell.overrides))
    configuration.check(config)
    return config


def is_finished(folder: Path, manifest: Manifest, cell: Cell) -> bool:
    """All steps are recorded and the trained model is there."""
    done = steps_done(folder, cell) >= manifest.steps[cell.name]
    return done and RunDir(folder / cell.name).exported.is_dir()


def slurm_line(cell: Cell) -> str:
    """The command that puts a cell into Slurm's queue, on as many nodes as its trainers and engines take."""
    config = config_of(cell)
    given = [word for word in cell.overrides if not word.startswith("run_dir=")]
    variables = f"SDPO_RECIPE={shlex.quote(cell.recipe)} SDPO_RUN_DIR={shlex.quote(config.run_dir)}"
    options = f"--job-name={shlex.quote(cell.name)} --nodes={nodes_of(config)}"
    return f"{variables} sbatch {options} slurm/sdpo_8b.sh {shlex.join(given)}"


def local_line(cell: Cell) -> str:
    return shlex.join(["megatron-sdpo", "train", cell.recipe, *cell.overrides])


class StudyStopped(RuntimeError):
    """A signal ended the study's runs; ``number`` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__("stopped; the same command continues every run from its last checkpoint")
        self.number = number


def run_here(manifest: Manifest, cells: Sequence[Cell], folder: Path, jobs: int) -> list[str]:
    """Run what is not finished, ``jobs`` at a time; the names of those that failed, after all have been tried.

    Raises StudyStopped on SIGINT and SIGTERM, when all have ended. Each says what it says in ``FOLDER/NAME.log``.
    """
    waiting = [cell for cell in cells if not is_finished(folder, manifest, cell)]
    print(f"{manifest.study}: {len(waiting)} of {len(cells)} runs are not finished, {jobs} at a time", flush=True)
    commands, failed = SideBySide(), []
    with commands.listening(), ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(_train, commands, cell, folder): cell for cell in waiting}
        for number, future in enumerate(as_completed(futures), 1):
            cell, code = futures[future], future.result()
            if commands.stopping.is_set():
                continue
            failed += [cell.name] * bool(code)
            end = f"failed with exit code {code}, see {folder / cell.name}.log" if code else "finished"
            print(f"{number}/{len(waiting)} {cell.name} {end}", flush=True)
    if commands.stopping.is_set():
        raise StudyStopped(commands.signal)
    return failed


def _train(commands: SideBySide, cell: Cell, folder: Path) -> int:
    if commands.stopping.is_set():
        return 0
    command = [sys.executable, "-m", "megatron_sdpo.cli", "train", cell.recipe, *cell.overrides]
    paths = [str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"OMP_NUM_THREADS": "1"} | dict(os.environ) | {"PYTHONPATH": os.pathsep.join(paths)}
    with (folder / f"{cell.name}.log").open("ab") as output:
        return commands.run(command, output.fileno(), environment)
