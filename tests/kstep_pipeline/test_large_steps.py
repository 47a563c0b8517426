"""Gates on large steps: what is right never fails, what is wrong does, and with too little data nothing is decided."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from kstep_jumps import ETHANOL, M
from mlff_engines.kstep.constraints import BondConstraints
from mlff_engines.kstep.particles import Particles
from mlff_engines.structure import FloatArray
from mlff_engines.units import BOLTZMANN
from mlff_engines.validation.dynamics.large_steps import Run, error_of, judge, slowest_dihedral
from mlff_engines.validation.reports.large_steps import Row, savings
from mlff_engines.validation.trajectories.divergences import absolute_difference, jensen_shannon, kullback_leibler
from requirements import require_package

require_package("MDAnalysis", "openmm")

BONDS = np.array([[0, 4], [0, 5], [0, 6], [1, 7], [1, 8], [2, 3]])
LENGTHS = np.linalg.norm(ETHANOL.positions[BONDS[:, 0]] - ETHANOL.positions[BONDS[:, 1]], axis=1)
PARTICLES = Particles(M, BondConstraints(BONDS, LENGTHS, M))
FRAMES = 200


def sampled(seed: int, replicas: int = 5, scale: FloatArray | float = 1.0, **changed: Any) -> Run:
    """Independent samples: rigid X-H bonds, thermal velocities times `scale`, energies that are conserved."""
    rng = np.random.default_rng(seed)
    assert PARTICLES.constraints is not None
    moved = ETHANOL.positions + rng.normal(0, 0.03, (replicas, FRAMES, *ETHANOL.positions.shape))
    x, v = np.empty_like(moved), np.empty_like(moved)
    for at in np.ndindex(replicas, FRAMES):
        x[at] = PARTICLES.constraints.positions(moved[at], ETHANOL.positions)
        v[at] = PARTICLES.thermal(x[at], 300.0, rng) * scale
    times = np.linspace(0.1, 120, FRAMES)
    made = Run(
        variant="C-4fs", molecule="ethanol", numbers=ETHANOL.numbers, masses=M, constraints=BONDS, times=times,
        positions=x, velocities=v, kicks=np.zeros_like(v), temperature=300.0, problems={},
        slopes=BOLTZMANN * 300 * rng.chisquare(21, (replicas, FRAMES)) / 21, curvatures=np.ones((replicas, FRAMES)),
        nve=[np.array([times, rng.normal(0, 0.02, FRAMES)]) for _ in range(replicas)],
    )  # fmt: skip
    return replace(made, **changed)


@pytest.fixture(scope="module")
def reference() -> Run:
    return sampled(1)


@pytest.fixture(scope="module")
def replicate() -> Run:
    return sampled(2)


def verdicts(run: Run, reference: Run, replicate: Run | None) -> dict[str, str]:
    return {result.code: result.verdict for result in judge(run, reference, replicate)}


def test_divergences_of_known_histograms() -> None:
    p, q = np.array([1.0, 3.0, 0.0]), np.array([0.0, 0.0, 2.0])
    assert jensen_shannon(p, 10 * p) == 0
    assert jensen_shannon(p, q) == pytest.approx(math.log(2))
    assert absolute_difference(p, q) == pytest.approx(2)
    a, b = np.array([5e8, 5e8]), np.array([2.5e8, 7.5e8])
    assert kullback_leibler(a, b) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-6)
    assert math.isfinite(kullback_leibler(p, q))
    assert jensen_shannon(a, b) == pytest.approx(jensen_shannon(b, a))


def test_a_right_variant_passes_what_can_be_seen_and_fails_nothing(reference: Run, replicate: Run) -> None:
    results = judge(sampled(3), reference, replicate)
    found = {result.code: result.verdict for result in results}
    assert list(found) == ["K1", "K2", "K3", "K4", "K5", "K6", "K7"]
    assert "fail" not in found.values()
    assert found["K1"] == found["K2"] == "pass"
    by_code = {result.code: result for result in results}
    for name, value in by_code["K4"].figures.items():
        if "error" not in name:
            assert value == pytest.approx(
                300, abs=4 * by_code["K4"].figures[name.replace(" (K)", ": standard error (K)")]
            )
    assert set(by_code["K4"].figures) >= {"hydrogen (K)", "translation (K)", "rotation (K)", "inner motion (K)"}
    assert 0 < error_of(results) < math.inf


HOT_HYDROGEN = np.where(ETHANOL.numbers == 1, 1.06, 1.0)[:, None]


@pytest.mark.parametrize(("scale", "code"), [(0.96, "K3"), (HOT_HYDROGEN, "K4")], ids=["cooled", "hot hydrogens"])
def test_wrong_velocities_fail(reference: Run, replicate: Run, scale: Any, code: str) -> None:
    assert verdicts(sampled(4, scale=scale), reference, replicate)[code] == "fail"


def test_constraints_that_are_forgotten_show(reference: Run, replicate: Run) -> None:
    """Six rigid bonds of 27 degrees of freedom: were they counted, the temperature would be 22 % too low."""
    assert verdicts(sampled(5, constraints=BONDS[:0]), reference, replicate)["K3"] == "fail"


def test_wrong_configurations_fail(reference: Run, replicate: Run) -> None:
    wrong = sampled(6)
    wrong.positions[:, :, [2, 3]] += [-0.04, 0.0, 0.0]  # the C-O bond
    found = verdicts(wrong, reference, replicate)
    assert found["K5"] == "fail"
    assert found["K3"] != "fail"
    turned = sampled(7)
    turned.positions[:, ::2, 3, 2] += 0.7  # the hydroxyl, half of the time
    assert verdicts(turned, reference, replicate)["K6"] == "fail"


def test_a_drift_fails(reference: Run, replicate: Run) -> None:
    drifting = sampled(8)
    for times, energy in drifting.nve:
        energy += 0.1 * times  # kJ/mol/ps
    [result] = [r for r in judge(drifting, reference, replicate) if r.code == "K2"]
    assert (result.verdict, result.figure) == ("fail", pytest.approx(0.1 / 9, rel=0.05))


def test_few_data_decide_nothing_but_a_run_that_broke_has_failed(reference: Run, replicate: Run) -> None:
    cold = sampled(9, replicas=2, scale=0.8)
    found = verdicts(cold, reference, replicate)
    assert set(found.values()) == {"pass", "inconclusive"}
    assert [code for code, verdict in found.items() if verdict == "pass"] == ["K1"]
    no_null = verdicts(sampled(6), reference, None)
    assert {no_null[code] for code in ("K5", "K6", "K7")} == {"inconclusive"}
    broken = replace(cold, problems={1: "failed after 0.2 ps"})
    assert verdicts(broken, reference, replicate)["K1"] == "fail"
    empty = replace(cold, positions=cold.positions[:, :2])
    assert set(verdicts(empty, reference, replicate).values()) == {"pass", "inconclusive"}


def test_atoms_far_away_are_counted_in_the_last_bin(reference: Run, replicate: Run) -> None:
    lost = sampled(10)
    lost.positions[:, :, 2] += 1e12
    [result] = [r for r in judge(lost, reference, replicate) if r.code == "K5"]
    assert result.figure > 0.5  # nat, of at most 0.69
    assert result.verdict != "pass"


def test_a_molecule_that_fell_apart_has_failed(reference: Run, replicate: Run) -> None:
    """Though its positions are finite, and few frames show it."""
    apart = sampled(20)
    apart.positions[2, -3:, 3] += 1.0  # the hydroxyl's hydrogen
    [result] = [r for r in judge(apart, reference, replicate) if r.code == "K1"]
    assert (result.verdict, result.figure) == ("fail", 1)
    assert result.detail == f"replica 2 broke the bond of atoms 2 and 3 after {apart.times[-3]:.3g} ps"


def test_velocities_drawn_at_random_are_no_evidence(reference: Run, replicate: Run) -> None:
    found = verdicts(sampled(11, draws_velocities=True), reference, replicate)
    assert set(found) == {"K1", "K3", "K5", "K6", "K7"}  # K3: of the configurations


def test_configurations_that_are_too_hot_fail(reference: Run, replicate: Run) -> None:
    hot = sampled(13)
    hot.slopes[:] *= 1.15
    [result] = [r for r in judge(hot, reference, replicate) if r.code == "K3"]
    assert result.verdict == "fail"
    assert result.figures["configurational (K)"] == pytest.approx(345, rel=0.03)
    lost = sampled(14)
    lost.slopes[0, 100] = math.nan
    assert verdicts(lost, reference, replicate)["K3"] == "inconclusive"


def hopping(seed: int, stay: int, **changed: Any) -> Run:
    """The hydroxyl's dihedral turned by 120° or not, for `stay` frames on average."""
    made = sampled(seed, **changed)
    rng = np.random.default_rng(seed)
    turned = np.cumsum(rng.random((5, FRAMES)) < 1 / stay, axis=1) % 2 == 1
    axis = ETHANOL.positions[2] - ETHANOL.positions[1]
    turn = Rotation.from_rotvec(np.radians(120) * axis / np.linalg.norm(axis)).as_matrix()
    about = ETHANOL.positions[2]
    made.positions[turned, 3] = (made.positions[turned, 3] - about) @ turn.T + about
    return made


def test_the_slowest_dihedral_is_the_one_that_hardly_turns() -> None:
    seldom = hopping(15, 20)
    basins = slowest_dihedral(seldom)
    assert basins is not None
    assert 3 in basins.atoms
    assert len(basins.tops) == 2
    assert abs(np.diff(basins.tops)[0]) % 240 == pytest.approx(120, abs=15)
    assert basins.samples(seldom) < basins.samples(hopping(16, 2)) / 5
    frames = 5 * round(0.9 * FRAMES)
    assert basins.changes(seldom) == pytest.approx(frames / 20, rel=0.5)
    assert basins.duration(seldom) == pytest.approx(0.9 * 120 * 5, rel=0.02)
    assert slowest_dihedral(sampled(1)) is None  # nothing turns


def test_wrong_rates_fail() -> None:
    reference, again = hopping(15, 4), hopping(16, 4)
    assert verdicts(hopping(17, 4), reference, again)["K8"] != "fail"
    assert verdicts(hopping(18, 12), reference, again)["K8"] == "fail"
    assert "K8" not in verdicts(hopping(18, 12, draws_velocities=True), reference, again)


def test_a_short_run_is_held_to_what_short_runs_of_the_reference_show() -> None:
    """Half the time, and frames half as dense: no more than chance; with a reference of its own length, all decided."""
    long, again = hopping(15, 20), hopping(16, 20)
    short = hopping(19, 20)
    thinned = replace(
        short,
        **{key: getattr(short, key)[:, : FRAMES // 2 : 2] for key in ("positions", "velocities", "kicks")},
        **{key: getattr(short, key)[:, : FRAMES // 2 : 2] for key in ("slopes", "curvatures")},
        times=short.times[: FRAMES // 2 : 2],
    )
    assert "fail" not in {verdicts(thinned, long, again)[code] for code in ("K5", "K6", "K7")}
    [none] = [r for r in judge(long, thinned, None) if r.code == "K6"]
    assert none.verdict == "inconclusive"


def row(variant: str, calls: float, error: float, verdict: Any = "pass") -> Row:
    return Row(
        variant=variant, macro_step_fs=2, true_calls_per_ns=calls, all_calls_per_ns=calls, seconds_per_ns=1,
        calls_per_sample=1, time_to_basin_ps=1, error=error, gates={}, verdict=verdict,
    )  # fmt: skip


def test_savings_are_at_equal_error_and_for_passed_gates_only() -> None:
    baselines = [row("verlet", 500, 0.2), row("hmr", 250, 0.6), row("bad", 10, 0.1, "inconclusive")]
    assert savings(row("C", 125, 0.3), baselines) == 4
    assert savings(row("C", 125, 0.7), baselines) == 2
    assert savings(row("C", 125, 0.1), baselines) is None
    assert savings(row("C", 125, 0.7, "fail"), baselines) is None
