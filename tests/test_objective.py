"""objective.py: weights and advantages by hand, token losses by hand, and what must not matter."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sdpo.config import ObjectiveConfig
from megatron_sdpo.credit import (
    advantages,
    confidence_factors,
    question_factors,
    sampled_advantages,
    sequence_advantages,
    token_weights,
    without_target,
)
from megatron_sdpo.divergence import divergence, sampled_log_probs, student_support, support_log_probs
from megatron_sdpo.objective import TokenTargets, loss, reference_kl

VOCABULARY, K = 24, 6
CONFIGS = {
    "sdpo": ObjectiveConfig(),
    "vocabulary": ObjectiveConfig(support="vocabulary"),
    "sampled": ObjectiveConfig(support="sampled", alpha=1.0),
    "sequence": ObjectiveConfig(support="sampled", alpha=1.0, credit="sequence"),
    "grpo": ObjectiveConfig(kind="grpo"),
    "penalised": ObjectiveConfig(kind="grpo", kl_coefficient=0.1),
    "next_token": ObjectiveConfig(kind="next_token"),
    "hybrid": ObjectiveConfig(kind="hybrid"),
}


def random_batch(tokens: int, seed: int = 0) -> tuple[Tensor, TokenTargets]:
    """Logits [tokens, V] and targets with every field, the policy a little away from where the batch began."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    old_TV = 2.0 * normal(tokens, VOCABULARY)
    ids_TK = student_support(old_TV, K)
    response_ids_T = torch.randint(VOCABULARY, (tokens,), generator=generator)
    old_T = sampled_log_probs(old_TV, response_ids_T)
    targets = TokenTargets(
        response_ids_T=response_ids_T,
        weights_T=torch.rand(tokens, generator=generator) + 0.1,
        policy_weights_T=torch.linspace(0.2, 0.4, tokens),
        old_log_probs_T=old_T,
        engine_log_probs_T=old_T + 0.3 * normal(tokens),
        support_ids_TK=ids_TK,
        teacher_log_probs_TK=support_log_probs(old_TV + normal(tokens, VOCABULARY), ids_TK, with_tail=True),
        teacher_logits_TV=old_TV + normal(tokens, VOCABULARY),
        teacher_hidden_TH=torch.ones(tokens, 3),
        advantages_T=normal(tokens),
        teacher_advantages_T=normal(tokens),
        reference_log_probs_T=old_T + normal(tokens),
    )
    return old_TV + 0.3 * normal(tokens, VOCABULARY), targets


def loss_and_gradient(logits_TV: Tensor, targets: TokenTargets, config: ObjectiveConfig) -> tuple[Tensor, Tensor, Any]:
    leaf_TV = logits_TV.clone().requires_grad_()
    value, metrics = loss(leaf_TV, targets, config)
    (grad_TV,) = torch.autograd.grad(value, leaf_TV)
    return value.detach(), grad_TV, metrics


# ------------------------------------------------------------------------------ weights and advantages


@pytest.mark.parametrize(
    ("aggregation", "masked_in_denominator", "expected"),
    [
        ("token_mean", None, [1 / 6, 0.0, 1 / 6]),
        ("token_mean", True, [1 / 10, 0.0, 1 / 10]),
        ("sequence_mean", None, [1 / 6, 0.0, 1 / 12]),
        ("sequence_mean", False, [1 / 4, 0.0, 1 / 8]),
    ],
)
def test_token_weights_by_hand(aggregation: Any, masked_in_denominator: bool | None, expected: list[float]) -> None:
    config = ObjectiveConfig(aggregation=aggregation, masked_in_denominator=masked_in_denominator)
    assert token_weights([2, 4, 4], [True, False, True], config) == pytest.approx(expected, rel=1e-15)
    assert token_weights([2, 4], [False, False], config) == [0.0, 0.0]
    assert token_weights([], [], config) == []
    assert token_weights([0, 4], [True, True], config) == [0.0, 1 / 4 if aggregation == "token_mean" else 1 / 8]


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_weights_of_all_tokens_sum_to_one(aggregation: Any) -> None:
    lengths = [1, 7, 3, 12]
    weights = token_weights(lengths, [True] * 4, ObjectiveConfig(aggregation=aggregation))
    assert math.fsum(w * length for w, length in zip(weights, lengths, strict=True)) == pytest.approx(1.0)


def test_advantages_by_hand() -> None:
    rewards, groups = [1.0, 0.0, 0.5, 0.0, 0.0, 0.5], [7, 7, 3, 7, 7, 5]
    assert advantages(rewards, groups, std=False) == [0.75, -0.25, 0.0, -0.25, -0.25, 0.0]
    expected = [1.5, -0.5, 0.0, -0.5, -0.5, 0.0]  # the sample standard deviation of 1, 0, 0, 0 is 1/2
    assert advantages(rewards, groups, std=True) == pytest.approx(expected, rel=1e-5)
    assert advantages([0.1, 0.1, 0.1], [0, 0, 0], std=True) == pytest.approx([0.0] * 3, abs=1e-9)


REWARDS, GROUPS = [1.0, 0.6, 0.0, 1.0, 0.0, 0.4, 0.2, 0.0, 0.0], [0, 0, 0, 1, 1, 1, 2, 2, 2]
"""Success rates 2/3, 1/3 and 0 when a reward of 0.5, or of 0.6, is a success."""


@pytest.mark.parametrize("success", [0.5, 0.6])
@pytest.mark.parametrize(
    ("weighting", "saturation", "stopped", "untaught"),
    [
        ("uniform", None, "---------", "---------"),
        ("failed_only", None, "---------", "xx-x-----"),
        ("uniform", 0.6, "xxx------", "xxx------"),
        ("uniform", 2 / 3, "xxx------", "xxx------"),
        ("failed_only", 0.6, "xxx------", "xxxx-----"),
        ("uniform", 1.0, "---------", "---------"),
    ],
)
def test_samples_without_target_by_hand(
    weighting: Any, saturation: float | None, stopped: str, untaught: str, success: float
) -> None:
    config = ObjectiveConfig(sample_weighting=weighting, stop_at_saturation=saturation)
    found = without_target(REWARDS, GROUPS, success, config)
    assert found == ([mark == "x" for mark in stopped], [mark == "x" for mark in untaught])


def test_question_factors_by_hand() -> None:
    config = ObjectiveConfig(sample_weighting="question_difficulty")
    # sqrt(2)/3, sqrt(2)/3 and 0, of mean sqrt(8)/9
    for success in (0.5, 0.6):
        assert question_factors(REWARDS, GROUPS, success, config) == pytest.approx([1.5] * 6 + [0.0] * 3)
    assert question_factors([1.0, 0.0], [0, 1], 0.5, config) == [0.0, 0.0]
    assert question_factors([], [], 0.5, config) == []
    assert question_factors(REWARDS, GROUPS, 0.5, ObjectiveConfig()) == [1.0] * 9


def test_confidence_factors_by_hand() -> None:
    factors_T = confidence_factors(torch.tensor([0.0, math.log(2), math.log(4)]), 0.5)
    assert factors_T.tolist() == pytest.approx([1.0, 0.5**0.5, 0.5])


# -------------------------------------------------------------------------------------------- by hand


def two_token_case(ratio: float, **fields: float) -> tuple[Tensor, TokenTargets]:
    """One position, two tokens of probability 1/2; the first was sampled with probability 1 / (2 ratio)."""
    tensors = {name: torch.tensor([value]) for name, value in fields.items()}
    old_T = torch.tensor([math.log(0.5 / ratio)])
    return torch.zeros(1, 2), TokenTargets(torch.tensor([0]), torch.ones(1), old_T, **tensors)


@pytest.mark.parametrize(
    ("advantage", "ratio", "expected", "flows"),
    [
        (1.0, 1.0, -1.0, True),
        (1.0, 1.2, -1.2, True),
        (1.0, 1.5, -1.28, False),  # clip-higher at 1 + 0.28
        (1.0, 0.5, -0.5, True),
        (-1.0, 1.0, 1.0, True),
        (-1.0, 0.5, 0.8, False),  # clip at 1 - 0.2
        (-1.0, 1.5, 1.5, True),
        (-1.0, 5.0, 3.0, False),  # dual clip
        (-0.5, 5.0, 1.5, False),
        (2.0, 5.0, -2.56, False),
    ],
)
def test_grpo_by_hand(advantage: float, ratio: float, expected: float, flows: bool) -> None:
    logits_TV, targets = two_token_case(ratio, advantages_T=advantage)
    value, grad_TV, metrics = loss_and_gradient(logits_TV, targets, ObjectiveConfig(kind="grpo"))
    assert value.item() == pytest.approx(expected, rel=1e-6)
    slope = -advantage * ratio * 0.5 if flows else 0.0  # d log p / dz = 1 - 1/2
    assert grad_TV[0].tolist() == pytest.approx([slope, -slope], rel=1e-6)
    assert metrics["loss/clipped"].item() == (0.0 if flows else 1.0)
    assert metrics["loss/ratio"].item() == pytest.approx(ratio, rel=1e-6)


def test_grpo_without_dual_clip() -> None:
    logits_TV, targets = two_token_case(5.0, advantages_T=-1.0)
    value, _, _ = loss_and_gradient(logits_TV, targets, ObjectiveConfig(kind="grpo", dual_clip=None))
    assert value.item() == pytest.approx(5.0, rel=1e-6)


def test_reference_penalty_by_hand() -> None:
    """The reference has 1/4 where the policy has 1/2; the penalty bears no importance weight."""
    logits_TV, targets = two_token_case(
        1.0, advantages_T=0.0, reference_log_probs_T=math.log(0.25), engine_log_probs_T=math.log(0.4)
    )
    value, grad_TV, metrics = loss_and_gradient(logits_TV, targets, ObjectiveConfig(kind="grpo", kl_coefficient=0.1))
    kl = 0.5 + math.log(2) - 1
    assert value.item() == pytest.approx(0.1 * kl, rel=1e-5)
    assert grad_TV[0].tolist() == pytest.approx([0.025, -0.025], rel=1e-5)  # (1 - r) d log p / dz
    assert metrics["loss/reference_kl"].item() == pytest.approx(kl, rel=1e-5)


def test_the_reference_penalty_averages_to_the_divergence() -> None:
    log_p_V, log_r_V = (torch.randn(2, 24, generator=torch.Generator().manual_seed(6)) * 2).double().log_softmax(1)
    expected = (log_p_V.exp() * (log_p_V - log_r_V)).sum()
    torch.testing.assert_close((log_p_V.exp() * reference_kl(log_p_V, log_r_V)).sum(), expected)


@pytest.mark.parametrize(("cap", "weight"), [(2.0, 1.25), (1.1, 1.1), (None, 1.0)])
def test_engine_mismatch_weight_by_hand(cap: float | None, weight: float) -> None:
    """The engine sampled with probability 0.4 where the trainer says 0.5."""
    logits_TV, targets = two_token_case(1.0, advantages_T=1.0, engine_log_probs_T=math.log(0.4))
    config = ObjectiveConfig(kind="grpo", engine_mismatch_cap=cap)
    value, grad_TV, metrics = loss_and_gradient(logits_TV, targets, config)
    assert value.item() == pytest.approx(-weight, rel=1e-6)
    assert grad_TV[0].tolist() == pytest.approx([-0.5 * weight, 0.5 * weight], rel=1e-6)
    assert metrics["loss/mismatch/max"].item() == pytest.approx(math.log(1.25), rel=1e-5)
    assert metrics["loss/mismatch_weight"].item() == pytest.approx(weight, rel=1e-6)
    assert loss_and_gradient(logits_TV, dataclasses.replace(targets, old_log_probs_T=None), config)[0] == value


@pytest.mark.parametrize(
    ("drift_clip", "cap", "weight"),
    [(None, None, 1.0), (2.0, None, 1.5), (1.2, None, 1.2), (None, 2.0, 1.25), (2.0, 2.0, 1.875)],
)
def test_sdpo_weights_by_hand(drift_clip: float | None, cap: float | None, weight: float) -> None:
    """Drift 1.5, mismatch 1.25, both constants to the gradient."""
    logits_TV, targets = two_token_case(1.5, engine_log_probs_T=math.log(0.5 / 1.5 / 1.25))
    teacher_TB = torch.tensor([[0.25, 0.75]]).log()
    targets = dataclasses.replace(targets, support_ids_TK=torch.tensor([[0]]), teacher_log_probs_TK=teacher_TB)
    config = ObjectiveConfig(alpha=1.0, top_k=1, policy_drift_clip=drift_clip, engine_mismatch_cap=cap)
    value, grad_TV, metrics = loss_and_gradient(logits_TV, targets, config)
    kl = 0.5 * math.log(4 / 3)
    assert value.item() == pytest.approx(weight * kl, rel=1e-6)
    slope = weight * 0.25 * math.log(3)  # p_0 (log 2 - KL)
    assert grad_TV[0].tolist() == pytest.approx([slope, -slope], rel=1e-6)
    assert metrics["loss/divergence"].item() == pytest.approx(kl, rel=1e-6)
    assert metrics["loss/entropy"].item() == pytest.approx(math.log(2), rel=1e-6)


def test_sdpo_passes_its_settings_on() -> None:
    logits_TV, targets = random_batch(9)
    assert targets.support_ids_TK is not None and targets.teacher_log_probs_TK is not None
    for alpha, tail in [(0.0, True), (0.5, False), (1.0, True)]:
        config = ObjectiveConfig(alpha=alpha, tail=tail, policy_drift_clip=None, engine_mismatch_cap=None)
        values_T = divergence(logits_TV, targets.support_ids_TK, targets.teacher_log_probs_TK, alpha, tail)
        torch.testing.assert_close(loss(logits_TV, targets, config)[0], (targets.weights_T * values_T).sum())


def test_next_token_is_weighted_cross_entropy() -> None:
    logits_TV, targets = random_batch(9)
    targets = TokenTargets(targets.response_ids_T, targets.weights_T)
    value, grad_TV, metrics = loss_and_gradient(logits_TV, targets, ObjectiveConfig(kind="next_token"))
    leaf_TV = logits_TV.double().requires_grad_()
    losses_T = torch.nn.functional.cross_entropy(leaf_TV, targets.response_ids_T, reduction="none")
    expected = (targets.weights_T.double() * losses_T).sum()
    torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad_TV.double(), torch.autograd.grad(expected, leaf_TV)[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(metrics["loss/cross_entropy"].double(), losses_T.sum().detach())


SAMPLED = ObjectiveConfig(support="sampled", alpha=1.0, policy_drift_clip=None, engine_mismatch_cap=None)


def every_token(log_p_V: Tensor, log_q_V: Tensor) -> tuple[Tensor, TokenTargets]:
    """One position repeated for each token of the vocabulary, sampled once and weighted by its probability."""
    count = len(log_p_V)
    targets = TokenTargets(torch.arange(count), log_p_V.exp(), teacher_log_probs_TK=log_q_V[:, None])
    return log_p_V.expand(count, -1), targets


def test_sampled_by_hand() -> None:
    """The sampled token has 1/2 with the student and 1/4 with the teacher: advantage -log 2."""
    logits_TV, targets = two_token_case(1.0)
    targets = dataclasses.replace(targets, teacher_log_probs_TK=torch.tensor([[0.25]]).log())
    value, grad_TV, metrics = loss_and_gradient(logits_TV, targets, SAMPLED)
    assert value.item() == pytest.approx(-(math.log(2) ** 2), rel=1e-6)
    assert grad_TV[0].tolist() == pytest.approx([0.5 * math.log(2), -0.5 * math.log(2)], rel=1e-6)
    assert metrics["loss/divergence"].item() == pytest.approx(math.log(2), rel=1e-6)


def test_the_sampled_gradient_averages_to_that_of_the_whole_divergence() -> None:
    log_p_V, log_q_V = (torch.randn(2, 24, generator=torch.Generator().manual_seed(5)) * 2).double().log_softmax(1)
    _, grad_TV, _ = loss_and_gradient(*every_token(log_p_V, log_q_V), SAMPLED)
    leaf_V = log_p_V.clone().requires_grad_()
    p_V = leaf_V.softmax(0)
    kl = (p_V * (p_V.log() - log_q_V)).sum()
    torch.testing.assert_close(grad_TV.sum(dim=0), torch.autograd.grad(kl, leaf_V)[0], rtol=1e-10, atol=1e-12)


def test_sequence_advantages_by_hand() -> None:
    log_p_T, log_q_T = torch.tensor([0.5, 0.5, 0.25]).log(), torch.tensor([0.25, 0.5, 0.0]).log()
    bounds = ObjectiveConfig(alpha=1.0, advantage_clip=3.0, advantage_clip_sides="two").advantage_bounds
    advantages_T = sampled_advantages(log_p_T, log_q_T, bounds)
    assert advantages_T.tolist() == pytest.approx([-math.log(2), 0.0, -3.0])
    half = -0.5 * math.log(2)
    assert sequence_advantages(advantages_T, [2, 0, 1]).tolist() == pytest.approx([half, half, -3.0])
    assert sequence_advantages(advantages_T[:0], []).shape == (0,)

    logits_TV, targets = two_token_case(1.0, teacher_advantages_T=half)
    targets = dataclasses.replace(targets, teacher_log_probs_TK=torch.tensor([[0.25]]).log())
    value, grad_TV, _ = loss_and_gradient(logits_TV, targets, dataclasses.replace(SAMPLED, credit="sequence"))
    assert value.item() == pytest.approx(half * math.log(2), rel=1e-6)
    assert grad_TV[0].tolist() == pytest.approx([-0.5 * half, 0.5 * half], rel=1e-6)


@pytest.mark.parametrize(
    ("sides", "teacher", "advantage"),
    [("one", 1e-4, math.log(2e-4)), ("two", 1e-4, -0.5), ("one", 1.0, 0.5), ("two", 1.0, 0.5), ("two", 0.6, None)],
)
def test_clipped_advantages_by_hand(sides: Any, teacher: float, advantage: float | None) -> None:
    """The sampled token has 1/2 with the student; so has the kept one, beside a tail of which the teacher keeps 1/2."""
    advantage = math.log(2 * teacher) if advantage is None else advantage
    clip = {"advantage_clip": 0.5, "advantage_clip_sides": sides}
    logits_TV, targets = two_token_case(1.0)
    targets = dataclasses.replace(targets, teacher_log_probs_TK=torch.tensor([[teacher]]).log())
    _, grad_TV, _ = loss_and_gradient(logits_TV, targets, dataclasses.replace(SAMPLED, **clip))
    assert grad_TV[0].tolist() == pytest.approx([-0.5 * advantage, 0.5 * advantage], rel=1e-5)

    teacher_TB = torch.tensor([[teacher, 0.5]]).log()
    kept = dataclasses.replace(targets, support_ids_TK=torch.tensor([[0]]), teacher_log_probs_TK=teacher_TB)
    config = ObjectiveConfig(alpha=1.0, policy_drift_clip=None, engine_mismatch_cap=None)
    value, grad_TV, _ = loss_and_gradient(logits_TV, kept, dataclasses.replace(config, **clip))
    assert grad_TV[0].tolist() == pytest.approx([-0.25 * advantage, 0.25 * advantage], rel=1e-5)
    assert value == loss_and_gradient(logits_TV, kept, config)[0]


@pytest.mark.parametrize("share", [0.0, 0.9, 1.0])
def test_the_hybrid_is_a_share_of_each(share: float) -> None:
    """With the weights that each has alone: two tokens have no teacher context, so SDPO leaves them out."""
    logits_TV, targets = random_batch(9)
    targets = dataclasses.replace(targets, weights_T=targets.weights_T.index_fill(0, torch.tensor([2, 7]), 0.0))
    assert targets.teacher_log_probs_TK is not None and targets.policy_weights_T is not None
    targets.teacher_log_probs_TK[[2, 7]] = math.nan
    value, grad_TV, metrics = loss_and_gradient(logits_TV, targets, ObjectiveConfig(kind="hybrid", grpo_share=share))
    sdpo, sdpo_TV, sdpo_metrics = loss_and_gradient(logits_TV, targets, ObjectiveConfig(kind="sdpo"))
    alone = dataclasses.replace(targets, weights_T=targets.policy_weights_T)
    grpo, grpo_TV, grpo_metrics = loss_and_gradient(logits_TV, alone, ObjectiveConfig(kind="grpo"))
    rest = 1.0 - share
    assert torch.equal(value, share * grpo + rest * sdpo)
    torch.testing.assert_close(grad_TV, share * grpo_TV + rest * sdpo_TV, rtol=1e-5, atol=1e-8)
    if share in (0.0, 1.0):
        assert torch.equal(grad_TV, grpo_TV if share else sdpo_TV)
    assert metrics == {**sdpo_metrics, **grpo_metrics}


# ---------------------------------------------------------------------------------- what must not matter


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("sizes", [(12,), (5, 7), (1, 0, 11), (1,) * 12])
def test_a_split_changes_nothing(name: str, sizes: tuple[int, ...]) -> None:
    logits_TV, targets = random_batch(12)
    targets = dataclasses.replace(targets, weights_T=targets.weights_T.index_fill(0, torch.tensor([3, 4]), 0.0))
    config = CONFIGS[name]
    value, grad_TV, whole = loss_and_gradient(logits_TV, targets, config)
    parts = []
    for index_T in torch.arange(12).split(sizes):
        parts.append(loss_and_gradient(logits_TV[index_T], targets.rows(index_T), config))
    values, gradients, metrics = zip(*parts, strict=True)
    torch.testing.assert_close(torch.stack(values).sum(), value, rtol=1e-6, atol=1e-6)
    assert torch.equal(torch.cat(gradients), grad_TV)
    for key, expected in whole.items():
        combined = torch.stack([part[key] for part in metrics])
        combined = combined.max() if key.endswith("/max") else combined.sum()
        torch.testing.assert_close(combined, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_a_token_of_weight_zero_has_no_influence(name: str, garbage: float) -> None:
    logits_TV, targets = random_batch(10)
    config = CONFIGS[name]
    masked_T = torch.tensor([True, False, False, True, True, False, False, False, False, True])
    kept_T = (~masked_T).nonzero()[:, 0]
    expected, expected_TV, expected_metrics = loss_and_gradient(logits_TV[kept_T], targets.rows(kept_T), config)

    spoilt = {}
    for field in dataclasses.fields(targets):
        value = getattr(targets, field.name).clone()
        if value.is_floating_point():
            value[masked_T] = garbage
        spoilt[field.name] = value
    spoilt["weights_T"][masked_T] = spoilt["policy_weights_T"][masked_T] = 0.0
    logits_TV[masked_T] = garbage
    value, grad_TV, metrics = loss_and_gradient(logits_TV, TokenTargets(**spoilt), config)
    assert torch.equal(value, expected)
    assert torch.equal(grad_TV[kept_T], expected_TV)
    assert torch.equal(grad_TV[masked_T], torch.zeros(4, VOCABULARY))
    assert metrics == expected_metrics
    assert metrics["loss/tokens"] == 6


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("masked", [True, False])
def test_no_tokens_give_a_connected_zero(name: str, masked: bool) -> None:
    logits_TV, targets = random_batch(4)
    nothing_T = torch.arange(0)
    if masked:
        targets = dataclasses.replace(targets, weights_T=torch.zeros(4), policy_weights_T=torch.zeros(4))
    else:
        logits_TV, targets = logits_TV[nothing_T], targets.rows(nothing_T)
    value, grad_TV, metrics = loss_and_gradient(logits_TV, targets, CONFIGS[name])
    assert value == 0 and torch.equal(grad_TV, torch.zeros_like(logits_TV))
    assert all(metric.dtype == torch.float32 and metric == 0 for metric in metrics.values())
    _, _, full = loss_and_gradient(*random_batch(3), CONFIGS[name])
    assert metrics.keys() == full.keys()


def test_metrics_are_detached_scalars() -> None:
    for config in CONFIGS.values():
        _, metrics = loss(random_batch(5)[0].requires_grad_(), random_batch(5)[1], config)
        assert {"loss/tokens", "loss/entropy"} <= metrics.keys()
        for metric in metrics.values():
            assert metric.shape == () and metric.dtype == torch.float32 and not metric.requires_grad


@pytest.mark.parametrize(
    ("kind", "field"), [("sdpo", "support_ids_TK"), ("grpo", "advantages_T"), ("hybrid", "policy_weights_T")]
)
def test_missing_targets_are_refused(kind: Any, field: str) -> None:
    logits_TV, targets = random_batch(3)
    with pytest.raises(ValueError, match=f"objective kind {kind} needs targets.{field}"):
        loss(logits_TV, dataclasses.replace(targets, **{field: None}), ObjectiveConfig(kind=kind))
    with pytest.raises(ValueError, match="2 rows of logits or hidden states but 3 response tokens"):
        loss(logits_TV[:2], targets, ObjectiveConfig(kind=kind))
