"""ASE's Atoms as the core's Structure."""

from __future__ import annotations

from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms
from ase.calculators.calculator import all_changes

from mlff_engines.errors import StructureError
from mlff_engines.structure import Structure


def to_structure(atoms: Atoms) -> Structure:
    """Atoms with total charge `atoms.info["charge"]` (e, default 0) and `atoms.info["multiplicity"]` (default 1)."""
    return Structure(
        atoms.numbers,
        atoms.positions,
        atoms.cell.array,
        atoms.pbc,
        charge=float(atoms.info.get("charge", 0.0)),
        spin=float(atoms.info.get("multiplicity", 1) - 1),
    )


def read(path: Path) -> list[Structure]:
    """Every structure of any file that ASE reads.

    Raises:
        StructureError: the file cannot be read.
    """
    try:
        frames = ase.io.read(path, index=":")
    except Exception as error:  # ASE's readers raise whatever they meet
        raise StructureError(f"cannot read structures from {path}: {error or type(error).__name__}") from error
    return [to_structure(atoms) for atoms in frames]


def changes(last: Atoms | None, atoms: Atoms) -> list[str]:
    """ASE's names of what is not as in `last`, and "info" if charge or multiplicity is not.

    Compared exactly: ASE's own comparison within a tolerance takes longer than a small student.
    """
    if last is None:
        return list(all_changes)
    arrays = ("positions", "numbers", "initial_charges", "initial_magmoms")
    pairs = {name: (last.arrays.get(name), atoms.arrays.get(name)) for name in arrays}
    pairs |= {"cell": (last.cell.array, atoms.cell.array), "pbc": (last.pbc, atoms.pbc)}
    # most of them are none at all
    found = [name for name, (old, new) in pairs.items() if old is not new and not np.array_equal(old, new)]
    if any(last.info.get(key) != atoms.info.get(key) for key in ("charge", "multiplicity")):
        found.append("info")
    return found
