"""MMFF94 and MMFF94s as OpenMM forces, with atom types, charges and parameters from RDKit.

T. A. Halgren, J. Comput. Chem. 17, 490-641 (1996), parts I-V; MMFF94s: J. Comput. Chem. 20, 720 (1999). Typing and
parameters: P. Tosco, N. Stiefl, G. Landrum, J. Cheminform. 6, 37 (2014). Energies and forces equal RDKit's; a cutoff
there is none, and every pair of atoms is listed: this is for single molecules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from math import pi
from typing import Any

import openmm
from rdkit import Chem
from rdkit.Chem import rdForceFieldHelpers

from mlff_engines.errors import StructureError
from mlff_openmm.kstep.molecules import atom_name

KCAL = 4.184  # kJ
ANGSTROM = 0.1  # nm
DEGREE = pi / 180
# the constants of Halgren, in his units: mdyn Å and kcal/mol, Å, degrees
MDYNE = 143.9325 * KCAL  # kJ/mol in 1 mdyn Å
CUBIC_STRETCH = -2.0  # 1/Å
CUBIC_BEND = -0.4 * DEGREE  # 1/degree; -0.007 in part I, eq. 3
COULOMB = 332.0716 * KCAL * ANGSTROM  # kJ nm/mol/e²
BUFFER = 0.05 * ANGSTROM  # of the electrostatics
CHARGES_1_4 = 0.75
PAIRS = "MMFF van der Waals and electrostatics"  # name of the one force that is not bonded

# part I, eqs. 2-4, 6, 7; torsions eq. 8. Lengths in nm, angles in radians, force constants in kJ/mol per nm², rad², ...
STRETCH = f"k/2 * d^2 * (1 + c*d + 7/12*(c*d)^2); d = r - r0; c = {CUBIC_STRETCH / ANGSTROM!r}"
BEND = f"k/2 * d^2 * (1 + {CUBIC_BEND / DEGREE!r}*d); d = theta - theta0"
LINEAR_BEND = "k * (1 + cos(theta))"
# distance(), angle() and dihedral() would say the two below in a line each, at up to nine times the cost
STRETCH_BEND = """
(k12*(a - r12) + k32*(b - r32)) * (acos((ax*bx + ay*by + az*bz)/(a*b)) - theta0);
a = sqrt(ax^2 + ay^2 + az^2); ax = x1 - x2; ay = y1 - y2; az = z1 - z2;
b = sqrt(bx^2 + by^2 + bz^2); bx = x3 - x2; by = y3 - y2; bz = z3 - z2
"""
# Wilson's angle between each bond of p2 and the plane of the other two; the sine is volume / (area * length)
OUT_OF_PLANE = """
k/2 * (asin(volume/(ab*c))^2 + asin(volume/(bc*a))^2 + asin(volume/(ca*b))^2);
volume = abx*cx + aby*cy + abz*cz;
ab = sqrt(abx^2 + aby^2 + abz^2); abx = ay*bz - az*by; aby = az*bx - ax*bz; abz = ax*by - ay*bx;
bc = sqrt(bcx^2 + bcy^2 + bcz^2); bcx = by*cz - bz*cy; bcy = bz*cx - bx*cz; bcz = bx*cy - by*cx;
ca = sqrt(cax^2 + cay^2 + caz^2); cax = cy*az - cz*ay; cay = cz*ax - cx*az; caz = cx*ay - cy*ax;
a = sqrt(ax^2 + ay^2 + az^2); ax = x1 - x2; ay = y1 - y2; az = z1 - z2;
b = sqrt(bx^2 + by^2 + bz^2); bx = x3 - x2; by = y3 - y2; bz = z3 - z2;
c = sqrt(cx^2 + cy^2 + cz^2); cx = x4 - x2; cy = y4 - y2; cz = z4 - z2
"""
TORSION = "(v1*(1 + cos(theta)) + v2*(1 - cos(2*theta)) + v3*(1 + cos(3*theta))) / 2"
# buffered 14-7 and buffered Coulomb
PAIR = f"eps * (1.07/(x + 0.07))^7 * (1.12/(x^7 + 0.12) - 2) + qq/(r + {BUFFER!r}); x = r/rmin"


def mmff_forces(molecule: Chem.Mol, variant: str = "MMFF94") -> list[openmm.Force]:
    """The terms of the force field as OpenMM forces; their energies add up to RDKit's.

    Args:
        molecule: with all its hydrogens.
        variant: "MMFF94" or "MMFF94s".

    Raises:
        StructureError: atoms without a type or terms without parameters; the atoms are named.
    """
    return _Terms(molecule, variant).forces()


def mmff_charges(molecule: Chem.Mol) -> list[float]:
    """Partial charges (N,) in e; those of MMFF94 and MMFF94s are the same."""
    properties = _properties(molecule, "MMFF94")
    return [properties.GetMMFFPartialCharge(i) for i in range(molecule.GetNumAtoms())]


def bond_lengths(molecule: Chem.Mol) -> dict[tuple[int, int], float]:
    """Equilibrium length in nm of every bond (i, j): what a constraint keeps it at, and its energy zero."""
    terms = _Terms(molecule, "MMFF94")
    return {bond: terms.bond(*bond)[1] * ANGSTROM for bond in terms.bonds()}


class _Terms:
    """Which terms there are, and their parameters in Halgren's units."""

    def __init__(self, molecule: Chem.Mol, variant: str) -> None:
        self.molecule, self.properties = molecule, _properties(molecule, variant)

    def forces(self) -> list[openmm.Force]:
        return [
            self._stretches(),
            *self._bends(),
            self._stretch_bends(),
            self._out_of_planes(),
            self._torsions(),
            self._pairs(),
        ]

    def bonds(self) -> Iterator[tuple[int, int]]:
        for bond in self.molecule.GetBonds():
            yield bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()

    def bond(self, i: int, j: int) -> tuple[float, float]:
        """Force constant (mdyn/Å) and length (Å)."""
        _, constant, length = self._found(self.properties.GetMMFFBondStretchParams(self.molecule, i, j), "bond", i, j)
        return constant, length

    def _found(self, parameters: Any, term: str, *atoms: int) -> Any:
        if parameters is None:
            raise StructureError(
                f"MMFF94 has no parameters for the {term} {self._named(atoms)} of {Chem.MolToSmiles(self.molecule)}. "
                "Choose another force field, or leave the molecule out"
            )
        return parameters

    def _named(self, atoms: Sequence[int]) -> str:
        return "-".join(atom_name(self.molecule.GetAtomWithIdx(i)) for i in atoms)

    def _angles(self) -> Iterator[tuple[int, int, int, bool]]:
        """Every angle i-j-k, and whether its centre is linear."""
        for center in self.molecule.GetAtoms():
            j = center.GetIdx()
            linear = self.properties.GetMMFFAtomType(j) in LINEAR_TYPES
            for i, k in combinations(_neighbors(center), 2):
                yield i, j, k, linear

    def _stretches(self) -> openmm.Force:
        force = openmm.CustomBondForce(STRETCH)
        for name in ("k", "r0"):
            force.addPerBondParameter(name)
        for i, j in self.bonds():
            constant, length = self.bond(i, j)
            force.addBond(i, j, [constant * MDYNE / ANGSTROM**2, length * ANGSTROM])
        return _named(force, "MMFF bond stretching")

    def _bends(self) -> list[openmm.Force]:
        bent, straight = openmm.CustomAngleForce(BEND), openmm.CustomAngleForce(LINEAR_BEND)
        for name in ("k", "theta0"):
            bent.addPerAngleParameter(name)
        straight.addPerAngleParameter("k")
        for i, j, k, linear in self._angles():
            constant, angle = self._angle(i, j, k)
            if linear:
                straight.addAngle(i, j, k, [constant * MDYNE])
            else:
                bent.addAngle(i, j, k, [constant * MDYNE, angle * DEGREE])
        return [_named(bent, "MMFF angle bending"), _named(straight, "MMFF bending of linear angles")]

    def _angle(self, i: int, j: int, k: int) -> tuple[float, float]:
        found = self.properties.GetMMFFAngleBendParams(self.molecule, i, j, k)
        _, constant, angle = self._found(found, "angle", i, j, k)
        return constant, angle

    def _stretch_bends(self) -> openmm.Force:
        force = openmm.CustomCompoundBondForce(3, STRETCH_BEND)
        for name in ("k12", "k32", "r12", "r32", "theta0"):
            force.addPerBondParameter(name)
        for i, j, k, _ in self._angles():
            found = self.properties.GetMMFFStretchBendParams(self.molecule, i, j, k)
            if found is None:  # zero
                continue
            _, first, second = found
            lengths = [self.bond(i, j)[1] * ANGSTROM, self.bond(k, j)[1] * ANGSTROM]
            constants = [first * MDYNE / ANGSTROM, second * MDYNE / ANGSTROM]
            force.addBond([i, j, k], [*constants, *lengths, self._angle(i, j, k)[1] * DEGREE])
        return _named(force, "MMFF stretch-bending")

    def _out_of_planes(self) -> openmm.Force:
        force = openmm.CustomCompoundBondForce(4, OUT_OF_PLANE)
        force.addPerBondParameter("k")
        for center in self.molecule.GetAtoms():
            if center.GetDegree() != 3:
                continue
            j, (a, b, c) = center.GetIdx(), _neighbors(center)
            constant = self.properties.GetMMFFOopBendParams(self.molecule, a, j, b, c)
            if constant is None:  # zero
                continue
            force.addBond([a, j, b, c], [constant * MDYNE])
        return _named(force, "MMFF out-of-plane bending")

    def _torsions(self) -> openmm.Force:
        force = openmm.CustomTorsionForce(TORSION)
        for name in ("v1", "v2", "v3"):
            force.addPerTorsionParameter(name)
        for bond in self.molecule.GetBonds():
            ends = bond.GetBeginAtom(), bond.GetEndAtom()
            j, k = (end.GetIdx() for end in ends)
            for i in _neighbors(ends[0]):
                for last in _neighbors(ends[1]):
                    if i in (k, last) or last == j:  # the bond itself, or a ring of three
                        continue
                    found = self.properties.GetMMFFTorsionParams(self.molecule, i, j, k, last)
                    if found is not None:  # else zero
                        force.addTorsion(i, j, k, last, [barrier * KCAL for barrier in found[1:]])
        return _named(force, "MMFF torsions")

    def _pairs(self) -> openmm.Force:
        force = openmm.CustomBondForce(PAIR)
        for name in ("eps", "rmin", "qq"):
            force.addPerBondParameter(name)
        apart = Chem.GetDistanceMatrix(self.molecule)  # in bonds
        atoms = range(self.molecule.GetNumAtoms())
        charges = [self.properties.GetMMFFPartialCharge(i) for i in atoms]
        for i, j in combinations(atoms, 2):
            if apart[i, j] < 3:
                continue
            found = self.properties.GetMMFFVdWParams(i, j)
            _, _, rmin, eps = self._found(found, "van der Waals pair", i, j)
            scale = CHARGES_1_4 if apart[i, j] == 3 else 1.0
            force.addBond(i, j, [eps * KCAL, rmin * ANGSTROM, scale * COULOMB * charges[i] * charges[j]])
        return _named(force, PAIRS)


LINEAR_TYPES = frozenset({4, 53, 61})  # the property `linh` in MMFFPROP.PAR
# MMFFSYMB.PAR
TYPED_ELEMENTS = "H, Li, C, N, O, F, Na, Mg, Si, P, S, Cl, K, Ca, Fe, Cu, Zn, Br, I"


def _properties(molecule: Chem.Mol, variant: str) -> Any:
    properties = rdForceFieldHelpers.MMFFGetMoleculeProperties(molecule, mmffVariant=variant)
    if properties is None:
        strangers = [atom_name(a) for a in molecule.GetAtoms() if a.GetSymbol() not in TYPED_ELEMENTS.split(", ")]
        which = ", ".join(strangers) if strangers else f"at least one atom of {Chem.MolToSmiles(molecule)}"
        raise StructureError(
            f"{variant} has no atom type for {which}; it knows {TYPED_ELEMENTS} in their common "
            "valences. Choose another force field, or leave the molecule out"
        )
    return properties


def _neighbors(atom: Chem.Atom) -> list[int]:
    return [neighbor.GetIdx() for neighbor in atom.GetNeighbors()]


def _named(force: openmm.Force, name: str) -> openmm.Force:
    force.setName(name)
    return force
