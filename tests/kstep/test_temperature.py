"""The configurational temperature, where averages are known: free, on a rigid bond, and with the metric forgotten."""

from __future__ import annotations

import numpy as np
import pytest

from kstep_systems import MASSES, molecule, phase_point
from mlff_engines.kstep.constraints import BondConstraints
from mlff_engines.kstep.particles import Particles
from mlff_engines.kstep.temperature import configurational
from mlff_engines.structure import FloatArray

PROBE = 1e-3


def ratio(particles: Particles, forces, frames: FloatArray) -> float:
    rng = np.random.default_rng(0)
    found = [configurational(particles, forces, x, forces(x), PROBE, rng) for x in frames]
    slope, curvature = np.mean(found, axis=0)
    return float(slope / curvature)


def test_gaussian_configurations_have_their_temperature() -> None:
    """Stiffness 2 along x, 5 along y, 9 along z: exp(-U/kT) with kT = 0.7, of atoms of any mass."""
    stiffness, rng = np.array([2.0, 5.0, 9.0]), np.random.default_rng(1)
    frames = rng.normal(0, np.sqrt(0.7 / stiffness), (4000, 4, 3))
    assert ratio(Particles(MASSES), lambda x: -stiffness * x, frames) == pytest.approx(0.7, rel=0.04)
    assert ratio(Particles(MASSES), lambda x: -stiffness * x, 1.1 * frames) == pytest.approx(0.847, rel=0.04)


def rotors(field: float, temperature: float, count: int) -> FloatArray:
    """Rigid bonds of 1 Å in a field along z, U = -field·z of the second atom relative to the first."""
    rng = np.random.default_rng(2)
    a = field / temperature
    cosine = np.log(np.exp(-a) + rng.random(count) * (np.exp(a) - np.exp(-a))) / a
    angle, sine = 2 * np.pi * rng.random(count), np.sqrt(1 - cosine**2)
    bonds = np.stack([sine * np.cos(angle), sine * np.sin(angle), cosine], axis=1)
    return np.stack([np.zeros_like(bonds), bonds], axis=1)


def test_on_a_rigid_bond_the_curvature_of_the_manifold_counts() -> None:
    masses, field = np.array([12.0, 1.0]), 2.0
    pull = field * np.array([[0.0, 0, -1], [0, 0, 1]])
    frames = rotors(field, 0.8, 4000)
    rigid = Particles(masses, BondConstraints([[0, 1]], [1.0], masses))
    assert ratio(rigid, lambda x: pull, frames) == pytest.approx(0.8, rel=0.05)
    slope, curvature = configurational(
        Particles(masses), lambda x: pull, frames[0], pull, PROBE, np.random.default_rng(0)
    )
    assert slope > 0
    assert curvature == pytest.approx(0, abs=1e-9)  # a constant force has none, were the bond not rigid


def test_the_estimate_of_the_curvature_is_unbiased() -> None:
    """Against the trace over a basis of the manifold's directions."""
    particles, x, _ = phase_point(constrained=True)
    field = molecule()

    def descent(at: FloatArray) -> FloatArray:
        return particles.tangent(at, field(at).forces / MASSES[:, None])

    root = np.sqrt(np.repeat(MASSES, 3))
    inside = np.stack([root * particles.tangent(x, (e / root).reshape(-1, 3)).ravel() for e in np.eye(12)], axis=1)
    values, vectors = np.linalg.eigh(inside)
    exact = 0.0
    for e in vectors[:, values > 0.5].T:
        u = (e / root).reshape(-1, 3)
        along = (descent(x - 1e-4 * u) - descent(x + 1e-4 * u)) / 2e-4
        exact += float((MASSES[:, None] * u * along).sum())
    rng = np.random.default_rng(3)
    found = [
        configurational(particles, lambda y: field(y).forces, x, field(x).forces, PROBE, rng)[1] for _ in range(1500)
    ]
    assert np.mean(found) == pytest.approx(exact, abs=4 * np.std(found) / np.sqrt(len(found)))
