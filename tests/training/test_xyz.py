"""Extended XYZ: every digit and key kept, every doubtful header refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ase.io import read as ase_read
from ase.io import write as ase_write

from labelled import copper, energy, forces, plain_text, water
from mlff_engines.errors import DataError
from mlff_engines.units import BOHR, HARTREE, KCAL_PER_MOL
from mlff_training.data.dataset import digest
from mlff_training.data.formats import read, write_xyz


def test_round_trip_keeps_every_digit_and_every_key(tmp_path: Path) -> None:
    atoms = water(
        group="001",
        level="ωB97M-V, def2 \\ x=1 'q' \"p\"",
        tricky="T",
        number=3,
        flag=True,
        vector=np.array([1.0, 2e-17]),
    )
    atoms.positions += np.pi * 1e-9
    atoms.info["hessian_index"] = 4
    atoms.arrays["hessian_row"] = np.full((3, 3), 1 / 3)
    atoms.arrays["tags"] = np.array([1, 2, 3])
    atoms.calc.results |= {"energies": np.array([-1.0, 0.1, 1 / 7]), "dipole": np.array([0.1, 0.2, 1 / 3])}
    slab = copper(0.02)
    write_xyz(tmp_path / "a.xyz", [atoms, slab])
    back = read(tmp_path / "a.xyz")
    assert digest(back) == digest([atoms, slab])
    for key, value in atoms.info.items():
        assert type(back[0].info[key]) is type(value) or isinstance(back[0].info[key], np.generic)
        assert np.array_equal(back[0].info[key], value), key
    assert (back[0].arrays["tags"] == [1, 2, 3]).all()
    assert list(tmp_path.iterdir()) == [tmp_path / "a.xyz"]
    # what we write, plain ASE reads alike
    other = ase_read(tmp_path / "a.xyz", index=1)
    assert other.get_stress() == pytest.approx(slab.calc.results["stress"], rel=1e-12)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.xyz"
    write_xyz(path, [water()])
    before = path.read_bytes()
    for bad in (water(thing=object()), water(REF_energy=1.0)):
        with pytest.raises(DataError, match="frame 1"):
            write_xyz(path, [water(), bad])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("keys", "arguments", "energy_factor", "length_factor", "force_factor"),
    [
        ({}, {}, 1, 1, 1),
        ({"energy_unit": "Hartree", "length_unit": "bohr"}, {}, HARTREE, BOHR, HARTREE / BOHR),
        ({"energy_unit": "kcal/mol"}, {}, KCAL_PER_MOL, 1, KCAL_PER_MOL),
        ({}, {"energy_unit": "Hartree", "length_unit": "Bohr"}, HARTREE, BOHR, HARTREE / BOHR),
        ({"energy_unit": "Ha", "forces_unit": "Hartree/Bohr"}, {}, HARTREE, 1, HARTREE / BOHR),
        ({"energy_unit": "Hartree"}, {"energy_unit": "Hartree"}, HARTREE, 1, HARTREE),
    ],
)
def test_units(tmp_path: Path, keys, arguments, energy_factor, length_factor, force_factor) -> None:
    path = tmp_path / "a.xyz"
    path.write_text(plain_text(**keys))
    atoms = read(path, **arguments)[0]
    assert energy(atoms) == pytest.approx(-2 * energy_factor)
    assert atoms.get_distance(0, 1) == pytest.approx(2 * length_factor)
    assert forces(atoms)[0, 2] == pytest.approx(-2 * force_factor)
    assert not {"energy_unit", "length_unit", "forces_unit"} & set(atoms.info)


@pytest.mark.parametrize(
    ("keys", "arguments", "message"),
    [
        ({"energy_unit": "hartrees"}, {}, "did you mean 'Hartree'"),
        ({"dipole_unit": "D"}, {}, "unknown unit key"),
        ({"units": "metal"}, {}, "unknown unit key"),
        ({"energy_unit": "eV"}, {"energy_unit": "Hartree"}, "states the energy unit 'eV'"),
        ({"spin": 1}, {}, "may mean unpaired electrons or the multiplicity"),
        ({"multiplicity": 0}, {}, "multiplicity = 0"),
        ({"charge": 1, "total_charge": 0}, {}, "more than once"),
    ],
)
def test_doubtful_headers_are_refused(tmp_path: Path, keys, arguments, message: str) -> None:
    path = tmp_path / "a.xyz"
    path.write_text(plain_text(**keys))
    with pytest.raises(DataError, match=f"frame 0.*{message}"):
        read(path, **arguments)


def test_aliases_and_state(tmp_path: Path) -> None:
    path = tmp_path / "a.xyz"
    text = plain_text(total_charge=-1, spin_multiplicity=3, level_of_theory="PBE0")
    path.write_text(text.replace("energy=", "REF_energy=").replace("forces", "REF_forces"))
    atoms = read(path)[0]
    assert (atoms.info["charge"], atoms.info["multiplicity"], atoms.info["level"]) == (-1.0, 3, "PBE0")
    assert energy(atoms) == -2
    assert forces(atoms)[0, 2] == -2


def test_constraints_do_not_project_labels(tmp_path: Path) -> None:
    path = tmp_path / "a.xyz"
    path.write_text(
        plain_text()
        .replace("forces:R:3", "forces:R:3:move_mask:L:1")
        .replace(" 1\n", " 1 F\n")
        .replace("-2\nH", "-2 F\nH")
    )
    assert np.abs(read(path)[0].get_forces()).max() == 2


@pytest.mark.fault("T5")
def test_stress_and_virial_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.xyz"
    atoms = copper(-0.03)
    stress = atoms.get_stress(voigt=False)
    bare = atoms.copy()

    def read_with(**info: object) -> np.ndarray:
        frame = bare.copy()
        frame.info = {"energy": energy(atoms), **info}
        ase_write(path, frame, format="extxyz")
        return np.asarray(read(path)[0].get_stress(voigt=False))

    virial = -stress * atoms.get_volume()
    assert read_with(stress=stress) == pytest.approx(stress)
    assert read_with(virial=virial) == pytest.approx(stress)
    assert read_with(virials=virial.ravel()) == pytest.approx(stress)
    assert read_with(stress=stress, virial=virial) == pytest.approx(stress)
    with pytest.raises(DataError, match="opposite sign"):
        read_with(stress=stress, virial=-virial)
    with pytest.raises(DataError, match="disagree"):
        read_with(stress=stress, virial=virial * 2)
    with pytest.raises(DataError, match="frame 0: stress is not symmetric"):
        read_with(stress=stress + np.triu(stress, 1))
    with pytest.raises(DataError, match="ambiguous"):
        read_with(virials=np.array([1.0, 2, 3, 4, 5, 6]))
    assert read_with(virials=np.array([1.0, 2, 3, 0, 0, 0]))[0, 0] < 0
    bare.pbc = (True, True, False)
    with pytest.raises(DataError, match="a stress needs a volume"):
        read_with(stress=stress)
    path.write_text(
        path.read_text().replace("stress=", 'pbc="T T T" unused=').replace("energy=", 'stress="1 2 3 4 5 6" energy=')
    )
    with pytest.raises(DataError, match="need 9 numbers"):
        read(path)


def test_stress_units(tmp_path: Path) -> None:
    path = tmp_path / "a.xyz"
    atoms = copper(0.02)
    frame = atoms.copy()
    frame.info = {"energy": -1.0, "stress": np.eye(3), "stress_unit": "GPa"}
    ase_write(path, frame, format="extxyz")
    assert read(path)[0].get_stress()[0] == pytest.approx(1 / 160.21766)
    path.write_text(path.read_text().replace("GPa", "eV/Angstrom^3"))
    assert read(path)[0].get_stress()[0] == pytest.approx(1.0)
