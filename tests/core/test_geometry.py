"""Edges and forces by the compiled operators are those of numpy and torch, to the last bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import mlff_engines.evaluator
from broken_engines import ORGANIC, evaluator, painn
from mlff_engines import neighbors
from mlff_engines.checkpoint import Domain
from mlff_engines.errors import ExtrapolationWarning, StructureError
from mlff_engines.evaluator import Evaluator
from mlff_engines.graph import Graph
from mlff_engines.kernels import geometry, load_operators
from mlff_engines.neighbors import VerletList
from mlff_engines.potential import edge_forces
from mlff_engines.structure import Structure
from mlff_engines.validation.static.systems import cluster, crystal
from requirements import require_compiler

require_compiler()

CUTOFF, SKIN = 3.0, 0.6
NOWHERE = np.zeros((119, 119))  # no distance is too short


@pytest.fixture(scope="module", autouse=True)
def _operators() -> None:
    load_operators()


def frames(seed: int, steps: int = 40, changing_cell: bool = False) -> list[Structure]:
    """Diffusing atoms in a slanted cell of any periodicity, some of which leave it."""
    rng = np.random.default_rng(seed)
    cell = np.array([[5.0, 0, 0], [1.3, 4.6, 0], [-0.7, 0.9, 4.9]])
    fractional, pbc = rng.random((9, 3)), rng.random(3) < 0.7
    found = []
    for _ in range(steps):
        fractional = fractional + 0.006 * rng.standard_normal((9, 3))
        if changing_cell:
            cell = cell @ (np.eye(3) + 0.004 * rng.standard_normal((3, 3)))
        found.append(Structure(np.ones(9), fractional @ cell, cell, pbc))
    return found


@pytest.mark.parametrize("changing_cell", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_edges_are_those_of_numpy(seed: int, changing_cell: bool) -> None:
    """In the same order, after the same searches."""
    ours, plain = VerletList(CUTOFF, SKIN, geometry.near), VerletList(CUTOFF, SKIN)
    for frame in frames(seed, changing_cell=changing_cell):
        for found, expected in zip(ours.update(frame), plain.update(frame), strict=True):
            np.testing.assert_array_equal(found, expected)
            assert (found.dtype, found.flags.c_contiguous) == (expected.dtype, True)
        assert ours.builds == plain.builds
    assert 1 < ours.builds < 40


@pytest.mark.parametrize("near", [geometry.near, neighbors.near])
def test_an_atom_that_has_moved_too_far_is_noticed(near: neighbors.Near) -> None:
    origin, pairs = np.zeros((3, 3)), np.array([[0, 1], [1, 0]])
    moved = np.array([[0, 0, 0], [0, 0, 0], [0.3, 0.4, 0]])
    assert near(moved, origin, 0.499, pairs, None, 1.0) is None
    for reach in (0.5, np.inf):  # as far as that, and no farther
        found = near(moved, origin, reach, pairs, None, 1.0)
        assert found is not None
        assert found[0].shape == (2, 2)


def test_the_edge_of_the_cutoff_is_outside() -> None:
    positions, pairs = np.array([[0.0, 0, 0], [3.0, 4, 0]]), np.array([[0], [1]])
    for near in (geometry.near, neighbors.near):
        for cutoff, edges in ((5.0, 0), (np.nextafter(5.0, 6), 1)):
            found = near(positions, positions, 0.0, pairs, None, cutoff)
            assert found is not None
            assert found[0].shape == (2, edges)


def test_arrays_that_cannot_be_written() -> None:
    frame = frames(0, 1)[0]
    positions = frame.positions.copy()
    positions.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = VerletList(CUTOFF, SKIN, geometry.near).update(replace(frame, positions=positions))
    np.testing.assert_array_equal(found[1], VerletList(CUTOFF, SKIN).update(frame)[1])


@pytest.mark.parametrize("near", [geometry.near, neighbors.near])
def test_atoms_moved_in_place_are_noticed(near: neighbors.Near) -> None:
    """The list must not hold the caller's own array for where the atoms were."""
    frame, verlet = frames(3, 1)[0], VerletList(CUTOFF, SKIN, near)
    verlet.update(frame)
    frame.positions[0] += 1.0
    verlet.update(frame)
    assert verlet.builds == 2


def edges(dtype: torch.dtype, count: int = 500) -> tuple[torch.Tensor, ...]:
    """edge_index, edge_vec, gradient and atomic numbers, in no order."""
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, 20, (2, count), generator=generator)
    vectors = torch.randn((count, 3), generator=generator, dtype=torch.float64) + 3
    gradient = torch.randn((count, 3), generator=generator, dtype=torch.float64).to(dtype)
    return index, vectors, gradient, torch.randint(1, 9, (20,), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [0, 500])
def test_forces_and_virial(dtype: torch.dtype, count: int) -> None:
    index, vectors, gradient, numbers = edges(dtype, count)
    for order in (torch.arange(count), index[0].argsort(stable=True)):  # in the order of centres, too
        i, v, g = index[:, order], vectors[order], gradient[order]
        forces, virial, finite, close = geometry.forces(i, v, g, numbers, torch.from_numpy(NOWHERE))
        assert torch.equal(forces, edge_forces(i, g.double(), 20))
        expected = -(v.T @ g.double())
        torch.testing.assert_close(virial, 0.5 * (expected + expected.T), rtol=1e-12, atol=1e-10)
        assert torch.equal(virial, virial.T)
        assert (finite, close) == (True, False)


def test_what_needs_a_closer_look_is_flagged() -> None:
    index, vectors, gradient, numbers = edges(torch.float32)
    square = vectors.square().sum(1)
    shortest = int(square.argmin())
    a, b = (int(numbers[atom]) for atom in index[:, shortest])
    for factor, flagged in ((1.0, False), (1.0 + 1e-12, True)):
        least = NOWHERE.copy()
        least[a, b] = factor * float(square[shortest])
        assert geometry.forces(index, vectors, gradient, numbers, torch.from_numpy(least))[3] is flagged
    for bad in (torch.nan, torch.inf):
        gradient[7, 1] = bad
        assert geometry.forces(index, vectors, gradient, numbers, torch.from_numpy(NOWHERE))[2] is False


def test_wrong_arguments_are_refused() -> None:
    index, vectors, gradient, numbers = edges(torch.float64)
    least = torch.from_numpy(NOWHERE)
    with pytest.raises(RuntimeError, match="edge_vec is Float"):
        geometry.forces(index, vectors.float(), gradient, numbers, least)
    with pytest.raises(RuntimeError, match="gradient is Double"):
        geometry.forces(index, vectors, gradient[1:], numbers, least)
    with pytest.raises(IndexError, match="no element 8"):
        geometry.forces(index, vectors, gradient, torch.full((20,), 8), least[:8, :8])
    with pytest.raises(IndexError, match=r"edge .* of 5"):
        geometry.forces(index, vectors, gradient, numbers[:5], least)
    positions, pairs = np.zeros((2, 3)), np.array([[0], [2]])
    with pytest.raises(IndexError, match="atoms 0 and 2 of 2"):
        geometry.near(positions, positions, 1.0, pairs, None, 1.0)
    with pytest.raises(RuntimeError, match=r"origin is Double\[3, 3\]"):
        geometry.near(positions, np.zeros((3, 3)), 1.0, pairs, None, 1.0)


def both(monkeypatch: pytest.MonkeyPatch, make: Callable[[], Evaluator]) -> tuple[Evaluator, Evaluator]:
    """With the operators, and without."""
    ours = make()
    with monkeypatch.context() as patch:
        patch.setattr(mlff_engines.evaluator, "loaded", lambda: False)
        plain = make()
    assert [engine.neighbors._near for engine in (ours, plain)] == [geometry.near, neighbors.near]
    return ours, plain


@pytest.mark.parametrize("make", [crystal, cluster])
def test_evaluations_are_the_same(make: Callable[..., Structure], monkeypatch: pytest.MonkeyPatch) -> None:
    engines = both(monkeypatch, lambda: evaluator(painn(), ORGANIC, skin=0.4))
    rng, structure = np.random.default_rng(0), make(ORGANIC)
    for _ in range(20):
        structure = replace(structure, positions=structure.positions + 0.03 * rng.standard_normal((len(structure), 3)))
        found, expected = (engine(structure) for engine in engines)
        assert found.energy == expected.energy
        np.testing.assert_array_equal(found.forces, expected.forces)
        np.testing.assert_allclose(found.virial, expected.virial, rtol=1e-12, atol=1e-12)
    assert 1 < engines[0].neighbors.builds < 20


def test_refusals_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Coincident atoms, too short a distance, and a model that explodes."""
    domain = Domain(elements=ORGANIC.elements, min_distances={"C-H": 1.0})
    pair = Structure(np.array([6, 1]), np.array([[0.0, 0, 0], [1.0, 0, 0]]))

    def exploding(graph: Graph) -> Graph:
        infinite = torch.full_like(graph["edge_vec"], torch.inf)
        return {"node_energy": torch.zeros(2, dtype=torch.float64), "edge_gradient": infinite}

    for engine in both(monkeypatch, lambda: Evaluator(painn(), domain, 4.0, dtype=torch.float64)):
        with pytest.raises(StructureError, match="atoms 0 and 1 coincide"):
            engine(replace(pair, positions=np.zeros((2, 3))))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            engine(pair)
        with pytest.warns(ExtrapolationWarning, match=r"0\.999 Å apart"):
            engine(replace(pair, positions=0.999 * pair.positions))
        engine.potential = exploding
        with pytest.raises(StructureError, match=r"not finite on atom 0 \(C\), and on 1 more"):
            engine(pair)


def reversed_forces(edge_index: torch.Tensor, *rest: Any) -> Any:
    """The bug: centre and neighbour exchanged."""
    return FORCES(edge_index.flip(0), *rest)


def late(positions: Any, origin: Any, reach: float, *rest: Any) -> Any:
    """The bug: atoms may move twice as far."""
    return NEAR(positions, origin, 2 * reach, *rest)


def without_images(positions: Any, origin: Any, reach: float, pairs: Any, offset: Any, cutoff: float) -> Any:
    """The bug: every neighbour in the home cell."""
    return NEAR(positions, origin, reach, pairs, None, cutoff)


FORCES, NEAR = geometry.forces, geometry.near


@pytest.mark.parametrize(
    ("name", "bug"),
    [("forces", reversed_forces), ("near", late), ("near", without_images)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_bugs_are_noticed(name: str, bug: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, name, bug)
    with pytest.raises((AssertionError, StructureError)):
        test_evaluations_are_the_same(crystal, monkeypatch)
