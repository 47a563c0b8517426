"""S8: a neighbour search against trying every pair in every image."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mlff_engines.neighbors import neighbor_list_reference
from mlff_engines.structure import BoolArray, FloatArray, IntArray
from mlff_engines.validation.result import CheckResult, Worst

# positions (N, 3) Å, cell (3, 3) Å, pbc (3,), cutoff Å -> edge_index (2, E), edge_vec (E, 3) Å
Search = Callable[[FloatArray, FloatArray, BoolArray, float], tuple[IntArray, FloatArray]]

CUBE = 6.0 * np.eye(3)
SLANTED = np.array([[5.0, 0.0, 0.0], [4.2, 3.1, 0.0], [-3.7, 2.9, 4.4]])
TINY = np.array([[1.1, 0.0, 0.0], [0.3, 1.3, 0.0], [-0.2, 0.4, 0.9]])
# name -> number of atoms, cell, pbc, atoms spread over so many cells
CASES: dict[str, tuple[int, FloatArray, tuple[bool, bool, bool], float]] = {
    "no atoms": (0, CUBE, (False, False, False), 1),
    "no atoms in a periodic cell": (0, CUBE, (True, True, True), 1),
    "one atom": (1, np.zeros((3, 3)), (False, False, False), 1),
    "molecule without a cell": (12, np.zeros((3, 3)), (False, False, False), 1),
    "cubic cell": (12, CUBE, (True, True, True), 1),
    "slanted cell": (12, SLANTED, (True, True, True), 1),
    "left-handed cell": (12, SLANTED[[1, 0, 2]], (True, True, True), 1),
    "atoms outside the box": (12, SLANTED, (True, True, True), 7),
    "slab": (12, SLANTED, (True, True, False), 1),
    "slab with a zero vector": (12, SLANTED * [[1], [0], [1]], (True, False, True), 1),
    "wire": (12, SLANTED, (False, True, False), 1),
    "atoms outside the wire": (12, SLANTED, (False, True, False), 7),
    "one atom and its images": (1, TINY, (True, True, True), 1),
    "cell much smaller than the cutoff": (3, TINY, (True, True, True), 3),
    "flat cell": (6, np.diag([9.0, 9.0, 0.7]), (True, True, True), 1),
}


def check_neighbors(search: Search, cutoff: float) -> CheckResult:
    """S8: every edge there exactly once with the right vector, none too many."""
    rng = np.random.default_rng(8)
    worst = Worst()
    for name, (atoms, cell, axes, spread) in CASES.items():
        periodic = np.array(axes)
        box = cell if cell.any() else CUBE
        positions = rng.uniform(-(spread - 1) / 2, (spread + 1) / 2, (atoms, 3)) @ box
        found = search(positions, cell, periodic, cutoff)
        expected = neighbor_list_reference(positions, cell, periodic, cutoff)
        wrong = wrong_edges(*found, *expected)
        worst.see(wrong, f"{name}: {wrong} wrong of {expected[0].shape[1]} edges")
    return worst.judged("S8", "float64")


def wrong_edges(index: IntArray, vectors: FloatArray, expected_index: IntArray, expected_vectors: FloatArray) -> int:
    """Edges missing, doubled or too many; vectors are compared to 1e-4 Å."""
    found, expected = _counted(index, vectors), _counted(expected_index, expected_vectors)
    return sum(abs(found.get(key, 0) - expected.get(key, 0)) for key in {*found, *expected})


def _counted(index: IntArray, vectors: FloatArray) -> dict[tuple[int, ...], int]:
    counts: dict[tuple[int, ...], int] = {}
    for i, j, vector in zip(*index.tolist(), vectors, strict=True):
        key = (i, j, *np.round(vector * 1e4).astype(int).tolist())
        counts[key] = counts.get(key, 0) + 1
    return counts
