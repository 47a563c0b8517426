"""The OpenMM force: translation only, safe to copy, to share and to store, and plain in its refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import forged
import students
from mlff_engines import neighbors
from mlff_engines.artifact import load
from mlff_engines.checkpoint import Domain
from mlff_engines.errors import ArtifactError, ConfigError, ExtrapolationWarning, MLFFError, StructureError
from mlff_engines.structure import Result, Structure
from mlff_engines.units import ENERGY, LENGTH
from requirements import PLATFORMS, require_engine, require_platform

require_engine("openmm")

import openmm  # noqa: E402
from ase.build import bulk, molecule  # noqa: E402
from openmm import app, unit  # noqa: E402

from mlff_openmm import MLFFForce  # noqa: E402
from mlff_openmm.force import Compute  # noqa: E402


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return students.artifact(tmp_path_factory.mktemp("student"))


def ethanol() -> Structure:
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.05, seed=1)
    return Structure(atoms.numbers, atoms.positions)


def crystal(repeat: int = 1) -> Structure:
    atoms = bulk("C", "diamond", a=3.6) * (repeat, repeat, repeat)
    atoms.symbols[0] = "O"
    atoms.rattle(0.05, seed=2)
    atoms.set_cell(atoms.cell.standard_form()[0], scale_atoms=True)  # as OpenMM wants it
    return Structure(atoms.numbers, atoms.positions, np.asarray(atoms.cell), atoms.pbc)


def topology_of(structure: Structure) -> app.Topology:
    topology = app.Topology()
    residue = topology.addResidue("MOL", topology.addChain())
    for number in structure.numbers:
        element = app.Element.getByAtomicNumber(int(number))
        topology.addAtom(element.symbol, element, residue)
    if structure.pbc.all():
        topology.setPeriodicBoxVectors(structure.cell * unit.angstrom)
    return topology


def system_of(structure: Structure, *forces: openmm.Force) -> openmm.System:
    system = openmm.System()
    for number in structure.numbers:
        system.addParticle(app.Element.getByAtomicNumber(int(number)).mass)
    if structure.pbc.all():
        system.setDefaultPeriodicBoxVectors(*structure.cell / LENGTH["nm"])
    for force in forces:
        system.addForce(force)
    return system


def with_force(structure: Structure, path: Path, **options: Any) -> openmm.System:
    return system_of(structure, MLFFForce(path, topology_of(structure), **options))


def verlet() -> openmm.Integrator:
    return openmm.VerletIntegrator(0.5 * unit.femtosecond)


def context_of(
    system: openmm.System,
    structure: Structure,
    platform: str = "Reference",
    integrator: openmm.Integrator | None = None,
) -> openmm.Context:
    context = openmm.Context(system, integrator or verlet(), openmm.Platform.getPlatform(platform))
    context.setPositions(structure.positions * unit.angstrom)
    return context


def energy_and_forces(context: openmm.Context) -> tuple[float, np.ndarray]:
    """In eV and eV/Å."""
    state = context.getState(energy=True, forces=True)
    energy = state.getPotentialEnergy().value_in_unit(unit.kilojoules_per_mole)
    forces = state.getForces(asNumpy=True).value_in_unit(unit.kilojoules_per_mole / unit.angstrom)
    return energy * ENERGY["kJ/mol"], forces * ENERGY["kJ/mol"]


def positions_of(context: openmm.Context) -> np.ndarray:
    positions: np.ndarray = context.getState(positions=True).getPositions(asNumpy=True).value_in_unit(unit.angstrom)
    return positions


def bare(path: Path, structure: Structure) -> Result:
    return load(path).evaluator(skin=0.0, outside="ignore")(structure)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("make", [ethanol, crystal], ids=lambda make: make.__name__)
def test_results_are_those_of_the_bare_artifact(student: Path, platform: str, make: Callable[[], Structure]) -> None:
    """The crystal's triclinic box of 2.5 Å holds many images within the cutoff of 4 Å."""
    require_platform(platform)
    structure = make()
    energy, forces = energy_and_forces(context_of(with_force(structure, student), structure, platform))
    expected = bare(student, structure)
    # the others hold positions in single precision
    tolerance = 1e-10 if platform == "Reference" else 2e-3
    assert energy == pytest.approx(expected.energy, abs=tolerance)
    assert np.abs(forces - expected.forces).max() < tolerance
    assert np.abs(expected.forces).max() > 0.1


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({"precision": "single"}, {"dtype": "float32"}),
        ({"precision": "double"}, {}),
        ({"skin": 0.03}, {"skin": 0.3 * unit.angstrom}),
        ({"multiplicity": 1}, {"spin": 0}),
    ],
)
def test_options_have_their_names_in_openmm(student: Path, options: dict[str, Any], same: dict[str, Any]) -> None:
    found, expected = (
        energy_and_forces(context_of(with_force(ethanol(), student, **o), ethanol())) for o in (options, same)
    )
    assert found[0] == expected[0]
    assert (found[1] == expected[1]).all()


def test_single_precision_is_single(student: Path) -> None:
    exact = bare(student, ethanol()).forces
    forces = energy_and_forces(context_of(with_force(ethanol(), student, precision="single"), ethanol()))[1]
    assert 0 < np.abs(forces - exact).max() < 5e-5


def test_neighbour_list_is_reused_within_the_skin(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searches, search = [], neighbors.candidates
    monkeypatch.setattr(neighbors, "candidates", lambda *args: searches.append(1) or search(*args))
    integrator = openmm.VerletIntegrator(0.02 * unit.femtosecond)
    context = context_of(with_force(ethanol(), student), ethanol(), integrator=integrator)
    integrator.step(20)
    assert len(searches) == 1
    moved = ethanol().positions
    moved[3] += 0.4
    context.setPositions(moved * unit.angstrom)
    forces = energy_and_forces(context)[1]
    assert len(searches) == 2
    assert np.allclose(forces, bare(student, Structure(ethanol().numbers, moved)).forces, atol=1e-10)


def test_some_atoms_only(student: Path) -> None:
    """In the order given, and in a box large enough."""
    small = ethanol()
    order = np.array([8, 2, 0, 5])
    box = Structure(small.numbers, small.positions, 9 * np.eye(3), np.ones(3, dtype=bool))
    energy, forces = energy_and_forces(context_of(with_force(box, student, atoms=order), box))
    expected = bare(student, Structure(small.numbers[order], small.positions[order]))
    assert energy == pytest.approx(expected.energy, abs=1e-10)
    assert np.allclose(forces[order], expected.forces, atol=1e-10)
    assert not forces[[1, 3, 4, 6, 7]].any()


def test_monte_carlo_barostat(student: Path) -> None:
    structure = crystal(2)
    system = with_force(structure, student)
    system.addForce(openmm.MonteCarloBarostat(1 * unit.bar, 300 * unit.kelvin, 1))
    context = context_of(system, structure, integrator=openmm.LangevinMiddleIntegrator(300, 10, 0.0005))
    context.getIntegrator().step(30)
    state = context.getState(positions=True)
    box = np.array(state.getPeriodicBoxVectors().value_in_unit(unit.angstrom))
    assert np.linalg.det(box) != pytest.approx(structure.volume, rel=1e-4)
    expected = bare(student, Structure(structure.numbers, positions_of(context), box, structure.pbc))
    energy, forces = energy_and_forces(context)
    assert energy == pytest.approx(expected.energy, abs=1e-8)
    assert np.allclose(forces, expected.forces, atol=1e-10)


@pytest.mark.parametrize("make", [ethanol, crystal], ids=lambda make: make.__name__)
def test_goes_on_from_a_checkpoint_as_if_never_stopped(student: Path, make: Callable[[], Structure]) -> None:
    """To the last bit, whenever either has searched its neighbours."""
    structure = make()
    for skin in (0.0, 0.05):
        system = with_force(structure, student, skin=skin)

        def started(system: openmm.System = system) -> openmm.Context:
            integrator = openmm.LangevinMiddleIntegrator(300, 1, 0.0005)
            integrator.setRandomNumberSeed(5)
            return context_of(system, structure, integrator=integrator)

        context = started()
        context.setVelocitiesToTemperature(300, 1)
        context.getIntegrator().step(25)
        saved = context.createCheckpoint()
        context.getIntegrator().step(25)
        again = started()
        again.loadCheckpoint(saved)
        again.getIntegrator().step(25)
        assert (positions_of(again) == positions_of(context)).all()
        assert np.abs(positions_of(again) - structure.positions).max() > 0.01


def test_contexts_of_one_system_share_nothing(student: Path) -> None:
    """One after another, and at the same time in threads of their own."""
    system = with_force(ethanol(), student)
    rng = np.random.default_rng(3)
    starts = [Structure(ethanol().numbers, ethanol().positions + 0.1 * rng.standard_normal((9, 3))) for _ in range(3)]

    def run(start: Structure) -> np.ndarray:
        context = context_of(system, start)
        context.getIntegrator().step(40)
        return positions_of(context)

    expected = [run(start) for start in starts]
    with ThreadPoolExecutor(len(starts)) as pool:
        found = list(pool.map(run, starts))
    assert all((one == other).all() for one, other in zip(found, expected, strict=True))


def test_minimisation(student: Path) -> None:
    context = context_of(with_force(ethanol(), student), ethanol())
    before, start = energy_and_forces(context)
    openmm.LocalEnergyMinimizer.minimize(context, 50.0, 200)
    after, end = energy_and_forces(context)
    assert after < before
    assert np.abs(end).max() < 0.3 * np.abs(start).max()


def test_forces_add_up(student: Path, tmp_path: Path) -> None:
    other = students.artifact(tmp_path, features=8)
    topology = topology_of(ethanol())
    system = system_of(ethanol(), MLFFForce(student, topology), MLFFForce(other, topology))
    energy, forces = energy_and_forces(context_of(system, ethanol()))
    one, two = bare(student, ethanol()), bare(other, ethanol())
    assert energy == pytest.approx(one.energy + two.energy, abs=1e-9)
    assert np.allclose(forces, one.forces + two.forces, atol=1e-10)


def test_a_stored_system_holds_path_and_hash_only(student: Path, tmp_path: Path) -> None:
    system = with_force(ethanol(), student)
    stored = openmm.XmlSerializer.serialize(system)
    assert len(stored) < 4000
    assert str(student).encode().hex() in stored.lower()
    expected, forces = energy_and_forces(context_of(system, ethanol()))
    for again in (openmm.XmlSerializer.deserialize(stored), copy.deepcopy(system)):
        found, same = energy_and_forces(context_of(again, ethanol()))
        assert found == expected
        assert (same == forces).all()


@pytest.mark.fault("A1", "A3")
def test_a_stored_system_refuses_another_artifact(student: Path, tmp_path: Path) -> None:
    """At the first evaluation: OpenMM does not survive an error while it reads a System."""
    moving = tmp_path / "moving.pt"
    moving.write_bytes(student.read_bytes())
    stored = openmm.XmlSerializer.serialize(with_force(ethanol(), moving))
    students.artifact(tmp_path / "other", dtype="float32").rename(moving)
    with pytest.raises(openmm.OpenMMException, match="another artifact than the one this System was made with"):
        energy_and_forces(context_of(openmm.XmlSerializer.deserialize(stored), ethanol()))
    moving.unlink()
    with pytest.raises(openmm.OpenMMException, match="no artifact at"):
        energy_and_forces(context_of(openmm.XmlSerializer.deserialize(stored), ethanol()))


def test_without_the_private_getter(student: Path) -> None:
    """OpenMM may take it away."""

    class Public:
        def __init__(self, state: openmm.State) -> None:
            self.getPositions = state.getPositions

    state = context_of(system_of(ethanol()), ethanol()).getState(positions=True)
    compute = Compute(
        str(student), load(student).manifest.sha256, ethanol().numbers.tolist(), None, False, 0.0, 0.0, "cpu", None,
        0.5, "ignore",
    )  # fmt: skip
    quick, slow = compute(state), compute(Public(state))
    assert quick[0] == slow[0]
    assert (quick[1] == slow[1]).all()
    assert type(quick[0]) is float


@pytest.mark.fault("S6")
def test_a_coordinate_that_is_no_number_stops_with_the_atom(student: Path) -> None:
    structure = ethanol()
    lost = structure.positions.copy()
    lost[7] = np.nan
    context = context_of(with_force(structure, student), structure)
    context.setPositions(lost * unit.angstrom)
    with pytest.raises(openmm.OpenMMException, match=r"atom 7 \(H\) has a coordinate that is not finite"):
        context.getIntegrator().step(1)
    context = context_of(with_force(structure, student, atoms=[2, 8, 7]), structure)
    context.setPositions(lost * unit.angstrom)
    with pytest.raises(openmm.OpenMMException, match=r"atom 2 \(H\) .*these atoms of the System: \[2, 8, 7\]"):
        context.getIntegrator().step(1)


def test_an_explosion_stops_with_the_atom(student: Path) -> None:
    integrator = openmm.VerletIntegrator(1e200)
    context = context_of(with_force(ethanol(), student), ethanol(), integrator=integrator)
    with pytest.raises(openmm.OpenMMException, match=r"atom \d \(.\) has a coordinate that is not finite"):
        context.getIntegrator().step(10)


@pytest.mark.fault("S1")
def test_unknown_element(student: Path) -> None:
    chloride = Structure(np.array([6, 17]), np.array([[0.0, 0, 0], [0, 0, 1.8]]))
    with pytest.raises(StructureError, match=r"does not know Cl \(atoms 1\); it was trained for H, C, O"):
        with_force(chloride, student)
    with_force(chloride, student, atoms=[0])


@pytest.mark.fault("S12")
def test_charge_is_refused_or_used_but_never_dropped(student: Path, tmp_path: Path) -> None:
    with pytest.raises(StructureError, match=r"charge 1 is not supported.*model\.charge: true"):
        with_force(ethanol(), student, charge=1)
    with pytest.raises(StructureError, match="spin 2 is not supported"):
        with_force(ethanol(), student, multiplicity=3)
    domain = Domain(elements=list(students.E0), charges=[0.0, 1.0], spins=[0.0, 1.0])
    path = students.artifact(tmp_path, charge=True, spin=True, domain=domain)
    energies = {
        energy_and_forces(context_of(with_force(ethanol(), path, **options), ethanol()))[0]
        for options in ({}, {"charge": 1}, {"spin": 1}, {"charge": 1, "multiplicity": 2})
    }
    assert len(energies) == 4
    with pytest.warns(ExtrapolationWarning, match="charge -1"):
        with_force(ethanol(), path, charge=-1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"atoms": [0, 9]}, r"atoms names \[9\] of 9 atoms; allowed: indices from 0 to 8"),
        ({"atoms": [-1]}, r"atoms names \[-1\]"),
        ({"atoms": [3, 3]}, "the same atom twice"),
        ({"atoms": []}, "no atom at all"),
        ({"spin": 1, "multiplicity": 1}, "spin 1 and multiplicity - 1 0 contradict"),
        ({"dtype": "float32", "precision": "double"}, "dtype float32 and precision float64 contradict"),
        ({"precision": "singel"}, "did you mean 'single'"),
        ({"outside": "wran"}, "did you mean 'warn'"),
        ({"device": "gpu0"}, "unknown device 'gpu0'"),
    ],
)
def test_wrong_options(student: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(MLFFError, match=message):
        with_force(ethanol(), student, **options)


@pytest.mark.fault("A1", "A4", "A5")
def test_what_is_no_artifact(student: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no artifact at"):
        with_force(ethanol(), tmp_path / "absent.pt")
    with pytest.raises(ArtifactError, match="is a checkpoint, not an artifact"):
        with_force(ethanol(), students.checkpoint(tmp_path / "checkpoint"))
    newer = forged.remanifested(student, tmp_path / "newer.pt", lambda manifest: manifest.update(schema_version=99))
    with pytest.raises(ArtifactError, match="has schema version 99"):
        with_force(ethanol(), newer)


@pytest.mark.fault("S8")
def test_box_smaller_than_twice_the_cutoff(student: Path) -> None:
    """Refused to a force on some atoms, at the start and when a barostat shrinks it; the whole System may have it."""
    small = ethanol()
    box = Structure(small.numbers, small.positions, 7.9 * np.eye(3), np.ones(3, dtype=bool))
    with pytest.raises(StructureError, match=r"is 0\.79 nm wide, less than twice the cutoff of .* \(0\.4 nm\)"):
        with_force(box, student, atoms=[0, 1])
    energy, _ = energy_and_forces(context_of(with_force(box, student), box))
    assert energy == pytest.approx(bare(student, box).energy, abs=1e-10)
    large = Structure(small.numbers, small.positions, 8.1 * np.eye(3), np.ones(3, dtype=bool))
    context = context_of(with_force(large, student, atoms=[0, 1]), large)
    context.getState(energy=True)
    context.setPeriodicBoxVectors(*0.79 * np.eye(3))
    with pytest.raises(openmm.OpenMMException, match="less than twice the cutoff"):
        context.getState(energy=True)


def test_topology_of_another_system(student: Path) -> None:
    water = Structure(np.array([8, 1, 1]), np.array([[0.0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]]))
    system = system_of(ethanol(), MLFFForce(student, topology_of(water)))
    with pytest.raises(openmm.OpenMMException, match=r"the System has 9 particles and the Topology .* 3 atoms"):
        energy_and_forces(context_of(system, ethanol()))


def test_extra_particles_are_no_atoms(student: Path) -> None:
    topology = topology_of(ethanol())
    topology.addAtom("M", None, next(topology.residues()))
    with pytest.raises(StructureError, match=r"atom 9 \(M of MOL\) has no element"):
        MLFFForce(student, topology)
    with pytest.raises(ConfigError, match="indices from 0 to 9"):
        MLFFForce(student, topology, atoms=[10])
