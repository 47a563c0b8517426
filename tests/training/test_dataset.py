"""Graphs, batches, splits and samplers."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from torch_geometric.loader import DataLoader

from mlff_engines.errors import DataError
from mlff_engines.graph import INPUTS, collate, make_graph
from mlff_engines.neighbors import neighbor_list_reference
from mlff_training.data.dataset import (
    GraphDataset,
    digest,
    labels_of,
    load_splits,
    save_splits,
    split,
    statistics,
    to_graph,
)
from mlff_training.data.formats import read
from mlff_training.data.labels import DataWarning


def labelled(atoms: Atoms, seed: int = 0, **more: object) -> Atoms:
    rng = np.random.default_rng(seed)
    atoms.rattle(0.05, seed=seed)
    forces = rng.normal(size=(len(atoms), 3))
    atoms.calc = SinglePointCalculator(atoms, energy=float(rng.normal()), forces=forces, **more)
    return atoms


@pytest.fixture
def mixed() -> list[Atoms]:
    """A cation, a metal cell smaller than the cutoff, and one atom alone without forces."""
    ion = labelled(molecule("H2O"), 1)
    ion.info |= {"charge": 1.0, "multiplicity": 2}
    copper = labelled(bulk("Cu"), 2, stress=np.array([1.0, 2, 3, 4, 5, 6]))
    atom = Atoms("H", calculator=None)
    atom.calc = SinglePointCalculator(atom, energy=-13.6)
    return [ion, copper, atom]


def test_one_graph_follows_the_contract(mixed: list[Atoms]) -> None:
    dataset = GraphDataset(mixed, 5.0, torch.float32)
    graph = dataset[1]
    assert dataset[1] is graph  # edges are computed once
    copper = mixed[1]
    edge_index, edge_vec = neighbor_list_reference(copper.positions, np.asarray(copper.cell), copper.pbc, 5.0)
    assert graph.edge_index.shape == edge_index.shape
    assert np.allclose(np.sort(graph.edge_vec.norm(dim=1)), np.sort(np.linalg.norm(edge_vec, axis=1)), atol=1e-6)
    assert graph.edge_vec.dtype == torch.float32
    assert graph.energy.dtype == torch.float64
    # ASE's Voigt order is xx yy zz yz xz xy
    assert graph.stress[0].tolist() == [[1, 6, 5], [6, 2, 4], [5, 4, 3]]
    assert graph.volume.item() == pytest.approx(copper.get_volume())
    assert dataset[0].stress.isnan().all()
    assert (dataset[0].charge.item(), dataset[0].spin.item()) == (1.0, 1.0)
    assert (dataset[2].forces == 0).all()


def test_batches_equal_the_core_collate(mixed: list[Atoms]) -> None:
    dataset = GraphDataset(mixed, 4.0, torch.float64)
    batch = next(iter(DataLoader(dataset, batch_size=3)))
    graph = to_graph(batch)
    assert set(graph) == set(INPUTS)
    singles = [to_graph(dataset[i]) for i in range(3)]
    expected = collate(
        [make_graph(s["numbers"], s["edge_index"], s["edge_vec"], charge=s["charge"], spin=s["spin"]) for s in singles]
    )
    for name, tensor in expected.items():
        assert graph[name].dtype == tensor.dtype
        assert torch.equal(graph[name], tensor), name
    labels = labels_of(batch)
    assert labels["energy"].shape == (3,)
    assert labels["forces"].shape == (5, 3)
    assert labels["stress"].shape == (3, 3, 3)
    assert labels["volume"].shape == (3,)
    assert "energies" not in labels


def test_hessian_rows_keep_the_index_in_their_own_structure() -> None:
    frames = [labelled(molecule("H2O"), seed, energies=np.arange(3.0)) for seed in range(3)]
    for number, atoms in enumerate(frames):
        atoms.arrays["hessian_row"] = np.full((3, 3), float(number))
        atoms.info["hessian_index"] = number + 2
    labels = labels_of(next(iter(DataLoader(GraphDataset(frames, 4.0), batch_size=3))))
    assert labels["hessian_index"].tolist() == [2, 3, 4]
    assert labels["hessian_row"][:, 0].tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert labels["energies"].shape == (9,)
    del frames[1].arrays["hessian_row"]
    with pytest.warns(DataWarning, match="hessian_row is left out: only 2 of 3"):
        GraphDataset(frames, 4.0)


def test_edges_are_differenced_before_the_cast() -> None:
    atoms = labelled(molecule("H2O"))
    far = atoms.copy()
    far.positions += 5000.0
    far.calc = atoms.calc
    near, moved = (GraphDataset([a], 4.0)[0].edge_vec for a in (atoms, far))
    assert (near - moved).abs().max() < 1e-6


def test_missing_labels_are_named() -> None:
    with pytest.raises(DataError, match="at least one frame"):
        GraphDataset([], 5.0)
    atoms = molecule("H2O")
    atoms.calc = SinglePointCalculator(atoms, energy=1.0)
    with pytest.raises(DataError, match=r"frame 1 \(H2O\) has no forces; found \['energy'\]"):
        GraphDataset([labelled(molecule("H2O")), atoms], 5.0)


def test_digest_sees_data_and_not_metadata(mixed: list[Atoms]) -> None:
    before = digest(mixed)
    mixed[0].info |= {"level": "PBE", "group": "a"}
    assert digest(mixed) == before
    mixed[0].calc.results["energy"] += 1e-12
    assert digest(mixed) != before


# ---------------------------------------------------------------- splits


@pytest.fixture
def groups() -> list[Atoms]:
    frames = [labelled(molecule("CH3OH"), seed) for seed in range(60)]
    for number, atoms in enumerate(frames):
        atoms.info["group"] = f"run{number // 6}"
    return frames


def test_split_by_frame_meets_counts(groups: list[Atoms]) -> None:
    parts = split(groups, {"train": 40, "valid": 11}, seed=1, by="frame")
    assert {name: len(indices) for name, indices in parts.items()} == {"train": 40, "valid": 11}
    assert not set(parts["train"]) & set(parts["valid"])
    assert parts == split(groups, {"train": 40, "valid": 11}, seed=1, by="frame")
    assert parts != split(groups, {"train": 40, "valid": 11}, seed=2, by="frame")
    all_of_them = split(groups, {"train": 0.8, "valid": 0.1, "test": 0.1}, by="frame")
    assert sorted(itertools.chain(*all_of_them.values())) == list(range(60))
    assert list(map(len, all_of_them.values())) == [48, 6, 6]


@pytest.mark.parametrize(
    "parts", [{"train": 0.7, "valid": 0.3}, {"train": 0.95, "valid": 0.05}, {"train": 55, "valid": 5}]
)
def test_no_group_in_two_parts(groups: list[Atoms], parts: dict[str, float]) -> None:
    chosen = split(groups, parts, seed=0)
    seen = [{groups[i].info["group"] for i in indices} for indices in chosen.values()]
    assert not seen[0] & seen[1]
    assert sorted(itertools.chain(*chosen.values())) == list(range(60))
    assert len(chosen["valid"]) == pytest.approx(60 * 0.3 if parts["valid"] == 0.3 else 6)


def test_copies_stay_together(groups: list[Atoms]) -> None:
    copies = []
    for atoms in groups[:20]:
        copy = atoms.copy()
        copy.rotate(50, (1, 1, 0))
        copy.calc = atoms.calc
        del copy.info["group"]
        copies.append(copy)
    for by in ("frame", "group"):
        parts = split([*groups, *copies], {"train": 0.5, "valid": 0.5}, seed=5, by=by)
        where = {i: name for name, indices in parts.items() for i in indices}
        assert all(where[i] == where[60 + i] for i in range(20))


def test_impossible_splits_are_explained(groups: list[Atoms]) -> None:
    for parts in ({"train": 70}, {"train": 0.9, "valid": 0.2}, {"train": 0}, {}, {"train": 50, "valid": 0.1}):
        with pytest.raises(DataError, match="cannot split"):
            split(groups, parts, by="frame")
    for atoms in groups:
        atoms.info["group"] = "one"
    with pytest.raises(DataError, match="split by='frame'"):
        split(groups, {"train": 0.9, "valid": 0.1})
    with pytest.raises(DataError, match="split by='frame'"):
        split(groups, {"train": 20, "valid": 10})


def test_saved_splits_belong_to_their_data(groups: list[Atoms], tmp_path: Path) -> None:
    path = tmp_path / "splits.json"
    parts = split(groups, {"train": 0.9, "valid": 0.1})
    save_splits(path, parts, groups)
    assert load_splits(path, groups) == parts
    with pytest.raises(DataError, match="made for other data"):
        load_splits(path, groups[::-1])
    path.write_text('{"splits": 1}')
    with pytest.raises(DataError, match="no file of splits"):
        load_splits(path, groups)
    with pytest.raises(DataError, match="No such file"):
        load_splits(tmp_path / "none.json", groups)


# ---------------------------------------------------------------- statistics


def test_statistics_of_real_water(data_dir: Path) -> None:
    frames = read(data_dir / "deepmd_water" / "data" / "data_0")[:5]
    facts = statistics(frames, cutoff=4.0)
    assert facts["elements"] == ["H", "O"]
    assert set(facts["min_distance"]) == {"H-H", "H-O", "O-O"}
    assert 0.8 < facts["min_distance"]["H-O"] < 1.0 < facts["min_distance"]["H-H"] < 1.6
    assert 2.2 < facts["min_distance"]["O-O"] < 2.7
    # 0.1 atoms per Å³ in a sphere of 4 Å
    assert facts["neighbors"] == pytest.approx(4 / 3 * np.pi * 64 * 192 / frames[0].get_volume(), rel=0.05)
    assert 0.5 < facts["force_rms"] < 1.5


def test_statistics_see_periodic_images() -> None:
    facts = statistics([labelled(bulk("Cu", a=3.6))])
    assert facts["min_distance"]["Cu-Cu"] == pytest.approx(3.6 / np.sqrt(2))
