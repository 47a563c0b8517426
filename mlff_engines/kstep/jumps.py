"""Variant A: a learned jump of k steps, then one step of the true force at the base time step.

Approximate: with a jump along the flow of H_student, k jumps' steps and one true step sample about
H_eff = (k·H_student + H_true)/(k + 1), however small the steps. Never a Metropolis proposal: neither reversible nor
volume preserving in general.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mlff_engines.errors import SimulationError
from mlff_engines.kstep.particles import ForceField, Particles
from mlff_engines.kstep.propagators import drift_kick_drift, trajectory, velocity_verlet
from mlff_engines.structure import FloatArray


@dataclass(frozen=True)
class Displacement:
    """What a jump predicts: dx (N, 3) Å, dv (N, 3) Å/fs, and how many atoms met the bound on dx."""

    dx: FloatArray
    dv: FloatArray
    clamped: int = 0


Jump = Callable[[FloatArray, FloatArray], Displacement]  # of positions (N, 3) Å and velocities (N, 3) Å/fs
Corrector = Literal["A1", "A2"]


def land(
    particles: Particles, x: FloatArray, v: FloatArray, displacement: Displacement
) -> tuple[FloatArray, FloatArray]:
    """Positions and velocities after the jump, constraints projected onto.

    Raises:
        SimulationError: the jump is not finite, or the constraints cannot be met.
    """
    bad = np.flatnonzero(~(np.isfinite(displacement.dx).all(1) & np.isfinite(displacement.dv).all(1)))
    if len(bad):
        raise SimulationError(
            f"the jump of atom {bad[0]} is not finite, and of {len(bad) - 1} more: the configuration is far outside "
            "the trained range, or the network is damaged. Start from another configuration or train the jump again"
        )
    x, v = x + displacement.dx, v + displacement.dv
    if particles.constraints is not None:
        # along the bonds where the jump put them: over a long jump those before may have turned too far
        x = particles.constraints.positions(x, x)
    return x, particles.tangent(x, v)


def correct(
    particles: Particles, x: FloatArray, v: FloatArray, true: ForceField, dt: float, corrector: Corrector
) -> tuple[FloatArray, FloatArray]:
    """One true step of `dt` fs after a jump: A1 drift-kick-drift (one true call), A2 velocity Verlet (two).

    Velocity Verlet needs the force at the landing point, where none is known.
    """
    if corrector == "A1":
        return drift_kick_drift(particles, x, v, true, dt)
    x, v, _ = velocity_verlet(particles, x, v, true(x), true, dt)
    return x, v


def ballistic(interval: float) -> Jump:
    """Free flight for `interval` fs: the baseline that a learned jump has to beat."""
    return lambda x, v: Displacement(interval * v, np.zeros_like(v))


def flow(particles: Particles, student: ForceField, dt: float, steps: int) -> Jump:
    """The jump that `steps` of velocity Verlet with a student force field make."""

    def jump(x: FloatArray, v: FloatArray) -> Displacement:
        end_x, end_v, _ = trajectory(particles, x, v, student(x), student, dt, steps)
        return Displacement(end_x - x, end_v - v)

    return jump
