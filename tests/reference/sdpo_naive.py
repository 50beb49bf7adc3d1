"""The SDPO loss as one would write it on a blackboard: float64, whole vocabulary, plain autograd."""

import torch
from torch import Tensor


def log_probs(logits_TV: Tensor) -> Tensor:
    """float64 log-softmax over the whole vocabulary."""
    return logits_TV.double().log_softmax(dim=1)


def support(logits_TV: Tensor, k: int) -> Tensor:
    """Ids of the k largest logits, ties by lower id, by sorting Python tuples."""
    rows = logits_TV.double().tolist()
    return torch.tensor([sorted(range(len(row)), key=lambda i: (-row[i], i))[:k] for row in rows]).reshape(-1, k)


def bins(log_probs_TV: Tensor, ids_TK: Tensor, tail: bool) -> Tensor:
    """Probabilities of the bins: kept tokens and tail, or the kept tokens alone, made to sum to one."""
    kept_TK = log_probs_TV.exp().gather(1, ids_TK)
    if not tail:
        return kept_TK / kept_TK.sum(dim=1, keepdim=True)
    outside_TV = torch.ones_like(log_probs_TV, dtype=torch.bool).scatter(1, ids_TK, False)
    tail_T1 = (log_probs_TV.exp() * outside_TV).sum(dim=1, keepdim=True)
    return torch.cat([kept_TK, tail_T1], dim=1)


def kl(a_TB: Tensor, b_TB: Tensor) -> Tensor:
    """KL(a || b) of each row; bins without mass in ``a`` add nothing."""
    safe_a, safe_b = torch.where(a_TB > 0, a_TB, 1.0), torch.where(a_TB > 0, b_TB, 1.0)
    return (a_TB * (safe_a.log() - safe_b.log())).sum(dim=1)


def bin_divergence(p_TB: Tensor, q_TB: Tensor, alpha: float) -> Tensor:
    """Forward KL, reverse KL, or the generalised Jensen-Shannon divergence."""
    if alpha == 0:
        return kl(q_TB, p_TB)
    if alpha == 1:
        return kl(p_TB, q_TB)
    m_TB = (1 - alpha) * p_TB + alpha * q_TB
    return (1 - alpha) * kl(p_TB, m_TB) + alpha * kl(q_TB, m_TB)


def divergence(student_TV: Tensor, teacher_TV: Tensor, ids_TK: Tensor, alpha: float, tail: bool = True) -> Tensor:
    """Values [T] from the logits of both models, differentiable in the student's."""
    p_TB = bins(log_probs(student_TV), ids_TK, tail)
    q_TB = bins(log_probs(teacher_TV.detach()), ids_TK, tail)
    return bin_divergence(p_TB, q_TB, alpha)


def divergence_and_gradient(
    student_TV: Tensor, teacher_TV: Tensor, ids_TK: Tensor, alpha: float, tail: bool, weights_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Values [T], and the gradient of their weighted sum in the student's logits [T, V]."""
    logits_TV = student_TV.detach().double().requires_grad_()
    values_T = divergence(logits_TV, teacher_TV, ids_TK, alpha, tail)
    (grad_TV,) = torch.autograd.grad((values_T * weights_T.double()).sum(), logits_TV)
    return values_T.detach(), grad_TV
