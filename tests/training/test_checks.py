"""Checks catch data damaged on purpose and let real data pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator

from mlff_engines.errors import DataError
from mlff_engines.units import BOHR, HARTREE, KCAL_PER_MOL, KJ_PER_MOL
from mlff_training.data.checks import check_frames
from mlff_training.data.duplicates import check_splits, duplicate_pairs
from mlff_training.data.e0 import fit_e0
from mlff_training.data.formats import read
from mlff_training.data.labels import DataWarning


def labelled(atoms: Atoms, energy: float, forces: np.ndarray | None = None) -> Atoms:
    forces = np.zeros((len(atoms), 3)) if forces is None else forces
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
    return atoms


def scaled(frames: list[Atoms], energy: float = 1.0, forces: float = 1.0, lengths: float = 1.0) -> list[Atoms]:
    out = []
    for atoms in frames:
        copy = atoms.copy()
        copy.positions *= lengths
        copy.set_cell(np.asarray(copy.cell) * lengths)
        out.append(labelled(copy, atoms.calc.results["energy"] * energy, atoms.calc.results["forces"] * forces))
    return out


@pytest.fixture(scope="module")
def ethanol(data_dir: Path) -> list[Atoms]:
    return read(data_dir / "rmd17_ethanol" / "rmd17_ethanol_train_01.npz")[:100]


@pytest.fixture(scope="module")
def copper() -> list[Atoms]:
    frames = []
    for seed in range(8):
        atoms = bulk("Cu", cubic=True)
        atoms.rattle(0.1, seed=seed)
        atoms.calc = EMT()
        frames.append(labelled(atoms.copy(), atoms.get_potential_energy(), atoms.get_forces()))
    return frames


@pytest.mark.parametrize(
    "name",
    [
        "rmd17_aspirin/rmd17_aspirin_train_01.npz",
        "ethanol_ccsdt/ethanol_ccsd_t-train.npz",
        "h2co_multifid/h2co_ccsdt_avtz_4001.npz",
        "3bpa/train_mixedT.xyz",
        "3bpa/iso_atoms.xyz",
        "acac/train_600K.xyz",
        "deepmd_water/data/data_0",
        "so3lr/reference/water_64.xyz",
    ],
)
def test_real_data_pass(data_dir: Path, name: str) -> None:
    frames = read(data_dir / name)
    report = check_frames(frames, name)
    assert report.frames == len(frames)
    if report.stiffness is not None:
        assert 25 < report.stiffness < 45  # C-H 31, N-H 40, O-H 52 eV/Å² where harmonic


def test_metal_and_noble_gas_pass(copper: list[Atoms]) -> None:
    assert check_frames(copper, "copper").force_rms > 0.1
    argon = Atoms("Ar2", [[0, 0, 0], [0, 0, 3.8]])
    assert check_frames([labelled(argon, -0.01)], "argon").min_distance == pytest.approx(3.8)


@pytest.mark.fault("T3")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"energy": 1 / KCAL_PER_MOL, "forces": 1 / KCAL_PER_MOL}, "probably in kcal/mol/Angstrom"),
        ({"energy": 1 / KJ_PER_MOL, "forces": 1 / KJ_PER_MOL}, "probably in kJ/mol/Angstrom"),
        ({"energy": 1 / HARTREE, "forces": BOHR / HARTREE}, "probably in Hartree/Bohr.*energy_unit='Hartree'"),
        ({"energy": 1 / HARTREE, "forces": 1 / HARTREE}, "probably in Hartree/Angstrom"),
        ({"energy": 1e3, "forces": 1e3}, "probably in meV/Angstrom"),
        ({"lengths": 1 / BOHR}, "probably in Bohr: read with length_unit='Bohr'"),
        ({"lengths": 0.1}, "probably in nm: read with length_unit='nm'"),
        ({"lengths": BOHR}, "probably Angstrom taken for Bohr"),
        ({"lengths": 10.0}, "probably Angstrom taken for nm"),
        ({"energy": 1 / HARTREE}, "energies are probably in Hartree and forces in eV"),
        ({"forces": BOHR / HARTREE}, "probably in Hartree/Bohr"),
    ],
)
def test_a_whole_set_in_other_units(ethanol: list[Atoms], changes: dict[str, float], message: str) -> None:
    wrong = scaled(ethanol, **changes)
    with pytest.raises(DataError, match=message):
        check_frames(wrong, "set")
    assert check_frames(wrong, "set", trust_units=True).frames == 100


@pytest.mark.fault("T3")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"energy": HARTREE}, "frame 40 .10 such frames.: the energy .* eV taken for Hartree"),
        ({"energy": 1 / HARTREE}, "frame 40 .10 such frames.: the energy .* in Hartree"),
        ({"energy": 1 / KCAL_PER_MOL}, "frame 40 .10 such frames.: the energy .* in kcal/mol"),
        ({"energy": 1 / KJ_PER_MOL}, "frame 40 .10 such frames.: the energy .* in kJ/mol"),
        ({"forces": 1 / KCAL_PER_MOL}, "frame 40 .10 such frames.: .*force constant.* in kcal/mol/Angstrom"),
        ({"forces": BOHR / HARTREE}, "frame 40 .10 such frames.: .*force constant.* in Hartree/Bohr"),
        ({"lengths": 1 / BOHR}, "frame 40 .10 such frames.: distances are 1.89 times"),
        ({"lengths": 0.1}, "frame 40 .10 such frames.: distances are 0.1 times"),
    ],
)
def test_some_frames_in_other_units(ethanol: list[Atoms], changes: dict[str, float], message: str) -> None:
    mixed = ethanol[:40] + scaled(ethanol[40:50], **changes) + ethanol[50:]
    with pytest.raises(DataError, match=message):
        check_frames(mixed, "set")


@pytest.mark.fault("T3")
def test_large_forces_without_hydrogen(copper: list[Atoms]) -> None:
    with pytest.raises(DataError, match=r"rms force .*probably in kcal/mol/Angstrom"):
        check_frames(scaled(copper, forces=1 / KCAL_PER_MOL), "copper")


@pytest.mark.fault("T3")
def test_energies_that_vary_too_much_are_named(ethanol: list[Atoms]) -> None:
    with pytest.warns(DataWarning, match=r"isomers, or energies in kcal/mol"):
        check_frames(scaled(ethanol, energy=1 / KCAL_PER_MOL), "set")


@pytest.mark.fault("T4")
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_labels_that_are_not_finite(ethanol: list[Atoms], value: float) -> None:
    for name in ("energy", "forces"):
        bad = scaled(ethanol)
        if name == "energy":
            bad[7].calc.results["energy"] = value
        else:
            bad[7].calc.results["forces"][4, 1] = value
        with pytest.raises(
            DataError, match=f"set, frame 7: {name} is not finite.*{'atom 4' if name == 'forces' else ''}"
        ):
            check_frames(bad, "set")
    bad = scaled(ethanol)
    bad[3].positions[2, 0] = value
    with pytest.raises(DataError, match=r"frame 3: position is not finite .atom 2"):
        check_frames(bad, "set")


@pytest.mark.fault("T4")
def test_nan_read_from_a_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.xyz"
    path.write_text("1\nProperties=species:S:1:pos:R:3:forces:R:3 energy=-1\nH 0 0 0 0 NaN 0\n")
    with pytest.raises(DataError, match="forces is not finite"):
        check_frames(read(path), str(path))


def test_coincident_atoms_and_empty_sets(ethanol: list[Atoms]) -> None:
    bad = scaled(ethanol)
    bad[9].positions[5] = bad[9].positions[1]
    with pytest.raises(DataError, match=r"frame 9: atoms 1 \(C\) and 5 \(H\) coincide"):
        check_frames(bad, "set")
    with pytest.raises(DataError, match="holds no frames"):
        check_frames([], "set")
    with pytest.raises(DataError, match="frame 0 has no atoms"):
        check_frames([Atoms()], "set")


# ---------------------------------------------------------------- splits


def moved(atoms: Atoms, seed: int = 0) -> Atoms:
    """The same molecule rotated, shifted and with its atoms in another order."""
    rng = np.random.default_rng(seed)
    copy = atoms.copy()
    copy.rotate(*rng.uniform(0, 360, 1), v=rng.normal(size=3))
    copy.translate(rng.normal(size=3) * 10)
    return copy[rng.permutation(len(copy))]


@pytest.mark.fault("T6")
def test_duplicates_across_splits(ethanol: list[Atoms]) -> None:
    train, valid = ethanol[:60], ethanol[60:]
    check_splits({"train": train, "valid": valid})
    with pytest.raises(DataError, match=r"1 structure.*train\[5\] = valid\[40\] \(identical\)"):
        check_splits({"train": train, "valid": [*valid, train[5]]})
    with pytest.raises(DataError, match=r"train\[5\] = valid\[40\] \(rotated, shifted or reordered\)"):
        check_splits({"train": train, "valid": [*valid, moved(train[5])]})
    check_splits({"train": [*train, train[3]], "valid": valid})  # inside one part it is no leak


@pytest.mark.fault("T6")
def test_duplicates_in_periodic_boxes(data_dir: Path) -> None:
    frames = read(data_dir / "deepmd_water" / "data" / "data_0")[:6]
    wrapped = frames[2].copy()
    wrapped.translate([3.0, -7.0, 20.0])
    wrapped.wrap()
    rotated = frames[4].copy()
    rotated.rotate(33, (1, 2, 3), rotate_cell=True)
    assert duplicate_pairs([*frames, wrapped, rotated]) == [(2, 6), (4, 7)]


def test_near_structures_are_no_duplicates(ethanol: list[Atoms]) -> None:
    nudged = ethanol[0].copy()
    nudged.positions[8] += [0.002, 0.0, 0.0]
    ion = ethanol[0].copy()
    ion.info = {**ion.info, "charge": 1.0}
    noisy = moved(ethanol[0])
    noisy.positions += np.random.default_rng(1).normal(size=(9, 3)) * 1e-8
    assert duplicate_pairs([ethanol[0], nudged, ion, noisy]) == [(0, 3)]


def test_real_duplicates_are_found(data_dir: Path) -> None:
    frames = read(data_dir / "ethanol_ccsdt" / "ethanol_ccsd_t-train.npz")
    assert duplicate_pairs(frames) == [(280, 736), (773, 826)]


# ---------------------------------------------------------------- E0


def test_e0_fit_recovers_exact_energies() -> None:
    true = {"H": -13.6, "C": -1029.0, "O": -2041.0}
    names = ["H2O", "CH4", "CO2", "CH3OH", "C2H6"]
    frames = [labelled(m := molecule(name), sum(true[s] for s in m.get_chemical_symbols())) for name in names]
    fit = fit_e0(frames)
    assert fit.e0 == pytest.approx(true)
    assert (fit.source, fit.rank) == ("fit", 3)


def test_one_molecule_needs_no_fuss(ethanol: list[Atoms]) -> None:
    fit = fit_e0(ethanol)  # a warning would be an error here
    mean = np.mean([atoms.calc.results["energy"] for atoms in ethanol])
    assert sum(fit.e0[s] for s in ethanol[0].get_chemical_symbols()) == pytest.approx(mean)
    assert fit.rank == 1
    assert "smallest-norm" in fit.note


@pytest.mark.fault("T7")
def test_singular_e0(ethanol: list[Atoms]) -> None:
    one, two = labelled(molecule("H2O"), -14.0), labelled(Atoms("H4O2", np.arange(18.0).reshape(6, 3)), -28.0)
    with pytest.warns(DataWarning, match=r"do not determine E0 of H, O \(rank 1 of 2\)"):
        fit = fit_e0([one, two])
    assert 2 * fit.e0["H"] + fit.e0["O"] == pytest.approx(-14.0)
    with pytest.raises(DataError, match=r"no frame with an energy contains C"):
        fit_e0([one, molecule("CH4")])
    with pytest.raises(DataError, match="not finite"):
        fit_e0([one, labelled(molecule("H2"), np.nan)])
    with pytest.raises(DataError, match="no frames"):
        fit_e0([])


@pytest.mark.fault("T7")
def test_given_and_isolated_e0(data_dir: Path, ethanol: list[Atoms]) -> None:
    with pytest.raises(DataError, match="e0 lacks C, O"):
        fit_e0(ethanol, {"H": -13.6})
    with pytest.raises(DataError, match="no element symbol"):
        fit_e0(ethanol, {"H": 0, "C": 0, "O": 0, "Hx": 0})
    assert fit_e0(ethanol, {"H": -13.6, "C": 0, "O": 0}).e0["H"] == -13.6
    atoms = read(data_dir / "3bpa" / "iso_atoms.xyz")
    fit = fit_e0([*atoms, *read(data_dir / "3bpa" / "train_300K.xyz")[:5]], "isolated")
    assert fit.e0["H"] == pytest.approx(-13.587222780835477)
    assert fit.source == "isolated"
    with pytest.raises(DataError, match=r"no neutral one-atom frame of C, O \(found: H"):
        fit_e0([labelled(Atoms("H"), -13.6), *ethanol], "isolated")
    with pytest.raises(DataError, match="H has energies"):
        fit_e0([labelled(Atoms("H"), -13.6), labelled(Atoms("H"), -12.6)], "isolated")
