"""Variant D samples the true distribution exactly, whatever the student: against quadrature, with its bugs injected."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from kstep_systems import ONE_KT, START, UNIT, double_well, molecule, phase_point
from mlff_engines.errors import ConfigError, SimulationError
from mlff_engines.kstep.jumps import correct, flow, land
from mlff_engines.kstep.metropolis import LengthAdaptation, Proposal, jittered, metropolis
from mlff_engines.kstep.particles import Evaluation, ForceField
from mlff_engines.kstep.propagators import Pair, respa, trajectory
from mlff_engines.structure import FloatArray

TRUE = double_well(barrier=2.0, where=1.6)  # kT = 1
CORRUPTED = double_well(barrier=2.8, where=1.8, tilt=0.4)  # another barrier, other wells, lopsided
EDGES = np.array([-np.inf, -2.2, -1.6, -1.0, -0.4, 0.4, 1.0, 1.6, 2.2, np.inf])
BLOCKS = 40


def quadrature(field: ForceField) -> FloatArray:
    """Probabilities of x between `EDGES`, from exp(-U)."""
    x = np.linspace(-5, 5, 10_001)
    weight = np.exp([-field(np.array([[a, 0.0, 0.0]])).energy for a in x])
    binned = np.array([weight[(x >= a) & (x < b)].sum() for a, b in itertools.pairwise(EDGES)])
    return binned / weight.sum()


def verlet_proposal(student: ForceField, dt: float = 0.25, steps: int = 4) -> Proposal:
    return lambda x, v: trajectory(UNIT, x, v, student(x), student, dt, steps)[:2]


def respa_proposal(x: FloatArray, v: FloatArray) -> tuple[FloatArray, FloatArray]:
    return respa(UNIT, x, v, Pair(TRUE(x), CORRUPTED(x)), TRUE, CORRUPTED, 0.15, 4)[:2]


def naive_proposal(x: FloatArray, v: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Variant A: not reversible, so never to be Metropolised."""
    x, v = land(UNIT, x, v, flow(UNIT, CORRUPTED, 0.25, 4)(x, v))
    return correct(UNIT, x, v, TRUE, 0.25, "A1")


def damped_proposal(x: FloatArray, v: FloatArray) -> tuple[FloatArray, FloatArray]:
    """As a regression learns to cool: a volume that shrinks."""
    x, v = verlet_proposal(TRUE)(x, v)
    return x, 0.9 * v


def run(
    propose: Proposal,
    count: int,
    kept: float,
    seed: int = 1,
    flip: bool = True,
    true: ForceField = TRUE,
) -> tuple[FloatArray, FloatArray, float]:
    """Positions along x and work of `count` proposals with velocities kept in part, and the acceptance."""
    rng = np.random.default_rng(seed)
    x, v = np.array([[1.0, 0.0, 0.0]]), UNIT.thermal(START[:1], ONE_KT, rng)
    energy, samples, work, accepted = true(x).energy, np.empty(count), np.empty(count), 0
    for n in range(count):
        v = UNIT.refresh(x, v, ONE_KT, kept, rng)
        outcome = metropolis(UNIT, x, v, energy, propose, lambda x: true(x).energy, ONE_KT, rng)
        x, v, energy = outcome.x, outcome.v if flip or outcome.accepted else -outcome.v, outcome.energy
        samples[n], work[n] = x[0, 0], outcome.work
        accepted += outcome.accepted
    return samples, work, accepted / count


def deviation(samples: FloatArray, expected: FloatArray) -> float:
    """Largest |z| over the bins; standard errors from blocks."""
    inside = (samples[:, None] >= EDGES[:-1]) & (samples[:, None] < EDGES[1:])
    blocks = inside[: len(samples) // BLOCKS * BLOCKS].reshape(BLOCKS, -1, len(expected)).mean(1)
    error = blocks.std(0, ddof=1) / np.sqrt(BLOCKS)
    return float(np.abs((blocks.mean(0) - expected) / np.maximum(error, 1e-4)).max())


@pytest.mark.parametrize("kept", [0.0, 0.8])
@pytest.mark.parametrize("propose", [verlet_proposal(CORRUPTED), respa_proposal], ids=["student", "respa"])
def test_distribution_against_quadrature(propose: Proposal, kept: float) -> None:
    samples, work, acceptance = run(propose, 8_000, kept)
    assert deviation(samples, quadrature(TRUE)) < 4
    assert 0.2 < acceptance < 0.97  # so that there were rejections to get right
    weights = np.exp(-work)
    blocks = weights.reshape(BLOCKS, -1).mean(1)
    assert abs(weights.mean() - 1) < 3 * blocks.std(ddof=1) / np.sqrt(BLOCKS)


def test_corruption_changes_the_acceptance_only() -> None:
    good, bad = (run(verlet_proposal(student), 8_000, 0.5) for student in (TRUE, CORRUPTED))
    assert good[2] > bad[2] + 0.15
    for samples, _, _ in (good, bad):
        assert deviation(samples, quadrature(TRUE)) < 4


def test_the_student_itself_is_far_from_the_true_distribution() -> None:
    """So the tests above could have failed: accepted on its own energy, the chain samples the student."""
    samples, _, _ = run(verlet_proposal(CORRUPTED), 6_000, 0.0, true=CORRUPTED)
    assert deviation(samples, quadrature(TRUE)) > 8
    assert deviation(samples, quadrature(CORRUPTED)) < 4


def test_a_missing_flip_is_noticed() -> None:
    """On rejection the velocities turn round; left as they are, and refreshed in part, the chain is biased."""
    propose = verlet_proposal(CORRUPTED, 0.25, 2)
    forgetful, right = (run(propose, 16_000, 0.95, flip=flip)[0] for flip in (False, True))
    assert deviation(right, quadrature(TRUE)) < 4
    assert deviation(forgetful, quadrature(TRUE)) > 6


def test_a_wrong_sign_of_the_work_is_noticed() -> None:
    def upside_down(x: FloatArray) -> Evaluation:
        here = CORRUPTED(x)
        return Evaluation(here.energy, -here.forces)

    assert run(verlet_proposal(upside_down), 6_000, 0.0)[2] < 0.3  # a wrong force costs acceptance, nothing else
    samples, work, _ = run(verlet_proposal(CORRUPTED), 6_000, 0.0)
    assert np.exp(np.minimum(work, 50)).mean() > 2  # of -ΔH it is 1
    assert deviation(-samples, quadrature(CORRUPTED)) > 8


@pytest.mark.parametrize("broken", [naive_proposal, damped_proposal])
def test_proposals_that_are_not_reversible_or_change_the_volume_are_noticed(broken: Proposal) -> None:
    samples, work, _ = run(broken, 10_000, 0.8)
    blocks = np.exp(-work).reshape(BLOCKS, -1).mean(1)
    excess = abs(blocks.mean() - 1) / (blocks.std(ddof=1) / np.sqrt(BLOCKS))
    assert max(deviation(samples, quadrature(TRUE)), excess) > 6


def test_with_constraints_as_exact_as_without() -> None:
    """A constrained molecule: the mean of exp(-ΔH/kT) over RATTLE'd student trajectories is 1."""
    particles, x, _ = phase_point(constrained=True)
    true, student, rng = molecule(4.0), molecule(4.4), np.random.default_rng(5)
    energy, weights, accepted = true(x).energy, [], 0

    def propose(x: FloatArray, v: FloatArray) -> tuple[FloatArray, FloatArray]:
        return trajectory(particles, x, v, student(x), student, 1.0, 10)[:2]

    for n in range(600):
        v = particles.thermal(x, 300.0, rng)
        outcome = metropolis(particles, x, v, energy, propose, lambda x: true(x).energy, 300.0, rng)
        x, energy = outcome.x, outcome.energy
        if n >= 100:
            weights.append(np.exp(-outcome.work / (300.0 / ONE_KT)))
            accepted += outcome.accepted
    blocks = np.reshape(weights, (20, -1)).mean(1)
    assert abs(blocks.mean() - 1) < 3 * blocks.std(ddof=1) / np.sqrt(20)
    assert 0.5 < accepted / 500 < 0.999


def test_one_true_energy_per_proposal_and_a_broken_trajectory_is_a_rejection() -> None:
    x, v, rng, asked = np.array([[1.0, 0, 0]]), np.array([[0.3, 0, 0]]), np.random.default_rng(0), []

    def true(x: FloatArray) -> float:
        asked.append(x)
        return TRUE(x).energy

    metropolis(UNIT, x, v, TRUE(x).energy, verlet_proposal(TRUE), true, ONE_KT, rng)
    assert len(asked) == 1

    def torn(x: FloatArray, v: FloatArray) -> tuple[FloatArray, FloatArray]:
        raise SimulationError("constraint")

    def lost(x: FloatArray, v: FloatArray) -> tuple[FloatArray, FloatArray]:
        return x * np.nan, v

    for broken in (torn, lost):
        outcome = metropolis(UNIT, x, v, TRUE(x).energy, broken, true, ONE_KT, rng)
        assert (outcome.accepted, outcome.work) == (False, np.inf)
        np.testing.assert_array_equal(outcome.v, -v)
    assert len(asked) == 1
    with pytest.raises(ConfigError, match="temperature 0 K"):
        metropolis(UNIT, x, v, 0.0, torn, true, 0.0, rng)


def test_the_length_is_found_in_the_burn_in_and_then_fixed() -> None:
    """Toward the acceptance aimed at; afterwards no history changes it."""
    adaptation, rng, steps = LengthAdaptation(proposals=400, longest=1000), np.random.default_rng(0), 3.0
    for n in range(400):  # work that grows with the length: acceptance 0.65 at some tens of steps
        steps = adaptation.next(steps, steps / 60 * rng.exponential(), ONE_KT, n)
    assert 20 < steps < 100
    assert adaptation.next(steps, np.inf, ONE_KT, 400) == steps
    assert adaptation.next(900.0, -1.0, ONE_KT, 0) == 1000  # bounds
    assert adaptation.next(1.5, np.inf, ONE_KT, 0) == 1
    with pytest.raises(ConfigError, match=r"target acceptance 1\.5"):
        LengthAdaptation(10, target=1.5)


def test_jitter_is_symmetric_about_the_length() -> None:
    drawn = [jittered(100, 0.2, np.random.default_rng(n)) for n in range(500)]
    assert min(drawn) >= 80
    assert max(drawn) <= 120
    assert np.mean(drawn) == pytest.approx(100, abs=2)
    assert jittered(0.4, 0.0, np.random.default_rng(0)) == 1
