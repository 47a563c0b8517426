"""A student and the true potential in one System: the student in one force group, true minus student in another.

Their sum is the true potential: energies that OpenMM reports are true ones, and any multiple-time-step integrator that
evaluates the second group less often is a variant C of `mlff_engines.kstep`.
"""

from __future__ import annotations

import copy
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from openmm.app import Topology

from mlff_engines.errors import ConfigError
from mlff_engines.kstep.meter import Meter
from mlff_engines.structure import FloatArray
from mlff_openmm.force import Compute, MLFFForce

STUDENT_GROUP, CORRECTION_GROUP = 0, 1
NAME = "MLFFCorrection"

_meters: dict[str, Meter] = {}


def add_corrected(system: openmm.System, topology: Topology, student: MLFFForce, corrector: Any) -> None:
    """Add `student` and what makes it the true potential; with a System as corrector, its masses and constraints too.

    Args:
        system: masses only.
        topology: of `system`.
        student: in no System yet.
        corrector: the true potential: a System, the path of a serialized one (.xml) or of an artifact, an OpenMM Force
            or several, or an ASE calculator.

    Raises:
        ConfigError: a corrector that is none of these, has another number of particles, or cannot be copied.
    """
    if isinstance(corrector, str | Path) and Path(corrector).suffix == ".xml":
        corrector = _read(Path(corrector))
    if isinstance(corrector, openmm.System):
        _take_particles(system, corrector)
        true = [_copy(f) for f in corrector.getForces() if not isinstance(f, openmm.CMMotionRemover)]
    elif isinstance(corrector, str | Path):
        true = [MLFFForce(corrector, topology, charge=student.compute.charge, spin=student.compute.spin)]
    elif isinstance(corrector, openmm.Force):
        true = [corrector if corrector.thisown else _copy(corrector)]
    elif isinstance(corrector, Iterable):
        true = [force if force.thisown else _copy(force) for force in corrector]
    elif hasattr(corrector, "get_potential_energy"):
        from openmmml.models.asepotential import ASEPotentialImpl

        ASEPotentialImpl("ase").addForces(topology, system, None, CORRECTION_GROUP, calculator=corrector)
        true = []
    else:
        raise ConfigError(
            f"corrector {corrector!r}; allowed: a System, the path of one (.xml) or of an artifact, Forces, or an ASE "
            "calculator"
        )
    student.setForceGroup(STUDENT_GROUP)
    system.addForce(student)
    for force in [*true, _boundary(student.compute, student.compute.periodic)]:
        force.setForceGroup(CORRECTION_GROUP)
        system.addForce(force)


def meter_of(system: openmm.System) -> Meter:
    """What the true potential of `system` was asked by all its Contexts, reporters and minimisers included.

    Counted where OpenMM evaluates the correction: a State with energies or forces of all groups is one call. Asking
    twice at the same positions counts twice, though artifacts and ASE calculators remember their last answer.

    Raises:
        ConfigError: `system` has no correction.
    """
    for force in system.getForces():
        if force.getName().startswith(NAME):
            return _meter(force.getName())
    raise ConfigError(
        "the System has no corrector, so that no true potential is known: create it with "
        'MLPotential("mlff", model="student.pt", corrector=...).createSystem(topology)'
    )


def count_calls(system: openmm.System) -> Meter:
    """Count what a System without student is asked, too: adds a force that is zero, before any Context is made."""
    if not any(force.getName().startswith(NAME) for force in system.getForces()):
        system.addForce(_boundary(None, system.usesPeriodicBoundaryConditions()))
    return meter_of(system)


@dataclass
class Boundary:
    """Minus the student, or zero, evaluated whenever the true potential is: where its calls are counted."""

    student: Compute | None
    name: str

    def __call__(self, state: openmm.State) -> tuple[float, FloatArray]:
        """Energy in kJ/mol and forces (N, 3) in kJ/mol/nm."""
        _meter(self.name).count()
        if self.student is None:
            return 0.0, np.zeros((state._getNumParticles(), 3))
        energy, forces = self.student(state)
        return -energy, -forces


def _meter(name: str) -> Meter:
    """One for all copies in this process."""
    return _meters.setdefault(name, Meter())


def _boundary(student: Compute | None, periodic: bool) -> openmm.PythonForce:
    name = f"{NAME} {uuid.uuid4().hex}"  # the only thing of the Python side that can be got back from a System
    force = openmm.PythonForce(Boundary(student, name))
    force.setName(name)
    force.setUsesPeriodicBoundaryConditions(periodic)
    return force


def _take_particles(system: openmm.System, true: openmm.System) -> None:
    if true.getNumParticles() != system.getNumParticles():
        raise ConfigError(
            f"the corrector has {true.getNumParticles()} particles, the topology {system.getNumParticles()} atoms: "
            "make both for the same molecule"
        )
    for i in range(true.getNumParticles()):
        system.setParticleMass(i, true.getParticleMass(i))
    for i in range(true.getNumConstraints()):
        system.addConstraint(*true.getConstraintParameters(i))


def _copy(force: openmm.Force) -> openmm.Force:
    try:
        return copy.deepcopy(force)
    except openmm.OpenMMException as error:
        raise ConfigError(
            f"the force {force.getName()} of the corrector cannot be copied ({error}): give the Force itself, before "
            "it is added to any System"
        ) from error


def _read(path: Path) -> openmm.System:
    try:
        found = openmm.XmlSerializer.deserialize(path.read_text())
    except (OSError, openmm.OpenMMException) as error:
        raise ConfigError(f"cannot read the corrector {path}: {error}") from None
    if not isinstance(found, openmm.System):
        raise ConfigError(f"{path} is a serialized {type(found).__name__}; wanted: a System")
    return found
