"""Block FP8 in torch: hand numbers, bounds, and every product of a linear against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_sdpo.quantization import (
    LARGEST,
    BlockLinear,
    of_blocks,
    of_rows,
    quantized_blocks,
    quantized_rms_norm,
    quantized_rows,
    quantized_swiglu,
)

SIZES = st.integers(1, 300)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_hand_numbers() -> None:
    codes, scales = quantized_rows(torch.tensor([[448.0, -1.0, 0.0], [0.0, 0.0, 0.0], [2.0, 1.0, 0.26]]))
    assert scales.tolist() == [[1.0], [1.0], [pytest.approx(2.0 / 448.0)]]
    # 0.26 / (2 / 448) = 58.24, between the codes 56 and 60: three bits behind the leading one
    assert codes.float().tolist() == [[448.0, -1.0, 0.0], [0.0, 0.0, 0.0], [448.0, 224.0, 60.0]]


def test_each_128_of_a_row_and_each_square_of_a_weight_has_a_scale() -> None:
    x = torch.ones(3, 300)
    x[1, 130] = 896.0
    codes, scales = quantized_rows(x)
    assert codes.shape == x.shape and scales.shape == (3, 3)
    assert scales[1].tolist() == [pytest.approx(1 / 448), 2.0, pytest.approx(1 / 448)]
    weight = torch.ones(200, 300)
    weight[199, 299] = 896.0
    codes, scales = quantized_blocks(weight)
    assert codes.shape == weight.shape and scales.shape == (2, 3)
    assert scales[1, 2] == 2.0 and (scales < 0.01).sum() == 5


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, st.integers(-30, 30), st.booleans())
def test_no_number_is_off_by_more_than_a_sixteenth(n: int, k: int, power: int, of_weight: bool) -> None:
    x = drawn(n, k, seed=n * 1000 + k) * 2.0**power
    there, back = (quantized_blocks, of_blocks) if of_weight else (quantized_rows, of_rows)
    codes, scales = there(x)
    again = back(codes, scales)
    step = (scales.repeat_interleave(128, 0)[:n] if of_weight else scales).repeat_interleave(128, 1)[:, :k]
    assert ((again - x).abs() <= x.abs() / 16 + step * 2.0**-10).all()  # below the normal codes the step is 2^-9
    assert (codes.float().abs() <= LARGEST).all()
    codes_again, scales_again = there(again)
    assert torch.equal(codes_again.float(), codes.float()), "quantising twice is quantising once"
    assert torch.allclose(scales_again, scales)


def test_what_is_not_finite_stays_so_and_the_least_number_makes_no_infinity() -> None:
    codes, scales = quantized_rows(torch.tensor([[float("nan"), 1.0], [1e-45, 0.0]]))
    assert codes[0, 0].isnan() and codes[0, 1] == 1.0
    assert scales.isfinite().all() and (scales > 0).all()
    assert of_rows(codes, scales)[1].isfinite().all()


def exact(x: Tensor, w: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three products on the quantised numbers, in float64."""
    x_q, w_q = of_rows(*quantized_rows(x)).double(), of_blocks(*quantized_blocks(w)).double()
    grad_q = of_rows(*quantized_rows(grad)).double()
    columns = [of_rows(*quantized_rows(t.t().contiguous())).double() for t in (grad, x)]
    return x_q @ w_q.t(), grad_q @ w_q, columns[0] @ columns[1].t()


@pytest.mark.parametrize(("t", "k", "n"), [(7, 96, 176), (64, 128, 256), (130, 300, 70)])
def test_a_linear_against_float64(t: int, k: int, n: int) -> None:
    x, w, grad = drawn(t, k), drawn(n, k, seed=1) * 0.02, drawn(t, n, seed=2)
    x_leaf, w_leaf = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = BlockLinear.apply(x_leaf[:, None], w_leaf)
    assert isinstance(y, Tensor) and y.shape == (t, 1, n)
    y.backward(grad[:, None])
    assert x_leaf.grad is not None and w_leaf.grad is not None
    for got, wanted in zip((y[:, 0], x_leaf.grad, w_leaf.grad), exact(x, w, grad), strict=True):
        assert torch.allclose(got.double(), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    plain = (x @ w.t(), grad @ w, grad.t() @ x)
    for got, wanted in zip((y[:, 0], x_leaf.grad, w_leaf.grad), plain, strict=True):
        assert (got - wanted).norm() / wanted.norm() < 0.045, "of normal numbers about 3.7 %"


def test_against_torchs_scaled_product() -> None:
    """torch multiplies FP8 tensors with one scale each on a CPU: one block is the same thing."""
    x, w = drawn(16, 128), drawn(128, 128, seed=1)
    x[:, 0] = 4.0  # every row has the same largest number, so one scale is right for all
    x.clamp_(-4.0, 4.0)
    (x_codes, x_scales), (w_codes, w_scales) = quantized_rows(x), quantized_blocks(w)
    assert len(set(x_scales.flatten().tolist())) == 1
    theirs = torch._scaled_mm(
        x_codes, w_codes.t(), scale_a=x_scales[0, 0], scale_b=w_scales[0, 0], out_dtype=torch.float32
    )
    ours = BlockLinear.apply(x, w)
    assert isinstance(ours, Tensor) and torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_gated_unit_and_a_norm_are_quantised_as_if_they_had_been_written() -> None:
    """By rows, the scales transposed."""
    generator = torch.Generator().manual_seed(0)
    gates_T2F, x_TH = (torch.randn(9, width, generator=generator).bfloat16() for width in (400, 300))
    weight_H = torch.rand(300, generator=generator).bfloat16()
    written = torch.nn.functional.silu(gates_T2F[:, :200].float()) * gates_T2F[:, 200:].float()
    normed = torch.nn.functional.rms_norm(x_TH.float(), (300,), weight_H.float(), 1e-6)
    for (codes, scales), wanted in (
        (quantized_swiglu(gates_T2F), written),
        (quantized_rms_norm(x_TH, weight_H, 1e-6), normed),
    ):
        again, again_scales = quantized_rows(wanted.bfloat16())
        assert torch.equal(codes.float(), again.float()) and torch.equal(scales, again_scales.t())
