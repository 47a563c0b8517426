"""The bonds that a run constrains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from ase import Atoms
from ase.constraints import FixBondLengths
from ase.neighborlist import natural_cutoffs, neighbor_list

from mlff_engines.errors import ConfigError, StructureError
from mlff_engines.kstep.constraints import BondConstraints

STRETCHED = 1.25  # times the sum of covalent radii: further apart there is no bond
Constraints = Literal["none", "hbonds"] | Sequence[Sequence[int]] | None


def hydrogen_bonds(atoms: Atoms) -> list[list[int]]:
    """For each hydrogen the pair with its nearest neighbour, if that is within reach of their covalent radii.

    (Cordero et al., Dalton Trans. 2832 (2008).)

    Raises:
        StructureError: a hydrogen with no atom near enough.
    """
    i, j, distance = neighbor_list("ijd", atoms, natural_cutoffs(atoms, mult=STRETCHED))
    pairs = set()
    for hydrogen in np.flatnonzero(atoms.numbers == 1).tolist():
        near = np.flatnonzero(i == hydrogen)
        if not len(near):
            raise StructureError(
                f"hydrogen {hydrogen} is bonded to no atom: none within {STRETCHED:g} times the covalent radii. "
                "Mend the structure, or name the pairs to constrain"
            )
        other = int(j[near[np.argmin(distance[near])]])
        pairs.add((min(hydrogen, other), max(hydrogen, other)))
    return [list(pair) for pair in sorted(pairs)]


def constrain(atoms: Atoms, constraints: Constraints) -> tuple[BondConstraints | None, str]:
    """The constraints of `atoms` and what they are called: "none", "hbonds" or "bonds".

    They are left on `atoms` as ASE's `FixBondLengths`, so that its temperature counts degrees of freedom rightly.

    Args:
        constraints: "hbonds", "none", or pairs of atoms, at their present lengths; None takes those that `atoms` have.

    Raises:
        ConfigError: constraints of another kind on `atoms`.
        SimulationError: `atoms` do not have the lengths that their constraints want.
    """
    present = [c for c in atoms.constraints if isinstance(c, FixBondLengths)]
    others = [type(c).__name__ for c in atoms.constraints if not isinstance(c, FixBondLengths)]
    if others or (present and constraints is not None):
        raise ConfigError(
            f"the atoms have constraints of the kind {', '.join(others) or 'FixBondLengths'}; allowed: FixBondLengths "
            "on the atoms, or the argument constraints, not both"
        )
    pairs: list[list[int]] = []
    lengths: list[float] = []
    if isinstance(constraints, str) and constraints not in ("none", "hbonds"):
        raise ConfigError(f"constraints={constraints!r}; allowed: 'none', 'hbonds', or a list of pairs of atoms")
    if constraints is None:
        for c in present:
            wanted = c.initialize_bond_lengths(atoms) if c.bondlengths is None else c.bondlengths
            pairs += c.pairs.tolist()
            lengths += np.asarray(wanted).tolist()
    elif constraints != "none":
        pairs = hydrogen_bonds(atoms) if constraints == "hbonds" else [list(pair) for pair in constraints]
        lengths = [float(atoms.get_distance(i, j, mic=True)) for i, j in pairs]
    if not pairs:
        return None, "none"
    vectors = np.array([atoms.get_distance(i, j, mic=True, vector=True) for i, j in pairs])
    index = np.array(pairs)
    shifts = vectors - (atoms.positions[index[:, 1]] - atoms.positions[index[:, 0]])
    bonds = BondConstraints(index, lengths, atoms.get_masses(), shifts)
    bonds.require_met(atoms.positions)
    atoms.set_constraint(FixBondLengths(index, bondlengths=np.array(lengths)))
    return bonds, "hbonds" if constraints == "hbonds" or _are_hydrogen_bonds(atoms, pairs) else "bonds"


def _are_hydrogen_bonds(atoms: Atoms, pairs: Sequence[Sequence[int]]) -> bool:
    try:
        return sorted(map(sorted, pairs)) == hydrogen_bonds(atoms)
    except StructureError:  # a hydrogen bonded to no atom
        return False
