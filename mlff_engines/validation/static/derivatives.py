"""S3, S4: forces and virial against finite differences of the energy."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from mlff_engines.manifest import Dtype
from mlff_engines.neighbors import neighbor_list
from mlff_engines.structure import FloatArray, Structure
from mlff_engines.validation.result import TOLERANCES, CheckResult, Claims, Evaluate, Worst

STEP = 0.02  # Å
STRAIN = {"float64": 2e-3, "float32": 1.6e-2}  # float32 energies are too rough for smaller steps
RESOLUTION = 1e-5  # a difference whose uncertainty exceeds this part of the forces decides nothing


def richardson(function: Callable[[float], float], step: float, levels: int = 6) -> tuple[float, float]:
    """Derivative at 0 by central differences at `step`, step/2, ..., extrapolated to 0, and its uncertainty.

    Ridders, Adv. Eng. Softw. 4, 75 (1982): D[k, m] = (4^m D[k, m-1] - D[k-1, m-1])/(4^m - 1). The entry that agrees
    best with its two parents is taken; its error is that disagreement, or its distance from the best entry of another
    row (one agreement may be luck), or the rounding of the function, whichever is largest.
    """
    candidates: list[tuple[float, float]] = []
    previous: list[float] = []
    for _ in range(levels):
        up, down = function(step), function(-step)
        rounding = 4 * np.finfo(float).eps * max(abs(up), abs(down)) / step
        row = [(up - down) / (2 * step)]
        best = (np.inf, np.nan)
        for m, parent in enumerate(previous, 1):
            row.append((4**m * row[-1] - parent) / (4**m - 1))
            best = min(best, (max(abs(row[m] - row[m - 1]), abs(row[m] - parent), rounding), row[m]))
        candidates.append(best)
        previous, step = row, step / 2
    (error, value), (_, second) = sorted(candidates)[:2]
    return value, max(error, abs(value - second))


def derivative(function: Callable[[float], float], step: float, enough: float) -> tuple[float, float]:
    """`richardson` from `step`, or from smaller ones while its uncertainty is not below `enough`: the best of them."""
    best = richardson(function, step)
    for smaller in (step / 8, step / 64):
        if best[1] > enough:
            best = min(best, richardson(function, smaller), key=lambda found: found[1])
    return best


def check_forces(evaluate: Evaluate, claims: Claims, structures: Mapping[str, Structure]) -> CheckResult:
    """S3: forces along random directions and of single atoms, in units of the finite difference's uncertainty.

    `evaluate` runs in float64; a float32 model upcast, for its own energies are too rough to show small errors.
    """
    rng = np.random.default_rng(3)
    worst, too_rough = Worst(), ""
    for name, structure in structures.items():
        atoms = len(structure)
        if atoms < 2:
            continue
        forces = evaluate(structure).forces
        step = min(STEP, max(STEP / 100, _gap(structure, claims.cutoff) / 2))
        typical = max(float(np.sqrt((forces**2).mean())), 1e-2)
        directions = [(f"{name}, direction {k}", rng.standard_normal((atoms, 3))) for k in range(3)]
        for atom in rng.permutation(atoms)[:6]:
            single = np.zeros((atoms, 3))
            single[atom] = rng.standard_normal(3)
            directions.append((f"{name}, atom {atom}", single))
        for label, direction in directions:
            direction = direction / np.linalg.norm(direction)
            slope, uncertainty = derivative(
                lambda s: _energy(evaluate, structure, s * direction),  # noqa: B023
                step,
                RESOLUTION * typical,
            )
            force = float((forces * direction).sum())
            worst.see(abs(force + slope) / uncertainty, f"{label}: force {force:.9g}, -dE/dr {-slope:.9g} eV/Å")
            if not uncertainty <= RESOLUTION * typical:
                too_rough = f"{label}: the energies are too rough to tell, -dE/dr = {-slope:.6g} ± {uncertainty:.1g}"
    if too_rough:
        worst = Worst(figure=np.inf, detail=too_rough)
    return worst.judged("S3", claims.dtype)


def check_virial(
    evaluate: Evaluate, claims: Claims, structures: Mapping[str, Structure], exact: Evaluate | None = None
) -> CheckResult:
    """S4: W = -dE/dε for all six strains, stress = -W/V, and tr(stress)/3 = dE/dV (positive under tension).

    The energies strained are those of `exact`, the same model in float64, where it is given.
    """
    kind: Dtype = claims.dtype if exact is None else "float64"
    energies = exact or evaluate
    worst = Worst()
    for name, structure in structures.items():
        if len(structure) < 2:
            continue
        found = evaluate(structure)
        step = STRAIN[kind]
        if kind == "float64":
            step = min(step, max(step / 100, _gap(structure, claims.cutoff) / (2 * claims.cutoff)))
        enough = 0.1 * TOLERANCES["S4"][claims.dtype] * max(float(np.abs(found.virial).max()), 1e-2)
        numeric = np.zeros((3, 3))
        for a, b in itertools.combinations_with_replacement(range(3), 2):
            unit = np.zeros((3, 3))
            unit[a, b] += 0.5
            unit[b, a] += 0.5
            slope, _ = derivative(
                lambda s: energies(strained(structure, s * unit)).energy,  # noqa: B023
                step,
                enough,
            )
            numeric[a, b] = numeric[b, a] = -slope
        scale = max(float(np.abs(numeric).max()), 1e-2)
        worst.see(
            float(np.abs(found.virial - numeric).max()) / scale, f"virial of {name}{_sign(found.virial, numeric)}"
        )
        if structure.volume is not None:
            stress = np.full((3, 3), np.nan) if found.stress is None else found.stress
            expected = -numeric / structure.volume
            off = float(np.abs(stress - expected).max()) * structure.volume / scale
            worst.see(off, f"stress of {name}{_sign(stress, expected)}")
            slope = _volume_slope(energies, structure, step, enough)
            off = abs(float(np.trace(stress)) / 3 - slope) * structure.volume / scale
            worst.see(off, f"dE/dV of {name}: stress {np.trace(stress) / 3:.6g}, dE/dV {slope:.6g} eV/Å³")
    return worst.judged("S4", claims.dtype)


def strained(structure: Structure, strain: FloatArray) -> Structure:
    """Cell and positions times (1 + ε)."""
    deformation = np.eye(3) + strain
    return replace(structure, positions=structure.positions @ deformation, cell=structure.cell @ deformation)


def _volume_slope(evaluate: Evaluate, structure: Structure, step: float, enough: float) -> float:
    volume = structure.volume
    assert volume is not None
    slope, _ = derivative(
        lambda s: evaluate(strained(structure, ((1 + s) ** (1 / 3) - 1) * np.eye(3))).energy, step, enough
    )
    return slope / volume


def _gap(structure: Structure, cutoff: float) -> float:
    """How far (Å) the nearest distance is from the cutoff, where second derivatives may jump."""
    _, vectors = neighbor_list(structure.positions, structure.cell, structure.pbc, cutoff + 2 * STEP)
    return float(np.abs(np.linalg.norm(vectors, axis=1) - cutoff).min(initial=np.inf))


def _energy(evaluate: Evaluate, structure: Structure, displacement: FloatArray) -> float:
    return evaluate(replace(structure, positions=structure.positions + displacement)).energy


def _sign(found: FloatArray, expected: FloatArray) -> str:
    return ": its sign is wrong" if np.abs(found + expected).max() < np.abs(found - expected).max() / 10 else ""
