"""MMFF94 in OpenMM is RDKit's, term by term and in sum, for every molecule that ships and some odd ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mlff_engines.errors import StructureError
from mlff_engines.structure import FloatArray
from requirements import REPOSITORY, require_engine, require_package

require_engine("openmm")
require_package("rdkit", "openmm")

import openmm  # noqa: E402
from openmm import unit  # noqa: E402
from openmm.app.internal.customgbforces import GBSAOBC2Force  # noqa: E402
from rdkit.Chem import rdForceFieldHelpers  # noqa: E402

from mlff_openmm.kstep import mmff  # noqa: E402
from mlff_openmm.kstep.config import SystemConfig  # noqa: E402
from mlff_openmm.kstep.forcefields import make_system  # noqa: E402
from mlff_openmm.kstep.molecules import Entry, Molecule, build, read_entries  # noqa: E402

SHIPPED = read_entries(REPOSITORY / "examples" / "kstep" / "molecules.smi")
ODD = {
    "three_ring_alkyne": "OC1CC1C#CC",
    "four_ring_lactam": "C1CC1N1CCC1=O",
    "azide": "CN=[N+]=[N-]",
    "allene": "C=C=CC",
    "metformin": "CN(C)C(=N)NC(N)=N",
    "phosphate": "COP(=O)(C)OC",
    "nitro": "C[N+](=O)[O-]",
    "thiazole": "CSc1nccs1",
    "silane": "C[SiH2]C",
    "zwitterion": "[NH3+]CC(=O)[O-]",
}
MOLECULES = SHIPPED + [Entry(name, smiles, "here") for name, smiles in ODD.items()]
TOLERANCE = 1e-6  # relative


def geometries(molecule: Molecule) -> Iterator[FloatArray]:
    """nm: the minimum, and others from gently to badly distorted."""
    rng = np.random.default_rng(len(molecule.positions))
    for amplitude in (0.0, 0.003, 0.01, 0.03):
        yield molecule.positions + rng.normal(0, amplitude or 1e-12, molecule.positions.shape)


def context_of(system: openmm.System) -> openmm.Context:
    return openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))


def in_openmm(context: openmm.Context, positions: FloatArray) -> tuple[float, FloatArray]:
    context.setPositions(positions)
    state = context.getState(energy=True, forces=True)
    forces = state.getForces(asNumpy=True).value_in_unit(unit.kilojoules_per_mole / unit.nanometer)
    return state.getPotentialEnergy().value_in_unit(unit.kilojoules_per_mole), forces


def deviation(molecule: Molecule, variant: str = "MMFF94") -> float:
    """The largest over geometries, energies relative to the energy, forces relative to the largest.

    Forces at the minimum, where they vanish, are measured against a thermal one.
    """
    config = SystemConfig(force_field=variant.lower(), implicit_solvent=None, constraints=None)
    context = context_of(make_system(molecule, config))
    properties = rdForceFieldHelpers.MMFFGetMoleculeProperties(molecule.rdkit, variant)
    rdkit = rdForceFieldHelpers.MMFFGetMoleculeForceField(molecule.rdkit, properties)
    worst = 0.0
    for positions in geometries(molecule):
        flat = (10 * positions).ravel().tolist()
        energy = 4.184 * rdkit.CalcEnergy(flat)
        forces = -41.84 * np.array(rdkit.CalcGrad(flat)).reshape(-1, 3)
        found_energy, found_forces = in_openmm(context, positions)
        scale = max(np.abs(forces).max(), 1e3)
        worst = max(worst, abs(found_energy / energy - 1), np.abs(found_forces - forces).max() / scale)
    return worst


@pytest.mark.parametrize("entry", MOLECULES, ids=lambda entry: entry.name)
def test_energies_and_forces_are_those_of_rdkit(entry: Entry) -> None:
    assert deviation(build(entry, seed=1)) < TOLERANCE


@pytest.mark.parametrize("entry", [e for e in MOLECULES if e.name in ("lidocaine", "metformin")], ids=lambda e: e.name)
def test_the_static_variant_is_another_force_field_and_that_of_rdkit(entry: Entry) -> None:
    molecule = build(entry, seed=1)
    assert deviation(molecule, "MMFF94s") < TOLERANCE
    contexts = [
        context_of(make_system(molecule, SystemConfig(force_field=name, implicit_solvent=None)))
        for name in ("mmff94", "mmff94s")
    ]
    energies = [in_openmm(context, molecule.positions)[0] for context in contexts]
    assert abs(energies[0] - energies[1]) > 0.1


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("STRETCH", mmff.STRETCH.replace("7/12", "0.58")),
        ("BEND", mmff.BEND.replace("1 + ", "1 - ")),
        ("LINEAR_TYPES", frozenset()),
        ("STRETCH_BEND", "0*k12*k32*r12*r32*theta0*x1"),
        ("OUT_OF_PLANE", mmff.OUT_OF_PLANE.replace("asin(volume/(ca*b))^2", "0*ca*b")),
        ("TORSION", mmff.TORSION.replace("1 - cos(2*theta)", "1 + cos(2*theta)")),
        ("CHARGES_1_4", 1.0),
        ("PAIR", mmff.PAIR.replace("0.12)", "0.1201)")),
    ],
)
def test_a_wrong_term_is_noticed(name: str, wrong: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmff, name, wrong)
    nitrile = next(entry for entry in SHIPPED if entry.name == "hydroxybenzonitrile")
    assert deviation(build(nitrile, seed=1)) > TOLERANCE


def test_the_solvent_is_obc2_with_charges_of_the_force_field() -> None:
    """Against OpenMM's other implementation of the same model."""
    molecule = build(next(entry for entry in SHIPPED if entry.name == "paracetamol"), seed=1)
    dry = make_system(molecule, SystemConfig(implicit_solvent=None, constraints=None))
    wet = make_system(molecule, SystemConfig(implicit_solvent="OBC2", constraints=None))
    other = GBSAOBC2Force(SA="ACE")
    for charge, parameters in zip(
        mmff.mmff_charges(molecule.rdkit), GBSAOBC2Force.getStandardParameters(molecule.topology), strict=True
    ):
        other.addParticle([charge, *parameters])
    other.finalize()
    custom = openmm.System()
    for i in range(dry.getNumParticles()):
        custom.addParticle(dry.getParticleMass(i))
    custom.addForce(other)
    contexts = [context_of(system) for system in (dry, wet, custom)]
    for positions in geometries(molecule):
        (e_dry, f_dry), (e_wet, f_wet), (e, f) = (in_openmm(context, positions) for context in contexts)
        assert e < -10  # kJ/mol
        np.testing.assert_allclose(e_wet - e_dry, e, rtol=1e-5)
        np.testing.assert_allclose(f_wet - f_dry, f, rtol=1e-5, atol=1e-4 * np.abs(f).max())


def test_constraints_are_kept_at_the_length_of_zero_bond_energy() -> None:
    molecule = build(SHIPPED[1], seed=1)
    for constraints, count in ((None, 0), ("HBonds", 6), ("AllBonds", 13)):
        assert make_system(molecule, SystemConfig(constraints=constraints)).getNumConstraints() == count
    system = make_system(molecule, SystemConfig(constraints="HBonds"))
    stretching = next(f for f in system.getForces() if f.getName() == "MMFF bond stretching")
    bonds = {tuple(sorted(p[:2])): p[2][1] for p in map(stretching.getBondParameters, range(stretching.getNumBonds()))}
    for i, j, length in map(system.getConstraintParameters, range(system.getNumConstraints())):
        assert bonds[tuple(sorted((i, j)))] == length.value_in_unit(unit.nanometer)


def test_hydrogen_mass_is_taken_from_the_neighbour() -> None:
    molecule = build(SHIPPED[0], seed=1)
    plain, heavy = (make_system(molecule, SystemConfig(hydrogen_mass_amu=mass)) for mass in (None, 3.0))
    masses = [[s.getParticleMass(i).value_in_unit(unit.dalton) for i in range(9)] for s in (plain, heavy)]
    assert sum(masses[0]) == pytest.approx(sum(masses[1]))
    assert masses[1][3:] == [3.0] * 6
    assert masses[1][0] == pytest.approx(12.011 - 3 * (3.0 - 1.007947), abs=1e-3)


@pytest.mark.parametrize(("smiles", "named"), [("C[Se]C", "Se1"), ("CB(O)O", "B1"), ("FS(F)(F)(F)(F)F", "MMFF94")])
@pytest.mark.fault("J3")
def test_atoms_without_parameters_are_named(smiles: str, named: str) -> None:
    molecule = build(Entry("stranger", smiles, "here"), seed=1)
    with pytest.raises(StructureError, match=named):
        make_system(molecule, SystemConfig())


def test_every_shipped_molecule_is_small_neutral_and_within_the_limits(tmp_path: Path) -> None:
    from rdkit import Chem

    assert 10 <= len(SHIPPED) <= 12
    molecules = [Chem.MolFromSmiles(entry.source) for entry in SHIPPED]
    assert all(m.GetNumHeavyAtoms() <= 30 and Chem.GetFormalCharge(m) == 0 for m in molecules)
    assert {"ethanol", "phenol"} <= {entry.name for entry in SHIPPED}
