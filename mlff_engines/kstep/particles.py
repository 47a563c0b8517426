"""The elementary moves that every propagator is composed of: kick, drift and noise.

With constraints each of them maps the manifold {bond lengths right, no velocity along bonds} to itself; kick-drift-kick
is then RATTLE, and kick-drift-noise-drift-kick is g-BAOAB (Leimkuhler, Matthews, Proc. R. Soc. A 472, 20160138 (2016)).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mlff_engines.errors import ConfigError
from mlff_engines.kstep.constraints import BondConstraints
from mlff_engines.structure import FloatArray
from mlff_engines.units import ACCELERATION, BOLTZMANN


@dataclass(frozen=True)
class Evaluation:
    """Energy (eV) and forces (N, 3) (eV/Å) at some positions."""

    energy: float
    forces: FloatArray


ForceField = Callable[[FloatArray], Evaluation]  # of positions (N, 3), Å


@dataclass(frozen=True)
class Particles:
    """Masses (N,) in amu, and the bonds that are constrained.

    Args:
        still: noise leaves the net momentum alone, so that one that is zero stays zero.
    """

    masses: FloatArray
    constraints: BondConstraints | None = None
    still: bool = False

    def __post_init__(self) -> None:
        if not ((self.masses > 0).all() and np.isfinite(self.masses).all()):
            raise ConfigError(f"masses must be finite and positive; got {self.masses.min(initial=np.inf):g} amu")

    @property
    def degrees_of_freedom(self) -> int:
        """Of the velocities."""
        return 3 * len(self.masses) - len(self.constraints or ()) - 3 * self.still

    def kinetic_energy(self, v: FloatArray) -> float:
        """eV, of velocities (N, 3) in Å/fs."""
        return 0.5 * float(np.einsum("i,ia,ia->", self.masses, v, v)) / ACCELERATION

    def tangent(self, x: FloatArray, v: FloatArray) -> FloatArray:
        """`v` without what constraints forbid at `x`."""
        return v if self.constraints is None else self.constraints.velocities(x, v)

    def kick(self, x: FloatArray, v: FloatArray, forces: FloatArray, dt: float) -> FloatArray:
        """Velocities after `forces` (N, 3) acted for `dt` fs at `x`."""
        return self.tangent(x, v + dt * ACCELERATION * forces / self.masses[:, None])

    def drift(self, x: FloatArray, v: FloatArray, dt: float) -> tuple[FloatArray, FloatArray]:
        """Positions and velocities after free flight for `dt` fs; with constraints along a discrete geodesic.

        Raises:
            SimulationError: the constraints cannot be met.
        """
        moved = x + dt * v
        if self.constraints is None:
            return moved, v
        shaken = self.constraints.positions(moved, x)
        return shaken, self.constraints.velocities(shaken, v + (shaken - moved) / dt)

    def thermal(self, x: FloatArray, temperature: float, rng: np.random.Generator) -> FloatArray:
        """Maxwell-Boltzmann velocities (N, 3) at `temperature` K, conditioned on constraints (and no net momentum).

        The mass-orthogonal projection of a Maxwell-Boltzmann sample is a sample of the conditional distribution.
        """
        width = np.sqrt(BOLTZMANN * temperature * ACCELERATION / self.masses)
        v = width[:, None] * rng.standard_normal((len(self.masses), 3))
        if self.still:
            v = v - self.masses @ v / self.masses.sum()
        return self.tangent(x, v)

    def refresh(
        self, x: FloatArray, v: FloatArray, temperature: float, kept: float, rng: np.random.Generator
    ) -> FloatArray:
        """Ornstein-Uhlenbeck: kept·v + sqrt(1 - kept²)·thermal; `kept` = exp(-friction·dt), 0 for new velocities."""
        noise: FloatArray = np.sqrt(1 - kept**2) * self.thermal(x, temperature, rng)
        return kept * v + noise


@dataclass(frozen=True)
class Bath:
    """Langevin friction (1/fs) at a temperature (K)."""

    temperature: float
    friction: float
    rng: np.random.Generator

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and self.friction >= 0):
            raise ConfigError(f"temperature {self.temperature:g} K, friction {self.friction:g}/fs; allowed: >= 0")

    def __call__(self, particles: Particles, x: FloatArray, v: FloatArray, dt: float) -> FloatArray:
        """Velocities after `dt` fs of friction and noise."""
        return particles.refresh(x, v, self.temperature, float(np.exp(-self.friction * dt)), self.rng)
