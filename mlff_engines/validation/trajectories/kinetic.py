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
    replicas, frames = positions.shape[:2]
    root = np.sqrt(masses)[:, None]
    groups = {"all atoms": np.ones(len(numbers), dtype=bool)}
    groups |= {SYMBOLS[z]: numbers == z for z in np.unique(numbers).tolist()}
    if 0 < np.count_nonzero(numbers == 1) < len(numbers):
        groups |= {"hydrogen": numbers == 1, "heavy atoms": numbers != 1}
        groups.pop("H")
    names = [*groups, "translation", "rotation", "inner motion"]
    energy = {name: np.zeros((replicas, frames)) for name in names}
    freedom = {name: np.zeros((replicas, frames)) for name in names}
    for at in np.ndindex(replicas, frames):
        x = positions[at] - masses @ positions[at] / masses.sum()
        parts = [root * velocities[at], root * kicks[at]]  # their squares add: mean of v + kick and v - kick
        per_atom = 0.5 * np.square(parts).sum(axis=(0, 2)) / ACCELERATION
        basis = _constrained(x, masses, constraints)
        own = 3 - np.square(basis).sum(axis=1).reshape(len(masses), 3).sum(axis=1)
        for name, members in groups.items():
            energy[name][at], freedom[name][at] = per_atom[members].sum(), own[members].sum()
        rigid = _rigid(x, root)
        for name, motion in (("translation", rigid[:, :3]), ("rotation", rigid[:, 3:])):
            energy[name][at] = 0.5 * sum(float(np.square(motion.T @ p.ravel()).sum()) for p in parts) / ACCELERATION
            freedom[name][at] = motion.shape[1]
        for table in (energy, freedom):
            table["inner motion"][at] = table["all atoms"][at] - table["translation"][at] - table["rotation"][at]
    return energy, freedom


def _constrained(x: FloatArray, masses: FloatArray, pairs: IntArray) -> FloatArray:
    """Orthonormal mass-weighted directions (3N, C) that constraints forbid."""
    gradients = np.zeros((len(pairs), len(masses), 3))
    bonds = x[pairs[:, 0]] - x[pairs[:, 1]]
    rows = np.arange(len(pairs))
    gradients[rows, pairs[:, 0]], gradients[rows, pairs[:, 1]] = bonds, -bonds
    basis: FloatArray = np.linalg.qr((gradients / np.sqrt(masses)[:, None]).reshape(len(pairs), 3 * len(masses)).T)[0]
    return basis


def _rigid(x: FloatArray, root: FloatArray) -> FloatArray:
    """Orthonormal mass-weighted directions (3N, 5 or 6): three of translation, then rotation."""
    moves = [np.broadcast_to(axis, x.shape) for axis in np.eye(3)] + [np.cross(axis, x) for axis in np.eye(3)]
    u, sizes, _ = np.linalg.svd(np.stack([(root * move).ravel() for move in moves[3:]], axis=1), full_matrices=False)
    shifts = np.stack([(root * move).ravel() for move in moves[:3]], axis=1) / np.sqrt((root**2).sum())
    return np.concatenate([shifts, u[:, sizes > 1e-6 * sizes[0]]], axis=1)
