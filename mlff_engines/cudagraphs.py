"""A potential replayed as CUDA graphs: one launch per step in place of hundreds.

Small systems leave a GPU waiting for the kernels to be launched. A captured graph launches all of them at once, but
its shapes are fixed; the number of edges is not. So edges are padded to the next of a geometric series of sizes, a
*bucket*, and each bucket is captured when first met. Padding lies beyond the cutoff, where edges count nothing by
contract (see `mlff_engines.graph`).

On other devices the same padded buffers go through the potential directly: slower, and of use only to test them.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

import torch

from mlff_engines.graph import Graph

GROWTH = 1.2  # of one bucket over the last: a tenth of the edges are padding on average
SMALLEST = 256  # edges
KEPT = 8  # buckets, each with the memory of its activations
WARM_UP = 3  # calls before a capture: TorchScript specialises, libraries allocate

Potential = Callable[[Graph], Graph]


class CapturedPotential:
    """`potential`, with all of its work on a fixed set of buffers per bucket of edges.

    Args:
        potential: maps a graph to `node_energy`, `edge_gradient` and, of ensembles, their deviations. What it does
            must not depend on values: no synchronisation with the host.
        cutoff: Å.

    Attributes:
        captures: number of buckets prepared so far.
    """

    def __init__(self, potential: Potential, cutoff: float) -> None:
        self.potential, self.cutoff = potential, cutoff
        self.captures = 0
        self._buckets: OrderedDict[tuple[int, int, int], _Bucket] = OrderedDict()

    def __call__(self, graph: Graph) -> Graph:
        """As `potential`. The tensors belong to the caller: later calls leave them as they are."""
        atoms, edges, structures = len(graph["numbers"]), graph["edge_index"].shape[1], len(graph["charge"])
        if not atoms:
            return self.potential(graph)
        key = (atoms, structures, bucket_size(edges))
        if key not in self._buckets:
            while len(self._buckets) >= KEPT:
                self._buckets.popitem(last=False)
            self._buckets[key] = _Bucket(self.potential, graph, key[2], self.cutoff)
            self.captures += 1
        self._buckets.move_to_end(key)
        return self._buckets[key](graph)


def bucket_size(edges: int) -> int:
    """The smallest size of the series that holds `edges`."""
    steps = max(0, math.ceil(math.log(max(edges, 1) / SMALLEST) / math.log(GROWTH) - 1e-9))
    size = math.ceil(SMALLEST * GROWTH**steps)
    return size if size >= edges else math.ceil(size * GROWTH)


class _Bucket:
    """Buffers for graphs of one shape, and what runs on them."""

    def __init__(self, potential: Potential, graph: Graph, size: int, cutoff: float) -> None:
        self.inputs = {name: tensor.detach().clone() for name, tensor in graph.items()}
        edge_index, edge_vec = graph["edge_index"], graph["edge_vec"]
        self.inputs["edge_index"] = edge_index.new_zeros((2, size))
        # any vector that is too long: finite, and its derivative too
        self.beyond = 2.0 * cutoff
        self.inputs["edge_vec"] = torch.full((size, 3), self.beyond, dtype=edge_vec.dtype, device=edge_vec.device)
        self._fill(graph)
        self.run: Callable[[], Graph] = lambda: potential(self.inputs)
        if edge_vec.is_cuda:
            self.run = _captured(self.run)

    def __call__(self, graph: Graph) -> Graph:
        self._fill(graph)
        edges = graph["edge_index"].shape[1]
        return {
            name: (tensor[:edges] if name == "edge_gradient" else tensor).detach().clone()
            for name, tensor in self.run().items()
        }

    def _fill(self, graph: Graph) -> None:
        edges = graph["edge_index"].shape[1]
        for name, tensor in graph.items():
            if name == "edge_index":
                self.inputs[name][:, :edges].copy_(tensor)
                self.inputs[name][:, edges:].zero_()
            elif name == "edge_vec":
                self.inputs[name][:edges].copy_(tensor)
                self.inputs[name][edges:].fill_(self.beyond)
            else:
                self.inputs[name].copy_(tensor)


def _captured(run: Callable[[], Graph]) -> Callable[[], Graph]:
    """`run` as one CUDA graph; its outputs are the same tensors at every replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()

    def replay() -> Graph:
        graph.replay()
        return outputs

    return replay
