"""Spikes of the gradient norm: the judgement as a function, and what a learner does about it on every rank."""

import json
import re
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sdpo.config import LayoutConfig, SpikeConfig
from megatron_sdpo.mcore.groups import ParallelGroups
from megatron_sdpo.spikes import History, judge
from tests.dist_spikes import run_cases
from tests.launch import run_ranks
from tests.learner_setup import MODELS, write_models

SKIP = SpikeConfig(policy="skip", factor=4.0, window=3, patience=2)


def _actions(norms: list[float], config: SpikeConfig) -> list[str]:
    history, actions = History(), []
    for norm in norms:
        judged = judge(history, norm, config)
        history = judged.history
        actions.append(judged.action)
        if judged.action == "stop":
            break
    return actions


def test_a_spike_is_far_above_the_median_of_what_was_accepted() -> None:
    assert _actions([9.0, 1.0, 2.0, 8.0, 8.1], SKIP) == [*["accept"] * 4, "skip"]  # both medians are 2; 8 is not above
    assert _actions([1.0, 2.0, 9.0, 8.1, 8.0, 1.0], SKIP) == ["accept", "accept", "accept", "skip", "accept", "accept"]
    assert _actions([1.0, 100.0, 1.0, 5.0], SKIP) == ["accept", "accept", "accept", "skip"]  # one outlier moves nothing
    assert _actions([0.0, 0.0, 0.0, 1.0], SKIP) == ["accept"] * 4


def test_patience_ends_and_an_accepted_step_renews_it() -> None:
    assert _actions([1.0, 1.0, 1.0, 5.0, 5.0, 1.0, 5.0, 5.0, 5.0], SKIP)[3:] == [
        *("skip", "skip", "accept", "skip", "skip", "stop")
    ]
    judged = judge(History((1.0, 1.0, 2.0), skipped=2), 5.0, SKIP)
    assert judged.words == (
        "5, 5.0 times the median 1 of the last 3 accepted norms, after 2 skipped steps in a row (spikes.patience)"
    )
    stop = SpikeConfig(policy="stop", factor=4.0, window=3)
    assert _actions([1.0, 1.0, 1.0, 5.0], stop) == ["accept", "accept", "accept", "stop"]


@given(
    norms=st.lists(st.floats(0.0, 1e3), max_size=40),
    factor=st.floats(1.01, 50.0),
    window=st.integers(1, 8),
)
def test_the_history_is_that_of_the_accepted_norms(norms: list[float], factor: float, window: int) -> None:
    config = SpikeConfig(policy="skip", factor=factor, window=window, patience=1000)
    history, accepted = History(), []
    for norm in norms:
        judged = judge(history, norm, config)
        spike = len(accepted) >= window and norm > factor * statistics.median(accepted[-window:]) > 0
        assert judged.action == ("skip" if spike else "accept")
        accepted += [] if spike else [norm]
        history = judged.history
        assert history.norms == tuple(accepted[-window:]) and (history.skipped > 0) == spike
        assert judge(history, norm, SpikeConfig(factor=factor, window=window)).action == "accept"  # off


EXPECTED = {
    "patience": r"training stopped at step 2, before an optimizer step: the gradient norm of the mini-batch of samples"
    r" 2/\d/\d, .* is [\d.]+, [\d.]+ times the median 1e-06 of the last 1 accepted norms, after 3 skipped steps in a"
    r" row \(spikes.patience\); weights, optimizer and teacher are as before that step",
    "stop": r"training stopped at step 0, before an optimizer step: the gradient norm of the mini-batch of samples"
    r" 0/\d/\d, .* is [\d.]+, [\d.]+ times the median 1e-06 of the last 1 accepted norms; weights, optimizer and"
    r" teacher are as before that step",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spikes")
    write_models(folder, models={"llama": MODELS["llama"], "qwen3_moe": 2})
    return folder


def _check(found: dict[str, str]) -> None:
    assert found.keys() == EXPECTED.keys()
    for case, words in EXPECTED.items():
        assert re.fullmatch(words, found[case]), found[case]


def test_one_process_steps_as_megatron_skips_and_stops(folder: Path, groups: ParallelGroups) -> None:
    _check(run_cases(folder, groups, LayoutConfig()))


@pytest.mark.parametrize(
    "layouts",
    [("tp2-sp", "dp2-overlap"), pytest.param(("dp2", "dp2-do", "pp2", "cp2", "dp2ep2"), marks=pytest.mark.slow)],
)
def test_ranks_step_as_megatron_skip_and_stop_together(folder: Path, layouts: tuple[str, ...]) -> None:
    run_ranks("dist_spikes.py", 2, [str(folder), *layouts], timeout=300)
    for layout in layouts:
        _check(json.loads((folder / f"{layout}.json").read_text()))
