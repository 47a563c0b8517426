"""PaiNN as one operator: what `painn.cpp` is given.

`mlff::painn_v1` maps the graph and the arguments below to the raw outputs y (N,), float64, and the gradient (E, 3) of
Σ seed_i y_i with respect to `edge_vec`.

| argument   | shape    | content                                                                                |
|------------|----------|----------------------------------------------------------------------------------------|
| `rows`     | (N,)     | row of each atom in `q` and `x`: its atomic number, or the atom itself if charged       |
| `seed`     | (N,)     | weight of each atom's output, float64                                                   |
| `q`        | (R, F)   | scalar features that enter the first layer; they depend on the element (and charge) only |
| `x`        | (R, 2F)  | its message net of these, less the part for vectors, which are zero                      |
| `weights`  | flat     | all else, in the order in which `Weights` in painn.cpp takes it                          |
| `filters`  | flat     | the table of `mlff_engines.kernels.table`, layer by layer, in chunks of `WIDTH` channels |
| `hidden`, `layers` | | width of the readout, number of layers                                                 |
| `start`, `cutoff`  | | range of the table, Å                                                                  |

Channels are padded with zeros to a multiple of `WIDTH`: no padded channel ever feeds another.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlff_engines.graph import Graph
from mlff_engines.kernels.table import START, tabulate
from mlff_engines.models.base import AtomicModel, empty_graph, with_isolated_atoms
from mlff_engines.potential import Potential

WIDTH = 16  # as in dense.h


class FusedPaiNN(Potential):
    """A `Potential` of PaiNN through the operator; through automatic differentiation in training and off the CPU.

    Attributes:
        intervals, value_error, slope_error: of the table, see `FilterTable`.
    """

    if TYPE_CHECKING:
        model: Any

    def __init__(self, potential: Potential) -> None:
        super().__init__(potential.model)
        atomic = cast(AtomicModel, potential.model)
        dtype = next(atomic.network.parameters()).dtype
        exact: Any = copy.deepcopy(atomic.network).double()
        self.features: int = exact.features
        self.hidden = _multiple(exact.readout[0].out_features)
        self.layers = len(exact.messages)
        self.start = START
        self.cutoff: float = exact.cutoff_function.cutoff
        self.charged: bool = exact.electronic.charge or exact.electronic.spin
        table = tabulate(
            lambda r: exact.filter_net(exact.basis(r)) * exact.cutoff_function(r).unsqueeze(-1), self.cutoff, dtype
        )
        self.intervals, self.value_error, self.slope_error = table.intervals, table.value_error, table.slope_error
        self.filters = nn.Buffer(_pack_table(table.coefficients, self.features))
        with torch.no_grad():
            q = exact.embedding.weight
            x = exact.messages[0].message_net(q)[:, : 2 * self.features]
            self.weights = nn.Buffer(_pack_weights(exact).to(dtype))
            self.q = nn.Buffer(_padded(q, self.features).to(dtype))
            self.x = nn.Buffer(_padded(x, self.features).to(dtype))
        # those of the operator itself: then a lone atom has exactly the energy E0
        self.y_isolated = nn.Buffer(torch.zeros_like(atomic.reference.y_isolated))
        elements = atomic.reference.elements
        lone = with_isolated_atoms(empty_graph(atomic.network, elements.device), elements)
        self.y_isolated[elements] = self.outputs(lone, torch.zeros(len(elements), dtype=torch.float64))[0]

    def forward(self, graph: Graph) -> Graph:
        """As `Potential`."""
        if self.training or not graph["edge_vec"].is_cpu:
            return self.differentiate(graph)
        numbers = graph["numbers"]
        y, gradient = self.outputs(graph, graph["owned"] * self.model.reference.scale)
        y = y - self.y_isolated.index_select(0, numbers)
        return {"node_energy": self.model.reference(y, numbers), "edge_gradient": gradient}

    def outputs(self, graph: Graph, seed: Tensor) -> tuple[Tensor, Tensor]:
        """Raw outputs y (N,), float64, and the gradient (E, 3) of Σ seed_i y_i."""
        rows = graph["numbers"]
        q: Tensor = self.q
        x: Tensor = self.x
        if self.charged:
            with torch.no_grad():
                q = self.model.network.embedding(rows)
                q = q + self.model.network.electronic(q, graph["charge"], graph["spin"], graph["batch"])
                x = _padded(self.model.network.messages[0].message_net(q)[:, : 2 * self.features], self.features)
                q = _padded(q, self.features)
            rows = torch.arange(len(rows))
        y, gradient = torch.ops.mlff.painn_v1(
            rows,
            graph["edge_index"],
            graph["edge_vec"],
            seed,
            q,
            x,
            self.weights,
            self.filters,
            self.hidden,
            self.layers,
            self.start,
            self.cutoff,
        )
        return y, gradient


def memory(model: Mapping[str, Any], dtype: torch.dtype) -> tuple[float, float]:
    """Bytes per edge and per atom of one evaluation, from the hyper-parameters: the arrays in edges.h and model.h."""
    numbers = 9 + 17 * (model["interactions"] - 1)
    return 18.0 * dtype.itemsize, float(numbers * _multiple(model["features"]) * dtype.itemsize)


def _multiple(size: int) -> int:
    return size + -size % WIDTH


def _padded(tensor: Tensor, size: int, width: int = WIDTH) -> Tensor:
    """The last dimension consists of blocks of `size`: each is padded with zeros to a multiple of `width`."""
    return F.pad(tensor.unflatten(-1, [-1, size]), [0, -size % width]).flatten(-2)


def _pack_table(coefficients: Tensor, features: int) -> Tensor:
    """From (intervals, powers, layers·3F): per layer (intervals, chunks, parts, powers downwards, WIDTH), flat."""
    packed = []
    for layer, block in enumerate(coefficients.flip(1).split(3 * features, dim=-1)):
        parts = 2 if layer == 0 else 3  # the part for the vectors, which are zero at first, comes last
        channels = _padded(block[..., : parts * features], features)
        packed.append(channels.unflatten(-1, [parts, -1, WIDTH]).permute(0, 3, 2, 1, 4).flatten())
    return torch.cat(packed)


def _pack_weights(network: Any) -> Tensor:
    """All dense layers, flat, each as (in, out) for the way there and as (out, in) for the way back."""
    size, half, last = network.features, network.readout[0].out_features, len(network.messages) - 1
    packed: list[Tensor] = []

    def pack(*layers: tuple[Tensor, Tensor | None, int, int]) -> None:
        """Weights (out, in) in blocks of the two sizes, with biases; the ways back in reverse order."""
        back = []
        for weight, bias, inputs, outputs in layers:
            there = _padded(_padded(weight, inputs).T, outputs)
            packed.append(there.flatten())
            if bias is not None:
                packed.append(_padded(bias, outputs))
            back.append(there.T.flatten())
        packed.extend(reversed(back))

    def two(net: Any, parts: list[int]) -> None:
        """A perceptron with one hidden layer; `parts` of its output, in this order."""
        weight, bias = (p.unflatten(0, (3, size))[parts].flatten(0, 1) for p in (net[2].weight, net[2].bias))
        pack((net[0].weight, net[0].bias, size, size), (weight, bias, size, size))

    for layer, (message, update) in enumerate(zip(network.messages, network.updates, strict=True)):
        if layer > 0:
            two(message.message_net, [0, 1, 2])
        pack((update.vector_mix.weight, None, size, size))
        # a_ss, a_sv and, unless it is the last, a_vv
        two(update.update_net, [0, 2] if layer == last else [0, 2, 1])
    pack((network.readout[0].weight, network.readout[0].bias, size, half))
    packed.append(_padded(network.readout[2].weight[0], half))
    packed.append(_padded(network.readout[2].bias, 1))
    return torch.cat(packed)
