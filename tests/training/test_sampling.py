from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule

from mlff_engines.config import parse
from mlff_engines.errors import ConfigError, DataError, StructureError
from mlff_training.data.xyz import read_xyz
from mlff_training.sampling.sample import (
    Dynamics,
    NormalModes,
    Rattle,
    Relaxation,
    SamplingConfig,
    SamplingWarning,
    sample,
)
from mlff_training.sampling.selection import descriptors, farthest_points
from mlff_training.sampling.trajectories import dynamics, normal_modes, relaxation, too_close
from mlff_training.teachers.config import TeacherConfig
from mlff_training.teachers.labelling import label
from mlff_training.teachers.make import make_teacher


@pytest.fixture(autouse=True)
def _toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def einstein(atoms: Atoms, log: Path | None = None, **options: object) -> TeacherConfig:
    options |= {"anchor": atoms.positions.tolist(), "log": None if log is None else str(log)}
    return TeacherConfig(name="toy_teachers:Springs", options=options)


def lattice(side: int = 3) -> Atoms:
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3), axis=-1).reshape(-1, 3)
    return Atoms(f"Ar{len(grid)}", positions=4.0 * grid)


# ---- trajectories ---------------------------------------------------------------------------------------------------


def test_dynamics_samples_the_temperature() -> None:
    atoms = lattice()
    calculator = make_teacher(einstein(atoms, k=2.0))
    for temperature in (100.0, 400.0):
        frames = dynamics(
            atoms,
            calculator,
            temperature=temperature,
            steps=2500,
            interval=20,
            timestep=10.0,
            friction=0.02,
            seed=3,
            max_force=100.0,
        )
        energies = [frame.get_potential_energy() for frame in frames][25:]
        expected = 1.5 * (len(atoms) - 1) * units.kB * temperature  # the centre of mass rests
        assert np.mean(energies) == pytest.approx(expected, rel=0.07)


def test_normal_modes_are_the_harmonic_ensemble() -> None:
    calculator = make_teacher(TeacherConfig())
    *_, water = relaxation(molecule("H2O"), calculator, 1e-3, 200, 100.0)
    temperature = 20.0  # cold enough for the true energy to be harmonic
    frames = list(normal_modes(water, calculator, temperature=temperature, count=400, seed=0, min_wavenumber=50.0))
    rise = [calculator.get_property("energy", frame) - water.get_potential_energy() for frame in frames]
    # three vibrations: mean 3/2 kT, its standard error sqrt(3/2/400) kT = 0.06 kT
    assert np.mean(rise) / (units.kB * temperature) == pytest.approx(1.5, abs=0.2)
    moved = np.array([frame.get_center_of_mass() for frame in frames]) - water.get_center_of_mass()
    assert np.abs(moved).max() < 1e-6
    hot = list(normal_modes(water, calculator, temperature=80.0, count=5, seed=0, min_wavenumber=50.0))
    np.testing.assert_allclose(  # widths go with the square root of the temperature
        hot[0].positions - water.positions, 2 * (frames[0].positions - water.positions), rtol=1e-4, atol=1e-7
    )


def test_too_close() -> None:
    assert too_close(Atoms("OH", positions=[[0, 0, 0], [0, 0, 0.4]]))
    assert not too_close(molecule("CH3CH2OH"))
    assert too_close(Atoms("Ar", positions=[[0, 0, 0]], cell=[1.0, 9, 9], pbc=True))


# ---- the stage ------------------------------------------------------------------------------------------------------


def test_ethanol_from_its_teacher(tmp_path: Path) -> None:
    config = SamplingConfig(
        relax=Relaxation(fmax=0.05),
        md=Dynamics(temperatures=(300.0, 500.0), steps=60),
        rattle=Rattle(amplitudes=(0.05,), count=3, relax_steps=2),
        normal_modes=NormalModes(count=5),
    )
    out = tmp_path / "sampled.xyz"
    frames = sample([molecule("CH3CH2OH")], TeacherConfig(), config, out, workers=2, progress=False)
    groups = {atoms.info["group"] for atoms in frames}
    assert groups == {
        "0-C2H6O-relax",
        "0-C2H6O-md-300K-seed0",
        "0-C2H6O-md-500K-seed0",
        "0-C2H6O-rattle-0.05A",
        "0-C2H6O-modes-300K",
    }
    reference = make_teacher(TeacherConfig())
    for atoms, read in zip(frames, read_xyz(out, labels=None), strict=True):
        np.testing.assert_array_equal(atoms.positions, read.positions)
        assert ("momenta" in atoms.arrays) is False
        if "modes" in atoms.info["group"]:
            assert atoms.calc is None
        else:
            assert atoms.info["level"] == "GFN2-xTB"
            assert atoms.get_potential_energy() == pytest.approx(reference.get_property("energy", atoms), abs=1e-5)
            np.testing.assert_allclose(atoms.get_forces(), reference.get_property("forces", atoms), atol=1e-3)
    relaxed = [atoms for atoms in frames if "relax" in atoms.info["group"]]
    assert min(np.linalg.norm(atoms.get_forces(), axis=1).max() for atoms in relaxed) <= 0.05
    labelled = label(frames, TeacherConfig(), tmp_path / "labels.xyz", progress=False)
    kept = [(a, b) for a, b in zip(frames, labelled, strict=True) if a.calc is not None]
    assert all(a.get_potential_energy() == b.get_potential_energy() for a, b in kept)


def test_finished_trajectories_are_not_run_again(tmp_path: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "out.xyz"
    atoms = lattice(2)
    teacher = einstein(atoms, log)
    md = Dynamics(temperatures=(100.0,), steps=20, interval=5, timestep=10.0)
    config = SamplingConfig(relax=None, md=md)
    first = sample([atoms], teacher, config, out, progress=False)
    cost = len(log.read_text().splitlines())
    assert 20 <= cost <= 22
    second = sample([atoms], teacher, config, out, progress=False)
    assert len(log.read_text().splitlines()) == cost
    assert all(np.array_equal(a.positions, b.positions) for a, b in zip(first, second, strict=True))
    more = config.model_copy(update={"md": md.model_copy(update={"temperatures": (100.0, 200.0)})})
    assert len(sample([atoms], teacher, more, out, progress=False)) > len(first)
    assert len(log.read_text().splitlines()) == 2 * cost  # the new temperature alone
    colder = config.model_copy(update={"md": md.model_copy(update={"friction": 0.1})})
    sample([atoms], teacher, colder, out, progress=False)
    assert len(log.read_text().splitlines()) == 3 * cost  # another setting: another trajectory


def test_seeds_decide(tmp_path: Path) -> None:
    atoms = lattice(2)
    positions = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        md = Dynamics(temperatures=(100.0,), seeds=(seed,), steps=10, interval=5, timestep=10.0)
        config = SamplingConfig(relax=None, md=md)
        frames = sample([atoms], einstein(atoms), config, tmp_path / name / "out.xyz", progress=False)
        positions.append(np.array([frame.positions for frame in frames]))
    np.testing.assert_array_equal(positions[0], positions[1])
    assert np.abs(positions[0] - positions[2]).max() > 1e-3


@pytest.mark.fault("M1")
def test_explosion_is_stopped_and_the_frames_before_are_kept(tmp_path: Path) -> None:
    atoms = molecule("H2O")
    config = SamplingConfig(
        relax=None, md=Dynamics(temperatures=(300.0,), steps=500, interval=1, timestep=4.0), max_force=30.0
    )
    with pytest.warns(SamplingWarning, match=r"0-H2O-md-300K-seed0 was stopped after \d+ frame"):
        frames = sample([atoms], TeacherConfig(), config, tmp_path / "out.xyz", progress=False)
    labels = [frame for frame in frames if frame.calc is not None]
    assert labels
    assert max(np.abs(frame.get_forces()).max() for frame in labels) <= 30.0


def test_selection_and_its_shortfall(tmp_path: Path) -> None:
    atoms = lattice(2)
    md = Dynamics(temperatures=(100.0,), steps=100, interval=5, timestep=10.0)
    config = SamplingConfig(relax=None, md=md, select=7)
    assert len(sample([atoms], einstein(atoms), config, tmp_path / "out.xyz", progress=False)) == 7
    config = config.model_copy(update={"select": 500})
    with pytest.warns(SamplingWarning, match="500 structures were asked for, but only"):
        sample([atoms], einstein(atoms), config, tmp_path / "out.xyz", progress=False)


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no structures"):
        sample([], TeacherConfig(), SamplingConfig(), tmp_path / "out.xyz")
    atoms = bulk("Cu")
    atoms.info["charge"] = 1
    with pytest.raises(StructureError, match="starting structure 0: Cu has charge 1"):
        sample([atoms], TeacherConfig(name="emt"), SamplingConfig(), tmp_path / "out.xyz")
    with pytest.raises(ConfigError, match="did you mean 'temperatures'"):
        parse(SamplingConfig, {"md": {"temperature": [300]}}, "config.yaml")
    with pytest.raises(ConfigError, match="greater than 0"):
        parse(SamplingConfig, {"md": {"timestep": -1}}, "config.yaml")


# ---- selection ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("periodic", [False, True])
def test_descriptors_ignore_what_changes_no_energy(periodic: bool) -> None:
    rng = np.random.default_rng(0)
    atoms = molecule("CH3CH2OH")
    if periodic:
        atoms.set_cell([[5.0, 0, 0], [1, 5.5, 0], [0, 0.5, 6]])
        atoms.pbc = True
    same = atoms[rng.permutation(len(atoms))]
    same.positions += [3.0, -2.0, 8.0]
    same.rotate(73, (1, 2, 3), rotate_cell=True)
    if periodic:
        same.wrap()
    mirrored = atoms.copy()
    mirrored.positions *= -1
    mirrored.cell *= -1
    moved = atoms.copy()
    moved.positions[0, 0] += 0.02
    charged = atoms.copy()
    charged.info["charge"] = 1
    vectors = descriptors([atoms, same, mirrored, moved, charged])
    distances = np.linalg.norm(vectors - vectors[0], axis=1)
    assert distances[1] < 1e-8
    assert distances[2] < 1e-8
    assert distances[3] > 1e-3
    assert distances[4] > 0.5
    assert list(farthest_points(vectors, tolerance=1e-3)) in ([0, 3, 4], [1, 3, 4], [2, 3, 4])


def test_descriptors_tell_elements_and_sizes_apart() -> None:
    frames = [molecule("H2O"), molecule("H2O"), Atoms("H"), Atoms("O"), molecule("CH4")]
    frames[1].symbols[0] = "S"
    vectors = descriptors(frames)
    between = np.linalg.norm(vectors[:, None] - vectors[None], axis=2)
    assert between[0, 1] > 0.1
    assert between[0, 4] > 0.1


def test_farthest_points() -> None:
    points = np.array([[0.0], [0.1], [0.2], [5.0], [9.0], [9.0]])
    assert list(farthest_points(points, 3)) == [0, 3, 4]
    assert len(farthest_points(points)) == 5  # a duplicate less
    chosen = points[farthest_points(points, tolerance=0.15)]
    assert list(chosen.ravel()) == [0.0, 0.2, 5.0, 9.0]
    assert len(farthest_points(np.zeros((0, 1)))) == 0


def test_farthest_points_cover_better_than_chance() -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(400, 3))

    def radius(chosen: np.ndarray) -> float:
        return float(np.linalg.norm(points[:, None] - points[chosen], axis=2).min(axis=1).max())

    ours = radius(farthest_points(points, 20))
    assert ours < min(radius(rng.choice(400, 20, replace=False)) for _ in range(20))
