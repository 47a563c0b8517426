"""Choose structures: descriptors that ignore rotation, translation and the order of atoms, and farthest points."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ase import Atoms
from ase.neighborlist import neighbor_list

from mlff_engines.structure import FloatArray, IntArray


def descriptors(frames: Sequence[Atoms], cutoff: float = 6.0, centres: int = 24) -> FloatArray:
    """One vector per structure: for every pair of elements, a smoothed histogram of its distances.

    D_ab(r_k) = 1/√N Σ_{pairs i∈a, j∈b} exp(-(r_ij - r_k)²/2σ²) ½(1 + cos(π r_ij/r_c)), with centres r_k evenly from
    0.5 Å to r_c and σ their distance: the sum over atoms of the radial symmetry functions G² of Behler and Parrinello,
    Phys. Rev. Lett. 98, 146401 (2007), equation 3, resolved by element pair. Periodic images count. Mirror images
    share a descriptor, as they share an energy. Charge and multiplicity follow as two further columns.

    Args:
        frames: F structures, periodic or not, of any composition.
        cutoff: r_c, Å.
        centres: number of r_k per pair of elements.

    Returns:
        (F, pairs·centres + 2).
    """
    elements = sorted({int(number) for atoms in frames for number in atoms.numbers})
    column = {number: place for place, number in enumerate(elements)}
    pairs = len(elements) * len(elements)
    r = np.linspace(0.5, cutoff, centres)
    width = r[1] - r[0]
    result = np.zeros((len(frames), pairs * centres + 2))
    for row, atoms in enumerate(frames):
        i, j, d = neighbor_list("ijd", atoms, cutoff)
        places = np.array([column[int(number)] for number in atoms.numbers], dtype=np.int64)
        a, b = places[i], places[j]
        kept = a <= b  # each pair of elements once; both directions of a pair of equals count alike everywhere
        pair, d = (a * len(elements) + b)[kept], d[kept]
        smooth = np.exp(-0.5 * ((d[:, None] - r) / width) ** 2) * (0.5 * (1 + np.cos(np.pi * d / cutoff)))[:, None]
        histogram = np.zeros((pairs, centres))
        np.add.at(histogram, pair, smooth)
        result[row, :-2] = histogram.ravel() / np.sqrt(max(len(atoms), 1))
        result[row, -2:] = float(atoms.info.get("charge", 0.0)), int(atoms.info.get("multiplicity", 1))
    return result[:, (result != 0).any(axis=0)]


def farthest_points(points: FloatArray, count: int | None = None, tolerance: float = 0.0) -> IntArray:
    """Greedy farthest-point selection (Gonzalez, Theor. Comput. Sci. 38, 293 (1985)), duplicates left out.

    Starts from the point nearest the mean, then adds the point farthest from all those chosen.

    Args:
        points: (F, D).
        count: how many to choose; default: all that are no duplicates.
        tolerance: points within this distance of a chosen one are duplicates.

    Returns:
        Numbers of the chosen points, in ascending order. Any two are farther apart than `tolerance`; there are fewer
        than `count` when no more of these exist.
    """
    if not len(points) or count == 0:
        return np.zeros(0, dtype=np.int64)
    chosen = [int(np.argmin(np.linalg.norm(points - points.mean(axis=0), axis=1)))]
    distance = np.linalg.norm(points - points[chosen[0]], axis=1)
    while len(chosen) < (count or len(points)):
        farthest = int(np.argmax(distance))
        if distance[farthest] <= tolerance:
            break
        chosen.append(farthest)
        np.minimum(distance, np.linalg.norm(points - points[farthest], axis=1), out=distance)
    return np.array(sorted(chosen), dtype=np.int64)
