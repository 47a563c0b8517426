"""OpenMM as the judge sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import openmm
from openmm import app, unit

from mlff_engines.artifact import load
from mlff_engines.errors import MLFFError, SimulationError, StructureError
from mlff_engines.manifest import Dtype
from mlff_engines.neighbors import SKIN
from mlff_engines.structure import FloatArray, Result, Structure
from mlff_engines.units import energy_unit, length_unit
from mlff_engines.validation.engine import Dynamics, Trajectory
from mlff_engines.validation.result import CheckResult, Claims, Evaluate
from mlff_openmm.boxes import Box
from mlff_openmm.force import MLFFForce

NM = length_unit("nm")  # Å
KJ_PER_MOL = energy_unit("kJ/mol")  # eV
FORCE = KJ_PER_MOL / NM  # kJ/mol/nm in eV/Å
VELOCITY = NM * 1e-3  # nm/ps in Å/fs
KEPT = 16  # contexts


class OpenMMEngine:
    """An artifact through `MLFFForce` on the Reference platform, which is in double precision. See `MakeEngine`.

    NVE is velocity Verlet as a `CustomIntegrator`: OpenMM's own Verlet integrator has its velocities half a step away
    from its positions. NVT is `LangevinMiddleIntegrator`, with the velocities that OpenMM reports: those of its
    middle scheme, whose distribution is that of the temperature to a higher order than that of on-step velocities
    (Zhang et al., J. Phys. Chem. A 123, 6056 (2019)).

    Boxes are turned and reduced to OpenMM's form, and results turned back; the frames in the DCD file stay turned.
    Slabs and wires become boxes with more vacuum than the cutoff, for single evaluations only.
    """

    name = "openmm"
    offers = frozenset({"energy", "forces"})
    suffix = ".dcd"

    def __init__(
        self, artifact: Path, *, folder: Path, device: str = "cpu", dtype: Dtype | None = None, skin: float = SKIN
    ) -> None:
        self._path, self._device, self._dtype, self._skin = artifact, device, dtype, skin
        self._artifact = load(artifact, device, dtype)  # refuses now what no force could be made of
        self.dtype: Dtype = dtype or self._artifact.manifest.dtype
        self._contexts: dict[tuple[bytes, bool, float, float], openmm.Context] = {}

    def evaluate(self, structure: Structure) -> Result:
        """What the State of a Context says; `Result` fields other than energy and forces are not a number."""
        box = Box.of(structure, vacuum=2 * self._artifact.manifest.cutoff)
        try:
            context = self._context(structure, box)
            if box.vectors is not None:
                context.setPeriodicBoxVectors(*box.vectors / NM)
            context.setPositions(structure.positions @ box.rotation / NM)
            state = context.getState(energy=True, forces=True)
        except openmm.OpenMMException as error:
            raise StructureError(str(error)) from error
        atoms = len(structure)
        forces = state.getForces(asNumpy=True).value_in_unit(unit.kilojoules_per_mole / unit.nanometer)
        return Result(
            state.getPotentialEnergy().value_in_unit(unit.kilojoules_per_mole) * KJ_PER_MOL,
            np.full(atoms, np.nan),
            forces * FORCE @ box.rotation.T,
            np.full((3, 3), np.nan),
        )

    def run(self, dynamics: Dynamics, file: Path) -> Trajectory:
        """Velocity Verlet or `LangevinMiddleIntegrator` into a DCD file."""
        start = dynamics.structure
        if start.pbc.any() and not start.pbc.all():
            raise SimulationError(f"pbc {start.pbc.tolist()}: OpenMM is periodic along three axes or none")
        box = Box.of(start, vacuum=0.0)
        integrator = _velocity_verlet(dynamics) if dynamics.temperature is None else _langevin(dynamics)
        samples: list[tuple[float, float, float, FloatArray, FloatArray]] = []
        try:
            topology, system = self._system(start, box, dynamics.masses)
            context = openmm.Context(system, integrator, openmm.Platform.getPlatform("Reference"))
            context.setPositions(start.positions @ box.rotation / NM)
            context.setVelocities(dynamics.velocities @ box.rotation / VELOCITY)
            with file.open("wb") as stream:
                written = app.DCDFile(stream, topology, dynamics.timestep * unit.femtosecond, interval=dynamics.every)
                for sample in range(dynamics.samples):
                    if sample:
                        integrator.step(dynamics.every)
                    potential, kinetic, positions, velocities = _sample(context, fresh=sample == 0)
                    written.writeModel(positions * unit.nanometer, periodicBoxVectors=topology.getPeriodicBoxVectors())
                    samples.append(
                        (
                            sample * dynamics.every * dynamics.timestep,
                            potential * KJ_PER_MOL,
                            kinetic * KJ_PER_MOL,
                            positions @ box.rotation.T * NM,
                            velocities @ box.rotation.T * VELOCITY,
                        )
                    )
        except (openmm.OpenMMException, MLFFError) as error:
            raise SimulationError(f"after {len(samples)} samples: {error}") from error
        times, potentials, kinetics, x, v = (np.array(column) for column in zip(*samples, strict=True))
        return Trajectory(times, potentials, kinetics, x, v, file=file)

    def versions(self) -> Mapping[str, str]:
        """Of OpenMM."""
        return {"openmm": str(openmm.__version__), "openmm platform": "Reference"}

    def own_checks(self, expected: Evaluate, claims: Claims) -> Mapping[str, Callable[[], CheckResult]]:
        """D6, through OpenMM-ML."""
        from mlff_openmm.end_points import check_end_points  # OpenMM-ML may be missing

        return {"D6": lambda: check_end_points(self._path, expected, claims, dtype=self.dtype)}

    def _system(self, structure: Structure, box: Box, masses: FloatArray) -> tuple[app.Topology, openmm.System]:
        topology, system = app.Topology(), openmm.System()
        residue = topology.addResidue("MOL", topology.addChain())
        for number, mass in zip(structure.numbers, masses, strict=True):
            element = app.Element.getByAtomicNumber(int(number))
            topology.addAtom(element.symbol, element, residue)
            system.addParticle(mass)
        if box.vectors is not None:
            topology.setPeriodicBoxVectors(box.vectors / NM * unit.nanometer)
            system.setDefaultPeriodicBoxVectors(*box.vectors / NM)
        force = MLFFForce(
            self._path,
            topology,
            charge=structure.charge,
            spin=structure.spin,
            device=self._device,
            dtype=self._dtype,
            skin=self._skin / NM,
            outside="ignore",
        )
        system.addForce(force)
        return topology, system

    def _context(self, structure: Structure, box: Box) -> openmm.Context:
        key = structure.numbers.tobytes(), box.vectors is not None, structure.charge, structure.spin
        context = self._contexts.pop(key, None)
        if context is None:
            system = self._system(structure, box, np.ones(len(structure)))[1]
            context = openmm.Context(system, openmm.VerletIntegrator(0.0), openmm.Platform.getPlatform("Reference"))
        self._contexts[key] = context  # the last is the latest used
        if len(self._contexts) > KEPT:
            del self._contexts[next(iter(self._contexts))]
        return context


def _velocity_verlet(dynamics: Dynamics) -> openmm.CustomIntegrator:
    """Positions, velocities and both energies at the same time, with one evaluation of the forces per step."""
    integrator = openmm.CustomIntegrator(dynamics.timestep * unit.femtosecond)
    for energy in ("potential", "kinetic"):
        integrator.addGlobalVariable(energy, 0.0)
    integrator.addUpdateContextState()
    integrator.addComputePerDof("v", "v + dt*f/(2*m)")
    integrator.addComputePerDof("x", "x + dt*v")
    integrator.addComputePerDof("v", "v + dt*f/(2*m)")
    integrator.addComputeGlobal("potential", "energy")
    integrator.addComputeSum("kinetic", "m*v*v/2")
    return integrator


def _langevin(dynamics: Dynamics) -> openmm.LangevinMiddleIntegrator:
    integrator = openmm.LangevinMiddleIntegrator(
        dynamics.temperature * unit.kelvin, dynamics.friction / unit.picosecond, dynamics.timestep * unit.femtosecond
    )
    integrator.setRandomNumberSeed(dynamics.seed + 1)  # to OpenMM, 0 is a seed of its own choice
    return integrator


def _sample(context: openmm.Context, fresh: bool) -> tuple[float, float, FloatArray, FloatArray]:
    """Potential and kinetic energy (kJ/mol), positions (nm) and velocities (nm/ps)."""
    integrator = context.getIntegrator()
    kept = isinstance(integrator, openmm.CustomIntegrator) and not fresh  # a State would evaluate the forces again
    state = context.getState(positions=True, velocities=True, energy=not kept)
    if kept:
        potential, kinetic = (integrator.getGlobalVariableByName(name) for name in ("potential", "kinetic"))
    else:
        potential, kinetic = (
            energy.value_in_unit(unit.kilojoules_per_mole)
            for energy in (state.getPotentialEnergy(), state.getKineticEnergy())
        )
    return (
        potential,
        kinetic,
        state.getPositions(asNumpy=True).value_in_unit(unit.nanometer),
        state.getVelocities(asNumpy=True).value_in_unit(unit.nanometer / unit.picosecond),
    )
