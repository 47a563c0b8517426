"""Variant D: proposals from a student, accepted on the true energy. Configurations are exact, whatever the student.

Hybrid Monte Carlo (Duane et al., Phys. Lett. B 195, 216 (1987)) with partial refreshment of the velocities
(Horowitz, Phys. Lett. B 268, 247 (1991)). The proposal must preserve volume and be undone by flipping the velocities,
as velocity Verlet with any conservative or non-conservative force is, RATTLE'd or not, and RESPA; jumps A are not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mlff_engines.errors import ConfigError, SimulationError, StructureError
from mlff_engines.kstep.particles import Particles
from mlff_engines.structure import FloatArray
from mlff_engines.units import BOLTZMANN

Proposal = Callable[[FloatArray, FloatArray], tuple[FloatArray, FloatArray]]  # of positions and velocities
Energy = Callable[[FloatArray], float]  # of positions, eV


@dataclass(frozen=True)
class Outcome:
    """After one proposal.

    Attributes:
        energy: true potential energy at `x`, eV.
        work: what the proposal would have changed the true total energy by, eV; infinite where the proposal
            failed or its energy is not finite.
    """

    x: FloatArray
    v: FloatArray
    energy: float
    work: float
    accepted: bool


def metropolis(
    particles: Particles,
    x: FloatArray,
    v: FloatArray,
    energy: float,
    propose: Proposal,
    true_energy: Energy,
    temperature: float,
    rng: np.random.Generator,
) -> Outcome:
    """Accept `propose(x, v)` with probability min(1, exp(-ΔH/kT)), else stay and flip the velocities.

    The flip matters where velocities are refreshed in part only: without it the chain has no detailed balance.
    `energy` is the true potential energy at `x`. One true energy per proposal, none where the proposal itself fails.

    Raises:
        ConfigError: the temperature is not positive.
    """
    if not temperature > 0:
        raise ConfigError(f"temperature {temperature:g} K; Metropolis needs one above 0")
    try:
        new_x, new_v = propose(x, v)
        new_energy = true_energy(new_x) if np.isfinite(new_x).all() and np.isfinite(new_v).all() else np.inf
    except (SimulationError, StructureError):  # such as constraints that cannot be met: this trajectory has no end
        new_x, new_v, new_energy = x, v, np.inf
    work = np.inf
    if np.isfinite(new_energy):
        work = new_energy - energy + particles.kinetic_energy(new_v) - particles.kinetic_energy(v)
    # drawn whatever the work, so that the stream of random numbers does not depend on it
    accepted = bool(np.log(rng.random()) < -work / (BOLTZMANN * temperature))
    if accepted:
        return Outcome(new_x, new_v, new_energy, work, True)
    return Outcome(x, -v, energy, work, False)


@dataclass(frozen=True)
class LengthAdaptation:
    """Trajectory length found in a burn-in (Robbins, Monro, Ann. Math. Stat. 22, 400 (1951)), then fixed.

    A length that went on following the chain's history would break detailed balance.

    Args:
        proposals: of the burn-in; samples drawn in it are to be discarded.
        target: acceptance aimed at; 0.65 is best in many dimensions (Beskos et al., Bernoulli 19, 1501 (2013)).
        shortest, longest: steps.
    """

    proposals: int
    target: float = 0.65
    shortest: int = 1
    longest: int = 10_000

    def __post_init__(self) -> None:
        if not (0 < self.target < 1 and 1 <= self.shortest <= self.longest and self.proposals >= 0):
            raise ConfigError(
                f"target acceptance {self.target:g}, length {self.shortest} to {self.longest} steps, "
                f"{self.proposals} proposals; allowed: 0 < target < 1, 1 <= shortest <= longest, proposals >= 0"
            )

    def next(self, steps: float, work: float, temperature: float, done: int) -> float:
        """Steps (not rounded) after proposal `done`, counted from 0, that took `steps` and had `work`, eV."""
        if done >= self.proposals:
            return steps
        probability = 0.0 if work == np.inf else min(1.0, float(np.exp(-max(work, 0.0) / (BOLTZMANN * temperature))))
        gain = 2.0 / (1 + done) ** 0.6
        return float(np.clip(steps * np.exp(gain * (probability - self.target)), self.shortest, self.longest))


def jittered(steps: float, jitter: float, rng: np.random.Generator) -> int:
    """A number of steps, drawn independently of the state from steps·(1 ± jitter): no resonance with a period.

    (Mackenzie, Phys. Lett. B 226, 369 (1989).)
    """
    return max(1, round(steps * (1 + jitter * (2 * rng.random() - 1))))
