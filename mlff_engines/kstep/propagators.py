"""Integrators as compositions of kick, drift and noise. Evaluations known at the start are handed in, those at the end
handed out, so that no force is computed twice."""

from __future__ import annotations

from dataclasses import dataclass

from mlff_engines.errors import ConfigError
from mlff_engines.kstep.particles import Bath, Evaluation, ForceField, Particles
from mlff_engines.structure import FloatArray


def velocity_verlet(
    particles: Particles, x: FloatArray, v: FloatArray, here: Evaluation, field: ForceField, dt: float
) -> tuple[FloatArray, FloatArray, Evaluation]:
    """One step of `dt` fs; one evaluation (Swope et al., J. Chem. Phys. 76, 637 (1982); with constraints RATTLE)."""
    v = particles.kick(x, v, here.forces, dt / 2)
    x, v = particles.drift(x, v, dt)
    there = field(x)
    return x, particles.kick(x, v, there.forces, dt / 2), there


def drift_kick_drift(
    particles: Particles, x: FloatArray, v: FloatArray, field: ForceField, dt: float
) -> tuple[FloatArray, FloatArray]:
    """The position form of velocity Verlet: one evaluation, in the middle, and none known beforehand."""
    x, v = particles.drift(x, v, dt / 2)
    v = particles.kick(x, v, field(x).forces, dt)
    return particles.drift(x, v, dt / 2)


def baoab(
    particles: Particles, x: FloatArray, v: FloatArray, here: Evaluation, field: ForceField, dt: float, bath: Bath
) -> tuple[FloatArray, FloatArray, Evaluation]:
    """One step of Langevin dynamics; one evaluation (Leimkuhler, Matthews, J. Chem. Phys. 138, 174102 (2013))."""
    v = particles.kick(x, v, here.forces, dt / 2)
    x, v = particles.drift(x, v, dt / 2)
    v = bath(particles, x, v, dt)
    x, v = particles.drift(x, v, dt / 2)
    there = field(x)
    return x, particles.kick(x, v, there.forces, dt / 2), there


def trajectory(
    particles: Particles,
    x: FloatArray,
    v: FloatArray,
    here: Evaluation,
    field: ForceField,
    dt: float,
    steps: int,
    bath: Bath | None = None,
) -> tuple[FloatArray, FloatArray, Evaluation]:
    """`steps` of velocity Verlet, or of BAOAB with a `bath`."""
    for _ in range(steps):
        if bath is None:
            x, v, here = velocity_verlet(particles, x, v, here, field, dt)
        else:
            x, v, here = baoab(particles, x, v, here, field, dt, bath)
    return x, v, here


@dataclass(frozen=True)
class Pair:
    """What the true potential and the student say of one configuration."""

    true: Evaluation
    student: Evaluation


def respa(
    particles: Particles,
    x: FloatArray,
    v: FloatArray,
    here: Pair,
    true: ForceField,
    student: ForceField,
    dt: float,
    inner_steps: int,
    bath: Bath | None = None,
) -> tuple[FloatArray, FloatArray, Pair]:
    """Variant C, one macro-step D = inner_steps·dt: one evaluation of `true`, `inner_steps` of `student`.

    v += D/2·r/m; inner_steps of the student at dt; v += D/2·r/m, with r = F - F_student: the impulse form of r-RESPA
    (Tuckerman, Berne, Martyna, J. Chem. Phys. 97, 1990 (1992), Eq. 2.22) with the student as the fast force. Symplectic
    and reversible without bath if the student is conservative; the bias is O(D²·r). The bath acts in the inner steps.
    """
    if inner_steps < 1:
        raise ConfigError(f"{inner_steps} inner steps per macro-step; allowed: 1 or more")
    macro = dt * inner_steps
    v = particles.kick(x, v, here.true.forces - here.student.forces, macro / 2)
    x, v, inner = trajectory(particles, x, v, here.student, student, dt, inner_steps, bath)
    there = Pair(true(x), inner)
    return x, particles.kick(x, v, there.true.forces - inner.forces, macro / 2), there
