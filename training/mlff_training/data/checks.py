"""Checks of labelled data before any compute is spent on them.

`check_splits` and `fit_e0` find the faults that only show between sets and in the fit of reference energies.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from ase import Atoms
from ase.data import covalent_radii

from mlff_engines.errors import DataError
from mlff_engines.neighbors import neighbor_list
from mlff_engines.structure import SYMBOLS, FloatArray, IntArray
from mlff_engines.units import BOHR, HARTREE, KCAL_PER_MOL, KJ_PER_MOL
from mlff_training.data.labels import DataWarning, results

# how wrong energies come out when numbers in this unit are taken for eV
ENERGY_FACTORS = {"Hartree": 1 / HARTREE, "kcal/mol": 1 / KCAL_PER_MOL, "kJ/mol": 1 / KJ_PER_MOL, "meV": 1e3}
FORCE_FACTORS = {
    "Hartree/Bohr": BOHR / HARTREE,
    "Hartree/Angstrom": 1 / HARTREE,
    "kcal/mol/Angstrom": 1 / KCAL_PER_MOL,
    "kJ/mol/Angstrom": 1 / KJ_PER_MOL,
    "meV/Angstrom": 1e3,
}
LENGTH_FACTORS = {"Bohr": 1 / BOHR, "nm": 0.1}

COINCIDENT = 0.05  # Å
SEARCH = (4.0, 15.0)  # Å within which the nearest atom is looked for, at first and when there is none
# shortest distance of a frame over the sum of covalent radii: bonds are near 1, also in metals and salts
BOND_RATIO = (0.62, 1.6)
# rms force component, eV/Å: 300 K gives about 1, 3000 K about 4, atoms shaken by 0.2 Å about 6
LARGE_FORCE = 12.0
# force constant of bonds from H to a non-metal, eV/Å²: Si-H 17 ... F-H 60
BOND_STIFFNESS = (8.0, 150.0)
NON_METALS = np.isin(np.arange(len(SYMBOLS)), [5, 6, 7, 8, 9, 14, 15, 16, 17])
NOBLE_GASES = (2, 10, 18, 36, 54, 86)


@dataclass(frozen=True)
class Report:
    """What `check_frames` measured.

    | field         | unit  | meaning                                                             |
    |---------------|-------|---------------------------------------------------------------------|
    | `frames`      | -     | number of frames                                                    |
    | `force_rms`   | eV/Å  | rms force component over all frames, None without forces            |
    | `min_distance`| Å     | shortest distance of two atoms within 15 Å in any frame, else None  |
    | `bond_ratio`  | -     | median over frames of the shortest distance / covalent radii        |
    | `stiffness`   | eV/Å² | force constant of the bonds of H to non-metals, None if not seen    |
    """

    frames: int
    force_rms: float | None
    min_distance: float | None
    bond_ratio: float | None
    stiffness: float | None


def check_frames(frames: Sequence[Atoms], source: str, *, trust_units: bool = False) -> Report:
    """Check one set of labelled structures.

    Args:
        frames: see `mlff_training.data.labels`.
        source: what to call the set in messages.
        trust_units: skip the judgement of units (T3), for data that are strange on purpose.

    Raises:
        DataError: for an empty set or frame, NaN or infinite numbers (T4), coincident atoms, or numbers that look as
            if they were in other units (T3); the message names the frame and, for units, the likely one.
    """
    if not frames:
        raise DataError(f"{source} holds no frames; expected at least one")
    for number, atoms in enumerate(frames):
        _check_finite(atoms, f"{source}, frame {number}")
    shortest = [_shortest(atoms) for atoms in frames]
    if not trust_units:
        _check_lengths(frames, [ratio for _, ratio, _ in shortest], source)
    for number, (distance, _, (i, j)) in enumerate(shortest):
        if distance < COINCIDENT:
            symbols = frames[number].get_chemical_symbols()
            raise DataError(
                f"{source}, frame {number}: atoms {i} ({symbols[i]}) and {j} ({symbols[j]}) coincide, "
                f"{distance:.4f} Å apart; remove the frame or the doubled atom"
            )
    if not trust_units:
        _check_energies(frames, source)
        _check_forces(frames, source)
        _check_energy_spread(frames, source)
    rms = _force_rms(frames)
    known = rms[np.isfinite(rms)]
    bonds = _bond_stiffness(frames)
    distances = [d for d, _, _ in shortest if np.isfinite(d)]
    ratios = [ratio for _, ratio, _ in shortest if np.isfinite(ratio)]
    return Report(
        frames=len(frames),
        force_rms=float(np.sqrt((known**2).mean())) if len(known) else None,
        min_distance=min(distances) if distances else None,
        bond_ratio=float(np.median(ratios)) if ratios else None,
        stiffness=bonds[0] if bonds else None,
    )


def _check_finite(atoms: Atoms, where: str) -> None:
    if not len(atoms):
        raise DataError(f"{where} has no atoms; remove it")
    numbers = {"position": atoms.positions, "cell": np.asarray(atoms.cell), **results(atoms)}
    if "hessian_row" in atoms.arrays:
        numbers["hessian_row"] = atoms.arrays["hessian_row"]
    for name, value in numbers.items():
        bad = ~np.isfinite(np.asarray(value, dtype=np.float64))
        if bad.any():
            what = f"atom {np.argwhere(bad)[0][0]}" if bad.ndim and len(bad) == len(atoms) else f"{value}"
            raise DataError(
                f"{where}: {name} is not finite ({what}; {bad.sum()} such numbers). "
                "The calculation probably failed: remove the frame or label it again"
            )


def _shortest(atoms: Atoms) -> tuple[float, float, tuple[int, int]]:
    """Shortest distance (Å), smallest distance over covalent radii, and the closest pair; inf without neighbours."""
    for reach in SEARCH:
        (i, j), vec = neighbor_list(atoms.positions, np.asarray(atoms.cell), atoms.pbc, reach)
        if len(vec):
            break
    else:
        return np.inf, np.inf, (0, 0)
    distance = np.sqrt((vec**2).sum(axis=1))
    radii = covalent_radii[atoms.numbers]
    k = int(distance.argmin())
    return float(distance[k]), float((distance / (radii[i] + radii[j])).min()), (int(i[k]), int(j[k]))


def _check_lengths(frames: Sequence[Atoms], ratios: Sequence[float], source: str) -> None:
    judged = [
        (number, ratio)
        for number, (atoms, ratio) in enumerate(zip(frames, ratios, strict=True))
        if COINCIDENT < ratio < np.inf and not np.isin(atoms.numbers, NOBLE_GASES).all()
    ]
    if not judged:
        return
    indices, values = np.array([n for n, _ in judged]), np.array([r for _, r in judged])
    typical = float(np.median(values))
    low, high = BOND_RATIO
    if not low < typical < high:
        unit = _nearest(typical, LENGTH_FACTORS | {"Angstrom taken for Bohr": BOHR, "Angstrom taken for nm": 10.0})
        raise DataError(
            f"{source}: the shortest distances are {typical:.2f} times the sum of covalent radii (expected about 1); "
            f"the lengths are probably {_phrase(unit, 'length_unit')}"
        )
    # one frame among many; two atoms alone may be at any distance
    large = np.array([len(frames[n]) > 2 for n in indices])
    for unit, factor in (LENGTH_FACTORS | {"Angstrom taken for Bohr": BOHR, "Angstrom taken for nm": 10.0}).items():
        odd = indices[large & (np.abs(np.log(values / typical / factor)) < 0.1)]
        if len(odd):
            raise DataError(
                f"{source}, frame {odd[0]} ({len(odd)} such frames): distances are {factor:.3g} times those of the "
                f"other frames; the lengths are probably {_phrase(unit, 'length_unit')} there. {_TRUST}"
            )


_TRUST = "If the numbers are right, say so with trust_units"


def _phrase(unit: str, argument: str) -> str:
    return unit if " " in unit else f"in {unit}: read with {argument}={unit!r}"


def _nearest(value: float, factors: Mapping[str, float]) -> str:
    """The unit whose factor is nearest to `value` on a logarithmic scale."""
    return min(factors, key=lambda unit: abs(np.log(value / factors[unit])))


def _check_energies(frames: Sequence[Atoms], source: str) -> None:
    """Frames of one composition whose energy is off by a factor between units."""
    by_formula: dict[str, list[int]] = {}
    for number, atoms in enumerate(frames):
        if "energy" in results(atoms):
            by_formula.setdefault(atoms.get_chemical_formula(), []).append(number)
    for indices in by_formula.values():
        energies = np.array([results(frames[n])["energy"] for n in indices])
        typical = float(np.median(energies))
        spread = float(np.median(np.abs(energies - typical)))
        if len(energies) < 3 or abs(typical) < 20 * spread:
            continue  # relative energies, or a scan: a ratio means nothing
        ratios = energies / typical
        factors = {**ENERGY_FACTORS, **{f"eV taken for {unit}": 1 / f for unit, f in ENERGY_FACTORS.items()}}
        for unit, factor in factors.items():
            odd = np.flatnonzero((ratios > 0) & (np.abs(np.log(np.abs(ratios / factor) + 1e-300)) < 0.08))
            if len(odd):
                frame = indices[odd[0]]
                raise DataError(
                    f"{source}, frame {frame} ({len(odd)} such frames): the energy {energies[odd[0]]:.6g} eV is "
                    f"{ratios[odd[0]]:.4g} times that of its like ({typical:.6g} eV); it is probably "
                    f"{unit if ' ' in unit else f'in {unit}'}. Convert these frames to eV. {_TRUST}"
                )


def _check_energy_spread(frames: Sequence[Atoms], source: str) -> None:
    """Energies against forces: at the temperature that bonds to H show, n modes spread the energy by kT·sqrt(n/2)."""
    by_formula: dict[str, list[Atoms]] = {}
    for atoms in frames:
        if {"energy", "forces"} <= set(results(atoms)):
            by_formula.setdefault(atoms.get_chemical_formula(), []).append(atoms)
    for formula, alike in by_formula.items():
        bonds = _bond_stiffness(alike) if len(alike) >= 20 else None
        if bonds is None:
            continue
        expected = bonds[1] * np.sqrt(max(3 * len(alike[0]) - 6, 1) / 2)
        ratio = float(np.std([results(atoms)["energy"] for atoms in alike])) / expected
        if 0.1 < ratio < 15:
            continue
        unit = _nearest(ratio, ENERGY_FACTORS)
        message = (
            f"{source}, {formula}: energies spread {ratio:.3g} times as much as forces and distances suggest "
            f"({expected:.3g} eV); "
        )
        if ratio < 1:
            raise DataError(f"{message}energies are probably in {unit} and forces in eV/Å: convert one. {_TRUST}")
        warnings.warn(f"{message}different isomers, or energies in {unit}", DataWarning, stacklevel=3)


def _force_rms(frames: Sequence[Atoms]) -> FloatArray:
    """Rms force component per frame, eV/Å; NaN without forces or for a single atom."""
    forces = [results(atoms).get("forces") for atoms in frames]
    return np.array([np.sqrt((f**2).mean()) if f is not None and len(f) > 1 else np.nan for f in forces])


def _check_forces(frames: Sequence[Atoms], source: str) -> None:
    rms = _force_rms(frames)
    judged = np.flatnonzero(rms > 0)
    if not len(judged):
        return
    for indices in _clusters(rms, judged):
        part = [frames[n] for n in indices]
        typical = float(np.median(rms[indices]))
        bonds = _bond_stiffness(part)
        stiffness = bonds[0] if bonds else None
        where = (
            source if len(indices) == len(judged) else f"{source}, frame {min(indices)} ({len(indices)} such frames)"
        )
        if stiffness is not None and not BOND_STIFFNESS[0] < stiffness < BOND_STIFFNESS[1]:
            unit = _nearest(stiffness / 33, FORCE_FACTORS)
            measured = f"bonds to H have a force constant of {stiffness:.3g} eV/Å² (expected 15 to 60)"
        elif stiffness is None and typical > LARGE_FORCE:
            unit = _nearest(typical / 1.2, {u: f for u, f in FORCE_FACTORS.items() if f > 1})
            measured = f"the rms force is {typical:.3g} eV/Å (expected 0.01 to {LARGE_FORCE:g})"
        else:
            continue
        energy = unit.rsplit("/", 1)[0]
        raise DataError(
            f"{where}: {measured}; the forces are probably in {unit} (off by {FORCE_FACTORS[unit]:.4g}): "
            f"read with energy_unit={energy!r}"
            + (", length_unit='Bohr'" if unit.endswith("Bohr") else "")
            + f", or convert the forces alone. {_TRUST}"
        )


def _clusters(rms: FloatArray, judged: IntArray) -> Iterator[list[int]]:
    """Frames whose rms forces lie together: split at gaps wider than a factor of 5."""
    order = judged[np.argsort(rms[judged])]
    gaps = np.flatnonzero(np.diff(np.log(rms[order])) > np.log(5)) + 1
    for part in np.split(order, gaps):
        yield part.tolist()


def _bond_stiffness(frames: Sequence[Atoms]) -> tuple[float, float] | None:
    """Force constant k (eV/Å²) of bonds X-H and the kT (eV) they move with.

    For a harmonic bond of length r and force f on H along it, k = -cov(f, r)/var(r) and kT = sqrt(var(f)·var(r)).
    None when fewer than 10 bonds are seen, they do not vary, or the force does not follow the length.
    """
    lengths: dict[int, list[float]] = {}
    forces: dict[int, list[float]] = {}
    for atoms in frames:
        force = results(atoms).get("forces")
        if force is None or not (atoms.numbers == 1).any():
            continue
        (i, j), vec = neighbor_list(atoms.positions, np.asarray(atoms.cell), atoms.pbc, 2.0)
        distance = np.sqrt((vec**2).sum(axis=1))
        bonded = distance < 1.3 * (covalent_radii[atoms.numbers[i]] + covalent_radii[1])
        bonded &= (atoms.numbers[j] == 1) & NON_METALS[atoms.numbers[i]]
        for edge in np.flatnonzero(bonded):
            kind = int(atoms.numbers[i[edge]])
            lengths.setdefault(kind, []).append(float(distance[edge]))
            forces.setdefault(kind, []).append(float(force[j[edge]] @ vec[edge] / distance[edge]))
    covariance = variance = force_variance = count = 0.0
    for kind in lengths:  # each kind about its own mean
        r, f = np.array(lengths[kind]), np.array(forces[kind])
        covariance += float(((r - r.mean()) * (f - f.mean())).sum())
        variance += float(((r - r.mean()) ** 2).sum())
        force_variance += float(((f - f.mean()) ** 2).sum())
        count += len(r)
    if count < 10 or variance < count * 0.003**2 or force_variance == 0:
        return None
    if -covariance < 0.6 * np.sqrt(variance * force_variance):
        return None
    return -covariance / variance, float(np.sqrt(variance * force_variance)) / count
