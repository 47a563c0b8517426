"""Reference energies of free atoms (E0)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from ase import Atoms

from mlff_engines.errors import DataError
from mlff_engines.structure import SYMBOLS
from mlff_training.data.labels import DataWarning, results


@dataclass(frozen=True)
class E0Fit:
    """Reference energies of free atoms.

    | field    | unit | meaning                                                                          |
    |----------|------|----------------------------------------------------------------------------------|
    | `e0`     | eV   | symbol -> energy                                                                 |
    | `source` | -    | "given", "isolated" or "fit"                                                     |
    | `rank`   | -    | fits: independent compositions, at most the number of elements                   |
    | `note`   | -    | how they were obtained, for the training record                                  |
    """

    e0: dict[str, float]
    source: Literal["given", "isolated", "fit"]
    rank: int
    note: str


def fit_e0(frames: Sequence[Atoms], e0: Mapping[str, float] | Literal["fit", "isolated"] = "fit") -> E0Fit:
    """Reference energies: given, taken from one-atom frames, or fitted to total energies.

    The fit is least squares of E = Σ_X n_X·E0_X over all frames; where the compositions do not determine it, the
    solution of smallest norm. For one composition (one molecule) that is as good as any other: only the sum counts.

    Raises:
        DataError: an element without energy, or energies that are not finite (T7).

    Warns:
        DataWarning: several compositions that still do not determine E0 (water clusters: always two H per O), so that
            energies of other compositions would be arbitrary.
    """
    if not frames:
        raise DataError("no frames to take reference energies (E0) from")
    elements = sorted({int(z) for atoms in frames for z in atoms.numbers})
    symbols = [SYMBOLS[z] for z in elements]
    if not isinstance(e0, str):
        return _given_e0(e0, symbols)
    if e0 == "isolated":
        return _isolated_e0(frames, symbols)
    labelled = [atoms for atoms in frames if "energy" in results(atoms)]
    counts = np.array([[(atoms.numbers == z).sum() for z in elements] for atoms in labelled], dtype=np.float64)
    energies = np.array([results(atoms)["energy"] for atoms in labelled], dtype=np.float64)
    counts = counts.reshape(len(labelled), len(elements))
    missing = [symbol for symbol, total in zip(symbols, counts.sum(axis=0), strict=True) if total == 0]
    if missing:
        raise DataError(
            f"E0 fit: no frame with an energy contains {', '.join(missing)}; label some or give e0 for them"
        )
    bad = np.flatnonzero(~np.isfinite(energies))
    if len(bad):
        raise DataError(f"E0 fit: {len(bad)} of {len(energies)} energies are not finite; remove those frames")
    # frames of one composition weigh as much as they are many, but are one row for the rank
    solution, _, rank, _ = np.linalg.lstsq(counts, energies, rcond=1e-10)
    compositions = len(np.unique(counts, axis=0))
    note = f"least squares over {len(energies)} frames of {compositions} composition(s)"
    if rank < len(elements):
        note += f", rank {rank} for {len(elements)} elements: smallest-norm solution"
        if compositions > 1:
            warnings.warn(
                f"the {compositions} compositions of the data do not determine E0 of {', '.join(symbols)} (rank {rank} "
                f"of {len(elements)}): energies of other compositions will be arbitrary. Give e0 or add isolated atoms",
                DataWarning,
                stacklevel=2,
            )
    return E0Fit(dict(zip(symbols, map(float, solution), strict=True)), "fit", int(rank), note)


def _given_e0(e0: Mapping[str, float], symbols: Sequence[str]) -> E0Fit:
    missing = [symbol for symbol in symbols if symbol not in e0]
    unknown = [symbol for symbol in e0 if symbol not in SYMBOLS[1:]]
    if missing or unknown:
        raise DataError(
            f"e0 lacks {', '.join(missing)}; give an energy in eV for each of {', '.join(symbols)}"
            if missing
            else f"e0 names {', '.join(unknown)}, no element symbol"
        )
    if not np.isfinite(list(e0.values())).all():
        raise DataError(f"e0 holds numbers that are not finite: {dict(e0)}")
    return E0Fit({symbol: float(energy) for symbol, energy in e0.items()}, "given", len(symbols), "given explicitly")


def _isolated_e0(frames: Sequence[Atoms], symbols: Sequence[str]) -> E0Fit:
    found: dict[str, float] = {}
    for number, atoms in enumerate(frames):
        if len(atoms) != 1 or "energy" not in results(atoms) or float(atoms.info.get("charge", 0.0)) != 0:
            continue
        symbol, energy = atoms.get_chemical_symbols()[0], float(results(atoms)["energy"])
        if abs(found.setdefault(symbol, energy) - energy) > 1e-3:
            raise DataError(
                f"e0 from isolated atoms: {symbol} has energies {found[symbol]:.6f} and {energy:.6f} eV "
                f"(frame {number}); keep one, the ground state"
            )
    missing = [symbol for symbol in symbols if symbol not in found]
    if missing:
        raise DataError(
            f"e0 from isolated atoms: no neutral one-atom frame of {', '.join(missing)} "
            f"(found: {', '.join(sorted(found)) or 'none'}); add them, give e0, or use e0: fit"
        )
    bad = [symbol for symbol, energy in found.items() if not np.isfinite(energy)]
    if bad:
        raise DataError(f"e0 from isolated atoms: the energy of {', '.join(bad)} is not finite")
    return E0Fit({symbol: found[symbol] for symbol in symbols}, "isolated", len(symbols), "energies of isolated atoms")
