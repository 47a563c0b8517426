"""The rule that refuses macro-steps, against exact frequencies, the exact stability of RESPA, and runs that explode."""

from __future__ import annotations

import numpy as np
import pytest

from kstep_systems import ONE_KT, UNIT, harmonic, molecule, phase_point, stationary
from mlff_engines.errors import ConfigError
from mlff_engines.kstep.particles import Bath, Evaluation, ForceField
from mlff_engines.kstep.propagators import Pair, respa
from mlff_engines.kstep.stability import (
    half_trace,
    largest_step,
    require_safe,
    require_safe_student,
    required_friction,
    stiffness,
)
from mlff_engines.structure import FloatArray
from mlff_engines.units import ACCELERATION


def dense_stiffness(field: ForceField, masses: FloatArray, x: FloatArray, basis: FloatArray) -> float:
    size = x.size
    hessian = np.empty((size, size))
    for n in range(size):
        shift = np.zeros(size)
        shift[n] = 1e-4
        moved = (field(x + s * shift.reshape(-1, 3)).forces.ravel() for s in (-1, 1))
        hessian[n] = (next(moved) - next(moved)) / 2e-4
    root = np.repeat(np.sqrt(masses), 3)
    weighted = ACCELERATION * hessian / root / root[:, None]
    return float(np.abs(np.linalg.eigvalsh(basis.T @ weighted @ basis)).max())


@pytest.mark.parametrize("constrained", [False, True])
def test_the_fastest_mode_is_that_of_the_whole_hessian(constrained: bool) -> None:
    particles, x, _ = phase_point(constrained)
    root = np.repeat(np.sqrt(particles.masses), 3)
    inside = np.stack([root * particles.tangent(x, (e / root).reshape(-1, 3)).ravel() for e in np.eye(12)], axis=1)
    values, vectors = np.linalg.eigh(inside)
    expected = dense_stiffness(molecule(), particles.masses, x, vectors[:, values > 0.5])
    assert stiffness(molecule(), particles, x) == pytest.approx(expected, rel=2e-3)


def test_constraining_hydrogen_bonds_moves_the_first_resonance_out() -> None:
    free, held = (
        largest_step(stiffness(molecule(), p, x) ** 0.5) for p, x, _ in (phase_point(False), phase_point(True))
    )
    assert held > 1.5 * free


def growth(macro: float, residual: float, friction: float, inner: int = 60) -> float:
    """Largest |eigenvalue| of one macro-step of variant C on a mode of frequency 1 in the student."""
    student, true = harmonic(1.0), harmonic(1 + residual)
    bath = Bath(0.0, friction, np.random.default_rng(0))
    columns = []
    for x, v in ((1.0, 0.0), (0.0, 1.0)):
        a, b = np.array([[x, 0, 0]]), np.array([[v, 0.0, 0]])
        a, b, _ = respa(UNIT, a, b, Pair(true(a), student(a)), true, student, macro / inner, inner, bath)
        columns.append([a[0, 0], b[0, 0]])
    return float(np.abs(np.linalg.eigvals(np.array(columns).T)).max())


def test_the_half_trace_is_that_of_the_propagator() -> None:
    for macro in (0.5, 1.5, 2.7, 2.95, 3.1, 4.0):
        trace = half_trace(1.0, 0.1, macro)
        expected = max(abs(trace + s * np.sqrt(complex(trace**2 - 1))) for s in (-1, 1))
        assert growth(macro, 0.1, 0.0, inner=200) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("residual", [0.03, 0.2, -0.2])
def test_below_the_limit_nothing_grows_and_beyond_it_the_friction_demanded_is_enough(residual: float) -> None:
    limit = largest_step(1.0, residual)
    assert all(abs(half_trace(1.0, residual, s)) <= 1 for s in np.linspace(1e-3, limit, 2000))
    assert max(growth(s * limit, residual, 0.0) for s in (0.5, 0.9, 0.98)) < 1 + 1e-9
    beyond = np.array([1.05, 1.1, 1.15, 1.2, 1.25, 2.0, 2.1, 2.2]) * limit
    assert max(abs(half_trace(1.0, residual, s)) for s in np.linspace(limit, 1.3 * limit, 2000)) > 1
    for macro in beyond:
        needed = required_friction(macro, 1.0, residual)
        assert needed == np.inf or growth(macro, residual, needed) < 1


def test_modes_slower_than_the_fastest_are_no_worse() -> None:
    limit = largest_step(1.0, 0.1)
    for slower in np.linspace(0.05, 1.0, 50):
        assert all(abs(half_trace(slower, 0.1, s)) <= 1 for s in np.linspace(1e-3, limit, 300))


def test_half_of_the_friction_demanded_at_the_resonance_is_not_enough() -> None:
    steps = np.linspace(1.0, 1.15, 16) * largest_step(1.0, 0.1)
    assert max(growth(s, 0.1, 0.4 * required_friction(s, 1.0, 0.1)) for s in steps) > 1.01


def test_what_the_rule_refuses_explodes_and_what_it_allows_does_not() -> None:
    macro, residual = 0.95 * np.pi, 0.2
    with pytest.raises(ConfigError, match="is unsafe"):
        require_safe(macro, macro / 40, 1.0, residual, 0.01)
    assert growth(macro, residual, 0.01) > 1.1
    friction = 1.01 * required_friction(macro, 1.0, residual)
    require_safe(macro, macro / 40, 1.0, residual, friction)
    true, student = harmonic(1 + residual), harmonic(1.0)

    def step(x: FloatArray, v: FloatArray, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
        bath = Bath(ONE_KT, friction, rng)
        return respa(UNIT, x, v, Pair(true(x), student(x)), true, student, macro / 40, 40, bath)[:2]

    assert 0 < stationary(step)[0, 0] < 10  # exactly 1/1.2: allowed is not yet accurate


def test_the_numbers_of_the_note() -> None:
    """First resonances: 9.5 fs for C=O at 1750/cm, 10.4 fs for 1600/cm, 11.5 fs for 1450/cm."""
    light = 2.99792458e-5  # cm/fs
    for wavenumber, expected in ((1750, 9.53), (1600, 10.42), (1450, 11.50)):
        assert largest_step(2 * np.pi * light * wavenumber) == pytest.approx(expected, abs=0.01)


@pytest.mark.fault("J9")
def test_refusals_say_what_is_allowed() -> None:
    fastest = np.pi / 9.5
    require_safe(9.3, 1.0, fastest, 0.01 * fastest**2, 0.0)
    require_safe(20.0, 20.0, fastest, fastest**2, 0.0)  # true dynamics, whatever the student
    with pytest.raises(
        ConfigError, match=r"period of 19\.0 fs.*1 % .*begin at 9\.41 fs.*exceed 3\.52/ps; it is 1\.00/ps"
    ):
        require_safe(10.0, 1.0, fastest, 0.01 * fastest**2, 1e-3)
    with pytest.raises(ConfigError, match=r"120 % .*begin at 4\.32 fs, and beyond, no friction is enough"):
        require_safe(6.0, 1.0, fastest, 1.2 * fastest**2, 0.0)
    with pytest.raises(ConfigError, match=r"inner step of 8 fs is unstable.*below 6 fs"):
        require_safe(9.0, 8.0, fastest, 0.0, 0.0)
    assert required_friction(100.0, fastest, 0.01) == np.inf


def test_a_residual_that_vanishes_needs_no_friction_to_speak_of() -> None:
    particles, x, _ = phase_point(True)
    true = molecule()

    def residual(x: FloatArray) -> Evaluation:
        return Evaluation(0.0, 1e-3 * true(x).forces)

    small = stiffness(residual, particles, x, 8)
    assert small == pytest.approx(1e-3 * stiffness(true, particles, x, 8), rel=1e-6)
    assert required_friction(12.0, np.pi / 9.5, small) < 1e-3


def test_a_student_is_judged_where_its_residual_is_stiffest() -> None:
    """Right at the minimum and wrong at 300 K, as a network is that has seen the minimum too often."""
    particles, x, _ = phase_point(True)
    true, moved = molecule(), x + np.random.default_rng(1).normal(0, 0.2, x.shape)
    asked = []

    def residual(at: FloatArray) -> Evaluation:
        asked.append(at)
        far = np.abs(at - x).max() > 0.1
        return Evaluation(0.0, 0.9 * true(at).forces * far)

    def check(*configurations: FloatArray) -> None:
        require_safe_student(true, residual, particles, configurations, 6.0, 0.5, 0.0)

    check(x)
    assert len(asked) <= 24
    with pytest.raises(ConfigError, match="is unsafe"):
        check(x, moved)
