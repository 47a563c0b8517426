"""Which macro-steps of variant C are safe.

For one mode of frequency ω in the student, to which the true force adds the stiffness R (per mass), an impulse every D
gives the propagator over D the half trace

    cos(ωD) - b sin(ωD) = sqrt(1 + b²) cos(ωD + arctan b),    b = RD/2ω

(Schlick, Mandziuk, Skeel, Srinivas, J. Comput. Phys. 140, 1 (1998)). Its modulus exceeds 1 between nπ - 2 arctan b and
nπ = ωD; there the amplitude grows at a rate of arcsinh(b)/D at most, and friction γ damps it at γ/2. With R the largest
eigenvalue, in modulus, of the mass-weighted Hessian of the residual, and arctan b, arcsinh b <= b, it follows that

- there is no resonance while ωD + RD/ω < π for the student's fastest mode: for a good student, below half its period;
- beyond, γ > R/ω is enough for every mode with ωD + RD/ω >= π: R/ω of the slowest of these, about RD/π.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from mlff_engines.errors import ConfigError
from mlff_engines.kstep.particles import ForceField, Particles
from mlff_engines.structure import FloatArray
from mlff_engines.units import ACCELERATION

PROBE = 0.01  # Å, largest displacement of an atom in a finite difference: well above the noise of float32 forces
LANCZOS_STEPS = 30
RESIDUAL_STEPS = 12  # of the same on the residual: 24 true forces


def stiffness(field: ForceField, particles: Particles, x: FloatArray, steps: int = LANCZOS_STEPS) -> float:
    """Largest eigenvalue in modulus, 1/fs², of the mass-weighted Hessian of `field` at `x`, within the constraints.

    Lanczos' method on central differences of forces: two evaluations per step. A lower bound that is tight for the end
    of a spectrum (Paige, J. Inst. Math. Appl. 10, 373 (1972)).
    """
    root = np.sqrt(particles.masses)[:, None]

    def inside(y: FloatArray) -> FloatArray:
        allowed: FloatArray = root * particles.tangent(x, y / root)
        return allowed

    def times(y: FloatArray) -> FloatArray:
        u = y / root
        scale = PROBE / np.abs(u).max()
        slope = (field(x - scale * u).forces - field(x + scale * u).forces) / (2 * scale)
        return inside(ACCELERATION * slope / root)

    y = inside(np.random.default_rng(0).standard_normal(x.shape))
    basis, diagonal, beside = [y / np.linalg.norm(y)], [], []
    for _ in range(min(steps, particles.degrees_of_freedom)):
        image = times(basis[-1])
        diagonal.append(float((image * basis[-1]).sum()))
        for vector in 2 * basis:  # twice is enough
            image = image - (image * vector).sum() * vector
        beside.append(float(np.linalg.norm(image)))
        if beside[-1] <= 1e-6 * max(np.abs(diagonal)):
            break
        basis.append(image / beside[-1])
    size = len(diagonal)
    matrix = np.diag(diagonal) + np.diag(beside[: size - 1], 1) + np.diag(beside[: size - 1], -1)
    return float(np.abs(np.linalg.eigvalsh(matrix)).max())


def require_safe_student(
    student: ForceField,
    residual: ForceField,
    particles: Particles,
    configurations: Iterable[FloatArray],
    macro_step: float,
    dt: float,
    friction: float,
) -> None:
    """`require_safe` with stiffnesses measured: the largest at any of the `configurations` (N, 3).

    A crude student's residual is several times stiffer at one configuration than at another. The rule sees resonances
    alone: a student that it allows may still heat, or fail beyond its training data, which only a run shows. Asks the
    true potential, that of `residual`, 24 times for each configuration.

    Raises:
        ConfigError: see `require_safe`.
    """
    found = [
        (stiffness(student, particles, x), stiffness(residual, particles, x, RESIDUAL_STEPS)) for x in configurations
    ]
    fastest, worst = np.max(found, axis=0)
    require_safe(macro_step, dt, math.sqrt(fastest), float(worst), friction)


def half_trace(frequency: float, residual: float, macro_step: float) -> float:
    """The formula above: `frequency` ω in 1/fs, `residual` R in 1/fs², `macro_step` in fs; stable within [-1, 1]."""
    angle = frequency * macro_step
    return math.cos(angle) - residual * macro_step / (2 * frequency) * math.sin(angle)


def largest_step(fastest: float, residual: float = 0.0) -> float:
    """fs: where the first resonance begins, for the `fastest` mode (1/fs) and the `residual` stiffness (1/fs²)."""
    return math.pi / (fastest + abs(residual) / fastest)


def required_friction(macro_step: float, fastest: float, residual: float) -> float:
    """1/fs that a macro-step needs: 0 below the first resonance; infinite where no friction is known to do."""
    residual = abs(residual)
    if macro_step < largest_step(fastest, residual):
        return 0.0
    root = math.pi**2 - 4 * residual * macro_step**2
    if root < 0:
        return math.inf
    slowest = (math.pi + math.sqrt(root)) / (2 * macro_step)  # of the resonant modes
    return residual / slowest


def require_safe(macro_step: float, dt: float, fastest: float, residual: float, friction: float) -> None:
    """Refuse an unsafe macro-step.

    A student whose residual is as stiff as its fastest mode helps nothing: the rule then allows no macro-step that the
    true force alone would not be stable with.

    Args:
        macro_step, dt: fs, outer and inner.
        fastest: 1/fs, of the student's fastest mode: the root of its `stiffness`.
        residual: 1/fs², the `stiffness` of the residual, the largest of the configurations that were looked at.
        friction: 1/fs.

    Raises:
        ConfigError: the inner step is unstable, or the macro-step meets a resonance that the friction does not damp.
    """
    if not fastest > 0 or macro_step <= dt:
        return
    period = 2 * math.pi / fastest
    if dt * fastest >= 2:
        raise ConfigError(
            f"an inner step of {dt:g} fs is unstable for the student's fastest mode, whose period is {period:.1f} fs; "
            f"allowed: below {2 / fastest:.2g} fs, sensible: a tenth of the period"
        )
    limit = largest_step(fastest, residual)
    if macro_step < limit:
        return
    needed = required_friction(macro_step, fastest, residual)
    if not friction > needed:
        damped = f"the friction must exceed {1e3 * needed:.2f}/ps" if math.isfinite(needed) else "no friction is enough"
        raise ConfigError(
            f"a macro-step of {macro_step:g} fs is unsafe: the fastest mode has a period of {period:.1f} fs and the "
            f"residual {100 * abs(residual) / fastest**2:.3g} % of its stiffness, so that resonances begin at "
            f"{limit:.2f} fs, and beyond, {damped}; it is {1e3 * friction:.2f}/ps. Use a macro-step below {limit:.2f} "
            "fs, constrain the bonds with hydrogen, add friction, or train a student closer to the true forces"
        )
