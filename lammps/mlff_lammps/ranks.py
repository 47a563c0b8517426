"""D1: the same energies, forces and virial however the box is divided among MPI processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import numpy as np

from mlff_engines.errors import MLFFError
from mlff_engines.manifest import Dtype
from mlff_engines.structure import Result, Structure
from mlff_engines.validation.result import NAMES, CheckResult, Claims, Verdict, Worst
from mlff_engines.validation.static.symmetry import replicated
from mlff_engines.validation.static.systems import ALL, cluster, crystal

TOLERANCES: dict[Dtype, float] = {"float64": 1e-8, "float32": 5e-5}
GRIDS = ((2, "2 1 1"), (2, "1 1 2"), (4, "2 2 1"), (4, "1 1 4"))


class Divided(Protocol):
    """An engine on some MPI processes."""

    def evaluate(self, structure: Structure) -> Result:
        """See `mlff_engines.validation.engine.Engine`."""
        ...

    def close(self) -> None:
        """End its processes."""
        ...


def check_ranks(make: Callable[[int, str], Divided], claims: Claims) -> CheckResult:
    """D1: one process against two and four, in several grids; atoms everywhere, and a corner with most domains empty.

    Args:
        make: an engine from the number of processes and the arguments of `processors`.
        claims: what the model says of itself.
    """
    corner = cluster(claims)
    width = 4 * claims.layers * claims.cutoff
    structures = {
        "crystal": replicated(crystal(claims), (2, 2, 2)),
        "atoms in one corner": replace(corner, cell=width * np.eye(3), pbc=ALL.copy()),
    }
    tolerance = TOLERANCES[claims.dtype]
    worst = Worst(claims.offers)
    try:
        one = make(1, "* * *")
        expected = {name: one.evaluate(structure) for name, structure in structures.items()}
        one.close()
        for ranks, grid in GRIDS:
            engine = make(ranks, grid)
            for name, structure in structures.items():
                worst.compare(f"{name} on {ranks} processes, grid {grid}", engine.evaluate(structure), expected[name])
            engine.close()
    except MLFFError as error:
        return CheckResult("D1", NAMES["D1"], "fail", np.nan, tolerance, f"{type(error).__name__}: {error}")
    verdict: Verdict = "pass" if worst.figure <= tolerance else "fail"
    return CheckResult("D1", NAMES["D1"], verdict, worst.figure, tolerance, worst.detail)
