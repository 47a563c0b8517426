"""OpenMM as the judge's engine: what it evaluates and integrates is what the eager core does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import students
from mlff_engines.artifact import Artifact, load
from mlff_engines.checkpoint import load_checkpoint
from mlff_engines.errors import SimulationError, StructureError
from mlff_engines.manifest import Dtype
from mlff_engines.structure import Structure
from mlff_engines.units import BOLTZMANN
from mlff_engines.validation.core_engine import CoreEngine
from mlff_engines.validation.engine import Dynamics, kinetic_energy, thermal
from mlff_engines.validation.result import STATIC, Claims
from mlff_engines.validation.static.conformance import check_model
from mlff_engines.validation.static.parity import check_parity, reference
from mlff_engines.validation.static.systems import cluster, crystal, systems
from requirements import require_engine, require_package

require_engine("openmm")

import openmm  # noqa: E402

from mlff_openmm import engine as module  # noqa: E402
from mlff_openmm.boxes import Box  # noqa: E402
from mlff_openmm.engine import OpenMMEngine  # noqa: E402
from mlff_openmm.force import Compute  # noqa: E402

# every axis tilted, left-handed, far from reduced
SKEWED = np.array([[3.0, 1.0, 0.5], [4.0, 5.0, -1.0], [1.0, 6.0, -7.0]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("students")
    for dtype in ("float64", "float32"):
        students.artifact(made, dtype=dtype)
    return made


def engine_of(folder: Path, dtype: Dtype = "float64", **options: object) -> OpenMMEngine:
    return OpenMMEngine(folder / f"student-{dtype}.pt", folder=folder, **options)


def claims_of(folder: Path, dtype: Dtype = "float64") -> Claims:
    manifest = load(folder / f"student-{dtype}.pt").manifest
    return replace(Claims.of(manifest), offers=OpenMMEngine.offers)


def started(folder: Path, structure: Structure | None = None, **settings: float) -> Dynamics:
    """Short steps: an untrained student's slopes are steep."""
    start = structure or cluster(claims_of(folder), 9)
    given = {"timestep": 0.1, "steps": 50, "every": 10} | settings
    return thermal(Dynamics(start, np.zeros((len(start), 3)), **given), 300.0, seed=1)


@pytest.mark.check("S1", "S2", "S3", "S5", "S6", "S7", "S8", "S9", "S10")
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_static_checks(folder: Path, dtype: Dtype) -> None:
    engine = engine_of(folder, dtype)
    claims = claims_of(folder, dtype)
    eager, _ = load_checkpoint(folder / "member-0")
    results = check_model(
        engine.evaluate,
        claims,
        reference=reference(eager, claims.cutoff),
        upcast=engine_of(folder, dtype="float64").evaluate,
    )
    assert {result.code for result in results} == set(STATIC) - {"S4"}  # OpenMM asks no force for its virial
    assert [result for result in results if not result.passed] == []
    assert engine.dtype == dtype


@pytest.mark.parametrize("bug", ["nm for Å", "swapped species", "images lost", "box not turned"])
def test_wrong_engines_are_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    claims = claims_of(folder)
    eager, _ = load_checkpoint(folder / "member-0")
    expected = reference(eager, claims.cutoff)
    structures = {name: made for name, made in systems(claims).items() if "isolated" not in name}
    structures["skewed box"] = replace(crystal(claims), cell=SKEWED)
    assert check_parity(engine_of(folder).evaluate, expected, claims, structures).passed
    if bug == "nm for Å":
        monkeypatch.setattr(module, "FORCE", module.FORCE * module.NM)
    elif bug == "swapped species":
        element = module.app.Element.getByAtomicNumber
        monkeypatch.setattr(module.app.Element, "getByAtomicNumber", lambda z: element({1: 6, 6: 1}.get(z, z)))
    elif bug == "images lost":
        monkeypatch.setattr(module.Box, "of", classmethod(lambda cls, *_, **__: cls(None, np.eye(3))))
    elif bug == "box not turned":
        of = Box.of
        monkeypatch.setattr(
            module.Box, "of", classmethod(lambda cls, *a, **k: replace(of(*a, **k), rotation=np.eye(3)))
        )
    assert not check_parity(engine_of(folder).evaluate, expected, claims, structures).passed


@pytest.mark.parametrize("cell", [SKEWED, -SKEWED, 2 * (1 - np.eye(3)), np.diag([5.0, -6.0, 7.0])], ids=str)
def test_boxes_are_the_same_lattice_in_the_form_of_openmm(cell: np.ndarray) -> None:
    box = Box.of(Structure(np.array([6]), np.zeros((1, 3)), cell, np.ones(3, dtype=bool)), 0.0)
    assert box.vectors is not None
    assert np.allclose(box.rotation @ box.rotation.T, np.eye(3), atol=1e-14)
    assert np.linalg.det(box.rotation) == pytest.approx(1.0)
    whole = np.linalg.solve(cell.T, (box.vectors @ box.rotation.T).T)  # lattice vectors in terms of the cell's
    assert np.allclose(whole, np.round(whole), atol=1e-12)
    assert abs(np.linalg.det(whole)) == pytest.approx(1.0)
    openmm.System().setDefaultPeriodicBoxVectors(*box.vectors)  # which refuses what is not reduced


@pytest.mark.parametrize("periodic", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_same_trajectory_as_the_eager_core(folder: Path, tmp_path: Path, dtype: Dtype, periodic: bool) -> None:
    structure = replace(crystal(claims_of(folder)), cell=2 * SKEWED) if periodic else None
    dynamics = started(folder, structure)
    found = engine_of(folder, dtype).run(dynamics, tmp_path / "found.dcd")
    eager: Artifact = load(folder / "student-float64.pt")
    expected = CoreEngine(eager.evaluator(skin=0.0, outside="ignore")).run(dynamics, tmp_path / "expected.npz")
    tolerance = 1e-6 if dtype == "float64" else 1e-4
    assert np.abs(expected.positions[-1] - expected.positions[0]).max() > 0.02
    assert (found.times == expected.times).all()
    for name in ("positions", "velocities", "kinetic"):
        assert np.abs(getattr(found, name) - getattr(expected, name)).max() < tolerance, name
    assert np.abs(found.potential - expected.potential).max() < 30 * tolerance
    assert found.pressure is None


def test_energies_belong_to_the_sampled_positions(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And cost nothing: one evaluation per step, one to start with and one for the energy at the start."""
    calls, call = [], Compute.__call__
    engine, dynamics = engine_of(folder), started(folder, steps=12, every=3)
    monkeypatch.setattr(Compute, "__call__", lambda self, state: calls.append(1) or call(self, state))
    found = engine.run(dynamics, tmp_path / "nve.dcd")
    assert len(calls) == 12 + 2
    for positions, velocities, potential, kinetic in zip(
        found.positions, found.velocities, found.potential, found.kinetic, strict=True
    ):
        evaluated = engine.evaluate(replace(dynamics.structure, positions=positions))
        assert potential == pytest.approx(evaluated.energy, abs=1e-9)
        assert kinetic == pytest.approx(kinetic_energy(velocities, dynamics.masses), rel=1e-8)


@pytest.mark.parametrize("temperature", [None, 300.0])
def test_native_trajectory_holds_the_frames(folder: Path, tmp_path: Path, temperature: float | None) -> None:
    mdtraj = require_package("mdtraj", "openmm")
    dynamics = started(folder, steps=20, every=5, temperature=temperature)
    found = engine_of(folder).run(dynamics, tmp_path / "run.dcd")
    assert found.file == tmp_path / "run.dcd"
    with mdtraj.formats.DCDTrajectoryFile(str(found.file)) as file:
        frames, _, _ = file.read()
    assert frames.shape == found.positions.shape == (5, 9, 3)
    assert np.abs(frames - found.positions).max() < 1e-5


def test_langevin_has_its_temperature_and_its_seed(folder: Path, tmp_path: Path) -> None:
    dynamics = started(folder, steps=300, every=1, timestep=0.5, temperature=300.0, friction=1000.0)
    engine = engine_of(folder)
    first = engine.run(dynamics, tmp_path / "first.dcd")
    again = engine.run(replace(dynamics, steps=10), tmp_path / "again.dcd")
    other = engine.run(replace(dynamics, steps=10, seed=1), tmp_path / "other.dcd")
    assert (first.positions[:11] == again.positions).all()
    assert not (first.positions[10] == other.positions[10]).any()
    # velocities forget within 2 steps: some 100 independent samples of 27 degrees of freedom, 5 standard errors
    mean = 2 * first.kinetic[20:].mean() / (27 * BOLTZMANN)
    assert mean == pytest.approx(300.0, abs=45.0)


@pytest.mark.fault("S10")
def test_slabs_are_evaluated_but_not_run(folder: Path, tmp_path: Path) -> None:
    slab = systems(claims_of(folder))["slab"]
    engine = engine_of(folder)
    expected = load(folder / "student-float64.pt").evaluator(skin=0.0)(slab)
    assert engine.evaluate(slab).energy == pytest.approx(expected.energy, abs=1e-10)
    with pytest.raises(SimulationError, match="periodic along three axes or none"):
        engine.run(started(folder, slab), tmp_path / "slab.dcd")


def test_refusals_are_ours(folder: Path, tmp_path: Path) -> None:
    engine = engine_of(folder)
    with pytest.raises(StructureError, match="does not know Cl"):
        engine.evaluate(Structure(np.array([17]), np.zeros((1, 3))))
    with pytest.raises(StructureError, match="coincide"):
        engine.evaluate(Structure(np.array([6, 6]), np.zeros((2, 3))))
    with pytest.raises(StructureError, match="no particles"):
        engine.evaluate(Structure(np.zeros(0, dtype=np.int64), np.zeros((0, 3))))


def test_a_run_that_fails_leaves_its_frames(folder: Path, tmp_path: Path) -> None:
    mdtraj = require_package("mdtraj", "openmm")
    dynamics = started(folder, timestep=0.2, steps=50, every=1)
    hurled = dynamics.velocities.copy()
    hurled[3] = (1e304, 0, 0)  # Å/fs
    with pytest.raises(SimulationError, match=r"after 1 samples: .*not finite"):
        engine_of(folder).run(replace(dynamics, velocities=hurled, timestep=1e8), tmp_path / "lost.dcd")
    with mdtraj.formats.DCDTrajectoryFile(str(tmp_path / "lost.dcd")) as file:
        assert len(file.read()[0]) == 1


def test_versions(folder: Path) -> None:
    assert engine_of(folder).versions()["openmm"] == openmm.__version__
