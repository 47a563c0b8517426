"""The potential "mlff" of OpenMM-ML: whole Systems and mixed ones."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import students
from mlff_engines.artifact import load
from mlff_engines.checkpoint import Domain, load_checkpoint, save_checkpoint
from mlff_engines.errors import ArtifactError, ConfigError, MLFFError, StructureError
from mlff_engines.export import export
from mlff_engines.manifest import Dtype
from mlff_engines.models.registry import build_model, model_config
from mlff_engines.structure import Result, Structure
from mlff_engines.units import ENERGY
from mlff_engines.validation.result import Claims
from mlff_engines.validation.static.parity import reference
from requirements import REPOSITORY, require_engine, require_platform

require_engine("openmm")

import openmm  # noqa: E402
import torch  # noqa: E402
from openmm import app, unit  # noqa: E402
from openmmml import MLPotential  # noqa: E402

from mlff_openmm import end_points  # noqa: E402
from mlff_openmm.end_points import check_end_points  # noqa: E402
from mlff_openmm.force import Compute  # noqa: E402

Solvated = tuple[app.Topology, openmm.System, np.ndarray]
PEPTIDE = list(range(22))
E0 = {"H": -13.6, "C": -1029.0, "N": -1485.0, "O": -2041.0}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained, for the elements of a peptide."""
    folder = tmp_path_factory.mktemp("student")
    config = model_config({"features": 16, "interactions": 2, "cutoff": 4.0})
    torch.manual_seed(0)
    model = build_model(config, list(E0), E0, scale=1.0).eval()
    save_checkpoint(folder / "best", model, config, Domain(elements=list(E0)), {"teacher": "none", "frames": {}})
    export([folder / "best"], folder / "student.pt", dtype="float64")
    return folder / "student.pt"


@pytest.fixture(scope="module")
def potential(student: Path) -> MLPotential:
    return MLPotential("mlff", model=student)


@pytest.fixture(scope="module")
def alanine() -> app.PDBFile:
    return app.PDBFile(str(REPOSITORY / "examples" / "alanine_dipeptide.pdb"))


@pytest.fixture(scope="module")
def solvated(alanine: app.PDBFile) -> Solvated:
    """Topology, classical System and positions (nm) of the dipeptide in a box of water."""
    field = app.ForceField("amber14-all.xml", "amber14/tip3p.xml")
    modeller = app.Modeller(alanine.topology, alanine.positions)
    modeller.addSolvent(field, boxSize=1.7 * openmm.Vec3(1, 1, 1) * unit.nanometer)
    system = field.createSystem(
        modeller.topology,
        nonbondedMethod=app.PME,
        nonbondedCutoff=0.8 * unit.nanometer,
        constraints=app.HBonds,
        ewaldErrorTolerance=1e-6,
    )
    return modeller.topology, system, np.array(modeller.positions.value_in_unit(unit.nanometer))


def evaluated(
    system: openmm.System, positions: Any, *, groups: set[int] | None = None, **parameters: float
) -> tuple[float, np.ndarray]:
    """Energy in kJ/mol and forces in kJ/mol/nm."""
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
    context.setPositions(positions)
    for name, value in parameters.items():
        context.setParameter(name, value)
    state = context.getState(energy=True, forces=True, groups=-1 if groups is None else groups)
    forces = state.getForces(asNumpy=True).value_in_unit(unit.kilojoules_per_mole / unit.nanometer)
    return state.getPotentialEnergy().value_in_unit(unit.kilojoules_per_mole), forces


def bare(student: Path, topology: app.Topology, positions: np.ndarray, atoms: list[int]) -> tuple[float, np.ndarray]:
    """The student alone on these atoms, in OpenMM's units."""
    numbers = np.array([atom.element.atomic_number for atom in topology.atoms()])
    result = load(student).evaluator(skin=0.0)(Structure(numbers[atoms], 10 * positions[atoms]))
    return result.energy / ENERGY["kJ/mol"], result.forces * 10 / ENERGY["kJ/mol"]


def test_openmm_ml_finds_it_and_stays_light() -> None:
    program = (
        "import sys, openmmml\n"
        "assert 'mlff' in openmmml.MLPotential._implFactories\n"
        "heavy = {'torch', 'mlff_engines.artifact', 'vesin', 'ase'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_force_needs_no_openmm_ml() -> None:
    program = "import sys; sys.modules['openmmml'] = None; from mlff_openmm import MLFFForce"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_create_system(potential: MLPotential, student: Path, alanine: app.PDBFile) -> None:
    system = potential.createSystem(alanine.topology, skin=0.1)
    energy, forces = evaluated(system, alanine.positions)
    expected = bare(student, alanine.topology, alanine.getPositions(asNumpy=True)._value, PEPTIDE)
    assert energy == pytest.approx(expected[0], abs=1e-8)
    assert np.allclose(forces, expected[1], atol=1e-7)
    # options may stand in either place
    single = MLPotential("mlff", model=student, precision="single").createSystem(alanine.topology)
    assert energy != evaluated(single, alanine.positions)[0] == pytest.approx(energy, abs=1e-2)
    again = MLPotential("mlff", model=student, precision="single").createSystem(alanine.topology, precision="double")
    assert evaluated(again, alanine.positions)[0] == energy


def test_mixed_system_in_a_periodic_box(
    potential: MLPotential,
    student: Path,
    alanine: app.PDBFile,
    solvated: Solvated,
) -> None:
    """Without the classical terms inside the peptide and with the student's, to the last digit that PME leaves."""
    topology, classical, positions = solvated
    mixed = potential.createMixedSystem(topology, classical, PEPTIDE, forceGroup=3)
    whole, whole_forces = evaluated(classical, positions)
    field = app.ForceField("amber14-all.xml")
    alone = field.createSystem(alanine.topology, nonbondedMethod=app.NoCutoff, constraints=app.HBonds)
    own, own_forces = evaluated(alone, positions[PEPTIDE])
    ml, ml_forces = bare(student, topology, positions, PEPTIDE)
    energy, forces = evaluated(mixed, positions)
    expected = whole_forces.copy()
    expected[PEPTIDE] += ml_forces - own_forces
    assert energy == pytest.approx(whole - own + ml, abs=1e-3)
    assert np.abs(forces - expected).max() < 1e-3 < np.abs(ml_forces - own_forces).max()
    assert evaluated(mixed, positions, groups={3})[0] == pytest.approx(ml, abs=1e-7)


def test_interpolation_ends_at_either_system(potential: MLPotential, solvated: Solvated) -> None:
    topology, classical, positions = solvated
    between = potential.createMixedSystem(topology, classical, PEPTIDE, interpolate=True)
    ends = [
        evaluated(classical, positions),
        evaluated(potential.createMixedSystem(topology, classical, PEPTIDE), positions),
    ]
    for end, weight in enumerate((0.0, 1.0)):
        energy, forces = evaluated(between, positions, lambda_interpolate=weight)
        assert energy == pytest.approx(ends[end][0], abs=1e-4)
        assert np.abs(forces - ends[end][1]).max() < 1e-3
    energy, _ = evaluated(between, positions, lambda_interpolate=0.25)
    assert energy == pytest.approx(0.75 * ends[0][0] + 0.25 * ends[1][0], abs=1e-4)


def test_constraints_of_the_ml_atoms_go_unless_kept(potential: MLPotential, solvated: Solvated) -> None:
    topology, classical, _ = solvated
    hydrogens = 12
    all_of_them = classical.getNumConstraints()
    assert potential.createMixedSystem(topology, classical, PEPTIDE).getNumConstraints() == all_of_them - hydrogens
    kept = potential.createMixedSystem(topology, classical, PEPTIDE, removeConstraints=False)
    assert kept.getNumConstraints() == all_of_them


@pytest.mark.parametrize("name", ["CPU", "OpenCL", "CUDA"])
def test_mixed_dynamics_conserves_energy(potential: MLPotential, solvated: Solvated, name: str) -> None:
    """On the platforms that call the force from a thread of their own."""
    require_platform(name)
    topology, classical, positions = solvated
    system = potential.createMixedSystem(topology, classical, PEPTIDE)

    def started(name: str, positions: Any, **options: str) -> openmm.Context:
        integrator = openmm.VerletIntegrator(0.0002)
        context = openmm.Context(system, integrator, openmm.Platform.getPlatform(name), options)
        context.setPositions(positions)
        return context

    relaxed = started("CPU", positions, Threads="1")  # OpenMM's own minimiser ends the process on OpenCL by pocl
    openmm.LocalEnergyMinimizer.minimize(relaxed, 100.0, 30)
    context = started(name, relaxed.getState(positions=True).getPositions())
    context.setVelocitiesToTemperature(300, 1)
    context.getIntegrator().step(5)
    totals = []
    for _ in range(5):
        context.getIntegrator().step(5)
        state = context.getState(energy=True)
        totals.append((state.getPotentialEnergy() + state.getKineticEnergy()).value_in_unit(unit.kilojoules_per_mole))
    assert np.ptp(totals) < 5.0  # of some 1000 kJ/mol that go to and fro


def test_a_cut_bond_gets_a_link_atom(potential: MLPotential, solvated: Solvated) -> None:
    """Hydrogens of OpenMM-ML, which the student sees as the last of its atoms."""
    topology, classical, positions = solvated
    residue = list(range(6, 16))
    made = potential.createMixedSystem(
        topology, classical, residue, returnInfo=True, linkAtomDistances=[(6, 4, 0.1 * unit.nanometer)]
    )
    system = made["system"]
    extra = system.getNumParticles() - classical.getNumParticles()
    assert extra == 2
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
    context.setPositions(np.vstack([positions, np.zeros((extra, 3))]))
    context.computeVirtualSites()
    state = context.getState(positions=True, energy=True)
    assert np.isfinite(state.getPotentialEnergy()._value)
    placed = state.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
    assert min(np.linalg.norm(placed[-extra:] - placed[6], axis=1)) == pytest.approx(0.1)


def test_long_range(student: Path, potential: MLPotential, solvated: Solvated) -> None:
    """Every model ends at its cutoff, so that the classical force field keeps the images of the ML atoms."""
    assert potential._impl.getMLLongRange() is False
    with pytest.raises(ValueError, match="does not support the mlLongRange option"):
        potential.createMixedSystem(*solvated[:2], PEPTIDE, mlLongRange=True)


def test_two_potentials(potential: MLPotential, solvated: Solvated) -> None:
    """On different atoms they add up; on the same they would count them twice."""
    topology, classical, positions = solvated
    first = potential.createMixedSystem(topology, classical, PEPTIDE)
    both = potential.createMixedSystem(topology, first, [22, 23, 24])
    water = potential.createMixedSystem(topology, classical, [22, 23, 24])
    energies = [evaluated(system, positions)[0] for system in (classical, first, water, both)]
    assert energies[3] - energies[2] == pytest.approx(energies[1] - energies[0], abs=1e-3)
    with pytest.raises(ConfigError, match=r"already has an mlff potential on 22 of these atoms \(the first is 0\)"):
        potential.createMixedSystem(topology, first, [22, 23, 24, *PEPTIDE])
    between = potential.createMixedSystem(topology, classical, PEPTIDE, interpolate=True)
    with pytest.raises(ConfigError, match="already has an mlff potential on 22 of these atoms"):
        potential.createMixedSystem(topology, between, PEPTIDE)
    whole = potential.createSystem(topology)
    with pytest.raises(ConfigError, match="already has an mlff potential"):
        potential._impl.addForces(topology, whole, None, 0)


@pytest.mark.fault("M4")
def test_unknown_options_are_refused_by_name(
    potential: MLPotential,
    student: Path,
    alanine: app.PDBFile,
    solvated: Solvated,
) -> None:
    with pytest.raises(ConfigError, match="unknown option 'modle'; did you mean 'model'"):
        MLPotential("mlff", modle=student)
    with pytest.raises(ConfigError, match="unknown option 'devise'; did you mean 'device'"):
        MLPotential("mlff", model=student, devise="cpu")
    with pytest.raises(ConfigError, match="unknown option 'skinn'; did you mean 'skin'"):
        potential.createSystem(alanine.topology, skinn=0.1)
    with pytest.raises(ConfigError, match="unknown option 'linkAtomDistances'; allowed: charge, "):
        potential.createSystem(alanine.topology, linkAtomDistances=[])
    with pytest.raises(ConfigError, match="unknown option 'chargee'; did you mean 'charge'"):
        potential.createMixedSystem(*solvated[:2], PEPTIDE, chargee=1)


@pytest.mark.fault("A1", "S1", "S12")
def test_bad_input(
    potential: MLPotential,
    tmp_path: Path,
    alanine: app.PDBFile,
    solvated: Solvated,
) -> None:
    topology, classical, _ = solvated
    with pytest.raises(ConfigError, match=r'needs an artifact: MLPotential\("mlff", model="student\.pt"\)'):
        MLPotential("mlff")
    with pytest.raises(ArtifactError, match="no artifact at"):
        MLPotential("mlff", model=tmp_path / "absent.pt")
    with pytest.raises(StructureError, match=r"does not know N \(atoms"):
        MLPotential("mlff", model=students.artifact(tmp_path)).createSystem(alanine.topology)
    with pytest.raises(StructureError, match="charge 1 is not supported"):
        potential.createMixedSystem(topology, classical, PEPTIDE, charge=1)
    with pytest.raises(ConfigError, match="no atom at all"):
        potential.createMixedSystem(topology, classical, [])
    # OpenMM-ML itself trips over these when the System has a NonbondedForce
    for atoms in ([len(solvated[2])], [-1]):
        with pytest.raises((MLFFError, openmm.OpenMMException), match=r"range|atoms names"):
            potential.createMixedSystem(topology, classical, atoms)
    boxless = app.Modeller(topology, solvated[2] * unit.nanometer).topology
    boxless.setPeriodicBoxVectors(None)
    with pytest.raises(ConfigError, match=r"its Topology has no box; call topology\.setPeriodicBoxVectors"):
        potential.createMixedSystem(boxless, classical, PEPTIDE)


def end_points_of(folder: Path, dtype: Dtype = "float64", **options: Any) -> Any:
    path = students.artifact(folder, dtype=dtype)
    exact, _ = load_checkpoint(folder / "member-0")
    manifest = load(path).manifest
    return check_end_points(path, reference(exact, manifest.cutoff), Claims.of(manifest), **options)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_end_points_of_mixed_systems(tmp_path: Path, dtype: Dtype) -> None:
    result = end_points_of(tmp_path, dtype)
    assert result.passed, result
    assert result.figure > 0


@pytest.mark.parametrize("bug", ["order", "units", "own terms left in", "box ignored", "refusal"])
def test_wrong_end_points_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    init, call = Compute.__post_init__, Compute.__call__
    if bug == "order":
        monkeypatch.setattr(Compute, "__post_init__", lambda self: (self.numbers.reverse(), init(self))[1])
    elif bug == "units":
        monkeypatch.setattr(Compute, "__call__", lambda self, state: tuple(1.000001 * x for x in call(self, state)))
    elif bug == "own terms left in":
        alone = end_points._alone

        def half(*args: Any) -> Result:
            result = alone(*args)
            return replace(result, energy=0.5 * result.energy)

        monkeypatch.setattr(end_points, "_alone", half)
    elif bug == "box ignored":
        monkeypatch.setattr(Compute, "__post_init__", lambda self: (setattr(self, "periodic", False), init(self))[1])
    elif bug == "refusal":
        result = end_points_of(tmp_path, charge=3)
        assert result.verdict == "fail"
        assert "charge 3 is not supported" in result.detail
        return
    assert end_points_of(tmp_path).verdict == "fail"
