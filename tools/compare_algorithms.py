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
from collections.abc import Sequence
from pathlib import Path

from bench_machine import machine
from comparison import results
from comparison.analysis import Record, Run, chosen_candidate, summary
from comparison.cells import CellFailed, Cells, Ended, Stopped
from comparison.experiments import EXPERIMENTS, TUNING_SEEDS, Arm, Experiment, final_overrides, tuning_overrides


def compare(name: str, experiment: Experiment, seeds: Sequence[int], cells: Cells) -> Record:
    """Choose, then run the arms. Raises CellFailed and Stopped."""
    tuning = tune(experiment, cells)
    chosen = {
        algorithm.name: chosen_candidate(runs, len(algorithm.candidates), experiment.grid) if runs else 0
        for algorithm in experiment.algorithms
        for runs in [[run for run in tuning if run.arm == algorithm.name]]
    }
    finals = {
        (arm.name, seed): final_overrides(experiment, arm, chosen[arm.algorithm.name], seed)
        for seed in seeds  # the outer loop: what is stopped has whole seeds
        for arm in experiment.arms
    }
    print(f"{name}: {len(finals)} final runs", flush=True)
    ended = cells.run({f"{arm}, seed {seed}": overrides for (arm, seed), overrides in finals.items()})
    arms: dict[str, Arm] = {arm.name: arm for arm in experiment.arms}
    runs = (
        *tuning,
        *(
            _run("final", arm, chosen[arms[arm].algorithm.name], seed, ended[f"{arm}, seed {seed}"])
            for arm, seed in finals
        ),
    )
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


def tune(experiment: Experiment, cells: Cells) -> tuple[Run, ...]:
    """Every candidate of the algorithms that have more than one."""
    wanted = {
        (algorithm, i, seed): tuning_overrides(experiment, algorithm, i, seed)
        for algorithm in experiment.algorithms
        if len(algorithm.candidates) > 1
        for i in range(len(algorithm.candidates))
        for seed in TUNING_SEEDS
    }
    titles = {key: f"tuning {key[0].name}, {' '.join(key[0].candidates[key[1]])}, seed {key[2]}" for key in wanted}
    if wanted:
        print(f"{len(wanted)} tuning runs", flush=True)
    ended = cells.run({titles[key]: overrides for key, overrides in wanted.items()}) if wanted else {}
    return tuple(_run("tuning", key[0].name, key[1], key[2], ended[titles[key]]) for key in wanted)


def _run(phase: str, arm: str, candidate: int, seed: int, ended: Ended) -> Run:
    return Run(
        phase="tuning" if phase == "tuning" else "final",
        arm=arm,
        candidate=candidate,
        seed=seed,
        overrides=ended.overrides,
        commit=ended.commit,
        date=ended.date,
        seconds=ended.seconds,
        outcome="diverged" if ended.outcome == "diverged" else "finished",
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
