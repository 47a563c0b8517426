"""Run an artifact in ASE."""

from mlff_ase.calculator import MLFFCalculator

__all__ = ["MLFFCalculator"]
