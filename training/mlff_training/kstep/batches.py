"""Pairs as batches of graphs, in the units of the core."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mlff_engines.graph import Graph, make_graph
from mlff_engines.neighbors import neighbor_list
from mlff_engines.structure import SYMBOLS, IntArray, Structure
from mlff_engines.units import KJ_PER_MOL, length_unit
from mlff_training.kstep.pairs import Pairs

NM = length_unit("nm")
NM_PER_PS = NM / 1e3  # Å/fs
FORCE = KJ_PER_MOL / NM  # eV/Å
MARGIN = 0.5  # Å beyond the cutoff, for atoms that noise moves; edges beyond the cutoff count nothing


@dataclass(frozen=True)
class Batch:
    """Some pairs: where they start, and where they end (N, 3) in Å and Å/fs; forces at the start in eV/Å, or None."""

    graph: Graph
    x: Tensor
    dx: Tensor
    dv: Tensor
    forces: Tensor | None


class PairBatches:
    """Batches of a data set; the edges of each pair are found once.

    Args:
        part: the pairs in use.
        cutoff: Å.
        reverse: each pair a second time, run backwards, behind the others.
    """

    def __init__(self, pairs: Pairs, part: IntArray, cutoff: float, *, reverse: bool = False) -> None:
        a = pairs.arrays
        self.part = part
        self.first: IntArray = a["first_atom"]
        self.reverse = reverse
        self.x = {+1: NM * a["x_t"], -1: NM * a["x_tk"]}
        self.v = {+1: NM_PER_PS * a["v_t"], -1: -NM_PER_PS * a["v_tk"]}
        self.forces = FORCE * a["f_t"] if "f_t" in a else None
        self.numbers, self.masses, self.temperature = a["atom_types"], a["masses"], a["temperature"]
        self.reach = cutoff + MARGIN
        self._edges: dict[tuple[int, int], IntArray] = {}

    def __len__(self) -> int:
        return len(self.part) * (2 if self.reverse else 1)

    def atoms(self, pair: int) -> slice:
        """Of a pair of the data set."""
        return slice(int(self.first[pair]), int(self.first[pair + 1]))

    def structure(self, index: int) -> Structure:
        """Where the pair `index` of this part starts."""
        where = self.atoms(int(self.part[index]))
        return Structure(self.numbers[where], self.x[1][where])

    def batch(self, indices: list[int], noise: float = 0.0, rng: np.random.Generator | None = None) -> Batch:
        """The pairs `indices`; with `noise` (Å) on the positions that they start from, not on where they end."""
        ways = [(int(self.part[i % len(self.part)]), 1 if i < len(self.part) else -1) for i in indices]
        slices = [self.atoms(pair) for pair, _ in ways]
        sizes = [s.stop - s.start for s in slices]

        def gather(of: dict[int, np.ndarray], sign: int) -> np.ndarray:
            parts = [of[way * sign][s] for (_, way), s in zip(ways, slices, strict=True)]
            return np.concatenate(parts)

        x, v = gather(self.x, 1), gather(self.v, 1)
        # where the pair ends, run in its own direction
        end_x, end_v = gather(self.x, -1), -gather(self.v, -1)
        if noise and rng is not None:
            x = x + rng.normal(0, noise, x.shape)
        offsets = np.cumsum([0, *sizes[:-1]])
        index = np.concatenate([self._edge_index(*way) + o for way, o in zip(ways, offsets, strict=True)], axis=1)
        numbers = np.concatenate([self.numbers[s] for s in slices])
        graph = make_graph(
            torch.from_numpy(numbers.astype(np.int64)),
            torch.from_numpy(index),
            torch.from_numpy((x[index[1]] - x[index[0]]).astype(np.float32)),
            batch=torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)),
        )
        graph["velocities"] = torch.from_numpy(v)
        graph["temperature"] = torch.tensor([self.temperature[pair] for pair, _ in ways], dtype=torch.float32)
        forces = None
        if self.forces is not None:  # known at the start of pairs that run forwards
            known = np.concatenate([self.forces[s] for s in slices])
            known[np.repeat([way < 0 for _, way in ways], sizes)] = np.nan
            forces = torch.from_numpy(known)
        return Batch(graph, torch.from_numpy(x), torch.from_numpy(end_x - x), torch.from_numpy(end_v - v), forces)

    def _edge_index(self, pair: int, way: int) -> IntArray:
        if (pair, way) not in self._edges:
            free = np.zeros((3, 3)), np.zeros(3, dtype=bool)
            self._edges[pair, way] = neighbor_list(self.x[way][self.atoms(pair)], *free, self.reach)[0]
        return self._edges[pair, way]

    def scales(self) -> dict[str, tuple[float, float]]:
        """Root mean square displacement (Å) and change of velocity (Å/fs), per direction and element."""
        inside = np.concatenate([np.arange(s.start, s.stop) for s in map(self.atoms, self.part.tolist())])
        dx, dv = (self.x[-1] - self.x[1])[inside], (-self.v[-1] - self.v[1])[inside]
        found = {}
        for z in np.unique(self.numbers[inside]).tolist():
            mine = self.numbers[inside] == z
            found[SYMBOLS[z]] = (float(np.sqrt((dx[mine] ** 2).mean())), float(np.sqrt((dv[mine] ** 2).mean())))
        return found

    def largest_displacement(self) -> float:
        """Å, of any atom of this part."""
        slices = map(self.atoms, self.part.tolist())
        return max(float(np.linalg.norm((self.x[-1] - self.x[1])[s], axis=1).max()) for s in slices)

    def force_scale(self) -> float:
        """eV/Å, root mean square force component; 1 without forces."""
        return 1.0 if self.forces is None else float(np.sqrt((self.forces**2).mean()))
