"""Physical constants and unit conversions, each with its source. Internal units: Å, eV, amu, fs, e.

Constants are CODATA 2018 (Tiesinga et al., Rev. Mod. Phys. 93, 025010 (2021)); those marked *exact* are
fixed by the 2019 SI. An energy in `unit` times ``ENERGY[unit]`` is in eV; likewise for lengths in Å.
"""

from __future__ import annotations

from mlff_engines.errors import ConfigError, suggest

ELEMENTARY_CHARGE = 1.602176634e-19  # C, exact
AVOGADRO = 6.02214076e23  # 1/mol, exact
BOLTZMANN = 1.380649e-23 / ELEMENTARY_CHARGE  # eV/K, exact
ATOMIC_MASS = 1.66053906660e-27  # kg

KJ_PER_MOL = 1e3 / (ELEMENTARY_CHARGE * AVOGADRO)  # eV
KCAL_PER_MOL = 4.184 * KJ_PER_MOL  # eV; thermochemical calorie, exact
HARTREE = 27.211386245988  # eV
RYDBERG = HARTREE / 2  # eV
BOHR = 0.529177210903  # Å
GPA = 1e9 * 1e-30 / ELEMENTARY_CHARGE  # eV/Å³
BAR = 1e-4 * GPA  # eV/Å³

# v [Å/fs] += dt [fs] * F [eV/Å] / m [amu] * ACCELERATION
ACCELERATION = ELEMENTARY_CHARGE / ATOMIC_MASS * 1e-10  # (eV/Å/amu) in Å/fs²

ENERGY = {
    "eV": 1.0,
    "meV": 1e-3,
    "kcal/mol": KCAL_PER_MOL,
    "kJ/mol": KJ_PER_MOL,
    "Hartree": HARTREE,
    "Ry": RYDBERG,
}
LENGTH = {"Angstrom": 1.0, "nm": 10.0, "Bohr": BOHR}


def energy_unit(name: str) -> float:
    """One `name` (a key of `ENERGY`) in eV."""
    return _look_up(name, ENERGY, "energy")


def length_unit(name: str) -> float:
    """One `name` (a key of `LENGTH`) in Å."""
    return _look_up(name, LENGTH, "length")


def _look_up(name: str, table: dict[str, float], kind: str) -> float:
    if name not in table:
        raise ConfigError(f"unknown {kind} unit {name!r}{suggest(name, table)}")
    return table[name]
