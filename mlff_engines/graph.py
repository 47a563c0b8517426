"""The contract between engines and models: every tensor's name, shape, dtype, unit and sign.

An engine hands the model *edges* and gets *edge gradients* back; both travel in a ``dict[str, Tensor]``.
`N` atoms, `E` directed edges, `B` structures, `M` ensemble members.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Graph = dict[str, Tensor]


@dataclass(frozen=True)
class TensorSpec:
    """One row of the contract."""

    shape: str
    dtype: str
    unit: str
    meaning: str
    default: str | None = None


INPUTS: dict[str, TensorSpec] = {
    "numbers": TensorSpec("(N,)", "int64", "-", "atomic numbers"),
    "edge_index": TensorSpec(
        "(2, E)",
        "int64",
        "-",
        "row 0 = centre i, row 1 = neighbour j; every pair in both directions; "
        "edges beyond the cutoff are legal (a skin) and count nothing",
    ),
    "edge_vec": TensorSpec("(E, 3)", "float", "Å", "r_j - r_i + S·cell, differenced in float64 before any cast"),
    "owned": TensorSpec("(N,)", "bool", "-", "atoms whose energy counts; ghosts are not owned", "all true"),
    "batch": TensorSpec("(N,)", "int64", "-", "structure of each atom, non-decreasing from 0", "zeros"),
    "charge": TensorSpec("(B,)", "float", "e", "total charge; only if the manifest asks for it", "zeros"),
    "spin": TensorSpec("(B,)", "float", "-", "unpaired electrons; only if the manifest asks for it", "zeros"),
}

OUTPUTS: dict[str, TensorSpec] = {
    "node_energy": TensorSpec("(N,)", "float64", "eV", "per-atom energies, E0 added in float64"),
    "edge_gradient": TensorSpec("(E, 3)", "float", "eV/Å", "g = d(Σ owned node_energy)/d edge_vec"),
    "energy_std": TensorSpec("(B,)", "float64", "eV", "ensembles: standard deviation over the members"),
    "force_std": TensorSpec("(N,)", "float", "eV/Å", "ensembles: sqrt(mean over members of |F_m - mean F|²)"),
}


def make_graph(
    numbers: Tensor,
    edge_index: Tensor,
    edge_vec: Tensor,
    *,
    charge: Tensor | None = None,
    spin: Tensor | None = None,
    batch: Tensor | None = None,
    owned: Tensor | None = None,
) -> Graph:
    """A complete graph: the defaults of `INPUTS` filled in on the device and in the dtype of `edge_vec`."""
    if batch is None:
        batch = torch.zeros_like(numbers)
    structures = int(batch[-1]) + 1 if len(batch) else 1
    if charge is None:
        charge = edge_vec.new_zeros(structures)
    if spin is None:
        spin = edge_vec.new_zeros(structures)
    if owned is None:
        owned = torch.ones_like(numbers, dtype=torch.bool)
    return {
        "numbers": numbers,
        "edge_index": edge_index,
        "edge_vec": edge_vec,
        "owned": owned,
        "batch": batch,
        "charge": charge,
        "spin": spin,
    }


def collate(graphs: Sequence[Graph]) -> Graph:
    """Many graphs as one disconnected graph; `batch` tells the structures apart."""
    atoms = 0
    structures = 0
    edge_index, batch = [], []
    for graph in graphs:
        edge_index.append(graph["edge_index"] + atoms)
        batch.append(graph["batch"] + structures)
        atoms += len(graph["numbers"])
        structures += len(graph["charge"])
    joined = {name: torch.cat([g[name] for g in graphs]) for name in ("numbers", "edge_vec", "owned", "charge", "spin")}
    return {**joined, "edge_index": torch.cat(edge_index, dim=1), "batch": torch.cat(batch)}
