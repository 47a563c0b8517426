"""Variants A and D in OpenMM: what no `CustomIntegrator` can do, as loops around one living Context.

A jump is a network of its own, and a Metropolis step compares true energies: both move the positions from outside.
Constraints are projected by the Context from where a jump put the atoms; projection along the bonds before the jump,
as `ConstrainPositions` of an integrator does it, fails silently when they have turned too far.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from openmm import app, unit

from mlff_engines.errors import ConfigError, SimulationError, StructureError, suggest
from mlff_engines.kstep.jumps import Corrector, Displacement, Jump, land
from mlff_engines.kstep.metropolis import LengthAdaptation, jittered, metropolis
from mlff_engines.kstep.particles import Bath, Particles
from mlff_engines.structure import FloatArray, Structure
from mlff_engines.units import energy_unit, length_unit
from mlff_openmm.kstep.corrector import STUDENT_GROUP, count_calls, meter_of
from mlff_openmm.kstep.hybrid import TOLERANCE, particles_of
from mlff_openmm.kstep.simulate import velocity_verlet

NM = length_unit("nm")  # Å
VELOCITY = NM * 1e-3  # nm/ps in Å/fs
KJ_PER_MOL = energy_unit("kJ/mol")  # eV
MET = 1e-4  # relative; what a projected bond may be off at most
CORRECTORS = ("A1", "A2")


class Living:
    """A Context whose state is set and read as arrays.

    Attributes:
        context: of OpenMM; its positions and velocities are those after the last step.
        particles: masses and constraints.
        meter: calls of the true potential by purpose, those by anyone who uses the System included.
    """

    def __init__(
        self, system: openmm.System, integrators: list[openmm.Integrator], platform: str, positions: Any
    ) -> None:
        self.particles: Particles = particles_of(system)
        self.integrator = openmm.CompoundIntegrator()
        for integrator in integrators:
            integrator.setConstraintTolerance(TOLERANCE)
            self.integrator.addIntegrator(integrator)
        self.context = openmm.Context(system, self.integrator, openmm.Platform.getPlatform(platform))
        self.meter = meter_of(system)
        self.context.setPositions(positions)
        self.context.applyConstraints(TOLERANCE)

    def thermalise(self, temperature: float, rng: np.random.Generator) -> None:
        """New velocities at `temperature` K."""
        x, _ = self.state()
        self.put(x, self.particles.thermal(x, temperature, rng))

    def state(self) -> tuple[FloatArray, FloatArray]:
        """Positions (N, 3) Å and velocities Å/fs."""
        state = self.context.getState(positions=True, velocities=True)
        return state.getPositions(asNumpy=True)._value * NM, state.getVelocities(asNumpy=True)._value * VELOCITY

    def put(self, x: FloatArray, v: FloatArray) -> None:
        """Positions in Å and velocities in Å/fs, as they are."""
        self.context.setPositions(x / NM)
        self.context.setVelocities(v / VELOCITY)

    def project(self) -> None:
        """Positions and velocities onto the constraints.

        Raises:
            SimulationError: they cannot be met from here.
        """
        bonds = self.particles.constraints
        if bonds is None:
            return
        self.context.applyConstraints(TOLERANCE)
        self.context.applyVelocityConstraints(TOLERANCE)
        x, _ = self.state()
        off = np.abs(np.linalg.norm(bonds.vectors(x), axis=1) / bonds.lengths - 1)
        worst = int(np.argmax(np.nan_to_num(off, nan=np.inf)))
        if not off[worst] < MET:
            raise SimulationError(
                f"the jump cannot be brought back onto the constraints: bond {bonds.pairs[worst].tolist()} is off by "
                f"{off[worst]:.1%} after projection. Use shorter jumps, or train the jump further"
            )


@dataclass
class JumpCounts:
    """What happened besides jumps: atoms at the bound of the jump, and macro-steps made by true dynamics instead."""

    clamp_hits: int = 0
    fallbacks: int = 0


class JumpDynamics(Living):
    """Variant A: a learned jump of k time steps, then one step of the true force at the time step. Approximate.

    A1 corrects by drift-kick-drift, one true call; A2 by velocity Verlet, two. A jump that meets its bound is not
    taken: true velocity Verlet makes that macro-step.

    Args:
        topology: of `system`.
        system: the true potential; a force that counts its calls is added.
        jump: the path of the artifact of a jump, or a function of positions (N, 3) Å and velocities Å/fs.
        positions: Quantity or nm.
        steps: k.
        dt: ps, the time step of the jump and of the corrector.
        corrector: "A1" or "A2"; None: jumps alone, which no true force corrects.
        temperature, friction: K and 1/ps; noise about each macro-step. None: none.
        seed: of the noise.
        platform: of OpenMM.

    Raises:
        ConfigError: bad arguments, or a jump made for another time step, k, masses or constraints.
        SimulationError: when run: positions that no jump can be asked for, a jump that is not finite, or that cannot be
            brought back onto the constraints.
    """

    def __init__(
        self,
        topology: app.Topology,
        system: openmm.System,
        jump: str | Path | Jump,
        *,
        positions: Any,
        steps: int,
        dt: float,
        corrector: Corrector | None = "A1",
        temperature: float | None = None,
        friction: float | None = None,
        seed: int = 0,
        platform: str = "Reference",
    ) -> None:
        if corrector is not None and corrector not in CORRECTORS:
            raise ConfigError(f"corrector {corrector!r}{suggest(corrector, CORRECTORS)}")
        if steps < 1 or not dt > 0:
            raise ConfigError(f"{steps} steps of {1e3 * dt:g} fs; allowed: 1 step or more, above 0 fs")
        if friction is not None and temperature is None:
            raise ConfigError("friction without a temperature: pass both, or neither")
        count_calls(system)
        verlet = velocity_verlet(dt)
        super().__init__(
            system, [drift_kick_drift(dt) if corrector == "A1" else velocity_verlet(dt), verlet], platform, positions
        )
        self.steps, self.dt, self.counts = steps, dt, JumpCounts()
        self._true_steps = int(corrector is not None)
        self._jump = self._fitting(Path(jump), topology, temperature) if isinstance(jump, str | Path) else jump
        self._bath: Bath | None = None
        if temperature is not None and friction is not None:
            self._bath = Bath(temperature, 1e-3 * friction, np.random.default_rng(seed))

    @property
    def macro_step(self) -> float:
        """ps."""
        return (self.steps + self._true_steps) * self.dt

    def step(self, count: int = 1) -> None:
        """Macro-steps."""
        for _ in range(count):
            x, v = self.state()
            v = self._noise(x, v)
            displacement = self._jump(x, v)
            if displacement.clamped:
                self.counts.clamp_hits += displacement.clamped
                self.counts.fallbacks += 1
                self.put(x, v)
                self.integrator.setCurrentIntegrator(1)
                with self.meter.purpose("fallback"):
                    self.integrator.step(self.steps + self._true_steps)
            else:
                self.put(*land(Particles(self.particles.masses), x, v, displacement))
                self.project()
                self.integrator.setCurrentIntegrator(0)
                self.integrator.step(self._true_steps)
            if self._bath is not None:
                x, v = self.state()
                self.context.setVelocities(self._noise(x, v) / VELOCITY)

    def _noise(self, x: FloatArray, v: FloatArray) -> FloatArray:
        return v if self._bath is None else self._bath(self.particles, x, v, 1e3 * self.macro_step / 2)

    def _fitting(self, path: Path, topology: app.Topology, temperature: float | None) -> Jump:
        from mlff_engines.kstep.learned import LearnedJump

        learned = LearnedJump.load(path)
        numbers = np.array([atom.element.atomic_number for atom in topology.atoms()])
        learned.require(numbers, self.particles.masses, 1e3 * self.dt, self.steps, self._constraints(topology))

        def jump(x: FloatArray, v: FloatArray) -> Displacement:
            try:
                return learned(Structure(numbers, x), v, temperature)
            except StructureError as error:  # not finite, or beyond all bounds: elements are known here
                raise SimulationError(f"{error}. Use shorter jumps, or train the jump further") from error

        return jump

    def _constraints(self, topology: app.Topology) -> str:
        """As the manifest of a jump calls them."""
        bonds = self.particles.constraints
        if bonds is None:
            return "none"
        hydrogen = {
            frozenset((one.index, two.index))
            for one, two in topology.bonds()
            if app.element.hydrogen in (one.element, two.element)
        }
        return "hbonds" if hydrogen == {frozenset(pair) for pair in bonds.pairs.tolist()} else "bonds"


@dataclass
class Proposals:
    """Of a sampler, those of the burn-in apart."""

    made: int = 0
    accepted: int = 0
    failed: int = 0
    burn_in: int = 0

    @property
    def acceptance(self) -> float:
        """After the burn-in."""
        return self.accepted / self.made if self.made else float("nan")


class MetropolisSampler(Living):
    """Variant D: student trajectories as proposals, accepted on the true energy: exact configurations, any student.

    One true energy per proposal. The student's trajectory is RATTLE'd velocity Verlet in its force group.

    Args:
        system: made with a `corrector`, see `mlff_openmm.potential.MLFFPotentialImpl`.
        positions: Quantity or nm.
        dt: ps, inner time step.
        steps: length of a trajectory.
        temperature: K.
        friction: 1/ps: velocities keep exp(-friction·time) between proposals; None: they are drawn anew.
        burn_in: proposals in which the length is adapted to `acceptance`; discard their samples.
        acceptance: aimed at in the burn-in.
        jitter: lengths are drawn from steps·(1 ± jitter).
        longest: the most steps that the burn-in may choose.
        seed: of all random numbers.
        platform: of OpenMM.

    Raises:
        ConfigError: no corrector, or bad arguments.
        SimulationError: the true energy at the start is not finite.
    """

    def __init__(
        self,
        system: openmm.System,
        *,
        positions: Any,
        dt: float,
        steps: int,
        temperature: float,
        friction: float | None = None,
        burn_in: int = 0,
        acceptance: float = 0.65,
        jitter: float = 0.0,
        longest: int = 10_000,
        seed: int = 0,
        platform: str = "Reference",
    ) -> None:
        if steps < 1 or not dt > 0 or not temperature > 0 or not 0 <= jitter < 1 or (friction or 0) < 0:
            raise ConfigError(
                f"{steps} steps of {1e3 * dt:g} fs at {temperature:g} K, jitter {jitter:g}, friction {friction}; "
                "allowed: 1 step or more, above 0 fs, above 0 K, jitter from 0 to below 1, friction 0 or above"
            )
        meter_of(system)  # refuses one without corrector
        super().__init__(system, [openmm.MTSIntegrator(dt, [(STUDENT_GROUP, 1)])], platform, positions)
        self.dt, self.temperature, self.proposals = dt, temperature, Proposals()
        self._friction, self._jitter, self._rng = friction, jitter, np.random.default_rng(seed)
        self._length, self._adaptation = float(steps), LengthAdaptation(burn_in, acceptance, 1, max(longest, steps))
        self._x, _ = self.state()
        self._v = np.zeros_like(self._x)
        with self.meter.purpose("start"):
            self.energy = self._true_energy(self._x)
        if not np.isfinite(self.energy):
            raise SimulationError("the true energy at the start is not finite: start from another configuration")

    @property
    def steps(self) -> float:
        """Length of a trajectory, as found in the burn-in."""
        return self._length

    def step(self, count: int = 1) -> None:
        """Proposals; the Context holds the state after the last, `energy` its true potential energy in eV."""
        for _ in range(count):
            self._propose()
        self.put(self._x, self._v)

    def _propose(self) -> None:
        steps = jittered(self._length, self._jitter, self._rng)
        kept = 0.0 if self._friction is None else float(np.exp(-self._friction * steps * self.dt))
        v = self.particles.refresh(self._x, self._v, self.temperature, kept, self._rng)

        def propose(x: FloatArray, v: FloatArray) -> tuple[FloatArray, FloatArray]:
            self.put(x, v)
            try:
                self.integrator.step(steps)
            except openmm.OpenMMException as error:
                raise SimulationError(str(error)) from error
            return self.state()

        outcome = metropolis(
            self.particles, self._x, v, self.energy, propose, self._true_energy, self.temperature, self._rng
        )
        self._x, self._v, self.energy = outcome.x, outcome.v, outcome.energy
        counts = self.proposals
        if counts.burn_in < self._adaptation.proposals:
            self._length = self._adaptation.next(self._length, outcome.work, self.temperature, counts.burn_in)
            counts.burn_in += 1
        else:
            counts.made += 1
            counts.accepted += outcome.accepted
        counts.failed += outcome.work == np.inf

    def _true_energy(self, x: FloatArray) -> float:
        self.context.setPositions(x / NM)
        try:
            energy = self.context.getState(energy=True).getPotentialEnergy()
        except openmm.OpenMMException as error:
            raise SimulationError(str(error)) from error
        return float(energy.value_in_unit(unit.kilojoules_per_mole)) * KJ_PER_MOL


def drift_kick_drift(dt: float) -> openmm.CustomIntegrator:
    """The position form of velocity Verlet at `dt` ps, RATTLE'd: one evaluation, and no force known beforehand."""
    integrator = openmm.CustomIntegrator(dt)
    integrator.addPerDofVariable("x1", 0)
    integrator.addUpdateContextState()
    for half in ("first", "second"):
        integrator.addComputePerDof("x", "x + dt/2*v")
        integrator.addComputePerDof("x1", "x")
        integrator.addConstrainPositions()
        integrator.addComputePerDof("v", "v + (x - x1)/(dt/2)")
        integrator.addConstrainVelocities()
        if half == "first":
            integrator.addComputePerDof("v", "v + dt*f/m")
            integrator.addConstrainVelocities()
    return integrator
