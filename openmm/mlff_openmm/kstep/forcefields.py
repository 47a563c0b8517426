"""The force fields of a molecule as OpenMM Systems."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import openmm
from openmm import app, unit
from openmm.app.internal.customgbforces import GBSAOBC2Force
from rdkit import Chem

from mlff_engines.errors import ConfigError, MissingEngineError, StructureError
from mlff_openmm.force import MLFFForce
from mlff_openmm.kstep.config import SystemConfig
from mlff_openmm.kstep.mmff import bond_lengths, mmff_charges, mmff_forces
from mlff_openmm.kstep.molecules import Molecule

MMFF = {"mmff94": "MMFF94", "mmff94s": "MMFF94s"}  # to RDKit's names
PROTEIN = {"amber14": "amber14-all.xml", "amber19": "amber19-all.xml"}
WATER_DIELECTRIC = 78.5


def make_system(molecule: Molecule, config: SystemConfig) -> openmm.System:
    """The System of `molecule` alone.

    Raises:
        ConfigError: an unknown force field, or one that cannot have the solvent or cutoff asked for.
        StructureError: missing parameters, the atoms named, or a molecule that it does not apply to.
        MissingEngineError: the packages of GAFF or OpenFF are not installed.
    """
    name = config.force_field
    if name in MMFF:
        return _mmff(molecule, config)
    if name in PROTEIN:
        return _from_templates(molecule, config, app.ForceField(*_files(config, PROTEIN[name])))
    if name.startswith(("gaff-2.", "openff-2.")):
        return _small_molecule(molecule, config)
    if name.endswith(".pt"):
        return _artifact(molecule, config)
    raise ConfigError(
        f"unknown force field {name!r}; allowed: {', '.join([*MMFF, *PROTEIN])}, gaff-2.x, openff-2.x, or the path of "
        "an artifact (.pt)"
    )


def _mmff(molecule: Molecule, config: SystemConfig) -> openmm.System:
    if config.nonbonded_cutoff_nm is not None:
        raise ConfigError(
            f"nonbonded_cutoff_nm {config.nonbonded_cutoff_nm:g}: MMFF has no cutoff; set it to null, or choose "
            "another force field"
        )
    rdkit = _rdkit(molecule, config)
    system = _particles(molecule, config)
    for force in mmff_forces(rdkit, MMFF[config.force_field]):
        system.addForce(force)
    if config.implicit_solvent is not None:
        system.addForce(_obc2(molecule.topology, mmff_charges(rdkit), config))
    for (i, j), length in bond_lengths(rdkit).items():
        if _constrained(config, rdkit.GetAtomWithIdx(i), rdkit.GetAtomWithIdx(j)):
            system.addConstraint(i, j, length)
    return system


def _constrained(config: SystemConfig, one: Chem.Atom, two: Chem.Atom) -> bool:
    return config.constraints == "AllBonds" or (
        config.constraints == "HBonds" and 1 in (one.GetAtomicNum(), two.GetAtomicNum())
    )


def _obc2(topology: app.Topology, charges: list[Any], config: SystemConfig) -> openmm.Force:
    """Onufriev, Bashford, Case, Proteins 55, 383 (2004), model II, with mbondi2 radii and the ACE surface term."""
    force = openmm.GBSAOBCForce()
    force.setSolventDielectric(WATER_DIELECTRIC)
    if config.nonbonded_cutoff_nm is not None:
        force.setNonbondedMethod(openmm.GBSAOBCForce.CutoffNonPeriodic)
        force.setCutoffDistance(config.nonbonded_cutoff_nm)
    for charge, (radius, scale) in zip(charges, GBSAOBC2Force.getStandardParameters(topology), strict=True):
        force.addParticle(charge, radius, scale)
    return force


def _particles(molecule: Molecule, config: SystemConfig) -> openmm.System:
    """Masses only; those of hydrogens as `config` says, taken from the atoms they are bound to."""
    system = openmm.System()
    for atom in molecule.topology.atoms():
        system.addParticle(atom.element.mass)
    if config.hydrogen_mass_amu is None:
        return system
    for bond in molecule.topology.bonds():
        for light, heavy in (bond, bond[::-1]):
            if light.element is app.element.hydrogen and heavy.element is not app.element.hydrogen:
                taken = config.hydrogen_mass_amu * unit.dalton - system.getParticleMass(light.index)
                system.setParticleMass(heavy.index, system.getParticleMass(heavy.index) - taken)
                system.setParticleMass(light.index, config.hydrogen_mass_amu)
    return system


def _files(config: SystemConfig, *files: str) -> list[str]:
    return [*files, "implicit/obc2.xml"] if config.implicit_solvent else list(files)


def _options(config: SystemConfig) -> dict[str, Any]:
    """Arguments that every `createSystem` of OpenMM's application layer takes."""
    options: dict[str, Any] = {"nonbondedMethod": app.NoCutoff}
    if config.nonbonded_cutoff_nm is not None:
        options = {
            "nonbondedMethod": app.CutoffNonPeriodic,
            "nonbondedCutoff": config.nonbonded_cutoff_nm * unit.nanometer,
        }
    if config.constraints:
        options["constraints"] = getattr(app, config.constraints)
    if config.hydrogen_mass_amu:
        options["hydrogenMass"] = config.hydrogen_mass_amu * unit.dalton
    return options | {"rigidWater": False, "removeCMMotion": False}


def _from_templates(molecule: Molecule, config: SystemConfig, force_field: app.ForceField) -> openmm.System:
    unknown = force_field.getUnmatchedResidues(molecule.topology)
    if unknown:
        residues = "; ".join(
            f"{residue.name} {residue.id} ({', '.join(atom.name for atom in residue.atoms())})" for residue in unknown
        )
        raise StructureError(
            f"{config.force_field} has no template for these residues of {molecule.name}: {residues}. It is for "
            "peptides with all their hydrogens, as PDB files; for other molecules choose mmff94, gaff-2.x or openff-2.x"
        )
    return force_field.createSystem(molecule.topology, **_options(config))


def _small_molecule(molecule: Molecule, config: SystemConfig) -> openmm.System:
    """GAFF or OpenFF by openmmforcefields; GAFF by ACPYPE where only that is installed."""
    rdkit = _rdkit(molecule, config)
    try:
        from openff.toolkit import Molecule as OpenFFMolecule  # type: ignore[import-not-found, unused-ignore]
        from openmmforcefields.generators import (  # type: ignore[import-not-found, unused-ignore]
            GAFFTemplateGenerator,
            SMIRNOFFTemplateGenerator,
        )
    except ImportError:
        if config.force_field.startswith("gaff") and shutil.which("acpype"):
            return _acpype(molecule, rdkit, config)
        raise MissingEngineError(
            f"{config.force_field} needs openmmforcefields and openff-toolkit: conda install -c conda-forge "
            "openmmforcefields; or, for GAFF alone, conda install -c conda-forge acpype. mmff94 needs neither"
        ) from None
    generator = GAFFTemplateGenerator if config.force_field.startswith("gaff") else SMIRNOFFTemplateGenerator
    templates = generator(molecules=[OpenFFMolecule.from_rdkit(rdkit)], forcefield=config.force_field)
    force_field = app.ForceField(*_files(config))
    force_field.registerTemplateGenerator(templates.generator)
    return force_field.createSystem(molecule.topology, **_options(config))


def _acpype(molecule: Molecule, rdkit: Chem.Mol, config: SystemConfig) -> openmm.System:
    """GAFF 2 with AM1-BCC charges, in the version that ACPYPE brings along."""
    with tempfile.TemporaryDirectory() as folder:
        Chem.MolToMolFile(rdkit, str(Path(folder) / "molecule.mol"))
        command = ["acpype", "-i", "molecule.mol", "-b", "molecule", "-a", "gaff2", "-c", "bcc"]
        command += ["-n", str(Chem.GetFormalCharge(rdkit)), "-o", "gmx"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        made = Path(folder) / "molecule.acpype" / "molecule_AC.prmtop"
        if done.returncode or not made.exists():
            said = [line for line in (done.stdout + done.stderr).splitlines() if "rror" in line and "quote" not in line]
            raise StructureError(f"ACPYPE found no GAFF parameters for {molecule.name}: {'; '.join(said[:5])}")
        system = app.AmberPrmtopFile(str(made)).createSystem(**_options(config))
    if config.implicit_solvent is not None:  # its file has the radii of another solvent model
        nonbonded = next(force for force in system.getForces() if isinstance(force, openmm.NonbondedForce))
        charges = [nonbonded.getParticleParameters(i)[0] for i in range(system.getNumParticles())]
        system.addForce(_obc2(molecule.topology, charges, config))
    return system


def _artifact(molecule: Molecule, config: SystemConfig) -> openmm.System:
    """A learned potential as the true one. Bonds with hydrogen are constrained to MMFF's lengths."""
    if config.implicit_solvent is not None or config.nonbonded_cutoff_nm is not None:
        raise ConfigError(
            f"{config.force_field} is the whole potential: set implicit_solvent and nonbonded_cutoff_nm to null"
        )
    system = _particles(molecule, config)
    system.addForce(MLFFForce(config.force_field, molecule.topology))
    if config.constraints:
        rdkit = _rdkit(molecule, config)
        for (i, j), length in bond_lengths(rdkit).items():
            if _constrained(config, rdkit.GetAtomWithIdx(i), rdkit.GetAtomWithIdx(j)):
                system.addConstraint(i, j, length)
    return system


def _rdkit(molecule: Molecule, config: SystemConfig) -> Chem.Mol:
    if molecule.rdkit is None:
        raise StructureError(
            f"{molecule.name} is a PDB file, which does not say what kinds of bonds it has; {config.force_field} needs "
            f"SMILES. For peptides choose {' or '.join(PROTEIN)}"
        )
    return molecule.rdkit
