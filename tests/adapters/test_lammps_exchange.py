"""Message passing by exchange, as with KOKKOS: two domains of one periodic box in two threads, which trade features.

The domains stand for LAMMPS: what they are given, and what becomes of what they give, is as in
src/KOKKOS/pair_mliap_kokkos.cpp of LAMMPS. No KOKKOS build has run this yet.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import students
from lammps_runs import crystal
from mlff_engines.artifact import load
from mlff_engines.errors import ConfigError, MLFFError
from mlff_engines.structure import NUMBERS, Result, Structure
from mlff_engines.validation.result import Evaluate, deviation
from mlff_engines.validation.static.parity import reference
from mlff_lammps.exchange import LayerByLayer
from mlff_lammps.forces import Forces

ELEMENTS = list(students.E0)
CUTOFF, LAYERS = 4.0, 3
SECONDS = 60  # a rank that waits longer waits for ever


class World:
    """What two ranks have in common: a place to leave things for the other, and a meeting point."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=SECONDS)
        self.board: list[Any] = [None, None]
        self.calls: list[list[str]] = [[], []]

    def traded(self, rank: int, value: Any) -> list[Any]:
        """`value` of both ranks, once both have come."""
        self.board[rank] = value
        self.barrier.wait()
        found = list(self.board)
        self.barrier.wait()
        return found


class FakeHost:
    """What `Forces` asks of LAMMPS with KOKKOS."""

    units, ranks, masses = "metal", 2, ()

    def __init__(self, world: World, rank: int) -> None:
        self.world, self.rank = world, rank

    def say(self, text: str) -> None:
        assert text

    def tags(self, atoms: int) -> np.ndarray:
        return np.arange(1, atoms + 1)

    def total(self, value: int) -> int:
        return int(sum(self.world.traded(self.rank, value)))

    def abort(self, message: str) -> None:
        assert message
        self.world.barrier.abort()  # nobody waits any more


class Rank:
    """One domain: its atoms, its ghosts within one cutoff, the pairs around its own atoms, and the two exchanges."""

    def __init__(self, world: World, rank: int, structure: Structure, owner: np.ndarray) -> None:
        self.world, self.rank = world, rank
        self.owned = np.flatnonzero(owner == rank)
        shifts = np.array(list(itertools.product(*[(-1, 0, 1) if p else (0,) for p in structure.pbc])))
        images = (structure.positions + (shifts @ structure.cell)[:, None]).reshape(-1, 3)
        parents = np.tile(np.arange(len(structure)), len(shifts))
        home = np.repeat((shifts == 0).all(axis=1), len(structure)) & (owner[parents] == rank)
        near = np.linalg.norm(images[:, None] - structure.positions[self.owned], axis=-1) < CUTOFF
        ghosts = np.flatnonzero(near.any(axis=1) & ~home)
        positions = np.concatenate([structure.positions[self.owned], images[ghosts]])
        self.parents = np.concatenate([self.owned, parents[ghosts]])
        place = {int(atom): n for r in (0, 1) for n, atom in enumerate(np.flatnonzero(owner == r))}
        self.source = [(int(owner[p]), place[int(p)]) for p in parents[ghosts]]  # of each ghost: rank and row
        vectors = positions - positions[: len(self.owned), None]
        distance = np.linalg.norm(vectors, axis=-1)
        centres, neighbours = np.nonzero(
            (distance < CUTOFF) & (np.arange(len(positions)) != np.arange(len(self.owned))[:, None])
        )
        self.ntotal, self.nlocal, self.nlistatoms = len(positions), len(self.owned), len(self.owned)
        self.npairs = len(centres)
        self.rij = vectors[centres, neighbours]
        self.pair_i, self.pair_j = centres.astype(np.int32), neighbours.astype(np.int32)
        self.iatoms = np.arange(self.nlocal, dtype=np.int32)
        types = [NUMBERS[symbol] for symbol in ELEMENTS]
        self.elems = np.array([types.index(z) for z in structure.numbers[self.parents]], dtype=np.int32)
        self._eatoms = np.zeros(self.nlocal)
        self.energy = 0.0
        self.fij = np.zeros((self.npairs, 3))

    @property
    def eatoms(self) -> np.ndarray:  # to be filled: it cannot be set
        return self._eatoms

    def update_pair_forces(self, fij: np.ndarray) -> None:
        assert fij.flags.c_contiguous
        assert fij.dtype == np.float64
        self.fij = fij.copy()

    def forward_exchange(self, source: torch.Tensor, to: torch.Tensor, width: int) -> None:
        self._noted("forward", source, to, width)
        to.copy_(source)
        rows = self.world.traded(self.rank, source)
        for ghost, (rank, row) in enumerate(self.source):
            to[self.nlocal + ghost] = rows[rank][row]

    def reverse_exchange(self, source: torch.Tensor, to: torch.Tensor, width: int) -> None:
        self._noted("reverse", source, to, width)
        to.copy_(source)
        for rows, wanted in self.world.traded(self.rank, (source[self.nlocal :], self.source)):
            for value, (rank, row) in zip(rows, wanted, strict=True):
                if rank == self.rank:
                    to[row] += value
        to[self.nlocal :] = 0

    def _noted(self, what: str, source: torch.Tensor, to: torch.Tensor, width: int) -> None:
        self.world.calls[self.rank].append(what)
        assert source.is_contiguous()
        assert to.is_contiguous()
        assert source.shape == to.shape == (self.ntotal, width)
        assert source.data_ptr() != to.data_ptr() or not source.numel()


class ReverseDropped(Rank):
    """The bug: what ghosts send home is lost."""

    def reverse_exchange(self, source: torch.Tensor, to: torch.Tensor, width: int) -> None:
        to.copy_(source)
        to[self.nlocal :] = 0


class ForwardDropped(Rank):
    """The bug: ghosts keep what their rank believes of them."""

    def forward_exchange(self, source: torch.Tensor, to: torch.Tensor, width: int) -> None:
        to.copy_(source)


class FirstColumnOnly(Rank):
    """The bug: a buffer for one feature where there are many."""

    def forward_exchange(self, source: torch.Tensor, to: torch.Tensor, width: int) -> None:
        before = source.clone()
        super().forward_exchange(source, to, width)
        to[:, 1:] = before[:, 1:]


def evaluated(
    artifact: Path,
    structure: Structure,
    *,
    kind: type[Rank] = Rank,
    probe: bool = True,
    everything_on_one: bool = False,
    spoil: Callable[[Forces, int], None] = lambda forces, rank: None,
) -> tuple[Result, World]:
    """What two ranks make of `structure`, cut in two halves along its first cell vector."""
    inverse = np.linalg.inv(structure.cell) if structure.pbc.all() else np.eye(3)
    half = np.median(structure.positions @ inverse, axis=0)[0]
    owner = ((structure.positions @ inverse)[:, 0] > half).astype(int) * (not everything_on_one)
    world = World()
    ranks = [kind(world, rank, structure, owner) for rank in (0, 1)]

    def work(rank: Rank) -> None:
        forces = Forces(artifact, None, "cpu", FakeHost(world, rank.rank))  # type: ignore[arg-type]
        forces.check(rank)
        spoil(forces, rank.rank)
        forces(rank)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        if not probe:
            patch.setattr(LayerByLayer, "probe", lambda *_: None)
        done = [pool.submit(work, rank) for rank in ranks]
        wait(done)
    failures = [one.exception() for one in done]
    if any(failures):
        raise next((f for f in failures if f and not isinstance(f, threading.BrokenBarrierError)), failures[0])  # type: ignore[misc]
    energies, forces, virial = np.zeros(len(structure)), np.zeros((len(structure), 3)), np.zeros((3, 3))
    for rank in ranks:
        energies[rank.owned] = rank.eatoms
        assert rank.energy == pytest.approx(rank.eatoms.sum(), rel=1e-14, abs=1e-12)
        np.add.at(forces, rank.parents[rank.pair_i], rank.fij)
        np.subtract.at(forces, rank.parents[rank.pair_j], rank.fij)
        virial -= rank.rij.T @ rank.fij
    return Result(float(energies.sum()), energies, forces, 0.5 * (virial + virial.T)), world


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return students.artifact(tmp_path_factory.mktemp("student"), interactions=LAYERS, features=8)


@pytest.fixture(scope="module")
def exact(student: Path) -> Evaluate:
    """The eager model on the whole system."""
    return reference(load(student, kernel="torch").eager(), CUTOFF)


def box() -> Structure:
    """A triclinic box, larger than twice the cutoff in no direction: domains see images of their own atoms too."""
    structure = crystal(64)
    assert np.linalg.svd(structure.cell)[1].min() > CUTOFF
    return structure


@pytest.mark.parametrize("case", ["box", "molecule", "one rank empty", "isolated atoms"])
def test_numbers_of_the_eager_model(student: Path, exact: Evaluate, case: str) -> None:
    structure = {
        "molecule": replace(crystal(27), pbc=np.zeros(3, dtype=bool)),
        "isolated atoms": Structure(np.array([1, 6]), np.array([[0.0, 0, 0], [30.0, 0, 0]])),
    }.get(case, box())
    found, world = evaluated(student, structure, everything_on_one=case == "one rank empty")
    deviations = deviation(found, exact(structure))
    assert max(deviations.values()) < 1e-10, deviations
    # one each way for the probe; then there and back between the layers, the same on both ranks
    there_and_back = ["forward"] * (LAYERS - 1) + ["reverse"] * (LAYERS - 1)
    assert world.calls[0] == world.calls[1] == ["forward", "reverse", *there_and_back]


def test_ensemble(tmp_path: Path) -> None:
    path = students.artifact(tmp_path, members=2, features=8)
    found, _ = evaluated(path, box())
    expected = load(path, kernel="torch").evaluator(outside="ignore")(box())
    assert max(deviation(found, expected, {"energy", "energies", "forces", "virial"}).values()) < 1e-10


def test_single_precision(tmp_path: Path) -> None:
    path = students.artifact(tmp_path, dtype="float32", features=8)
    found, _ = evaluated(path, box())
    expected = load(path, dtype="float64", kernel="torch").evaluator(outside="ignore")(box())
    assert 1e-9 < deviation(found, expected)["forces"] < 5e-5


@pytest.mark.parametrize("kind", [ReverseDropped, ForwardDropped, FirstColumnOnly])
def test_exchange_that_is_wrong_is_refused(student: Path, exact: Evaluate, kind: type[Rank]) -> None:
    """By the probe; without it these numbers would come out."""
    with pytest.raises(ConfigError, match="does not carry the features of atoms to their ghosts and back"):
        evaluated(student, box(), kind=kind)
    found, _ = evaluated(student, box(), kind=kind, probe=False)
    deviations = deviation(found, exact(box()))
    assert deviations["forces"] > 1e-4
    assert (deviations["energy"] < 1e-10) == (kind is ReverseDropped)


@pytest.mark.fault("L4")
def test_null_types(student: Path) -> None:
    class Unmapped(Rank):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            self.elems[self.elems == 1] = -1

    with pytest.raises(ConfigError, match=r"maps a type to NULL.*one of H C O"):
        evaluated(student, box(), kind=Unmapped)


@pytest.mark.fault("L6")
def test_rank_that_fails_between_two_exchanges_ends_the_other(student: Path) -> None:
    def broken(forces: Forces, rank: int) -> None:
        layers: Any = forces._layer_by_layer
        if rank == 1:
            layers.potential.model.network.updates[1].register_forward_pre_hook(lambda *_: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        evaluated(student, box(), spoil=broken)


def test_architecture_without_known_layers(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlff_lammps.exchange.LATER_LAYERS", {})
    with pytest.raises(MLFFError, match="no exchange between the layers of painn"):
        evaluated(student, box())
