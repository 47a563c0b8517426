"""What surrounds a model in a step of dynamics, as operators: edges from positions, forces from edge gradients.

`mlff_engines.neighbors` and `mlff_engines.potential` say it in numpy and torch. Edges and forces are the same to the
last bit; the virial is to rounding, for it is a sum in another order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlff_engines.structure import FloatArray, IntArray


def near(
    positions: FloatArray,
    origin: FloatArray,
    reach: float,
    pairs: IntArray,
    offset: FloatArray | None,
    cutoff: float,
) -> tuple[IntArray, FloatArray] | None:
    """As `mlff_engines.neighbors.near`."""
    if not positions.flags.writeable:  # torch knows no such array
        positions = positions.copy()
    index, vectors = torch.ops.mlff.near_v1.default(
        torch.from_numpy(positions),
        torch.from_numpy(origin),
        reach,
        torch.from_numpy(pairs),
        None if offset is None else torch.from_numpy(offset),
        cutoff,
    )
    return None if index is None else (index.numpy(), vectors.numpy())


def forces(
    edge_index: Tensor, edge_vec: Tensor, edge_gradient: Tensor, numbers: Tensor, least: Tensor
) -> tuple[Tensor, Tensor, bool, bool]:
    """Forces (N, 3) in eV/Å and virial (3, 3) in eV of one structure, in float64.

    And whether all forces are finite, and whether any edge is too short.

    Args:
        edge_index: (2, E).
        edge_vec: (E, 3), Å, float64.
        edge_gradient: (E, 3), eV/Å, of any precision.
        numbers: (N,) atomic numbers.
        least: (Z, Z), Å²: a shorter square, for the atomic numbers of the two ends, is too short.
    """
    found: tuple[Tensor, Tensor, bool, bool] = torch.ops.mlff.forces_v1.default(
        edge_index, edge_vec, edge_gradient, numbers, least
    )
    return found
