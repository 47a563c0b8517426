"""Stage 1: from a file of molecules to a PDB file and an OpenMM System of each."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openmm
import rdkit
from openmm import app, unit

from mlff_engines.errors import ConfigError, DataError
from mlff_engines.files import replacing, sha256_of
from mlff_openmm.kstep.config import MDConfig, SystemConfig
from mlff_openmm.kstep.forcefields import make_system
from mlff_openmm.kstep.molecules import Entry, build, read_entries


@dataclass(frozen=True)
class Prepared:
    """A molecule on disk.

    Attributes:
        record: where it came from, settings, versions, and hashes of the other two files.
    """

    name: str
    pdb: Path
    system: Path
    record: dict[str, Any]

    @classmethod
    def at(cls, folder: Path, name: str) -> Prepared:
        """The molecule `name` of `folder`.

        Raises:
            DataError: it is not there, or its files are not those that were written.
        """
        pdb, system, record = (folder / f"{name}.{ending}" for ending in ("pdb", "xml", "json"))
        try:
            prepared = cls(name, pdb, system, json.loads(record.read_text()))
            hashes = {key: sha256_of(path) for key, path in (("pdb", pdb), ("system", system))}
        except (OSError, ValueError) as error:
            raise DataError(f"no prepared molecule {name!r} in {folder} ({error}): run mlff kstep prepare") from None
        if hashes != prepared.record["sha256"]:
            raise DataError(f"{pdb} or {system} was altered after it was prepared; run mlff kstep prepare --overwrite")
        return prepared

    def load(self) -> tuple[app.PDBFile, openmm.System]:
        """Topology with positions, and System."""
        return app.PDBFile(str(self.pdb)), openmm.XmlSerializer.deserialize(self.system.read_text())

    def load_moving(self) -> tuple[app.PDBFile, openmm.System]:
        """As `load`, without removal of net momentum, which is a degree of freedom like any other."""
        pdb, system = self.load()
        for index in reversed(range(system.getNumForces())):
            if isinstance(system.getForce(index), openmm.CMMotionRemover):
                system.removeForce(index)
        return pdb, system


def prepared_in(folder: Path) -> list[Prepared]:
    """All molecules that `prepare` left in `folder`, by name.

    Raises:
        DataError: there is none, or one is damaged.
    """
    names = sorted(path.stem for path in folder.glob("*.json"))
    if not names:
        raise DataError(f"no prepared molecules in {folder}: run mlff kstep prepare")
    return [Prepared.at(folder, name) for name in names]


def prepare(molecules: Path, config: MDConfig, out: Path, *, overwrite: bool = False) -> list[Prepared]:
    """Conformers and Systems of the molecules in a file, see `mlff_openmm.kstep.molecules.read_entries`.

    What is already in `out`, from the same source with the same settings, is kept. `NAME.json` is written last.

    Args:
        molecules: lines of `SMILES name`.
        config: force field, solvent, constraints and seed count here.
        out: gets NAME.pdb, NAME.xml (serialized System) and NAME.json for each.
        overwrite: make anew what differs.

    Raises:
        ConfigError: `out` holds a molecule of this name made otherwise; see also `read_entries` and `make_system`.
        StructureError: see `mlff_openmm.kstep.molecules.build` and `make_system`.
    """
    return [_prepare(entry, config, out, overwrite) for entry in read_entries(molecules)]


def system_settings(config: MDConfig) -> dict[str, Any]:
    """The part of `config` that a System depends on."""
    return {name: getattr(config, name) for name in SystemConfig.model_fields}


def _prepare(entry: Entry, config: MDConfig, out: Path, overwrite: bool) -> Prepared:
    wanted = {"source": _source(entry), "settings": system_settings(config), "seed": config.seed}
    if (out / f"{entry.name}.json").exists() and not overwrite:
        made = Prepared.at(out, entry.name)
        different = [key for key in wanted if made.record[key] != wanted[key]]
        if different:
            raise ConfigError(
                f"{made.pdb} exists, made with another {', '.join(different)}: "
                f"{ {key: made.record[key] for key in different} }, now { {key: wanted[key] for key in different} }. "
                "Choose another folder, or --overwrite"
            )
        return made
    molecule = build(entry, config.seed)
    system = make_system(molecule, config)
    paths = {"pdb": out / f"{entry.name}.pdb", "system": out / f"{entry.name}.xml"}
    with replacing(paths["pdb"]) as path, path.open("w") as file:
        app.PDBFile.writeFile(molecule.topology, molecule.positions * unit.nanometer, file, keepIds=True)
    with replacing(paths["system"]) as path:
        path.write_text(openmm.XmlSerializer.serialize(system))
    record = {
        "name": entry.name,
        **wanted,
        "atoms": system.getNumParticles(),
        "heavy_atoms": sum(atom.element.atomic_number > 1 for atom in molecule.topology.atoms()),
        "constraints": system.getNumConstraints(),
        "versions": {"openmm": openmm.__version__, "rdkit": rdkit.__version__},
        "sha256": {key: sha256_of(path) for key, path in paths.items()},
    }
    with replacing(out / f"{entry.name}.json") as path:
        path.write_text(json.dumps(record, indent=2) + "\n")
    return Prepared.at(out, entry.name)


def _source(entry: Entry) -> str:
    path = Path(entry.source)
    return f"{path.name} {sha256_of(path)}" if path.suffix == ".pdb" and path.exists() else entry.source
