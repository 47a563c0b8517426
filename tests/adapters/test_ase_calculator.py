"""The ASE calculator: translation only, nothing shared, nothing forgotten."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from ase.calculators.singlepoint import PropertyNotImplementedError
from ase.md.verlet import VelocityVerlet

import students
from mlff_ase import MLFFCalculator
from mlff_ase.structures import read, to_structure
from mlff_engines.artifact import load
from mlff_engines.checkpoint import Domain
from mlff_engines.errors import ArtifactError, ExtrapolationWarning, StructureError


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return students.artifact(tmp_path_factory.mktemp("student"))


@pytest.fixture
def ethanol(student: Path) -> Atoms:
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.05, seed=1)
    atoms.calc = MLFFCalculator(student)
    return atoms


def crystal(student: Path) -> Atoms:
    atoms = bulk("C", "diamond", a=3.6) * (2, 1, 1)
    atoms.symbols[0] = "O"
    atoms.rattle(0.1, seed=2)
    atoms.calc = MLFFCalculator(student)
    return atoms


def test_forces_and_stress_are_derivatives_of_the_energy(ethanol: Atoms, student: Path) -> None:
    assert np.allclose(ethanol.get_forces(), calculate_numerical_forces(ethanol, eps=1e-4), atol=1e-6)
    atoms = crystal(student)
    numerical = calculate_numerical_stress(atoms, eps=1e-5)
    assert np.abs(numerical).max() > 1e-3
    assert np.allclose(atoms.get_stress(), numerical, atol=1e-7)
    assert np.allclose(atoms.get_forces(), calculate_numerical_forces(atoms, eps=1e-4), atol=1e-6)


def test_results_are_those_of_the_bare_artifact(ethanol: Atoms, student: Path) -> None:
    result = load(student).evaluator()(to_structure(ethanol))
    assert ethanol.get_potential_energy() == result.energy
    assert ethanol.get_potential_energy(force_consistent=True) == result.energy
    assert (ethanol.get_forces() == result.forces).all()
    assert (ethanol.get_potential_energies() == result.energies).all()
    assert ethanol.get_potential_energies().sum() == pytest.approx(result.energy, abs=1e-9)


def test_no_stress_without_three_periodic_axes(ethanol: Atoms) -> None:
    with pytest.raises(PropertyNotImplementedError):
        ethanol.get_stress()


def test_float32_and_float64_agree_and_either_can_be_asked_for(ethanol: Atoms, student: Path) -> None:
    exact = ethanol.get_forces()
    single = ethanol.copy()
    single.calc = MLFFCalculator(student, dtype="float32")
    assert 0 < np.abs(single.get_forces() - exact).max() < 5e-5
    assert single.get_potential_energy() == pytest.approx(ethanol.get_potential_energy(), abs=1e-4)


def test_neighbour_list_is_reused_within_the_skin(ethanol: Atoms) -> None:
    ethanol.set_velocities(0.02 * np.random.default_rng(3).standard_normal((9, 3)))
    VelocityVerlet(ethanol, 0.1 * units.fs).run(10)
    neighbors = ethanol.calc._evaluate.neighbors
    assert neighbors.builds == 1
    ethanol.positions[3] += 0.4
    ethanol.get_forces()
    assert neighbors.builds == 2
    # and what it gives is what a fresh search gives
    fresh = ethanol.copy()
    fresh.calc = MLFFCalculator(ethanol.calc._path, skin=0.0)
    assert np.allclose(ethanol.get_forces(), fresh.get_forces(), atol=1e-12)


def test_instances_share_no_state(student: Path) -> None:
    one, two = MLFFCalculator(student), MLFFCalculator(student)
    small, large = molecule("H2O"), molecule("CH3CH2OH")
    small.calc, large.calc = one, two
    before = small.get_forces()
    large.get_forces()
    assert (small.get_forces() == before).all()
    assert one._evaluate.neighbors is not two._evaluate.neighbors
    # one calculator moved from structure to structure
    large.calc = one
    assert np.array_equal(large.get_forces(), two.get_forces(large))


def test_pickle_and_deepcopy_carry_path_and_hash_only(ethanol: Atoms, student: Path, tmp_path: Path) -> None:
    stored = pickle.dumps(ethanol.calc)
    assert len(stored) < 1000
    again = ethanol.copy()
    again.calc = pickle.loads(stored)
    assert (again.get_forces() == ethanol.get_forces()).all()
    assert copy.deepcopy(ethanol.calc).artifact.manifest == ethanol.calc.artifact.manifest

    moving = tmp_path / "moving.pt"
    moving.write_bytes(student.read_bytes())
    stored = pickle.dumps(MLFFCalculator(moving))
    students.artifact(tmp_path / "other", dtype="float32").rename(moving)
    with pytest.raises(ArtifactError, match="another artifact"):
        pickle.loads(stored)


def test_ensembles_tell_their_uncertainty(tmp_path: Path) -> None:
    path = students.artifact(tmp_path, members=3)
    atoms = molecule("CH3CH2OH")
    atoms.calc = MLFFCalculator(path)
    atoms.get_forces()
    members = []
    for seed in range(3):
        member = atoms.copy()
        member.calc = MLFFCalculator(students.artifact(tmp_path / "alone" / str(seed), members=seed + 1))
        members.append(member)
    assert atoms.calc.results["force_std"].shape == (9,)
    assert atoms.calc.results["energy_std"] > 0
    assert (atoms.calc.results["force_std"] > 0).all()
    one = members[0]
    one.get_forces()
    assert "energy_std" not in one.calc.results


@pytest.mark.fault("S12")
def test_charge_is_refused_or_used_but_never_dropped(ethanol: Atoms, tmp_path: Path) -> None:
    ethanol.get_potential_energy()
    ethanol.info["charge"] = 1
    with pytest.raises(StructureError, match=r"charge 1 is not supported.*model\.charge: true"):
        ethanol.get_potential_energy()

    domain = Domain(elements=list(students.E0), charges=[0.0, 1.0])
    path = students.artifact(tmp_path, charge=True, domain=domain)
    ethanol.calc = MLFFCalculator(path)
    cation = ethanol.get_potential_energy()
    ethanol.info["charge"] = 0
    neutral = ethanol.get_potential_energy()
    assert cation != neutral
    ethanol.info["charge"] = -1
    with pytest.warns(ExtrapolationWarning, match="charge -1"):
        ethanol.get_potential_energy()


@pytest.mark.fault("S5")
def test_too_close_atoms_warn_or_stop(tmp_path: Path) -> None:
    domain = Domain(elements=list(students.E0), min_distances={"H-O": 0.9})
    path = students.artifact(tmp_path, domain=domain)
    water = molecule("H2O")
    water.calc = MLFFCalculator(path)
    water.get_forces()
    water.set_distance(0, 1, 0.7)
    with pytest.warns(ExtrapolationWarning, match=r"0\.700 Å apart; the shortest .* 0\.900"):
        water.get_forces()
    water.rattle(1e-3, seed=4)
    water.get_forces()  # once is enough: no second warning
    water.calc = MLFFCalculator(path, outside="error")
    with pytest.raises(StructureError, match="extrapolates"):
        water.get_forces()


def test_unknown_element_names_symbol_and_atoms(student: Path) -> None:
    atoms = molecule("CH3Cl")
    atoms.calc = MLFFCalculator(student)
    with pytest.raises(StructureError, match=r"does not know Cl \(atoms 1\); it was trained for H, C, O"):
        atoms.get_potential_energy()


def test_structure_files(tmp_path: Path, student: Path) -> None:
    atoms = crystal(student)
    atoms.write(tmp_path / "crystal.xyz")
    (structure,) = read(tmp_path / "crystal.xyz")
    assert np.allclose(structure.positions, atoms.positions, atol=1e-7)
    assert structure.pbc.all()
    (tmp_path / "bad.xyz").write_text("three\n")
    with pytest.raises(StructureError, match="cannot read structures"):
        read(tmp_path / "bad.xyz")
