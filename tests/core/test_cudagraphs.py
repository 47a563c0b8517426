"""Padding to buckets changes nothing; the same code captures CUDA graphs where there is a GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mlff_engines import cudagraphs
from mlff_engines.artifact import Artifact, load
from mlff_engines.cudagraphs import CapturedPotential, bucket_size
from mlff_engines.graph import Graph, make_graph
from mlff_engines.neighbors import neighbor_list
from students import artifact

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("students")
    return artifact(folder / "one"), artifact(folder / "three", members=3)


def graphs(device: torch.device, dtype: torch.dtype = torch.float64) -> list[Graph]:
    """Ever denser boxes of 27 atoms, and atoms without any edge."""
    rng = np.random.default_rng(0)
    found = []
    for width in (8.5, 7.0, 6.9, 6.0, 40.0):
        grid = np.stack(np.meshgrid(*[np.arange(3) / 3] * 3, indexing="ij"), -1).reshape(-1, 3)
        positions = width * grid + rng.uniform(-0.1, 0.1, (27, 3))
        index, vectors = neighbor_list(positions, width * np.eye(3), np.ones(3, dtype=bool), 4.0)
        found.append(
            make_graph(
                torch.tensor([1, 6, 8] * 9, device=device),
                torch.from_numpy(index).to(device),
                torch.from_numpy(vectors).to(device, dtype),
            )
        )
    return found


def run(potential: CapturedPotential | Artifact, graph: Graph) -> Graph:
    with torch.enable_grad():
        return potential(graph)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("members", [1, 3])
def test_padding_changes_nothing(students: tuple[Path, Path], members: int, device: str) -> None:
    plain = load(students[members > 1], device, kernel="torch")
    padded = CapturedPotential(plain, plain.manifest.cutoff)
    boxes = graphs(plain.device)
    assert len({bucket_size(g["edge_index"].shape[1]) for g in boxes}) >= 3  # else nothing is left and met again
    assert boxes[-1]["edge_index"].shape[1] == 0
    kept = []
    for graph in [*boxes, *reversed(boxes)]:  # each bucket is left and met again
        found, expected = run(padded, graph), run(plain, graph)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-12)
        kept.append((found, {name: tensor.clone() for name, tensor in found.items()}))
    assert padded.captures == len({bucket_size(g["edge_index"].shape[1]) for g in boxes})
    for found, copy in kept:  # no later call wrote into what an earlier one handed out
        assert all(torch.equal(found[name], copy[name]) for name in copy)


def test_padding_within_the_cutoff_would_be_seen(students: tuple[Path, Path]) -> None:
    """The injected bug: padding edges that count."""
    plain = load(students[0], kernel="torch")
    padded, graph = CapturedPotential(plain, 0.2 * plain.manifest.cutoff), graphs(plain.device)[0]
    apart = run(padded, graph)["node_energy"] - run(plain, graph)["node_energy"]
    assert apart.abs().max() > 1e-3


def test_other_atoms_of_the_same_number(students: tuple[Path, Path]) -> None:
    plain = load(students[0], kernel="torch")
    padded, graph = CapturedPotential(plain, plain.manifest.cutoff), graphs(plain.device)[0]
    run(padded, graph)
    other = {**graph, "numbers": graph["numbers"].flip(0)}
    torch.testing.assert_close(run(padded, other)["node_energy"], run(plain, other)["node_energy"])
    assert padded.captures == 1


def test_old_buckets_are_dropped(students: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudagraphs, "KEPT", 2)
    plain = load(students[0], kernel="torch")
    padded = CapturedPotential(plain, plain.manifest.cutoff)
    for graph in graphs(plain.device):
        run(padded, graph)
    assert len(padded._buckets) == 2


@pytest.mark.parametrize("edges", [0, 1, 255, 256, 257, 307, 308, 100_000, 1_234_567])
def test_buckets_hold_and_waste_little(edges: int) -> None:
    size = bucket_size(edges)
    assert size >= edges
    assert size == bucket_size(size) == 256 or size <= 1.2 * edges + 2
