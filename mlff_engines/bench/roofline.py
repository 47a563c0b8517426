"""How far the fused kernel is from what the machine can do: operations and bytes of a student, and measured ceilings.

Counted is what the equations ask for, of the form in which `mlff_engines/kernels/model.h` computes them: a sum, a
product, a division or a root is one operation, a fused multiply-add two; activations are left out. Three ceilings bound
it, see `mlff_engines.bench.ceilings`:

| of              | bytes or operations                                                     | ceiling                 |
|-----------------|-------------------------------------------------------------------------|-------------------------|
| arithmetic      | `dense` + `edge_operations`                                             | a matrix product        |
| the cache       | `cache`: what each edge reads and writes: table, features, adjoints      | a triad in the L2 cache |
| the main memory | `memory`: each array that outlives a tile of atoms, once there and back | a triad in main memory  |

Williams, Waterman and Patterson, Commun. ACM 52, 65 (2009); McCalpin, STREAM (1995).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mlff_engines.bench import ceilings
from mlff_engines.bench.page import machine
from mlff_engines.bench.rows import Row
from mlff_engines.bench.run import Subject
from mlff_engines.bench.systems import System, named
from mlff_engines.errors import ConfigError
from mlff_engines.kernels import memory
from mlff_engines.kernels.table import DEGREE
from mlff_engines.manifest import inspect
from mlff_engines.models.painn import PaiNNConfig
from mlff_engines.models.registry import model_config
from mlff_engines.neighbors import neighbor_list

SECTION = "mlff roofline"
CEILINGS = ("product", "triad-cache", "triad-memory")
EDGE = 32  # bytes of what is kept of an edge, in float32: edges.h
INDEX = 8  # bytes of its two places in the lists


@dataclass(frozen=True)
class Work:
    """One evaluation of energy and forces.

    Attributes:
        dense: operations of the perceptrons and mixings, there and back.
        edge_operations: of messages and their adjoints.
        cache: bytes that edges read and write.
        memory: bytes of arrays that are written and read once.
    """

    dense: float
    edge_operations: float
    cache: float
    memory: float

    @property
    def operations(self) -> float:
        """All."""
        return self.dense + self.edge_operations


def work(config: PaiNNConfig, atoms: int, edges: int, dtype: torch.dtype = torch.float32) -> Work:
    """What the fused kernel does for `atoms` with `edges` (both directions) within the cutoff."""
    F, L = config.features, config.interactions
    value, slope = 2 * DEGREE[dtype], 2 * (2 * DEGREE[dtype] - 1)  # of one filter by Horner's rule; slope with value
    first = 2 * value + 9  # Δs, and the part along the edge; see `receive` in model.h
    message = 3 * value + 16
    adjoint = 3 * slope + 39  # `send_adjoint`
    last = 2 * slope + 18  # `finish`
    per_channel = first + last + (L - 1) * (message + adjoint)
    terms = DEGREE[dtype] + 1
    # numbers per channel that an edge reads: its coefficients, what the other atom sends or its adjoint
    read = (2 * terms + 2) + (2 * terms + 2) + (L - 1) * ((3 * terms + 6) + (3 * terms + 4))
    geometry = 2 * L * (EDGE * dtype.itemsize / 4 + INDEX)  # read in every pass
    gradient = L * 4 * dtype.itemsize  # four numbers of an edge, added to by every layer
    per_edge, per_atom = memory(config.model_dump(), dtype)
    return Work(
        dense=atoms * float(_dense(config, F * F)),
        edge_operations=float(edges * F * per_channel),
        cache=edges * (F * read * dtype.itemsize + geometry + gradient),
        memory=2 * (edges * per_edge + atoms * per_atom),
    )


def _dense(config: PaiNNConfig, square: int) -> int:
    """Operations per atom of matrix products, there and back, in the fused form; `square` is F²."""
    L = config.interactions
    message = 8 * square  # F to F, F to 3F
    mix, update, last_update = 12 * square, 10 * square, 8 * square  # three times F to 2F; 2F to F, F to 3F or 2F
    readout = square  # F to F/2
    return 2 * ((L - 1) * message + L * mix + (L - 1) * update + last_update + readout)


def eager_products(config: PaiNNConfig, atoms: int, edges: int) -> int:
    """Operations of the matrix products of the plain torch form, as `torch.utils.flop_counter` counts them.

    There: filters of all edges; message net, mixing and update of every layer; readout. Back: all of them again, as
    gradients of their inputs, but for the first message net, whose input does not depend on the positions.
    """
    F, L = config.features, config.interactions
    filters = 2 * edges * config.basis_size * 3 * F * L
    message, mix, update = (2 * atoms * F * F * n for n in (4, 6, 5))
    readout = 2 * atoms * (F * (F // 2) + F // 2)
    there = filters + L * (message + mix + update) + readout
    return 2 * there - message


def count_edges(system: System, cutoff: float) -> int:
    """Within the cutoff, both directions."""
    s = system.structure
    return int(neighbor_list(s.positions, s.cell, s.pbc, cutoff)[0].shape[1])


def subjects(artifact: Path) -> list[Subject]:
    """The student, the student without edges, and the ceilings.

    Raises:
        ConfigError: the artifact is no PaiNN.
    """
    _config(artifact)
    options = {"artifact": str(artifact.absolute())}
    ours = Subject("mlff", "mlff_engines.bench.ours", options=options, environment={"MLFF_KERNEL": "fused"})
    bare = replace(ours, what="mlff without edges", options={**options, "edges": False})
    return [ours, bare, *(Subject(name, "mlff_engines.bench.ceilings", name, constant=True) for name in CEILINGS)]


def report(artifact: Path, rows: Sequence[Row], command: str) -> str:
    """The page's section: ceilings, operations and bytes per atom, the share reached, and where the time goes."""
    config = _config(artifact)
    times = {(row.what, row.system): row.cpu_ms for row in rows}
    best: dict[str, float] = {}
    for name in CEILINGS:
        found = [row.cpu_ms for row in rows if row.what == name and row.cpu_ms]
        if found:
            best[name] = 1e-6 * ceilings.AMOUNT[name] / min(found)  # 1e9 per second: amount / (ms · 1e6)
    lines = [
        "| | edges per atom | kflop per atom | kB per atom, cache | kB per atom, memory | µs per atom | Gflop/s "
        "| of the product | GB/s, cache | of the triad there | GB/s, memory | of the triad there |",
        "|---" * 12 + "|",
    ]
    titles = ["", "without edges, µs per atom", "Gflop/s", "of the product", "edges, µs per atom", "Gflop/s"]
    titles += ["of the product", "GB/s, cache", "of the triad there", "share of the edges"]
    parts = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for system in dict.fromkeys(row.system for row in rows):
        ms, bare = times.get(("mlff", system)), times.get(("mlff without edges", system))
        if ms is None or len(best) < len(CEILINGS):
            continue
        s = named(system)
        atoms, edges = len(s.structure), count_edges(s, config.cutoff)
        done = work(config, atoms, edges)
        rates = [1e-6 * amount / ms for amount in (done.operations, done.cache, done.memory)]
        cells = [f"{edges / atoms:.1f}"]
        cells += [f"{1e-3 * amount / atoms:.0f}" for amount in (done.operations, done.cache, done.memory)]
        cells.append(f"{1e3 * ms / atoms:.1f}")
        for rate, name in zip(rates, CEILINGS, strict=True):
            cells += [f"{rate:.1f}", _percent(rate / best[name])]
        lines.append(f"| {system} | " + " | ".join(cells) + " |")
        if bare:
            rest = max(ms - bare, 1e-9)
            inside, outside, read = (
                1e-6 * amount / spent
                for amount, spent in ((done.dense, bare), (done.edge_operations, rest), (done.cache, rest))
            )
            cells = [f"{1e3 * bare / atoms:.1f}", f"{inside:.1f}", _percent(inside / best["product"])]
            cells += [f"{1e3 * rest / atoms:.1f}", f"{outside:.1f}", _percent(outside / best["product"])]
            cells += [f"{read:.1f}", _percent(read / best["triad-cache"]), _percent(rest / ms)]
            parts.append(f"| {system} | " + " | ".join(cells) + " |")
    shown = [f"{ceilings.WORDS[name]}: {best[name]:.1f} {ceilings.UNITS[name]}" for name in CEILINGS if name in best]
    text = [f"```sh\n{command}\n```", f"{machine()} One thread, float32. Ceilings: {'; '.join(shown)}."]
    text += ["\n".join(lines)]
    text += [
        "Where the time goes: the same atoms without any edge cost what the dense layers cost; the rest is the edges, "
        "their sorting by centre and neighbour included. Edges hardly write: they can be faster than a triad, a third "
        "of whose traffic is writing.",
        "\n".join(parts),
    ]
    return "\n\n".join(text)


def _config(artifact: Path) -> PaiNNConfig:
    found = model_config(inspect(artifact).models[0])
    if not isinstance(found, PaiNNConfig):
        raise ConfigError(f"{artifact} is no PaiNN; allowed: the roofline is that of its fused kernel")
    return found


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
