"""Lennard-Jones: the analytic model every part of the chain can be checked against by hand.

    E_i = ½ Σ_j 4 ε_ij [(σ_ij/r)¹² - (σ_ij/r)⁶] S(x),   x = max(0, (r - r_s)/(r_c - r_s))
    S(x) = 1 - 10x³ + 15x⁴ - 6x⁵

| equation   | attribute          | meaning                                                                       |
|------------|--------------------|-------------------------------------------------------------------------------|
| σ_ij, ε_ij | `sigma`, `epsilon` | (119,) Å, eV per element; σ_ij = (σ_i + σ_j)/2, ε_ij = √(ε_i ε_j) for pairs   |
| S          | `switching`        | takes energy, force and its slope to zero at r_c; OpenMM's switching function |
| r_s, r_c   | `switch`, `cutoff` | Å: where S leaves 1 and where it reaches 0                                    |
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mlff_engines.config import Config
from mlff_engines.graph import Graph
from mlff_engines.models.radial import PolynomialCutoff
from mlff_engines.structure import MAX_ATOMIC_NUMBER, NUMBERS
from mlff_engines.units import BOLTZMANN


class LennardJonesConfig(Config):
    """Parameters of the Lennard-Jones model."""

    arch: Literal["lj"] = "lj"
    sigma: dict[str, float] = Field(min_length=1, description="σ per element symbol, Å")
    epsilon: dict[str, float] = Field(description="ε per element symbol, eV")
    switch: float = Field(gt=0, description="where the switching function sets in, Å")
    cutoff: float = Field(gt=0, description="interaction cutoff, Å")
    interactions: Literal[1] = 1
    charge: Literal[False] = False
    spin: Literal[False] = False

    @model_validator(mode="after")
    def _consistent(self) -> LennardJonesConfig:
        if self.sigma.keys() != self.epsilon.keys() or not self.sigma.keys() <= NUMBERS.keys():
            raise ValueError(f"sigma is given for {list(self.sigma)}, epsilon for {list(self.epsilon)}: not one list")
        if not self.switch < self.cutoff:
            raise ValueError(f"switch {self.switch:g} Å must lie below cutoff {self.cutoff:g} Å")
        return self


# A. Rahman, Phys. Rev. 136, A405 (1964): σ = 3.4 Å, ε/k_B = 120 K; cutoff 2.5 σ
ARGON = LennardJonesConfig(sigma={"Ar": 3.4}, epsilon={"Ar": 120 * BOLTZMANN}, switch=7.0, cutoff=8.5)


class LennardJones(nn.Module):
    """Per-atom energies in eV from a graph: half of each pair's energy to either atom."""

    def __init__(self, config: LennardJonesConfig) -> None:
        super().__init__()
        self.switch = config.switch
        self.switching = PolynomialCutoff(config.cutoff - config.switch, p=3)
        self.sigma = nn.Parameter(_per_element(config.sigma))
        self.epsilon = nn.Parameter(_per_element(config.epsilon))

    def forward(self, graph: Graph) -> Tensor:
        """Energies (N,) above the isolated atoms."""
        numbers, centre, neighbour = graph["numbers"], graph["edge_index"][0], graph["edge_index"][1]
        distance = torch.linalg.vector_norm(graph["edge_vec"], dim=-1)  # (E,)
        sigma, epsilon = self.sigma[numbers], self.epsilon[numbers]
        sigma_ij = 0.5 * (sigma[centre] + sigma[neighbour])
        epsilon_ij = torch.sqrt(epsilon[centre] * epsilon[neighbour])
        x6 = (sigma_ij / distance) ** 6
        pair = 4 * epsilon_ij * (x6 * x6 - x6) * self.switching((distance - self.switch).clamp(min=0.0))
        return torch.zeros_like(sigma).index_add(0, centre, 0.5 * pair)


def _per_element(values: dict[str, float]) -> Tensor:
    # float64 whatever the default: these are the model, and float32 would round them
    table = torch.zeros(MAX_ATOMIC_NUMBER + 1, dtype=torch.float64)
    for symbol, value in values.items():
        table[NUMBERS[symbol]] = value
    return table
