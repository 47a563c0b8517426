"""`pair_style mliap unified`: the eager model's numbers on any number of ranks, and what a wrong deck is told."""

from __future__ import annotations

import pickle
import pickletools
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import decks
import lammps_runs
import requirements
import students
from lammps_runs import crystal, deck, lmp, write_structure
from mlff_engines.checkpoint import Domain, load_checkpoint
from mlff_engines.errors import ArtifactError, SimulationError, StructureError
from mlff_engines.evaluator import Evaluator
from mlff_engines.manifest import inspect
from mlff_engines.structure import Result, Structure
from mlff_engines.validation.core_engine import CoreEngine
from mlff_engines.validation.engine import Dynamics, thermal
from mlff_engines.validation.result import STATIC, Claims, Evaluate
from mlff_engines.validation.static.conformance import check_model
from mlff_engines.validation.static.parity import reference
from mlff_lammps.engine import LAMMPSMLIAPEngine
from mlff_lammps.mliap import write_mliap

lammps_runs.require_build()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `student.pt` (float64, 2 x 4 Å, H C O) and `student.mliap`."""
    folder = tmp_path_factory.mktemp("mliap")
    shutil.copy(students.artifact(folder, features=8), folder / "student.pt")
    write_mliap(folder / "student.pt", folder / "student.mliap")
    return folder


@pytest.fixture(scope="module")
def exact(home: Path) -> Evaluate:
    """The eager model."""
    return reference(load_checkpoint(home / "member-0")[0], 4.0)


@pytest.fixture(scope="module")
def engine(home: Path) -> Iterator[LAMMPSMLIAPEngine]:
    made = LAMMPSMLIAPEngine(home / "student.pt", folder=home / "serial")
    yield made
    made.close()


@pytest.fixture
def work(tmp_path: Path, home: Path) -> Path:
    """A folder to run decks in, with a structure and the model."""
    write_structure(tmp_path, crystal())
    shutil.copy(home / "student.mliap", tmp_path)
    return tmp_path


def core_engine(home: Path) -> CoreEngine:
    """The eager model with textbook integrators."""
    potential = load_checkpoint(home / "member-0")[0].double()
    return CoreEngine(Evaluator(potential, Domain(elements=list(students.E0)), 4.0, dtype=torch.float64))


def largest(found: Result, expected: Result) -> dict[str, float]:
    return {
        name: float(np.abs(np.asarray(getattr(found, name)) - np.asarray(getattr(expected, name))).max())
        for name in ("energy", "energies", "forces", "virial")
    }


@pytest.mark.check("S1", "S2", "S3", "S4", "S5", "S6", "S7", "S9", "S10")
def test_static_checks(engine: LAMMPSMLIAPEngine, home: Path, exact: Evaluate) -> None:
    """All but S8, which is of the neighbour search of the core."""
    codes = [code for code in STATIC if code != "S8"]
    found = check_model(engine.evaluate, Claims.of(inspect(home / "student.pt")), reference=exact, only=codes)
    assert [check.code for check in found] == codes
    assert [check for check in found if not check.passed] == []


def test_stress_is_that_of_ase(engine: LAMMPSMLIAPEngine, home: Path, tmp_path: Path) -> None:
    """The same crystal through either engine: components, sign and units of the stress."""
    requirements.require_engine("ase")
    from mlff_ase.engine import ASEEngine

    found = engine.evaluate(crystal(27)).stress
    expected = ASEEngine(home / "student.pt", folder=tmp_path).evaluate(crystal(27)).stress
    assert found is not None
    assert expected is not None
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("ranks", "grids"), [(2, ["2 1 1", "1 2 1", "1 1 2"]), (4, ["4 1 1", "2 2 1", "1 1 4"])], ids=["2 ranks", "4 ranks"]
)
def test_every_number_of_ranks_gives_the_same(home: Path, exact: Evaluate, ranks: int, grids: list[str]) -> None:
    """D1: several processor grids, among them some with domains that are empty or smaller than the cutoff."""
    structures = {
        "crystal": crystal(27),
        "vacuum, so empty ranks": crystal(27, vacuum=30.0),
        "molecule": replace(crystal(8), pbc=np.zeros(3, dtype=bool)),
        "fewer atoms than ranks": Structure(np.array([8, 1]), np.array([[0.0, 0.0, 0.0], [0.9, 0.3, 0.0]])),
        "isolated": Structure(np.array([6]), np.zeros((1, 3))),
    }
    parallel = LAMMPSMLIAPEngine(home / "student.pt", folder=home / f"ranks-{ranks}", ranks=ranks)
    for grid in grids:
        parallel.processors = grid
        for name, structure in structures.items():
            off = largest(parallel.evaluate(structure), exact(structure))
            assert max(off.values()) < 1e-8, (grid, name, off)
    parallel.close()


def test_dynamics_is_that_of_the_eager_model(engine: LAMMPSMLIAPEngine, home: Path, tmp_path: Path) -> None:
    structure = crystal(27)
    dynamics = thermal(Dynamics(structure, np.zeros_like(structure.positions), 0.1, 100, 20), 300.0, 1)
    found, expected = (
        engine.run(dynamics, tmp_path / "a.lammpstrj"),
        core_engine(home).run(dynamics, tmp_path / "b.npz"),
    )
    assert np.array_equal(found.times, expected.times)
    assert np.abs(found.positions - expected.positions).max() < 1e-6
    # LAMMPS' constants give accelerations 7e-8 apart from those of CODATA
    speed = np.abs(expected.velocities).max()
    assert np.abs(found.velocities - expected.velocities).max() < 1e-5 * speed
    assert np.abs(found.total - expected.total).max() < 1e-4
    assert found.pressure is not None
    assert expected.pressure is not None
    assert np.allclose(found.pressure, expected.pressure, atol=1e-5)
    assert "ITEM: ATOMS id type element xu yu zu" in (tmp_path / "a.lammpstrj").read_text()


def test_every_skin_gives_the_same_trajectory(engine: LAMMPSMLIAPEngine, home: Path, tmp_path: Path) -> None:
    """D2, with atoms fast enough for the neighbour list to be rebuilt."""
    structure = crystal(8)
    start = thermal(Dynamics(structure, np.zeros_like(structure.positions), 0.2, 40, 40), 3000.0, 2)
    expected = core_engine(home).run(start, tmp_path / "c.npz").positions[-1]
    builds = {}
    for skin in (0.0, 0.3, 2.0):
        engine.skin = skin
        found = engine.run(start, tmp_path / "x.lammpstrj").positions[-1]
        assert np.abs(found - expected).max() < 1e-6, skin
        log = (engine.folder / "log.lammps").read_text()
        builds[skin] = int(log.rsplit("Neighbor list builds = ", 1)[1].split()[0])
    assert builds[0.0] > builds[0.3] > builds[2.0], builds
    engine.skin = 0.5


def test_langevin_keeps_the_temperature(engine: LAMMPSMLIAPEngine, tmp_path: Path) -> None:
    structure = replace(crystal(27), pbc=np.zeros(3, dtype=bool), positions=4.0 * crystal(27).positions)
    still = Dynamics(structure, np.zeros_like(structure.positions), 1.0, 400, 10, temperature=300.0, friction=50.0)
    found = engine.run(still, tmp_path / "x.lammpstrj")
    kelvin = 2 * found.kinetic[10:].mean() / (3 * len(structure) * 8.617333e-5)
    assert 240 < kelvin < 360
    again = engine.run(replace(still, seed=1), tmp_path / "y.lammpstrj")
    assert np.abs(again.positions[-1] - found.positions[-1]).max() > 1e-3


def test_real_units_are_metal_units_converted(work: Path) -> None:
    """Forces and pressure; LAMMPS' constants and those of CODATA agree to 1e-7."""
    out = """run 0
write_dump all custom {0}.dump id fx fy fz modify sort id format float %.17g
print '$(pe:%.17g) $(pxy:%.17g)' file {0}.txt"""
    found = {}
    for units in ("metal", "real"):
        ran = lmp(work, deck("student.mliap", "H C O", units=units, after=out.format(units)))
        assert ran.code == 0, ran.output
        rows = (work / f"{units}.dump").read_text().splitlines()[9:]
        forces = np.array([row.split()[1:] for row in rows], dtype=float)
        found[units] = (*np.array((work / f"{units}.txt").read_text().split(), dtype=float), forces)
    kcal = 23.060547830619026
    assert found["real"][0] == pytest.approx(found["metal"][0] * kcal, rel=1e-12)
    assert np.allclose(found["real"][2], found["metal"][2] * kcal, rtol=1e-12, atol=1e-9)
    assert found["real"][1] * 1.01325 == pytest.approx(found["metal"][1], rel=1e-6)


def test_per_atom_energies_and_virials_add_up(work: Path) -> None:
    each = " ".join
    tensor = [f"c_v[{k}]" for k in range(1, 7)]
    sums = [f"c_sum[{k}]" for k in range(1, 8)]
    after = f"""compute e all pe/atom pair
compute s all stress/atom NULL pair
compute sum all reduce sum c_e c_s[1] c_s[2] c_s[3] c_s[4] c_s[5] c_s[6]
compute v all pressure NULL virial
thermo_style custom step pe vol {each(tensor + sums)}
thermo_modify format float %.15g
run 0"""
    ran = lmp(work, deck("student.mliap", "H C O", after=after), ranks=2)
    lines = ran.log.splitlines()
    row = lines[next(i for i, line in enumerate(lines) if line.split()[:1] == ["Step"]) + 1].split()
    pe, volume, *rest = np.array(row[1:], dtype=float)
    virial, energies, stresses = np.array(rest[:6]), rest[6], np.array(rest[7:])
    assert energies == pytest.approx(pe, rel=1e-13)
    assert np.abs(virial).max() > 100
    assert np.allclose(-stresses / volume, virial, rtol=1e-9, atol=1e-6)


FORCES = "run 0\nwrite_dump all custom {}.dump id fx fy fz modify sort id format float %.17g"


def dumped(work: Path, name: str) -> np.ndarray:
    return np.loadtxt(work / f"{name}.dump", skiprows=9)[:, 1:]


@pytest.mark.parametrize("ranks", [1, 2])
def test_overlay_with_dispersion(work: Path, exact: Evaluate, ranks: int) -> None:
    """D3 alone and D3 beside the artifact differ by the artifact."""
    both = deck("student.mliap", "H C O", after=FORCES.format("both"))
    d3 = "dispersion/d3 bj pbe 9.0 7.0"
    both = both.replace("mliap unified student.mliap 1", f"hybrid/overlay mliap unified student.mliap 1 {d3}")
    both = both.replace("pair_coeff * * H C O", "pair_coeff * * mliap H C O\npair_coeff * * dispersion/d3 H C O")
    alone = deck("student.mliap", "H C O", after=FORCES.format("alone"))
    alone = alone.replace("mliap unified student.mliap 1", d3)
    for text in (both, alone):
        ran = lmp(work, text, ranks=ranks)
        assert ran.code == 0, ran.output
    assert np.abs(dumped(work, "alone")).max() > 1e-3
    assert np.abs(dumped(work, "both") - dumped(work, "alone") - exact(crystal()).forces).max() < 1e-8


def test_overlay_with_coulomb(work: Path, exact: Evaluate) -> None:
    """With a k-space solver, on two ranks."""
    style = "hybrid/overlay {}coul/long 3.5\nkspace_style ewald 1e-8"
    charges = "set type 1 charge 0.4\nset type 2 charge 0.0\nset type 3 charge -0.6\n"
    for name, model, coeff in (
        ("alone", "", ""),
        ("both", "mliap unified student.mliap 1 ", "pair_coeff * * mliap H C O\n"),
    ):
        text = deck("student.mliap", "H C O", after=f"{charges}{FORCES.format(name)}")
        text = text.replace("mliap unified student.mliap 1", style.format(model)).replace(
            "style atomic", "style charge"
        )
        text = text.replace("pair_coeff * * H C O", f"{coeff}pair_coeff * * coul/long")
        data = (work / "atoms.data").read_text()
        if "# atomic" in data:
            head, atoms = data.split("Atoms # atomic\n\n")
            rows = [row.split(" ", 2) for row in atoms.splitlines() if row]
            lines = "\n".join(f"{tag} {kind} 0.0 {rest}" for tag, kind, rest in rows)
            (work / "atoms.data").write_text(f"{head}Atoms # charge\n\n{lines}\n")
        ran = lmp(work, text, ranks=2)
        assert ran.code == 0, ran.output
    assert np.abs(dumped(work, "alone")).max() > 0.1
    assert np.abs(dumped(work, "both") - dumped(work, "alone") - exact(crystal()).forces).max() < 1e-8


MOVING = "velocity all create 300 7\nfix 1 all nve\ntimestep 0.0002\n"


def test_restart_goes_on_as_if_never_stopped(work: Path) -> None:
    ending = "write_dump all custom {}.dump id xu yu zu vx vy vz modify sort id format float %.17g"
    after = f"{MOVING}run 10\nwrite_restart half.restart\nrun 10\n{ending.format('whole')}"
    second = deck("student.mliap", "H C O", after=f"{MOVING.split(chr(10), 1)[1]}run 10\n{ending.format('again')}")
    head, rest = second.split("read_data atoms.data\n")
    assert head.startswith("units metal")
    for text in (deck("student.mliap", "H C O", after=after), f"read_restart half.restart\n{rest}"):
        ran = lmp(work, text)
        assert ran.code == 0, ran.output
    whole, again = dumped(work, "whole"), dumped(work, "again")
    np.testing.assert_allclose(again, whole, rtol=1e-10)  # ghosts, and so sums, come in another order


def test_rerun_gives_the_energies_of_the_run(work: Path) -> None:
    printing = "thermo_style custom step pe\nthermo_modify format float %.17g\nthermo 2\n"
    dump = "dump d all custom 2 t.dump id type x y z ix iy iz\ndump_modify d sort id format float %.17g\n"
    energies = []
    for after in (f"{MOVING}{dump}run 10", "rerun t.dump dump x y z ix iy iz box yes format native"):
        ran = lmp(work, deck("student.mliap", "H C O", after=printing + after))
        assert ran.code == 0, ran.output
        energies.append(decks.thermo(ran.log)["PotEng"])
    first, again = energies
    assert len(again) == 6
    assert np.allclose(first, again, rtol=0, atol=1e-9)


def test_file_is_class_path_and_hash(home: Path, tmp_path: Path) -> None:
    content = (home / "student.mliap").read_bytes()
    assert len(content) < 500
    named = [argument for _, argument, _ in pickletools.genops(content) if isinstance(argument, str)]
    assert named[:2] == ["mlff_lammps.mliap", "MLIAP"]
    assert named[2:] == [str(home / "student.pt"), inspect(home / "student.pt").sha256]
    assert pickle.loads(content).path == home / "student.pt"
    with pytest.raises(ArtifactError, match="exists; choose another name"):
        write_mliap(home / "student.pt", home / "student.mliap")
    with pytest.raises(ArtifactError, match=r"takes \*\.pt for a torch file"):
        write_mliap(home / "student.pt", tmp_path / "new.pt")
    with pytest.raises(ArtifactError, match="no artifact at"):
        write_mliap(home / "absent.pt", tmp_path / "new.mliap")


@pytest.mark.fault("S12")
def test_charge_is_refused_rather_than_dropped(engine: LAMMPSMLIAPEngine, work: Path, tmp_path: Path) -> None:
    """A deck has no word for it: the log says for which charge the artifact runs, and it is that one."""
    with pytest.raises(StructureError, match="charge 1"):
        engine.evaluate(replace(crystal(8), charge=1.0))
    domain = Domain(elements=list(students.E0), charges=[1.0], spins=[0.0])
    ion = students.artifact(tmp_path / "ion", charge=True, domain=domain)
    write_mliap(ion, work / "ion.mliap")
    ran = lmp(work, deck("ion.mliap", "H C O", after="run 0\nprint 'energy $(pe:%.15g)'"))
    assert "units metal, charge 1, unpaired electrons 0" in ran.log
    expected = reference(load_checkpoint(tmp_path / "ion" / "member-0")[0], 4.0)
    energy = float(ran.log.rsplit("energy ", 1)[1].split()[0])
    assert energy == pytest.approx(expected(replace(crystal(8), charge=1.0)).energy, abs=1e-9)
    assert abs(energy - expected(crystal(8)).energy) > 1e-3


def test_other_precision_than_the_artifacts(home: Path, exact: Evaluate, tmp_path: Path) -> None:
    single = LAMMPSMLIAPEngine(home / "student.pt", folder=tmp_path, dtype="float32")
    expected = exact(crystal(8))
    off = largest(single.evaluate(crystal(8)), expected)["forces"] / np.abs(expected.forces).max()
    single.close()
    assert 1e-9 < off < 5e-5


def test_failed_run_names_the_reason_and_leaves_the_frames(home: Path, tmp_path: Path) -> None:
    engine = LAMMPSMLIAPEngine(
        home / "student.pt", folder=tmp_path, settings=["neigh_modify every 30 delay 0 check no"]
    )
    structure = crystal(8)
    fast = thermal(Dynamics(structure, np.zeros_like(structure.positions), 0.5, 200, 1), 20000.0, 1)
    with pytest.raises(SimulationError, match="since the neighbour list was built"):
        engine.run(fast, tmp_path / "x.lammpstrj")
    assert (tmp_path / "x.lammpstrj").read_text().count("ITEM: TIMESTEP") >= 1
    assert np.isfinite(engine.evaluate(structure).energy)  # with a new process
    engine.close()
