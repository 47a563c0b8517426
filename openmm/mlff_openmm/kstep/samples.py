"""What is kept of a run of `mlff kstep run`, and what its frames have for true energies."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import openmm
from openmm import app

from mlff_engines.structure import FloatArray
from mlff_openmm.kstep.prepare import Prepared


def load_true(molecule: Prepared) -> tuple[app.PDBFile, openmm.System]:
    """Topology and System, the latter without removal of net momentum, which is a degree of freedom like any other."""
    pdb, system = molecule.load()
    for index in reversed(range(system.getNumForces())):
        if isinstance(system.getForce(index), openmm.CMMotionRemover):
            system.removeForce(index)
    return pdb, system


class TrueForces:
    """Of frames, afterwards; one Context for all runs of a molecule, for it takes longer to make than a short run."""

    def __init__(self, molecule: Prepared) -> None:
        self._molecule = molecule
        self._context: openmm.Context | None = None

    def __call__(self, x: FloatArray) -> tuple[float, FloatArray]:
        """kJ/mol and (N, 3) kJ/mol/nm at `x` in nm."""
        if self._context is None:
            platform = openmm.Platform.getPlatform("Reference")
            self._context = openmm.Context(load_true(self._molecule)[1], openmm.VerletIntegrator(0.0), platform)
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

    @property
    def simulated(self) -> float:
        """ps."""
        return self.times[-1] if self.times else 0.0

    time = property(lambda self: np.array(self.times))
    pos = property(lambda self: np.array(self.xs).reshape(-1, *self._shape[1:]))
    vel = property(lambda self: np.array(self.vs).reshape(-1, *self._shape[1:]))
    kick = property(lambda self: np.array(self.kicks).reshape(-1, *self._shape[1:]))
    potential = property(lambda self: np.array(self.potentials))
    kinetic = property(lambda self: np.array(self.kinetics))
