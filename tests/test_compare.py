"""The learning comparisons: what is said of curves made by hand, and that every cell is a valid run."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import pytest
from comparison import analysis, results
from comparison.analysis import (
    Curve,
    Phase,
    Record,
    Run,
    Summary,
    area,
    band,
    chosen_candidate,
    crossing,
    speed_ups,
    summary,
)
from comparison.cells import CellFailed, Cells, cell_config, cell_name
from comparison.experiments import EXPERIMENTS, TUNING_SEEDS, Experiment, final_overrides, tuning_overrides

from megatron_sdpo.tasks import load_task

GRID = (0, 512, 1024, 1536)
FAST: Curve = ((0, 0.0), (512, 0.5), (1024, 0.9), (1536, 0.8))
SLOW: Curve = ((0, 0.0), (512, 0.2), (1024, 0.6), (1536, 0.85))
BROKEN: Curve = ((0, 0.0), (512, 0.6))


def made(arm: str, curve: Curve, seed: int = 0, candidate: int = 0, phase: Phase = "final") -> Run:
    return Run(
        phase=phase,
        arm=arm,
        candidate=candidate,
        seed=seed,
        overrides=("optim.lr=1e-3",),
        commit="0123456789abcdef",
        date="2026-01-02",
        seconds=1.0,
        outcome="finished" if len(curve) == len(GRID) else "diverged",
        curve=curve,
    )


def summaries(*curves: Curve) -> dict[int, Summary]:
    return {seed: summary(made("x", curve), GRID) for seed, curve in enumerate(curves)}


def a_record() -> Record:
    tuning = [made("A", SLOW, 100, 0, "tuning"), made("A", FAST, 100, 1, "tuning")]
    runs = (*tuning, made("A", FAST, 0, 1), made("A", BROKEN, 1, 1), made("B", SLOW, 0), made("B", SLOW, 1))
    return Record(
        experiment="rich",
        title="A and B",
        reference="B",
        grid=GRID,
        arms={"A": "A", "B": "B"},
        candidates={"A": (("optim.lr=1e-3",), ("optim.lr=2e-3", "optim.mini_batches=4")), "B": (("optim.lr=1e-3",),)},
        chosen={"A": 1, "B": 0},
        machine="a machine",
        runs=runs,
        summaries=tuple(summary(run, GRID) for run in runs),
    )


def test_a_level_is_crossed_on_the_line_between_evaluations() -> None:
    assert crossing(FAST, 0.5) == 512
    assert crossing(FAST, 0.7) == pytest.approx(768)
    assert crossing(SLOW, 0.5) == pytest.approx(512 + 0.75 * 512)
    assert crossing(SLOW, 0.9) is None
    assert crossing(((0, 0.6), (512, 0.7)), 0.5) == 0


def test_a_summary_in_hand_numbers() -> None:
    told = summary(made("x", FAST), GRID)
    assert told.area == pytest.approx((0.25 + 0.7 + 0.85) / 3)
    assert told.generations_to == {"0.5": 512, "0.8": pytest.approx(512 + 0.75 * 512), "0.9": 1024}
    assert (told.peak, told.final, told.drop) == (0.9, 0.8, pytest.approx(0.1))


def test_a_diverged_run_counts_as_0_from_where_it_ended() -> None:
    told = summary(made("x", BROKEN), GRID)
    assert told.area == pytest.approx((0.3 + 0.3 + 0.0) / 3)
    assert (told.final, told.drop) == (0.0, 0.6)
    assert band([BROKEN, FAST], GRID) == analysis.Band(
        GRID, (0.0, 0.55, 0.45, 0.4), (0.0, 0.5, 0.0, 0.0), (0.0, 0.6, 0.9, 0.8)
    )


def test_the_candidate_with_the_largest_mean_area_is_chosen_and_of_equals_the_first() -> None:
    runs = [made("x", c, seed, i) for i, pair in enumerate([(SLOW, SLOW), (FAST, SLOW)]) for seed, c in enumerate(pair)]
    assert chosen_candidate(runs, 2, GRID) == 1
    assert chosen_candidate([replace(run, curve=SLOW) for run in runs], 2, GRID) == 0
    assert chosen_candidate([made("x", BROKEN), made("x", SLOW, candidate=1)], 2, GRID) == 1
    assert area(FAST) > area(SLOW)
    with pytest.raises(AssertionError, match="a candidate was not run"):
        chosen_candidate(runs, 3, GRID)


def test_speed_ups_are_of_the_same_seed() -> None:
    ratios = speed_ups(summaries(FAST, FAST, SLOW), summaries(SLOW, FAST, BROKEN), 0.8)
    assert ratios == [pytest.approx((1024 + 0.8 * 512) / 896), 1.0, None]


def test_table_and_figure_are_made_from_the_json_alone(tmp_path: Path) -> None:
    record = a_record()
    results.save(record, tmp_path)
    assert results.load(tmp_path) == record
    results.write(results.load(tmp_path), tmp_path)
    lines = (tmp_path / results.TABLE).read_text().splitlines()
    a, b = (next(line for line in lines if line.startswith(f"| {arm} |")) for arm in "AB")
    assert "lr 2e-3, mini batches 4" in a and "512, 427" in a and "2, 1 diverged" in a
    assert "0.850 (0.850 to 0.850)" in b and "never, never" in b
    assert "| A | **1.93** (1.75, 2.10) | 1.60, ? | ?, ? |" in lines[lines.index(b) :]
    assert any("**lr 2e-3, mini batches 4** | **0.600** | 0.80" in line for line in lines)
    assert matplotlib.image.imread(tmp_path / results.FIGURE).shape[0] > 400


def cells_of(experiment: Experiment) -> dict[str, tuple[str, ...]]:
    cells = {}
    for arm in experiment.arms:
        for i in range(len(arm.algorithm.candidates)):
            cells[f"{arm.name}, {i}"] = final_overrides(experiment, arm, i, 0)
            cells[f"{arm.algorithm.name}, tuning {i}"] = tuning_overrides(experiment, arm.algorithm, i, TUNING_SEEDS[0])
    return cells


@pytest.mark.parametrize("name", sorted(EXPERIMENTS))
def test_every_cell_is_a_run_of_the_experiments_length_on_its_own_questions(name: str) -> None:
    experiment = EXPERIMENTS[name]
    assert experiment.reference in {arm.name for arm in experiment.arms}
    cells = cells_of(experiment)
    configs = {title: cell_config(overrides) for title, overrides in cells.items()}
    names = {cell_name(overrides) for overrides in cells.values()}
    assert len(names) == len(cells)  # no two arms are the same run
    batch = {c.rollout.prompts_per_step * c.rollout.attempts_per_prompt * c.steps for c in configs.values()}
    assert batch == {experiment.grid[-1]}
    standard = load_task("minipipe").eval_questions()
    for title, config in configs.items():
        assert config.task.options["machine_seed"] == config.seed
        task = load_task(config.task.name, **config.task.options)
        judged_by_standard = task.eval_questions() == standard
        assert judged_by_standard == ("tuning" not in title)


def test_the_name_of_a_cell_is_what_it_means() -> None:
    rich, divergence = EXPERIMENTS["rich"], EXPERIMENTS["divergence"]
    same = cell_name(final_overrides(rich, rich.arms[0], 1, 0))
    assert cell_name(final_overrides(divergence, divergence.arms[0], 1, 0)) == same  # runs are shared
    assert cell_name((*final_overrides(rich, rich.arms[0], 1, 0), "objective.alpha=0.5")) == same  # the default
    assert cell_name(final_overrides(rich, rich.arms[0], 1, 1)) != same


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_tiny_real_cells_finish_fail_and_diverge_and_are_run_once(tmp_path: Path) -> None:
    cells = Cells(tmp_path, jobs=1)
    tiny = ("steps=2", "evaluation.every=1", "evaluation.questions=8", "rollout.prompts_per_step=2", "seed=3")
    too_fast = (*tiny, "optim.lr=1e30")
    with pytest.raises(CellFailed, match="1 of 3 cells failed"):
        cells.run({"tiny": tiny, "fast": too_fast, "broken": (*tiny, "task.options.questions=/nowhere.jsonl")})
    again = Cells(tmp_path, jobs=1).run({"tiny": tiny, "fast": too_fast})  # from their records: nothing was started
    ended = again["tiny"]
    assert again["fast"].outcome == "diverged"
    assert [generations for generations, _ in again["fast"].curve] == [0]  # the model that both began with, drawn anew
    assert (ended.overrides, ended.outcome, [x for x, _ in ended.curve]) == (tiny, "finished", [0, 16, 32])
    config = json.loads((tmp_path / cell_name(tiny) / "run" / "config.json").read_text())
    assert (config["seed"], config["layout"]["world_size"]) == (3, 1)
    output = (tmp_path / cell_name(tiny) / "output.txt").read_text()
    assert output.count("finished in") == 1


def test_the_command_names_its_experiments() -> None:
    done = subprocess.run(
        [sys.executable, "tools/compare_algorithms.py", "nope"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert all(name in done.stderr for name in EXPERIMENTS)
