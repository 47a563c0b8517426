"""Small analytic systems for the propagators: forces by formula, distributions by quadrature."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mlff_engines.kstep.constraints import BondConstraints
from mlff_engines.kstep.particles import Evaluation, ForceField, Particles
from mlff_engines.structure import FloatArray
from mlff_engines.units import ACCELERATION, BOLTZMANN

Step = Callable[[FloatArray, FloatArray], tuple[FloatArray, FloatArray]]

UNIT = Particles(np.array([ACCELERATION]))  # of mass 1 in reduced units: acceleration = force
ONE_KT = 1 / BOLTZMANN  # K at which kT = 1 eV


def harmonic(stiffness: float) -> ForceField:
    """½·stiffness·x², in all three directions."""
    return lambda x: Evaluation(0.5 * stiffness * float((x * x).sum()), -stiffness * x)


def double_well(barrier: float, where: float = 1.0, tilt: float = 0.0) -> ForceField:
    """barrier·((x/where)² - 1)² + tilt·x along x, harmonic along y and z."""

    def field(r: FloatArray) -> Evaluation:
        x = float(r[0, 0])
        u = (x / where) ** 2 - 1
        forces = -r.copy()
        forces[0, 0] = -4 * barrier * u * x / where**2 - tilt
        return Evaluation(barrier * u * u + tilt * x + 0.5 * float((r[0, 1:] ** 2).sum()), forces)

    return field


MASSES = np.array([12.0, 1.0, 16.0, 1.0])
START = np.array([[-0.894, -0.318, -0.029], [-0.944, 0.681, 0.004], [0.576, -0.434, 0.244], [1.263, 0.071, -0.219]])
BONDS = np.array([[0, 1], [2, 3]])


def molecule(depth: float = 4.0, swirl: float = 0.0) -> ForceField:
    """Morse bonds between all pairs of four atoms, anharmonic on purpose; `swirl` adds a force with no potential."""
    i, j = np.triu_indices(4, 1)
    rest = np.array([1.0, 1.5, 2.2, 1.9, 2.3, 0.97])
    width, depths = np.full(6, 1.8), depth * np.array([1, 1, 0.2, 0.2, 0.2, 1])

    def field(x: FloatArray) -> Evaluation:
        d = x[j] - x[i]
        r = np.linalg.norm(d, axis=1)
        e = np.exp(-width * (r - rest))
        g = (2 * depths * width * e * (1 - e) / r)[:, None] * d
        forces = np.zeros_like(x)
        np.add.at(forces, i, g)
        np.subtract.at(forces, j, g)
        forces += swirl * np.cross(x - x.mean(0), [0.0, 0.0, 1.0])
        return Evaluation(float((depths * (1 - e) ** 2).sum()), forces)

    return field


def phase_point(constrained: bool, seed: int = 0) -> tuple[Particles, FloatArray, FloatArray]:
    """The molecule with thermal velocities, its two X-H bonds constrained or not."""
    bonds = BondConstraints(BONDS, [1.0, 0.97], MASSES) if constrained else None
    particles = Particles(MASSES, bonds)
    x = START if bonds is None else bonds.positions(START, START)
    return particles, x, particles.thermal(x, 300.0, np.random.default_rng(seed))


def tangents(
    particles: Particles, x: FloatArray, v: FloatArray, count: int, seed: int = 0
) -> list[Callable[..., Step]]:
    """Curves t -> (x(t), v(t)) through the phase point, on the constraint manifold; all directions if unconstrained."""
    rng = np.random.default_rng(seed)
    size = x.size
    directions = np.eye(2 * size) if particles.constraints is None else rng.standard_normal((count, 2 * size))

    def curve(direction: FloatArray) -> Callable[[float], tuple[FloatArray, FloatArray]]:
        def at(t: float) -> tuple[FloatArray, FloatArray]:
            moved_x, moved_v = x + t * direction[:size].reshape(-1, 3), v + t * direction[size:].reshape(-1, 3)
            if particles.constraints is not None:
                moved_x = particles.constraints.positions(moved_x, x)
            return moved_x, particles.tangent(moved_x, moved_v)

        return at

    return [curve(direction) for direction in directions]


def jacobian(step: Step, curves: Sequence[Callable], spacing: float) -> FloatArray:
    """d(image)/dt along each curve, as columns of positions then velocities; sixth order in `spacing`."""

    def image(curve: Callable, t: float) -> FloatArray:
        return np.concatenate([part.ravel() for part in step(*curve(t))])

    weights = {1: 3 / 4, 2: -3 / 20, 3: 1 / 60}
    return np.stack(
        [
            sum(w * (image(c, n * spacing) - image(c, -n * spacing)) for n, w in weights.items()) / spacing
            for c in curves
        ],
        axis=1,
    )


def symplectic_form(masses: FloatArray, columns: FloatArray) -> FloatArray:
    """Σ m (dx ∧ dv) of all pairs of columns."""
    half = len(columns) // 2
    dx, dp = columns[:half], np.repeat(masses, 3)[:, None] * columns[half:]
    form: FloatArray = dx.T @ dp - dp.T @ dx
    return form


class Pulses:
    """In place of a random generator: the n-th number drawn along x is 1, all others are 0."""

    def __init__(self, which: int) -> None:
        self.which, self.drawn = which, 0

    def standard_normal(self, shape: tuple[int, ...]) -> FloatArray:
        found = np.zeros(shape)
        found[0, 0] = float(self.drawn == self.which)
        self.drawn += 1
        return found


def stationary(step: Callable[[FloatArray, FloatArray, object], tuple[FloatArray, FloatArray]]) -> FloatArray:
    """Exact covariance (2, 2) of (x, v) in the stationary state of a linear stochastic map `step(x, v, rng)`.

    Σ = M Σ Mᵀ + Σ_n b_n b_nᵀ, with M what the map does without noise and b_n what the n-th random number adds.
    """

    def image(x: float, v: float, which: int) -> FloatArray:
        rng = Pulses(which)
        new_x, new_v = step(np.array([[x, 0.0, 0.0]]), np.array([[v, 0.0, 0.0]]), rng)
        image.drawn = rng.drawn
        return np.array([new_x[0, 0], new_v[0, 0]])

    matrix = np.stack([image(1, 0, -1), image(0, 1, -1)], axis=1)
    noise = [image(0, 0, n) for n in range(image.drawn)]
    added = sum(np.outer(b, b) for b in noise)
    flat = np.linalg.solve(np.eye(4) - np.kron(matrix, matrix), np.ravel(added))
    return flat.reshape(2, 2)
