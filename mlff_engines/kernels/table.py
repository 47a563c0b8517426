"""Radial filters as piecewise polynomials of the distance.

On each of `intervals` equal intervals of [START, cutoff] a filter W(r) is the polynomial of degree p that agrees with
it at the p + 1 Chebyshev-Lobatto points, which include the ends: so the table is continuous, and exactly zero at the
cutoff. Below START the first polynomial goes on. Energies follow the table and forces its exact derivative.

The number of intervals grows until the error, measured between the points, is within the bound:

| dtype   | p  | largest error of W / largest |W|, and of dW/dr / largest |dW/dr| |
|---------|----|-------------------------------------------------------------------|
| float32 | 5  | 2e-7                                                              |
| float64 | 11 | 5e-13                                                             |

Trefethen, Approximation Theory and Approximation Practice (SIAM, 2013), chapters 2 and 7.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mlff_engines.errors import ArtifactError

DEGREE = {torch.float32: 5, torch.float64: 11}  # DEGREE in painn.cpp
BOUND = {torch.float32: 2e-7, torch.float64: 5e-13}
START = 1e-3  # Å; some bases are not defined at zero
INTERVALS = [m << k for k in range(4, 11) for m in (2, 3)]  # 32, 48, 64, 96, ... 3072


@dataclass(frozen=True)
class FilterTable:
    """Filters of all layers.

    Attributes:
        coefficients: (intervals, degree + 1, channels), of powers of t in [-1, 1].
        value_error: largest error of W over the largest |W|.
        slope_error: largest error of dW/dr over the largest |dW/dr|.
    """

    coefficients: Tensor
    value_error: float
    slope_error: float

    @property
    def intervals(self) -> int:
        """Number of polynomials."""
        return len(self.coefficients)


def tabulate(filters: Callable[[Tensor], Tensor], cutoff: float, dtype: torch.dtype) -> FilterTable:
    """The table of `filters`, from distances (E,) in Å to (E, channels), both float64, that a model of `dtype` needs.

    Raises:
        ArtifactError: the bound is out of reach with the largest number of intervals.
    """
    value_error = slope_error = math.inf
    for intervals in INTERVALS:
        coefficients = _interpolate(filters, cutoff, intervals, DEGREE[dtype])
        value_error, slope_error = _errors(filters, cutoff, coefficients)
        if max(value_error, slope_error) <= BOUND[dtype]:
            return FilterTable(coefficients.to(dtype), value_error, slope_error)
    raise ArtifactError(
        f"the radial filters cannot be tabulated: error {value_error:.1e}, of their slopes {slope_error:.1e}, with "
        f"{INTERVALS[-1]} intervals; allowed {BOUND[dtype]:g}. Use kernel='torch', or train with fewer basis functions"
    )


def _distances(t: Tensor, intervals: int, cutoff: float) -> Tensor:
    """Distances (intervals·len(t),) of the points t in [-1, 1] of every interval."""
    left = torch.arange(intervals, dtype=torch.float64).unsqueeze(-1)
    r = START + (left + 0.5 * (t + 1)) * ((cutoff - START) / intervals)
    return r.clamp(max=cutoff).flatten()  # rounding must not leave the last interval


def _interpolate(filters: Callable[[Tensor], Tensor], cutoff: float, intervals: int, degree: int) -> Tensor:
    t = -torch.cos(torch.arange(degree + 1, dtype=torch.float64) * (math.pi / degree))
    powers = t.unsqueeze(-1) ** torch.arange(degree + 1)
    with torch.no_grad():
        values = filters(_distances(t, intervals, cutoff)).unflatten(0, (intervals, -1))
        coefficients: Tensor = torch.linalg.solve(powers, values)
    return coefficients


def _errors(filters: Callable[[Tensor], Tensor], cutoff: float, coefficients: Tensor) -> tuple[float, float]:
    """Between the points of the interpolation."""
    intervals, terms, _ = coefficients.shape
    t = (torch.arange(2 * terms, dtype=torch.float64) + 0.5) / terms - 1
    with torch.enable_grad():
        r = _distances(t, intervals, cutoff).requires_grad_(True)
        exact = filters(r)
        # the derivative of a vector-Jacobian product by its vector: all slopes at once
        cotangent = torch.zeros_like(exact, requires_grad=True)
        (product,) = torch.autograd.grad(exact, r, cotangent, create_graph=True)
        (slope,) = torch.autograd.grad(product, cotangent, torch.ones_like(r))
    powers = t.unsqueeze(-1) ** torch.arange(terms)
    derivatives = torch.arange(1, terms) * powers[:, :-1] * (2 * intervals / (cutoff - START))
    return (
        _relative_error((powers @ coefficients).flatten(0, 1), exact.detach()),
        _relative_error((derivatives @ coefficients[:, 1:]).flatten(0, 1), slope),
    )


def _relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).abs().max() / exact.abs().max())
