"""What is kept of a run of `mlff kstep run`, and what its frames have for true energies."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import openmm

from mlff_engines.errors import SimulationError
from mlff_engines.kstep.temperature import configurational
from mlff_engines.structure import FloatArray
from mlff_engines.units import length_unit
from mlff_openmm.kstep.corrector import STUDENT_GROUP
from mlff_openmm.kstep.prepare import Prepared
from mlff_openmm.kstep.simulations import Recipe, Simulation

NM = length_unit("nm")  # Å
PROBE = 5e-4  # nm, of finite differences

_contexts: dict[str, openmm.Context] = {}  # one for all runs of a molecule: it takes longer to make than a short run


class TrueForces:
    """Of frames, afterwards, and not counted."""

    def __init__(self, molecule: Prepared) -> None:
        key = molecule.record["sha256"]["system"]
        if key not in _contexts:
            platform = openmm.Platform.getPlatform("Reference")
            _contexts[key] = openmm.Context(molecule.load_moving()[1], openmm.VerletIntegrator(0.0), platform)
        self._context = _contexts[key]

    def __call__(self, x: FloatArray) -> tuple[float, FloatArray]:
        """kJ/mol and (N, 3) kJ/mol/nm at `x` in nm."""
        self._context.setPositions(x)
        state = self._context.getState(energy=True, forces=True)
        return state.getPotentialEnergy()._value, state.getForces(asNumpy=True)._value


class Samples:
    """What one simulation gave, see `mlff_openmm.kstep.run`."""

    def __init__(self, atoms: int) -> None:
        self._shape = (0, atoms, 3)
        self.times: list[float] = []
        self.xs: list[FloatArray] = []
        self.vs: list[FloatArray] = []
        self.kicks: list[FloatArray] = []
        self.temperatures: list[tuple[float, float]] = []
        self.potentials: list[float] = []
        self.kinetics: list[float] = []
        self.problem, self.seconds = "", 0.0
        self.calls = {"marginal": 0, "all": 0}
        self.counts: Mapping[str, int] = {}

    def add(self, moment: float, x: FloatArray, v: FloatArray) -> None:
        """A frame at `moment` ps, in nm and nm/ps."""
        self.times.append(moment)
        self.xs.append(x)
        self.vs.append(v)

    def evaluate(self, recipe: Recipe, simulation: Simulation, *, thermostat: bool) -> None:
        """True energies of the frames; with a thermostat, kicks and what the configurational temperature needs."""
        true, particles, rng = TrueForces(recipe.molecule), simulation.particles, np.random.default_rng(0)
        inverse, half = 1 / particles.masses[:, None], 0.5e-3 * recipe.config.time_step(recipe.variant)
        for x, v in zip(self.xs, self.vs, strict=True):
            potential, forces = true(x)
            self.potentials.append(potential)
            self.kinetics.append(0.5 * float((v**2 / inverse).sum()))
            if not thermostat:
                continue
            impulse = half * forces
            if recipe.variant.kind in ("C", "student"):
                simulation.context.setPositions(x)
                of_student = simulation.context.getState(forces=True, groups={STUDENT_GROUP})
                student = of_student.getForces(asNumpy=True)._value
                outer = 0.5 * recipe.macro_step if recipe.variant.kind == "C" else 0.0
                impulse = half * student + outer * (forces - student)
            self.kicks.append(particles.tangent(x * NM, impulse * inverse))
            try:
                found = configurational(particles, lambda y: true(y)[1], x, forces, PROBE, rng)
            except SimulationError:  # constraints that fell apart
                found = np.nan, np.nan
            self.temperatures.append(found)

    @property
    def simulated(self) -> float:
        """ps."""
        return self.times[-1] if self.times else 0.0

    time = property(lambda self: np.array(self.times))
    pos = property(lambda self: np.array(self.xs).reshape(-1, *self._shape[1:]))
    vel = property(lambda self: np.array(self.vs).reshape(-1, *self._shape[1:]))
    kick = property(lambda self: np.array(self.kicks).reshape(-1, *self._shape[1:]))
    slope = property(lambda self: np.array(self.temperatures).reshape(-1, 2)[:, 0])
    curvature = property(lambda self: np.array(self.temperatures).reshape(-1, 2)[:, 1])
    potential = property(lambda self: np.array(self.potentials))
    kinetic = property(lambda self: np.array(self.kinetics))
