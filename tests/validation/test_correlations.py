"""Motion in time against oscillators, free particles and uniform motion, and against injected bugs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlff_engines.errors import DataError
from mlff_engines.structure import MASSES, FloatArray, Result, Structure
from mlff_engines.units import ACCELERATION, BOLTZMANN
from mlff_engines.validation.core_engine import CoreEngine
from mlff_engines.validation.engine import Dynamics, thermal
from mlff_engines.validation.trajectories.correlations import (
    diffusion,
    mean_square_displacement,
    unwrapped,
    velocity_autocorrelation,
    vibrational_spectrum,
)
from mlff_engines.validation.trajectories.observables import Frames

PERIODIC = np.ones(3, dtype=bool)
CELL = np.array([[3.2, 1.1, 0.4], [0.5, 3.9, -0.8], [-1.0, 1.3, 4.1]])
LIGHT = 2.99792458e-5  # cm/fs


SPRING = 30.0  # eV/Å²


def diatomic(structure: Structure) -> Result:
    """A spring of 0.8 Å between two atoms."""
    vector = structure.positions[1] - structure.positions[0]
    length = float(np.linalg.norm(vector))
    pull = SPRING * (length - 0.8) * vector / length
    energies = np.full(2, SPRING * (length - 0.8) ** 2 / 4)
    return Result(float(energies.sum()), energies, np.stack([pull, -pull]), np.zeros((3, 3)), None)


def vibration(folder: Path, timestep: float = 0.2, every: int = 5) -> tuple[Frames, FloatArray]:
    """Hydrogen chloride vibrating along its bond for 2 ps, and its masses."""
    structure = Structure(np.array([1, 17]), np.array([[0.0, 0, 0], [0.82, 0, 0]]))
    run = Dynamics(structure, np.zeros((2, 3)), timestep, round(2000 / timestep), every)
    return Frames.of(CoreEngine(diatomic).run(run, folder / "run.npz"), structure), run.masses


def wavenumber(masses: FloatArray) -> float:
    """sqrt(k/µ)/(2πc) in cm⁻¹."""
    return float(np.sqrt(SPRING * ACCELERATION * (1 / masses).sum()) / (2 * np.pi * LIGHT))


def test_spectrum_of_a_harmonic_oscillator(tmp_path: Path) -> None:
    trajectory, masses = vibration(tmp_path)
    expected = wavenumber(masses)
    assert 2500 < expected < 3500
    x, density = vibrational_spectrum(trajectory, masses)
    assert x[1] == pytest.approx(1 / (len(trajectory) * LIGHT), rel=1e-9)  # 17 cm⁻¹
    assert np.trapezoid(density, x) == pytest.approx(1)
    assert abs(x[np.argmax(density)] - expected) < x[1]
    assert density[np.abs(x - expected) > 5 * x[1]].max() < 1e-3 * density.max()
    coarse = vibrational_spectrum(trajectory, masses, resolution=100.0)[0]
    assert coarse[1] == pytest.approx(100.0, rel=0.01)
    # a bug: frames taken for 2 % further apart than they are, or deuterium's mass in the dynamics
    slow = replace(trajectory, times=trajectory.times * 1.02)
    x, density = vibrational_spectrum(slow, masses)
    assert abs(x[np.argmax(density)] - expected) > 2 * x[1]


def test_autocorrelation_of_a_harmonic_oscillator(tmp_path: Path) -> None:
    trajectory, masses = vibration(tmp_path)
    lags, c = velocity_autocorrelation(trajectory, masses)
    assert (lags[0], lags[1]) == (0.0, 1.0)
    assert len(lags) == 1001
    h, exact = 0.2, 2 * np.pi * LIGHT * wavenumber(masses)  # fs, 1/fs
    expected = np.cos(2 / h * np.arcsin(exact * h / 2) * lags)  # as velocity Verlet has it
    assert c[0] == pytest.approx(1)
    np.testing.assert_allclose(c[:200], expected[:200], atol=0.01)
    brute = sum(
        (masses * (trajectory.velocities[k:] * trajectory.velocities[: 2001 - k]).sum(-1)).sum() / (2001 - k)
        for k in [7]
    ) / ((masses * (trajectory.velocities**2).sum(-1)).sum() / 2001)
    assert c[7] == pytest.approx(brute, rel=1e-9)


def test_spectrum_refuses(tmp_path: Path) -> None:
    trajectory, masses = vibration(tmp_path, every=500)
    with pytest.raises(DataError, match=r"resolution of 1 cm⁻¹ takes \d+ frames"):
        vibrational_spectrum(trajectory, masses, resolution=1.0)
    with pytest.raises(DataError, match="no velocities"):
        velocity_autocorrelation(replace(trajectory, velocities=None), masses)
    with pytest.raises(DataError, match="at rest"):
        velocity_autocorrelation(replace(trajectory, velocities=0 * trajectory.positions), masses)
    with pytest.raises(DataError, match="not evenly spaced"):
        velocity_autocorrelation(replace(trajectory, times=trajectory.times**2), masses)


def free(structure: Structure) -> Result:
    """Atoms that do not feel one another."""
    n = len(structure)
    return Result(0.0, np.zeros(n), np.zeros((n, 3)), np.zeros((3, 3)), None)


@pytest.fixture(scope="module")
def brownian(tmp_path_factory: pytest.TempPathFactory) -> tuple[Frames, float]:
    """Free argon atoms in a periodic box under Langevin friction, and k_B T/(m γ) in m²/s."""
    structure = Structure(np.full(300, 18), np.zeros((300, 3)), CELL, PERIODIC)
    start = Dynamics(structure, np.zeros((300, 3)), 5.0, 4000, 8, temperature=300.0, friction=20.0, seed=3)
    folder = tmp_path_factory.mktemp("brownian")
    found = CoreEngine(free).run(thermal(start, 300.0, seed=1), folder / "run.npz")
    einstein = BOLTZMANN * 300.0 * ACCELERATION / (MASSES[18] * 20.0e-3) * 1e-5
    return Frames.of(found, structure), einstein


def test_diffusion_of_free_particles(brownian: tuple[Frames, float]) -> None:
    trajectory, einstein = brownian
    found, error = diffusion(trajectory, 18)
    assert error < 0.06 * einstein
    assert abs(found - einstein) < 3.5 * error
    assert abs(found - 2 * einstein) > 5 * error  # a bug: half the friction


def test_wrapped_positions_diffuse_the_same(brownian: tuple[Frames, float]) -> None:
    trajectory, _ = brownian
    inside = trajectory.positions @ np.linalg.inv(trajectory.cell) % 1 @ trajectory.cell
    wrapped = replace(trajectory, positions=inside)
    shift = unwrapped(wrapped).positions - trajectory.positions
    np.testing.assert_allclose(shift, np.broadcast_to(shift[0], shift.shape), atol=1e-9)
    right = diffusion(trajectory, 18)[0]
    assert diffusion(wrapped, 18)[0] == pytest.approx(right, rel=1e-6)
    # a bug: jumps across the cell taken for motion
    assert abs(diffusion(replace(wrapped, pbc=~PERIODIC), 18)[0] - right) > 0.15 * right


def test_displacement_of_uniform_motion() -> None:
    t = np.arange(50.0)
    positions = np.zeros((50, 2, 3))
    positions[:, 0, 0] = 0.03 * t
    positions[:, 1] = [5.0, 5.0, 5.0]
    free_space = ~PERIODIC
    trajectory = Frames(np.array([1, 8]), positions, np.zeros((3, 3)), free_space, t)
    lags, displacement = mean_square_displacement(trajectory, 1)
    np.testing.assert_allclose(displacement, (0.03 * lags) ** 2, atol=1e-6)
    np.testing.assert_allclose(mean_square_displacement(trajectory, 8)[1], 0.0, atol=1e-9)
    with pytest.raises(DataError, match="no Ar in the trajectory"):
        mean_square_displacement(trajectory, 18)
    with pytest.raises(DataError, match="give at least 2 blocks of 10 frames"):
        diffusion(trajectory, 1, blocks=6)
