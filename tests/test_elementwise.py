"""Norm, gated unit and rotary embedding: values and gradients against what they are made of, in float64."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_sdpo.mcore.elementwise import RMSNorm, SwiGLU, rotate

CONFIG = cast("Any", SimpleNamespace(params_dtype=torch.float32, sequence_parallel=False))


def drawn(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check(of: Callable[..., Tensor], naive: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Values and all gradients of ``of`` in fp32 equal those of ``naive`` in float64."""
    single = [x.clone().requires_grad_() for x in inputs]
    double = [x.double().requires_grad_() for x in inputs]
    out, expected = of(*single), naive(*double)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    upstream = drawn(*out.shape, seed=9)
    found = torch.autograd.grad(out, single, upstream)
    wanted = torch.autograd.grad(expected, double, upstream.double())
    for gradient, reference in zip(found, wanted, strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient.double(), reference, rtol=1e-4, atol=1e-5)


@given(rows=st.integers(0, 9), width=st.sampled_from([1, 2, 8, 33]), scale=st.sampled_from([1e-3, 1.0, 100.0]))
@settings(max_examples=25, deadline=None)
def test_norm(rows: int, width: int, scale: float) -> None:
    def of(x: Tensor, weight_H: Tensor) -> Tensor:
        return torch.func.functional_call(RMSNorm(CONFIG, width, eps=1e-6), {"weight": weight_H}, (x,))

    def naive(x: Tensor, weight_H: Tensor) -> Tensor:
        return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * weight_H

    check(of, naive, drawn(rows, 2, width, seed=rows, scale=scale), drawn(width, seed=1))


def test_norm_of_zero_is_zero_and_its_gradient_finite() -> None:
    x = torch.zeros(3, 8, requires_grad=True)
    out = RMSNorm(CONFIG, 8, eps=1e-6)(x)
    out.sum().backward()
    assert x.grad is not None
    assert torch.equal(out, torch.zeros(3, 8))
    torch.testing.assert_close(x.grad, torch.full((3, 8), 1e3))


def test_norm_of_bf16_is_rounded_once() -> None:
    x = drawn(5, 64, seed=0).bfloat16()
    out = RMSNorm(CONFIG, 64, eps=1e-6)(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, F.rms_norm(x.float(), (64,), torch.ones(64), 1e-6).bfloat16())


@given(rows=st.integers(0, 9), width=st.sampled_from([1, 3, 16]), scale=st.sampled_from([1.0, 60.0]))
@settings(max_examples=15, deadline=None)
def test_gated_unit(rows: int, width: int, scale: float) -> None:
    def naive(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return gate / (1 + torch.exp(-gate)) * up

    check(SwiGLU(CONFIG), naive, drawn(rows, 1, 2 * width, seed=rows, scale=scale))


@pytest.mark.parametrize(("rows", "heads", "size"), [(7, 3, 8), (1, 1, 2), (0, 2, 4)])
def test_rotation(rows: int, heads: int, size: int) -> None:
    half_TD = drawn(rows, size // 2, seed=3, scale=3.0)
    angles_TD = torch.cat((half_TD, half_TD), dim=-1)

    def naive(x_Thd: Tensor) -> Tensor:
        left, right = x_Thd.chunk(2, dim=-1)
        turned = torch.complex(left, right) * torch.exp(1j * half_TD.double())[:, None]
        return torch.cat((turned.real, turned.imag), dim=-1)

    check(lambda x: rotate(x, angles_TD.cos(), angles_TD.sin()), naive, drawn(rows, heads, size, seed=4))
