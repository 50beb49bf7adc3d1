"""The learner against transformers, and every layout against one process (``tests/same_numbers.py``)."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_sdpo import batching
from megatron_sdpo.config import LayoutConfig
from megatron_sdpo.guard import History
from megatron_sdpo.loop import train
from megatron_sdpo.mcore.groups import ParallelGroups
from megatron_sdpo.mcore.hf import save_hf
from megatron_sdpo.mcore.learner import Learner
from megatron_sdpo.mcore.scores import TeacherScores
from megatron_sdpo.phases import Phases
from megatron_sdpo.types import Batch, Evaluation
from tests.dist_learner import CASES, cases_of, parse, run_cases
from tests.launch import run_ranks
from tests.learner_setup import (
    HIDDEN,
    MODELS,
    VOCABULARY,
    learn,
    make_batch,
    make_config,
    make_learner,
)
from tests.reference.step_naive import first_step, load
from tests.same_numbers import TOLERANCE, check_case, check_weights, distance, metrics_of
from tests.tiny_model import reference_log_probs

if TYPE_CHECKING:
    from megatron_sdpo.reshard.publish import Publisher

BF16_WEIGHT_TOLERANCE = 0.25
"""Of weights as above: most move by less than a few steps of bf16, so one step more or less is seen (0.15 found)."""


UNPADDED = ("tp2", "tp4", "pp2", "tp2pp2")
"""The others fill rows, or give a rank micro-batches without a sample, in the batches here."""


@pytest.fixture(scope="module")
def single(folder: Path, groups: ParallelGroups) -> Path:
    run_cases(folder, groups, LayoutConfig(), folder / "single", CASES)
    return folder / "single"


@pytest.mark.timeout(500)
@pytest.mark.parametrize(
    "layouts",
    [
        pytest.param(("tp2-sp", "pp2vp2", "cp2", "dp2-overlap"), id="2"),
        pytest.param(("tp2", "pp2", "dp2", "dp2-do", "dp2-reduce"), id="2-more", marks=pytest.mark.slow),
        pytest.param(("tp2pp2",), id="4"),
        pytest.param(
            ("tp4", "tp2dp2-sp-do", "pp2dp2", "pp2vp2dp2-overlap", "tp2cp2-sp-do", "pp2cp2"),
            id="4-more",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_every_layout_trains_like_one_process(folder: Path, single: Path, layouts: tuple[str, ...]) -> None:
    ranks = parse(layouts[0]).world_size
    run_ranks("dist_learner.py", ranks, [str(folder), *layouts], timeout=400)
    for layout in layouts:
        cases = cases_of(parse(layout))
        for case in cases:
            before = folder / CASES[case][0]
            check_case(folder / layout / case, single / case, before, BF16_WEIGHT_TOLERANCE)
        case = "next-token" if "next-token" in cases else "sdpo-64"
        pads = [metrics["optim/padding_share"] for metrics in metrics_of(folder / layout / case)]
        assert (min(pads) > 0) == (layout not in UNPADDED), f"{layout} pads {pads}"


def test_the_split_into_micro_batches_changes_nothing(folder: Path, single: Path) -> None:
    for case in ("sdpo-64", "sdpo-1"):
        for ours, theirs in zip(metrics_of(single / case), metrics_of(single / "sdpo-4096"), strict=True):
            assert ours == pytest.approx(theirs, rel=TOLERANCE)
        found, expected = (load_file(single / name / "model.safetensors") for name in (case, "sdpo-4096"))
        check_weights(found, expected, load_file(folder / "llama" / "model.safetensors"))


class WidestLogits(TorchDispatchMode):
    """The most rows that any tensor had whose other axis is the vocabulary; the head itself is not meant."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.dim() > 1 and x.shape[-1] == VOCABULARY and x.shape[-2] != HIDDEN:
                self.rows = max(self.rows, x.numel() // VOCABULARY)
        return out


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("objective.support=vocabulary", "objective.sample_weighting=teacher_confidence"),
        ("teacher.kind=trust_region", "objective.sample_weighting=teacher_confidence"),
        ("objective.kind=hybrid", "objective.kl_coefficient=0.1"),
        ("objective.kind=next_token",),
    ],
    ids=["sdpo", "vocabulary", "trust-region", "hybrid", "next-token"],
)
def test_no_pass_holds_more_logits_than_a_chunk(
    folder: Path, groups: ParallelGroups, overrides: tuple[str, ...]
) -> None:
    """Scoring, teaching, training forward and backward; one micro-batch whose responses are 68 tokens."""
    metrics = []
    for chunk, most in ((7, 7), (1000, sum(len(s.response_ids) for s in make_batch().samples))):
        config = make_config(folder / "llama", (*overrides, f"layout.head_chunk_tokens={chunk}"))
        learner = make_learner(config, groups, folder / "llama-teacher")
        with WidestLogits() as seen:
            metrics.append(learn(learner, make_batch()))
            learner.log_probs(range(2, 60))
        assert seen.rows == most
    assert metrics[0] == pytest.approx(metrics[1], rel=TOLERANCE)


def test_the_cases_are_what_they_are_meant_to_be(single: Path) -> None:
    """Gradients are clipped, drift weights move, importance weights are capped, ranks of DP2 pad."""
    assert all(metrics["optim/grad_norm"] > 0.05 for case in CASES for metrics in metrics_of(single / case))
    assert all(metrics["loss/divergence"] > 0.01 for metrics in metrics_of(single / "sdpo-64"))
    assert metrics_of(single / "sdpo-mini-batches")[0]["loss/drift_weight/max"] > 1.001
    assert metrics_of(single / "sdpo-64")[0]["loss/mismatch_weight/max"] == 2.0
    samples = make_batch().samples
    shares = batching.assign([1] * 9, range(9), 2)
    ranks = [batching.micro_batches(samples, shares, "student", 1, rank, torch.device("cpu")) for rank in (0, 1)]
    assert [[batch.samples for batch in batches].count(()) for batches in ranks] == [0, 1]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("objective.alpha=0", "rollout.temperature=0.7"),
        ("objective.alpha=1", "objective.aggregation=sequence_mean", "optim.clip_grad=1000"),
        ("objective.tail=false", "objective.engine_mismatch_cap=none", "rollout.temperature=1.6"),
        ("objective.kind=grpo", "rollout.temperature=0.7"),
        ("objective.kind=next_token", "objective.aggregation=sequence_mean"),
        (
            *("objective.kind=hybrid", "objective.grpo_share=0.6"),
            *("objective.aggregation=sequence_mean", "objective.masked_in_denominator=false"),
        ),
        ("objective.support=sampled", "objective.alpha=1", "rollout.temperature=0.7"),
        ("objective.support=sampled", "objective.alpha=1", "objective.credit=sequence"),
        ("objective.credit=token", "objective.masked_in_denominator=true"),
        ("objective.support=vocabulary", "rollout.temperature=0.7", "objective.sample_weighting=teacher_confidence"),
        ("teacher.kind=trust_region", "teacher.mixture=0.4", "rollout.temperature=0.7"),
        ("objective.kind=grpo", "objective.kl_coefficient=0.3", "objective.aggregation=sequence_mean"),
        ("objective.sample_weighting=failed_only", "objective.kind=hybrid"),
        ("objective.sample_weighting=teacher_confidence", "objective.teacher_confidence_beta=0.3"),
        ("objective.sample_weighting=question_difficulty", "objective.stop_at_saturation=1"),
    ],
    ids=[
        "sdpo",
        "alpha-0-tempered",
        "alpha-1-sequence-mean",
        "no-tail-tempered",
        "grpo",
        "next-token",
        "hybrid-sequence-mean-of-the-taught",
        "sampled",
        "sequence-credit",
        "token-credit-of-all",
        "vocabulary",
        "trust-region-tempered",
        "grpo-penalty-sequence-mean",
        "failed-only",
        "confidence",
        "difficulty",
    ],
)
def test_one_step_equals_transformers_and_autograd(
    folder: Path, groups: ParallelGroups, tmp_path: Path, model: str, overrides: tuple[str, ...]
) -> None:
    config = make_config(folder / model, ("layout.tokens_per_micro_batch=64", *overrides))
    learner = make_learner(config, groups, folder / f"{model}-teacher")
    metrics = learn(learner, make_batch())
    student, teacher = load(folder / model), load(folder / f"{model}-teacher")
    loss, grad_norm, weights = first_step(student, teacher, make_batch().samples, config)
    # Advantages of both signs nearly cancel in GRPO's sum: what is left of it has their rounding.
    assert metrics["loss/total"] == pytest.approx(loss, rel=TOLERANCE, abs=5e-8)
    assert metrics["optim/grad_norm"] == pytest.approx(grad_norm, rel=TOLERANCE)
    save_hf(learner.model, tmp_path / "after", groups, config.layout, folder / model)
    before = load_file(folder / model / "model.safetensors")
    # the reference's divergence is float64, and the few gradients near Adam's epsilon feel that
    found = load_file(tmp_path / "after" / "model.safetensors")
    assert distance(found, weights) <= 5e-5 * distance(weights, before)


def _with_contexts(batch: Batch, **changes: Any) -> Batch:
    return dataclasses.replace(batch, samples=tuple(dataclasses.replace(s, **changes) for s in batch.samples))


def _trained(folder: Path, groups: ParallelGroups, batch: Batch, teacher: Path | None) -> dict[str, float]:
    return learn(make_learner(make_config(folder / "llama"), groups, teacher), batch)


@pytest.mark.parametrize(("model", "dtype"), [("llama", "bfloat16"), ("qwen3-tied", "float32")])
def test_the_heads_gradient_is_in_the_buffer_when_the_loss_is_there(
    folder: Path, groups: ParallelGroups, model: str, dtype: str
) -> None:
    """None of the head's is handed out; a tied embedding adds its own in the backward pass."""
    learner = make_learner(make_config(folder / model, (f"model.dtype={dtype}",)), groups)
    batch, weight = make_batch(), cast(Any, learner.model.head())
    student = learner.score_student(batch)
    teacher = learner.score_teacher(batch, student)
    micro_batches, on_hidden = learner._passes(batch, range(len(batch.samples)), student, teacher)
    of_head = []

    def watched(micro_batch: batching.MicroBatch, hidden_NH: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        found = on_hidden(micro_batch, hidden_NH)
        of_head.append(weight.main_grad.clone())
        return found

    learner._accumulate(micro_batches, watched)
    assert len(of_head) == 1 and of_head[0].dtype == torch.float32 and of_head[0].norm() > 0
    assert torch.equal(of_head[0], weight.main_grad) == (model == "llama")
    assert weight.grad is None


def test_a_teacher_that_knows_no_more_teaches_nothing(folder: Path, groups: ParallelGroups) -> None:
    batch = make_batch()
    same = tuple(dataclasses.replace(s, teacher_prompt_ids=s.prompt_ids) for s in batch.samples)
    metrics = _trained(folder, groups, dataclasses.replace(batch, samples=same), teacher=None)
    assert metrics["loss/tokens"] == sum(len(s.response_ids) for s in same)
    assert metrics["loss/total"] == pytest.approx(0.0, abs=1e-9)
    assert metrics["optim/grad_norm"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("override", ["objective.support=vocabulary", "teacher.kind=trust_region"])
def test_kept_hidden_states_serve_in_bf16(folder: Path, groups: ParallelGroups, override: str) -> None:
    """The teacher begins as the student and reads the same prompt: what is left is the rounding of bf16."""
    batch = make_batch()
    same = tuple(dataclasses.replace(s, teacher_prompt_ids=s.prompt_ids) for s in batch.samples)
    config = make_config(folder / "llama", ("model.dtype=bfloat16", override))
    metrics = learn(make_learner(config, groups), dataclasses.replace(batch, samples=same))
    assert 0.0 <= metrics["loss/total"] < 1e-4


def test_the_reference_is_where_the_run_began(folder: Path, groups: ParallelGroups) -> None:
    learner = make_learner(make_config(folder / "llama", ("objective.kind=grpo", "objective.kl_coefficient=1")), groups)
    distances = [learn(learner, make_batch(step))["loss/reference_kl"] for step in range(3)]
    assert distances[0] == 0.0 < distances[1] < distances[2]


def test_samples_without_a_context_contribute_nothing(folder: Path, groups: ParallelGroups) -> None:
    batch, teacher = make_batch(), folder / "llama-teacher"
    taught = tuple(s for s in batch.samples if s.teacher_prompt_ids is not None)
    assert 0 < len(taught) < len(batch.samples)
    everything = _trained(folder, groups, batch, teacher)
    alone = _trained(folder, groups, dataclasses.replace(batch, samples=taught), teacher)
    assert everything == pytest.approx(alone, rel=TOLERANCE)
    nothing = _trained(folder, groups, _with_contexts(batch, teacher_prompt_ids=None), teacher)
    assert (nothing["loss/total"], nothing["optim/grad_norm"], nothing["loss/tokens"]) == (0.0, 0.0, 0.0)


def test_scores_of_another_batch_are_refused(folder: Path, groups: ParallelGroups) -> None:
    learner = make_learner(make_config(folder / "llama"), groups)
    batch = make_batch()
    with pytest.raises(RuntimeError, match="teacher's scores do not belong together"):
        learner.train(batch, learner.score_student(batch), TeacherScores({}))


@pytest.mark.parametrize("model", MODELS)
def test_probe_log_probs_equal_transformers(folder: Path, groups: ParallelGroups, model: str) -> None:
    learner = make_learner(make_config(folder / model, ("rollout.temperature=0.7",)), groups)
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(1, VOCABULARY, (33,), generator=generator).tolist()
    assert learner.log_probs(ids) == pytest.approx(reference_log_probs(folder / model, ids).tolist(), abs=1e-5)


@pytest.mark.parametrize("when", ["generation_batch", "optimizer_step"])
def test_teacher_and_step_follow_each_batch(folder: Path, groups: ParallelGroups, when: str) -> None:
    overrides = ("teacher.update_rate=0.25", f"teacher.update_every={when}")
    learner = make_learner(make_config(folder / "llama", overrides), groups)
    before = [parameter.detach().clone() for parameter in learner.model.parameters()]
    learn(learner, make_batch())
    assert learner.step == 1
    for teacher, old, new in zip(learner.teacher.tensors, before, learner.model.parameters(), strict=True):
        torch.testing.assert_close(teacher, 0.75 * old + 0.25 * new.detach(), rtol=0, atol=3e-7)


@pytest.mark.parametrize("when", ["generation_batch", "optimizer_step"])
@pytest.mark.parametrize("kind", ["sdpo", "grpo"])
def test_the_guard_slows_student_and_teacher_while_rewards_are_down(
    folder: Path, groups: ParallelGroups, kind: str, when: str
) -> None:
    overrides = ("guard.signal=reward", "guard.reward_window=1", "guard.damping=0.25", f"teacher.update_every={when}")
    overrides += (f"objective.kind={kind}", "teacher.update_rate=0.4", "optim.lr_decay=linear")
    learner = make_learner(make_config(folder / "llama", overrides), groups)
    plain = make_learner(make_config(folder / "llama", (*overrides, "guard.signal=off")), groups)
    for step, (reward, factor) in enumerate([(0.5, 1.0), (0.3, 0.25), (0.45, 1.0)]):
        batch = make_batch(step)
        samples = [dataclasses.replace(s, reward=reward + 0.05 * (-1) ** i) for i, s in enumerate(batch.samples[:8])]
        batch = dataclasses.replace(batch, samples=tuple(samples))
        teacher = [weight.clone() for weight in learner.teacher.tensors]
        metrics, unguarded = learn(learner, batch), learn(plain, batch)
        assert (metrics["optim/guard"], unguarded["optim/guard"]) == (factor, 1.0)
        assert metrics["optim/lr"] == factor * unguarded["optim/lr"] == pytest.approx(factor * 1e-3 * (1 - step / 10))
        assert {group["lr"] for group in learner.optimizer.param_groups} == {metrics["optim/lr"]}
        students = learner.model.parameters() if kind == "sdpo" else ()  # GRPO has no teacher
        for new, old, student in zip(learner.teacher.tensors, teacher, students, strict=True):
            rate = 0.4 * factor
            torch.testing.assert_close(new, (1 - rate) * old + rate * student.detach(), rtol=0, atol=3e-7)


class _Loop:
    """All that the loop needs around a learner: made-up batches and accuracies, and nowhere to send weights."""

    ACCURACIES: ClassVar = {0: 0.1, 2: 0.9, 4: 0.5, 5: 0.85}

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self.rows: dict[int, dict[str, float]] = {}
        self.saved: list[History] = []

    def batch(self, step: int) -> Batch:
        return make_batch(step)

    def evaluate(self, version: int) -> Evaluation:
        return Evaluation(version, {"eval/accuracy": self.ACCURACIES[version]})

    def published(self, version: int) -> None:
        assert version == self.learner.step

    def release(self) -> None:
        pass

    def publish(self, version: int) -> dict[str, float]:
        return {"sync/version": version}

    def save_if_due(self, cursor: int) -> dict[str, float]:
        self.saved.append(self.learner.history)
        return {"time/checkpoint_background": float(cursor)}

    def finish(self) -> None:
        self.finished = len(self.rows)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.rows[step] = dict(metrics)


def test_the_loop_tells_the_guard_of_every_evaluation_before_the_checkpoint(
    folder: Path, groups: ParallelGroups
) -> None:
    overrides = ("steps=5", "evaluation.every=2", "guard.signal=accuracy", "guard.damping=0.5")
    config = make_config(folder / "llama", overrides)
    around = _Loop(make_learner(config, groups))
    train(config, around, around.learner, cast("Publisher", around), around, around, Phases())
    assert [history.accuracies for history in around.saved] == [
        *((0.1,), (0.1, 0.9), (0.1, 0.9), (0.1, 0.9, 0.5), (0.1, 0.9, 0.5, 0.85)),
    ]
    rewards = [sum(s.reward for s in make_batch(step).samples) / 9 for step in range(5)]
    assert list(around.saved[-1].rewards) == pytest.approx(rewards)
    assert around.rows[0] == {"eval/accuracy": 0.1}
    assert [around.rows[step].get("time/checkpoint_background") for step in range(1, 6)] == [None, 3, 6, 9, 12]
    assert around.finished == 6
    assert [around.rows[step]["optim/guard"] for step in range(1, 6)] == [1.0, 1.0, 1.0, 1.0, 0.5]

    resumed = _Loop(make_learner(config, groups))
    resumed.learner.step, resumed.learner.history = 4, around.saved[3]  # what it was evaluated at is in the checkpoint
    train(config, resumed, resumed.learner, cast("Publisher", resumed), resumed, resumed, Phases())
    assert list(resumed.rows) == [5] and resumed.saved[0].accuracies == around.saved[4].accuracies


def test_a_teacher_that_follows_each_optimizer_step_has_followed_them_all(folder: Path, groups: ParallelGroups) -> None:
    overrides = ("teacher.update_rate=0.5", "teacher.update_every=optimizer_step", "optim.mini_batches=2")
    learner = make_learner(make_config(folder / "llama", overrides), groups)
    wrapped = learner.optimizer.step_with_ready_grads
    weights = [[parameter.detach().clone() for parameter in learner.model.parameters()]]

    def step() -> Any:
        result = wrapped()
        weights.append([parameter.detach().clone() for parameter in learner.model.parameters()])
        return result

    learner.optimizer.step_with_ready_grads = step
    learn(learner, make_batch())
    assert len(weights) == 3
    for teacher, w0, w1, w2 in zip(learner.teacher.tensors, *weights, strict=True):
        torch.testing.assert_close(teacher, 0.25 * w0 + 0.25 * w1 + 0.5 * w2, rtol=0, atol=3e-7)
