"""divergence.py against finite differences, and where arithmetic is hard: tails of almost no mass, bf16 logits."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sdpo import divergence as dv
from tests.reference import sdpo_naive as naive

ALPHAS = (0.0, 0.3, 0.5, 1.0)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return 2.0 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ----------------------------------------------------------------------------------- finite differences


def _gives(support: str, alpha: float, teacher_TV: Tensor, ids_TK: Tensor) -> Callable[[Tensor], Tensor]:
    teacher_TB = dv.support_log_probs(teacher_TV, ids_TK, with_tail=True)
    return {
        "tail": lambda logits_TV: dv.divergence(logits_TV, ids_TK, teacher_TB, alpha),
        "inferred tail": lambda logits_TV: dv.divergence(logits_TV, ids_TK, teacher_TB[:, :-1], alpha),
        "renormalised": lambda logits_TV: dv.divergence(logits_TV, ids_TK, teacher_TB, alpha, tail=False),
        "vocabulary": lambda logits_TV: dv.full_divergence(logits_TV, teacher_TV, alpha),
        "sampled": lambda logits_TV: dv.sampled_log_probs(logits_TV, ids_TK[:, -1]),
    }[support]


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("support", ["tail", "inferred tail", "renormalised", "vocabulary", "sampled"])
def test_gradients_equal_finite_differences(support: str, alpha: float) -> None:
    student_TV, teacher_TV = normal(3, 9), normal(3, 9, seed=1)
    ids_TK = dv.student_support(student_TV, 4)
    assert torch.autograd.gradcheck(_gives(support, alpha, teacher_TV, ids_TK), student_TV.requires_grad_(), atol=1e-8)


# ------------------------------------------------------------------------------------------------ tails


def _almost_certain(mass: float, seed: int) -> Tensor:
    """fp32 logits of two tokens that share 1 - mass, 0.7 to 0.3, and 998 that share the rest unevenly."""
    rest = normal(998, seed=seed).softmax(0) * mass
    kept = torch.tensor([0.7, 0.3], dtype=torch.float64) * (1.0 - mass)
    return torch.cat([rest[:400], kept[:1], rest[400:], kept[1:]]).log()[None].float()


@pytest.mark.parametrize(("mass", "alpha"), list(itertools.product([1e-6, 1e-10], ALPHAS)))
def test_a_tail_of_almost_no_mass_has_right_values_and_gradients(mass: float, alpha: float) -> None:
    """The kept tokens agree: all there is to learn is in the tail, which the teacher has three times as heavy."""
    student_TV, teacher_TV = _almost_certain(mass, 2), _almost_certain(3.0 * mass, 3)
    ids_TK = dv.student_support(student_TV, 2)
    assert ids_TK.tolist() == [[400, 999]]
    teacher_TB = dv.support_log_probs(teacher_TV, ids_TK, with_tail=True)
    exact = naive.bins(naive.log_probs(teacher_TV), ids_TK, tail=True)
    assert math.exp(teacher_TB[0, 2].item()) == pytest.approx(exact[0, 2].item(), rel=1e-4)
    leaf_TV = student_TV.clone().requires_grad_()
    values_T = dv.divergence(leaf_TV, ids_TK, teacher_TB, alpha)
    (grad_TV,) = torch.autograd.grad(values_T.sum(), leaf_TV)
    expected_T, expected_TV = naive.divergence_and_gradient(student_TV, teacher_TV, ids_TK, alpha, True, torch.ones(1))
    assert values_T.item() == pytest.approx(expected_T.item(), rel=1e-4)
    outside_V = torch.ones(1000, dtype=torch.bool).index_fill(0, ids_TK[0], False)
    torch.testing.assert_close(grad_TV[0, outside_V].double(), expected_TV[0, outside_V], rtol=1e-4, atol=0.0)
    # the kept tokens' own gradient is as large as the tail: what fp32 log-probs resolve is their sum
    torch.testing.assert_close(grad_TV[0, ids_TK[0]].double(), expected_TV[0, ids_TK[0]], rtol=0.0, atol=1e-7)


# ------------------------------------------------------------------------------------------------- bf16


@pytest.mark.parametrize("alpha", ALPHAS)
def test_bf16_logits_over_the_whole_vocabulary_are_computed_in_fp32(alpha: float) -> None:
    student_TV, teacher_TV = (normal(5, 300, seed=seed).bfloat16() for seed in (4, 5))
    leaf_TV, exact_TV = student_TV.clone().requires_grad_(), student_TV.double().requires_grad_()
    values_T = dv.full_divergence(leaf_TV, teacher_TV, alpha)
    p_TV, q_TV = naive.log_probs(exact_TV).exp(), naive.log_probs(teacher_TV).exp()
    expected_T = naive.bin_divergence(p_TV, q_TV, alpha)
    assert values_T.dtype == torch.float32
    torch.testing.assert_close(values_T.double(), expected_T, rtol=1e-5, atol=1e-6)
    (grad_TV,) = torch.autograd.grad(values_T.sum(), leaf_TV)
    (expected_TV,) = torch.autograd.grad(expected_T.sum(), exact_TV)
    torch.testing.assert_close(grad_TV.double(), expected_TV, rtol=2**-8, atol=1e-6)


def test_bf16_logits_give_fp32_log_probs_and_entropies() -> None:
    logits_TV = normal(5, 300, seed=6).bfloat16()
    log_p_TV = naive.log_probs(logits_TV)
    found: dict[str, tuple[Any, Tensor]] = {
        "sampled": (dv.sampled_log_probs(logits_TV, torch.arange(5)), log_p_TV[torch.arange(5), torch.arange(5)]),
        "entropy": (dv.entropy(logits_TV), -(log_p_TV.exp() * log_p_TV).sum(dim=1)),
    }
    for name, (values_T, expected_T) in found.items():
        assert values_T.dtype == torch.float32, name
        torch.testing.assert_close(values_T.double(), expected_T, rtol=1e-6, atol=1e-6)
