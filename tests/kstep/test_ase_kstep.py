"""KStepDynamics in ASE: counts, conservation, exactness, restarts and refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms, units
from ase.calculators.calculator import Calculator, all_changes
from ase.constraints import FixAtoms, FixBondLengths
from ase.io.trajectory import Trajectory
from ase.md.md import MolecularDynamics
from ase.md.verlet import VelocityVerlet

import kstep_jumps
import students
from kstep_systems import MASSES, START, molecule
from mlff_ase import MLFFCalculator
from mlff_ase.bonds import constrain, hydrogen_bonds
from mlff_ase.counting import CountedCalculator
from mlff_ase.kstep import KStepDynamics
from mlff_engines.errors import ConfigError, SimulationError, StructureError
from mlff_engines.kstep.jumps import Displacement, ballistic
from mlff_engines.kstep.learned import export_jump
from mlff_engines.kstep.particles import ForceField
from mlff_engines.structure import Structure

FS = units.fs


class Analytic(Calculator):
    """A `ForceField` as an ASE calculator; counts its own evaluations."""

    implemented_properties = ("energy", "forces")

    def __init__(self, field: ForceField) -> None:
        super().__init__()
        self.field, self.evaluations = field, 0

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        self.evaluations += 1
        found = self.field(self.atoms.positions)
        self.results = {"energy": found.energy, "forces": found.forces}


def system(seed: int = 0, temperature: float = 300.0) -> Atoms:
    atoms = Atoms("CHOH", START, masses=MASSES, calculator=Analytic(molecule(4.0)))
    width = np.sqrt(units.kB * temperature / MASSES)[:, None]
    v = width * np.random.default_rng(seed).standard_normal((4, 3))
    atoms.set_velocities(v - MASSES @ v / MASSES.sum())
    return atoms


def dynamics(atoms: Atoms | None = None, student: object = None, **settings: object) -> KStepDynamics:
    defaults = {"variant": "C", "steps": 4, "constraints": "hbonds"}
    return KStepDynamics(
        system() if atoms is None else atoms,
        0.5 * FS,
        Analytic(molecule(4.4)) if student is None else student,
        **(defaults | settings),
    )


@pytest.mark.parametrize(("variant", "per_step"), [("A1", 1), ("A2", 2), ("C", 1), ("D", 1)])
def test_true_calls_are_counted_where_they_are_made(variant: str, per_step: int) -> None:
    atoms = system()
    true = atoms.calc
    run = dynamics(atoms, variant=variant, temperature_K=300.0)
    assert isinstance(run, MolecularDynamics)
    run.run(10)
    assert run.meter.by_purpose["dynamics"] == 10 * per_step
    assert run.meter.by_purpose["start"] == (1 if variant in "CD" else 0)
    assert run.meter.calls == true.evaluations
    macro = 4 if variant in "CD" else 5
    assert run.get_time() == pytest.approx(10 * macro * 0.5 * FS)


def test_what_reporters_ask_is_counted_as_theirs(tmp_path: Path) -> None:
    """C's last force is known, so asking again is free; A1's is not; after a rejection D's is known again."""
    for variant, expected in (("C", 0), ("A1", 6), ("D", 0)):
        atoms = system()
        true = atoms.calc
        run = dynamics(atoms, variant=variant, temperature_K=300.0, logfile=str(tmp_path / variant))
        run.attach(atoms.get_potential_energy)
        run.run(5)
        assert run.meter.by_purpose["reporters"] <= expected + (variant != "A1")
        assert run.meter.by_purpose["reporters"] >= expected
        assert run.meter.calls == true.evaluations
        assert len((tmp_path / variant).read_text().splitlines()) == 7


def test_after_a_rejection_energy_and_forces_are_those_of_the_configuration_kept() -> None:
    atoms = system()
    wild = Analytic(molecule(20.0))
    run = dynamics(atoms, wild, variant="D", temperature_K=300.0, steps=6)
    before = atoms.get_positions()
    while run.counts.accepted == run.counts.proposals:
        before = atoms.get_positions()
        run.run(1)
    np.testing.assert_array_equal(atoms.get_positions(), before)
    fresh = Atoms("CHOH", before, calculator=Analytic(molecule(4.0)))
    assert atoms.get_potential_energy() == fresh.get_potential_energy()
    np.testing.assert_array_equal(atoms.get_forces(apply_constraint=False), fresh.get_forces())


def total_energy_spread(run: MolecularDynamics, steps: int) -> float:
    energies = []
    run.attach(lambda: energies.append(run.atoms.get_total_energy()))
    run.run(steps)
    return float(np.std(energies))


def test_c_conserves_the_true_energy_which_a_does_not_and_keeps_the_bonds() -> None:
    run = dynamics()
    lengths = [run.atoms.get_distance(*pair) for pair in ([0, 1], [2, 3])]
    spread = total_energy_spread(run, 200)
    np.testing.assert_allclose([run.atoms.get_distance(*pair) for pair in ([0, 1], [2, 3])], lengths, rtol=1e-10)
    assert run.atoms.get_number_of_degrees_of_freedom() == 10
    assert spread < 2e-3
    assert total_energy_spread(dynamics(variant="A1", steps=12), 80) > 2 * spread


def test_c_with_the_true_potential_as_student_is_velocity_verlet() -> None:
    ours, theirs = system(), system()
    KStepDynamics(ours, 0.25 * FS, Analytic(molecule(4.0)), variant="C", steps=4, constraints="none").run(10)
    VelocityVerlet(theirs, 0.25 * FS).run(40)
    np.testing.assert_allclose(ours.positions, theirs.positions, atol=1e-7)  # constants of 2014 and 2018


@pytest.mark.slow
def test_d_samples_the_same_energies_with_a_good_and_a_corrupted_student() -> None:
    """Mean true potential energy, from proposals of a right student and of one 25 % off."""
    found = []
    for depth in (4.0, 5.0):
        energies: list[float] = []
        run = dynamics(
            student=Analytic(molecule(depth)), variant="D", steps=12, temperature_K=300.0, constraints="none"
        )
        run.run(40)
        run.attach(lambda energies=energies, run=run: energies.append(run.atoms.get_potential_energy()))
        run.run(240)
        blocks = np.reshape(energies[-240:], (20, -1)).mean(1)
        found.append((blocks.mean(), blocks.std(ddof=1) / np.sqrt(20), run.counts.acceptance))
    (good, error, always), (bad, other, seldom) = found
    assert abs(good - bad) < 4 * np.hypot(error, other)
    assert always > 0.95
    assert 0.3 < seldom < always - 0.05


def test_d_adapts_in_the_burn_in_only() -> None:
    run = dynamics(
        student=Analytic(molecule(5.0)), variant="D", steps=1, temperature_K=300.0, burn_in=40, longest=30, jitter=0.2
    )
    run.run(40)
    assert (run.counts.proposals, run.counts.burn_in_proposals) == (0, 40)
    found = run.trajectory_length
    assert found > 0.5 * FS
    run.run(20)
    assert run.trajectory_length == found
    assert run.counts.proposals == 20


@pytest.mark.slow
def test_friction_brings_c_and_a_to_the_temperature() -> None:
    for variant in ("C", "A2"):
        atoms = system(temperature=1.0)
        run = dynamics(
            atoms, Analytic(molecule(4.1)), variant=variant, temperature_K=300.0, friction=0.05 / FS, fixcm=False
        )
        run.run(50)
        kinetic: list[float] = []
        run.attach(lambda kinetic=kinetic, atoms=atoms: kinetic.append(atoms.get_kinetic_energy()))
        run.run(300)
        blocks = np.reshape(kinetic[-300:], (15, -1)).mean(1)
        expected = 10 / 2 * units.kB * 300
        assert abs(blocks.mean() - expected) < 4 * blocks.std(ddof=1) / np.sqrt(15) + 0.02 * expected


@pytest.mark.parametrize(
    "settings",
    [
        {"variant": "C"},
        {"variant": "C", "friction": 0.01 / FS, "temperature_K": 300.0},
        {"variant": "A2", "friction": 0.01 / FS, "temperature_K": 300.0},
        {"variant": "D", "temperature_K": 300.0, "burn_in": 7, "friction": 0.01 / FS, "jitter": 0.2},
    ],
)
def test_restarts_are_bit_exact(tmp_path: Path, settings: dict[str, object]) -> None:
    straight = dynamics(**settings)
    straight.run(10)
    first = dynamics(**settings)
    first.run(4)
    first.save(tmp_path / "restart.npz")
    second = dynamics(system(seed=9), **settings)
    second.restore(tmp_path / "restart.npz")
    second.run(6)
    np.testing.assert_array_equal(second.atoms.positions, straight.atoms.positions)
    np.testing.assert_array_equal(second.atoms.get_momenta(), straight.atoms.get_momenta())
    assert (second.nsteps, second.get_time(), second.counts) == (10, straight.get_time(), straight.counts)
    assert second.meter.by_purpose["dynamics"] == straight.meter.by_purpose["dynamics"]


def test_a_restart_of_another_run_is_refused(tmp_path: Path) -> None:
    dynamics().save(tmp_path / "restart.npz")
    with pytest.raises(ConfigError, match=r"belongs to another run: steps 4 -> 5"):
        dynamics(steps=5).restore(tmp_path / "restart.npz")
    (tmp_path / "restart.npz").write_bytes(b"PK")
    with pytest.raises(ConfigError, match="cannot restart from"):
        dynamics().restore(tmp_path / "restart.npz")


def test_clamped_jumps_fall_back_to_true_steps_and_are_counted() -> None:
    calls = iter([0, 2, 0])
    plain = ballistic(2.0)

    def sometimes(x: np.ndarray, v: np.ndarray) -> Displacement:
        jump = plain(x, v)
        return Displacement(jump.dx, jump.dv, next(calls))

    run = dynamics(student=sometimes, variant="A1")
    run.run(3)
    assert (run.counts.clamp_hits, run.counts.fallbacks) == (2, 1)
    assert run.meter.by_purpose == {"dynamics": 2, "fallback": 6}


def test_the_unsafe_macro_step_is_refused() -> None:
    safe = dynamics(steps=4)
    assert safe.meter.by_purpose.keys() == {"check"}
    assert safe.meter.calls <= 24
    assert dynamics(steps=1).meter.calls == 0  # true dynamics
    with pytest.raises(ConfigError, match=r"macro-step of 20 fs is unsafe: .*resonances begin at 8.45 fs"):
        dynamics(steps=40)
    assert dynamics(steps=40, allow_unsafe=True).meter.calls == 0
    damped = dynamics(
        student=Analytic(molecule(4.02)), steps=16, friction=0.02 / FS, temperature_K=300.0, constraints="hbonds"
    )
    assert damped.meter.by_purpose.keys() <= {"check"}


def test_a_student_artifact_runs_and_foreign_elements_are_refused(tmp_path: Path) -> None:
    path = students.artifact(tmp_path)
    run = dynamics(student=path, variant="C", steps=2, allow_unsafe=True)
    run.run(2)
    assert run.meter.calls == 3
    atoms = system()
    atoms.numbers[0] = 7
    with pytest.raises(StructureError, match="does not know N"):
        dynamics(atoms, path)


@pytest.mark.parametrize("speed", [1e9, np.inf], ids=["far away", "not finite"])
def test_an_explosion_is_told(tmp_path: Path, speed: float) -> None:
    """Far away no neighbours can be found any more."""
    atoms = to_atoms(kstep_jumps.ETHANOL)
    student = students.artifact(tmp_path)
    atoms.calc = MLFFCalculator(student, outside="ignore")
    run = KStepDynamics(atoms, 0.5 * units.fs, student, steps=2, constraints="none", allow_unsafe=True)
    run.run(1)
    atoms.set_velocities(np.full((9, 3), speed))
    with pytest.raises(SimulationError, match=r"step 2: .*look at the"):
        run.run(1)


def test_trajectories_record_true_energies(tmp_path: Path) -> None:
    run = dynamics(trajectory=str(tmp_path / "run.traj"))
    run.run(3)
    with Trajectory(str(tmp_path / "run.traj")) as frames:
        assert len(frames) == 4
        expected = molecule(4.0)(frames[-1].positions).energy
        assert frames[-1].get_potential_energy() == pytest.approx(expected, abs=1e-12)
        assert frames.description["variant"] == "C"


def test_asking_twice_counts_once_and_moving_counts_again() -> None:
    atoms = system()
    atoms.calc = counted = CountedCalculator(atoms.calc)
    atoms.get_potential_energy()
    atoms.get_forces()
    assert counted.meter.calls == 1
    atoms.positions[0, 0] += 0.1
    atoms.get_forces()
    atoms.info["charge"] = 1
    atoms.get_forces()
    assert counted.meter.calls == 2 + (counted.inner.evaluations == 3)


def test_pairs_that_are_all_hydrogen_bonds_are_called_so() -> None:
    assert constrain(system(), [[1, 0], [2, 3]])[1] == "hbonds"
    assert constrain(system(), [[0, 1]])[1] == "bonds"
    assert constrain(Atoms("HOO", [[5, 0, 0], [0, 0, 0], [1.2, 0, 0]]), [[1, 2]])[1] == "bonds"
    assert constrain(system(), "none") == (None, "none")


def test_hydrogen_bonds_are_found() -> None:
    water = Atoms("OHHOHH", [[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0], [3, 0, 0], [3.96, 0, 0], [2.76, 0.93, 0]])
    assert hydrogen_bonds(water) == [[0, 1], [0, 2], [3, 4], [3, 5]]
    with pytest.raises(StructureError, match="hydrogen 0 is bonded to no atom"):
        hydrogen_bonds(Atoms("HO", [[0, 0, 0], [4, 0, 0]]))


def lost(x: np.ndarray, v: np.ndarray) -> Displacement:
    return Displacement(np.full_like(x, np.nan), v)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"variant": "B"}, "variant 'B'"),
        ({"variant": "D"}, "variant D .*needs a temperature above 0"),
        ({"friction": 0.1}, "needs a temperature"),
        ({"steps": 0}, "0 steps"),
        ({"constraints": "allbonds"}, "constraints='allbonds'"),
        ({"student": ballistic(2.0)}, "variant C needs a student potential, got a jump"),
        ({"jitter": 1.0}, "jitter 1"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        dynamics(**settings)


def test_wrong_atoms_and_broken_jumps_are_refused() -> None:
    bare = system()
    bare.calc = None
    with pytest.raises(ConfigError, match="no calculator"):
        dynamics(bare)
    fixed = system()
    fixed.set_constraint(FixAtoms([0]))
    with pytest.raises(ConfigError, match="constraints of the kind FixAtoms"):
        dynamics(fixed)
    off = system()
    off.set_constraint(FixBondLengths([[0, 1]], bondlengths=[1.2]))
    with pytest.raises(SimulationError, match=r"bond 0-1 is .* long at the start"):
        dynamics(off, constraints=None)
    with pytest.raises(SimulationError, match="jump of atom 0 is not finite"):
        dynamics(student=lost, variant="A1").run(1)


def test_a_jump_artifact_runs_only_as_it_was_made(tmp_path: Path) -> None:
    path = tmp_path / "jump.pt"
    terms = kstep_jumps.TERMS.model_copy(update={"timestep": 0.5})
    export_jump(kstep_jumps.checkpoint(tmp_path / "best", terms=terms, temperature=True), path)

    def ethanol(mass: float = 1.008) -> Atoms:
        found = to_atoms(kstep_jumps.ETHANOL)
        found.set_masses(np.where(found.numbers == 1, mass, kstep_jumps.M))
        found.calc = MLFFCalculator(students.artifact(tmp_path), outside="ignore")
        return found

    run = dynamics(ethanol(), path, variant="A1", temperature_K=300.0)
    run.run(2)
    assert run.meter.by_purpose["dynamics"] == 2
    assert abs(run.atoms.get_momenta().sum(0)).max() < 1e-12
    for change, match in (({"steps": 8}, "steps per jump: 8"), ({"constraints": "none"}, "constraints: none")):
        with pytest.raises(ConfigError, match=match):
            dynamics(ethanol(), path, **({"variant": "A1", "temperature_K": 300.0} | change))
    with pytest.raises(ConfigError, match="masses: 3 amu on atom 3"):
        dynamics(ethanol(3.0), path, variant="A1", temperature_K=300.0)
    with pytest.raises(ConfigError, match="variant D needs a student potential, got a jump"):
        dynamics(ethanol(), path, variant="D", temperature_K=300.0)


def to_atoms(structure: Structure) -> Atoms:
    return Atoms(structure.numbers, structure.positions)
