"""D6: what a mixed System of OpenMM-ML is at both ends of its interpolation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from openmm import app, unit
from openmmml import MLPotential

from mlff_engines.errors import MLFFError
from mlff_engines.manifest import Dtype
from mlff_engines.structure import FloatArray, Result, Structure
from mlff_engines.validation.result import NAMES, CheckResult, Claims, Evaluate, Verdict, Worst
from mlff_engines.validation.static.systems import cluster, taken
from mlff_openmm.force import KJ_PER_MOL, NM

FORCE = KJ_PER_MOL / NM  # kJ/mol/nm in eV/Å

# eV per atom and eV/Å; OpenMM-ML's interpolation of PME alone is off by 4e-10
TOLERANCES: dict[Dtype, float] = {"float64": 1e-8, "float32": 5e-5}
OFFERS = frozenset({"energy", "forces"})
ATOMS = 16  # of which half are the student's


def check_end_points(
    artifact: Path, reference: Evaluate, claims: Claims, *, dtype: Dtype | None = None, **options: Any
) -> CheckResult:
    """D6: a made-up classical System, half of it given to the student, in vacuum and in a periodic box.

    At lambda 0 it is the classical System; at 1, the classical System less the classical energy of the ML atoms alone,
    plus the student on these atoms; in between, linear. With every atom given to the student, 1 is the bare student.

    Args:
        artifact: the student.
        reference: the eager model, see `mlff_engines.validation.static.parity.reference`.
        claims: what the model says of itself.
        dtype: of the network.
        options: more of `MLFFForce`.
    """
    vacuum = cluster(claims, ATOMS)
    # the ML atoms do not come first, nor in order
    chosen = np.random.default_rng(0).permutation(ATOMS)[: ATOMS // 2]
    # both cutoffs, half this width, reach across all atoms: nothing of the classical System is cut off
    width = 2.1 * max(claims.cutoff, float(np.linalg.norm(np.ptp(vacuum.positions, axis=0))))
    across = (vacuum.positions - vacuum.positions.mean(axis=0)) % width  # a corner of the box lies amid the atoms
    box = replace(vacuum, positions=across, cell=width * np.eye(3), pbc=np.ones(3, dtype=bool))
    potential = MLPotential("mlff", model=artifact)
    settings = {"dtype": dtype, "charge": vacuum.charge, "spin": vacuum.spin, **options}
    worst = Worst(OFFERS)
    try:
        for name, structure, atoms in (
            ("vacuum", vacuum, chosen),
            ("periodic box", box, chosen),
            ("every atom in vacuum", vacuum, np.arange(ATOMS)),
        ):
            topology, classical = _classical(structure)
            mm, alone = _evaluate(classical, structure), _alone(vacuum, atoms)
            student = reference(taken(vacuum, atoms))
            energy, forces = mm.energy - alone.energy + student.energy, mm.forces.copy()
            forces[atoms] += student.forces - alone.forces
            ml = _result(energy, forces)
            plain = potential.createMixedSystem(topology, classical, atoms.tolist(), **settings)
            worst.compare(f"{name}, no interpolation", _evaluate(plain, structure), ml)
            mixed = potential.createMixedSystem(topology, classical, atoms.tolist(), interpolate=True, **settings)
            for weight in (0.0, 0.5, 1.0):
                expected = _result(
                    (1 - weight) * mm.energy + weight * ml.energy, (1 - weight) * mm.forces + weight * ml.forces
                )
                worst.compare(f"{name}, lambda {weight:g}", _evaluate(mixed, structure, weight), expected)
    except (openmm.OpenMMException, MLFFError) as error:
        worst.see(np.nan, f"{type(error).__name__}: {error}")
    tolerance = TOLERANCES[claims.dtype]
    verdict: Verdict = "pass" if worst.figure <= tolerance else "fail"
    return CheckResult("D6", NAMES["D6"], verdict, worst.figure, tolerance, worst.detail)


def _classical(structure: Structure) -> tuple[app.Topology, openmm.System]:
    """Charges, Lennard-Jones spheres and a spring between each two neighbours of a chain; numbers without meaning."""
    topology, system = app.Topology(), openmm.System()
    residue = topology.addResidue("MOL", topology.addChain())
    nonbonded, bonds = openmm.NonbondedForce(), openmm.HarmonicBondForce()
    if structure.volume is not None:
        box = structure.cell / NM
        topology.setPeriodicBoxVectors(box * unit.nanometer)
        system.setDefaultPeriodicBoxVectors(*box)
        nonbonded.setNonbondedMethod(openmm.NonbondedForce.PME)
        nonbonded.setCutoffDistance(box[0, 0] / 2)
        nonbonded.setUseDispersionCorrection(False)
        bonds.setUsesPeriodicBoundaryConditions(True)
    for i, number in enumerate(structure.numbers):
        element = app.Element.getByAtomicNumber(int(number))
        topology.addAtom(element.symbol, element, residue)
        system.addParticle(element.mass)
        nonbonded.addParticle(0.1 * (-1) ** i, 0.15, 0.4)
        if i:
            bonds.addBond(i - 1, i, 0.16, 1e4)
    system.addForce(nonbonded)
    system.addForce(bonds)
    return topology, system


def _alone(structure: Structure, atoms: Any) -> Result:
    """The classical forces among `atoms`: their own pairs, with the charges and springs that they have in the whole."""
    system = _classical(structure)[1]
    nonbonded, bonds = system.getForces()
    kept = set(atoms.tolist())
    for i in range(system.getNumParticles()):
        if i not in kept:
            nonbonded.setParticleParameters(i, 0.0, 1.0, 0.0)
    for i in range(bonds.getNumBonds()):
        one, two, length, constant = bonds.getBondParameters(i)
        bonds.setBondParameters(i, one, two, length, constant * (one in kept and two in kept))
    result = _evaluate(system, structure)
    return _result(result.energy, result.forces[atoms])


def _evaluate(system: openmm.System, structure: Structure, weight: float | None = None) -> Result:
    context = openmm.Context(system, openmm.VerletIntegrator(0.0), openmm.Platform.getPlatform("Reference"))
    context.setPositions(structure.positions / NM)
    if weight is not None:
        context.setParameter("lambda_interpolate", weight)
    state = context.getState(energy=True, forces=True)
    forces = state.getForces(asNumpy=True).value_in_unit(unit.kilojoules_per_mole / unit.nanometer)
    return _result(state.getPotentialEnergy().value_in_unit(unit.kilojoules_per_mole) * KJ_PER_MOL, forces * FORCE)


def _result(energy: float, forces: FloatArray) -> Result:
    return Result(energy, np.full(len(forces), np.nan), forces, np.full((3, 3), np.nan))
