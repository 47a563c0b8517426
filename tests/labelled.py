"""Small frames with labels, and what these say."""

from __future__ import annotations

import numpy as np
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator


def energy(atoms: Atoms) -> float:
    return float(atoms.calc.results["energy"])


def forces(atoms: Atoms) -> np.ndarray:
    return np.asarray(atoms.calc.results["forces"])


def water(**info: object) -> Atoms:
    atoms = molecule("H2O")
    atoms.info = {"charge": 0.0, "multiplicity": 1, "level": "toy", **info}
    f = np.linspace(-1, 1, 9).reshape(3, 3) / 3
    atoms.calc = SinglePointCalculator(atoms, energy=-14.1, forces=f)
    return atoms


def copper(strain: float) -> Atoms:
    """Fcc copper with EMT labels: a real stress, of either sign."""
    atoms = bulk("Cu", cubic=True)
    atoms.set_cell(np.asarray(atoms.cell) @ (np.eye(3) + strain * np.array([[1, 0.3, 0], [0.3, 1, 0.1], [0, 0.1, 1]])))
    atoms.set_positions(atoms.get_scaled_positions() @ np.asarray(atoms.cell))
    atoms.calc = EMT()
    labels = {name: atoms.calc.get_property(name, atoms) for name in ("energy", "forces", "stress")}
    atoms.calc = SinglePointCalculator(atoms, **labels)
    atoms.info = {"charge": 0.0, "multiplicity": 1, "level": "EMT"}
    return atoms


def plain_text(**keys: object) -> str:
    head = " ".join(f'{key}="{value}"' for key, value in keys.items())
    rows = "O 0 0 0 0 0 -2\nH 0 0 2 0 0 1\nH 0 2 0 0 0 1\n"
    return f"3\nProperties=species:S:1:pos:R:3:forces:R:3 energy=-2 {head}\n{rows}"
