"""Calculators and artifacts as functions of positions, which is what the propagators of the core take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator

from mlff_ase.structures import to_structure
from mlff_engines.artifact import load
from mlff_engines.kstep.particles import Evaluation, ForceField
from mlff_engines.structure import FloatArray


def calculator_field(calculator: Calculator, scratch: Atoms) -> ForceField:
    """`calculator` as a function of positions; the cell and all else are those of `scratch`."""

    def field(x: FloatArray) -> Evaluation:
        scratch.positions = x
        forces = calculator.get_property("forces", scratch)
        energy = calculator.results.get("energy", np.nan)  # comes with forces, or is not needed
        return Evaluation(float(energy), np.array(forces, dtype=np.float64))

    return field


def artifact_field(path: str | Path, atoms: Atoms) -> ForceField:
    """The same of an artifact, without a calculator's bookkeeping, which takes as long as a small student."""
    evaluate = load(path).evaluator(outside="ignore")
    first = to_structure(atoms)

    def field(x: FloatArray) -> Evaluation:
        found = evaluate(replace(first, positions=x))
        return Evaluation(found.energy, found.forces)

    return field
