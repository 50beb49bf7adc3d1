"""Recipes as ``run.Partial``, several of them as an experiment, and waiting for one. Runs in NeMo-Run's environment.

::

    task = partial("minipipe")                      # every key of the configuration is task.config.…
    task.config.optim.lr *= 2
    launch("mine", run_steps(task), slurm(nodes=2, account="me"))      # or pipeline(task), sweep(task, {...})
"""

import dataclasses
import itertools
import json
import shlex
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import fiddle
import nemo_run as run
from nemo_run.core.tunnel.client import Tunnel

from megatron_sdpo import config as configuration
from megatron_sdpo.config import Config, ConfigError
from megatron_sdpo.launch.nemo_executors import SIGNAL_S
from megatron_sdpo.launch.nemo_step import read_record
from megatron_sdpo.launch.nemo_tasks import CHECKOUT, COMMANDS, convert, evaluate, report, train, training_python
from recipes import recipe as recipe_of
from recipes import study as study_of

POLL_S = 2.0
_ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}
"""States in which a Slurm job stays; a preempted one is queued again."""


@dataclass(frozen=True, slots=True)
class Step:
    """One job of an experiment: a task, the records of what must have succeeded, and of its own end."""

    task: run.Partial
    record: Path
    after: tuple[str, ...] = ()
    once: bool = False
    output: Path | None = None
    nodes: int | None = None
    """None: as many as the executor has."""


def partial(recipe: str, **arguments: Any) -> run.Partial:
    """``train`` of a recipe, with its whole configuration to change: ``partial("minipipe").config.optim.lr = 1e-3``"""
    return run.Partial(train, recipe=recipe, config=editable(recipe_of(recipe)), **arguments)


def editable(value: Any) -> Any:
    """A tree of frozen dataclasses as a tree of ``run.Config``, which may be assigned to and build the former again."""
    if not dataclasses.is_dataclass(value):
        return value
    fields = {f.name: editable(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return run.Config(type(value), **fields)


def configuration_of(task: run.Partial) -> Config:
    """What a task about a recipe will run with."""
    built = fiddle.build(task).keywords
    given = [*(configuration.layout_overrides(built["layout"]) if built.get("layout") else [])]
    given += built.get("overrides", ())
    given += [f"run_dir={built['run_dir']}"] if built.get("run_dir") else []
    return configuration.apply_overrides(built.get("config") or recipe_of(built["recipe"]), given)


def run_steps(task: run.Partial) -> dict[str, Step]:
    """An experiment of one training run."""
    return {"train": Step(task, _record(Path(configuration_of(task).run_dir), "train"))}


def pipeline(task: run.Partial, source: str = "") -> dict[str, Step]:
    """convert → train → evaluate → report, each only after the one before has succeeded.

    ``source``: a run directory, whose newest checkpoint this run starts from (converted into ``RUN_DIR/nemo/model``);
    without it the run starts from ``model.path`` and nothing is converted. What evaluate prints is kept in
    ``RUN_DIR/nemo/evaluation.json``. Records and outputs are in ``RUN_DIR/nemo/``.
    """
    config = configuration_of(task)
    run_dir = Path(config.run_dir)
    steps: dict[str, Step] = {}
    if source:
        model = run_dir / "nemo" / "model"
        steps["convert"] = Step(
            run.Partial(convert, source=source, target=str(model)), _record(run_dir, "convert"), once=True, nodes=1
        )
        task = task.clone()
        task.overrides = [*(getattr(task, "overrides", None) or ()), f"model.path={json.dumps(str(model))}"]
    steps["train"] = Step(task, _record(run_dir, "train"), after=tuple(steps))
    asked = {k: v for k, v in task.__arguments__.items() if k in ("recipe", "config", "overrides", "layout")}
    if config.engine.fp8 != "off":  # what a run exports is in full precision
        asked["overrides"] = [*(asked.get("overrides") or ()), "engine.fp8=off"]
    steps["evaluate"] = Step(
        run.Partial(evaluate, **asked, model=str(run_dir / "hf")),
        _record(run_dir, "evaluate"),
        after=("train",),
        output=run_dir / "nemo" / "evaluation.json",
        nodes=1,
    )
    report_task = run.Partial(report, run_dir=str(run_dir))
    steps["report"] = Step(report_task, _record(run_dir, "report"), after=("evaluate",), nodes=1)
    return steps


def sweep(task: run.Partial, grid: Mapping[str, Sequence[Any]]) -> dict[str, Step]:
    """One run for each point of ``grid`` (key → values), in a directory of its own under the task's run directory.

    Example: ``sweep(task, {"optim.lr": [1e-3, 5e-4], "seed": [0, 1]})`` makes four runs, the first in
    ``RUN_DIR/optim.lr=0.001,seed=0``.
    """
    for key, values in grid.items():
        if not isinstance(values, list | tuple) or not values or len(set(map(json.dumps, values))) != len(values):
            raise ConfigError(f"the values of {key} are {values!r}; give a list of one or more different ones")
    if not grid:
        raise ConfigError("the grid is empty; give it as a JSON object of key to list of values")
    run_dir = Path(configuration_of(task).run_dir)
    steps: dict[str, Step] = {}
    for number, values in enumerate(itertools.product(*grid.values())):
        point = [f"{key}={json.dumps(value)}" for key, value in zip(grid, values, strict=True)]
        own = run_dir / ",".join(point).replace('"', "").replace("/", "_").replace(" ", "")
        one = task.clone()
        one.overrides = [*(getattr(task, "overrides", None) or ()), *point]
        one.run_dir = str(own)
        steps[f"train-{number}"] = Step(one, _record(own, "train"))
    return steps


def study_steps(
    name: str, out: str, arms: Sequence[str], sizes: Sequence[str], seeds: Sequence[int]
) -> dict[str, Step]:
    """The runs of a scaling study, each by itself; ``megatron-sdpo study NAME --report --out OUT`` reads them."""
    study, steps = study_of(name), {}
    for cell in study.cells(out or f"runs/{study.name}", arms, sizes, seeds):
        task = run.Partial(train, recipe=cell.recipe, overrides=list(cell.overrides))
        steps[cell.name] = Step(task, _record(Path(configuration_of(task).run_dir), "train"))
    return steps


def _record(run_dir: Path, name: str) -> Path:
    return run_dir / "nemo" / f"{name}.json"


def script(step: Step, steps: Mapping[str, Step], python: str, folder: Path) -> run.Script:
    """What the job runs: this checkout in the training environment, in ``folder``.

    Refuses here (ConfigError) what the command line would refuse there.
    """
    task = fiddle.build(step.task)
    command = COMMANDS[task.func](**task.keywords)
    options = ["--record", str(step.record)]
    for name in step.after:
        options += ["--after", str(steps[name].record)]
    options += ["--once"] if step.once else []
    options += ["--output", str(step.output)] if step.output else []
    words = [python, "-m", "megatron_sdpo.launch.nemo_step", *options, "--", *command]
    lines = [
        f"cd {shlex.quote(str(folder))} || exit 2",
        f"export PYTHONPATH={shlex.quote(str(CHECKOUT))}${{PYTHONPATH:+:$PYTHONPATH}}",
        f"exec {shlex.join(words)}",
    ]
    return run.Script(inline="\n".join(lines) + "\n")


def cluster_job(step: Step, steps: Mapping[str, Step], python: str, folder: Path, place: run.SlurmExecutor) -> str:
    """Lines for the batch script that make it the job of slurm/*.sh, whose warnings only the batch script hears.

    Trainers on some nodes and engines on the others, preflight, attempts, going back into the queue: slurm/job.sh. It
    starts the nodes' processes by an srun of its own; NeMo-Run's, further down in the script, is not reached.
    """
    command = COMMANDS[train](**fiddle.build(step.task).keywords)
    note = shlex.join([python, "-m", "megatron_sdpo.launch.nemo_step", "--record", str(step.record)])
    after = shlex.join(word for name in step.after for word in ("--after", str(steps[name].record)))
    settings = {
        "SDPO_HOME": str(CHECKOUT),
        "SDPO_RUN_DIR": configuration_of(step.task).run_dir,
        "SDPO_PYTHON": python,
        "SDPO_CONTAINER": place.container_image or "",
        "SDPO_GPUS_PER_NODE": str(place.gpus_per_node or 0),
    }
    lines = [
        "set +evx",
        f"cd {shlex.quote(str(folder))} || exit 2",
        f"export PYTHONPATH={shlex.quote(str(CHECKOUT))}${{PYTHONPATH:+:$PYTHONPATH}}",
        *(f"export {name}={shlex.quote(value)}" for name, value in settings.items()),
        f"{note} {after} --check -- {shlex.join(command)} || exit 2",
        f"ended() {{ local code=$?; {note} --ended $code -- {shlex.join(command)}; }}",
        "trap ended EXIT",
        'source "$SDPO_HOME/slurm/job.sh"',
        f"run_job {shlex.join(command[1:])}",
        "exit 0",
    ]
    return "\n".join(lines)


def launch(
    title: str,
    steps: Mapping[str, Step],
    executor: run.Executor | run.Config[run.Executor],
    python: str = "",
    dryrun: bool = False,
    detach: bool = False,
) -> dict[str, int | None]:
    """Run the steps; exit codes by name. ``detach`` (Slurm): do not wait; a ``dryrun`` prints and starts nothing.

    None: a job ended without a word of its own, killed, or cancelled before it began.
    """
    if isinstance(executor, run.Config):
        executor = fiddle.build(executor)
    on_slurm = isinstance(executor, run.SlurmExecutor)
    python = _python_there(executor, python)
    scripts = {name: script(step, steps, python, Path.cwd()) for name, step in steps.items()}  # all, or none is started
    if not dryrun:
        for step in steps.values():  # of an earlier experiment, unless a step is not made twice
            if not step.once:
                step.record.unlink(missing_ok=True)
    with run.Experiment(title, executor=executor, skip_status_at_exit=True, enable_goodbye_message=False) as experiment:
        for name, step in steps.items():
            place = _placed(title, step, steps, executor, python)
            after = list(step.after)
            experiment.add(scripts[name], executor=place, name=name, dependencies=after, tail_logs=not on_slurm)
        if dryrun:
            print("\n".join(f"{name} runs\n{one.inline}" for name, one in scripts.items()))
            experiment.dryrun()
            return {}
        if on_slurm:  # NeMo-Run would wait by sacct, which needs an accounting database
            experiment.run(detach=True)
        else:
            _end_with_this_process(experiment)
            experiment.run(sequential=len(steps) > 1 and not any(step.after for step in steps.values()))
        handles = {job.id: job.handle for job in experiment.jobs}
    if on_slurm:
        numbers = {name: handle.partition("://")[2].split("/")[1] for name, handle in handles.items()}
        print("\n".join(f"job {number} is {name}" for name, number in numbers.items()), flush=True)
        if detach:
            return {}
        wait_for_jobs(list(numbers.values()), executor.tunnel)
    found = {name: read_record(step.record) for name, step in steps.items()}
    return {name: record.exit_code if record else None for name, record in found.items()}


def _python_there(executor: run.Executor, python: str) -> str:
    """Of the training environment where the jobs run; ConfigError for an executor that lacks something."""
    if isinstance(executor, run.SlurmExecutor):
        if not executor.account:
            raise ConfigError("Slurm wants an account; set run.executor.account=NAME, or SBATCH_ACCOUNT")
        if executor.container_image and not python:
            raise ConfigError("which Python the container has is not known; set python=/opt/venv/bin/python or so")
    return python or training_python()


def _placed(title: str, step: Step, steps: Mapping[str, Step], executor: run.Executor, python: str) -> run.Executor:
    """The executor of one step: only training takes several nodes, and then it is the job of slurm/*.sh."""
    place = executor.clone()
    if isinstance(place, run.SlurmExecutor):
        place.nodes = step.nodes or place.nodes
        place.job_name_prefix = place.job_name_prefix or f"{title}."
        if place.nodes > 1 and step.task.__fn_or_cls__ is train:
            place.setup_lines = cluster_job(step, steps, python, Path.cwd(), place)
            place.signal = place.signal or f"B:USR1@{SIGNAL_S}"
    return place


def _end_with_this_process(experiment: run.Experiment) -> None:
    """SIGINT and SIGTERM end the jobs on this machine, which NeMo-Run would wait for, and start no others."""
    experiment.dryrun(log=False)  # its scheduler sets handlers of its own when it is made, which this does

    def stop(number: int, frame: FrameType | None) -> None:
        for job in experiment.jobs:
            experiment.cancel(job.id)
        sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def wait_for_jobs(numbers: Sequence[str], tunnel: Tunnel) -> dict[str, str]:
    """Until every job has ended; its state. One that Slurm has forgotten has ended, as UNKNOWN."""
    states: dict[str, str] = {}
    while True:
        for number in numbers:
            shown = tunnel.run(f"scontrol -o show job {number}", hide=True, warn=True)
            words = dict(word.partition("=")[::2] for word in shown.stdout.split())
            if not shown.ok and "Invalid job id" not in shown.stderr:
                continue  # a controller that is away comes back
            states[number] = words.get("JobState", "UNKNOWN")
        if len(states) == len(numbers) and all(state in {*_ENDED, "UNKNOWN"} for state in states.values()):
            return states
        time.sleep(POLL_S)
