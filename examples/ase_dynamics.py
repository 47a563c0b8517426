"""Langevin dynamics of a student in ASE, with the frames in an ASE trajectory.

python examples/ase_dynamics.py runs/ethanol/student.pt examples/ethanol.xyz [--smoke]
"""

import argparse
from pathlib import Path

import ase.io
from ase import units
from ase.io.trajectory import Trajectory
from ase.md.langevin import Langevin

from mlff_ase import MLFFCalculator

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("student", type=Path)
parser.add_argument("structure", type=Path)
parser.add_argument("--out", type=Path, default=Path("langevin.traj"))
parser.add_argument("--temperature", type=float, default=300.0, help="K")
parser.add_argument("--steps", type=int, default=20_000)
parser.add_argument("--smoke", action="store_true", help="a few steps only")
arguments = parser.parse_args()

atoms = ase.io.read(arguments.structure)
atoms.calc = MLFFCalculator(arguments.student)
dynamics = Langevin(atoms, 0.5 * units.fs, temperature_K=arguments.temperature, friction=0.01 / units.fs)
with Trajectory(arguments.out, "w", atoms) as trajectory:
    dynamics.attach(trajectory.write, interval=20)
    dynamics.attach(
        lambda: print(
            f"{dynamics.get_time() / (1e3 * units.fs):8.3f} ps {atoms.get_temperature():7.1f} K "
            f"{atoms.get_potential_energy():14.5f} eV"
        ),
        interval=1000,
    )
    dynamics.run(40 if arguments.smoke else arguments.steps)
