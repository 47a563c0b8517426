"""M5 on liquid argon, where published thresholds let wrong models pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlff_engines.checkpoint import Domain
from mlff_engines.errors import ConfigError
from mlff_engines.evaluator import Evaluator
from mlff_engines.models.lj import ARGON
from mlff_engines.models.registry import build_model
from mlff_engines.potential import Potential
from mlff_engines.validation.builtin import argon_box
from mlff_engines.validation.core_engine import CoreEngine
from mlff_engines.validation.dynamics.ensembles import compare_ensembles
from mlff_engines.validation.dynamics.replicas import (
    EnsembleOptions,
    equilibrate,
    mean_square_frequencies,
    run_replicas,
)
from mlff_engines.validation.result import CheckResult
from sampled import LIQUID, OPTIONS, Named, argon, first


class Argon:
    """The trajectories that the tests share."""

    def __init__(self, folder: Path) -> None:
        core = CoreEngine(argon())
        self.start = equilibrate(core, LIQUID, OPTIONS, folder)
        engines = {
            "core": core,
            "right": Named("right", argon()),
            "sigma": Named("sigma", argon(1.005 * ARGON.sigma["Ar"])),
            "warm": Named("warm", argon(), warmer=2.0),
        }
        self.runs = {name: run_replicas(engine, self.start, OPTIONS, folder) for name, engine in engines.items()}
        self.frequencies = mean_square_frequencies(core.evaluate, self.runs["core"], self.start)

    def judged(self, name: str, options: EnsembleOptions = OPTIONS, **change: Any) -> CheckResult:
        found, expected = self.runs[name], self.runs["core"]
        if "samples" in change:
            found, expected = (first(runs, change["samples"]) for runs in (found, expected))
        if "replicas" in change:
            found = found[: change["replicas"]]
        return compare_ensembles(found, expected, self.start, options, self.frequencies, name)


@pytest.fixture(scope="module")
def liquid(tmp_path_factory: pytest.TempPathFactory) -> Argon:
    return Argon(tmp_path_factory.mktemp("argon"))


def test_fast_argon_is_the_shipped_model() -> None:
    model = Potential(build_model(ARGON, ["Ar"], {"Ar": 0.0})).eval()
    shipped = Evaluator(model, Domain(elements=["Ar"]), ARGON.cutoff, dtype=torch.float64)
    box = argon_box(3)
    moved = replace(box, positions=box.positions + np.random.default_rng(0).uniform(-0.4, 0.4, box.positions.shape))
    found, expected = argon()(moved), shipped(moved)
    assert found.energy == pytest.approx(expected.energy, abs=1e-12)
    np.testing.assert_allclose(found.forces, expected.forces, atol=1e-12)
    assert np.trace(found.virial) == pytest.approx(np.trace(expected.virial), abs=1e-12)


@pytest.mark.slow
def test_the_right_model_passes(liquid: Argon) -> None:
    result = liquid.judged("right")
    assert result.verdict == "pass", result
    assert result.figure <= 1
    assert [plot.title for plot in result.plots] == ["Ar-Ar distances", "potential energy"]
    for curve in result.plots[0].curves:
        assert curve.error is not None
        assert max(curve.y) == pytest.approx(3.0, abs=0.3)  # the first peak of the liquid
        assert curve.y[-1] == pytest.approx(1.0, abs=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["sigma", "warm"])
def test_what_published_thresholds_pass_fails(liquid: Argon, wrong: str) -> None:
    """σ +0.5 %, and T + 2 K: g(r) within 0.1 root mean square is MLIPAudit's threshold."""
    result = liquid.judged(wrong)
    assert result.figures["Ar-Ar: rms difference"] < 0.1
    assert result.verdict == "fail", result
    assert result.figure > 1


@pytest.mark.slow
def test_distribution_functions_alone_tell_the_wrong_size(liquid: Argon) -> None:
    """And not the wrong temperature: for that, mean energies are there."""
    size, temperature = liquid.judged("sigma").figures, liquid.judged("warm").figures
    assert size["Ar-Ar: rms z"] > 1.3
    assert size["distribution functions: probability"] < 1e-3
    assert temperature["Ar-Ar: rms z"] < 1.3


@pytest.mark.slow
def test_too_little_data_is_no_pass(liquid: Argon) -> None:
    few = liquid.judged("right", replicas=3)
    assert few.verdict == "inconclusive"
    assert "3 replicas" in few.detail
    assert liquid.judged("right", replicas=1).verdict == "inconclusive"
    short = liquid.judged("right", samples=180)
    assert short.verdict == "inconclusive"
    assert "times as much data would tell" in short.detail
    shorter = liquid.judged("right", samples=30)
    assert shorter.verdict == "inconclusive"
    assert "effective samples" in shorter.detail
    assert np.isnan(shorter.figure)
    # and more is asked of the same data
    assert liquid.judged("right", replace(OPTIONS, margin=0.05)).verdict == "inconclusive"
    assert liquid.judged("right", replace(OPTIONS, resolution=1e-3)).verdict == "inconclusive"


@pytest.mark.slow
def test_a_start_far_from_equilibrium_is_no_pass(liquid: Argon) -> None:
    falling = [
        replace(run, potential=run.potential + np.linspace(9, 0, len(run.times))) for run in liquid.runs["right"]
    ]
    result = compare_ensembles(falling, liquid.runs["core"], liquid.start, OPTIONS, liquid.frequencies)
    assert result.verdict != "pass"


@pytest.mark.slow
def test_pressure_is_compared_where_both_have_it(liquid: Argon) -> None:
    assert "pressure: difference (GPa)" in liquid.judged("right").figures
    without = [replace(run, pressure=None) for run in liquid.runs["right"]]
    result = compare_ensembles(without, liquid.runs["core"], liquid.start, OPTIONS, liquid.frequencies)
    assert result.verdict == "pass"
    assert "pressure: difference (GPa)" not in result.figures
    negative = [replace(run, pressure=-run.pressure) for run in liquid.runs["right"]]  # type: ignore[operator]
    result = compare_ensembles(negative, liquid.runs["core"], liquid.start, OPTIONS, liquid.frequencies)
    assert result.verdict == "fail"
    assert "pressure" in result.detail


@pytest.mark.slow
def test_what_integrators_may_do_is_no_failure(liquid: Argon) -> None:
    """A time step so long that two integrators could differ by 2 K: no verdict instead of a false alarm."""
    coarse = replace(liquid.start, timestep=80.0)
    result = compare_ensembles(liquid.runs["warm"], liquid.runs["core"], coarse, OPTIONS, liquid.frequencies)
    assert result.verdict != "fail"
    assert result.figures["kinetic energy: integrators (eV)"] > result.figures["kinetic energy: difference (eV)"]


@pytest.mark.slow
def test_the_reference_is_no_trial_of_itself(liquid: Argon) -> None:
    with pytest.raises(ConfigError, match="other seeds"):
        liquid.judged("core")


@pytest.mark.slow
def test_not_finite_fails(liquid: Argon) -> None:
    broken = [replace(run, potential=run.potential * np.nan) for run in liquid.runs["right"]]
    assert compare_ensembles(broken, liquid.runs["core"], liquid.start, OPTIONS, liquid.frequencies).verdict == "fail"
