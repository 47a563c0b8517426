"""The structure of the propagators: reversible, symplectic, and biased exactly as theory says.

What a test demands is a function of the step under test, so that broken steps can be shown to fail it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest

from kstep_systems import (
    ONE_KT,
    UNIT,
    Step,
    harmonic,
    jacobian,
    molecule,
    phase_point,
    stationary,
    symplectic_form,
    tangents,
)
from mlff_engines.errors import ConfigError, SimulationError
from mlff_engines.kstep.jumps import Displacement, ballistic, correct, flow, land
from mlff_engines.kstep.meter import Meter
from mlff_engines.kstep.particles import Bath, Evaluation, ForceField, Particles
from mlff_engines.kstep.propagators import Pair, baoab, drift_kick_drift, respa, trajectory, velocity_verlet
from mlff_engines.structure import FloatArray

REVERSIBLE, SYMPLECTIC = 1e-10, 1e-8  # the bounds of the note, in Å and amu·Å²/fs
TRUE, STUDENT = molecule(4.0), molecule(4.8)


def respa_step(particles: Particles, true: ForceField = TRUE, student: ForceField = STUDENT) -> Step:
    def step(x: FloatArray, v: FloatArray) -> tuple[FloatArray, FloatArray]:
        return respa(particles, x, v, Pair(true(x), student(x)), true, student, 0.5, 6)[:2]

    return step


def verlet_step(particles: Particles, student: ForceField = STUDENT) -> Step:
    def step(x: FloatArray, v: FloatArray) -> tuple[FloatArray, FloatArray]:
        return trajectory(particles, x, v, student(x), student, 0.5, 12)[:2]

    return step


def naive_step(particles: Particles) -> Step:
    """A2: a student trajectory, then a true step. Symplectic here, but not reversible."""

    def step(x: FloatArray, v: FloatArray) -> tuple[FloatArray, FloatArray]:
        x, v = land(particles, x, v, flow(particles, STUDENT, 0.5, 6)(x, v))
        return correct(particles, x, v, TRUE, 0.5, "A2")

    return step


def late_kick_step(particles: Particles) -> Step:
    """A bug: the whole residual impulse at the end of the macro-step."""

    def step(x: FloatArray, v: FloatArray) -> tuple[FloatArray, FloatArray]:
        x, v, inner = trajectory(particles, x, v, STUDENT(x), STUDENT, 0.5, 6)
        return x, particles.kick(x, v, TRUE(x).forces - inner.forces, 3.0)

    return step


def euler_step(particles: Particles) -> Step:
    """A bug: forces at the old positions move the velocities after the drift."""

    def step(x: FloatArray, v: FloatArray) -> tuple[FloatArray, FloatArray]:
        forces = TRUE(x).forces
        moved, v = particles.drift(x, v, 0.5)
        return moved, particles.kick(moved, v, forces, 0.5)

    return step


def irreversibility(step: Step, x: FloatArray, v: FloatArray) -> float:
    """||R Φ R Φ z - z||."""
    there_x, there_v = step(x, v)
    back_x, back_v = step(there_x, -there_v)
    return max(float(np.abs(back_x - x).max()), float(np.abs(back_v + v).max()))


def asymplecticity(step: Step, particles: Particles, x: FloatArray, v: FloatArray) -> float:
    """Largest change of the symplectic form, per unit of its own size."""
    curves = tangents(particles, x, v, 6)
    before = symplectic_form(particles.masses, jacobian(lambda a, b: (a, b), curves, 1e-3))
    after = symplectic_form(particles.masses, jacobian(step, curves, 1e-3))
    return float(np.abs(after - before).max() / np.abs(before).max())


def log_volume(step: Step, particles: Particles, x: FloatArray, v: FloatArray) -> float:
    """log |det J|."""
    return float(np.linalg.slogdet(jacobian(step, tangents(particles, x, v, 0), 1e-3))[1])


@pytest.mark.parametrize("constrained", [False, True])
def test_variant_c_is_reversible_and_symplectic(constrained: bool) -> None:
    particles, x, v = phase_point(constrained)
    for step in (respa_step(particles), verlet_step(particles)):
        assert irreversibility(step, x, v) < REVERSIBLE
        assert asymplecticity(step, particles, x, v) < SYMPLECTIC


def test_student_trajectories_and_variant_c_preserve_volume_even_with_a_force_that_has_no_potential() -> None:
    particles, x, v = phase_point(constrained=False)
    swirling = molecule(4.8, swirl=0.5)
    for step in (respa_step(particles, student=swirling), verlet_step(particles, swirling)):
        assert irreversibility(step, x, v) < REVERSIBLE
        assert abs(log_volume(step, particles, x, v)) < SYMPLECTIC
        assert asymplecticity(step, particles, x, v) > 1e-4  # it needs a potential


def test_the_structure_tests_notice_what_lacks_the_structure() -> None:
    particles, x, v = phase_point(constrained=False)
    for broken in (naive_step, late_kick_step):
        assert irreversibility(broken(particles), x, v) > 1e3 * REVERSIBLE
    assert asymplecticity(euler_step(particles), particles, x, v) > 1e3 * SYMPLECTIC
    assert abs(log_volume(euler_step(particles), particles, x, v)) > 1e3 * SYMPLECTIC

    def shaken(x: FloatArray, v: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Constraints projected after an unconstrained step, instead of in it."""
        x, v = respa_step(Particles(particles.masses))(x, v)
        assert constrained.constraints is not None
        x = constrained.constraints.positions(x, x)
        return x, constrained.tangent(x, v)

    constrained, x, v = phase_point(constrained=True)
    assert irreversibility(shaken, x, v) > 1e3 * REVERSIBLE
    assert asymplecticity(shaken, constrained, x, v) > 1e3 * SYMPLECTIC


def conserved(step: Callable[..., tuple[FloatArray, FloatArray, Pair]]) -> float:
    """Standard deviation of the true total energy over macro-steps, eV."""
    particles, x, v = phase_point(constrained=True)
    here = Pair(TRUE(x), STUDENT(x))
    energies = []
    for _ in range(300):
        x, v, here = step(particles, x, v, here)
        energies.append(here.true.energy + particles.kinetic_energy(v))
    return float(np.std(energies))


def test_variant_c_conserves_the_true_energy_and_a_wrong_sign_does_not() -> None:
    def right(p: Particles, x: FloatArray, v: FloatArray, here: Pair) -> tuple[FloatArray, FloatArray, Pair]:
        return respa(p, x, v, here, TRUE, STUDENT, 0.5, 4)

    def wrong_sign(p: Particles, x: FloatArray, v: FloatArray, here: Pair) -> tuple[FloatArray, FloatArray, Pair]:
        def kick(here: Pair) -> FloatArray:
            return here.student.forces - here.true.forces

        v = p.kick(x, v, kick(here), 1.0)
        x, v, inner = trajectory(p, x, v, here.student, STUDENT, 0.5, 4)
        here = Pair(TRUE(x), inner)
        return x, p.kick(x, v, kick(here), 1.0), here

    assert conserved(right) < 2e-3
    assert conserved(wrong_sign) > 10 * conserved(right)


def test_variant_c_is_verlet_where_the_student_is_right_or_the_macro_step_is_one_step() -> None:
    particles, x, v = phase_point(constrained=True)
    by_verlet = trajectory(particles, x, v, TRUE(x), TRUE, 0.5, 6)
    by_respa = respa(particles, x, v, Pair(TRUE(x), TRUE(x)), TRUE, TRUE, 0.5, 6)
    np.testing.assert_allclose(by_respa[0], by_verlet[0], atol=1e-13)
    one = respa(particles, x, v, Pair(TRUE(x), STUDENT(x)), TRUE, STUDENT, 0.5, 1)
    np.testing.assert_allclose(one[0], velocity_verlet(particles, x, v, TRUE(x), TRUE, 0.5)[0], atol=1e-13)


def variance(step: Callable[..., tuple[FloatArray, FloatArray]]) -> float:
    return float(stationary(step)[0, 0])


def harmonic_c(macro: float, inner: int, student: float = 1.2) -> float:
    """<x²> of variant C on ½x², exactly 1 for the true force."""
    true, wrong = harmonic(1.0), harmonic(student)

    def step(x: FloatArray, v: FloatArray, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
        bath = Bath(ONE_KT, 1e-3, rng)
        return respa(UNIT, x, v, Pair(true(x), wrong(x)), true, wrong, macro / inner, inner, bath)[:2]

    return variance(step)


def harmonic_a(dt: float, k: int, corrector: str) -> float:
    """<x²> of variant A, with weak friction between jumps."""
    jump, true = flow(UNIT, harmonic(1.2), dt, k), harmonic(1.0)

    def step(x: FloatArray, v: FloatArray, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
        x, v = land(UNIT, x, v, jump(x, v))
        x, v = correct(UNIT, x, v, true, dt, corrector)
        return x, Bath(ONE_KT, 1e-3, rng)(UNIT, x, v, (k + 1) * dt)

    return variance(step)


def test_a_wrong_student_biases_c_by_the_square_of_the_macro_step() -> None:
    """20 % too stiff a student: the bias falls fourfold, from whatever macro-step, as that is halved."""
    biases = [harmonic_c(macro, 8) - 1 for macro in (0.8, 0.4, 0.2)]
    for coarse, fine in itertools.pairwise(biases):
        assert coarse / fine == pytest.approx(4, rel=0.05)
    assert abs(biases[1]) < 0.01


@pytest.mark.parametrize("corrector", ["A1", "A2"])
def test_a_wrong_student_biases_a_for_ever(corrector: str) -> None:
    """H_eff = (k·H_student + H_true)/(k + 1): <x²> = 0.849 at k = 8, at every step size; the student alone 0.833."""
    expected = 9 / (8 * 1.2 + 1)
    coarse, fine = (harmonic_a(dt, 8, corrector) for dt in (0.02, 0.01))
    assert expected == pytest.approx(0.849, abs=1e-3)
    assert coarse == pytest.approx(expected, abs=5e-3)
    assert fine == pytest.approx(expected, abs=2e-3)


def test_as_much_correction_per_call_as_the_note_says() -> None:
    """At the calls of a naive hybrid of k = 8 (D = 9 steps), C has a tenth of its error, for a step of 0.1 radian."""
    assert abs(harmonic_c(0.9, 9) - 1) < 0.2 * abs(harmonic_a(0.1, 8, "A1") - 1)


def test_baoab_samples_the_configurations_of_a_harmonic_well_exactly() -> None:
    """Leimkuhler and Matthews (2013): <x²> = kT/k at every stable step, while OBABO, say, is off by dt²."""
    true = harmonic(1.0)

    def step(x: FloatArray, v: FloatArray, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
        return baoab(UNIT, x, v, true(x), true, 1.0, Bath(ONE_KT, 0.5, rng))[:2]

    def obabo(x: FloatArray, v: FloatArray, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
        bath = Bath(ONE_KT, 0.5, rng)
        x, v, _ = velocity_verlet(UNIT, x, bath(UNIT, x, v, 0.5), true(x), true, 1.0)
        return x, bath(UNIT, x, v, 0.5)

    assert variance(step) == pytest.approx(1, abs=1e-12)
    assert variance(obabo) > 1.2


def test_calls_of_the_true_potential() -> None:
    """A1 costs one, A2 two, C one per macro-step: measured at the boundary, not assumed."""
    particles, x, v = phase_point(constrained=True)
    meter = Meter()

    def true(x: FloatArray) -> Evaluation:
        meter.count()
        return TRUE(x)

    counts = []
    for corrector in ("A1", "A2"):
        before = meter.calls
        correct(particles, x, v, true, 0.5, corrector)
        counts.append(meter.calls - before)
    with meter.purpose("start"):
        here = Pair(true(x), STUDENT(x))
    before = meter.calls
    for _ in range(5):
        x, v, here = respa(particles, x, v, here, true, STUDENT, 0.5, 4)
    assert [*counts, meter.calls - before] == [1, 2, 5]
    assert meter.by_purpose == {"dynamics": 8, "start": 1}


def test_drift_kick_drift_is_second_order() -> None:
    particles, x, v = phase_point(constrained=True)

    def error(dt: float) -> float:
        a, b = x, v
        for _ in range(round(2 / dt)):
            a, b = drift_kick_drift(particles, a, b, TRUE, dt)
        return float(np.abs(a - exact).max())

    exact = trajectory(particles, x, v, TRUE(x), TRUE, 2 / 2048, 2048)[0]
    assert math.log2(error(0.25) / error(0.125)) == pytest.approx(2, abs=0.15)


@pytest.mark.fault("J7")
def test_ballistic_and_damaged_jumps() -> None:
    particles, x, v = phase_point(constrained=False)
    np.testing.assert_allclose(land(particles, x, v, ballistic(4.0)(x, v))[0], x + 4 * v)
    lost = Displacement(np.full_like(x, np.nan), v)
    with pytest.raises(SimulationError, match="jump of atom 0 is not finite, and of 3 more"):
        land(particles, x, v, lost)


def test_wrong_settings_are_refused() -> None:
    particles, x, v = phase_point(constrained=False)
    with pytest.raises(ConfigError, match="0 inner steps"):
        respa(particles, x, v, Pair(TRUE(x), STUDENT(x)), TRUE, STUDENT, 0.5, 0)
    with pytest.raises(ConfigError, match="temperature -1 K"):
        Bath(-1.0, 0.1, np.random.default_rng())
    with pytest.raises(ConfigError, match="masses must be finite and positive"):
        Particles(np.array([1.0, 0.0]))
