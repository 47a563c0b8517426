"""S5, S6, S10: the same atoms described otherwise have the same energy and forces."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from mlff_engines.structure import FloatArray, IntArray, Result, Structure
from mlff_engines.validation.result import CheckResult, Claims, Evaluate, Worst
from mlff_engines.validation.static.systems import ALL, cluster, crystal, joined, taken


def check_symmetry(evaluate: Evaluate, claims: Claims, structures: Mapping[str, Structure]) -> CheckResult:
    """S5: rotation, inversion, permutation of the atoms, translation."""
    rng = np.random.default_rng(5)
    worst = Worst(claims.offers)
    for name, structure in structures.items():
        found = evaluate(structure)
        for label, operation in (("rotation", random_rotation(rng)), ("inversion", -np.eye(3))):
            turned = replace(structure, positions=structure.positions @ operation.T, cell=structure.cell @ operation.T)
            worst.compare(f"{label} of {name}", evaluate(turned), rotated(found, operation))
        order = rng.permutation(len(structure))
        worst.compare(f"permutation of {name}", evaluate(taken(structure, order)), permuted(found, order))
        shift = rng.uniform(-5, 5, 3)
        worst.compare(
            f"translation of {name}", evaluate(replace(structure, positions=structure.positions + shift)), found
        )
    return worst.judged("S5", claims.dtype)


def check_descriptions(evaluate: Evaluate, claims: Claims, structures: Mapping[str, Structure]) -> CheckResult:
    """S6: replicas, image shifts, a far origin, a dummy cell, a slab in vacuum, other lattice vectors, small cells."""
    rng = np.random.default_rng(6)
    worst = Worst(claims.offers)
    box, molecule = crystal(claims), cluster(claims)
    periodic = {"triclinic box": box} | {n: s for n, s in structures.items() if s.pbc.all() and len(s)}
    for name, structure in periodic.items():
        found, cell = evaluate(structure), structure.cell
        whole = rng.integers(-3, 4, (len(structure), 3)) @ cell
        worst.compare(
            f"image shifts in {name}", evaluate(replace(structure, positions=structure.positions + whole)), found
        )
        flipped = np.array([[1, 0, 0], [-1, 1, 0], [1, -1, 1]]) @ cell
        worst.compare(f"other lattice vectors of {name}", evaluate(replace(structure, cell=flipped)), found)
        left_handed = cell * np.array([[1], [1], [-1]])
        worst.compare(f"left-handed cell of {name}", evaluate(replace(structure, cell=left_handed)), found)
    for times in ((2, 1, 1), (1, 2, 3)):
        worst.compare(
            f"replicas {times}", evaluate(replicated(box, times)), repeated(evaluate(box), int(np.prod(times)))
        )
    # most neighbours of either atom are images of itself or of the other
    two = replace(taken(box, np.array([0, 1])), cell=1.8 * claims.spacing * box.cell / np.linalg.norm(box.cell[0]))
    worst.compare("a cell of two atoms", evaluate(replicated(two, (2, 2, 2))), repeated(evaluate(two), 8))

    worst.compare(
        "origin + 5000 Å", evaluate(replace(molecule, positions=molecule.positions + 5000)), evaluate(molecule)
    )
    for dummy in (np.eye(3), 1000 * np.eye(3), np.ones((3, 3))):
        worst.compare(
            f"dummy cell {dummy[0].tolist()} without pbc",
            evaluate(replace(molecule, cell=dummy)),
            evaluate(molecule),
        )
    slab = replace(box, pbc=np.array([True, True, False]))
    gap = 3 * claims.cutoff + np.ptp(box.positions @ np.linalg.inv(box.cell), axis=0)[2] * np.linalg.norm(box.cell[2])
    normal = np.cross(box.cell[0], box.cell[1])
    in_vacuum = replace(box, cell=np.vstack([box.cell[:2], gap * normal / np.linalg.norm(normal)]), pbc=ALL)
    worst.compare("slab, or a box with vacuum", evaluate(slab), evaluate(in_vacuum))
    return worst.judged("S6", claims.dtype)


def check_elements(evaluate: Evaluate, claims: Claims) -> CheckResult:
    """S10: atoms sorted by element either way, and structures with only some of the elements."""
    worst = Worst(claims.offers)
    mixed = cluster(claims, max(8, len(claims.elements)))
    found = evaluate(mixed)
    for label, order in (
        ("ascending", np.argsort(mixed.numbers, kind="stable")),
        ("descending", np.argsort(-mixed.numbers, kind="stable")),
    ):
        worst.compare(f"elements in {label} order", evaluate(taken(mixed, order)), permuted(found, order))
    far = np.array([4 * claims.layers * claims.cutoff, 0, 0])
    for first, second in itertools.pairwise(claims.numbers):
        one, other = cluster(claims, 3, 1, [first]), cluster(claims, 3, 2, [second])
        apart = joined(one, replace(other, positions=other.positions + far))
        worst.compare(
            f"elements {first} and {second}, or each alone",
            evaluate(apart),
            added(evaluate(one), evaluate(other)),
        )
    return worst.judged("S10", claims.dtype)


def random_rotation(rng: np.random.Generator) -> FloatArray:
    """A proper rotation, uniform over all: the Q of a normal matrix with R's diagonal positive (Mezzadri 2007)."""
    q, r = np.linalg.qr(rng.standard_normal((3, 3)))
    q = q * np.sign(np.diag(r))
    return np.asarray(q * np.sign(np.linalg.det(q)))


def replicated(structure: Structure, times: tuple[int, int, int]) -> Structure:
    """A supercell; the atoms of one image stay together."""
    shifts = np.array(list(itertools.product(*map(range, times)))) @ structure.cell
    return replace(
        structure,
        numbers=np.tile(structure.numbers, len(shifts)),
        positions=(shifts[:, None] + structure.positions).reshape(-1, 3),
        cell=structure.cell * np.array(times)[:, None],
    )


def repeated(result: Result, times: int) -> Result:
    """What `times` replicas of an evaluated structure have to give."""
    return Result(
        result.energy * times,
        np.tile(result.energies, times),
        np.tile(result.forces, (times, 1)),
        result.virial * times,
        energy_std=None if result.energy_std is None else result.energy_std * times,
        force_std=None if result.force_std is None else np.tile(result.force_std, times),
    )


def rotated(result: Result, operation: FloatArray) -> Result:
    """What the structure has to give after every vector r became `operation` r."""
    virial = operation @ result.virial @ operation.T
    return replace(result, forces=result.forces @ operation.T, virial=virial, stress=None)


def permuted(result: Result, order: IntArray) -> Result:
    """What the structure has to give with its atoms in this order."""
    spread = None if result.force_std is None else result.force_std[order]
    return replace(result, energies=result.energies[order], forces=result.forces[order], force_std=spread)


def added(first: Result, second: Result) -> Result:
    """What two structures have to give when they do not feel each other; spreads do not add up and are left out."""
    return Result(
        first.energy + second.energy,
        np.concatenate([first.energies, second.energies]),
        np.concatenate([first.forces, second.forces]),
        first.virial + second.virial,
    )
