"""LAMMPS as the judge sees it, on the plug-in of the wheel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import decks
import students
from mlff_engines.artifact import load
from mlff_engines.structure import Result, Structure
from mlff_engines.validation.core_engine import CoreEngine
from mlff_engines.validation.dynamics.constant_energy import Options, check_dynamics, starting
from mlff_engines.validation.result import STATIC, Claims
from mlff_engines.validation.static.conformance import check_model
from mlff_engines.validation.static.parity import reference
from mlff_engines.validation.static.systems import crystal
from mlff_lammps.engine import LAMMPSEngine
from mlff_lammps.ranks import check_ranks
from requirements import require_engine

require_engine("lammps")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    decks.make_deck(tmp_path_factory.mktemp("deck"))
    return students.artifact(tmp_path_factory.mktemp("student"), features=8)


@pytest.fixture
def make(student: Path, tmp_path: Path) -> Callable[[int, str], LAMMPSEngine]:
    def made(ranks: int, grid: str) -> LAMMPSEngine:
        folder = tmp_path / f"{ranks} {grid}".replace("*", "n")  # LAMMPS puts the step in place of a star
        return LAMMPSEngine(student, folder=folder, ranks=ranks, processors=grid)

    return made


@pytest.mark.check("S1", "S2", "S3", "S4", "S5", "S6", "S7", "S9", "S10")
def test_static_checks(student: Path, tmp_path: Path) -> None:
    """All but S8, which is of the neighbour search of the core."""
    engine, artifact = LAMMPSEngine(student, folder=tmp_path), load(student)
    claims = replace(Claims.of(artifact.manifest), offers=engine.offers)
    expected = reference(artifact.eager(), claims.cutoff)
    codes = [code for code in STATIC if code != "S8"]
    results = check_model(engine.evaluate, claims, reference=expected, only=codes)
    assert [(r.code, r.verdict, r.detail) for r in results if not r.passed] == []
    assert [r.code for r in results] == codes
    engine.close()


def test_stress_is_that_of_ase(student: Path, tmp_path: Path) -> None:
    """The same crystal through either engine: components, sign and units of the stress."""
    require_engine("ase")
    from mlff_ase.engine import ASEEngine

    structure = crystal(Claims.of(load(student).manifest))
    engine = LAMMPSEngine(student, folder=tmp_path)
    found, expected = engine.evaluate(structure).stress, ASEEngine(student, folder=tmp_path).evaluate(structure).stress
    assert found is not None
    assert expected is not None
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)
    engine.close()


def test_same_trajectory_as_the_eager_model(student: Path, tmp_path: Path) -> None:
    artifact = load(student)
    core = CoreEngine(artifact.evaluator(outside="ignore"))
    start = starting(core, crystal(Claims.of(artifact.manifest)), 50.0)
    engine = LAMMPSEngine(student, folder=tmp_path)
    [found] = check_dynamics(engine, core, start, tmp_path, Options(same=50), only=["M3"])
    assert found.passed, found
    engine.close()


@pytest.mark.slow
def test_ranks(make: Callable[[int, str], LAMMPSEngine], student: Path) -> None:
    claims = replace(Claims.of(load(student).manifest), offers=LAMMPSEngine.offers)
    found = check_ranks(make, claims)
    assert found.passed, found


def test_a_halo_that_is_too_short_is_caught(make: Callable[[int, str], LAMMPSEngine], student: Path) -> None:
    """The bug: on several processes, forces that lack what ghosts send home."""

    class Short:
        def __init__(self, ranks: int, grid: str) -> None:
            self.ranks, self.engine = ranks, make(1, "* * *")

        def evaluate(self, structure: Structure) -> Result:
            found = self.engine.evaluate(structure)
            return found if self.ranks == 1 else replace(found, forces=found.forces * (1 + 1e-6))

        def close(self) -> None:
            self.engine.close()

    claims = replace(Claims.of(load(student).manifest), offers=LAMMPSEngine.offers)
    found = check_ranks(Short, claims)
    assert found.verdict == "fail"
    assert "forces of" in found.detail
