"""A structure in, energies and forces out: what every adapter that holds positions has in common."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable

import numpy as np
import torch

from mlff_engines.checkpoint import Domain
from mlff_engines.errors import ExtrapolationWarning, StructureError, suggest
from mlff_engines.graph import Graph, make_graph
from mlff_engines.kernels import geometry, loaded
from mlff_engines.neighbors import SKIN, VerletList, near
from mlff_engines.potential import edge_forces
from mlff_engines.structure import MAX_ATOMIC_NUMBER, NUMBERS, SYMBOLS, FloatArray, IntArray, Result, Structure

COINCIDENT = 1e-3  # Å; closer atoms are a mistake in the structure, not physics
OUTSIDE_ACTIONS = ("warn", "error", "ignore")


class Evaluator:
    """Evaluates structures one after another, reusing the neighbour list while it holds.

    Args:
        potential: maps a graph to `node_energy` and `edge_gradient`: an eager `Potential` or an artifact's module.
        domain: elements, charges and distances it was trained on.
        cutoff: Å.
        takes_charge, takes_spin: whether the model has these inputs.
        skin: Å added to the cutoff of the neighbour list; 0 searches anew for every call.
        dtype, device: of the tensors handed to `potential`.
        outside: what to do below a trained minimum distance or at a charge or spin not trained on.
        bytes_per_edge, bytes_per_atom: memory the model takes, for advice when there is not enough.
    """

    def __init__(
        self,
        potential: Callable[[Graph], Graph],
        domain: Domain,
        cutoff: float,
        *,
        takes_charge: bool = False,
        takes_spin: bool = False,
        skin: float = SKIN,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        outside: str = "warn",
        bytes_per_edge: float | None = None,
        bytes_per_atom: float = 0.0,
    ) -> None:
        if outside not in OUTSIDE_ACTIONS:
            raise StructureError(f"outside={outside!r}{suggest(outside, OUTSIDE_ACTIONS)}")
        self.potential, self.domain, self.outside = potential, domain, outside
        self.takes_charge, self.takes_spin = takes_charge, takes_spin
        self.bytes_per_edge, self.bytes_per_atom = bytes_per_edge, bytes_per_atom
        self.dtype, self.device = dtype, torch.device(device)
        self._operators = self.device.type == "cpu" and loaded()
        self.neighbors = VerletList(cutoff, skin, geometry.near if self._operators else near)
        self._known = np.zeros(MAX_ATOMIC_NUMBER + 1, dtype=bool)
        self._known[[NUMBERS[symbol] for symbol in domain.elements]] = True
        self._min_square = np.zeros((MAX_ATOMIC_NUMBER + 1, MAX_ATOMIC_NUMBER + 1))
        for pair, distance in domain.min_distances.items():
            a, b = (NUMBERS[symbol] for symbol in pair.split("-"))
            self._min_square[a, b] = self._min_square[b, a] = distance**2
        # shorter squares need a closer look
        self._largest_least = max(float(self._min_square.max()), COINCIDENT**2)
        self._least = torch.from_numpy(np.maximum(self._min_square, np.nextafter(COINCIDENT**2, 1)))
        self._warned: set[str] = set()
        self._state: tuple[bytes, float, float] | None = None  # of the last structure, as is what follows
        self._atoms: Graph = {}

    def __call__(self, structure: Structure) -> Result:
        """Energies, forces and virial of `structure`.

        Raises:
            StructureError: unknown element, coincident atoms, unsupported charge or spin, out of memory, or (with
                outside="error") a distance, charge or spin outside the trained range.
        """
        atoms = self._composition(structure)
        index, edge_vec = self.neighbors.update(structure)
        edge_index = torch.from_numpy(index).to(self.device)
        vectors = torch.from_numpy(edge_vec).to(self.device)
        out = self._run({**atoms, "edge_index": edge_index, "edge_vec": vectors.to(self.dtype)})
        gradient = out["edge_gradient"]
        # summed in float64, so that forces add up to zero whatever the model's precision
        if self._operators:
            forces, virial, finite, close = geometry.forces(
                edge_index, vectors, gradient, atoms["numbers"], self._least
            )
        else:
            gradient = gradient.double()
            forces, virial = edge_forces(edge_index, gradient, len(structure)), -(vectors.T @ gradient)
            virial, finite, close = 0.5 * (virial + virial.T), bool(forces.isfinite().all()), True
        if close:
            self._check_distances(structure, index, edge_vec)
        energies = out["node_energy"].cpu().numpy()
        energy = float(energies.sum())
        if not (finite and math.isfinite(energy)):
            self._report_not_finite(structure, energies, forces.cpu().numpy())
        volume, total_virial = structure.volume, virial.cpu().numpy()
        return Result(
            energy=energy,
            energies=energies,
            forces=forces.cpu().numpy(),
            virial=total_virial,
            stress=None if volume is None else total_virial / -volume,
            energy_std=float(out["energy_std"][0]) if "energy_std" in out else None,
            force_std=out["force_std"].detach().cpu().double().numpy() if "force_std" in out else None,
        )

    def _composition(self, structure: Structure) -> Graph:
        """All of the graph but the edges; checked and made when it changes, not at every step."""
        charge, spin = structure.charge, structure.spin
        state = structure.numbers.tobytes(), charge, spin
        if state != self._state:
            self.check_composition(structure)
            self._atoms = make_graph(
                numbers=torch.from_numpy(structure.numbers.copy()).to(self.device),
                edge_index=torch.empty((2, 0), dtype=torch.int64, device=self.device),
                edge_vec=torch.empty((0, 3), dtype=self.dtype, device=self.device),
                charge=torch.tensor([charge], dtype=self.dtype, device=self.device),
                spin=torch.tensor([spin], dtype=self.dtype, device=self.device),
            )
            self._state = state
        return self._atoms

    def _run(self, graph: Graph) -> Graph:
        try:
            with torch.enable_grad():
                return self.potential(graph)
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and "memory" not in str(error).lower():
                raise
            atoms, edges = len(graph["numbers"]), graph["edge_index"].shape[1]
            needs = ""
            if self.bytes_per_edge is not None:
                needs = self._memory_advice(atoms, edges * self.bytes_per_edge + atoms * self.bytes_per_atom)
            raise StructureError(
                f"out of memory for {atoms} atoms with {edges} edges on {self.device}{needs}. "
                "Use a smaller box, a smaller skin, float32, or another device"
            ) from error

    def _memory_advice(self, atoms: int, size: float) -> str:
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
        else:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        largest = int(free / max(size, 1) * atoms)
        return (
            f": it needs about {size / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free; "
            f"at this density at most about {largest} atoms fit"
        )

    @staticmethod
    def _report_not_finite(structure: Structure, energies: FloatArray, forces: FloatArray) -> None:
        bad = np.flatnonzero(~(np.isfinite(forces).all(axis=1) & np.isfinite(energies)))
        raise StructureError(
            f"the model's energy or force is not finite on atom {bad[0]} ({SYMBOLS[structure.numbers[bad[0]]]}), "
            f"and on {len(bad) - 1} more: the structure is far outside the trained range"
        )

    def check_composition(self, structure: Structure) -> None:
        """Elements, charge and spin, without an evaluation.

        Raises:
            StructureError: as when called.
        """
        unknown = np.flatnonzero(~self._known[structure.numbers])
        if len(unknown):
            symbols = sorted({SYMBOLS[structure.numbers[i]] for i in unknown})
            raise StructureError(
                f"the model does not know {', '.join(symbols)} (atoms {_few(unknown)}); it was trained for "
                f"{', '.join(self.domain.elements)}. Train a student whose data contain them"
            )
        self._check_state("charge", structure.charge, self.takes_charge, self.domain.charges)
        self._check_state("spin", structure.spin, self.takes_spin, self.domain.spins)

    def _check_state(self, name: str, value: float, taken: bool, trained: list[float]) -> None:
        if value in trained:
            return
        allowed = ", ".join(f"{v:g}" for v in trained)
        if not taken:
            raise StructureError(
                f"{name} {value:g} is not supported: the model has no {name} input and was trained at {allowed}. "
                f"Set it to that, or train a student with model.{name}: true"
            )
        self._report_outside(name, f"{name} {value:g} was not in the training data ({allowed})")

    def _check_distances(self, structure: Structure, edge_index: IntArray, edge_vec: FloatArray) -> None:
        square = np.square(edge_vec).sum(axis=1)
        few = np.flatnonzero(square <= self._largest_least)  # bonds, mostly
        edge_index, square = edge_index.take(few, axis=1), square.take(few)
        trained = self._min_square[structure.numbers[edge_index[0]], structure.numbers[edge_index[1]]]
        if not ((square < trained) | (square <= COINCIDENT**2)).any():
            return
        worst = int(np.argmin(square - trained))
        i, j = edge_index[:, worst]
        a, b = SYMBOLS[structure.numbers[i]], SYMBOLS[structure.numbers[j]]
        distance, seen = np.sqrt(square[worst]), np.sqrt(trained[worst])
        if square.min() <= COINCIDENT**2:
            i, j = edge_index[:, np.argmin(square)]
            raise StructureError(f"atoms {i} and {j} coincide: {np.sqrt(square.min()):.2g} Å apart. Move one of them")
        self._report_outside(
            f"{a}-{b}",
            f"atoms {i} ({a}) and {j} ({b}) are {distance:.3f} Å apart; the shortest {a}-{b} distance in the training "
            f"data is {seen:.3f} Å",
        )

    def _report_outside(self, kind: str, what: str) -> None:
        message = f"{what}: the model extrapolates, its forces may be wrong"
        if self.outside == "error":
            raise StructureError(message)
        if self.outside == "warn" and kind not in self._warned:  # once, not at every step
            self._warned.add(kind)
            warnings.warn(message, ExtrapolationWarning, stacklevel=4)


def _few(indices: IntArray, most: int = 10) -> str:
    listed = ", ".join(str(i) for i in indices[:most])
    return listed if len(indices) <= most else f"{listed}, ... {len(indices)} in all"
