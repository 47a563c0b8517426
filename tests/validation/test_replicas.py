"""Replicas are run once, kept, gone on with, and run anew when anything changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlff_engines.errors import ConfigError, SimulationError
from mlff_engines.structure import Result, Structure
from mlff_engines.units import ACCELERATION
from mlff_engines.validation.builtin import argon_artifact
from mlff_engines.validation.core_engine import CoreEngine
from mlff_engines.validation.dynamics.ensembles import check_ensemble
from mlff_engines.validation.dynamics.replicas import EnsembleOptions, mean_square_frequencies, run_replicas
from mlff_engines.validation.dynamics.temperatures import check_temperatures
from mlff_engines.validation.engine import Dynamics, Trajectory
from sampled import BRIEF, CHOICE, LIQUID, Named, argon, molecules


def test_replicas_differ_and_are_kept(tmp_path: Path) -> None:
    engine = Named("mine", molecules())
    runs = run_replicas(engine, BRIEF, CHOICE, tmp_path)
    assert engine.started == 4
    assert len({float(run.potential[-1]) for run in runs}) == 4
    again = run_replicas(engine, BRIEF, CHOICE, tmp_path)
    assert engine.started == 4
    for run, kept in zip(runs, again, strict=True):
        assert kept.file == run.file
        assert kept.pressure is None
        for name in ("times", "potential", "kinetic", "positions", "velocities"):
            np.testing.assert_array_equal(getattr(run, name), getattr(kept, name))
    # another engine draws other random numbers
    other = run_replicas(Named("other", molecules()), BRIEF, CHOICE, tmp_path)
    assert not {float(run.potential[-1]) for run in runs} & {float(run.potential[-1]) for run in other}


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    class Stopped(Named):
        def run(self, dynamics: Dynamics, file: Path) -> Trajectory:
            if self.started == 2:
                file.write_text("half a trajectory")
                raise KeyboardInterrupt
            return super().run(dynamics, file)

    with pytest.raises(KeyboardInterrupt):
        run_replicas(Stopped("mine", molecules()), BRIEF, CHOICE, tmp_path)
    engine = Named("mine", molecules())
    runs = run_replicas(engine, BRIEF, CHOICE, tmp_path)
    assert engine.started == 2
    assert all(run.file is not None and run.file.stat().st_size > 1000 for run in runs)


@pytest.mark.parametrize("what", ["model", "temperature", "length", "seed", "file"])
def test_what_changed_is_run_anew(tmp_path: Path, what: str) -> None:
    run_replicas(Named("mine", molecules()), BRIEF, CHOICE, tmp_path)
    engine = Named("mine", molecules(1.01 if what == "model" else 1.0))
    start, options = BRIEF, CHOICE
    if what == "temperature":
        start = replace(BRIEF, temperature=301.0)
    if what == "length":
        start = replace(BRIEF, steps=60)
    if what == "seed":
        options = replace(CHOICE, seed=1)
    if what == "file":
        for file in tmp_path.glob("mine-300K-0-?.npz"):
            file.unlink()
    run_replicas(engine, start, options, tmp_path)
    assert engine.started == 4


def test_checks_run_what_they_need(tmp_path: Path) -> None:
    core, engine = Named("core", molecules()), Named("mine", molecules())
    options = replace(CHOICE, equilibration=20)
    ensemble = check_ensemble(engine, core, BRIEF, tmp_path, options)
    assert (ensemble.code, ensemble.verdict) == ("M5", "inconclusive")
    temperatures = check_temperatures(engine, core, BRIEF, tmp_path, options)
    assert (temperatures.code, temperatures.verdict) == ("M6", "inconclusive")
    assert core.started == 5  # four replicas, and once to equilibrium
    assert engine.started == 8  # four replicas at two temperatures


def test_an_engine_that_breaks_down_fails(tmp_path: Path) -> None:
    class Broken(Named):
        def run(self, dynamics: Dynamics, file: Path) -> Trajectory:
            raise SimulationError("step 7: atoms 0 and 1 coincide")

    broken, core = Broken("mine", molecules()), Named("core", molecules())
    for check in (check_ensemble, check_temperatures):
        result = check(broken, core, BRIEF, tmp_path, CHOICE)
        assert result.verdict == "fail"
        assert "atoms 0 and 1 coincide" in result.detail


def test_ensembles_have_a_temperature(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="temperature None"):
        run_replicas(Named("mine", molecules()), replace(BRIEF, temperature=None), CHOICE, tmp_path)


def test_stiffness_of_a_harmonic_well(tmp_path: Path) -> None:
    """<F²> = k · k_B T in each direction, so that Σ ω² = 3 k/m."""

    def well(structure: Structure) -> Result:
        forces = -2.0 * structure.positions
        return Result(0.0, np.zeros(len(forces)), forces, np.zeros((3, 3)))

    start = replace(BRIEF, structure=replace(BRIEF.structure, positions=np.zeros((18, 3))), steps=20_000, every=20)
    runs = run_replicas(Named("mine", well), start, EnsembleOptions(replicas=1), tmp_path)
    many = [first_frames for run in runs for first_frames in _split(run, 50)]
    found = mean_square_frequencies(well, many, start)
    np.testing.assert_allclose(found * start.masses / ACCELERATION, 6.0, rtol=0.5)
    assert found.mean() == pytest.approx(np.mean(6.0 * ACCELERATION / start.masses), rel=0.1)


def _split(run: Trajectory, parts: int) -> list[Trajectory]:
    return [
        replace(run, times=t, positions=x)
        for t, x in zip(np.array_split(run.times, parts), np.array_split(run.positions, parts), strict=True)
    ]


def test_ase_samples_too(tmp_path: Path, require_engine: Any) -> None:
    """A real adapter, too short for a verdict."""
    require_engine("ase")
    from mlff_ase.engine import ASEEngine

    artifact = argon_artifact(tmp_path)
    engine = ASEEngine(artifact, folder=tmp_path / "ase")
    start = replace(LIQUID, steps=40, every=4)
    result = check_ensemble(engine, CoreEngine(argon()), start, tmp_path / "runs")
    assert result.verdict == "inconclusive"
    assert len(list((tmp_path / "runs").glob(f"ase-*-?{engine.suffix}"))) == 4
