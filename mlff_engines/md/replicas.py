"""Several structures as one batch of atoms, and their forces in one call of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mlff_engines.artifact import Artifact
from mlff_engines.errors import StructureError
from mlff_engines.graph import Graph, make_graph
from mlff_engines.neighbors import SKIN, candidates
from mlff_engines.potential import edge_forces, edge_virial
from mlff_engines.structure import MASSES, FloatArray, Structure


class Replicas:
    """B structures, one after another, A atoms in all. Their positions and velocities move; nothing else changes.

    | attribute    | shape   | dtype   | unit | meaning                                |
    |--------------|---------|---------|------|----------------------------------------|
    | `positions`  | (A, 3)  | float64 | Å    |                                        |
    | `velocities` | (A, 3)  | float64 | Å/fs | zero at first                          |
    | `masses`     | (A,)    | float64 | amu  | standard atomic weights by default     |
    | `batch`      | (A,)    | int64   | -    | replica of each atom                   |
    | `structures` | B       |         |      | as they were given                     |

    Args:
        structures: may differ in size and kind.
        masses: of the atoms of each structure, amu.
        device: of torch.

    Raises:
        StructureError: no structure, an empty one, or masses that do not fit.
    """

    def __init__(
        self,
        structures: Sequence[Structure],
        *,
        masses: Sequence[FloatArray] | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        sizes = [len(structure) for structure in structures]
        if not sizes or not all(sizes):
            raise StructureError(f"replicas of {sizes} atoms; give at least one structure, and none that is empty")
        if masses is None:
            masses = [np.array(MASSES)[structure.numbers] for structure in structures]
        if [np.shape(m) for m in masses] != [(size,) for size in sizes] or not all((m > 0).all() for m in masses):
            raise StructureError(f"masses of shapes {[np.shape(m) for m in masses]} for {sizes} atoms; all positive")
        self.structures = list(structures)
        self.device = torch.device(device)
        self.starts = np.concatenate([[0], np.cumsum(sizes)]).tolist()
        self.positions = self._tensor(np.concatenate([s.positions for s in structures]))
        self.velocities = torch.zeros_like(self.positions)
        self.masses = self._tensor(np.concatenate(masses))
        self.batch = self._tensor(np.repeat(np.arange(len(sizes)), sizes))

    def __len__(self) -> int:
        return len(self.structures)

    def atoms(self, replica: int) -> slice:
        """Where the atoms of `replica` stand among all."""
        return slice(self.starts[replica], self.starts[replica + 1])

    def total(self, per_atom: Tensor) -> Tensor:
        """Sums over each replica: (A, ...) to (B, ...)."""
        return per_atom.new_zeros((len(self), *per_atom.shape[1:])).index_add_(0, self.batch, per_atom)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)


@dataclass(frozen=True)
class BatchResult:
    """What one evaluation of all replicas yields.

    | field      | shape     | unit |
    |------------|-----------|------|
    | `energies` | (B,)      | eV   |
    | `forces`   | (A, 3)    | eV/Å |
    | `virials`  | (B, 3, 3) | eV   |
    """

    energies: Tensor
    forces: Tensor
    virials: Tensor


class BatchEvaluator:
    """Energies and forces of `Replicas` wherever they are; each replica's neighbour list is kept while it holds.

    What a replica gets does not depend on the others: bitwise on the CPU, with a fused kernel.

    Args:
        artifact: loaded on the device of `replicas`.
        replicas: whose positions are read at each call.
        skin: Å added to the cutoff of the neighbour lists; a list serves until an atom has moved by half of it.

    Raises:
        StructureError: elements, charges or spins that the model does not know, or another device.
    """

    def __init__(self, artifact: Artifact, replicas: Replicas, *, skin: float = SKIN) -> None:
        if artifact.device != replicas.device:
            raise StructureError(f"the artifact is on {artifact.device}, the replicas on {replicas.device}")
        check = artifact.evaluator(outside="ignore").check_composition
        for structure in replicas.structures:
            check(structure)
        self.replicas, self.dtype = replicas, artifact.dtype
        self.potential = artifact.replayed()
        self.cutoff, self.skin = artifact.manifest.cutoff, skin
        self.left_out: set[int] = set()  # replicas without edges from now on
        self.builds = 0
        self._reference = torch.full_like(replicas.positions, torch.inf)
        empty = (np.zeros((2, 0), dtype=np.int64), np.zeros((0, 3)))
        self._found = [empty] * len(replicas)
        device, dtype = replicas.device, artifact.dtype
        self._atoms = make_graph(
            numbers=torch.from_numpy(np.concatenate([s.numbers for s in replicas.structures])).to(device),
            edge_index=torch.empty((2, 0), dtype=torch.int64, device=device),
            edge_vec=torch.empty((0, 3), dtype=dtype, device=device),
            batch=replicas.batch,
            charge=torch.tensor([s.charge for s in replicas.structures], dtype=dtype, device=device),
            spin=torch.tensor([s.spin for s in replicas.structures], dtype=dtype, device=device),
        )

    def __call__(self) -> BatchResult:
        """Evaluate. Energies and forces of a replica far outside the trained range may be not finite."""
        replicas = self.replicas
        self._update()
        vectors = replicas.positions.index_select(0, self._index[1])
        vectors -= replicas.positions.index_select(0, self._index[0])
        vectors += self._offset
        edge_index = self._index
        if not vectors.is_cuda:  # a GPU would wait for the host to learn how many they are; beyond, edges count nothing
            close = (vectors.square().sum(1) < self.cutoff**2).nonzero().squeeze(1)
            edge_index, vectors = edge_index.index_select(1, close), vectors.index_select(0, close)
        graph: Graph = {**self._atoms, "edge_index": edge_index, "edge_vec": vectors.to(self.dtype)}
        with torch.enable_grad():
            out = self.potential(graph)
        gradient = out["edge_gradient"].detach().double()
        of_edge = replicas.batch.index_select(0, edge_index[0])
        return BatchResult(
            replicas.total(out["node_energy"].detach().double()),
            edge_forces(edge_index, gradient, len(replicas.positions)),
            edge_virial(vectors, gradient, of_edge, len(replicas)),
        )

    def _update(self) -> None:
        """Search again for the replicas whose candidates may have missed a pair."""
        replicas = self.replicas
        moved = (replicas.positions - self._reference).square().sum(1)
        largest = moved.new_zeros(len(replicas)).scatter_reduce_(0, replicas.batch, moved, "amax")
        # a comparison that is false for NaN too
        stale = (~(2 * largest.sqrt() <= self.skin)).nonzero().squeeze(1).tolist()
        if not stale:
            return
        for replica in stale:
            structure, atoms = replicas.structures[replica], replicas.atoms(replica)
            positions = replicas.positions[atoms]
            self._reference[atoms] = positions
            if replica in self.left_out:
                self._found[replica] = np.zeros((2, 0), dtype=np.int64), np.zeros((0, 3))
                continue
            pairs, shift = candidates(positions.cpu().numpy(), structure.cell, structure.pbc, self.cutoff + self.skin)
            periodic = np.where(structure.pbc[:, None], structure.cell, 0.0)
            self._found[replica] = pairs + atoms.start, shift @ periodic
        self._index = torch.from_numpy(np.concatenate([pairs for pairs, _ in self._found], axis=1)).to(replicas.device)
        self._offset = torch.from_numpy(np.concatenate([offset for _, offset in self._found])).to(replicas.device)
        self.builds += 1

    def leave_out(self, replica: int) -> None:
        """From now on its atoms feel nothing, and cost nothing."""
        self.left_out.add(replica)
        self._reference[self.replicas.atoms(replica)] = torch.inf
