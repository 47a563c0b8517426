"""M1-M4 pass right engines, fail each injected bug, and say when they cannot tell."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import broken_dynamics
from broken_dynamics import BUGS, SHORT, right
from broken_engines import MODELS, NOBLE, ORGANIC, evaluator, lennard_jones, painn
from mlff_engines.artifact import load
from mlff_engines.checkpoint import set_dtype
from mlff_engines.manifest import Dtype
from mlff_engines.structure import Result, Structure
from mlff_engines.units import ACCELERATION
from mlff_engines.validation.builtin import argon_artifact, argon_box
from mlff_engines.validation.core_engine import CoreEngine
from mlff_engines.validation.dynamics.constant_energy import (
    TOLERANCES,
    Options,
    check_dynamics,
    fastest_vibration,
    rounding_noise,
    starting,
)
from mlff_engines.validation.engine import Dynamics
from mlff_engines.validation.result import NAMES, CheckResult
from requirements import require_engine


def verdicts(results: list[CheckResult]) -> dict[str, str]:
    return {result.code: result.verdict for result in results}


def dimer(distance: float, timestep: float = 5.0, speed: float = 0.0) -> Dynamics:
    structure = Structure(np.array([18, 18]), np.array([[0, 0, 0], [distance, 0, 0]]))
    velocities = speed * np.array([[-1.0, 0, 0], [1.0, 0, 0]])
    return Dynamics(structure, velocities, timestep, 0)


@pytest.mark.parametrize("model", list(MODELS))
def test_right_engines_pass(model: str, tmp_path: Path) -> None:
    make, claims = MODELS[model]
    engine, core = right(make(), claims), right(make(), claims)
    checks = list(TOLERANCES) if model == "lj" else ["M1", "M2", "M3"]
    results = check_dynamics(engine, core, broken_dynamics.start(model), tmp_path, SHORT, only=checks)
    assert [result.code for result in results] == checks
    assert {result.code: result.detail for result in results if not result.passed} == {}
    for result in results:
        assert result.name == NAMES[result.code]
        assert result.plots
        assert all(len(curve.x) == len(curve.y) for plot in result.plots for curve in plot.curves)
    assert results[0].figures["first ratio"] == pytest.approx(4, abs=0.2)


def test_right_float32_engine_passes(tmp_path: Path) -> None:
    double = painn(dtype=torch.float32)
    set_dtype(double, torch.float64)
    engine = CoreEngine(evaluator(painn(dtype=torch.float32), ORGANIC, torch.float32), "float32")
    core = right(double.eval(), ORGANIC)
    start = broken_dynamics.start("painn")
    results = check_dynamics(engine, core, start, tmp_path, SHORT, only=["M1", "M2", "M3"])
    assert {result.code: result.detail for result in results if not result.passed} == {}
    assert 1e-10 < rounding_noise(engine, start.structure) < 1e-5
    assert rounding_noise(core, start.structure) < 1e-11


def test_rounding_excuses_float32_alone(tmp_path: Path) -> None:
    exact, start, rng = evaluator(lennard_jones(), NOBLE), broken_dynamics.start("lj"), np.random.default_rng(0)

    def rounded(structure: Structure) -> Result:
        found = exact(structure)
        return replace(found, energy=found.energy + 4e-5 * rng.standard_normal())

    verdict = {}
    dtypes: tuple[Dtype, ...] = ("float64", "float32")
    for dtype in dtypes:
        engine = CoreEngine(rounded, dtype)
        assert rounding_noise(engine, start.structure, 100) == pytest.approx(4e-5, rel=0.3)
        [result] = check_dynamics(engine, right(lennard_jones(), NOBLE), start, tmp_path, SHORT, only=["M1"])
        verdict[dtype] = result.verdict
    assert verdict == {"float64": "fail", "float32": "inconclusive"}


@pytest.mark.parametrize(("bug", "model"), [(name, model) for name, bug in BUGS.items() for model in bug.models])
def test_bug_is_caught(bug: str, model: str, tmp_path: Path) -> None:
    make, claims = MODELS[model]
    case = BUGS[bug]
    engine = case.make(make(), claims)
    core = case.make(make(), claims) if case.faithful else right(make(), claims)
    missed = case.missed if model == case.models[0] else ""
    expected = dict.fromkeys(case.caught.split(), "fail") | dict.fromkeys(missed.split(), "pass")
    with np.errstate(all="ignore"):  # some explode
        results = check_dynamics(engine, core, broken_dynamics.start(model), tmp_path, SHORT, only=list(expected))
    assert verdicts(results) == dict(sorted(expected.items())), [result.detail for result in results]


@pytest.mark.parametrize("bug", ["neighbour list updated too rarely", "thermostat left on"])
def test_drift_is_caught(bug: str, tmp_path: Path) -> None:
    engine, core = BUGS[bug].make(lennard_jones(), NOBLE), right(lennard_jones(), NOBLE)
    [result] = check_dynamics(engine, core, broken_dynamics.start("lj"), tmp_path, SHORT, only=["M4"])
    assert result.verdict == "fail"
    assert result.figures["slope of the eager model, meV/atom/ps"] < 1e-3 < result.figure


def test_every_check_catches_something() -> None:
    assert {code for bug in BUGS.values() for code in bug.caught.split()} == {"M1", "M2", "M3"}
    assert set(TOLERANCES) == {"M1", "M2", "M3", "M4"}


def test_atoms_that_feel_nothing_prove_nothing(tmp_path: Path) -> None:
    core = right(lennard_jones(), NOBLE)
    at_rest = check_dynamics(core, core, dimer(30.0), tmp_path, SHORT)
    assert verdicts(at_rest) | {"M4": "?"} == {
        "M1": "inconclusive",
        "M2": "inconclusive",
        "M3": "inconclusive",
        "M4": "?",
    }
    assert "more heat" in at_rest[0].detail
    assert "start with more heat" in at_rest[1].detail


def test_short_runs_do_not_tell_of_drift(tmp_path: Path) -> None:
    core = right(lennard_jones(), NOBLE)
    start = replace(broken_dynamics.start("lj"), timestep=60.0)
    [result] = check_dynamics(core, core, start, tmp_path, Options(drift=40), only=["M4"])
    assert result.verdict == "inconclusive"
    assert "steps" in result.detail


def test_long_time_steps_are_halved_once_more(tmp_path: Path) -> None:
    """A spring, 1.2 radians a step: the ratios are 5.7, 4.3 and 4.1."""

    def spring(structure: Structure) -> Result:
        forces = -structure.positions
        return Result(0.5 * float((forces**2).sum()), np.zeros(1), forces, np.zeros((3, 3)))

    moving = Dynamics(Structure(np.array([1]), np.zeros((1, 3))), np.full((1, 3), 0.1), 1.0, 0)
    start = replace(moving, timestep=1.2 / np.sqrt(ACCELERATION / moving.masses[0]))
    core = CoreEngine(spring)
    [result] = check_dynamics(core, core, start, tmp_path, Options(law=200), only=["M1"])
    assert len(result.plots[0].curves[0].x) == 4
    assert result.passed, result


def test_an_engine_that_gives_up_has_failed(tmp_path: Path) -> None:
    core = right(lennard_jones(), NOBLE)
    start = dimer(3.0, timestep=1.0)
    helium = replace(start, structure=replace(start.structure, numbers=np.array([2, 2])))
    results = check_dynamics(core, core, helium, tmp_path, SHORT, only=["M1", "M3"])
    assert verdicts(results) == {"M1": "fail", "M3": "fail"}
    assert "does not know He" in results[0].detail
    assert np.isnan(results[0].figure)


def test_time_step_follows_from_the_fastest_vibration() -> None:
    """Two atoms in the minimum of Lennard-Jones: k = 72 ε / (2^(1/3) σ²)."""
    core, start = right(lennard_jones(), NOBLE), dimer(2 ** (1 / 6) * 3.4)
    stiffness = 72 * 0.0103 / (2 ** (1 / 3) * 3.4**2)
    expected = np.sqrt(2 * stiffness / start.masses[0] * ACCELERATION)
    assert fastest_vibration(core.evaluate, start) == pytest.approx(expected, rel=0.01)
    # heavy atoms loosely bound: what they do when they meet decides
    assert starting(core, start.structure, 50.0).timestep == pytest.approx(6.3)
    hydrogen = starting(right(painn(), ORGANIC), Structure(np.array([1]), np.zeros((1, 3))), 300.0)
    assert hydrogen.timestep == 1.0


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_ase_passes(dtype: Dtype, tmp_path: Path) -> None:
    require_engine("ase")
    from mlff_ase.engine import ASEEngine

    artifact = argon_artifact(tmp_path)
    engine = ASEEngine(artifact, folder=tmp_path, dtype=dtype)
    core = CoreEngine(load(artifact).evaluator(skin=0.0, outside="ignore"))
    start = starting(core, argon_box(2), 150.0)
    results = check_dynamics(engine, core, start, tmp_path, Options(law=32, reversal=30, same=30, drift=160))
    assert [result.code for result in results] == list(TOLERANCES)
    assert {result.code: result.detail for result in results if not result.passed} == {}
    assert all(result.tolerance == TOLERANCES[result.code][dtype] for result in results)
