"""Kinetic energies of groups of atoms and of motions, where bonds are rigid and steps are large."""

from __future__ import annotations

import numpy as np

from mlff_engines.structure import SYMBOLS, FloatArray, IntArray
from mlff_engines.units import ACCELERATION


def kinetic_energies(
    numbers: IntArray,
    masses: FloatArray,
    constraints: IntArray,
    positions: FloatArray,
    velocities: FloatArray,
    kicks: FloatArray,
) -> tuple[dict[str, FloatArray], dict[str, FloatArray]]:
    """Kinetic energies (R, T) in eV at half steps, and degrees of freedom (R, T), by group of atoms or motion.

    The mean of those of `velocities` + `kicks` and of `velocities` - `kicks`: half-step velocities have the temperature
    of the positions, on-step ones of velocity Verlet are colder by (ωh)²/4 in a mode of frequency ω (Leimkuhler,
    Matthews, Appl. Math. Res. eXpress 2013, 34).

    Constraints take degrees of freedom from the atoms as their mass-weighted projection does: at equilibrium atom i has
    kT/2 times the trace of its block of 1 - Q Qᵀ, with Q an orthonormal basis of M^-1/2 ∇(constraints).

    Args:
        numbers, masses: (N,), amu.
        constraints: (C, 2) atoms whose distance is fixed.
        positions, velocities, kicks: (R, T, N, 3) Å and Å/fs; a kick is what half a time step adds.
    """
    root = np.sqrt(masses)[:, None]
    groups = {"all atoms": np.ones(len(numbers), dtype=bool)}
    groups |= {SYMBOLS[z]: numbers == z for z in np.unique(numbers).tolist()}
    if 0 < np.count_nonzero(numbers == 1) < len(numbers):
        groups |= {"hydrogen": numbers == 1, "heavy atoms": numbers != 1}
        groups.pop("H")
    x = positions - (masses @ positions / masses.sum())[..., None, :]
    parts = root * np.stack([velocities, kicks])  # their squares add: mean of v + kick and v - kick
    per_atom = 0.5 * np.square(parts).sum(axis=(0, -1)) / ACCELERATION
    own = 3 - np.square(_constrained(x, masses, constraints)).sum(axis=(-2, -1))
    energy = {name: per_atom[..., members].sum(axis=-1) for name, members in groups.items()}
    freedom = {name: own[..., members].sum(axis=-1) for name, members in groups.items()}
    for name, motions in (("translation", _shifts(x, root)), ("rotation", _rotations(x, root))):
        along = np.einsum("...rid,p...id->p...r", motions, parts)
        energy[name] = 0.5 * np.square(along).sum(axis=(0, -1)) / ACCELERATION
        freedom[name] = np.square(motions).sum(axis=(-3, -2, -1))
    for table in (energy, freedom):
        table["inner motion"] = table["all atoms"] - table["translation"] - table["rotation"]
    return energy, freedom


def _constrained(x: FloatArray, masses: FloatArray, pairs: IntArray) -> FloatArray:
    """Orthonormal mass-weighted directions (..., N, 3, C) that constraints forbid, at x (..., N, 3)."""
    gradients = np.zeros((*x.shape, len(pairs)))
    bonds = x[..., pairs[:, 0], :] - x[..., pairs[:, 1], :]
    rows = np.arange(len(pairs))
    gradients[..., pairs[:, 0], :, rows] = np.moveaxis(bonds, -2, 0)
    gradients[..., pairs[:, 1], :, rows] = -np.moveaxis(bonds, -2, 0)
    gradients /= np.sqrt(masses)[:, None, None]
    basis = np.linalg.qr(gradients.reshape(*x.shape[:-2], 3 * len(masses), len(pairs)))[0]
    return basis.reshape(gradients.shape)


def _shifts(x: FloatArray, root: FloatArray) -> FloatArray:
    """Orthonormal mass-weighted directions of translation, (..., 3, N, 3)."""
    moves = np.eye(3)[:, None, :] * root / np.sqrt((root**2).sum())
    return np.broadcast_to(moves, (*x.shape[:-2], *moves.shape))


def _rotations(x: FloatArray, root: FloatArray) -> FloatArray:
    """Likewise of rotation, about the centre of mass at the origin; a straight molecule has a zero among them."""
    moves = root * np.cross(np.eye(3)[:, None, :], x[..., None, :, :])  # (..., 3, N, 3)
    _, sizes, found = np.linalg.svd(moves.reshape(*x.shape[:-2], 3, -1), full_matrices=False)
    found *= (sizes > 1e-6 * sizes[..., :1])[..., None]
    return found.reshape(moves.shape)
