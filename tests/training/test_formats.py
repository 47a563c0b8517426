"""Every format on real data, with units proven by physics; every damaged file refused by name and frame."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from ase.build import molecule
from ase.db import connect
from ase.io import read as ase_read

from labelled import copper, energy, forces, plain_text, water
from mlff_engines.errors import DataError
from mlff_engines.units import KCAL_PER_MOL
from mlff_training.data.dataset import digest
from mlff_training.data.formats import convert, describe, read
from mlff_training.data.labels import DataWarning
from mlff_training.data.xyz import read_xyz

# ---------------------------------------------------------------- real data


def free_atom_energies(path: Path) -> dict[str, float]:
    return {atoms.get_chemical_symbols()[0]: energy(atoms) for atoms in read(path)}


def test_rmd17_has_both_label_sets_in_ev(data_dir: Path) -> None:
    path = data_dir / "rmd17_ethanol" / "rmd17_ethanol_train_01.npz"
    new, old = read(path), read(path, labels="old")
    assert len(new) == len(old) == 1000
    assert new[0].info["level"] == "PBE/def2-SVP"
    assert old[0].info["level"] != new[0].info["level"]
    assert energy(new[0]) == pytest.approx(-97079.92222179 * KCAL_PER_MOL)
    # ethanol binds: 33.4 eV below its free atoms, here with the PBE/def2-SVP atoms of another set
    atoms = free_atom_energies(data_dir / "acac" / "isolated_atoms.xyz")
    binding = np.mean([energy(a) - sum(atoms[s] for s in a.get_chemical_symbols()) for a in new])
    assert -37 < binding < -30
    assert 1.0 < np.sqrt(np.mean([forces(a) ** 2 for a in new])) < 1.4
    assert np.corrcoef(np.ravel([forces(a) for a in new]), np.ravel([forces(a) for a in old]))[0, 1] > 0.95
    oh = [a.get_distance(2, 8) for a in new]
    assert 0.94 < np.mean(oh) < 1.0
    with pytest.raises(DataError, match="'default', 'old'"):
        read(path, labels="REF")


def test_sgdml_states_its_level_and_agrees_with_rmd17(data_dir: Path) -> None:
    frames = read(data_dir / "ethanol_ccsdt" / "ethanol_ccsd_t-train.npz")
    assert len(frames) == 1000
    assert frames[0].info["level"] == "Psi4: CCSD(T), cc-pVTZ"
    assert frames[0].get_chemical_formula() == "C2H6O"
    assert energy(frames[0]) / 9 == pytest.approx(-467.8, abs=0.2)
    assert 1.0 < np.sqrt(np.mean([forces(a) ** 2 for a in frames])) < 1.4


def test_physnet_energy_is_the_atomisation_energy(data_dir: Path) -> None:
    frames = read(data_dir / "h2co_multifid" / "h2co_B3LYP_cc-pVDZ_4001.npz")
    assert len(frames) == 4001
    assert frames[0].get_chemical_symbols() == ["C", "O", "H", "H"]
    lowest = min(frames, key=energy)
    assert energy(lowest) == pytest.approx(-15.9, abs=0.3)  # experiment: 16.2 eV with zero-point energy removed
    assert lowest.get_distance(0, 1) == pytest.approx(1.21, abs=0.02)
    # the dipoles of this file are a third of those of its CCSD(T) twin, which are in e·Å: experiment 2.33 D
    twin = min(read(data_dir / "h2co_multifid" / "h2co_ccsdt_avtz_4001.npz"), key=energy)
    assert np.linalg.norm(twin.calc.results["dipole"]) / 0.2081943 == pytest.approx(2.33, abs=0.1)


def test_deepmd_water_is_a_periodic_box_of_molecules(data_dir: Path) -> None:
    frames = read(data_dir / "deepmd_water" / "data")
    assert len(frames) == 400
    assert {a.info["group"] for a in frames} == {"data_0", "data_1", "data_2", "data_3"}
    first = frames[0]
    assert first.pbc.all()
    assert first.get_chemical_formula() == "H128O64"
    density = first.get_masses().sum() * 1.66054 / first.get_volume()
    assert density == pytest.approx(0.99, abs=0.02)  # g/cm³
    oh = np.sort(first.get_all_distances(mic=True)[first.numbers == 8][:, first.numbers == 1], axis=1)[:, :2]
    assert oh.mean() == pytest.approx(0.98, abs=0.02)
    assert "group" not in read(data_dir / "deepmd_water" / "data" / "data_0")[0].info


def test_deepmd_names_what_it_does_not_read(data_dir: Path) -> None:
    with pytest.warns(DataWarning, match=r"not read: hessian\.npy"):
        frames = read(data_dir / "deepmd_hessian" / "data" / "H8C4N2O")
    assert len(frames) == 11


@pytest.mark.parametrize("name", ["3bpa/train_300K.xyz", "acac/train_600K.xyz"])
def test_community_xyz(data_dir: Path, name: str) -> None:
    frames = read(data_dir / name)
    reference = ase_read(data_dir / name, index=":")
    assert len(frames) == len(reference) == 500
    assert all(energy(a) == b.get_potential_energy() for a, b in zip(frames, reference, strict=True))
    assert all((forces(a) == b.get_forces()).all() for a, b in zip(frames, reference, strict=True))
    assert not frames[0].pbc.any()
    extra = {"dihedrals", "config_type", "dihedral_angle"} & set(frames[0].info)
    assert extra  # kept, not dropped


def test_every_real_set_survives_the_canonical_format(data_dir: Path, tmp_path: Path) -> None:
    sources = ["rmd17_ethanol/rmd17_ethanol_test_01.npz", "acac/train_300K.xyz", "deepmd_water/data/data_3"]
    for number, name in enumerate(sources):
        target = tmp_path / f"{number}.xyz"
        summary = convert(data_dir / name, target)
        frames = read(target)
        assert summary == describe(frames)
        assert digest(frames) == digest(read(data_dir / name))
        assert "energy_unit=eV length_unit=Angstrom" in target.read_text().split("\n", 2)[1]


# ---------------------------------------------------------------- other layouts, made here


def test_deepmd_virial_molecules_and_changing_boxes(tmp_path: Path) -> None:
    frames = [copper(-0.03), copper(0.02)]
    system = tmp_path / "sys"
    (system / "set.000").mkdir(parents=True)
    (system / "type_map.raw").write_text("H\nCu\n")
    (system / "type.raw").write_text("1\n1\n1\n1\n")
    columns = {
        "coord": [a.positions.ravel() for a in frames],
        "box": [np.asarray(a.cell).ravel() for a in frames],
        "energy": [energy(a) for a in frames],
        "force": [forces(a).ravel() for a in frames],
        "virial": [-a.get_volume() * a.get_stress(voigt=False).ravel() for a in frames],
    }
    for name, column in columns.items():
        np.save(system / "set.000" / f"{name}.npy", np.array(column))
    back = read(system)
    for one, other in zip(back, frames, strict=True):
        assert np.allclose(one.cell, other.cell)
        assert one.calc.results["stress"] == pytest.approx(other.calc.results["stress"], abs=1e-12)
    assert back[0].calc.results["stress"][0] < 0 < back[1].calc.results["stress"][0]  # compressed, then stretched
    (system / "set.000" / "virial.npy").unlink()
    (system / "set.000" / "box.npy").unlink()
    with pytest.raises(DataError, match="nopbc"):
        read(system)
    (system / "nopbc").touch()
    assert not read(system)[0].pbc.any()


def test_physnet_ragged_sizes_are_cut_to_n(tmp_path: Path) -> None:
    z = np.array([[8, 1, 1], [1, 1, 0]])
    zeros = np.zeros((2, 3, 3))
    np.savez(tmp_path / "a.npz", Z=z, N=[3, 2], R=zeros + np.arange(3)[:, None], E=[1.0, 2.0], F=zeros, Q=[0.0, 1.0])
    frames = read(tmp_path / "a.npz")
    assert [len(a) for a in frames] == [3, 2]
    assert frames[1].info["charge"] == 1.0


@pytest.mark.parametrize("suffix", ["db", "json"])
def test_ase_database(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    frames = [water(), copper(0.01)]
    with connect(path) as database:
        for atoms in frames:
            database.write(atoms, level="toy", total_charge=1, group="g7")
    moved = shutil.move(path, tmp_path / "no_ending")
    back = read(moved)
    for one, other in zip(back, frames, strict=True):
        assert energy(one) == energy(other)
        assert (forces(one) == forces(other)).all()
    assert back[1].calc.results["stress"] == pytest.approx(frames[1].calc.results["stress"])
    assert (back[0].info["charge"], back[0].info["level"], back[0].info["group"]) == (1.0, "toy", "g7")


def test_schnetpack_database_with_its_units(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with connect(path) as database:
        database.metadata = {
            "_property_unit_dict": {"energy": "kcal/mol", "forces": "kcal/mol/Ang"},
            "_distance_unit": "Ang",
        }
        database.write(molecule("H2O"), data={"energy": np.array([-2.0]), "forces": np.ones((3, 3))})
    atoms = read(path)[0]
    assert energy(atoms) == pytest.approx(-2 * KCAL_PER_MOL)
    assert forces(atoms)[0, 0] == pytest.approx(KCAL_PER_MOL)


def test_convert_refuses_to_overwrite(tmp_path: Path) -> None:
    source, target = tmp_path / "a.xyz", tmp_path / "b.xyz"
    source.write_text(plain_text())
    convert(source, target, level="PBE", charge=1, multiplicity=2)
    assert read(target)[0].info == {"charge": 1.0, "multiplicity": 2, "level": "PBE"}
    before = target.read_bytes()
    with pytest.raises(DataError, match="exists"):
        convert(source, target)
    with pytest.raises(DataError, match="states level 'PBE'"):
        convert(target, tmp_path / "c.xyz", level="B3LYP")
    assert target.read_bytes() == before
    convert(source, target, overwrite=True)
    assert read(target)[0].info["level"] == "unknown"
    with pytest.raises(DataError, match=r"ending in \.xyz"):
        convert(source, tmp_path / "b.npz")


# ---------------------------------------------------------------- faults


@pytest.mark.fault("T1")
def test_missing_keys_list_found_and_expected(data_dir: Path, tmp_path: Path) -> None:
    with np.load(data_dir / "rmd17_ethanol" / "rmd17_ethanol_train_01.npz") as archive:
        kept = {key: archive[key] for key in archive.files if key != "forces"}
    np.savez(tmp_path / "a.npz", **kept)
    with pytest.raises(
        DataError, match=r"found the keys.*old_forces.*expected.*rMD17: nuclear_charges, coords, energies, forces"
    ):
        read(tmp_path / "a.npz")
    (tmp_path / "a.xyz").write_text(plain_text().replace("energy=", "my_energy="))
    with pytest.raises(DataError, match=r"frame 0 has no energy: found.*my_energy.*expected one of energy"):
        read(tmp_path / "a.xyz")
    assert read_xyz(tmp_path / "a.xyz", labels=None)[0].info["my_energy"] == -2
    system = tmp_path / "sys"
    shutil.copytree(data_dir / "deepmd_water" / "data" / "data_0", system, copy_function=shutil.copyfile)
    for folder in (system, system / "set.000"):
        folder.chmod(0o755)
    (system / "set.000" / "energy.npy").unlink()
    with pytest.raises(DataError, match=r"found \['box', 'coord', 'force'\]; expected.*energy"):
        read(system)
    (system / "type_map.raw").unlink()
    with pytest.raises(DataError, match="type_map"):
        read(system)
    with pytest.raises(DataError, match=r"expected a DeePMD system"):
        read(system / "set.000")


@pytest.mark.fault("T1")
def test_unknown_formats_and_label_sets(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\x89HDF\r\n\x1a\n")
    with pytest.raises(DataError, match=r"begins with b'\\x89HDF.*Expected extended XYZ"):
        read(tmp_path / "a")
    with pytest.raises(DataError, match=r"cannot read .*: No such file"):
        read(tmp_path / "missing.xyz")
    np.savez(tmp_path / "pickle.npz", z=np.array([object()], dtype=object))
    with pytest.raises(DataError, match="Python objects"):
        read(tmp_path / "pickle.npz")
    (tmp_path / "two.xyz").write_text(plain_text(REF_energy=-3))
    with pytest.raises(DataError, match=r"several label sets.*labels='plain' or labels='REF'"):
        read(tmp_path / "two.xyz")
    assert energy(read(tmp_path / "two.xyz", labels="REF")[0]) == -3
    assert energy(read(tmp_path / "two.xyz", labels="plain")[0]) == -2


@pytest.mark.fault("T2")
def test_xyz_cut_anywhere_names_the_frame(data_dir: Path, tmp_path: Path) -> None:
    lines = (data_dir / "acac" / "train_300K.xyz").read_text().split("\n")[: 3 * 17]
    path = tmp_path / "a.xyz"
    for cut in (2 * 17 + 1, 2 * 17 + 2, 2 * 17 + 9):
        path.write_text("\n".join(lines[:cut]))
        with pytest.raises(DataError, match=r"frame 2 .*cut short"):
            read(path)
    path.write_text("\n".join(lines)[:-30])  # in the middle of the last line
    with pytest.raises(DataError, match=r"frame 2 .*atom 14 has"):
        read(path)
    path.write_text("\n".join(lines[:20] + lines[21:]))  # a line lost inside frame 1
    with pytest.raises(DataError, match="frame 1"):
        read(path)
    path.write_text("\n".join(lines).replace("C   ", "Q   ", 1))
    with pytest.raises(DataError, match="frame 0 cannot be read"):
        read(path)


@pytest.mark.fault("T2")
def test_ragged_or_truncated_arrays_name_the_frame(data_dir: Path, tmp_path: Path) -> None:
    source = data_dir / "rmd17_ethanol" / "rmd17_ethanol_train_01.npz"
    with np.load(source) as archive:
        data = {key: archive[key] for key in archive.files}
    np.savez(tmp_path / "a.npz", **{**data, "forces": data["forces"][:700]})
    with pytest.raises(DataError, match="frame 700 is missing from forces"):
        read(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", **{**data, "coords": data["coords"][:, :8]})
    with pytest.raises(DataError, match=r"coords has shape \(1000, 8, 3\); expected \(1000, 9, 3\)"):
        read(tmp_path / "b.npz")
    (tmp_path / "c.npz").write_bytes(source.read_bytes()[:300_000])
    with pytest.raises(DataError, match="truncated or damaged"):
        read(tmp_path / "c.npz")
    z = np.array([[8, 1, 1], [1, 1, 1]])
    np.savez(tmp_path / "d.npz", Z=z, N=[3, 2], R=np.zeros((2, 3, 3)), E=np.zeros(2), F=np.zeros((2, 3, 3)))
    with pytest.raises(DataError, match="frame 1 is ragged: N = 2"):
        read(tmp_path / "d.npz")


@pytest.mark.fault("T2")
def test_ragged_deepmd_sets_name_the_frame(data_dir: Path, tmp_path: Path) -> None:
    source = data_dir / "deepmd_water" / "data" / "data_0"
    folder = tmp_path / "set.000"
    folder.mkdir()
    for file in [*source.glob("*.raw"), *source.glob("set.000/*.npy")]:
        shutil.copyfile(file, tmp_path / file.relative_to(source))
    np.save(folder / "force.npy", np.load(folder / "force.npy")[:33])
    with pytest.raises(DataError, match=r"set\.000 is ragged: frame 33 is missing from force"):
        read(tmp_path)
    os.truncate(folder / "force.npy", 5000)
    with pytest.raises(DataError, match=r"force\.npy is truncated"):
        read(tmp_path)
    np.save(folder / "force.npy", np.load(folder / "coord.npy")[:, :-3])
    with pytest.raises(DataError, match=r"force\.npy has shape \(80, 573\)"):
        read(tmp_path)
