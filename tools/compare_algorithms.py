"""Learning comparisons on MiniPipe, each by one command, with the real engine and trainer.

    python tools/compare_algorithms.py rich [--jobs 2] [--seeds 0,1,2] [--output results]

First every algorithm's settings are chosen among its candidates on machines and questions of their own, by the area
under the held-out curve; then each arm is run with the seeds given, each seed another hidden machine. What is finished
is not run again: the same command continues what was stopped and tries again what failed. Written are
``OUTPUT/EXPERIMENT/``: ``runs.json`` (every run with its overrides, commit and curve), ``table.md``, ``curves.png``;
``--redraw`` makes the last two again from the first.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench_machine import machine
from comparison import results
from comparison.analysis import Phase, Record, Run, chosen_candidate, summary
from comparison.cells import CellFailed, Cells, Ended, Stopped
from comparison.experiments import (
    EXPERIMENTS,
    TUNING_SEEDS,
    Algorithm,
    Experiment,
    final_overrides,
    tuning_overrides,
)


def compare(name: str, experiment: Experiment, seeds: Sequence[int], cells: Cells) -> Record:
    """Choose, then run the arms. Raises CellFailed and Stopped."""
    tuning = tuning_runs(experiment, cells)
    chosen = dict.fromkeys((algorithm.name for algorithm in experiment.algorithms), 0)
    for algorithm in tuned(experiment):
        runs = [run for run in tuning if run.arm == algorithm.name]
        chosen[algorithm.name] = chosen_candidate(runs, len(algorithm.candidates), experiment.grid)
    runs = (*tuning, *final_runs(experiment, chosen, seeds, cells))
    return Record(
        experiment=name,
        title=experiment.title,
        reference=experiment.reference,
        grid=experiment.grid,
        arms={arm.name: arm.algorithm.name for arm in experiment.arms},
        candidates={algorithm.name: algorithm.candidates for algorithm in experiment.algorithms},
        chosen=chosen,
        machine=machine(),
        runs=runs,
        summaries=tuple(summary(run, experiment.grid) for run in runs),
    )


def tuned(experiment: Experiment) -> list[Algorithm]:
    """The algorithms that have something to choose."""
    return [algorithm for algorithm in experiment.algorithms if len(algorithm.candidates) > 1]


def tuning_runs(experiment: Experiment, cells: Cells) -> list[Run]:
    """Every candidate with every tuning seed."""
    cases = [
        (algorithm, candidate, seed)
        for algorithm in tuned(experiment)
        for candidate in range(len(algorithm.candidates))
        for seed in TUNING_SEEDS
    ]
    titles = [f"tuning {a.name}, {' '.join(a.candidates[i])}, seed {seed}" for a, i, seed in cases]
    ended = cells.run({t: tuning_overrides(experiment, *case) for t, case in zip(titles, cases, strict=True)})
    return [
        _run("tuning", algorithm.name, candidate, seed, ended[title])
        for title, (algorithm, candidate, seed) in zip(titles, cases, strict=True)
    ]


def final_runs(experiment: Experiment, chosen: Mapping[str, int], seeds: Sequence[int], cells: Cells) -> list[Run]:
    """Every arm with every seed; one seed of all arms before the next, so that what is stopped has whole seeds."""
    cases = [(arm, chosen[arm.algorithm.name], seed) for seed in seeds for arm in experiment.arms]
    titles = [f"{arm.name}, seed {seed}" for arm, _, seed in cases]
    ended = cells.run({t: final_overrides(experiment, *case) for t, case in zip(titles, cases, strict=True)})
    return [
        _run("final", arm.name, candidate, seed, ended[title])
        for title, (arm, candidate, seed) in zip(titles, cases, strict=True)
    ]


def _run(phase: Phase, arm: str, candidate: int, seed: int, ended: Ended) -> Run:
    return Run(
        phase=phase,
        arm=arm,
        candidate=candidate,
        seed=seed,
        overrides=ended.overrides,
        commit=ended.commit,
        date=ended.date,
        seconds=ended.seconds,
        outcome=ended.outcome,
        curve=ended.curve,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; one needs about 2 cores and 3 GB")
    parser.add_argument("--seeds", default="0,1,2", help="of the final runs")
    parser.add_argument("--output", type=Path, default=Path("results"))
    parser.add_argument("--work", type=Path, default=Path("runs/compare"), help="where the runs are kept")
    parser.add_argument("--redraw", action="store_true", help="table and figure again from runs.json; runs nothing")
    arguments = parser.parse_args()
    folder = arguments.output / arguments.experiment
    if not arguments.redraw:
        seeds = [int(seed) for seed in arguments.seeds.split(",")]
        cells = Cells(arguments.work, arguments.jobs)
        try:
            record = compare(arguments.experiment, EXPERIMENTS[arguments.experiment], seeds, cells)
        except (CellFailed, Stopped) as end:
            sys.exit(str(end))
        results.save(record, folder)
    results.write(results.load(folder), folder)
    print(folder / results.TABLE)


if __name__ == "__main__":
    main()
