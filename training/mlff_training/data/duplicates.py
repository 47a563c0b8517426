"""Frames that are the same structure, moved or not, and what that means for splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ase import Atoms

from mlff_engines.errors import DataError
from mlff_engines.structure import FloatArray

TOLERANCE = 1e-6  # relative, of the invariants; a displacement of 1e-4 Å is seen, rounding to 1e-7 Å is not
_BLOCK = 256  # atoms whose distances to all others are held at once


def fingerprint(atoms: Atoms) -> FloatArray:
    """Numbers that rotation, reflection, translation (of one atom: by lattice vectors) and relabelling leave alone.

    Per atom i, over all others: Σ_j Z_j/(1 + r_ij) and Σ_j Z_j·exp(-r_ij/2) (r in Å; nearest image by fractional
    coordinates), sorted within each element; then the periodic metric. Smooth in the positions. Shape (L,); comparable
    between frames of equal composition and pbc only.
    """
    positions, cell, periodic = atoms.positions, np.asarray(atoms.cell)[atoms.pbc], atoms.pbc.any()
    to_fractional = np.linalg.pinv(cell) if periodic else None
    charges = atoms.numbers.astype(np.float64)
    rows = []
    for start in range(0, len(atoms), _BLOCK):
        vec = positions[None, :] - positions[start : start + _BLOCK, None]
        if to_fractional is not None:
            vec = vec - np.round(vec @ to_fractional) @ cell
        distance = np.sqrt((vec**2).sum(-1))
        # the atom itself adds the constant Z_i to both sums
        rows.append(np.stack([(charges / (1 + distance)).sum(1), (charges * np.exp(-distance / 2)).sum(1)]))
    sums = np.concatenate(rows, axis=1) if rows else np.zeros((2, 0))
    ordered = [row[np.lexsort((row, atoms.numbers))] for row in sums]
    metric = (cell @ cell.T)[np.triu_indices(len(cell))]
    return np.concatenate([*ordered, metric])


def duplicate_pairs(frames: Sequence[Atoms]) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j, of frames that are one structure; of n equal frames at least n - 1 pairs link them all."""
    alike: dict[Any, list[int]] = {}
    for index, atoms in enumerate(frames):
        state = (float(atoms.info.get("charge", 0.0)), int(atoms.info.get("multiplicity", 1)))
        alike.setdefault((tuple(sorted(atoms.numbers.tolist())), tuple(atoms.pbc.tolist()), state), []).append(index)
    pairs = []
    for indices in alike.values():
        if len(indices) == 1:
            continue
        prints = np.stack([fingerprint(frames[index]) for index in indices])
        scale = TOLERANCE * max(float(np.abs(prints).max()), 1.0)
        key = prints.mean(axis=1)  # frames that agree everywhere agree in the mean
        order = np.argsort(key, kind="stable")
        for position, first in enumerate(order):
            for second in order[position + 1 :]:
                if key[second] - key[first] > scale:
                    break
                if np.abs(prints[first] - prints[second]).max() < scale:
                    pairs.append(tuple(sorted((indices[first], indices[second]))))
    return sorted(pairs)


def check_splits(splits: Mapping[str, Sequence[Atoms]]) -> None:
    """Refuse parts that share a structure, be it rotated, shifted or with its atoms in another order (T6).

    Args:
        splits: part -> frames, for example ``{"train": [...], "valid": [...]}``.

    Raises:
        DataError: listing pairs of indices, and whether the copies are exact or moved.
    """
    names = [(name, index) for name, frames in splits.items() for index in range(len(frames))]
    frames = [atoms for part in splits.values() for atoms in part]
    shared = [(i, j) for i, j in duplicate_pairs(frames) if names[i][0] != names[j][0]]
    if shared:
        listed = [
            f"{names[i][0]}[{names[i][1]}] = {names[j][0]}[{names[j][1]}] ({_relation(frames[i], frames[j])})"
            for i, j in shared[:5]
        ]
        more = f" and {len(shared) - 5} more" if len(shared) > 5 else ""
        raise DataError(
            f"{len(shared)} structure(s) stand in two splits: {', '.join(listed)}{more}. Errors measured there would "
            "be too small; remove the copies, or split again (copies are kept together)"
        )


def _relation(one: Atoms, other: Atoms) -> str:
    same = (one.numbers == other.numbers).all() and np.allclose(one.positions, other.positions, rtol=0, atol=1e-6)
    return "identical" if same else "rotated, shifted or reordered"
