"""The static checks of docs/conformance.md, all in one call. An engine is a callable: `Structure` to `Result`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import numpy as np

from mlff_engines.errors import MLFFError
from mlff_engines.neighbors import neighbor_list
from mlff_engines.structure import Structure
from mlff_engines.validation.result import NAMES, STATIC, TOLERANCES, CheckResult, Claims, Evaluate
from mlff_engines.validation.static.derivatives import check_forces, check_virial
from mlff_engines.validation.static.locality import check_cutoff, check_separation
from mlff_engines.validation.static.neighbor_cases import Search, check_neighbors
from mlff_engines.validation.static.parity import check_calls, check_parity
from mlff_engines.validation.static.symmetry import check_descriptions, check_elements, check_symmetry
from mlff_engines.validation.static.systems import systems

FEW = 100  # atoms


def check_model(
    evaluate: Evaluate,
    claims: Claims,
    *,
    reference: Evaluate | None = None,
    upcast: Evaluate | None = None,
    search: Search = neighbor_list,
    structures: Mapping[str, Structure] | None = None,
    only: Collection[str] = tuple(STATIC),
) -> list[CheckResult]:
    """Run every static check on one engine.

    Args:
        evaluate: the engine.
        claims: what its model says of itself.
        reference: the eager model, see `static.parity.reference`; without it S1 and S2 are left out.
        upcast: a float32 model run in float64, for the finite differences; without it S3 is left out and S4 is rough.
        search: the neighbour search that the engine uses.
        structures: more structures to try, beside those made from the claims; those of more than `FEW` atoms in S1
            only, for what the other checks ask does not depend on size.
        only: codes of the checks to run.

    Returns:
        One result per check. A check that the engine answers with an error has failed.
    """
    made, given = systems(claims), dict(structures or {})
    few = {name: structure for name, structure in given.items() if len(structure) <= FEW}
    small = {name: made[name] for name in ("cluster", "triclinic box", "slab")} | few
    every = made | few
    checks: dict[str, Callable[[], CheckResult]] = {
        "S5": lambda: check_symmetry(evaluate, claims, every),
        "S6": lambda: check_descriptions(evaluate, claims, every),
        "S7": lambda: check_cutoff(evaluate, claims),
        "S8": lambda: check_neighbors(search, claims.cutoff),
        "S9": lambda: check_separation(evaluate, claims),
        "S10": lambda: check_elements(evaluate, claims),
    }
    if "virial" in claims.offers:
        checks["S4"] = lambda: check_virial(evaluate, claims, small, upcast)
    double = evaluate if claims.dtype == "float64" else upcast
    if double is not None:
        checks["S3"] = lambda: check_forces(double, claims, small)
    if reference is not None:
        checks["S1"] = lambda: check_parity(evaluate, reference, claims, made | given)
        checks["S2"] = lambda: check_calls(evaluate, reference, claims)
    results = []
    for code in (code for code in STATIC if code in checks and code in only):
        try:
            results.append(checks[code]())
        except MLFFError as error:
            tolerance = TOLERANCES[code][claims.dtype]
            results.append(
                CheckResult(code, NAMES[code], "fail", np.nan, tolerance, f"{type(error).__name__}: {error}")
            )
    return results
