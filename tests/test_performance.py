"""mcore/performance.py by hand."""

from dataclasses import replace

import pytest
import torch

from megatron_sdpo import flops
from megatron_sdpo.batching import View
from megatron_sdpo.config import Config, ModelConfig, ObjectiveConfig, TaskConfig
from megatron_sdpo.mcore.performance import performance
from megatron_sdpo.types import Batch, Sample
from tests.test_flops import ONE

CONFIG = Config(name="c", run_dir="r", steps=1, model=ModelConfig(path="m"), task=TaskConfig(name="t"))
SECONDS = {"time/score_student": 0.5, "time/score_teacher": 0.25, "time/train": 0.25, "time/sync": 9.0}
SAMPLES = (
    Sample("0/0/0", 0, (1, 2), (3, 4, 5), (), (1, 2, 3, 4), 0.0),
    Sample("0/0/1", 0, (1, 2), (3,), (), None, 1.0),
)


def of(objective: ObjectiveConfig, world_size: int = 2) -> dict[str, float]:
    batch = Batch(0, SAMPLES, {}, 1)
    return performance(batch, replace(CONFIG, objective=objective), ONE, world_size, SECONDS)


def test_tokens_of_every_pass_are_counted() -> None:
    """A second is spent on 8 tokens as student, scored and trained, and 7 as teacher."""
    assert of(ObjectiveConfig())["perf/tokens_per_s"] == 2 * 8 + 7
    assert of(ObjectiveConfig(kind="grpo"))["perf/tokens_per_s"] == 2 * 8
    assert of(ObjectiveConfig(kind="grpo", kl_coefficient=0.1))["perf/tokens_per_s"] == 3 * 8
    assert of(ObjectiveConfig(kind="next_token"))["perf/tokens_per_s"] == 8


def test_flops_are_shared_by_the_ranks() -> None:
    found = of(ObjectiveConfig(), world_size=4)
    expected = flops.batch_flops(ONE, SAMPLES, ObjectiveConfig()) / 4e12
    assert found["perf/tflops_per_rank"] == pytest.approx(expected)
    trained = ("flops/score_student", "flops/score_teacher", "flops/train")
    assert sum(found[key] for key in trained) == pytest.approx(4e12 * expected), "of all ranks together"
    assert found["flops/train"] == 3 * found["flops/score_student"] and found["flops/score_teacher"] > 0
    assert found["flops/generate"] == flops.generation_flops(ONE, SAMPLES)
    assert of(ObjectiveConfig(kind="grpo"))["flops/score_teacher"] == 0


def test_what_siblings_share_is_not_computed() -> None:
    spared: dict[View, flops.Tokens] = {"student": flops.Tokens(2, 3, 0), "teacher": flops.Tokens(3, 6, 0)}
    penalised = replace(CONFIG, objective=ObjectiveConfig(kind="hybrid", kl_coefficient=0.1))  # scores students twice
    plain, shared = (performance(Batch(0, SAMPLES, {}, 1), penalised, ONE, 2, SECONDS, s) for s in ({}, spared))
    assert (plain["perf/shared_tokens"], shared["perf/shared_tokens"]) == (0.0, 2 * 2 + 3)
    assert plain["perf/tokens_per_s"] - shared["perf/tokens_per_s"] == 2 * 2 + 3
    saved = 2 * flops.forward_flops(ONE, spared["student"]) + flops.forward_flops(ONE, spared["teacher"])
    assert plain["perf/tflops_per_rank"] - shared["perf/tflops_per_rank"] == pytest.approx(saved / 2e12)
    keys = ("flops/score_student", "flops/score_teacher", "flops/train", "flops/generate")
    of_views = [2 * flops.forward_flops(ONE, spared["student"]), flops.forward_flops(ONE, spared["teacher"])]
    assert [plain[key] - shared[key] for key in keys] == [*of_views, 0, 0]


def test_memory_is_that_of_the_process_and_a_cpu_has_no_known_peak() -> None:
    found = of(ObjectiveConfig())
    assert 0.05 < found["perf/memory_gb"] < 1000
    assert ("perf/mfu" in found) is torch.cuda.is_available()
