"""Many replicas at once against one after another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import students
from mlff_engines.artifact import Artifact, load
from mlff_engines.errors import ConfigError, StructureError
from mlff_engines.md.dynamics import BatchDynamics, draw_velocities
from mlff_engines.md.integrators import Langevin, NoseHoover, VelocityVerlet, kinetic_energies
from mlff_engines.md.replicas import BatchEvaluator, Replicas
from mlff_engines.structure import MASSES, Structure
from mlff_engines.units import ACCELERATION, BOLTZMANN
from mlff_engines.validation.builtin import argon_artifact, argon_box
from mlff_engines.validation.core_engine import CoreEngine
from mlff_engines.validation.engine import Dynamics, thermal

WATER = Structure(np.array([8, 1, 1]), np.array([[0.0, 0, 0], [0.757, 0.586, 0], [-0.757, 0.586, 0]]))
METHANE = Structure(
    np.array([6, 1, 1, 1, 1]),
    0.629 * np.array([[0.0, 0, 0], [1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]),
)
BOX = replace(METHANE, cell=np.array([[4.0, 0, 0], [0.5, 4.2, 0], [0, -0.3, 3.9]]), pbc=np.ones(3, dtype=bool))
LONE = Structure(np.array([1]), np.zeros((1, 3)))
MIXED = [WATER, BOX, LONE, METHANE, WATER]
PAIR = Structure(np.array([18, 18]), np.array([[0.0, 0, 0], [3.9, 0, 0]]))


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return load(students.artifact(tmp_path_factory.mktemp("student"), charge=True))


@pytest.fixture(scope="module")
def argon(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return load(argon_artifact(tmp_path_factory.mktemp("argon")))


def clusters(count: int, atoms: int = 7) -> list[Structure]:
    """Argon atoms on a lattice, jittered; each other."""
    lattice = argon_box(2)
    rng = np.random.default_rng(1)
    return [
        Structure(lattice.numbers[:atoms], lattice.positions[:atoms] + 0.1 * rng.uniform(-1, 1, (atoms, 3)))
        for _ in range(count)
    ]


def test_each_replica_gets_what_it_gets_alone(student: Artifact) -> None:
    """Molecules, a periodic box, a lone atom, another charge; and again after some of them moved."""
    structures = [*MIXED, replace(METHANE, charge=1.0)]
    replicas = Replicas(structures)
    evaluate = BatchEvaluator(student, replicas)
    alone = student.evaluator(outside="ignore")
    rng = np.random.default_rng(0)
    for reach in (0.0, 0.05, 0.4, 0.05):
        moved = replicas.positions + torch.from_numpy(reach * rng.uniform(-1, 1, replicas.positions.shape))
        replicas.positions.copy_(moved)
        found = evaluate()
        for n, structure in enumerate(structures):
            right = alone(replace(structure, positions=moved[replicas.atoms(n)].numpy()))
            assert found.energies[n].item() == pytest.approx(right.energy, rel=1e-14)
            assert np.allclose(found.forces[replicas.atoms(n)], right.forces, rtol=1e-12, atol=1e-11)
            assert np.allclose(found.virials[n], right.virial, rtol=1e-12, atol=1e-11)
    assert 1 < evaluate.builds < 4  # the small move needed no new search


def test_only_those_that_moved_are_searched_again(student: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlff_engines.md import replicas as module

    searched, search = [], module.candidates
    monkeypatch.setattr(module, "candidates", lambda *args: searched.append(len(args[0])) or search(*args))
    replicas = Replicas(MIXED)
    evaluate = BatchEvaluator(student, replicas)
    evaluate()
    assert searched == [3, 5, 1, 5, 3]
    replicas.positions[4] += 0.3  # of the box
    evaluate()
    assert searched[5:] == [5]


def test_constant_energy_is_the_judges_own_path(argon: Artifact, tmp_path: Path) -> None:
    starts = [thermal(Dynamics(s, np.zeros((7, 3)), 2.0, 100), 30.0, n) for n, s in enumerate(clusters(3))]
    replicas = Replicas([start.structure for start in starts])
    replicas.velocities.copy_(torch.from_numpy(np.concatenate([start.velocities for start in starts])))
    dynamics = BatchDynamics(argon, replicas, VelocityVerlet(2.0))
    assert list(dynamics.run(100, every=40)) == [40, 80]
    core = CoreEngine(argon.evaluator())
    for n, start in enumerate(starts):
        right = core.run(start, tmp_path / f"{n}.npz")
        assert np.abs(replicas.positions[replicas.atoms(n)].numpy() - right.positions[-1]).max() < 1e-10
        total = right.potential[-1] + right.kinetic[-1]
        assert dynamics.conserved()[n].item() == pytest.approx(total, abs=1e-11)


@pytest.mark.parametrize(
    ("make", "tolerance"),
    [
        (lambda n: Langevin(2.0, 40.0, seeds=n), 0.0),
        (lambda n: NoseHoover(2.0, 40.0), 1e-11),  # torch's exponential depends on the place in a vector
    ],
)
def test_a_replicas_path_does_not_depend_on_the_others(argon: Artifact, make: object, tolerance: float) -> None:
    given = clusters(4)

    def last(which: list[int]) -> dict[int, torch.Tensor]:
        replicas = Replicas([given[n] for n in which])
        draw_velocities(replicas, 40.0, which)
        dynamics = BatchDynamics(argon, replicas, make(which))  # type: ignore[operator]
        list(dynamics.run(50))
        return {n: replicas.positions[replicas.atoms(k)] for k, n in enumerate(which)}

    together, two = last([0, 1, 2, 3]), last([2, 0])
    for n, positions in two.items():
        assert (positions - together[n]).abs().max() <= tolerance


@pytest.mark.parametrize(
    "integrator", [lambda: VelocityVerlet(2.0), lambda: Langevin(2.0, 40.0), lambda: NoseHoover(2.0, 40.0)]
)
def test_restart_is_bitwise(argon: Artifact, tmp_path: Path, integrator: object) -> None:
    def begin() -> BatchDynamics:
        replicas = Replicas(clusters(3))
        draw_velocities(replicas, 40.0, [5, 6, 7])
        return BatchDynamics(argon, replicas, integrator(), skin=0.3)  # type: ignore[operator]

    through, stopped, again = begin(), begin(), begin()
    list(through.run(60))
    list(stopped.run(25))
    stopped.save(tmp_path / "restart")
    again.restore(tmp_path / "restart")
    list(again.run(35))
    assert again.steps == through.steps == 60
    assert torch.equal(again.replicas.positions, through.replicas.positions)
    assert torch.equal(again.replicas.velocities, through.replicas.velocities)


def test_restart_of_other_replicas_is_refused(argon: Artifact, tmp_path: Path) -> None:
    BatchDynamics(argon, Replicas(clusters(2)), VelocityVerlet(1.0)).save(tmp_path / "restart")
    other = BatchDynamics(argon, Replicas(clusters(3)), VelocityVerlet(1.0))
    with pytest.raises(ConfigError, match="14 atoms, the replicas have 21"):
        other.restore(tmp_path / "restart")


def test_nose_hoover_conserves_its_own_energy_as_the_square_of_the_step(argon: Artifact) -> None:
    """And momentum, exactly."""

    def spread(timestep: float) -> float:
        replicas = Replicas(clusters(4))
        draw_velocities(replicas, 30.0, range(4))
        dynamics = BatchDynamics(argon, replicas, NoseHoover(timestep, [20.0, 30.0, 40.0, 50.0], period=1000.0))
        energies = [dynamics.conserved() for _ in dynamics.run(round(800 / timestep))]
        momentum = replicas.total(replicas.masses.unsqueeze(1) * replicas.velocities)
        assert momentum.abs().max() < 1e-12
        return float(torch.stack(energies).std(0).mean())

    ratio = spread(8.0) / spread(4.0)
    assert 3.5 < ratio < 4.5


@pytest.mark.parametrize("make", [Langevin, NoseHoover])
def test_each_replica_has_its_temperature(argon: Artifact, make: type[Langevin | NoseHoover]) -> None:
    """Replicas of seven atoms at two temperatures."""
    wanted = torch.tensor([15.0] * 16 + [30.0] * 16, dtype=torch.float64)
    replicas = Replicas(clusters(32))
    draw_velocities(replicas, wanted.tolist(), range(32))
    integrator = make(8.0, wanted.tolist(), **({"friction": 10.0} if make is Langevin else {"period": 300.0}))
    dynamics = BatchDynamics(argon, replicas, integrator)
    list(dynamics.run(100))
    freedom = 21 if make is Langevin else 18
    found = []
    for _ in dynamics.run(600, every=5):
        found.append(2 * kinetic_energies(replicas) / (freedom * BOLTZMANN))
    mean = torch.stack(found).mean(0)
    assert mean[:16].mean().item() == pytest.approx(15.0, rel=0.05)
    assert mean[16:].mean().item() == pytest.approx(30.0, rel=0.05)


def test_langevin_samples_the_harmonic_oscillator_exactly(argon: Artifact) -> None:
    """BAOAB has no bias in the positions of a harmonic well, whatever the step; a wrong width of the noise shows.

    Leimkuhler and Matthews (2013), section 4.
    """
    replicas = Replicas([PAIR] * 300)
    stiffness, mass, heat = 5.0, MASSES[18], BOLTZMANN * 100.0
    well = replicas.positions.clone()
    timestep = 0.6 / np.sqrt(stiffness * ACCELERATION / mass)  # ωh = 0.6
    integrator = Langevin(timestep, 100.0, friction=1e3 * 0.5 / timestep)
    integrator.begin(replicas)
    squares = []
    for step in range(400):
        integrator.step(
            replicas, -stiffness * (replicas.positions - well), lambda: -stiffness * (replicas.positions - well)
        )
        if step >= 50:
            squares.append((replicas.positions - well).square().mean().item())
    assert np.mean(squares) == pytest.approx(heat / stiffness, rel=0.02)


def test_one_that_explodes_stops_and_the_others_go_on(argon: Artifact) -> None:
    near = replace(PAIR, positions=np.array([[0.0, 0, 0], [0.9, 0, 0]]))
    given = [*clusters(1), near, *clusters(2)[1:]]
    replicas, others = Replicas(given), Replicas([given[0], given[2]])
    dynamics = BatchDynamics(argon, replicas, VelocityVerlet(2.0))
    list(dynamics.run(20))
    assert dynamics.failed == {1: 1}
    assert np.allclose(replicas.positions[replicas.atoms(1)], near.positions)
    assert not replicas.velocities[replicas.atoms(1)].any()
    alone = BatchDynamics(argon, others, VelocityVerlet(2.0))
    list(alone.run(20))
    assert torch.equal(replicas.positions[replicas.atoms(2)], others.positions[others.atoms(1)])
    assert torch.equal(replicas.positions[replicas.atoms(0)], others.positions[others.atoms(0)])


def test_forces_that_are_not_finite_stop_their_replica_only(argon: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    replicas = Replicas(clusters(3))
    dynamics = BatchDynamics(argon, replicas, VelocityVerlet(2.0))
    original, calls = Artifact.__call__, []

    def broken(self: Artifact, graph: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        out = original(self, graph)
        calls.append(1)
        energies = out["node_energy"].clone()
        energies[8] = torch.nan if len(calls) == 3 else energies[8]
        return {**out, "node_energy": energies}

    monkeypatch.setattr(Artifact, "__call__", broken)
    list(dynamics.run(10))
    assert dynamics.failed == {1: 3}
    assert dynamics.steps == 10
    assert replicas.positions.isfinite().all()


def test_velocities_are_those_of_the_temperature_at_rest() -> None:
    replicas = Replicas([METHANE] * 400)
    draw_velocities(replicas, 300.0, range(400))
    momentum = replicas.total(replicas.masses.unsqueeze(1) * replicas.velocities)
    assert momentum.abs().max() < 1e-12
    assert kinetic_energies(replicas).mean().item() == pytest.approx(6.0 * BOLTZMANN * 300.0, rel=0.05)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Replicas([]), "at least one"),
        (lambda: Replicas([Structure(np.zeros(0, dtype=int), np.zeros((0, 3)))]), "none that is empty"),
        (lambda: Replicas([WATER], masses=[np.ones(2)]), "masses of shapes"),
        (lambda: Replicas([WATER], masses=[np.array([1.0, 0.0, 1.0])]), "all positive"),
    ],
)
def test_replicas_that_are_refused(make: object, message: str) -> None:
    with pytest.raises(StructureError, match=message):
        make()  # type: ignore[operator]


def test_unknown_elements_are_refused(student: Artifact) -> None:
    with pytest.raises(StructureError, match="does not know Ar"):
        BatchEvaluator(student, Replicas([WATER, PAIR]))


@pytest.mark.parametrize(
    ("integrator", "message"),
    [
        (lambda: VelocityVerlet(0.0), "timestep 0.0; allowed: above 0"),
        (lambda: Langevin(1.0, 300.0, friction=-1.0), "friction -1.0"),
        (lambda: Langevin(1.0, [300.0, 310.0, 320.0]), "for 2 replicas"),
        (lambda: Langevin(1.0, 300.0, seeds=[1]), "1 seeds for 2 replicas"),
        (lambda: NoseHoover(1.0, -3.0), "above 0"),
        (lambda: NoseHoover(1.0, 300.0, length=0), "0 thermostats"),
    ],
)
def test_integrators_that_are_refused(argon: Artifact, integrator: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BatchDynamics(argon, Replicas([PAIR, PAIR]), integrator())  # type: ignore[operator]
