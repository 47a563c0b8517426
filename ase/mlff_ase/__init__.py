"""Run an artifact in ASE."""

from mlff_ase.calculator import MLFFCalculator
from mlff_ase.kstep import KStepDynamics

__all__ = ["KStepDynamics", "MLFFCalculator"]
