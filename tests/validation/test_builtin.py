"""Built-in systems: they are what their names say, and a model can be run on each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import students
from mlff_engines.artifact import load
from mlff_engines.checkpoint import Domain, save_checkpoint
from mlff_engines.errors import StructureError
from mlff_engines.export import export
from mlff_engines.models.registry import build_model, model_config
from mlff_engines.neighbors import neighbor_list
from mlff_engines.structure import MASSES, Structure
from mlff_engines.units import ATOMIC_MASS, BOLTZMANN
from mlff_engines.validation.builtin import argon_artifact, builtin_systems, named_system
from mlff_engines.validation.core_engine import CoreEngine
from mlff_engines.validation.engine import Dynamics, kinetic_energy, thermal

ETHENOL = Structure(
    np.array([6, 6, 8, 1, 1, 1, 1]),
    np.array(
        [
            [0.0, 0.0, 0.0],
            [1.33, 0.0, 0.0],
            [2.0, 1.15, 0.1],
            [-0.5, 0.9, 0.0],
            [-0.5, -0.9, 0],
            [1.85, -0.9, 0],
            [2.9, 1.0, 0],
        ]
    ),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact that recorded a training structure."""
    folder = tmp_path_factory.mktemp("trained")
    config = model_config({"features": 8, "interactions": 2, "cutoff": 4.0})
    model = build_model(config, list(students.E0), students.E0).eval()
    save_checkpoint(folder / "best", model, config, Domain(elements=list(students.E0)), {}, [ETHENOL])
    export([folder / "best"], folder / "student.pt", dtype="float64")
    return folder / "student.pt"


def density(structure: Structure) -> float:
    """g/cm³."""
    assert structure.volume is not None
    return float(np.array(MASSES)[structure.numbers].sum()) * ATOMIC_MASS * 1e3 / (structure.volume * 1e-24)


def distances(structure: Structure, cutoff: float) -> np.ndarray:
    _, vectors = neighbor_list(structure.positions, structure.cell, structure.pbc, cutoff)
    return np.linalg.norm(vectors, axis=1)


def test_systems_of_a_student(trained: Path) -> None:
    artifact = load(trained)
    systems = builtin_systems(artifact)
    assert list(systems) == [
        "training-0",
        "periodic-box",
        "triclinic-box",
        "slab",
        "far-fragments",
        "water-64",
        "water-216",
        "crystal",
    ]
    evaluate = artifact.evaluator(outside="ignore")
    for name, system in systems.items():
        assert np.isfinite(evaluate(system.structure).energy), name
        assert len(system.structure) == 0 or distances(system.structure, 3.0).min() > 0.8, name
    np.testing.assert_array_equal(systems["training-0"].structure.positions, ETHENOL.positions)
    assert systems["slab"].structure.pbc.tolist() == [True, True, False]
    angles = systems["triclinic-box"].structure.cell
    assert abs(angles[0] @ angles[1]) > 0.1
    alone = evaluate(ETHENOL).energy
    assert evaluate(systems["far-fragments"].structure).energy == pytest.approx(2 * alone, abs=1e-9)
    assert abs(evaluate(systems["periodic-box"].structure).energy - alone) > 1e-6  # it feels its images


@pytest.mark.parametrize("molecules", [64, 216])
def test_water_has_its_density_and_its_bonds(trained: Path, molecules: int) -> None:
    box = named_system(f"water-{molecules}", load(trained)).structure
    assert len(box) == 3 * molecules
    assert density(box) == pytest.approx(0.997, rel=1e-4)
    bonded = distances(box, 1.2)
    assert len(bonded) == 2 * 2 * molecules  # either bond, from both its ends
    np.testing.assert_allclose(bonded, 0.9572, atol=1e-3)


def test_argon_is_a_liquid_that_runs(tmp_path: Path) -> None:
    artifact = load(argon_artifact(tmp_path))
    assert artifact.manifest.domain.elements == ["Ar"]
    systems = builtin_systems(artifact)
    system = systems["argon-108"]
    assert next(iter(systems.values())) == system
    assert density(system.structure) == pytest.approx(1.374, rel=1e-4)
    start = thermal(Dynamics(system.structure, np.zeros((108, 3)), 5.0, 20, 5), system.temperature, seed=1)
    assert kinetic_energy(start.velocities, start.masses) == pytest.approx(1.5 * 107 * BOLTZMANN * 94.4)
    trajectory = CoreEngine(artifact.evaluator()).run(start, tmp_path / "run.npz")
    assert np.ptp(trajectory.total) < 1e-3 * np.ptp(trajectory.kinetic) + 1e-4


def test_unknown_system(trained: Path) -> None:
    with pytest.raises(StructureError, match="no file and no built-in system 'water-65'; did you mean 'water-64'"):
        named_system("water-65", load(trained))
