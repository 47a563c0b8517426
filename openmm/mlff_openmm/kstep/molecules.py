"""Molecules: from lines of SMILES to conformers that OpenMM can start from."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from openmm import app, unit
from rdkit import Chem, rdBase
from rdkit.Chem import rdDistGeom, rdForceFieldHelpers

from mlff_engines.errors import ConfigError, StructureError
from mlff_engines.structure import FloatArray

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+-]*")
MINIMISER_STEPS = 5000


@dataclass(frozen=True)
class Entry:
    """One line of a molecule file: a name, and SMILES or the path of a PDB file."""

    name: str
    source: str
    line: str  # where, for errors


@dataclass(frozen=True)
class Molecule:
    """A molecule with all its hydrogens and one conformer.

    Attributes:
        positions: (N, 3) nm.
        rdkit: None where it was read from a PDB file.
    """

    name: str
    topology: app.Topology
    positions: FloatArray
    rdkit: Chem.Mol | None = None


def read_entries(file: Path) -> list[Entry]:
    """The molecules of a file: `SMILES name` or `FILE.pdb name` on each line; `#` starts a comment line.

    PDB files, for peptides, are looked for beside the file.

    Raises:
        ConfigError: no such file, no molecules, a line without a name, a name given twice or unfit for a file.
    """
    try:
        lines = file.read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read the molecules {file}: {error.strerror}") from None
    entries: dict[str, Entry] = {}
    for number, line in enumerate(lines, 1):
        words, where = line.split(), f"{file}:{number}"
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2 or not NAME.fullmatch(words[1]):
            raise ConfigError(f"{where}: {line!r}; wanted: SMILES and a name of letters, digits, _, + and -")
        source, name = words
        if name in entries:
            raise ConfigError(f"{where}: the name {name!r} is already that of {entries[name].line}; give it another")
        entries[name] = Entry(name, str(file.parent / source) if source.endswith(".pdb") else source, where)
    if not entries:
        raise ConfigError(f"{file} names no molecules; wanted: a line `SMILES name` for each")
    return list(entries.values())


def build(entry: Entry, seed: int) -> Molecule:
    """Parse, add hydrogens, embed and minimise; a PDB file is taken as it is.

    ETKDGv3 (Riniker, Landrum, J. Chem. Inf. Model. 55, 2562 (2015)), then MMFF94 where it has parameters.

    Raises:
        StructureError: SMILES that mean no molecule or several, no conformer found, a PDB file that cannot be read.
    """
    if entry.source.endswith(".pdb"):
        return _read_pdb(entry)
    molecule = _parse(entry)
    _embed(entry, molecule, seed)
    if rdForceFieldHelpers.MMFFHasAllMoleculeParams(molecule):
        rdForceFieldHelpers.MMFFOptimizeMolecule(molecule, maxIters=MINIMISER_STEPS)
    _name_atoms(molecule)
    positions = np.array(molecule.GetConformer().GetPositions()) * unit.angstrom
    return Molecule(entry.name, topology_of(molecule), positions.value_in_unit(unit.nanometer), molecule)


def topology_of(molecule: Chem.Mol) -> app.Topology:
    """One residue "MOL" with the names, elements and bonds of `molecule`."""
    topology = app.Topology()
    residue = topology.addResidue("MOL", topology.addChain())
    atoms = [
        topology.addAtom(atom_name(atom), app.Element.getByAtomicNumber(atom.GetAtomicNum()), residue)
        for atom in molecule.GetAtoms()
    ]
    for bond in molecule.GetBonds():
        topology.addBond(atoms[bond.GetBeginAtomIdx()], atoms[bond.GetEndAtomIdx()])
    return topology


def atom_name(atom: Chem.Atom) -> str:
    """As in the PDB file: C1, C2, O1, ...; before names are given, symbol and index."""
    return atom.GetProp("name") if atom.HasProp("name") else f"{atom.GetSymbol()}{atom.GetIdx()}"


def _parse(entry: Entry) -> Chem.Mol:
    with rdBase.BlockLogs():
        molecule = Chem.MolFromSmiles(entry.source)
        if molecule is None:
            raw = Chem.MolFromSmiles(entry.source, sanitize=False)
            problems = [] if raw is None else [p.Message() for p in Chem.DetectChemistryProblems(raw)]
            raise StructureError(
                f"{entry.line}: {entry.source!r} ({entry.name}) is no valid SMILES: "
                f"{'; '.join(problems) or 'a syntax error'}. Correct it, or leave the molecule out"
            )
    fragments = len(Chem.GetMolFrags(molecule))
    if fragments != 1:
        raise StructureError(f"{entry.line}: {entry.source!r} ({entry.name}) is {fragments} molecules; allowed: one")
    return Chem.AddHs(molecule)


def _embed(entry: Entry, molecule: Chem.Mol, seed: int) -> None:
    parameters: Any = rdDistGeom.ETKDGv3()
    parameters.randomSeed = seed
    for random in (False, True):
        parameters.useRandomCoords = random
        with rdBase.BlockLogs():
            if rdDistGeom.EmbedMolecule(molecule, parameters) == 0:
                return
    raise StructureError(
        f"{entry.line}: no conformer of {entry.source!r} ({entry.name}) was found, from a distance geometry or random "
        "start: its stereocentres or rings may be impossible. Correct it, try another seed, or leave the molecule out"
    )


def _name_atoms(molecule: Chem.Mol) -> None:
    count: Counter[str] = Counter()
    for atom in molecule.GetAtoms():
        count[atom.GetSymbol()] += 1
        atom.SetProp("name", f"{atom.GetSymbol()}{count[atom.GetSymbol()]}")


def _read_pdb(entry: Entry) -> Molecule:
    try:
        pdb = app.PDBFile(entry.source)
    except (OSError, ValueError) as error:
        raise StructureError(f"{entry.line}: cannot read {entry.source} ({entry.name}): {error}") from None
    positions = pdb.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
    return Molecule(entry.name, pdb.topology, positions)
