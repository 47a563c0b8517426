"""What every architecture shares: from a network's raw per-atom output y to energies in eV.

    node_energy_i = E0[z_i] + shift + scale·(y_i - y°[z_i])

| equation | attribute    | meaning                                                                              |
|----------|--------------|--------------------------------------------------------------------------------------|
| E0[z]    | `e0`         | (119,) float64, eV: energy of the element, from isolated atoms or a fit              |
| shift    | `shift`      | float64, eV: mean residual energy per atom; 0 keeps isolated atoms at exactly E0     |
| scale    | `scale`      | float64, eV: spread of the energies or forces the network has to produce             |
| y°[z]    | `y_isolated` | (119,): the network's output for a lone neutral atom, so that separated atoms reach E0 |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mlff_engines.graph import Graph
from mlff_engines.structure import MAX_ATOMIC_NUMBER, NUMBERS


class AtomicModel(nn.Module):
    """A network with its energy reference. Changing the dtype changes the network only; energies stay float64.

    Args:
        network: maps a graph to raw per-atom outputs (N,).
        elements: symbols it is trained for.
        e0: eV per element symbol.
        scale: eV per unit of network output.
        shift: eV per atom.
    """

    def __init__(
        self,
        network: nn.Module,
        elements: Sequence[str],
        e0: Mapping[str, float],
        scale: float = 1.0,
        shift: float = 0.0,
    ) -> None:
        super().__init__()
        self.network = network
        self.reference = EnergyReference(elements, e0, scale, shift)

    def forward(self, graph: Graph) -> Graph:
        """`node_energy` (N,) in eV, differentiable in `edge_vec`."""
        n_atoms = graph["numbers"].shape[0]
        if self.training:
            y = self.network(with_isolated_atoms(graph, self.reference.elements))
            y_isolated = torch.zeros_like(self.reference.y_isolated, dtype=y.dtype).index_copy(
                0, self.reference.elements, y[n_atoms:]
            )
            y = y[:n_atoms]
        else:
            y = self.network(graph)
            y_isolated = self.reference.y_isolated.to(y.dtype)
        y = y - y_isolated.index_select(0, graph["numbers"])
        return {"node_energy": self.reference(y, graph["numbers"])}

    def train(self, mode: bool = True) -> AtomicModel:
        """Entering evaluation fixes the isolated-atom outputs of the present weights."""
        super().train(mode)
        if not mode:
            elements = self.reference.elements
            lone = with_isolated_atoms(empty_graph(self.network, elements.device), elements)
            with torch.no_grad():
                self.reference.y_isolated[elements] = self.network(lone).double()
        return self


class Float64(nn.Module):
    """A module whose floats stay float64 when the model around it is cast. Give it the name `reference` there."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # follow to another device, never to another dtype: float32 would lose the digits of large totals
        return super()._apply(  # type: ignore[no-untyped-call]
            lambda t: t.to(fn(t).device), recurse
        )


class EnergyReference(Float64):
    """E0, shift, scale and the isolated-atom outputs."""

    def __init__(self, elements: Sequence[str], e0: Mapping[str, float], scale: float, shift: float) -> None:
        super().__init__()
        table = torch.full((MAX_ATOMIC_NUMBER + 1,), torch.nan, dtype=torch.float64)
        for symbol in elements:
            table[NUMBERS[symbol]] = e0[symbol]
        self.elements = nn.Buffer(torch.tensor(sorted(NUMBERS[s] for s in elements)))
        self.e0 = nn.Buffer(table)
        self.scale = nn.Buffer(torch.tensor(scale, dtype=torch.float64))
        self.shift = nn.Buffer(torch.tensor(shift, dtype=torch.float64))
        self.y_isolated = nn.Buffer(torch.zeros(MAX_ATOMIC_NUMBER + 1, dtype=torch.float64))

    def forward(self, y: Tensor, numbers: Tensor) -> Tensor:
        """Energies (N,) in eV, float64, from the raw output `y` above that of the isolated atoms."""
        return self.e0.index_select(0, numbers) + self.shift + self.scale * y.double()


def with_isolated_atoms(graph: Graph, elements: Tensor) -> Graph:
    """`graph` and behind it one lone atom of each of `elements`, together one more, neutral structure."""
    structures = graph["charge"].shape[0]
    zero = graph["charge"].new_zeros(1)
    return {
        "numbers": torch.cat([graph["numbers"], elements]),
        "edge_index": graph["edge_index"],
        "edge_vec": graph["edge_vec"],
        "batch": torch.cat([graph["batch"], torch.full_like(elements, structures)]),
        "charge": torch.cat([graph["charge"], zero]),
        "spin": torch.cat([graph["spin"], zero]),
    }


def empty_graph(network: nn.Module, device: torch.device) -> Graph:
    """No atoms, in the dtype of `network`."""
    dtype = next(network.parameters()).dtype
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    return {
        "numbers": nothing,
        "edge_index": nothing.reshape(2, 0),
        "edge_vec": torch.zeros((0, 3), dtype=dtype, device=device),
        "batch": nothing,
        "charge": torch.zeros(0, dtype=dtype, device=device),
        "spin": torch.zeros(0, dtype=dtype, device=device),
    }
