"""Radial bases and cutoff functions of the interatomic distance r (Å).

Bases map (E,) distances to (E, size); cutoff functions map (E,) to (E,), one at r = 0 and zero from the cutoff on.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from mlff_engines.units import BOHR

BasisName = Literal["bessel", "gaussian", "bernstein"]
CutoffName = Literal["cosine", "polynomial", "physnet"]


class BesselBasis(nn.Module):
    """sin(nπr/r_c)/r, n = 1..size (Gasteiger et al., DimeNet, arXiv 2003.03123, Eq. 7 without its constant factor)."""

    def __init__(self, size: int, cutoff: float) -> None:
        super().__init__()
        self.frequencies = nn.Buffer(torch.arange(1, size + 1) * (math.pi / cutoff))

    def forward(self, r: Tensor) -> Tensor:
        """Basis functions (E, size) at distances `r` (E,), Å."""
        return torch.sin(r.unsqueeze(-1) * self.frequencies) / r.unsqueeze(-1)


class GaussianBasis(nn.Module):
    """exp(-(r - μ_n)²/2Δ²), μ_n evenly spaced on [0, r_c] by Δ (Schütt et al., SchNet, arXiv 1706.08566)."""

    def __init__(self, size: int, cutoff: float) -> None:
        super().__init__()
        centers = torch.linspace(0, cutoff, size)
        self.centers = nn.Buffer(centers)
        self.inverse_width = nn.Buffer(1 / (centers[1] - centers[0]))

    def forward(self, r: Tensor) -> Tensor:
        """Basis functions (E, size) at distances `r` (E,), Å."""
        return torch.exp(-0.5 * ((r.unsqueeze(-1) - self.centers) * self.inverse_width) ** 2)


class BernsteinBasis(nn.Module):
    """b_n(x) = C(K, n) x^n (1 - x)^(K-n), x = exp(-γr), K = size - 1.

    Unke et al., SpookyNet, Nat. Commun. 12, 7273 (2021), Eq. 12-13. γ = 0.5/Bohr, the paper's
    initial value. Evaluated through logarithms, so that large K neither over- nor underflows.
    """

    def __init__(self, size: int, cutoff: float) -> None:
        super().__init__()
        degree = size - 1
        power = torch.arange(size, dtype=torch.get_default_dtype())
        log_binomial = math.lgamma(degree + 1) - (torch.lgamma(power + 1) + torch.lgamma(degree - power + 1))
        self.log_binomial = nn.Buffer(log_binomial)
        self.power = nn.Buffer(power)
        self.complement = nn.Buffer(degree - power)
        self.gamma = 0.5 / BOHR

    def forward(self, r: Tensor) -> Tensor:
        """Basis functions (E, size) at distances `r` (E,), Å."""
        log_x = -self.gamma * r.unsqueeze(-1)
        return torch.exp(self.log_binomial + self.power * log_x + self.complement * torch.log(-torch.expm1(log_x)))


class CosineCutoff(nn.Module):
    """½(1 + cos(πr/r_c)) (Behler & Parrinello, PRL 98, 146401 (2007)); continuous first derivative."""

    def __init__(self, cutoff: float) -> None:
        super().__init__()
        self.cutoff = cutoff

    def forward(self, r: Tensor) -> Tensor:
        """Envelope (E,) at distances `r` (E,), Å."""
        return 0.5 * (torch.cos(r * (math.pi / self.cutoff)) + 1) * (r < self.cutoff)


class PolynomialCutoff(nn.Module):
    """1 - (p+1)(p+2)/2 x^p + p(p+2) x^(p+1) - p(p+1)/2 x^(p+2), x = r/r_c (DimeNet, arXiv 2003.03123, Eq. 8).

    Evaluated as (1 - x)³ Σ_k (k+1)(k+2)/2 x^k, k < p, whose digits do not cancel near the cutoff.
    Continuous second derivative. p = 6 is the envelope of DimeNet and NequIP; p = 3 is PhysNet's
    1 - 10x³ + 15x⁴ - 6x⁵ (Unke & Meuwly, JCTC 15, 3678 (2019), Eq. 7).
    """

    def __init__(self, cutoff: float, p: int = 6) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.p = p

    def forward(self, r: Tensor) -> Tensor:
        """Envelope (E,) at distances `r` (E,), Å."""
        x = (r / self.cutoff).clamp(max=1.0)
        total = torch.zeros_like(x)
        for k in range(self.p - 1, -1, -1):
            total = total * x + 0.5 * (k + 1) * (k + 2)
        return (1 - x) ** 3 * total


def make_basis(name: BasisName, size: int, cutoff: float) -> nn.Module:
    """The radial basis called `name`."""
    bases: dict[str, type[nn.Module]] = {"bessel": BesselBasis, "gaussian": GaussianBasis, "bernstein": BernsteinBasis}
    return bases[name](size, cutoff)


def make_cutoff(name: CutoffName, cutoff: float) -> nn.Module:
    """The cutoff function called `name`."""
    if name == "cosine":
        return CosineCutoff(cutoff)
    return PolynomialCutoff(cutoff, p=3 if name == "physnet" else 6)
