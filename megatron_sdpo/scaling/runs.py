"""A study's folder read back: ``study.json`` says which runs it has, each run's ``metrics.jsonl`` how far it got.

FLOPs are those that the rows record (``flops/PHASE``), of every batch up to an evaluation: model FLOPs of attempts,
scoring passes and training. Evaluations are not counted; nor are attempts that no batch received.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_sdpo.config import ConfigError
from megatron_sdpo.scaling.findings import Run
from megatron_sdpo.scaling.laws import Points
from megatron_sdpo.scaling.study import Cell
from megatron_sdpo.tracking import Row, read_metrics

FILE = "study.json"
PHASES = ("generate", "score_student", "score_teacher", "train")
SCORE = "eval/accuracy"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a study's folder is about. ``parameters`` by size: what a token is multiplied by in the layers (of a mixture
    of experts in the chosen ones), without embedding and head. ``steps`` by the name of a cell."""

    study: str
    title: str
    levels: tuple[float, ...]
    cells: tuple[Cell, ...]
    parameters: Mapping[str, int]
    steps: Mapping[str, int]

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{FILE}.tmp"
        temporary.write_text(json.dumps(asdict(self), indent=1) + "\n")
        temporary.replace(folder / FILE)

    def joined(self, earlier: "Manifest") -> "Manifest":
        """This, and what an earlier start of the same study had besides: other seeds, sizes or arms.

        ConfigError where one of its runs has changed in anything: its results would be those of another experiment.
        """
        now = {cell.name: cell for cell in self.cells}
        for cell in earlier.cells:
            mine = now.get(cell.name)
            if mine is not None and (mine.recipe, _meant(mine)) != (cell.recipe, _meant(cell)):
                raise ConfigError(
                    f"{cell.name} of this study was begun as {cell.recipe} {' '.join(cell.overrides)}; it is now"
                    f" {mine.recipe} {' '.join(mine.overrides)}: keep those settings, or name another --out"
                )
        others = tuple(cell for cell in earlier.cells if cell.name not in now)
        return replace(
            self,
            cells=(*self.cells, *others),
            parameters={**earlier.parameters, **self.parameters},
            steps={**earlier.steps, **self.steps},
        )


def _meant(cell: Cell) -> list[str]:
    return [word for word in cell.overrides if not word.startswith("run_dir=")]


def read_manifest(folder: Path) -> Manifest:
    """ConfigError when there is none."""
    if not (folder / FILE).exists():
        raise ConfigError(f"{folder} holds no study: it has no {FILE}; pass the --out of a study that was begun")
    raw = json.loads((folder / FILE).read_text())
    cells = tuple(Cell(**{**cell, "overrides": tuple(cell["overrides"])}) for cell in raw["cells"])
    return Manifest(**{**raw, "levels": tuple(raw["levels"]), "cells": cells})


def steps_done(folder: Path, cell: Cell) -> int:
    """Of a cell: batches whose row is recorded."""
    rows = read_metrics(folder / cell.name)
    return int(rows[-1]["step"] or 0) if rows else 0


def read_runs(folder: Path, manifest: Manifest) -> list[Run]:
    """The runs which have an evaluation from before training, in the study's order; others have not begun."""
    runs = []
    for cell in manifest.cells:
        rows = read_metrics(folder / cell.name)
        if rows and rows[0]["step"] == 0 and rows[0].get(SCORE) is not None:
            runs.append(_run(cell, rows, manifest.parameters[cell.size]))
    return runs


def _run(cell: Cell, rows: Sequence[Row], parameters: int) -> Run:
    flops: dict[str, float] = dict.fromkeys(PHASES, 0.0)
    compute, scores = [], []
    for row in rows[1:]:
        for phase in PHASES:
            flops[phase] += row.get(f"flops/{phase}") or 0.0
        if not any(flops.values()):
            raise ConfigError(f"{cell.name} recorded no FLOPs: it was run by an older version; run it again")
        if (score := row.get(SCORE)) is not None:
            compute.append(sum(flops.values()))
            scores.append(score)
    return Run(
        arm=cell.arm,
        size=cell.size,
        seed=cell.seed,
        parameters=parameters,
        floor=float(rows[0][SCORE] or 0.0),
        points=Points(tuple(compute), tuple(scores)),
        flops=flops,
        generations=int(rows[-1]["generations"] or 0),
    )
