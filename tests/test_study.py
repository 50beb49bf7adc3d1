"""Scaling studies: cells, what a folder holds, findings on rows with known laws, the command."""

import json
import math
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megatron_sdpo.cli import main
from megatron_sdpo.config import ConfigError
from megatron_sdpo.launch import studies as launching
from megatron_sdpo.scaling.findings import Findings, find
from megatron_sdpo.scaling.laws import Saturating
from megatron_sdpo.scaling.runs import PHASES, Manifest, read_manifest, read_runs
from megatron_sdpo.scaling.study import Cell, Study
from megatron_sdpo.scaling.study_page import findings_lines, write_study
from recipes import _paper as paper
from recipes import studies
from recipes import study as study_of

STUDY = Study(
    name="mine",
    title="Mine",
    sizes={"small": "minipipe-w48", "middle": "minipipe-w96", "large": "minipipe-w208"},
    arms={"sdpo": ("task.options.machine_seed={seed}",), "grpo": ("objective.kind=grpo",)},
    seeds=(0, 1),
    levels=(0.5,),
)
SIZES = {"1M": 1_000_000, "2M": 2_000_000, "4M": 4_000_000, "8M": 8_000_000}
TRAINED_BY = {"generate": 0.2, "score_student": 0.1, "score_teacher": 0.2, "train": 0.5}


def test_cells_are_commands_one_seed_of_everything_before_the_next() -> None:
    cells = STUDY.cells("runs/mine", [], ["small", "large"], [], ["steps=9"])
    assert [cell.name for cell in cells][:5] == [
        "sdpo-small-seed0",
        "grpo-small-seed0",
        "sdpo-large-seed0",
        "grpo-large-seed0",
        "sdpo-small-seed1",
    ]
    assert len(cells) == 8 and cells[4].recipe == "minipipe-w48"
    given = ("task.options.machine_seed=1", "steps=9", "seed=1", "run_dir=runs/mine/sdpo-small-seed1")
    assert cells[4].overrides == given
    assert [cell.seed for cell in STUDY.cells("x", ["grpo"], ["small"], [7])] == [7]
    with pytest.raises(ConfigError, match="the study mine has no size 'huge'; it has small, middle, large"):
        STUDY.cells("x", [], ["huge"], [])


def test_a_folder_grows_by_seeds_and_refuses_other_settings(tmp_path: Path) -> None:
    def manifest(*seeds: int, steps: int = 9) -> Manifest:
        cells = STUDY.cells(str(tmp_path), ["sdpo"], ["small"], seeds, [f"steps={steps}"])
        return Manifest("mine", "Mine", (0.5,), tuple(cells), {"small": 3}, {cell.name: steps for cell in cells})

    manifest(0).save(tmp_path)
    joined = manifest(1).joined(read_manifest(tmp_path))
    assert [cell.seed for cell in joined.cells] == [1, 0]
    assert joined.steps == {"sdpo-small-seed0": 9, "sdpo-small-seed1": 9}
    moved = [replace(cell, overrides=(*cell.overrides[:-1], "run_dir=elsewhere")) for cell in manifest(0).cells]
    assert len(replace(manifest(0), cells=tuple(moved)).joined(read_manifest(tmp_path)).cells) == 1
    with pytest.raises(ConfigError, match=r"sdpo-small-seed0 of this study was begun as .* steps=9"):
        manifest(0, steps=10).joined(read_manifest(tmp_path))
    with pytest.raises(ConfigError, match="holds no study"):
        read_manifest(tmp_path / "none")


def write_runs(folder: Path, curves: dict[tuple[str, str], Saturating], seeds: int = 3) -> Manifest:
    """Rows of runs that follow these curves by (arm, size), with noise and a shift for each seed."""
    cells = []
    for number, ((arm, size), curve) in enumerate(curves.items()):
        for seed in range(seeds):
            cell = Cell(arm, size, seed, "minipipe", ())
            random = np.random.default_rng(10 * number + seed)
            a_batch = 2e6 * SIZES[size]
            rows = [{"step": 0, "generations": 0, "eval/accuracy": curve.floor}]
            for step in range(1, 41):
                row = {"step": step, "generations": 128 * step}
                row |= {f"flops/{phase}": share * a_batch for phase, share in TRAINED_BY.items()}
                if step % 2 == 0:
                    luck = random.normal(0, 0.01) + 0.01 * (seed - 1)
                    row["eval/accuracy"] = float(curve.at(a_batch * step)) + luck
                rows.append(row)
            (folder / cell.name).mkdir(parents=True)
            (folder / cell.name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            cells.append(cell)
    manifest = Manifest("known", "Known laws", (0.5,), tuple(cells), SIZES, {cell.name: 40 for cell in cells})
    manifest.save(folder)
    return manifest


def known(exponent: float = 1.3, dearer: float = 2.0, largest: float = 1.0) -> dict[tuple[str, str], Saturating]:
    """Half costs SDPO ``size ** exponent``, GRPO ``dearer`` times that, and the largest size ``largest`` times more."""
    curves = {}
    for arm, factor in (("sdpo", 1.0), ("grpo", dearer)):
        for size, parameters in SIZES.items():
            middle = factor * 1e13 * (parameters / 1e6) ** exponent * (largest if size == "8M" else 1.0)
            curves[arm, size] = Saturating(0.0, 1.0, middle, 2.0)
    return curves


def found_in(folder: Path, curves: dict[tuple[str, str], Saturating]) -> Findings:
    manifest = write_runs(folder, curves)
    return find(read_runs(folder, manifest), manifest.levels)


def test_findings_recover_the_laws_that_rows_follow(tmp_path: Path) -> None:
    findings = found_in(tmp_path, known())
    sdpo, grpo = findings.laws
    assert sdpo.law and sdpo.exponent and grpo.law
    assert sdpo.law.exponent == pytest.approx(1.3, abs=0.06) and 1.3 in sdpo.exponent
    assert sdpo.law.at(4e6) == pytest.approx(1e13 * 4**1.3, rel=0.1)
    assert sdpo.held_out and sdpo.held_out.size == "8M" and sdpo.held_out.holds
    assert [gap.size for gap in findings.gaps] == list(SIZES)
    held = 0
    for gap in findings.gaps:
        assert (gap.arm, gap.reference) == ("grpo", "sdpo") and gap.difference < 0
        times, between = gap.times_less[0.5]
        assert times == pytest.approx(0.5, rel=0.1) and 1.0 not in between
        held += 0.5 in between
    assert held >= 3, "nine of ten intervals hold the truth"
    rung = findings.rungs[0]
    assert rung.spent == pytest.approx(40 * 2e6 * 1e6) and rung.shares == pytest.approx(TRAINED_BY)
    best = {budget.size for budget in findings.budgets["sdpo"]}
    assert best == {"1M"}, "the smallest is the cheapest here, to every score"


def test_a_law_that_the_largest_size_breaks_does_not_hold(tmp_path: Path) -> None:
    sdpo = found_in(tmp_path, known(largest=1.6)).laws[0]
    assert sdpo.held_out and not sdpo.held_out.holds
    assert sdpo.held_out.found == pytest.approx(1.6 * sdpo.held_out.foretold, rel=0.2)


def test_a_larger_size_overtakes_where_it_ends_higher(tmp_path: Path) -> None:
    curves = {
        ("sdpo", "1M"): Saturating(0.0, 0.4, 8e12, 2.0),
        ("sdpo", "2M"): Saturating(0.0, 0.9, 3e13, 2.0),
    }
    budgets = found_in(tmp_path, curves).budgets["sdpo"]
    assert budgets[0].size == "1M" and budgets[-1].size == "2M"
    assert budgets[0].agreed > 0.95 and budgets[-1].agreed > 0.95
    assert all(a.score <= b.score + 1e-9 for a, b in pairwise(budgets))


def test_what_was_not_reached_is_said_in_words(tmp_path: Path) -> None:
    slow = {("sdpo", size): Saturating(0.1, 0.9, 1e15, 1.0) for size in SIZES}
    findings = found_in(tmp_path, slow)
    assert findings.laws[0].law is None
    assert findings.laws[0].note.startswith("0 of 4 sizes reached 50% within their compute")
    assert any("half of the way was not gone" in note for note in findings.rungs[0].notes)


def test_the_page_says_what_is_missing_and_loads_nothing(tmp_path: Path) -> None:
    manifest = write_runs(tmp_path, known(), seeds=1)
    journal = tmp_path / "grpo-8M-seed0" / "metrics.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:3]))  # one evaluation
    page, findings = write_study(tmp_path, manifest)
    text = page.read_text()
    assert "grpo-8M-seed0: 2 of 40 steps" in text and "one seed: intervals show the noise" in text
    assert "1 evaluations are too few" in text
    assert "<svg" in text and "http-equiv" in text and "src=" not in text
    assert (tmp_path / "study.png").stat().st_size > 10_000
    told = json.loads((tmp_path / "findings.json").read_text())
    assert len(told["rungs"]) == 8 and "draws" not in told["rungs"][0]
    assert len(told["runs"]) == 8 and len(told["runs"][0]["points"]["scores"]) == 20
    assert len(findings_lines(findings)) == 2 + 3


def test_runs_without_flops_are_refused_and_those_not_begun_left_out(tmp_path: Path) -> None:
    manifest = write_runs(tmp_path, {("sdpo", "1M"): Saturating(0.0, 1.0, 1e13, 2.0)}, seeds=2)
    (tmp_path / "sdpo-1M-seed1" / "metrics.jsonl").unlink()
    assert [run.seed for run in read_runs(tmp_path, manifest)] == [0]
    rows = [{"step": 0, "eval/accuracy": 0.1}, {"step": 1, "generations": 1}]
    (tmp_path / "sdpo-1M-seed1" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ConfigError, match="sdpo-1M-seed1 recorded no FLOPs"):
        read_runs(tmp_path, manifest)


@pytest.mark.parametrize("name", sorted(studies()))
def test_every_cell_of_every_study_is_a_configuration(name: str, tmp_path: Path) -> None:
    study = studies()[name]
    cells = study.cells(str(tmp_path), [], [], study.seeds[:1])
    sizes = []
    for cell in cells:
        try:
            config = launching.config_of(cell)
        except ConfigError as error:  # a model that a user makes or downloads first
            assert "model.path models/" in str(error)
            continue
        sizes.append(cell.size)
        assert config.seed == cell.seed and config.objective.kind == cell.arm
        assert Path(config.run_dir) == tmp_path / cell.name
    assert sizes


def test_the_ladders_grpo_is_the_papers() -> None:
    (cell,) = studies()["ladder"].cells("x", ["grpo"], ["8B"], [0])
    found, wanted = launching.config_of(cell).objective, paper.grpo()
    apart = {"alpha", "top_k"}  # of SDPO alone
    mine, papers = ({k: v for k, v in asdict(one).items() if k not in apart} for one in (found, wanted))
    assert mine == papers


def test_slurm_lines_ask_for_the_nodes_of_trainers_and_engines() -> None:
    cells = {cell.size: cell for cell in studies()["ladder"].cells("runs/l", ["sdpo"], [], [0])}
    assert "--nodes=2 " in launching.slurm_line(cells["8B"])
    assert "--nodes=4 " in launching.slurm_line(cells["32B"])
    line = launching.slurm_line(cells["8B"])
    assert line.startswith("SDPO_RECIPE=ladder-8b SDPO_RUN_DIR=runs/l/sdpo-8B-seed0 sbatch --job-name=sdpo-8B-seed0 ")
    assert line.endswith("slurm/sdpo_8b.sh seed=0")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing"], "there is no study 'nothing'; the studies are ladder, minipipe-ladder"),
        (["ladder", "--seeds", "a"], "--seeds is 'a'; give whole numbers"),
        (["ladder", "--arms", "ppo"], "the study ladder has no arm 'ppo'; it has sdpo, grpo"),
        (["ladder", "--jobs", "0"], "--jobs is 0; it must be at least 1"),
        (["ladder", "--report", "--out", "nowhere"], "nowhere: no run of the study has recorded"),
        (["ladder", "--list", "no.such.key=1"], "no.such.key"),
        (
            ["minipipe-ladder"],
            "has no config.json; set model.path to a Hugging Face checkpoint directory; the study needs",
        ),
    ],
)
def test_wrong_requests_end_with_a_sentence(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["study", *words])
    assert end.value.code == 2 and said in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "nothing is written for a request that cannot work"


def test_the_list_shows_each_cell_and_how_far_it_got(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["study", "ladder", "--list", "--sizes", "8B", "--seeds", "0"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["0/250", "steps", "sdpo-8B-seed0"],
        ["0/250", "steps", "grpo-8B-seed0"],
    ]
    assert lines[0].endswith("megatron-sdpo train ladder-8b seed=0 run_dir=runs/ladder/sdpo-8B-seed0")


def test_a_study_of_ones_own_is_named_by_its_module(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "ours.py").write_text(
        "from megatron_sdpo.scaling.study import Study\n"
        "RATES = Study('rates', 'Rates', {'8B': 'ladder-8b'}, {'slow': ('optim.lr=1e-6',)}, (0,), (0.5,))\n"
    )
    main(["study", "ours:RATES", "--list"])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("train ladder-8b optim.lr=1e-6 seed=0 run_dir=runs/rates/slow-8B-seed0")
    with pytest.raises(ConfigError, match="module ours has no Study 'SPEED'"):
        study_of("ours:SPEED")
    with pytest.raises(ConfigError, match="importing theirs failed"):
        study_of("theirs:RATES")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_small_study_runs_and_is_not_run_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    asked = ["study", "minipipe-ladder", "--sizes", "w96", "--seeds", "1", "--out", str(tmp_path / "mine")]
    asked += ["steps=8", "evaluation.attempts=1"]
    main(asked)
    said = capsys.readouterr().out
    assert "2 of 2 runs are not finished" in said and "sdpo-w96-seed1 finished" in said
    assert "w96: grpo - sdpo at equal FLOPs" in said
    told = json.loads((tmp_path / "mine" / "findings.json").read_text())
    assert all(rung["spent"] > 1e9 and not math.isnan(rung["shares"]["train"]) for rung in told["rungs"])
    assert [rung["shares"]["score_teacher"] > 0 for rung in told["rungs"]] == [True, False]
    assert set(told["rungs"][0]["shares"]) == set(PHASES)
    main(asked)
    assert "0 of 2 runs are not finished" in capsys.readouterr().out
