"""Triton kernels against their twins in torch, on random input. They need a GPU."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_sdpo import quantization, vocabulary
from megatron_sdpo.divergence import divergence
from megatron_sdpo.vocabulary import read, student_support

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: a kernel has nothing to run on"),
]
DTYPES = [torch.bfloat16, torch.float32, torch.float16]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (33, 129), (1000, 3000), (256, 4096)])
def test_codes_and_scales_are_torchs_to_the_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = (drawn(*shape) * 3).to(dtype)
    x[0] = 0.0
    for kernel, twin in (
        (quantization.quantized_rows, quantization.rows_in_torch),
        (quantization.quantized_blocks, quantization.blocks_in_torch),
    ):
        (codes, scales), (wanted, wanted_scales) = kernel(x), twin(x)
        assert torch.equal(codes.view(torch.uint8), wanted.view(torch.uint8))
        assert torch.equal(scales, wanted_scales)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 128), (33, 384), (1000, 4096), (12, 5120)])
def test_codes_written_at_once_are_torchs_but_for_rounding(shape: tuple[int, int], dtype: torch.dtype) -> None:
    gates, x, weight = (
        drawn(shape[0], 2 * shape[1]).to(dtype),
        drawn(*shape, seed=1).to(dtype),
        drawn(shape[1]).to(dtype),
    )
    x[0] = gates[0] = 0.0
    for (codes, scales), (wanted, wanted_scales) in (
        (quantization.quantized_swiglu(gates), quantization.swiglu_in_torch(gates)),
        (quantization.quantized_rms_norm(x, weight, 1e-6), quantization.rms_norm_in_torch(x, weight, 1e-6)),
    ):
        assert (codes.view(torch.uint8) == wanted.view(torch.uint8)).double().mean() > 0.998
        torch.testing.assert_close(scales, wanted_scales, rtol=0.01, atol=0)  # one step of bf16


def both(monkeypatch: pytest.MonkeyPatch, work: Callable[[], list[Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    """What ``work`` gives with the kernels and without."""
    assert vocabulary._HAS_TRITON
    found = [x.clone() for x in work()]
    monkeypatch.setattr(vocabulary, "_HAS_TRITON", False)
    return found, [x.clone() for x in work()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "entries", "k"), [(1, 16, 16), (5, 130, 100), (9, 5000, 7), (64, 151_936, 100)])
def test_a_walk_over_logits(
    tokens: int, entries: int, k: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = (drawn(tokens, entries) * 4).to(dtype)
    logits[0, 1:] = -torch.inf  # one token alone
    before = logits.clone()
    ids = student_support(logits, k)
    sampled = torch.randint(0, entries, (tokens,), generator=torch.Generator("cuda").manual_seed(1), device="cuda")

    def work() -> list[Tensor]:
        found = read(logits, ids, sampled_ids_T=sampled, with_entropy=True)
        assert found.sampled_T is not None and found.entropy_T is not None
        return [found.log_probs_TB, found.tail_T, found.sampled_T, found.entropy_T]

    for got, wanted in zip(*both(monkeypatch, work), strict=True):
        assert torch.allclose(got, wanted, rtol=1e-4, atol=2e-5), (got - wanted).abs().max()
    assert torch.equal(logits, before), "the logits are put back"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_a_divergence(dtype: torch.dtype, overwrite: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, entries, k = 40, 20_000, 20
    start = (drawn(tokens, entries) * 3).to(dtype)
    ids = student_support(start, k)
    teacher = read((start.float() + 0.3 * drawn(tokens, entries, seed=1)), ids).log_probs_TB

    def work() -> list[Tensor]:
        logits = start.clone().requires_grad_()
        values = divergence(logits, ids, teacher, 0.5, overwrite=overwrite)
        (grad,) = torch.autograd.grad(values.sum(), logits)
        return [values.detach(), grad.float()]

    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for got, wanted in zip(*both(monkeypatch, work), strict=True):
        assert (got - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "entries", "k"), [(1, 16, 16), (5, 130, 100), (9, 5000, 7), (64, 151_936, 20), (16, 151_937, 100)]
)
def test_a_support_with_many_equal_logits(
    tokens: int, entries: int, k: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = ((drawn(tokens, entries) * 8).round() / 2).to(dtype)
    logits[0, ::3] = -torch.inf
    logits[:, 1] = -0.0
    (found,), (wanted,) = both(monkeypatch, lambda: [student_support(logits, k)])
    assert torch.equal(found, wanted)
    exact = logits.float().sort(dim=1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(found, exact)
