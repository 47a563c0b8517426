"""A structure in the orientation and with the box that OpenMM wants."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlff_engines.structure import FloatArray, Structure


@dataclass(frozen=True)
class Box:
    """OpenMM's boxes are lower triangular, reduced, and periodic along three axes or none.

    | field      | shape  | unit | meaning                                                       |
    |------------|--------|------|---------------------------------------------------------------|
    | `vectors`  | (3, 3) | Å    | rows a, b, c; None where nothing is periodic                  |
    | `rotation` | (3, 3) | -    | vectors of the structure times this are vectors in OpenMM     |
    """

    vectors: FloatArray | None
    rotation: FloatArray

    @classmethod
    def of(cls, structure: Structure, vacuum: float) -> Box:
        """The same lattice; axes that are not periodic get `vacuum` (Å) between images."""
        if not structure.pbc.any():
            return cls(None, np.eye(3))
        cell = _filled(structure, vacuum)
        if np.linalg.det(cell) < 0:
            cell[2] *= -1  # the same lattice, right-handed: what is left is a rotation
        rotation, upper = np.linalg.qr(cell.T)
        signs = np.sign(np.diag(upper))
        return cls(_reduced(upper.T * signs), rotation * signs)


def _filled(structure: Structure, vacuum: float) -> FloatArray:
    cell = structure.cell.copy()
    periodic = cell[structure.pbc]
    normals = np.linalg.svd(periodic, full_matrices=True)[2][len(periodic) :]
    extent = np.ptp(structure.positions @ normals.T, axis=0) if len(structure) else np.zeros(len(normals))
    cell[~structure.pbc] = normals * (extent + vacuum)[:, None]
    return cell


def _reduced(vectors: FloatArray) -> FloatArray:
    """2|b_x| <= a_x, 2|c_x| <= a_x, 2|c_y| <= b_y, as the OpenMM User Guide (Periodic Boundary Conditions) asks."""
    a, b, c = np.tril(vectors)
    c = c - b * np.round(c[1] / b[1])
    c = c - a * np.round(c[0] / a[0])
    b = b - a * np.round(b[0] / a[0])
    return np.stack([a, b, c])
