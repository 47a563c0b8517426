"""A structure as LAMMPS wants it, and what LAMMPS writes read back."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlff_engines.structure import SYMBOLS, BoolArray, FloatArray, Structure

MARGIN = 1.0  # Å around the atoms where a direction is not periodic


@dataclass(frozen=True)
class Placed:
    """A structure turned so that its lattice vectors are those of a LAMMPS box.

    LAMMPS wants a along x, b in the xy plane, a right-handed triple, and no tilt towards a direction that is not
    periodic: periodic vectors come first here, and directions without period are boxes that grow with the atoms.

    | field       | shape  | unit | meaning                                                        |
    |-------------|--------|------|----------------------------------------------------------------|
    | `axes`      | (3, 3) | -    | rows: LAMMPS' x, y and z in the structure's frame              |
    | `box`       | (3, 3) | Å    | lower triangular; the diagonal alone where not periodic        |
    | `origin`    | (3,)   | Å    | of the box, in LAMMPS' frame                                   |
    | `periodic`  | (3,)   | -    | LAMMPS' directions                                             |
    | `positions` | (N, 3) | Å    | in LAMMPS' frame                                               |
    """

    axes: FloatArray
    box: FloatArray
    origin: FloatArray
    periodic: BoolArray
    positions: FloatArray

    @classmethod
    def of(cls, structure: Structure) -> Placed:
        """Place `structure`."""
        vectors = structure.cell[structure.pbc]
        count = len(vectors)
        if count == 3 and np.linalg.det(vectors) < 0:
            vectors = -vectors  # the same lattice
        axes = np.eye(3)
        if np.triu(vectors, 1).any() or (np.diagonal(vectors) <= 0).any():
            # Gram-Schmidt, completed to a right-handed frame; LAPACK's signs are turned to a positive diagonal
            q, r = np.linalg.qr(vectors.T, mode="complete")
            q[:, :count] *= np.where(np.diagonal(r)[:count] < 0, -1.0, 1.0)
            if np.linalg.det(q) < 0:
                q[:, 2] *= -1
            axes = q.T
        exact = np.array_equal(axes, np.eye(3))
        positions = structure.positions if exact else structure.positions @ axes.T
        low = positions.min(axis=0, initial=np.inf) - MARGIN
        extent = np.maximum(positions.max(axis=0, initial=-np.inf) + MARGIN - low, 2 * MARGIN)
        box, origin = np.diag(extent), low.copy()
        origin[:count] = 0.0
        box[:count] = np.tril(vectors if exact else vectors @ axes.T)
        return cls(axes, box, origin, np.arange(3) < count, positions)

    def turned(self, vectors: FloatArray) -> FloatArray:
        """Vectors (..., 3) of the structure in LAMMPS' frame."""
        return vectors @ self.axes.T

    def back(self, vectors: FloatArray) -> FloatArray:
        """Vectors (..., 3) of LAMMPS in the structure's frame."""
        return vectors @ self.axes

    @property
    def boundary(self) -> str:
        """Arguments of the `boundary` command."""
        return " ".join("p" if periodic else "m" for periodic in self.periodic)


def write_data(
    path: Path, structure: Structure, placed: Placed, masses: FloatArray, velocities: FloatArray | None = None
) -> list[str]:
    """Write a data file in units metal; the element of each type. `velocities` (N, 3) in Å/fs, `masses` (N,) in amu.

    Atoms of one element and mass are one type.
    """
    kinds = sorted(set(zip(structure.numbers.tolist(), masses.tolist(), strict=True)))
    place = {kind: index + 1 for index, kind in enumerate(kinds)}
    types = [place[kind] for kind in zip(structure.numbers.tolist(), masses.tolist(), strict=True)]
    box, low = placed.box.tolist(), placed.origin.tolist()
    lines = ["written by mlff-engines", "", f"{len(structure)} atoms", f"{len(kinds)} atom types", ""]
    for axis, name in enumerate("xyz"):
        lines.append(f"{low[axis]!r} {low[axis] + box[axis][axis]!r} {name}lo {name}hi")
    if np.tril(placed.box, -1).any():
        lines.append(f"{box[1][0]!r} {box[2][0]!r} {box[2][1]!r} xy xz yz")
    lines += ["", "Masses", "", *(f"{place[kind]} {kind[1]!r}" for kind in kinds), "", "Atoms # atomic", ""]
    lines += [f"{i} {kind} {x!r} {y!r} {z!r}" for i, kind, (x, y, z) in _numbered(types, placed.positions)]
    if velocities is not None:
        per_ps = placed.turned(velocities) * 1e3
        lines += ["", "Velocities", "", *(f"{i} {x!r} {y!r} {z!r}" for i, _, (x, y, z) in _numbered(types, per_ps))]
    path.write_text("\n".join([*lines, ""]))
    return [SYMBOLS[number] for number, _ in kinds]


def _numbered(types: list[int], vectors: FloatArray) -> Iterator[tuple[int, int, list[float]]]:
    for index, (kind, vector) in enumerate(zip(types, vectors.tolist(), strict=True)):
        yield index + 1, kind, vector


def read_dump(path: Path) -> Iterator[tuple[int, list[list[str]]]]:
    """Step and rows of every complete frame of a text dump; a frame cut off at the end is left out."""
    with path.open() as file:
        while header := list(itertools.islice(file, 9)):
            if len(header) < 9:
                return
            step, atoms = int(header[1]), int(header[3])
            rows = [line.split() for line in itertools.islice(file, atoms)]
            if len(rows) < atoms or (rows and len(rows[-1]) != len(rows[0])):
                return
            yield step, rows
