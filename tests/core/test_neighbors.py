"""The neighbour search against brute force, and a Verlet list that never misses a pair."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mlff_engines.errors import StructureError
from mlff_engines.neighbors import VerletList, neighbor_list, neighbor_list_reference
from mlff_engines.structure import Structure
from mlff_engines.validation.static.neighbor_cases import wrong_edges


def random_cell(rng: np.random.Generator, size: float) -> np.ndarray:
    """Any shape and handedness, but not flatter than a fifth of its edges."""
    while True:
        cell = size * rng.uniform(-1, 1, (3, 3))
        if abs(np.linalg.det(cell)) > 0.2 * np.linalg.norm(cell, axis=1).prod():
            return cell


@pytest.mark.parametrize("seed", range(30))
def test_search_equals_brute_force(seed: int) -> None:
    """Any cell from a fraction of the cutoff to several times it, any axes periodic, atoms anywhere."""
    rng = np.random.default_rng(seed)
    atoms, size = int(rng.integers(0, 12)), rng.choice([1.5, 4.0, 12.0])
    cell, pbc = random_cell(rng, size), rng.random(3) < 0.6
    positions = rng.uniform(-2, 3, (atoms, 3)) @ cell
    cutoff = float(rng.uniform(1.5, 4.0))
    found, expected = (search(positions, cell, pbc, cutoff) for search in (neighbor_list, neighbor_list_reference))
    assert wrong_edges(*found, *expected) == 0
    assert (np.diff(found[0][0]) >= 0).all()


def test_counts_of_a_crystal() -> None:
    """A simple cubic lattice of one atom: 6 neighbours at a, 12 at √2 a, 8 at √3 a."""
    for cutoff, neighbours in ((1.1, 6), (1.5, 18), (1.8, 26)):
        for search in (neighbor_list, neighbor_list_reference):
            index, vectors = search(np.zeros((1, 3)), np.eye(3), np.ones(3, dtype=bool), cutoff)
            assert index.shape == (2, neighbours)
            assert np.allclose(vectors.sum(0), 0)


def test_rows_of_axes_that_are_not_periodic_are_not_read() -> None:
    positions = np.random.default_rng(0).uniform(0, 4, (8, 3))
    pbc = np.array([True, False, False])
    expected = neighbor_list(positions, np.diag([4.0, 9.0, 9.0]), pbc, 3.0)
    for dummy in (np.zeros(3), np.array([1.0, 0, 0]), np.array([0, 1e-3, 0])):
        found = neighbor_list(positions, np.array([[4.0, 0, 0], dummy, dummy]), pbc, 3.0)
        assert wrong_edges(*found, *expected) == 0


def test_vectors_point_from_centre_to_neighbour() -> None:
    index, vectors = neighbor_list(np.array([[0.0, 0, 0], [1.0, 0, 0]]), np.zeros((3, 3)), np.zeros(3, dtype=bool), 2.0)
    assert index.tolist() == [[0, 1], [1, 0]]
    assert vectors.tolist() == [[1, 0, 0], [-1, 0, 0]]


def trajectory(rng: np.random.Generator, steps: int, changing_cell: bool) -> list[Structure]:
    """Diffusing atoms, some leaving the box, in a cell that breathes and shears."""
    cell = random_cell(rng, 5.0)
    fractional = rng.random((8, 3))
    numbers = np.ones(8, dtype=np.int64)
    pbc = rng.random(3) < 0.7
    frames = []
    for _ in range(steps):
        fractional = fractional + 0.006 * rng.standard_normal((8, 3))
        if changing_cell:
            cell = cell @ (np.eye(3) + 0.008 * rng.standard_normal((3, 3)))
        frames.append(Structure(numbers, fractional @ cell, cell, pbc))
    return frames


def missed_pairs(neighbors: VerletList, frames: list[Structure]) -> int:
    """Edges within the cutoff that the list lacks, has twice or has wrong, over all frames."""
    wrong = 0
    for frame in frames:
        expected = neighbor_list_reference(frame.positions, frame.cell, frame.pbc, neighbors.cutoff)
        wrong += wrong_edges(*neighbors.update(frame), *expected)
    return wrong


@pytest.mark.parametrize("changing_cell", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_verlet_list_never_misses_a_pair(seed: int, changing_cell: bool) -> None:
    neighbors = VerletList(3.0, 0.6)
    frames = trajectory(np.random.default_rng(seed), 40, changing_cell)
    assert missed_pairs(neighbors, frames) == 0
    assert 1 < neighbors.builds < 40  # it was reused, and it was not left to stand


class Careless(VerletList):
    """Rebuilds late by a factor and takes no notice of the cell."""

    def __init__(self, factor: float) -> None:
        super().__init__(3.0, 0.6)
        self.factor = factor

    def _reach(self, structure: Structure) -> float:
        return -1.0 if self._reference is None else self.factor * self.skin / 2


def test_careless_lists_are_caught() -> None:
    def missed(factor: float, changing_cell: bool) -> int:
        return sum(
            missed_pairs(Careless(factor), trajectory(np.random.default_rng(seed), 40, changing_cell))
            for seed in range(6)
        )

    assert missed(1.0, changing_cell=False) == 0
    assert missed(4.0, changing_cell=False) > 0  # moved by more than half the skin


def test_a_cell_that_shrinks_around_still_atoms_is_noticed() -> None:
    """Across the boundary atoms approach although none has moved."""
    cell = np.diag([10.0, 10.0, 10.0])
    positions = np.array([[0.5, 5, 5], [6.7, 5, 5]])  # 3.8 Å apart through the boundary
    still = [Structure(np.ones(2), positions, cell * [[s], [1], [1]], np.ones(3)) for s in (1.0, 0.95, 0.91)]
    assert missed_pairs(VerletList(3.0, 0.5), still) == 0
    assert missed_pairs(Careless(1.0), still) > 0


def test_composition_and_periodicity_are_noticed() -> None:
    neighbors = VerletList(3.0, 0.5)
    positions, cell = np.array([[0.0, 0, 0], [2.0, 0, 0]]), 5 * np.eye(3)
    frames = [
        Structure(np.array([1, 8]), positions, cell, np.ones(3)),
        Structure(np.array([8, 1]), positions, cell, np.ones(3)),
        Structure(np.array([8, 1]), positions, cell, np.zeros(3)),
        Structure(np.array([8]), positions[:1], cell, np.zeros(3)),
    ]
    builds = []
    for frame in [*frames, frames[-1]]:
        neighbors.update(frame)
        builds.append(neighbors.builds)
    assert builds == [1, 2, 3, 4, 4]


def test_no_skin_searches_every_time() -> None:
    neighbors = VerletList(3.0, 0.0)
    frame = Structure(np.array([1, 1]), np.array([[0.0, 0, 0], [1.0, 0, 0]]))
    for _ in range(3):
        neighbors.update(frame)
    assert neighbors.builds == 3


def test_edge_vectors_follow_the_atoms_between_searches() -> None:
    """In float64, also far from the origin."""
    neighbors = VerletList(3.0, 0.5)
    start = np.array([[1e4, 0, 0], [1e4 + 1, 0, 0]])
    neighbors.update(Structure(np.ones(2), start))
    moved = start + np.array([[0, 0, 0], [0.125, 0, 0]])
    _, vectors = neighbors.update(Structure(np.ones(2), moved))
    assert neighbors.builds == 1
    assert vectors[0].tolist() == [1.125, 0, 0]


@pytest.mark.parametrize("changing_cell", [False, True])
def test_edges_are_those_of_a_new_search_to_the_last_bit(changing_cell: bool) -> None:
    """Several images of one neighbour among them: sums over edges must not know when the last search was."""
    neighbors = VerletList(3.0, 0.6)
    for frame in trajectory(np.random.default_rng(0), 40, changing_cell):
        kept, fresh = neighbors.update(frame), neighbor_list(frame.positions, frame.cell, frame.pbc, 3.0)
        for found, expected in zip(kept, fresh, strict=True):
            np.testing.assert_array_equal(found, expected)
    assert neighbors.builds < 40
    alone = [replace(frame, pbc=np.zeros(3, dtype=bool)) for frame in trajectory(np.random.default_rng(1), 5, False)]
    for frame in alone:
        index, _ = neighbors.update(frame)
        np.testing.assert_array_equal(index, neighbor_list(frame.positions, frame.cell, frame.pbc, 3.0)[0])


@pytest.mark.parametrize("pbc", [False, True])
def test_atoms_that_flew_away_are_named(pbc: bool) -> None:
    """The search itself would end the process with a floating point exception."""
    positions = np.array([[0.0, 0, 0], [3.5e8, 5e3, -2e4]])
    with pytest.raises(StructureError, match="probably exploded"):
        neighbor_list(positions, 12.0 * np.eye(3), np.full(3, pbc), 5.0)
