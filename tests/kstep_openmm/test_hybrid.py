"""Variant C in OpenMM: true dynamics whatever the student, reversible, counted, and refused where it is unsafe."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import students
from mlff_engines.checkpoint import Domain, save_checkpoint
from mlff_engines.errors import ConfigError
from mlff_engines.export import export
from mlff_engines.models.lj import LennardJonesConfig
from mlff_engines.models.registry import build_model
from mlff_engines.structure import FloatArray
from requirements import require_engine, require_package

require_engine("openmm")
require_package("rdkit", "openmm")
require_package("openmmml", "openmm")

import openmm  # noqa: E402
from openmm import app, unit  # noqa: E402
from openmm.unit import femtosecond, kelvin, picosecond  # noqa: E402
from openmmml import MLPotential  # noqa: E402

from mlff_openmm import MLFFForce, hybrid_integrator, meter_of  # noqa: E402
from mlff_openmm.kstep import corrector  # noqa: E402
from mlff_openmm.kstep.config import MDConfig  # noqa: E402
from mlff_openmm.kstep.corrector import CORRECTION_GROUP, STUDENT_GROUP  # noqa: E402
from mlff_openmm.kstep.hybrid import particles_of  # noqa: E402
from mlff_openmm.kstep.prepare import Prepared, prepare  # noqa: E402
from mlff_openmm.kstep.simulate import velocity_verlet  # noqa: E402

ATOMS = 8
ARGON_STEP = 10 * femtosecond


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights: a force that has nothing to do with the true one."""
    return students.artifact(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def ethanol(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("ethanol")
    (folder / "ethanol.smi").write_text("CCO ethanol")
    return prepare(folder / "ethanol.smi", MDConfig(), folder)[0]


@pytest.fixture(scope="module")
def argon(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The true potential, a student that is a tenth too weak, and a poor one."""
    made = {}
    for name, kelvins in (("true", 120.0), ("weak", 108.0), ("poor", 72.0)):
        folder = tmp_path_factory.mktemp(name)
        config = LennardJonesConfig(sigma={"Ar": 3.4}, epsilon={"Ar": kelvins * 8.617e-5}, switch=14.0, cutoff=16.0)
        model = build_model(config, ["Ar"], {"Ar": 0.0}).eval()
        save_checkpoint(folder / "argon", model, config, Domain(elements=["Ar"]), {})
        export([folder / "argon"], folder / "argon.pt")
        made[name] = folder / "argon.pt"
    return made


def argon_topology() -> app.Topology:
    topology = app.Topology()
    residue = topology.addResidue("AR", topology.addChain())
    for _ in range(ATOMS):
        topology.addAtom("Ar", app.Element.getBySymbol("Ar"), residue)
    return topology


def argon_positions() -> FloatArray:
    corners = np.array([(x, y, z) for x in (0, 1) for y in (0, 1) for z in (0, 1)], dtype=float)
    return 0.375 * corners + np.random.default_rng(1).normal(0, 0.01, (ATOMS, 3))


def corrected_argon(argon: dict[str, Path], student: str = "weak") -> openmm.System:
    potential = MLPotential("mlff", model=argon[student], corrector=argon["true"], outside="ignore")
    return potential.createSystem(argon_topology(), removeCMMotion=False)


def corrected_ethanol(student: Path, ethanol: Prepared, **options: Any) -> tuple[app.PDBFile, openmm.System]:
    pdb, _ = ethanol.load()
    potential = MLPotential("mlff", model=student, corrector=ethanol.system, outside="ignore", **options)
    return pdb, potential.createSystem(pdb.topology, removeCMMotion=False)


def context_of(system: openmm.System, integrator: openmm.Integrator, positions: Any, tight: float = 1e-12) -> Any:
    integrator.setConstraintTolerance(tight)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatform("Reference"))
    context.setPositions(positions)
    context.applyConstraints(tight)
    context.setVelocitiesToTemperature(40.0 if len(positions) == ATOMS else 300.0, 1)
    return context


def state_of(context: openmm.Context) -> tuple[FloatArray, FloatArray]:
    state = context.getState(positions=True, velocities=True)
    return state.getPositions(asNumpy=True)._value, state.getVelocities(asNumpy=True)._value


def fresh(system: openmm.System) -> openmm.System:
    """For tests that count."""
    meter_of(system).by_purpose.clear()
    return system


def test_groups_add_up_to_the_true_potential(student: Path, ethanol: Prepared) -> None:
    pdb, system = corrected_ethanol(student, ethanol)
    true = ethanol.load()[1]
    assert system.getNumConstraints() == true.getNumConstraints() == 6
    contexts = [context_of(s, openmm.VerletIntegrator(0.001), pdb.positions) for s in (system, true)]
    total, expected = (c.getState(energy=True, forces=True) for c in contexts)
    assert total.getPotentialEnergy()._value == pytest.approx(expected.getPotentialEnergy()._value, abs=1e-7)
    np.testing.assert_allclose(total.getForces(asNumpy=True)._value, expected.getForces(asNumpy=True)._value, atol=1e-7)
    alone = openmm.System()
    for i in range(true.getNumParticles()):
        alone.addParticle(true.getParticleMass(i))
    alone.addForce(MLFFForce(student, pdb.topology, outside="ignore"))
    only = context_of(alone, openmm.VerletIntegrator(0.001), state_of(contexts[0])[0] * unit.nanometer)
    inside = contexts[0].getState(energy=True, groups={STUDENT_GROUP}).getPotentialEnergy()._value
    assert inside == pytest.approx(only.getState(energy=True).getPotentialEnergy()._value, rel=1e-12)


@pytest.mark.parametrize("bug", [False, True])
def test_macro_steps_as_short_as_the_inner_are_true_dynamics_whatever_the_student(
    student: Path, ethanol: Prepared, bug: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if bug:  # the student added in place of subtracted
        monkeypatch.setattr(corrector.Boundary, "__call__", lambda self, state: self.student(state))
    pdb, system = corrected_ethanol(student, ethanol)
    hybrid = hybrid_integrator(system, 1 * femtosecond, 1 * femtosecond, positions=pdb.positions, allow_unsafe=True)
    contexts = [
        context_of(system, hybrid, pdb.positions),
        context_of(ethanol.load()[1], velocity_verlet(0.001), pdb.positions),
    ]
    for context in contexts:
        context.getIntegrator().step(20)
    (x, v), (true_x, true_v) = map(state_of, contexts)
    close = np.abs(x - true_x).max() < 1e-9 and np.abs(v - true_v).max() < 1e-7
    assert close != bug


def test_a_perfect_student_makes_velocity_verlet_at_the_inner_step(argon: dict[str, Path]) -> None:
    system = corrected_argon(argon, student="true")
    hybrid = hybrid_integrator(system, 4 * ARGON_STEP, ARGON_STEP, positions=argon_positions())
    plain = openmm.System()
    for _ in range(ATOMS):
        plain.addParticle(system.getParticleMass(0))
    plain.addForce(MLFFForce(argon["true"], argon_topology(), outside="ignore"))
    one = context_of(system, hybrid, argon_positions())
    two = context_of(plain, velocity_verlet(0.01), argon_positions())
    one.getIntegrator().step(25)
    two.getIntegrator().step(100)
    for found, expected in zip(state_of(one), state_of(two), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-11)


def test_flipped_velocities_lead_back(student: Path, ethanol: Prepared) -> None:
    """Constraints, a wild student and many inner steps: still reversible."""
    pdb, system = corrected_ethanol(student, ethanol)
    hybrid = hybrid_integrator(system, 2 * femtosecond, 0.5 * femtosecond, positions=pdb.positions, allow_unsafe=True)
    context = context_of(system, hybrid, pdb.positions)
    x, v = state_of(context)
    hybrid.step(10)
    moved = state_of(context)
    assert np.abs(moved[0] - x).max() > 0.005
    context.setVelocities(-moved[1])
    hybrid.step(10)
    back = state_of(context)
    np.testing.assert_allclose(back[0], x, atol=1e-9)
    np.testing.assert_allclose(-back[1], v, atol=1e-6)


def test_the_error_in_the_true_energy_falls_with_the_square_of_the_macro_step(argon: dict[str, Path]) -> None:
    system = corrected_argon(argon, student="poor")
    inner = 5 * femtosecond  # its own error is far smaller
    deviations = []
    for steps in (4, 8, 16):
        hybrid = hybrid_integrator(system, steps * inner, inner, positions=argon_positions(), allow_unsafe=True)
        context = context_of(system, hybrid, argon_positions())
        energies = []
        for _ in range(320 // steps):
            hybrid.step(1)
            state = context.getState(energy=True)
            energies.append((state.getPotentialEnergy() + state.getKineticEnergy())._value)
        deviations.append(np.std(energies))
    assert deviations[1] / deviations[0] == pytest.approx(4, rel=0.25)
    assert deviations[2] / deviations[1] == pytest.approx(4, rel=0.25)


def test_every_true_evaluation_is_counted(argon: dict[str, Path]) -> None:
    system = fresh(corrected_argon(argon))
    hybrid = hybrid_integrator(system, 4 * ARGON_STEP, ARGON_STEP, positions=argon_positions())
    meter = meter_of(system)
    assert set(meter.by_purpose) == {"check"}
    assert meter.calls == 24
    meter.by_purpose.clear()
    context = context_of(system, hybrid, argon_positions())
    hybrid.step(10)
    assert meter.calls == 11  # one more to begin with
    context.getState(energy=True)
    assert meter.calls == 12  # a reporter's
    context.getState(energy=True, groups={STUDENT_GROUP})
    context.getState(positions=True)
    assert meter.calls == 12
    context.getState(forces=True, groups={CORRECTION_GROUP})
    assert meter.calls == 13
    assert meter_of(copy.deepcopy(system)) is meter


def test_the_student_is_evaluated_once_per_inner_step(argon: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its negative in the correction nor a state costs another evaluation at the same positions."""
    from mlff_engines.evaluator import Evaluator

    calls = []
    evaluate = Evaluator.__call__
    system = corrected_argon(argon)
    hybrid = hybrid_integrator(system, 4 * ARGON_STEP, ARGON_STEP, positions=argon_positions())
    context = context_of(system, hybrid, argon_positions())
    hybrid.step(1)
    monkeypatch.setattr(Evaluator, "__call__", lambda self, structure: calls.append(1) or evaluate(self, structure))
    hybrid.step(10)
    # the true potential of this test is an artifact as well
    assert len(calls) == 10 * (4 + 1)
    context.getState(energy=True)
    assert len(calls) == 10 * (4 + 1)


def thermostatted(argon: dict[str, Path], seed: int) -> openmm.Context:
    system = corrected_argon(argon)
    bath = {"temperature": 30 * kelvin, "friction": 5 / picosecond, "seed": seed}
    hybrid = hybrid_integrator(system, 4 * ARGON_STEP, ARGON_STEP, positions=argon_positions(), **bath)
    return context_of(system, hybrid, argon_positions())


def test_the_thermostat_repeats_by_seed(argon: dict[str, Path]) -> None:
    ends = []
    for seed in (1, 2, 1):
        context = thermostatted(argon, seed)
        context.getIntegrator().step(20)
        ends.append(state_of(context)[0])
    np.testing.assert_array_equal(ends[0], ends[2])
    assert np.abs(ends[0] - ends[1]).max() > 0.001


def test_the_thermostat_holds_the_temperature(argon: dict[str, Path]) -> None:
    context = thermostatted(argon, 1)
    context.getIntegrator().step(50)
    found = []
    for _ in range(300):
        context.getIntegrator().step(3)
        found.append(kinetic_energy(context))
    temperature = 2 * np.mean(found) / (3 * ATOMS * 8.31446e-3)
    assert temperature == pytest.approx(30, rel=0.09)  # 3 standard errors


def kinetic_energy(context: openmm.Context) -> float:
    return 0.5 * 39.948 * float((state_of(context)[1] ** 2).sum())


@pytest.mark.fault("J9")
def test_an_unsafe_macro_step_is_refused_and_friction_makes_it_safe(argon: dict[str, Path]) -> None:
    system = fresh(corrected_argon(argon))
    where = argon_positions()
    with pytest.raises(ConfigError, match=r"is unsafe|resonance"):
        hybrid_integrator(system, 46 * ARGON_STEP, ARGON_STEP, positions=where)
    assert meter_of(system).by_purpose.keys() == {"check"}
    with pytest.raises(ConfigError):
        hybrid_integrator(system, 46 * ARGON_STEP, ARGON_STEP, positions=where, temperature=30, friction=0.01)
    hybrid_integrator(system, 46 * ARGON_STEP, ARGON_STEP, positions=where, temperature=30, friction=5)
    hybrid_integrator(system, 46 * ARGON_STEP, ARGON_STEP, positions=where, allow_unsafe=True)
    with pytest.raises(ConfigError, match="inner step"):
        hybrid_integrator(system, 4000 * femtosecond, 2000 * femtosecond, positions=where)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"macro_step": 0.025}, "no multiple of inner_step"),
        ({"inner_step": 0.0}, "no multiple of inner_step"),
        ({"temperature": -1.0}, "temperature above 0"),
        ({"temperature": 300.0, "friction": -1.0}, "friction 0 or above"),
        ({"seed": 0}, "seed 1 or more"),
    ],
)
def test_bad_arguments_are_refused(argon: dict[str, Path], arguments: dict[str, Any], message: str) -> None:
    steps = {"macro_step": 0.04, "inner_step": 0.01}
    with pytest.raises(ConfigError, match=message):
        hybrid_integrator(corrected_argon(argon), positions=argon_positions(), **(steps | arguments))


def test_a_system_without_corrector_is_refused(argon: dict[str, Path]) -> None:
    system = MLPotential("mlff", model=argon["weak"]).createSystem(argon_topology())
    with pytest.raises(ConfigError, match="corrector="):
        hybrid_integrator(system, 0.04, 0.01, positions=argon_positions())


def test_correctors_of_every_kind(argon: dict[str, Path], student: Path, ethanol: Prepared, tmp_path: Path) -> None:
    from ase.calculators.lj import LennardJones

    topology, where = argon_topology(), argon_positions()
    external = openmm.CustomExternalForce("10*(x^2+y^2+z^2)")
    for i in range(ATOMS):
        external.addParticle(i)
    calculator = LennardJones(sigma=3.4, epsilon=0.0103, rc=16.0, smooth=False)
    for given, energy in (
        (external, 10 * (where**2).sum()),
        ([copy.deepcopy(external), copy.deepcopy(external)], 20 * (where**2).sum()),
        (calculator, None),
    ):
        potential = MLPotential("mlff", model=argon["weak"], outside="ignore")
        system = potential.createSystem(topology, corrector=given)
        context = context_of(system, openmm.VerletIntegrator(0.001), where)
        if energy is None:
            from ase import Atoms, units

            energy = Atoms("Ar8", 10 * where, calculator=calculator).get_potential_energy() * units.mol / units.kJ
        assert context.getState(energy=True).getPotentialEnergy()._value == pytest.approx(energy, rel=1e-9)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "allowed: a System"),
        ("none.xml", "cannot read"),
        ("integrator.xml", "serialized VerletIntegrator"),
        ("ethanol.xml", "9 particles, the topology 8 atoms"),
    ],
)
def test_bad_correctors_are_refused(
    argon: dict[str, Path], ethanol: Prepared, tmp_path: Path, given: Any, message: str
) -> None:
    (tmp_path / "integrator.xml").write_text(openmm.XmlSerializer.serialize(openmm.VerletIntegrator(0.001)))
    (tmp_path / "ethanol.xml").write_text(ethanol.system.read_text())
    with pytest.raises(ConfigError, match=message):
        MLPotential("mlff", model=argon["weak"], corrector=tmp_path / given if given != 3 else 3).createSystem(
            argon_topology()
        )


def test_a_force_that_cannot_be_copied_is_named(argon: dict[str, Path]) -> None:
    def zero(state: openmm.State) -> tuple[float, FloatArray]:
        return 0.0, np.zeros((ATOMS, 3))

    true = openmm.System()
    for _ in range(ATOMS):
        true.addParticle(39.948)
    force = openmm.PythonForce(zero)  # a local function cannot be pickled
    force.setName("mine")
    true.addForce(force)
    potential = MLPotential("mlff", model=argon["weak"], outside="ignore")
    with pytest.raises(ConfigError, match="the force mine of the corrector cannot be copied"):
        potential.createSystem(argon_topology(), corrector=true)
    system = potential.createSystem(argon_topology(), corrector=openmm.PythonForce(zero))
    context = context_of(system, openmm.VerletIntegrator(0.001), argon_positions())
    assert context.getState(energy=True).getPotentialEnergy()._value == pytest.approx(0, abs=1e-12)


def test_part_of_a_system_has_no_corrector(student: Path, ethanol: Prepared) -> None:
    pdb, true = ethanol.load()
    with pytest.raises(ConfigError, match="createSystem"):
        MLPotential("mlff", model=student).createMixedSystem(pdb.topology, true, [0, 1, 2], corrector=true)


def test_masses_and_constraints_are_those_of_the_corrector(student: Path, ethanol: Prepared) -> None:
    pdb, true = ethanol.load()
    true.setParticleMass(3, 3.0)
    system = MLPotential("mlff", model=student, corrector=true).createSystem(pdb.topology)
    found, expected = particles_of(system), particles_of(true)
    np.testing.assert_array_equal(found.masses, expected.masses)
    assert found.masses[3] == 3.0
    assert found.constraints is not None
    assert expected.constraints is not None
    np.testing.assert_array_equal(found.constraints.lengths, expected.constraints.lengths)
