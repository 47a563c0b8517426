"""A first student in ten lines: methanol from GFN2-xTB. `--smoke` tries the path in seconds."""

import sys
from pathlib import Path

from ase.build import molecule

from mlff_ase import MLFFCalculator
from mlff_training.distill import DistillConfig, distill, smoke

config = smoke(DistillConfig()) if "--smoke" in sys.argv else DistillConfig()
student, trial = distill([molecule("CH3OH")], config, Path("runs/methanol"))
print(f"force MAE on unseen teacher trajectories, meV/Å: {trial.force_mae}")

atoms = molecule("CH3OH")
atoms.calc = MLFFCalculator(student)
print(f"energy {atoms.get_potential_energy():.4f} eV, largest force {abs(atoms.get_forces()).max():.3f} eV/Å")
