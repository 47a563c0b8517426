"""Variants A and D in OpenMM: jumps brought back onto the constraints, and configurations that are exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kstep_jumps
import students
from mlff_engines.errors import ConfigError, SimulationError
from mlff_engines.kstep.jumps import Displacement, Jump, ballistic
from mlff_engines.kstep.learned import export_jump
from mlff_engines.kstep.metropolis import Outcome, metropolis
from mlff_engines.structure import FloatArray
from mlff_engines.validation.builtin import argon_artifact
from requirements import require_engine, require_package

require_engine("openmm")
require_package("rdkit", "openmm")
require_package("openmmml", "openmm")

import openmm  # noqa: E402
from openmm import app  # noqa: E402
from openmmml import MLPotential  # noqa: E402

from mlff_openmm.kstep import drivers  # noqa: E402
from mlff_openmm.kstep.config import MDConfig  # noqa: E402
from mlff_openmm.kstep.corrector import count_calls  # noqa: E402
from mlff_openmm.kstep.drivers import NM, VELOCITY, JumpDynamics, MetropolisSampler  # noqa: E402
from mlff_openmm.kstep.hybrid import TOLERANCE  # noqa: E402
from mlff_openmm.kstep.prepare import Prepared, prepare  # noqa: E402
from mlff_openmm.kstep.simulate import velocity_verlet  # noqa: E402

DT = 0.001  # ps
STIFFNESS, TEMPERATURE = 100.0, 30.0  # kJ/mol/nm² of the wells that two argon atoms are in, and K
KT = 8.31446e-3 * TEMPERATURE
SITES = np.array([[0.0, 0.0, 0.0], [0.42, 0.0, 0.0]])


@pytest.fixture(scope="module")
def ethanol(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("ethanol")
    (folder / "ethanol.smi").write_text("CCO ethanol")
    return prepare(folder / "ethanol.smi", MDConfig(), folder)[0]


@pytest.fixture(scope="module")
def argon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return argon_artifact(tmp_path_factory.mktemp("argon"))


class Exact:
    """The jump that true dynamics make, by a Context of its own."""

    def __init__(self, ethanol: Prepared, steps: int) -> None:
        integrator = velocity_verlet(DT)
        integrator.setConstraintTolerance(TOLERANCE)
        reference = openmm.Platform.getPlatform("Reference")
        self.context, self.steps = openmm.Context(ethanol.load()[1], integrator, reference), steps

    def __call__(self, x: FloatArray, v: FloatArray) -> Displacement:
        self.context.setPositions(x / NM)
        self.context.setVelocities(v / VELOCITY)
        self.context.getIntegrator().step(self.steps)
        state = self.context.getState(positions=True, velocities=True)
        new_x, new_v = state.getPositions(asNumpy=True)._value * NM, state.getVelocities(asNumpy=True)._value * VELOCITY
        return Displacement(new_x - x, new_v - v)


def jumping(ethanol: Prepared, jump: Jump, **options: Any) -> JumpDynamics:
    pdb, system = ethanol.load()
    dynamics = JumpDynamics(pdb.topology, system, jump, positions=pdb.positions, dt=DT, **options)
    dynamics.thermalise(300.0, np.random.default_rng(1))
    return dynamics


def verlet(ethanol: Prepared, start: tuple[FloatArray, FloatArray], steps: int) -> tuple[FloatArray, FloatArray]:
    found = Exact(ethanol, steps)(*start)
    return start[0] + found.dx, start[1] + found.dv


@pytest.mark.parametrize(("corrector", "calls"), [("A1", 1), ("A2", 2)])
def test_a_perfect_jump_gives_true_dynamics(ethanol: Prepared, corrector: Any, calls: int) -> None:
    dynamics = jumping(ethanol, Exact(ethanol, 4), steps=4, corrector=corrector)
    start = dynamics.state()
    before = dynamics.meter.calls
    dynamics.step(10)
    assert dynamics.meter.calls - before == 10 * calls
    assert dynamics.macro_step == pytest.approx(5 * DT)
    x, v = dynamics.state()
    true_x, true_v = verlet(ethanol, start, 50)
    if corrector == "A2":
        np.testing.assert_allclose(x, true_x, atol=1e-5)
        np.testing.assert_allclose(v, true_v, atol=1e-6)
    else:  # another scheme of second order
        assert 1e-5 < np.abs(x - true_x).max() < 0.02


def test_a_bad_jump_is_brought_back_onto_the_constraints(ethanol: Prepared) -> None:
    rng = np.random.default_rng(2)

    def wild(x: FloatArray, v: FloatArray) -> Displacement:
        return Displacement(rng.normal(0, 0.15, x.shape), rng.normal(0, 0.001, x.shape))

    dynamics = jumping(ethanol, wild, steps=4)
    bonds = dynamics.particles.constraints
    assert bonds is not None
    for _ in range(5):
        dynamics.step()
        x, v = dynamics.state()
        np.testing.assert_allclose(np.linalg.norm(bonds.vectors(x), axis=1), bonds.lengths, rtol=1e-6)
        np.testing.assert_allclose(bonds.velocities(x, v), v, atol=1e-8)


def test_a_jump_at_its_bound_is_not_taken(ethanol: Prepared) -> None:
    dynamics = jumping(ethanol, lambda x, v: Displacement(x + 1, v, clamped=2), steps=4)
    start = dynamics.state()
    dynamics.step(3)
    assert (dynamics.counts.fallbacks, dynamics.counts.clamp_hits) == (3, 6)
    assert dynamics.meter.by_purpose == {"fallback": 3 * 6}
    np.testing.assert_allclose(dynamics.state()[0], verlet(ethanol, start, 15)[0], atol=1e-6)


@pytest.mark.fault("J7", "J8")
def test_jumps_that_cannot_be_used_are_refused(ethanol: Prepared) -> None:
    dynamics = jumping(ethanol, lambda x, v: Displacement(np.full_like(x, np.nan), v), steps=4)
    with pytest.raises(SimulationError, match="atom 0 is not finite"):
        dynamics.step()

    def collapsing(x: FloatArray, v: FloatArray) -> Displacement:
        dx = np.zeros_like(x)
        dx[3] = x[0] - x[3]  # a hydrogen onto its carbon
        return Displacement(dx, 0 * v)

    with pytest.raises(SimulationError, match="onto the constraints"):
        jumping(ethanol, collapsing, steps=4).step()


def test_the_artifact_of_a_jump_runs_only_as_it_was_made(ethanol: Prepared, tmp_path: Path) -> None:
    artifact = tmp_path / "jump.pt"
    export_jump(kstep_jumps.checkpoint(tmp_path / "jump"), artifact)
    pdb, system = ethanol.load()

    def dynamics(changed: openmm.System = system, **options: Any) -> JumpDynamics:
        made = {"positions": pdb.positions, "steps": 4, "dt": 0.002, "temperature": 300.0}
        return JumpDynamics(pdb.topology, changed, artifact, **(made | options))

    running = dynamics()
    running.thermalise(300.0, np.random.default_rng(1))
    before, _ = running.state()
    running.step(3)
    assert np.abs(running.state()[0] - before).max() > 0.01
    for lost, message in ((1e12, "allowed: up to 1e"), (np.nan, "not finite")):
        running.context.setPositions((before + lost) / NM)
        with pytest.raises(SimulationError, match=f"{message}.*Use shorter jumps"):
            running.step()
    heavy, free = ethanol.load()[1], ethanol.load()[1]
    heavy.setParticleMass(3, 3.0)
    while free.getNumConstraints():
        free.removeConstraint(0)
    for options, message in (
        ({"dt": 0.001}, "time step: 1 fs, trained with 2"),
        ({"steps": 8}, "steps per jump: 8, trained with 4"),
        ({"changed": heavy}, "masses: 3 amu on atom 3"),
        ({"changed": free}, "constraints: none, trained with hbonds"),
    ):
        with pytest.raises(ConfigError, match=message):
            dynamics(**options)


def test_noise_thermalises(ethanol: Prepared) -> None:
    dynamics = jumping(ethanol, ballistic(0.5), steps=1, temperature=300.0, friction=200.0, corrector="A2")
    particles, kinetic = dynamics.particles, []
    for _ in range(400):
        dynamics.step()
        kinetic.append(particles.kinetic_energy(dynamics.state()[1]))
    temperature = 2 * np.mean(kinetic) / (particles.degrees_of_freedom * 8.617333e-5)
    assert temperature == pytest.approx(300, rel=0.15)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corrector": "A3"}, "did you mean 'A1'|allowed"),
        ({"steps": 0}, "1 step or more"),
        ({"friction": 1.0}, "without a temperature"),
    ],
)
def test_bad_arguments_of_a_jump_are_refused(ethanol: Prepared, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        jumping(ethanol, ballistic(1.0), **({"steps": 4} | options))


def wells() -> openmm.Force:
    """The true potential: analytic, and nothing of it in the student."""
    force = openmm.CustomExternalForce(f"{STIFFNESS / 2}*((x - x0)^2 + y^2 + z^2)")
    force.addPerParticleParameter("x0")
    for i, site in enumerate(SITES):
        force.addParticle(i, [site[0]])
    return force


def sampler(argon: Path, corrector: Any = None, **options: Any) -> MetropolisSampler:
    topology = app.Topology()
    residue = topology.addResidue("AR", topology.addChain())
    for _ in SITES:
        topology.addAtom("Ar", app.Element.getBySymbol("Ar"), residue)
    potential = MLPotential("mlff", model=argon, corrector=corrector or wells(), outside="ignore")
    system = potential.createSystem(topology, removeCMMotion=False)
    defaults = {"dt": 0.05, "steps": 8, "temperature": TEMPERATURE, "seed": 1}
    return MetropolisSampler(system, positions=SITES, **(defaults | options))


def spread(chosen: MetropolisSampler, proposals: int) -> float:
    """Mean square displacement along an axis, in that of the exact distribution."""
    found = []
    for _ in range(proposals):
        chosen.step()
        found.append(((chosen.state()[0] / NM - SITES) ** 2).mean())
    return float(np.mean(found)) / (KT / STIFFNESS)


@pytest.mark.parametrize("friction", [None, 1.0])
def test_configurations_are_exact_though_the_student_knows_nothing(argon: Path, friction: float | None) -> None:
    chosen = sampler(argon, friction=friction, jitter=0.5)
    assert spread(chosen, 400) == pytest.approx(1, abs=0.2)  # about 3 standard errors
    assert 0.3 < chosen.proposals.acceptance < 0.95


def test_the_average_of_the_acceptance_exponential_is_one(argon: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """<exp(-work/kT)> = 1 from equilibrium, whatever a volume-preserving proposal does; not at another temperature."""
    works = []

    def recorded(*arguments: Any) -> Outcome:
        outcome = metropolis(*arguments)
        works.append(outcome.work / drivers.KJ_PER_MOL)
        return outcome

    monkeypatch.setattr(drivers, "metropolis", recorded)
    sampler(argon, steps=5).step(500)
    right, colder = (np.exp(-np.array(works[20:]) / kt) for kt in (KT, KT / 2))
    error = right.std() / np.sqrt(len(right) / 2)
    assert right.mean() == pytest.approx(1, abs=3 * error)
    assert error < 0.15
    assert colder.mean() > 1 + 6 * error


def test_without_the_test_they_are_not(argon: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gullible(particles: Any, x: Any, v: Any, energy: float, propose: Any, *_: Any) -> Outcome:
        return Outcome(*propose(x, v), energy, 0.0, True)

    monkeypatch.setattr(drivers, "metropolis", gullible)
    assert spread(sampler(argon), 100) > 2


def test_one_true_energy_per_proposal(argon: Path) -> None:
    chosen = sampler(argon)
    chosen.step(20)
    assert dict(chosen.meter.by_purpose) == {"start": 1, "dynamics": 20}
    assert chosen.proposals.made == 20
    x, _ = chosen.state()
    expected = STIFFNESS / 2 * ((x / NM - SITES) ** 2).sum() * drivers.KJ_PER_MOL
    assert chosen.energy == pytest.approx(expected, rel=1e-9)


def test_a_perfect_student_is_accepted(argon: Path) -> None:
    chosen = sampler(argon, corrector=argon, dt=0.005, steps=40)
    chosen.step(25)
    assert chosen.proposals.acceptance == 1.0


def test_the_burn_in_finds_a_length_and_then_keeps_it(argon: Path) -> None:
    chosen = sampler(argon, burn_in=60, acceptance=0.8)
    chosen.step(60)
    length = chosen.steps
    assert chosen.proposals.made == 0
    assert length != 8
    chosen.step(40)
    assert chosen.steps == length
    assert chosen.proposals.made == 40


def test_a_chain_repeats_by_seed(argon: Path) -> None:
    ends = []
    for seed in (1, 1, 2):
        chosen = sampler(argon, seed=seed)
        chosen.step(10)
        ends.append(chosen.state()[0])
    np.testing.assert_array_equal(ends[0], ends[1])
    assert np.abs(ends[0] - ends[2]).max() > 1e-3


def test_a_trajectory_that_fails_is_rejected(argon: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = sampler(argon, dt=100.0)  # both atoms leave
    before = chosen.state()[0]
    chosen.step(3)
    assert (chosen.proposals.made, chosen.proposals.accepted, chosen.proposals.failed) == (3, 0, 0)

    def failing(self: Any, steps: int) -> None:
        raise openmm.OpenMMException("the model's energy or force is not finite on atom 0")

    monkeypatch.setattr(openmm.CompoundIntegrator, "step", failing)
    chosen.step(2)
    assert (chosen.proposals.made, chosen.proposals.accepted, chosen.proposals.failed) == (5, 0, 2)
    np.testing.assert_allclose(chosen.state()[0], before, atol=1e-12)


def test_constraints_hold_in_samples(ethanol: Prepared, tmp_path: Path) -> None:
    pdb, _ = ethanol.load()
    student = students.artifact(tmp_path)
    system = MLPotential("mlff", model=student, corrector=ethanol.system, outside="ignore").createSystem(pdb.topology)
    chosen = MetropolisSampler(system, positions=pdb.positions, dt=0.0002, steps=1, temperature=300.0)
    start = chosen.state()[0]
    chosen.step(30)
    bonds = chosen.particles.constraints
    assert bonds is not None
    assert chosen.particles.still  # createSystem adds a CMMotionRemover
    assert chosen.proposals.accepted > 3
    x, _ = chosen.state()
    assert np.abs(x - start).max() > 0.01
    np.testing.assert_allclose(np.linalg.norm(bonds.vectors(x), axis=1), bonds.lengths, rtol=1e-6)


@pytest.mark.parametrize(
    "options", [{"steps": 0}, {"dt": 0.0}, {"temperature": 0.0}, {"jitter": 1.0}, {"friction": -1}]
)
def test_bad_arguments_of_a_sampler_are_refused(argon: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="allowed: 1 step or more"):
        sampler(argon, **options)


def test_a_sampler_needs_a_corrector(ethanol: Prepared) -> None:
    pdb, system = ethanol.load()
    with pytest.raises(ConfigError, match="corrector="):
        MetropolisSampler(system, positions=pdb.positions, dt=DT, steps=1, temperature=300.0)
    assert count_calls(system).calls == 0
