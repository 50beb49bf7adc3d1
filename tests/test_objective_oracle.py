"""Every objective, loss and gradient, against plain loops over samples and tokens in float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_sdpo import credit, objective
from megatron_sdpo.config import Config, ModelConfig, ObjectiveConfig, TaskConfig, check
from megatron_sdpo.divergence import entropy, sampled_log_probs, student_support, support_log_probs
from megatron_sdpo.objective import TokenTargets
from tests.reference import objective_naive as naive
from tests.reference.objective_naive import Sampled

VOCABULARY, K, SUCCESS = 9, 3, 0.5
KINDS: dict[str, dict[str, Any]] = {
    **{f"sdpo-{support}": {"kind": "sdpo", "support": support} for support in ("top_k", "vocabulary", "sampled")},
    **{f"hybrid-{support}": {"kind": "hybrid", "support": support} for support in ("top_k", "vocabulary", "sampled")},
    "grpo": {"kind": "grpo"},
    "next_token": {"kind": "next_token"},
}


@st.composite
def configs(draw: st.DrawFn, fixed: dict[str, Any]) -> ObjectiveConfig:
    """Settings that may be combined, as config.check holds them to."""
    kind, support = fixed["kind"], fixed.get("support", "top_k")
    taught, compares = kind in ("sdpo", "hybrid"), kind in ("grpo", "hybrid")
    alpha = 1.0 if support == "sampled" else draw(st.sampled_from([0.0, 0.3, 0.5, 1.0]))
    weightings = ["uniform", "question_difficulty", *(["failed_only", "teacher_confidence"] if taught else [])]
    plain = kind == "next_token"
    credits = {"top_k": ["logit", "token"], "sampled": ["logit", "sequence"]}.get(support, ["logit"])
    credit = draw(st.sampled_from(credits))  # of a token: one is kept, and without a tail always agreed on
    config = ObjectiveConfig(
        **fixed,
        alpha=alpha,
        top_k=K,
        tail=credit == "token" or draw(st.booleans()),
        credit=credit,
        advantage_clip=draw(st.sampled_from([None, 0.4])) if alpha == 1 else None,
        advantage_clip_sides=draw(st.sampled_from(["one", "two"])),
        grpo_share=draw(st.sampled_from([0.0, 0.4, 1.0])),
        aggregation=draw(st.sampled_from(["token_mean", "sequence_mean"])),
        masked_in_denominator=draw(st.sampled_from([None, True, False])),
        sample_weighting="uniform" if plain else draw(st.sampled_from(weightings)),
        teacher_confidence_beta=0.7,
        stop_at_saturation=None if plain else draw(st.sampled_from([None, None, 0.6])),
        policy_drift_clip=draw(st.sampled_from([None, 1.2])),
        engine_mismatch_cap=draw(st.sampled_from([None, 1.2])),
        advantage_std=draw(st.booleans()),
        dual_clip=draw(st.sampled_from([None, 1.3])),
        kl_coefficient=draw(st.sampled_from([0.0, 0.3])) if compares else 0.0,
    )
    check(
        Config(name="n", run_dir="r", steps=1, model=ModelConfig(path="m"), task=TaskConfig(name="t"), objective=config)
    )
    return config


def batch(seed: int) -> list[Sampled]:
    """Three questions of three attempts, 0 to 4 tokens each, some without a context; the student has moved."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def below(limit: int, *shape: int) -> list[int]:
        return torch.randint(limit, shape, generator=generator).tolist()

    samples = []
    for i in range(9):
        (length,), (reward,), (untaught,) = below(5, 1), below(3, 1), below(4, 1)
        old_RV, response = 1.5 * normal(length, VOCABULARY), tuple(below(VOCABULARY, length))
        old = [naive._log_prob(old_V, y).item() for old_V, y in zip(old_RV, response, strict=True)]
        samples.append(
            Sampled(
                question=i // 3,
                reward=reward / 2,
                response=response,
                engine=tuple(o + 0.3 * n for o, n in zip(old, normal(length).tolist(), strict=True)),
                student_RV=(old_RV + 0.4 * normal(length, VOCABULARY)).requires_grad_(),
                old_RV=old_RV,
                teacher_RV=None if untaught == 0 else old_RV + normal(length, VOCABULARY),
                reference_RV=old_RV + 0.5 * normal(length, VOCABULARY),
            )
        )
    return samples


def assembled(samples: list[Sampled], config: ObjectiveConfig) -> tuple[Tensor, TokenTargets]:
    """Logits and targets of one micro-batch that holds all, with nonsense for what must have no influence."""
    rewards, groups = [s.reward for s in samples], [s.question for s in samples]
    lengths = [len(s.response) for s in samples]
    stopped, untaught = credit.without_target(rewards, groups, SUCCESS, config)
    factors = credit.question_factors(rewards, groups, SUCCESS, config)
    in_use = [not stop for stop in stopped]
    has_target = in_use
    if config.has_teacher:
        has_target = [s.teacher_RV is not None and not u for s, u in zip(samples, untaught, strict=True)]

    def spread(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).repeat_interleave(torch.tensor(lengths))

    def weights(trains: list[bool]) -> Tensor:
        found = credit.token_weights(lengths, trains, config)
        return spread([weight * factor for weight, factor in zip(found, factors, strict=True)])

    response_T = torch.tensor([y for s in samples for y in s.response], dtype=torch.int64)
    old_TV, reference_TV = torch.cat([s.old_RV for s in samples]), torch.cat([s.reference_RV for s in samples])
    nothing = [s.teacher_RV is None or not h for s, h in zip(samples, has_target, strict=True)]
    teacher_TV = torch.cat(
        [
            torch.full_like(s.old_RV, torch.nan) if no or s.teacher_RV is None else s.teacher_RV
            for s, no in zip(samples, nothing, strict=True)
        ]
    )
    ids_TK = student_support(old_TV, config.kept_tokens)
    top_k = config.support == "top_k"
    old_T = sampled_log_probs(old_TV, response_T)
    targets = TokenTargets(
        response_ids_T=response_T,
        weights_T=weights(has_target),
        old_log_probs_T=old_T,
        engine_log_probs_T=torch.tensor([x for s in samples for x in s.engine], dtype=torch.float64),
        support_ids_TK=ids_TK,
        teacher_log_probs_TK=support_log_probs(teacher_TV, ids_TK if top_k else response_T[:, None], with_tail=top_k),
        teacher_logits_TV=teacher_TV,
        advantages_T=spread(credit.advantages(rewards, groups, config.advantage_std)),
        reference_log_probs_T=sampled_log_probs(reference_TV, response_T),
        policy_weights_T=weights(in_use),
    )
    changes: dict[str, Tensor] = {}
    if config.sample_weighting == "teacher_confidence":
        factors_T = credit.confidence_factors(entropy(teacher_TV), config.teacher_confidence_beta)
        changes["weights_T"] = torch.where(targets.weights_T == 0, 0.0, targets.weights_T * factors_T)
    if config.credit == "sequence":
        log_q_T = sampled_log_probs(teacher_TV, response_T)
        tokens_T = credit.sampled_advantages(old_T, log_q_T, config.advantage_bounds)
        changes["teacher_advantages_T"] = credit.sequence_advantages(tokens_T, lengths)
    return torch.cat([s.student_RV for s in samples]), replace(targets, **changes)


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), seed=st.integers(0, 10_000))
def test_loss_and_gradient_equal_plain_loops(name: str, data: st.DataObject, seed: int) -> None:
    config, samples = data.draw(configs(KINDS[name])), batch(seed)
    value, surrogate = naive.objective(samples, config, SUCCESS)
    logits_TV, targets = assembled(samples, config)
    found, _ = objective.loss(logits_TV, targets, config)
    torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-12)
    leaves = [s.student_RV for s in samples]
    ours = torch.autograd.grad(found, leaves)
    expected = torch.autograd.grad(surrogate, leaves, allow_unused=True) if surrogate.requires_grad else [None] * 9
    for mine_RV, naive_RV in zip(ours, expected, strict=True):
        naive_RV = torch.zeros_like(mine_RV) if naive_RV is None else naive_RV
        torch.testing.assert_close(mine_RV, naive_RV, rtol=1e-8, atol=1e-12)
