"""Numbers that are not finite stop training before they reach a weight, on every rank and by name."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sdpo.config import LayoutConfig
from megatron_sdpo.launch.run_dir import RunDir
from megatron_sdpo.launch.trainer import kept
from megatron_sdpo.mcore.finite import NonFiniteError, check_scores
from megatron_sdpo.mcore.groups import ParallelGroups
from megatron_sdpo.mcore.scores import StudentScores, TeacherScores
from megatron_sdpo.types import Batch, decode
from tests.dist_finite import POISON, clean_batch, run_cases, with_log_prob
from tests.launch import run_ranks
from tests.learner_setup import write_models

AFTER = "; weights, optimizer and teacher are as before that step"
EXPECTED = {
    "engine": r"sample 0/1/2 \(question slot 1\) has nan among the engine's log-probs,"
    r" at 1 of its 11 response tokens, first at 3",
    "engine of a masked sample": r"sample 0/2/1 \(question slot 2\) has -inf among the engine's log-probs,"
    r" at 2 of its 4 response tokens, first at 0",
    "student": r"sample 0/1/2 \(question slot 1\) has nan among the trainer's old log-probs,"
    r" at 11 of its 11 response tokens, first at 0",
    "teacher": r"sample 0/2/0 \(question slot 2\) has nan among the teacher's log-probs,"
    r" at 6 of its 6 response tokens, first at 0",
    "teacher's states": r"sample 0/2/0 \(question slot 2\) has nan among the teacher's hidden states,"
    r" at 6 of its 6 response tokens, first at 0",
    "loss": r"the loss of the micro-batch of samples? [0-9/, ]*\b0/1/2\b[0-9/, ]* is nan",
    "gradient": r"the gradient norm of the mini-batch of samples 0/0/0, 0/0/1, 0/0/2, 0/1/0, 0/1/1, 0/1/2, 0/2/0, 0/2/1"
    r" and 1 more is inf, with finite losses",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finite")
    write_models(folder)
    shutil.copytree(folder / "llama", folder / "llama-poisoned")
    weights = load_file(folder / "llama" / "model.safetensors")
    weights["model.embed_tokens.weight"][POISON] = math.nan
    save_file(weights, folder / "llama-poisoned" / "model.safetensors", metadata={"format": "pt"})
    return folder


def _check(found: dict[str, str]) -> None:
    assert found.keys() == EXPECTED.keys()
    for case, words in EXPECTED.items():
        sentence = f"training stopped at step 0, before an optimizer step: {words}{re.escape(AFTER)}"
        assert re.fullmatch(sentence, found[case]), found[case]


def test_one_process_stops_by_name_and_changes_nothing(folder: Path, groups: ParallelGroups) -> None:
    _check(run_cases(folder, groups, LayoutConfig()))


@pytest.mark.parametrize(
    ("ranks", "layouts"),
    [
        (2, ("pp2", "dp2-do", "cp2")),
        pytest.param(4, ("pp2dp2", "tp2pp2"), marks=pytest.mark.slow),
    ],
)
def test_all_ranks_stop_together(folder: Path, ranks: int, layouts: tuple[str, ...]) -> None:
    run_ranks("dist_finite.py", ranks, [str(folder), *layouts], timeout=200)
    for layout in layouts:
        _check(json.loads((folder / f"{layout}.json").read_text()))


def test_the_first_cause_is_named_and_its_like_are_counted(groups: ParallelGroups) -> None:
    batch = with_log_prob(with_log_prob(clean_batch(), 2, 1, math.nan), 5, 0, math.inf)
    numbers = {i: torch.full((len(sample.response_ids),), -1.0) for i, sample in enumerate(batch.samples)}
    numbers[0][4] = math.nan
    for samples, expected in (
        (batch, r"sample 0/0/2 .* has nan among the engine's .* \(and 1 more like it\)"),
        (clean_batch(), r"sample 0/0/0 .* has nan among the trainer's old log-probs, at 1 of its 5 .*, first at 4;"),
    ):
        with pytest.raises(NonFiniteError, match=expected):
            check_scores(samples, StudentScores(numbers, {}), TeacherScores({}), groups)


def test_the_batch_is_kept_for_replay(tmp_path: Path, groups: ParallelGroups) -> None:
    batch = with_log_prob(clean_batch(), 2, 1, math.inf)
    told = kept(NonFiniteError("sample 0/0/2 is wrong", batch), RunDir(tmp_path), groups)
    path = tmp_path / "failures" / "step-00000000.msgpack"
    assert str(told) == f"sample 0/0/2 is wrong; the batch is in {path}"
    assert decode(path.read_bytes(), Batch) == batch == told.batch
