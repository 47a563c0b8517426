"""Run an artifact in OpenMM: `MLFFForce`, and the potential "mlff" of OpenMM-ML."""

from mlff_openmm.force import MLFFForce

__all__ = ["MLFFForce"]
