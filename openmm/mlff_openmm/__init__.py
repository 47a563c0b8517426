"""Run an artifact in OpenMM: `MLFFForce`, the potential "mlff" of OpenMM-ML, and large steps with a corrector."""

from mlff_openmm.force import MLFFForce
from mlff_openmm.kstep.corrector import meter_of
from mlff_openmm.kstep.hybrid import hybrid_integrator

__all__ = ["MLFFForce", "hybrid_integrator", "meter_of"]
