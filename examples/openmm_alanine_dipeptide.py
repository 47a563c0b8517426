"""Alanine dipeptide in water with OpenMM-ML: the peptide by a student, the water by TIP3P, and a Ramachandran plot.

python examples/openmm_alanine_dipeptide.py [student.pt] [--picoseconds 200] [--smoke]

Without a student for H, C, N and O, one of GFN2-xTB is made first, in runs/alanine_dipeptide.
"""

import argparse
import sys
from pathlib import Path

import matplotlib
import mdtraj
import numpy as np
from ase import Atoms
from ase.io import read
from openmm import LangevinMiddleIntegrator, Platform, Vec3, app, unit
from openmmml import MLPotential

from mlff_training.distill import DistillConfig, distill, smoke
from mlff_training.sampling.sample import Dynamics, SamplingConfig
from mlff_training.trial import TrialConfig

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STRUCTURE = Path(__file__).with_name("alanine_dipeptide.pdb")
PEPTIDE = list(range(22))
REGIONS = {  # (centre of phi, centre of psi) in degrees
    "C7eq": (-80, 75),
    "C5 and PPII": (-110, 150),
    "alpha R": (-75, -30),
    "alpha L": (60, 45),
}

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("student", type=Path, nargs="?")
parser.add_argument("--out", type=Path, default=Path("runs/alanine_dipeptide"))
parser.add_argument("--picoseconds", type=float, default=200.0)
parser.add_argument("--platform", default="CPU", help="of OpenMM: CPU, CUDA, OpenCL, ...")
parser.add_argument("--smoke", action="store_true", help="so little of everything that the result means nothing")
arguments = parser.parse_args()


def turned(phi: float, psi: float) -> Atoms:
    """The dipeptide with these torsions, in degrees."""
    atoms = read(STRUCTURE)
    atoms.set_dihedral(4, 6, 8, 14, phi, indices=range(9, 22))
    atoms.set_dihedral(6, 8, 14, 16, psi, indices=range(15, 22))
    return atoms


student = arguments.student
if student is None:
    # from all over the map, not from its minima: where a student has seen nothing it makes minima of its own
    sampling = SamplingConfig(
        relax=None, md=Dynamics(temperatures=(300.0, 700.0), seeds=(0,), steps=600, interval=10), select=2500
    )
    config = DistillConfig(
        sampling=sampling,
        train=DistillConfig().train.model_copy(update={"epochs": 60}),  # half an hour on one core
        trial=TrialConfig(temperatures=(300.0,), frames=10),
    )
    start = [turned(phi, psi) for phi in range(-150, 180, 60) for psi in range(-150, 180, 60)]
    if arguments.smoke:
        config, start = smoke(config), start[:1]
    student, _ = distill(start, config, arguments.out)

# 1. the whole System by a classical force field
pdb = app.PDBFile(str(STRUCTURE))
field = app.ForceField("amber14-all.xml", "amber14/tip3p.xml")
modeller = app.Modeller(pdb.topology, pdb.positions)
width = 1.9 if arguments.smoke else 2.6
modeller.addSolvent(field, boxSize=Vec3(width, width, width) * unit.nanometer)
classical = field.createSystem(
    modeller.topology, nonbondedMethod=app.PME, nonbondedCutoff=0.9 * unit.nanometer, constraints=app.HBonds
)

# 2. the peptide's own energy by the student; its bonds to hydrogen are free again
system = MLPotential("mlff", model=student).createMixedSystem(modeller.topology, classical, PEPTIDE)

# 3. dynamics as in any other OpenMM script
dt = 0.1 if arguments.smoke else 1.0  # fs: a student of two epochs makes forces that longer steps would not survive
integrator = LangevinMiddleIntegrator(300 * unit.kelvin, 1 / unit.picosecond, dt * unit.femtosecond)
simulation = app.Simulation(modeller.topology, system, integrator, Platform.getPlatform(arguments.platform))
simulation.context.setPositions(modeller.positions)
if not arguments.smoke:
    simulation.minimizeEnergy(maxIterations=500)
simulation.context.setVelocitiesToTemperature(300 * unit.kelvin, 1)
steps, interval = (40, 5) if arguments.smoke else (round(1000 * arguments.picoseconds / dt), 100)
arguments.out.mkdir(parents=True, exist_ok=True)
trajectory = arguments.out / "peptide.dcd"
simulation.reporters += [
    # not wrapped: without classical bonds, OpenMM would wrap every atom of the peptide by itself
    app.DCDReporter(str(trajectory), interval, atomSubset=PEPTIDE, enforcePeriodicBox=False),
    app.StateDataReporter(
        sys.stdout, steps // 20, step=True, potentialEnergy=True, temperature=True, speed=True, remainingTime=True,
        totalSteps=steps,
    ),
]  # fmt: skip
simulation.step(steps)

# 4. the map
frames = mdtraj.load(str(trajectory), top=str(STRUCTURE))
phi, psi = (np.degrees(angle(frames)[1][:, 0]) for angle in (mdtraj.compute_phi, mdtraj.compute_psi))
figure, axes = plt.subplots(figsize=(5, 4.5))
_, _, _, image = axes.hist2d(phi, psi, bins=60, range=[[-180, 180]] * 2, cmin=1, cmap="viridis")
figure.colorbar(image, label="frames")
axes.set(xlabel="φ / °", ylabel="ψ / °", xlim=(-180, 180), ylim=(-180, 180), aspect="equal")
axes.set_title(f"Alanine dipeptide in TIP3P water, {steps * dt / 1000:g} ps, 300 K", fontsize=10)
figure.tight_layout()
figure.savefig(arguments.out / "ramachandran.png", dpi=150)


def away(angle: np.ndarray, centre: float) -> np.ndarray:
    """Distance on the circle, degrees."""
    return np.abs((angle - centre + 180) % 360 - 180)


distances = np.array([np.hypot(away(phi, a), away(psi, b)) for a, b in REGIONS.values()])
for region, share in zip(
    REGIONS, np.bincount(distances.argmin(axis=0), minlength=len(REGIONS)) / len(phi), strict=True
):
    print(f"{share:6.1%} of {len(phi)} frames nearest to {region}")
print(f"{arguments.out / 'ramachandran.png'}")
