"""Positions and cell to edges: vesin for the search, a Verlet skin around it, and a brute-force reference."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import vesin

from mlff_engines.errors import StructureError
from mlff_engines.structure import BoolArray, FloatArray, IntArray, Structure

FARTHEST = 1e7  # Å
SKIN = 1.0  # Å, by default: in liquid water searching and filtering cost least together

# edges among candidates, or None if these do not hold any more; see `near`
Near = Callable[[FloatArray, FloatArray, float, IntArray, FloatArray | None, float], tuple[IntArray, FloatArray] | None]


def neighbor_list(
    positions: FloatArray, cell: FloatArray, pbc: BoolArray, cutoff: float
) -> tuple[IntArray, FloatArray]:
    """All ordered pairs closer than `cutoff`, periodic images included, however small the cell.

    Args:
        positions: (N, 3), Å; need not lie inside the cell.
        cell: (3, 3), Å; rows along axes that are not periodic are ignored.
        pbc: (3,) periodic axes.
        cutoff: Å.

    Returns:
        edge_index (2, E), sorted by centre, and edge_vec = r_j - r_i + S·cell (E, 3) in Å.
    """
    edge_index, shift = candidates(positions, cell, pbc, cutoff)
    return edge_index, _edge_vectors(positions, edge_index, shift @ cell)


def near(
    positions: FloatArray,
    origin: FloatArray,
    reach: float,
    pairs: IntArray,
    offset: FloatArray | None,
    cutoff: float,
) -> tuple[IntArray, FloatArray] | None:
    """Those of `pairs` that are closer than `cutoff`, in their order; None if an atom has left its `origin` too far.

    Args:
        positions, origin: (N, 3), Å.
        reach: Å; an atom may have moved that far.
        pairs: (2, P) centres and neighbours.
        offset: (P, 3), Å, from each neighbour to its image; None for no images.
        cutoff: Å.

    Returns:
        edge_index (2, E) and edge_vec = r_j - r_i + offset (E, 3) in Å.
    """
    # squares are summed in this order for the operator in mlff_engines.kernels.geometry to find the same, bit by bit
    x, y, z = (positions - origin).T
    if (x * x + y * y + z * z).max(initial=0.0) > reach * reach:
        return None
    vectors = _edge_vectors(positions, pairs, offset)
    x, y, z = vectors.T
    close = np.flatnonzero(x * x + y * y + z * z < cutoff * cutoff)
    return pairs.take(close, axis=1), vectors.take(close, axis=0)


def neighbor_list_reference(
    positions: FloatArray, cell: FloatArray, pbc: BoolArray, cutoff: float
) -> tuple[IntArray, FloatArray]:
    """What `neighbor_list` must find, by trying every pair in every image: O(N²), for tests."""
    full = _complete_cell(cell, pbc)
    heights = 1 / np.linalg.norm(np.linalg.inv(full), axis=0)
    # atoms outside the cell need as many images more as they lie cells away
    fractional = positions @ np.linalg.inv(full)
    spread = np.ptp(fractional, axis=0) if len(positions) else np.zeros(3)
    reach = [int(np.ceil(cutoff / h + s)) if p else 0 for h, s, p in zip(heights, spread, pbc, strict=True)]
    edges, vectors = [], []
    for shift in itertools.product(*(range(-n, n + 1) for n in reach)):
        vec = positions[None, :] - positions[:, None] + np.array(shift, dtype=float) @ full
        close = (vec**2).sum(-1) < cutoff**2
        if shift == (0, 0, 0):
            np.fill_diagonal(close, False)
        edges.append(np.argwhere(close).T)
        vectors.append(vec[close])
    edge_index, edge_vec = np.concatenate(edges, axis=1), np.concatenate(vectors)
    order = np.lexsort((*edge_vec.T, edge_index[1], edge_index[0]))
    return edge_index[:, order].astype(np.int64), edge_vec[order]


class VerletList:
    """Edges found among candidates that are kept while no other pair can have come within the cutoff.

    Candidates are the pairs up to `cutoff + skin`. With u the largest displacement since the last search (affine cell
    changes undone) and s the smallest singular value of the cell's deformation, a pair that is no candidate is still
    at least (cutoff + skin - 2u)·s apart: the candidates hold while that is at least `cutoff`. What is handed out is
    what a new search would find, in the same order: a run depends neither on the skin nor on when it was restarted.

    Args:
        cutoff: Å.
        skin: Å; 0 searches anew for every structure.
        near: finds the edges among the candidates.

    Attributes:
        builds: number of searches so far.
    """

    def __init__(self, cutoff: float, skin: float, near: Near = near) -> None:
        self.cutoff = cutoff
        self.skin = skin
        self.builds = 0
        self._near = near
        self._reference: Structure | None = None
        self._pairs: IntArray = np.zeros((2, 0), dtype=np.int64)
        self._shift: FloatArray = np.zeros((0, 3))
        self._offset: FloatArray | None = None
        self._offset_cell = b""  # that the offsets are made of
        self._periodic = False

    def update(self, structure: Structure) -> tuple[IntArray, FloatArray]:
        """edge_index (2, E) and edge_vec (E, 3) in Å of all pairs closer than the cutoff; see `neighbor_list`."""
        reach = self._reach(structure)
        found = None if reach < 0 else self._edges(structure, reach)
        if found is None:
            self._pairs, self._shift = candidates(
                structure.positions, structure.cell, structure.pbc, self.cutoff + self.skin
            )
            self._offset, self._offset_cell, self._periodic = None, b"", bool(structure.pbc.any())
            # a copy, for the caller may move its own atoms
            self._reference = replace(structure, positions=structure.positions.copy())
            self.builds += 1
            found = self._edges(structure, math.inf)
            assert found is not None
        return found

    def _edges(self, structure: Structure, reach: float) -> tuple[IntArray, FloatArray] | None:
        assert self._reference is not None
        if self._periodic and (cell := structure.cell.tobytes()) != self._offset_cell:
            self._offset, self._offset_cell = self._shift @ structure.cell, cell
        return self._near(structure.positions, self._reference.positions, reach, self._pairs, self._offset, self.cutoff)

    def _reach(self, structure: Structure) -> float:
        """How far, in Å, atoms may have moved since the last search; negative if another search is due anyway."""
        old = self._reference
        if old is None or self.skin == 0 or old.pbc.tobytes() != structure.pbc.tobytes():
            return -1.0
        if old.numbers.tobytes() != structure.numbers.tobytes():
            return -1.0
        if not self._periodic or old.cell.tobytes() == structure.cell.tobytes():
            return self.skin / 2
        new_cell, old_cell = (_complete_cell(s.cell, s.pbc) for s in (structure, old))
        deformation = np.linalg.solve(old_cell, new_cell)
        smallest_stretch = float(np.linalg.svd(deformation, compute_uv=False)[-1])
        moved = structure.positions @ np.linalg.inv(deformation) - old.positions
        displacement = float(np.sqrt((moved * moved).sum(axis=1).max(initial=0.0)))
        return math.inf if (self.cutoff + self.skin - 2 * displacement) * smallest_stretch >= self.cutoff else -1.0


def candidates(positions: FloatArray, cell: FloatArray, pbc: BoolArray, cutoff: float) -> tuple[IntArray, FloatArray]:
    """Pairs (2, E) and their lattice shifts S (E, 3), zero along axes that are not periodic; see `neighbor_list`."""
    if not len(positions):
        return np.zeros((2, 0), dtype=np.int64), np.zeros((0, 3))
    far = int(np.abs(positions).max(axis=1).argmax())
    if np.abs(positions[far]).max() > FARTHEST:  # the search would end the process
        raise StructureError(
            f"atom {far} is at {positions[far].tolist()} Å; allowed: up to {FARTHEST:g} Å from the origin. "
            "The dynamics that led here has probably exploded"
        )
    search = vesin.NeighborList(cutoff=cutoff, full_list=True, sorted=False, n_threads=1)
    pairs, shift = search.compute(positions, _complete_cell(cell, pbc), pbc, "PS")
    index = np.ascontiguousarray(pairs.T, dtype=np.int64)
    # one order for ever: sums over edges must not depend on the machine, nor on how far the search reached
    pair = index[0] * len(positions) + index[1]
    order = np.lexsort((*shift.T, pair)) if pbc.any() else np.argsort(pair)
    return index.take(order, axis=1), shift.take(order, axis=0).astype(np.float64)


def _edge_vectors(positions: FloatArray, edge_index: IntArray, offset: FloatArray | None) -> FloatArray:
    # take: several times faster than an index in brackets
    vectors: FloatArray = positions.take(edge_index[1], axis=0)
    vectors -= positions.take(edge_index[0], axis=0)
    if offset is not None:
        vectors += offset
    return vectors


def _complete_cell(cell: FloatArray, pbc: BoolArray) -> FloatArray:
    """`cell` with orthonormal vectors in place of those that are not periodic: never singular."""
    periodic = cell[pbc]
    full = np.array(cell, dtype=np.float64)
    normals = np.linalg.svd(periodic, full_matrices=True)[2][len(periodic) :] if len(periodic) else np.eye(3)
    full[~pbc] = normals
    return full
