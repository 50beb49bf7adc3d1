"""The files about a discovery: numbers by hand, what is missing said, what models wrote escaped."""

import dataclasses
import json
from pathlib import Path

import pytest
from PIL import Image

from megatron_sdpo import config as configuration
from megatron_sdpo.config import ConfigError, DiscoveryConfig, TaskConfig
from megatron_sdpo.discovery.record import Exchange, Trial, TrialFiles, TrialId
from megatron_sdpo.report.discovery import summary_lines, write_discovery
from megatron_sdpo.tasks.minipipe import MiniPipe
from recipes.minipipe import minipipe

QUESTIONS = MiniPipe(train_size=2).train_questions()
HOSTILE = "</pre><script>alert(1)</script>"
CONFIG = dataclasses.replace(
    minipipe(),
    task=TaskConfig(name="minipipe", options={"train_size": 2}),
    discovery=DiscoveryConfig(budget=16, seeds=2, best_of_k_samples=20, multi_turn_memory=(1,)),
)


def trial(method: str, question: int, seed: int, first: int | None, attempts: int = 16, successes: int = 0) -> Trial:
    path = () if first is None else (Exchange("over 2", 0.0, HOSTILE), Exchange(HOSTILE, 1.0, ""))
    return Trial(TrialId(method, question, seed), QUESTIONS[question], attempts, successes, first, path, ())


TRIALS = (
    trial("best_of_k", 0, 0, 11, attempts=20, successes=2),
    trial("best_of_k", 1, 0, None, attempts=20),
    trial("sdpo", 0, 0, 3),
    trial("sdpo", 0, 1, 8),
    trial("sdpo", 1, 0, None),
)


def write(run_dir: Path, trials: tuple[Trial, ...]) -> None:
    run_dir.mkdir()
    configuration.save(CONFIG, run_dir / "config.json")
    for each in trials:
        TrialFiles(run_dir / "trials").save(each)


def test_the_numbers_the_page_and_the_picture(tmp_path: Path) -> None:
    write(tmp_path / "run", TRIALS)
    page = write_discovery(tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "discovery.json").read_text())
    assert list(summary["methods"]) == ["best_of_k", "sdpo"]  # multi_turn has no finished trial
    base, sdpo = summary["methods"].values()
    assert base["discovery_at"]["1"] == pytest.approx((2 / 20 + 0) / 2)
    assert base["discovery_at"]["8"] == pytest.approx((1 - 12 * 11 / (20 * 19)) / 2, abs=1e-4)
    assert base["attempts_to_half"] is None and sdpo["fewer_than_best_of_k"] is None
    assert sdpo["discovery_at"] == {"1": 0.0, "4": 0.25, "8": 0.5, "16": 0.5}
    assert (sdpo["attempts_to_half"], sdpo["trials"], sdpo["planned"]) == (8, 3, 4)
    assert sdpo["mean_attempts"] == pytest.approx(((3 + 8) / 2 + 16) / 2, abs=1e-6)
    assert len(sdpo["curve"]["k"]) == len(sdpo["curve"]["low"]) and sdpo["curve"]["k"][-1] == 16
    assert [t["first_success"] for t in summary["trials"]] == [11, None, 3, None, 8]
    html = page.read_text()
    assert "sdpo: 3 of 4 trials" in html
    assert "2 of 20" in html and "3, 8" in html
    assert HOSTILE not in html and "&lt;script&gt;" in html
    assert "http://" not in html.replace("http://www.w3.org", "") and "https://" not in html
    with Image.open(tmp_path / "run" / "discovery.png") as image:
        assert min(image.size) > 400
    assert summary_lines(tmp_path / "run")[1].startswith("sdpo ") and "50% at 8" in summary_lines(tmp_path / "run")[1]


def test_a_directory_without_a_finished_trial_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "run", ())
    with pytest.raises(ConfigError, match="holds no finished trial yet"):
        write_discovery(tmp_path / "run")
