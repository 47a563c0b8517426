"""Structures made from nothing but what a model claims, to try it on; the same ones every time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mlff_engines.structure import FloatArray, IntArray, Structure
from mlff_engines.validation.result import Claims

ALL = np.ones(3, dtype=bool)
TRICLINIC = np.array([[1.0, 0.0, 0.0], [0.2, 0.95, 0.0], [-0.15, 0.1, 1.05]])


def systems(claims: Claims) -> dict[str, Structure]:
    """A cluster (in every charge and spin), a triclinic box, a slab, a wire and a lone atom of every element."""
    box, neutral = crystal(claims), cluster(claims)
    charged = {f"cluster, charge {q:g}": replace(neutral, charge=q) for q in claims.charges[1:]}
    open_shell = {f"cluster, spin {s:g}": replace(neutral, spin=s) for s in claims.spins[1:]}
    return {
        "cluster": neutral,
        **charged,
        **open_shell,
        "triclinic box": box,
        "slab": replace(box, pbc=np.array([True, True, False])),
        "wire": replace(box, pbc=np.array([False, False, True])),
        **{
            f"isolated {symbol}": isolated(claims, z) for symbol, z in zip(claims.elements, claims.numbers, strict=True)
        },
    }


def cluster(claims: Claims, atoms: int = 8, seed: int = 0, numbers: Sequence[int] | None = None) -> Structure:
    """Atoms of all elements (or of `numbers`) in turn on a rattled cubic grid, not periodic."""
    kinds = claims.numbers if numbers is None else numbers
    side = int(np.ceil(atoms ** (1 / 3)))
    rng = np.random.default_rng(seed)
    positions = claims.spacing * (_grid(side)[:atoms] + rng.uniform(-0.1, 0.1, (atoms, 3)))
    # 30 bits behind the point: shifts of the origin are then exact
    positions = np.round(positions * 2**30) / 2**30
    z = np.array([kinds[i % len(kinds)] for i in range(atoms)], dtype=np.int64)
    return Structure(z, positions, charge=claims.charges[0], spin=claims.spins[0])


def crystal(claims: Claims, seed: int = 1) -> Structure:
    """A rattled triclinic box of at least eight atoms, periodic in three directions, with every element."""
    side = max(2, int(np.ceil(len(claims.elements) ** (1 / 3))))
    rattled = cluster(claims, side**3, seed)
    return replace(
        rattled, positions=rattled.positions @ TRICLINIC, cell=side * claims.spacing * TRICLINIC, pbc=ALL.copy()
    )


def isolated(claims: Claims, number: int) -> Structure:
    """One atom."""
    return Structure(np.array([number]), np.zeros((1, 3)), charge=claims.charges[0], spin=claims.spins[0])


def taken(structure: Structure, atoms: IntArray) -> Structure:
    """The atoms of `structure` with these indices, in this order."""
    return replace(structure, numbers=structure.numbers[atoms], positions=structure.positions[atoms])


def joined(first: Structure, second: Structure) -> Structure:
    """Both in one, with the cell and charge of the first."""
    return replace(
        first,
        numbers=np.concatenate([first.numbers, second.numbers]),
        positions=np.concatenate([first.positions, second.positions]),
    )


def _grid(side: int) -> FloatArray:
    return np.stack(np.meshgrid(*[np.arange(side, dtype=float)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
