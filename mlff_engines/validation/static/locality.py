"""S7, S9: where interactions of a short-range model end."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np

from mlff_engines.structure import FloatArray, Result, Structure
from mlff_engines.validation.result import ROUNDING, CheckResult, Claims, Evaluate, Worst
from mlff_engines.validation.static.symmetry import added
from mlff_engines.validation.static.systems import cluster, isolated, joined

STEP = {"float64": 1e-6, "float32": 1e-5}  # Å; on the scale of the cutoff float32 resolves 5e-7 Å


def check_cutoff(evaluate: Evaluate, claims: Claims) -> CheckResult:
    """S7: energy and forces are continuous where a distance passes the cutoff, for pairs and beside a third atom."""
    worst = Worst()
    step, cutoff = STEP[claims.dtype], claims.cutoff
    for first, second in itertools.combinations_with_replacement(claims.numbers, 2):
        alone = _values(added(evaluate(isolated(claims, first)), evaluate(isolated(claims, second))))
        pair = f"atoms {first} and {second}"
        for beyond in (1e-4, 0.3, cutoff):
            outside = _values(evaluate(_pair(claims, first, second, cutoff + beyond)))
            energy = abs(outside[0] - alone[0]) - 3 * _last_digits(alone)
            worst.see(
                float(np.maximum(energy, _largest((outside - alone)[1:]))),
                f"{pair} {beyond:g} Å beyond the cutoff feel each other",
            )
        for third in (None, *claims.numbers[:1]):

            def at(distance: float, third: int | None = third) -> FloatArray:
                return _values(evaluate(_pair(claims, first, second, distance, third)))  # noqa: B023

            # limits from either side, by linear extrapolation: smooth change over the step drops out
            left = 2 * at(cutoff - step) - at(cutoff - 2 * step)
            right = 2 * at(cutoff + step) - at(cutoff + 2 * step)
            scale = max(1.0, _largest(left[1:]))
            beside = "" if third is None else f" beside atom {third}"
            jump = abs(left[0] - right[0]) - 6 * _last_digits(left)
            worst.see(jump / scale, f"energy of {pair}{beside} at the cutoff")
            worst.see(_largest((left - right)[1:]) / scale, f"forces of {pair}{beside} at the cutoff")
    return worst.judged("S7", claims.dtype)


def check_separation(evaluate: Evaluate, claims: Claims) -> CheckResult:
    """S9: a lone atom has the energy E0 and no force; far fragments have the sum of their energies."""
    worst = Worst(claims.offers)
    for symbol, number in zip(claims.elements, claims.numbers, strict=True):
        found = evaluate(isolated(claims, number))
        off = abs(found.energy - claims.e0[symbol]) - ROUNDING * abs(claims.e0[symbol])
        worst.see(off, f"isolated {symbol}: {found.energy:.12g} eV")
        worst.see(_largest(found.forces), f"force on isolated {symbol}")
    one, other = cluster(claims, 5, 1), cluster(claims, 4, 2)
    together = added(evaluate(one), evaluate(other))
    for direction in np.eye(3):
        far = other.positions + 4 * claims.layers * claims.cutoff * direction
        worst.compare("far fragments", evaluate(joined(one, replace(other, positions=far))), together)
    return worst.judged("S9", claims.dtype)


def _pair(claims: Claims, first: int, second: int, distance: float, third: int | None = None) -> Structure:
    """Two atoms at this distance along no axis, and a third near both, off their line."""
    # exactly a unit vector, so that the distance is what it is meant to be
    direction = np.array([2.0, 3.0, 6.0]) / 7
    numbers, positions = [first, second], [np.zeros(3), distance * direction]
    if third is not None:
        numbers.append(third)
        positions.append(claims.cutoff * (0.4 * direction + np.array([0.3, 0.1, -0.15])))
    return Structure(np.array(numbers), np.array(positions), charge=claims.charges[0], spin=claims.spins[0])


def _values(result: Result) -> FloatArray:
    return np.concatenate([[result.energy], result.forces.ravel()])


def _last_digits(values: FloatArray) -> float:
    """What one energy may be off by rounding alone: those of heavy isolated atoms are large."""
    return ROUNDING * abs(float(values[0]))


def _largest(values: FloatArray) -> float:
    return float(np.abs(values).max())
