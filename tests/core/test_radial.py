"""Radial bases and cutoff functions: values by their formulas, slopes and limits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlff_engines.models.radial import PolynomialCutoff, make_basis, make_cutoff

CUTOFF = 5.0
BASES: Any = ["bessel", "gaussian", "bernstein"]
CUTOFFS: Any = ["cosine", "polynomial", "physnet"]


def derivatives(function: nn.Module, r: float, order: int) -> list[float]:
    """The function at `r` and its derivatives up to `order`."""
    x = torch.tensor([r], dtype=torch.float64, requires_grad=True)
    values = [function(x).sum()]
    for _ in range(order):
        values.append(torch.autograd.grad(values[-1], x, create_graph=True)[0].sum())
    return [float(value.detach()) for value in values]


@pytest.mark.parametrize("r", [0.3, 1.1, 2.7, 4.9])
def test_values(r: float) -> None:
    """Each formula written out, one term at a time."""
    size = 6
    x = torch.tensor([r], dtype=torch.float64)
    width = CUTOFF / (size - 1)
    t = math.exp(-0.5 * r / 0.529177210903)
    expected = {
        "bessel": [math.sin(n * math.pi * r / CUTOFF) / r for n in range(1, size + 1)],
        "gaussian": [math.exp(-((r - n * width) ** 2) / (2 * width**2)) for n in range(size)],
        "bernstein": [math.comb(size - 1, n) * t**n * (1 - t) ** (size - 1 - n) for n in range(size)],
    }
    torch.set_default_dtype(torch.float64)
    try:
        for name in BASES:
            found = make_basis(name, size, CUTOFF)(x)
            assert found.shape == (1, size)
            torch.testing.assert_close(found[0], torch.tensor(expected[name]), rtol=1e-12, atol=1e-14)
    finally:
        torch.set_default_dtype(torch.float32)
    u = r / CUTOFF
    envelopes = {
        "cosine": 0.5 * (math.cos(math.pi * u) + 1),
        "polynomial": 1 - 28 * u**6 + 48 * u**7 - 21 * u**8,
        "physnet": 1 - 6 * u**5 + 15 * u**4 - 10 * u**3,
    }
    for name in CUTOFFS:
        assert float(make_cutoff(name, CUTOFF)(x)) == pytest.approx(envelopes[name], abs=1e-14)


@pytest.mark.parametrize(("name", "smooth"), [("cosine", 1), ("polynomial", 2), ("physnet", 2)])
def test_cutoff_functions_end_smoothly(name: Any, smooth: int) -> None:
    """Value and the first `smooth` derivatives vanish at the cutoff; everything vanishes beyond."""
    function = make_cutoff(name, CUTOFF)
    inside = derivatives(function, CUTOFF - 1e-9, smooth)
    assert inside == pytest.approx([0.0] * (smooth + 1), abs=1e-7)
    for r in (CUTOFF, CUTOFF + 1e-12, CUTOFF + 0.3, 100.0):
        assert derivatives(function, r, 2) == [0, 0, 0]
    assert derivatives(function, 0.0, 1) == pytest.approx([1, 0], abs=1e-12)


def test_cosine_has_a_kink_in_its_slope_at_the_cutoff() -> None:
    """Why finite differences of forces must not cross it."""
    assert derivatives(make_cutoff("cosine", CUTOFF), CUTOFF - 1e-9, 2)[2] == pytest.approx(math.pi**2 / 50)


@pytest.mark.parametrize("name", CUTOFFS)
def test_cutoff_functions_keep_their_digits_in_float32(name: Any) -> None:
    """Near the cutoff a polynomial written as one minus its terms is off by 1e-5, and jumps to zero by that much."""
    function = make_cutoff(name, CUTOFF)
    r = torch.linspace(0.9, 1, 200) * CUTOFF
    torch.testing.assert_close(function(r).double(), function(r.double()), rtol=0, atol=1e-7)
    single, double = r.clone().requires_grad_(), r.double().requires_grad_()
    slopes = [torch.autograd.grad(function(x).sum(), x)[0].double() for x in (single, double)]
    torch.testing.assert_close(*slopes, rtol=0, atol=3e-7)


@pytest.mark.parametrize("name", CUTOFFS)
def test_cutoff_functions_fall(name: Any) -> None:
    r = torch.linspace(0, 1.2 * CUTOFF, 500, dtype=torch.float64)
    values = make_cutoff(name, CUTOFF)(r)
    assert (values.diff() <= 0).all()
    assert ((values >= 0) & (values <= 1)).all()


def test_polynomial_cutoff_takes_any_power() -> None:
    function = PolynomialCutoff(2.0, p=4)
    assert derivatives(function, 2.0 - 1e-9, 2) == pytest.approx([0, 0, 0], abs=1e-7)
    assert derivatives(function, 1.0, 0)[0] == pytest.approx(1 - 15 / 16 + 24 / 32 - 10 / 64)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("size", [2, 20, 64])
def test_bases_stay_finite(name: Any, size: int) -> None:
    """From close contact to beyond the cutoff, with their slopes, in either precision."""
    for dtype in (torch.float32, torch.float64):
        basis = make_basis(name, size, CUTOFF).to(dtype)
        r = torch.tensor([1e-3, 0.1, 1.0, CUTOFF, 2 * CUTOFF], dtype=dtype, requires_grad=True)
        values: Tensor = basis(r)
        assert values.dtype == dtype
        slope = torch.autograd.grad(values.sum(), r)[0]
        assert values.isfinite().all()
        assert slope.isfinite().all()


def test_bernstein_basis_is_a_partition_of_unity() -> None:
    r = torch.linspace(0.05, 8, 50, dtype=torch.float64)
    values = make_basis("bernstein", 32, CUTOFF).double()(r)
    torch.testing.assert_close(values.sum(-1), torch.ones(50, dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", BASES)
def test_float32_agrees_with_float64(name: Any) -> None:
    r = torch.linspace(0.5, CUTOFF, 40)
    single = make_basis(name, 20, CUTOFF)
    values = single(r).double()
    torch.testing.assert_close(values, single.double()(r.double()), rtol=0, atol=2e-5)
