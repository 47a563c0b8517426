"""Labelled structures in memory, and what it takes to bring foreign labels into that form.

A labelled structure is an `ase.Atoms`, in eV and Å throughout:

| where                         | shape  | unit  | meaning                                                          |
|-------------------------------|--------|-------|------------------------------------------------------------------|
| `info["charge"]`              | -      | e     | total charge, default 0                                          |
| `info["multiplicity"]`        | -      | -     | spin multiplicity 2S+1, default 1                                |
| `info["level"]`               | -      | -     | level of theory, "unknown" when nobody stated it                 |
| `info["group"]`               | -      | -     | trajectory or molecule, optional; no split cuts through a group  |
| `calc.results["energy"]`      | -      | eV    | potential energy                                                 |
| `calc.results["forces"]`      | (N, 3) | eV/Å  | -dE/dR, optional                                                 |
| `calc.results["stress"]`      | (6,)   | eV/Å³ | xx yy zz yz xz xy, tension positive; three periodic axes only    |
| `calc.results["energies"]`    | (N,)   | eV    | per-atom energies, optional                                      |
| `calc.results["dipole"]`      | (3,)   | e·Å   | optional                                                         |
| `arrays["hessian_row"]`       | (N, 3) | eV/Å² | d²E/(dR_k dR), optional, together with `info["hessian_index"]`   |
| `info["hessian_index"]`       | -      | -     | k = 3*atom + axis                                                |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from mlff_engines import units
from mlff_engines.errors import ConfigError, DataError
from mlff_engines.structure import FloatArray

# how data files spell the units of mlff_engines.units; compared in lower case
UNIT_SPELLINGS = {
    "ev": "eV",
    "mev": "meV",
    "ha": "Hartree",
    "hartree": "Hartree",
    "ry": "Ry",
    "rydberg": "Ry",
    "kcal/mol": "kcal/mol",
    "kj/mol": "kJ/mol",
    "a": "Angstrom",
    "å": "Angstrom",
    "ang": "Angstrom",
    "angstrom": "Angstrom",
    "bohr": "Bohr",
    "a0": "Bohr",
    "nm": "nm",
}


class DataWarning(UserWarning):
    """Data can be used, but not for everything one might expect of them."""


@dataclass(frozen=True)
class Units:
    """What one unit of each quantity in a file is in eV and Å; forces and stress follow unless stated on their own."""

    energy: float = 1.0
    length: float = 1.0
    force: float | None = None
    stress: float | None = None

    @property
    def per_length(self) -> float:
        """One force unit in eV/Å."""
        return self.energy / self.length if self.force is None else self.force

    @property
    def per_volume(self) -> float:
        """One stress unit in eV/Å³."""
        return self.energy / self.length**3 if self.stress is None else self.stress


def resolve_units(
    where: str,
    stated: Mapping[str, str],
    energy_unit: str | None,
    length_unit: str | None,
    convention: tuple[str, str] = ("eV", "Angstrom"),
) -> Units:
    """The units of a file, from what it states, else the caller's arguments, else the convention of its format.

    Args:
        where: the file (and frame) for messages.
        stated: names of units as the file gives them, under `energy`, `length`, `force`, `stress`.
        energy_unit: the caller's energy unit, a key of `mlff_engines.units.ENERGY`.
        length_unit: the caller's length unit, a key of `mlff_engines.units.LENGTH`.
        convention: energy and length unit of the format.

    Raises:
        DataError: for a stated unit nobody knows, or one that contradicts the argument.
        ConfigError: for an argument that is no unit.
    """
    factors: dict[str, float] = {}
    for kind, look_up, argument, default in (
        ("energy", units.energy_unit, energy_unit, convention[0]),
        ("length", units.length_unit, length_unit, convention[1]),
    ):
        factors[kind] = look_up(_spelling(argument or default))
        if kind in stated:
            factor = _stated_factor(where, kind, stated[kind])
            if argument and not np.isclose(factor, factors[kind], rtol=1e-6):
                raise DataError(
                    f"{where} states the {kind} unit {stated[kind]!r}, but {kind}_unit={argument!r} was asked for; "
                    "drop the argument or correct the file"
                )
            factors[kind] = factor
    extra = {kind: _stated_factor(where, kind, stated[kind]) for kind in ("force", "stress") if kind in stated}
    return Units(factors["energy"], factors["length"], extra.get("force"), extra.get("stress"))


def _spelling(name: str) -> str:
    return UNIT_SPELLINGS.get(name.strip().lower(), name)


def _stated_factor(where: str, kind: str, name: str) -> float:
    """One `name` in eV, Å, eV/Å or eV/Å³."""
    pressures = {"gpa": units.GPA, "bar": units.BAR, "kbar": 1e3 * units.BAR}
    try:
        if kind == "energy":
            return units.energy_unit(_spelling(name))
        if kind == "length":
            return units.length_unit(_spelling(name))
        if kind == "stress" and name.lower() in pressures:
            return pressures[name.lower()]
        energy, _, length = name.rpartition("/")  # "kcal/mol/Angstrom", "eV/Angstrom^3"
        length = length.removesuffix("3").rstrip("^*") if kind == "stress" else length
        power = 3 if kind == "stress" else 1
        return units.energy_unit(_spelling(energy)) / units.length_unit(_spelling(length)) ** power
    except ConfigError as error:
        raise DataError(f"{where} states {kind} in {name!r}: {error}") from None


def attach(atoms: Atoms, labels: Mapping[str, Any], file_units: Units, where: str) -> Atoms:
    """Scale `atoms` (in file units) to Å and hang `labels` (in file units) on it; changes and returns `atoms`.

    Args:
        atoms: structure with `info`; `arrays["hessian_row"]` is scaled too.
        labels: any of energy, forces, energies, dipole, stress ((3, 3) or (6,)), virial ((3, 3), = -stress·V) and
            ASE's free_energy, charges, magmoms, magmom.
        file_units: what the file's numbers mean.
        where: the file and frame for messages.

    Raises:
        DataError: for labels of the wrong shape (T2) or an ambiguous stress (T5).
    """
    atoms.set_constraint()  # constraints would silently project forces
    atoms.positions *= file_units.length
    atoms.set_cell(np.asarray(atoms.cell) * file_units.length)
    scaled: dict[str, Any] = {}
    n = len(atoms)
    expected: dict[str, tuple[tuple[int, ...], float]] = {
        "energy": ((), file_units.energy),
        "free_energy": ((), file_units.energy),
        "forces": ((n, 3), file_units.per_length),
        "energies": ((n,), file_units.energy),
        "dipole": ((3,), file_units.length),
        "charges": ((n,), 1.0),
        "magmoms": ((n,), 1.0),
        "magmom": ((), 1.0),
    }
    for name, (shape, factor) in expected.items():
        if labels.get(name) is not None:
            value = _array(labels[name], shape, name, where) * factor
            scaled[name] = value if shape else float(value)
    stress = _stress(atoms, labels.get("stress"), labels.get("virial"), file_units, where)
    if stress is not None:
        scaled["stress"] = stress
    atoms.calc = SinglePointCalculator(atoms, **scaled) if scaled else None
    if ("hessian_row" in atoms.arrays) != ("hessian_index" in atoms.info):
        raise DataError(f"{where}: hessian_row (per atom) and hessian_index (per frame) belong together; found one")
    if "hessian_row" in atoms.arrays:
        row = _array(atoms.arrays["hessian_row"], (len(atoms), 3), "hessian_row", where)
        atoms.arrays["hessian_row"] = row * (file_units.per_length / file_units.length)
        index = int(atoms.info["hessian_index"])
        if not 0 <= index < 3 * len(atoms):
            raise DataError(f"{where}: hessian_index = {index}; allowed: 0 to {3 * len(atoms) - 1} (3*atom + axis)")
        atoms.info["hessian_index"] = index
    return atoms


def set_state(atoms: Atoms, where: str) -> None:
    """Give `atoms.info` its charge, multiplicity, level and group in their types.

    Raises:
        DataError: when one of them is not what it should be, or only an ambiguous `spin` is given.
    """
    info = atoms.info
    spin = info.pop("spin", None)
    if spin is not None and "multiplicity" not in info:
        if float(spin) != 0:
            raise DataError(
                f"{where}: spin = {spin} may mean unpaired electrons or the multiplicity; state `multiplicity` (2S+1)"
            )
        info["multiplicity"] = 1
    try:
        charge, multiplicity = float(info.get("charge", 0.0)), float(info.get("multiplicity", 1))
    except (TypeError, ValueError):
        raise DataError(
            f"{where}: charge = {info.get('charge')!r}, multiplicity = {info.get('multiplicity')!r}; expected numbers"
        ) from None
    if multiplicity < 1 or multiplicity != int(multiplicity):
        raise DataError(f"{where}: multiplicity = {multiplicity:g}; expected a whole number from 1 on (2S+1)")
    info["charge"], info["multiplicity"] = charge, int(multiplicity)
    info["level"] = str(info.get("level", "unknown"))
    if "group" in info:
        info["group"] = str(info["group"])


def results(atoms: Atoms) -> dict[str, Any]:
    """The labels of `atoms`, as they were given: no calculation, no constraint applied."""
    return dict(atoms.calc.results) if atoms.calc is not None else {}


def _array(value: Any, shape: tuple[int, ...], name: str, where: str) -> FloatArray:
    try:
        array: FloatArray = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise DataError(f"{where}: {name} = {value!r} is not numeric") from None
    if array.shape != shape:
        raise DataError(f"{where}: {name} has shape {array.shape}; expected {shape}")
    return array


def _stress(atoms: Atoms, stress: Any, virial: Any, file_units: Units, where: str) -> FloatArray | None:
    """The ASE Voigt stress from a stress, a virial or both (T5)."""
    if stress is None and virial is None:
        return None
    if not atoms.pbc.all():
        raise DataError(
            f"{where} has a stress or virial, but pbc = {atoms.pbc.tolist()}: a stress needs a volume. "
            "Set pbc to T T T or remove the label"
        )
    found = {}
    if stress is not None:
        found["stress"] = _symmetric(stress, "stress", where) * file_units.per_volume
    if virial is not None:
        found["virial"] = -_symmetric(virial, "virial", where) * file_units.energy / atoms.get_volume()
    if len(found) == 2:
        scale = max(np.nanmax(np.abs(found["stress"])), 1e-6)
        if np.nanmax(np.abs(found["stress"] - found["virial"])) > 1e-2 * scale:
            opposite = np.nanmax(np.abs(found["stress"] + found["virial"])) < 1e-2 * scale
            raise DataError(
                f"{where}: stress and virial disagree; expected stress = -virial/volume (tension positive). "
                + ("They agree with the opposite sign: flip one. " if opposite else "Check their units. ")
                + "Or keep only one of them"
            )
    full = found.get("stress", found.get("virial"))
    assert full is not None
    return np.array([full[0, 0], full[1, 1], full[2, 2], full[1, 2], full[0, 2], full[0, 1]])


def _symmetric(value: Any, name: str, where: str) -> FloatArray:
    """A symmetric (3, 3) matrix, or DataError when the numbers could be read in more than one way."""
    array: FloatArray = np.asarray(value, dtype=np.float64)
    if array.shape == (6,):
        # xx yy zz first in every convention; then ASE has yz xz xy, others xy yz xz
        if np.ptp(array[3:]) > 1e-12 * max(np.abs(array).max(), 1e-12):
            raise DataError(
                f"{where}: {name} has 6 numbers, whose order is ambiguous (ASE and Voigt: xx yy zz yz xz xy; "
                "VASP: xx yy zz xy yz zx). Write all 9"
            )
        shear = array[3]
        array = np.diag(array[:3]) + shear * (1 - np.eye(3))
    if array.size != 9:
        raise DataError(f"{where}: {name} has shape {array.shape}; expected 9 numbers or (3, 3)")
    array = array.reshape(3, 3)
    if np.isfinite(array).all() and np.abs(array - array.T).max() > 1e-3 * max(np.abs(array).max(), 1e-8):
        raise DataError(
            f"{where}: {name} is not symmetric: {array.tolist()}. A stress is; this may be a Voigt vector in a "
            "wrong order or a virial that counts ghost atoms"
        )
    symmetric: FloatArray = (array + array.T) / 2
    return symmetric
