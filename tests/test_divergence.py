"""divergence.py against a float64 oracle, whole and cut over 1, 2 and 4 ranks."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_sdpo import divergence as dv
from megatron_sdpo import vocabulary
from tests.reference import sdpo_naive as naive

TOKENS, VOCABULARY, WORLD = 6, 32, 4
SIZES = (1, 2, 4)
ALPHAS = (0.0, 0.25, 0.5, 1.0)
SUPPORTS = (1, 20, VOCABULARY - 1)
PADDING = torch.arange(VOCABULARY // 2, VOCABULARY)
"""Columns that do not exist: of 2 or 4 shards the upper half."""
CASES = list(itertools.product(ALPHAS, SUPPORTS, (True, False)))


def logits(seed: int, dtype: torch.dtype = torch.float32, scale: float = 3.0, width: int = VOCABULARY) -> Tensor:
    return (torch.randn(TOKENS, width, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def weights() -> Tensor:
    return torch.linspace(-1.0, 2.0, TOKENS)


def compute(student_TV: Tensor, teacher_TV: Tensor, alpha: float, k: int, tail: bool, group: Any = None) -> Any:
    """The pass order of training. Returns support, values and a student leaf whose graph is still alive."""
    ids_TK = dv.student_support(student_TV, k, group)
    teacher_TB = dv.support_log_probs(teacher_TV, ids_TK, group, with_tail=True)
    leaf_TV = student_TV.clone().requires_grad_()
    return ids_TK, dv.divergence(leaf_TV, ids_TK, teacher_TB, alpha, tail, group), leaf_TV


def gradient(values_T: Tensor, leaf_TV: Tensor) -> Tensor:
    (grad_TV,) = torch.autograd.grad((values_T * weights().to(values_T.dtype)).sum(), leaf_TV)
    return grad_TV


# ------------------------------------------------------------------------------- over process groups


def worker(rank: int, folder: str) -> None:
    """Every case on every group size. The backward passes run after all process groups are gone."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    results: dict[Any, Any] = {}
    graphs = {}
    for size in SIZES:
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, WORLD, size)]
        group: Any = groups[rank // size]
        width = VOCABULARY // size
        columns = slice(dist.get_rank(group) * width, (dist.get_rank(group) + 1) * width)
        student_TV, teacher_TV = logits(0)[:, columns], logits(1)[:, columns]
        for case in CASES:
            ids_TK, values_T, leaf_TV = compute(student_TV, teacher_TV, *case, group)
            results[size, case] = {"ids": ids_TK, "values": values_T.detach()}
            graphs[size, case] = values_T, leaf_TV
        for alpha in ALPHAS:
            leaf_TV = student_TV.clone().requires_grad_()
            values_T = dv.full_divergence(leaf_TV, teacher_TV, alpha, group)
            results[size, "full", alpha] = {"values": values_T.detach()}
            graphs[size, "full", alpha] = values_T, leaf_TV
        leaf_TV = student_TV.clone().requires_grad_()
        values_T = dv.sampled_log_probs(leaf_TV, torch.arange(TOKENS) * 5, group)
        graphs[size, "sampled"] = values_T, leaf_TV
        padded_TV = logits(0).index_fill(1, PADDING, -torch.inf)[:, columns]
        leaf_TV = padded_TV.clone().requires_grad_()
        teacher_TV = logits(1).index_fill(1, PADDING, -torch.inf)[:, columns]
        ids_TK = dv.student_support(padded_TV, 5, group)
        teacher_TB = dv.support_log_probs(teacher_TV, ids_TK, group, with_tail=True)
        binned_T = dv.divergence(leaf_TV, ids_TK, teacher_TB, 0.5, True, group)
        both_T = binned_T + dv.full_divergence(leaf_TV, teacher_TV, 0.5, group)
        results[size, "padding"] = {"values": both_T.detach()}
        graphs[size, "padding"] = both_T, leaf_TV
        results[size, "sampled"] = {
            "values": values_T.detach(),
            "entropy": dv.entropy(student_TV, group),
            "padded": dv.support_log_probs(padded_TV, torch.arange(20).expand(TOKENS, -1), group, with_tail=True),
            "padded entropy": dv.entropy(padded_TV, group),
            "ties": dv.student_support(logits(2).round()[:, columns], 20, group),
            "empty": dv.divergence(
                student_TV[:0], results[size, CASES[0]]["ids"][:0], torch.empty(0, 1), 0.5, True, group
            ),
        }
    dist.barrier()
    dist.destroy_process_group()
    for key, (values_T, leaf_TV) in graphs.items():
        results[key]["gradient"] = gradient(values_T, leaf_TV)
    torch.save(results, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """Results of four ranks: four groups of one, two of two, one of four."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, args=(str(folder),), nprocs=WORLD)  # pyright: ignore[reportPrivateImportUsage]
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def members(size: int) -> list[range]:
    return [range(first, first + size) for first in range(0, WORLD, size)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_shards_match_the_oracle(ranks: list[dict[Any, Any]], size: int, case: tuple[float, int, bool]) -> None:
    alpha, k, tail = case
    ids_TK = naive.support(logits(0), k)
    values_T, grad_TV = naive.divergence_and_gradient(logits(0), logits(1), ids_TK, alpha, tail, weights())
    for group in members(size):
        for rank in group:
            assert torch.equal(ranks[rank][size, case]["ids"], ids_TK)
            torch.testing.assert_close(ranks[rank][size, case]["values"].double(), values_T, rtol=1e-5, atol=1e-6)
        shards_TV = torch.cat([ranks[rank][size, case]["gradient"] for rank in group], dim=1)
        torch.testing.assert_close(shards_TV.double(), grad_TV, rtol=1e-4, atol=1e-6)


def full_oracle(student_TV: Tensor, teacher_TV: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Values and gradient over the whole vocabulary, in float64."""
    leaf_TV = student_TV.double().requires_grad_()
    p_TV, q_TV = naive.log_probs(leaf_TV).exp(), naive.log_probs(teacher_TV).exp()
    values_T = naive.bin_divergence(p_TV, q_TV, alpha)
    return values_T.detach(), gradient(values_T, leaf_TV)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_shards_match_the_oracle_over_the_whole_vocabulary(
    ranks: list[dict[Any, Any]], size: int, alpha: float
) -> None:
    values_T, grad_TV = full_oracle(logits(0), logits(1), alpha)
    for group in members(size):
        for rank in group:
            mine_T = ranks[rank][size, "full", alpha]["values"]
            torch.testing.assert_close(mine_T.double(), values_T, rtol=1e-5, atol=1e-6)
        shards_TV = torch.cat([ranks[rank][size, "full", alpha]["gradient"] for rank in group], dim=1)
        torch.testing.assert_close(shards_TV.double(), grad_TV, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_whole_vocabulary(alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """float64 to rounding; padding, equal teachers and blocks of rows as with bins."""
    monkeypatch.setitem(vocabulary.BLOCK, "cpu", 4 * VOCABULARY)
    student_TV, teacher_TV = logits(3).double(), logits(4).double()
    padding_TV = torch.full((TOKENS, 8), -torch.inf).double()
    leaf_TV = torch.cat([student_TV, padding_TV], dim=1).requires_grad_()
    values_T = dv.full_divergence(leaf_TV, torch.cat([teacher_TV, padding_TV], dim=1), alpha)
    expected_T, expected_TV = full_oracle(student_TV, teacher_TV, alpha)
    torch.testing.assert_close(values_T.detach(), expected_T, rtol=1e-12, atol=1e-13)
    grad_TV = gradient(values_T, leaf_TV)
    torch.testing.assert_close(grad_TV[:, :VOCABULARY], expected_TV, rtol=1e-11, atol=1e-13)
    assert (grad_TV[:, VOCABULARY:] == 0).all()
    half_TV = logits(5, torch.bfloat16).requires_grad_()
    equal_T = dv.full_divergence(half_TV, half_TV, alpha)
    assert equal_T.dtype == torch.float32 and torch.equal(equal_T, torch.zeros(TOKENS))
    assert torch.equal(gradient(equal_T, half_TV), torch.zeros_like(half_TV))
    assert dv.full_divergence(student_TV[:0], teacher_TV[:0], alpha).shape == (0,)


def test_clipped_advantages_over_the_whole_vocabulary() -> None:
    student_TV, teacher_TV = logits(3).double(), logits(4).double()
    ids_TK = torch.arange(VOCABULARY).expand(TOKENS, -1)
    teacher_TK = dv.support_log_probs(teacher_TV, ids_TK)
    leaf_TV, other_TV = student_TV.clone().requires_grad_(), student_TV.clone().requires_grad_()
    full_T = dv.full_divergence(leaf_TV, teacher_TV, 1.0, advantage_bounds=(-0.7, 0.7))
    binned_T = dv.divergence(other_TV, ids_TK, teacher_TK, 1.0, tail=False, advantage_bounds=(-0.7, 0.7))
    torch.testing.assert_close(full_T, binned_T, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient(full_T, leaf_TV), gradient(binned_T, other_TV), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_shards_match_for_sampled_tokens_entropy_padding_ties_and_no_tokens(
    ranks: list[dict[Any, Any]], size: int
) -> None:
    leaf_TV = logits(0).double().requires_grad_()
    log_probs_TV = leaf_TV.log_softmax(dim=1)
    expected_T = log_probs_TV[torch.arange(TOKENS), torch.arange(TOKENS) * 5]
    grad_TV = gradient(expected_T, leaf_TV)
    half = VOCABULARY // 2  # the upper shards are padding alone
    half_TV = logits(0)[:, :half].double().log_softmax(dim=1)
    for group in members(size):
        for rank in group:
            mine = ranks[rank][size, "sampled"]
            torch.testing.assert_close(mine["values"].double(), expected_T.detach(), rtol=1e-6, atol=1e-6)
            entropy_T = -(log_probs_TV.exp() * log_probs_TV).sum(dim=1).detach()
            torch.testing.assert_close(mine["entropy"].double(), entropy_T, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(mine["padded"][:, :half].double(), half_TV, rtol=1e-6, atol=1e-6)
            assert (mine["padded"][:, half:] == -torch.inf).all()
            torch.testing.assert_close(mine["padded entropy"].double(), -(half_TV.exp() * half_TV).sum(dim=1))
            assert torch.equal(mine["ties"], naive.support(logits(2).round(), 20))
            assert mine["empty"].shape == (0,)
        shards_TV = torch.cat([ranks[rank][size, "sampled"]["gradient"] for rank in group], dim=1)
        torch.testing.assert_close(shards_TV.double(), grad_TV, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("size", SIZES)
def test_shards_of_padding_alone_are_as_if_absent(ranks: list[dict[Any, Any]], size: int) -> None:
    half = VOCABULARY // 2
    student_TV, teacher_TV = logits(0)[:, :half], logits(1)[:, :half]
    ids_TK = naive.support(student_TV, 5)
    binned_T, binned_TV = naive.divergence_and_gradient(student_TV, teacher_TV, ids_TK, 0.5, True, weights())
    full_T, full_TV = full_oracle(student_TV, teacher_TV, 0.5)
    for group in members(size):
        for rank in group:
            mine_T = ranks[rank][size, "padding"]["values"]
            torch.testing.assert_close(mine_T.double(), binned_T + full_T, rtol=1e-5, atol=1e-6)
        shards_TV = torch.cat([ranks[rank][size, "padding"]["gradient"] for rank in group], dim=1)
        torch.testing.assert_close(shards_TV[:, :half].double(), binned_TV + full_TV, rtol=1e-4, atol=1e-6)
        assert torch.equal(shards_TV[:, half:], torch.zeros(TOKENS, half))


# -------------------------------------------------------------------------------- whole vocabulary


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64_logits_match_to_rounding(case: tuple[float, int, bool]) -> None:
    alpha, _, tail = case
    student_TV, teacher_TV = logits(3).double(), logits(4).double()
    ids_TK, values_T, leaf_TV = compute(student_TV, teacher_TV, *case)
    expected_T, grad_TV = naive.divergence_and_gradient(student_TV, teacher_TV, ids_TK, alpha, tail, weights())
    torch.testing.assert_close(values_T.detach(), expected_T, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient(values_T, leaf_TV), grad_TV, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bf16_logits_are_computed_in_fp32(case: tuple[float, int, bool]) -> None:
    alpha, _, tail = case
    student_TV, teacher_TV = logits(5, torch.bfloat16), logits(6, torch.bfloat16)
    ids_TK, values_T, leaf_TV = compute(student_TV, teacher_TV, *case)
    expected_T, grad_TV = naive.divergence_and_gradient(student_TV, teacher_TV, ids_TK, alpha, tail, weights())
    assert values_T.dtype == torch.float32
    torch.testing.assert_close(values_T.detach().double(), expected_T, rtol=1e-5, atol=1e-6)
    grad = gradient(values_T, leaf_TV)
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(grad.double(), grad_TV, rtol=2**-8, atol=1e-6)


JSD = 0.5 * math.log(4 / 3) - 0.25 * math.log(3 / 2)


@pytest.mark.parametrize(
    ("alpha", "expected", "grad"),
    [
        # p = (1/2, 1/4 | 1/4), q = (1/4, 1/4 | 1/2): the kept tokens 0 and 1, and token 2 as the tail.
        (0.0, 0.25 * math.log(2), (0.25, 0.0, -0.25)),  # p - q
        (1.0, 0.25 * math.log(2), (0.375 * math.log(2), -0.0625 * math.log(2), -0.3125 * math.log(2))),
        # m = (3/8, 1/4, 3/8)
        (0.5, JSD, (0.25 * math.log(4 / 3) - 0.25 * JSD, -0.125 * JSD, 0.125 * math.log(2 / 3) - 0.125 * JSD)),
    ],
)
def test_three_tokens_by_hand(alpha: float, expected: float, grad: tuple[float, ...]) -> None:
    student_TV = torch.tensor([[0.5, 0.25, 0.25]]).log().requires_grad_()
    teacher_TB = torch.tensor([[0.25, 0.25, 0.5]]).log()
    value_T = dv.divergence(student_TV, torch.tensor([[0, 1]]), teacher_TB, alpha)
    assert value_T.item() == pytest.approx(expected, rel=1e-6)
    # The same when the teacher's tail has to be inferred.
    inferred_T = dv.divergence(student_TV, torch.tensor([[0, 1]]), teacher_TB[:, :2], alpha)
    assert inferred_T.item() == pytest.approx(expected, rel=1e-6)
    value_T.sum().backward()
    assert student_TV.grad is not None
    assert student_TV.grad[0].tolist() == pytest.approx(grad, abs=1e-7)
    assert student_TV.grad.sum().item() == pytest.approx(0.0, abs=1e-7)


def test_without_a_tail_by_hand() -> None:
    student_TV = torch.tensor([[0.4, 0.4, 0.2]]).log().requires_grad_()
    teacher_TK = torch.tensor([[0.1, 0.3]]).log()  # renormalised: (1/2, 1/2) against (1/4, 3/4)
    value_T = dv.divergence(student_TV, torch.tensor([[0, 1]]), teacher_TK, 1.0, tail=False)
    assert value_T.item() == pytest.approx(0.5 * math.log(4 / 3), rel=1e-6)
    value_T.sum().backward()
    assert student_TV.grad is not None
    expected = 0.25 * math.log(3)  # p_0 (log 2 - KL) with KL = log 2 - log(3) / 2
    assert student_TV.grad[0].tolist() == pytest.approx([expected, -expected, 0.0], abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("alpha", "k"), list(itertools.product(ALPHAS, SUPPORTS)))
def test_an_equal_teacher_gives_zero(alpha: float, k: int, dtype: torch.dtype) -> None:
    _, values_T, leaf_TV = compute(logits(7, dtype), logits(7, dtype), alpha, k, True)
    assert torch.equal(values_T, torch.zeros(TOKENS))
    assert torch.equal(gradient(values_T, leaf_TV), torch.zeros(TOKENS, VOCABULARY, dtype=dtype))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_k_one_below_the_vocabulary_is_the_full_divergence(alpha: float) -> None:
    student_TV, teacher_TV = logits(8), logits(9)
    _, values_T, _ = compute(student_TV, teacher_TV, alpha, VOCABULARY - 1, True)
    p_TV, q_TV = naive.log_probs(student_TV).exp(), naive.log_probs(teacher_TV).exp()
    torch.testing.assert_close(values_T.double(), naive.bin_divergence(p_TV, q_TV, alpha), rtol=1e-5, atol=1e-6)
    ids_TK = dv.student_support(student_TV, VOCABULARY)  # nothing is left for the tail, known or inferred
    for with_tail in (True, False):
        teacher_TB = dv.support_log_probs(teacher_TV, ids_TK, with_tail=with_tail)
        all_T = dv.divergence(student_TV, ids_TK, teacher_TB, alpha)
        torch.testing.assert_close(all_T, values_T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mass", [1e-6, 1e-9, 1e-30])
def test_a_small_tail_is_accurate(mass: float) -> None:
    logits_TV = torch.full((1, 1001), math.log(mass / 999))
    logits_TV[0, [400, 800]] = torch.tensor([0.7, 0.3]).log()
    ids_TK = dv.student_support(logits_TV, 2)
    tail = dv.support_log_probs(logits_TV, ids_TK, with_tail=True)[0, -1].item()
    assert math.exp(tail) == pytest.approx(mass / (1 + mass), rel=1e-4)


def test_an_inferred_tail_has_a_floor() -> None:
    student_TV = torch.tensor([[0.5, 0.4, 0.1]]).log()
    teacher_TK = torch.tensor([[0.5, 0.5]]).log()  # nothing is left
    value_T = dv.divergence(student_TV, torch.tensor([[0, 1]]), teacher_TK, 1.0)
    assert value_T.item() == pytest.approx(0.4 * math.log(0.8) + 0.1 * math.log(0.1 / dv.TAIL_FLOOR), rel=1e-4)


def test_ties_go_to_the_lower_id() -> None:
    logits_TV = torch.tensor([[1.0, 2.0, 2.0, 2.0, -0.0, 0.0, 1.0], [-1.0, -2.0, -1.0, -torch.inf, -2.0, -2.0, -3.0]])
    assert dv.student_support(logits_TV, 7).tolist() == [[1, 2, 3, 0, 6, 4, 5], [0, 2, 1, 4, 5, 6, 3]]
    equal_TV = torch.zeros(3, 5000, dtype=torch.bfloat16)
    assert torch.equal(dv.student_support(equal_TV, 100), torch.arange(100).expand(3, -1))


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("with_teacher_tail", [True, False])
def test_padding_columns_are_as_if_absent(alpha: float, tail: bool, with_teacher_tail: bool) -> None:
    """Also when K is so large that padding is kept and no tail is left."""
    padding_TV = torch.full((TOKENS, 8), -torch.inf)
    for k in (5, VOCABULARY, VOCABULARY + 4):
        results = []
        for pad in (padding_TV[:, :0], padding_TV):
            student_TV = torch.cat([logits(10), pad], dim=1).requires_grad_()
            ids_TK = dv.student_support(student_TV, min(k, student_TV.shape[1]))
            teacher_TB = dv.support_log_probs(torch.cat([logits(11), pad], dim=1), ids_TK, with_tail=with_teacher_tail)
            values_T = dv.divergence(student_TV, ids_TK, teacher_TB, alpha, tail)
            results.append((values_T.detach(), gradient(values_T, student_TV)))
        (plain_T, plain_TV), (padded_T, padded_TV) = results
        torch.testing.assert_close(padded_T, plain_T, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(padded_TV[:, :VOCABULARY], plain_TV, rtol=1e-4, atol=1e-6)
        assert (padded_TV[:, VOCABULARY:] == 0).all()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_teacher_that_excludes_a_token_gives_finite_numbers(alpha: float) -> None:
    teacher_TV = logits(11)
    teacher_TV[:, ::2] = -torch.inf
    _, values_T, leaf_TV = compute(logits(10), teacher_TV, alpha, 20, True)
    assert values_T.isfinite().all() and gradient(values_T, leaf_TV).isfinite().all()


def test_the_gradient_goes_to_the_student_only() -> None:
    student_TV, teacher_TB = logits(12).requires_grad_(), logits(13, width=6).log_softmax(dim=1).requires_grad_()
    ids_TK = dv.student_support(student_TV, 5)
    dv.divergence(student_TV, ids_TK, teacher_TB, 0.5).sum().backward()
    assert student_TV.grad is not None and student_TV.grad.abs().sum() > 0
    assert teacher_TB.grad is None
    assert not dv.support_log_probs(student_TV, ids_TK).requires_grad and not dv.entropy(student_TV).requires_grad


def test_reverse_kl_is_the_expected_sampled_token_gradient() -> None:
    """sum_y p(y) (log p(y) - log q(y)) grad log p(y), the policy gradient that SDPO is."""
    student_TV, teacher_TV = logits(14).double(), logits(15).double()
    leaf_TV = student_TV.clone().requires_grad_()
    log_p_TV, log_q_TV = naive.log_probs(student_TV), naive.log_probs(teacher_TV)
    surrogate = torch.zeros((), dtype=torch.float64)
    for token in range(VOCABULARY):
        factor_T = log_p_TV[:, token].exp() * (log_p_TV[:, token] - log_q_TV[:, token])
        surrogate = surrogate + (factor_T * dv.sampled_log_probs(leaf_TV, torch.full((TOKENS,), token))).sum()
    (expected_TV,) = torch.autograd.grad(surrogate, leaf_TV)
    _, values_T, exact_TV = compute(student_TV, teacher_TV, 1.0, VOCABULARY - 1, True)
    (grad_TV,) = torch.autograd.grad(values_T.sum(), exact_TV)
    torch.testing.assert_close(grad_TV, expected_TV, rtol=1e-10, atol=1e-12)


def test_blocks_of_rows_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    case = (0.5, 20, True)
    ids_TK, values_T, leaf_TV = compute(logits(0), logits(1), *case)
    expected = ids_TK, values_T, gradient(values_T, leaf_TV), dv.entropy(logits(0))
    monkeypatch.setitem(vocabulary.BLOCK, "cpu", 4 * VOCABULARY)
    ids_TK, values_T, leaf_TV = compute(logits(0), logits(1), *case)
    for got, want in zip((ids_TK, values_T, gradient(values_T, leaf_TV), dv.entropy(logits(0))), expected, strict=True):
        assert torch.equal(got, want)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    width=st.integers(2, 40),
    share=st.floats(0, 1),
    alpha=st.floats(0, 1),
    scale=st.sampled_from([1e-4, 0.1, 3.0, 30.0, 3000.0]),
    tail=st.booleans(),
)
def test_values_keep_their_range(seed: int, width: int, share: float, alpha: float, scale: float, tail: bool) -> None:
    """Never negative nor above a Jensen-Shannon divergence's bound; gradients finite, rows summing to zero."""
    k = max(1, round(share * (width - 1)))
    student_TV, teacher_TV = logits(seed, scale=scale, width=width), logits(seed + 1, scale=scale, width=width)
    _, values_T, leaf_TV = compute(student_TV, teacher_TV, alpha, k, tail)
    (grad_TV,) = torch.autograd.grad(values_T.sum(), leaf_TV)
    assert (values_T >= -1e-6).all() and values_T.isfinite().all() and grad_TV.isfinite().all()
    assert grad_TV.sum(dim=1).abs().max() <= 1e-5 * max(1.0, scale)
    if 0.0 < alpha < 1.0:
        bound = -(1 - alpha) * math.log(1 - alpha) - alpha * math.log(alpha)
        assert (values_T <= bound + 1e-6).all()


@pytest.mark.parametrize("bounds", [(-math.inf, 0.4), (-0.7, 0.7), (-math.inf, math.inf)])
@pytest.mark.parametrize("tail", [True, False])
def test_clipped_advantages_match_the_oracle(bounds: tuple[float, float], tail: bool) -> None:
    student_TV, teacher_TV = logits(20).double(), logits(21).double()
    ids_TK, _, _ = compute(student_TV, teacher_TV, 1.0, 8, tail)
    leaf_TV, naive_TV = student_TV.clone().requires_grad_(), student_TV.clone().requires_grad_()
    teacher_TB = dv.support_log_probs(teacher_TV, ids_TK, with_tail=True)
    clipped_T = dv.divergence(leaf_TV, ids_TK, teacher_TB, 1.0, tail, advantage_bounds=bounds)
    plain_T = dv.divergence(leaf_TV, ids_TK, teacher_TB, 1.0, tail)
    assert torch.equal(clipped_T, plain_T)
    p_TB = naive.bins(naive.log_probs(naive_TV), ids_TK, tail)
    q_TB = naive.bins(naive.log_probs(teacher_TV), ids_TK, tail)
    advantage_TB = (q_TB / p_TB.detach()).log().clamp(*bounds)
    expected_TV = gradient(-(p_TB * advantage_TB).sum(dim=1), naive_TV)
    torch.testing.assert_close(gradient(clipped_T, leaf_TV), expected_TV, rtol=1e-10, atol=1e-12)


def test_what_does_not_fit_is_refused() -> None:
    ids_TK = torch.zeros(TOKENS, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="it must lie between 0 and 1"):
        dv.divergence(logits(0), ids_TK, torch.zeros(TOKENS, 3), 1.5)
    with pytest.raises(ValueError, match="shapes do not fit"):
        dv.full_divergence(logits(0), logits(0, width=8), 0.5)
    with pytest.raises(ValueError, match="bounds for alpha 1 only"):
        dv.divergence(logits(0), ids_TK, torch.zeros(TOKENS, 3), 0.5, advantage_bounds=(-1.0, 1.0))
    with pytest.raises(ValueError, match="needs 3 or 4 columns"):
        dv.divergence(logits(0), ids_TK, torch.zeros(TOKENS, 5), 0.5)
    with pytest.raises(ValueError, match="between 1 and the 32"):
        dv.student_support(logits(0), VOCABULARY + 1)
