"""vocabulary.py: one walk finds what several would, and a gradient may take the place of the logits."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_sdpo import divergence as dv
from megatron_sdpo import vocabulary

TOKENS, WIDTH, K = 5, 40, 7


def logits(seed: int, scale: float = 3.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    scale=st.sampled_from([0.0, 0.1, 3.0, 30.0, 300.0]),
    k=st.integers(1, WIDTH),
    missing=st.integers(0, WIDTH - 1),
)
def test_a_reading_is_what_float64_says(seed: int, scale: float, k: int, missing: int) -> None:
    """Also where all tokens are kept, where columns do not exist and where one token is certain."""
    generator = torch.Generator().manual_seed(seed)
    logits_TV = logits(seed, scale)
    logits_TV[:, torch.randperm(WIDTH, generator=generator)[:missing]] = -torch.inf
    ids_TK = vocabulary.student_support(logits_TV, k)
    sampled_T = torch.randint(WIDTH, (TOKENS,), generator=generator)
    found = vocabulary.read(logits_TV, ids_TK, sampled_ids_T=sampled_T, with_entropy=True)
    log_p_TV = logits_TV.double().log_softmax(dim=1)
    rest_TV = log_p_TV.scatter(1, ids_TK, -torch.inf)
    assert found.sampled_T is not None and found.entropy_T is not None
    expected = {
        "kept": (found.log_probs_TB[:, :k], log_p_TV.gather(1, ids_TK)),
        "tail": (found.log_probs_TB[:, k], rest_TV.logsumexp(dim=1)),
        "sampled": (found.sampled_T, log_p_TV.gather(1, sampled_T[:, None])[:, 0]),
        "entropy": (found.entropy_T, -(log_p_TV.exp() * log_p_TV.clamp(min=-1e4)).sum(dim=1)),
    }
    for name, (ours, theirs) in expected.items():
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-6, atol=5e-6, msg=lambda m, n=name: f"{n}: {m}")


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 1000),
    columns=st.integers(200, 3000),
    k=st.integers(1, 30),
    levels=st.sampled_from([1, 3, 50, 10_000]),
    missing=st.integers(0, 150),
    clustered=st.booleans(),
)
def test_the_support_is_found_by_runs_of_columns(
    seed: int, columns: int, k: int, levels: int, missing: int, clustered: bool
) -> None:
    """Exactly, also where many logits are equal, where the largest stand together, and in the rest behind the runs."""
    generator = torch.Generator().manual_seed(seed)
    logits_TV = torch.randint(levels, (4, columns), generator=generator).float() - levels / 2
    if clustered:
        logits_TV[:, -2 * k :] += levels
    logits_TV[:, torch.randperm(columns, generator=generator)[:missing]] = -torch.inf
    order = [sorted(range(columns), key=lambda i, row=row: (-row[i], i))[:k] for row in logits_TV.tolist()]
    assert vocabulary.student_support(logits_TV, k).tolist() == order


def test_a_reading_without_more_is_the_same() -> None:
    logits_TV = logits(0)
    ids_TK = vocabulary.student_support(logits_TV, K)
    more = vocabulary.read(logits_TV, ids_TK, sampled_ids_T=torch.zeros(TOKENS, dtype=torch.int64), with_entropy=True)
    less = vocabulary.read(logits_TV, ids_TK)
    assert less.sampled_T is None and less.entropy_T is None
    torch.testing.assert_close(less.log_probs_TB, more.log_probs_TB)
    torch.testing.assert_close(less.tail_T, more.tail_T)


LOSSES: dict[str, Callable[[Tensor, bool], Tensor]] = {
    "bins": lambda x_TV, overwrite: dv.divergence(
        *(x_TV, dv.student_support(x_TV, K), dv.support_log_probs(logits(1), dv.student_support(x_TV, K)), 0.5),
        overwrite=overwrite,
    ),
    "vocabulary": lambda x_TV, overwrite: dv.full_divergence(x_TV, logits(1), 0.5, overwrite=overwrite),
    "sampled": lambda x_TV, overwrite: dv.sampled_log_probs(x_TV, torch.arange(TOKENS), overwrite=overwrite),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_over_the_logits_is_the_same_gradient(
    loss: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(vocabulary.BLOCK, "cpu", 2 * WIDTH)  # several blocks of rows
    gradients = []
    for overwrite in (False, True):
        leaf_TV = logits(0, dtype=dtype).requires_grad_()
        values_T = LOSSES[loss](leaf_TV, overwrite)
        gradients.append(torch.autograd.grad((values_T * torch.arange(1.0, TOKENS + 1)).sum(), leaf_TV)[0])
        assert (gradients[-1].data_ptr() == leaf_TV.data_ptr()) is overwrite
    assert torch.equal(*gradients)
    assert gradients[0].abs().max() > 1e-3


def test_logits_that_another_gradient_needs_are_not_overwritten_unnoticed() -> None:
    """Whichever of the two is computed first: what is not refused is right."""
    refused = 0
    for second in (False, True):
        gradients = []
        for overwrite in (False, True):
            leaf_TV = logits(0).requires_grad_()
            parts = [lambda x_TV, o=overwrite: LOSSES["bins"](x_TV, o), lambda x_TV: x_TV.square().sum(dim=1)]
            total = torch.stack([part(leaf_TV) for part in (reversed(parts) if second else parts)]).sum()
            try:
                gradients.append(torch.autograd.grad(total, leaf_TV)[0])
            except RuntimeError as error:
                assert overwrite and "modified by an inplace operation" in str(error)
                refused += 1
        assert len(gradients) == 1 or torch.equal(*gradients)
    assert refused >= 1


def test_a_second_backward_pass_over_overwritten_logits_is_refused() -> None:
    leaf_TV = logits(0).requires_grad_()
    loss = LOSSES["bins"](leaf_TV, True).sum()
    torch.autograd.grad(loss, leaf_TV, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaf_TV)
