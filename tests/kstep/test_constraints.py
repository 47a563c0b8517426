"""SHAKE and RATTLE against what they promise, and against ASE's own."""

from __future__ import annotations

import numpy as np
import pytest

from kstep_systems import BONDS, MASSES, START, molecule, phase_point
from mlff_engines.errors import ConfigError, SimulationError
from mlff_engines.kstep.constraints import BondConstraints
from mlff_engines.kstep.particles import Particles
from mlff_engines.kstep.propagators import trajectory

WATER = np.array([[0.0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])
TRIANGLE = [[0, 1], [0, 2], [1, 2]]


def test_shake_moves_along_the_old_bonds_and_keeps_the_centre_of_mass() -> None:
    masses = np.array([16.0, 1, 1])
    bonds = BondConstraints(TRIANGLE, [0.96, 0.96, 1.51], masses)
    start = bonds.positions(WATER, WATER)
    moved = start + np.random.default_rng(1).normal(0, 0.05, (3, 3))
    shaken = bonds.positions(moved, start)
    lengths = np.linalg.norm(bonds.vectors(shaken), axis=1)
    np.testing.assert_allclose(lengths, [0.96, 0.96, 1.51], rtol=1e-12)
    push = masses[:, None] * (shaken - moved)
    np.testing.assert_allclose(push.sum(0), 0, atol=1e-12)  # internal forces
    np.testing.assert_allclose(np.cross(start, push).sum(0), 0, atol=1e-12)  # along the old bonds: no torque there


def test_rattle_removes_velocities_along_bonds_and_nothing_else() -> None:
    bonds = BondConstraints(TRIANGLE, [0.96, 0.96, 1.51], [16.0, 1, 1])
    x = bonds.positions(WATER, WATER)
    v = np.random.default_rng(2).normal(0, 0.01, (3, 3))
    once = bonds.velocities(x, v)
    np.testing.assert_allclose(
        np.einsum("ca,ca->c", bonds.vectors(x), once[[1, 2, 2]] - once[[0, 0, 1]]), 0, atol=1e-15
    )
    np.testing.assert_allclose(bonds.velocities(x, once), once, atol=1e-16)
    spin = np.cross([0.1, 0.2, 0.3], x) + 0.5  # a rigid motion passes unchanged
    np.testing.assert_allclose(bonds.velocities(x, spin), spin, atol=1e-15)


def test_agrees_with_ase(require_engine) -> None:
    require_engine("ase")
    from ase import Atoms
    from ase.constraints import FixBondLengths

    atoms = Atoms("COH2", START[[0, 2, 1, 3]], masses=MASSES[[0, 2, 1, 3]])
    pairs, lengths = [[0, 2], [0, 1], [1, 3]], [1.0, 1.4, 0.97]
    ours = BondConstraints(pairs, lengths, atoms.get_masses())
    start = ours.positions(atoms.positions, atoms.positions)
    atoms.positions = start
    theirs = FixBondLengths(pairs, tolerance=1e-14, bondlengths=lengths)
    rng = np.random.default_rng(3)
    moved, v = start + rng.normal(0, 0.05, (4, 3)), rng.normal(0, 0.02, (4, 3))
    expected = moved.copy()
    theirs.adjust_positions(atoms, expected)
    np.testing.assert_allclose(ours.positions(moved, start), expected, atol=1e-11)
    p = v * atoms.get_masses()[:, None]
    theirs.adjust_momenta(atoms, p)
    np.testing.assert_allclose(ours.velocities(start, v), p / atoms.get_masses()[:, None], atol=1e-11)


def test_bonds_across_a_periodic_boundary() -> None:
    box = np.array([[10.0, 0, 0]])
    whole = BondConstraints([[0, 1]], [1.0], [1.0, 1.0])
    split = BondConstraints([[0, 1]], [1.0], [1.0, 1.0], box)
    x = np.array([[9.8, 0, 0], [10.9, 0.2, 0]])
    wrapped = x - [[0, 0, 0], [10, 0, 0]]
    np.testing.assert_allclose(split.positions(wrapped, wrapped), whole.positions(x, x) - [[0, 0, 0], [10, 0, 0]])


def test_a_long_run_stays_on_the_manifold_and_conserves_energy() -> None:
    particles, x, v = phase_point(constrained=True)
    field = molecule()
    here = field(x)
    before = here.energy + particles.kinetic_energy(v)
    x, v, here = trajectory(particles, x, v, here, field, 0.5, 2000)
    assert particles.constraints is not None
    np.testing.assert_allclose(np.linalg.norm(particles.constraints.vectors(x), axis=1), [1.0, 0.97], rtol=1e-11)
    assert here.energy + particles.kinetic_energy(v) == pytest.approx(before, abs=2e-4)


def test_thermal_velocities_have_the_kinetic_energy_of_their_degrees_of_freedom() -> None:
    particles, x, _ = phase_point(constrained=True)
    still = Particles(MASSES, particles.constraints, still=True)
    rng = np.random.default_rng(0)
    for kind, freedom in ((particles, 10), (still, 7)):
        assert kind.degrees_of_freedom == freedom
        energies = [kind.kinetic_energy(kind.thermal(x, 300.0, rng)) for _ in range(4000)]
        expected = freedom / 2 * 8.617333e-5 * 300
        assert np.mean(energies) == pytest.approx(expected, abs=4 * np.std(energies) / np.sqrt(4000))
    v = still.thermal(x, 300.0, rng)
    np.testing.assert_allclose(MASSES @ v, 0, atol=1e-15)


@pytest.mark.fault("J8")
def test_impossible_constraints_are_named() -> None:
    bonds = BondConstraints(BONDS, [1.0, 0.97], MASSES)
    x = bonds.positions(START, START)
    turned = x.copy()
    turned[1] = x[0] + 40 * np.cross(x[1] - x[0], [0.0, 0.0, 1.0])
    with pytest.raises(SimulationError, match=r"bond 0-1 cannot be met: 1\.0000 Å before"):
        bonds.positions(turned, x)
    with pytest.raises(SimulationError, match="cannot be met"):
        bonds.positions(np.full_like(x, np.nan), x)
    with pytest.raises(SimulationError, match="project the positions first"):
        bonds.require_met(START)
    bonds.require_met(x)


@pytest.mark.parametrize(
    ("pairs", "lengths", "match"),
    [
        ([[0, 4]], [1.0], r"bond \[0, 4\] among 4 atoms"),
        ([[1, 1]], [1.0], "two different atoms"),
        ([[0, 1], [1, 0]], [1.0, 1.0], "twice"),
        ([[0, 1]], [-1.0], "finite lengths > 0"),
        ([[0, 1]], [1.0, 2.0], "1 bonds, but lengths"),
    ],
)
def test_wrong_constraints_are_refused(pairs: list[list[int]], lengths: list[float], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        BondConstraints(pairs, lengths, MASSES)


def test_redundant_constraints_are_named() -> None:
    x = np.array([[0.0, 0, 0], [1, 0, 0], [2, 0, 0]])
    bonds = BondConstraints(TRIANGLE, [1.0, 2.0, 1.0], [1.0, 1.0, 1.0])
    with pytest.raises(SimulationError, match=r"atoms \[0, 1, 2\] are redundant"):
        bonds.velocities(x, np.ones((3, 3)))


def test_many_clusters_are_solved_as_one_would_be() -> None:
    """40 copies of a molecule, far apart: more constraints than are solved together."""
    pairs, lengths = np.array([[0, 1], [0, 2], [1, 2]]), np.array([0.96, 0.96, 1.51])
    one = BondConstraints(pairs, lengths, [16.0, 1, 1])
    many = BondConstraints(
        np.concatenate([pairs + 3 * n for n in range(40)]), np.tile(lengths, 40), np.tile([16.0, 1, 1], 40)
    )
    x = one.positions(WATER, WATER)
    moved = x + np.random.default_rng(0).normal(0, 0.05, (3, 3))
    places = np.repeat(np.arange(40.0)[:, None] * [5, 0, 0], 3, axis=0)
    found = many.positions(np.tile(moved, (40, 1)) + places, np.tile(x, (40, 1)) + places)
    np.testing.assert_allclose(found - places, np.tile(one.positions(moved, x), (40, 1)), atol=1e-10)
