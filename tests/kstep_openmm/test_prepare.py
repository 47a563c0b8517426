"""From SMILES to files that OpenMM starts from; what cannot become a molecule says so."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import students
from mlff_engines.config import load_yaml, parse
from mlff_engines.errors import ConfigError, DataError, MissingEngineError, MLFFError, StructureError
from requirements import REPOSITORY, require_engine, require_package

require_engine("openmm")
require_package("rdkit", "openmm")

import openmm  # noqa: E402
from openmm import app, unit  # noqa: E402

from mlff_openmm.kstep.config import MDConfig  # noqa: E402
from mlff_openmm.kstep.molecules import Entry, build, read_entries  # noqa: E402
from mlff_openmm.kstep.prepare import Prepared, prepare, prepared_in  # noqa: E402

EXAMPLES = REPOSITORY / "examples"
VACUUM = MDConfig(implicit_solvent=None)


def molecules(folder: Path, *lines: str) -> Path:
    file = folder / "molecules.smi"
    file.write_text("\n".join(lines))
    return file


def test_the_shipped_configuration_is_valid() -> None:
    config = load_yaml(MDConfig, EXAMPLES / "kstep" / "md.yaml")
    assert config.temperature_K == (300.0,)
    # the keys of the specification
    specified = """temperature_K friction_per_ps dt_fs length_ns save_interval_steps constraints implicit_solvent
    nonbonded_cutoff_nm nve_window_ps"""
    assert set(MDConfig.model_fields) > set(specified.split())


def test_prepared_molecules_can_be_loaded_and_are_near_their_minimum(tmp_path: Path) -> None:
    made = prepare(molecules(tmp_path, "# two", "CCO ethanol", "Oc1ccccc1 phenol"), MDConfig(), tmp_path / "out")
    assert [m.name for m in made] == ["ethanol", "phenol"] == [m.name for m in prepared_in(tmp_path / "out")]
    for molecule in made:
        pdb, system = molecule.load()
        atoms = list(pdb.topology.atoms())
        assert len(atoms) == system.getNumParticles() == molecule.record["atoms"]
        assert pdb.topology.getNumBonds() == {"ethanol": 8, "phenol": 13}[molecule.name]
        assert [a.element.mass for a in atoms] == [system.getParticleMass(i) for i in range(len(atoms))]
        context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
        context.setPositions(pdb.positions)
        forces = context.getState(forces=True).getForces(asNumpy=True)._value
        assert np.abs(forces).max() < 600  # kJ/mol/nm: those of the solvent, and of three decimals in a PDB file


def test_a_second_call_keeps_what_is_there_and_refuses_other_settings(tmp_path: Path) -> None:
    file = molecules(tmp_path, "CCO ethanol")
    (first,) = prepare(file, VACUUM, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    prepare(file, VACUUM, tmp_path / "out")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    with pytest.raises(ConfigError, match="another settings"):
        prepare(file, MDConfig(), tmp_path / "out")
    with pytest.raises(ConfigError, match="another source"):
        prepare(molecules(tmp_path, "OCC ethanol"), VACUUM, tmp_path / "out")
    (second,) = prepare(file, MDConfig(), tmp_path / "out", overwrite=True)
    assert second.record["sha256"]["system"] != first.record["sha256"]["system"]


def test_the_seed_decides_the_conformer(tmp_path: Path) -> None:
    entry = next(e for e in read_entries(EXAMPLES / "kstep" / "molecules.smi") if e.name == "lidocaine")
    one, same, other = (build(entry, seed).positions for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.01


def test_an_altered_system_is_refused(tmp_path: Path) -> None:
    (made,) = prepare(molecules(tmp_path, "CCO ethanol"), VACUUM, tmp_path / "out")
    made.system.write_text(made.system.read_text().replace('mass="12.', 'mass="13.'))
    with pytest.raises(DataError, match="altered"):
        Prepared.at(tmp_path / "out", "ethanol")
    with pytest.raises(DataError, match="mlff kstep prepare"):
        prepared_in(tmp_path)


@pytest.mark.parametrize(
    ("smiles", "message"),
    [
        ("CC(C", "syntax"),
        ("CC(C)(C)(C)C", "valence"),
        ("c1cccc1", "kekulize"),
        ("CCO.O", "2 molecules"),
        ("missing.pdb", "missing.pdb"),
    ],
)
@pytest.mark.fault("J1")
def test_bad_molecules_are_named_with_their_line(tmp_path: Path, smiles: str, message: str) -> None:
    file = molecules(tmp_path, "CCO ethanol", f"{smiles} strange")
    with pytest.raises(StructureError, match=f"(?i)molecules.smi:2: .*{message}"):
        prepare(file, VACUUM, tmp_path / "out")
    assert (tmp_path / "out" / "ethanol.json").exists()  # what came before stays


@pytest.mark.fault("J2")
def test_a_molecule_without_a_conformer_is_refused() -> None:
    impossible = "C1C[C@@H]2CC[C@@H]1C2"  # norbornane with one bridgehead turned outside
    with pytest.raises(StructureError, match="no conformer"):
        build(Entry("twisted", impossible, "here:1"), seed=1)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["CCO"], "a name"),
        (["CCO a/b"], "a name"),
        (["CCO ethanol", "OCC ethanol"], "already"),
        (["# nothing"], "no molecules"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_entries(molecules(tmp_path, *lines))
    with pytest.raises(ConfigError, match="cannot read"):
        read_entries(tmp_path / "none.smi")


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"force_field": "mmff95"}, ConfigError, "allowed: mmff94, mmff94s, amber14, amber19, gaff"),
        ({"nonbonded_cutoff_nm": 1.0}, ConfigError, "no cutoff"),
        ({"force_field": "amber14"}, StructureError, r"MOL 1 \(C1, C2, O1"),
        ({"force_field": "gaff-2.11"}, MissingEngineError, "conda install .* acpype"),
        ({"force_field": "openff-2.2.0"}, MissingEngineError, "conda install"),
        ({"force_field": "student.pt"}, ConfigError, "whole potential"),
    ],
)
def test_force_fields_that_cannot_be_had(
    tmp_path: Path,
    config: dict[str, object],
    error: type[MLFFError],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no acpype
    monkeypatch.setitem(sys.modules, "openff.toolkit", None)
    with pytest.raises(error, match=message):
        prepare(molecules(tmp_path, "CCO ethanol"), MDConfig(**config), tmp_path / "out")


@pytest.mark.skipif(shutil.which("acpype") is None, reason="ACPYPE is not installed")
def test_gaff_by_acpype(tmp_path: Path) -> None:
    config = MDConfig(force_field="gaff-2.x", hydrogen_mass_amu=3.0, nonbonded_cutoff_nm=1.0)
    (made,) = prepare(molecules(tmp_path, "CCO ethanol"), config, tmp_path / "out")
    pdb, system = made.load()
    assert system.getNumConstraints() == 6
    assert [system.getParticleMass(i)._value for i in range(3, 9)] == [3.0] * 6
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
    context.setPositions(pdb.positions)
    forces = context.getState(forces=True).getForces(asNumpy=True)._value
    assert np.abs(forces).max() < 6000  # the minimum of another force field, and bonds that constraints set right


def test_peptides_come_from_pdb_files_with_the_force_fields_of_openmm(tmp_path: Path) -> None:
    shutil.copy(EXAMPLES / "alanine_dipeptide.pdb", tmp_path)
    file = molecules(tmp_path, "alanine_dipeptide.pdb dipeptide")
    (made,) = prepare(file, MDConfig(force_field="amber14"), tmp_path / "out")
    pdb, system = made.load()
    assert system.getNumConstraints() == 12
    reference = app.ForceField("amber14-all.xml", "implicit/obc2.xml").createSystem(
        pdb.topology, constraints=app.HBonds, removeCMMotion=False
    )
    energies = []
    for one in (system, reference):
        context = openmm.Context(one, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
        context.setPositions(pdb.positions)
        energies.append(context.getState(energy=True).getPotentialEnergy().value_in_unit(unit.kilojoules_per_mole))
    assert energies[0] == pytest.approx(energies[1], rel=1e-9)
    cut = MDConfig(force_field="amber19", nonbonded_cutoff_nm=0.9, hydrogen_mass_amu=2.0, implicit_solvent=None)
    system = prepare(file, cut, tmp_path / "cut")[0].load()[1]
    nonbonded = next(force for force in system.getForces() if isinstance(force, openmm.NonbondedForce))
    assert nonbonded.getNonbondedMethod() == openmm.NonbondedForce.CutoffNonPeriodic
    assert nonbonded.getCutoffDistance()._value == 0.9
    assert min(system.getParticleMass(i)._value for i in range(system.getNumParticles())) == 2.0
    with pytest.raises(StructureError, match="SMILES"):
        prepare(file, MDConfig(), tmp_path / "other")


def test_an_artifact_can_be_the_true_potential(tmp_path: Path) -> None:
    student = students.artifact(tmp_path / "student")
    config = MDConfig(force_field=str(student), implicit_solvent=None)
    (made,) = prepare(molecules(tmp_path, "CCO ethanol"), config, tmp_path / "out")
    pdb, system = made.load()
    assert system.getNumConstraints() == 6
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
    context.setPositions(pdb.positions)
    assert np.isfinite(context.getState(energy=True).getPotentialEnergy()._value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"temperature": 300}, "temperature_K"),
        ({"temperature_K": []}, "temperature_K"),
        ({"temperature_K": [300, -1]}, "temperature_K"),
        ({"burst_steps": 18}, "no multiple"),
        ({"burst_steps": 0, "nve_window_ps": 0}, "nothing would be saved"),
        ({"burst_interval_ps": 300}, "longer than"),
        ({"constraints": "Hbonds"}, "HBonds"),
    ],
)
def test_bad_keys_are_refused(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(MDConfig, keys, "md.yaml")


def test_the_record_says_where_a_molecule_came_from(tmp_path: Path) -> None:
    (made,) = prepare(molecules(tmp_path, "CCO ethanol"), VACUUM, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "ethanol.json").read_text())
    assert record == made.record
    assert record["source"] == "CCO"
    assert record["seed"] == 1
    assert record["settings"]["force_field"] == "mmff94"
    assert set(record["versions"]) == {"openmm", "rdkit"}
