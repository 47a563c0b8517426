"""What a step costs in LAMMPS, by the plug-in and by ML-IAP, beside the artifact in a plain loop of velocity Verlet.

mlff lammps build                                  (once: LAMMPS with pair_style mliap unified)
python examples/benchmarks/lammps_cost.py runs/deepmd_water/student.pt

Liquid water, NVE, 0.5 fs, one thread per process. The ways take turns, so that all see the same machine; each figure is
the median over the rounds. CPU time is that of all processes together: it says what the machine has to do; wall time
depends on what else runs. The ghost factor is the number of atoms that the plug-in evaluates, or of owned and ghost
atoms that ML-IAP is given, over the number in the box. Prints a table for docs/benchmarks.md. `--smoke` tries the path.
"""

import argparse
import os
import re
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mlff_engines.artifact import load, recast
from mlff_engines.errors import MissingEngineError
from mlff_engines.manifest import inspect
from mlff_engines.validation.builtin import water_box
from mlff_engines.validation.core_engine import CoreEngine
from mlff_engines.validation.engine import Dynamics, thermal
from mlff_lammps.deck import Placed, write_data
from mlff_lammps.mliap import write_mliap
from mlff_lammps.plugin import build_plugin
from mlff_lammps.run import Installation, built, stock

STEPS = {8: 100, 64: 20, 512: 6, 4096: 3}  # by number of molecules
TIMESTEP, SKIN = 0.5, 1.0  # fs, Å


@dataclass
class Cost:
    """Of one step, in ms, and the number of atoms evaluated."""

    cpu: float
    wall: float
    evaluated: float


class Bare:
    """The artifact's evaluator, called by velocity Verlet."""

    name, ranks = "artifact", 1

    def __init__(self, artifact: Path, dynamics: Dynamics, folder: Path) -> None:
        self.dynamics, self.folder = dynamics, folder
        self.engine = CoreEngine(load(artifact).evaluator(skin=SKIN, outside="ignore"))

    def measure(self) -> Cost:
        self.engine.evaluate(self.dynamics.structure)  # neighbour list, first call
        cpu, wall = time.process_time(), time.perf_counter()
        self.engine.run(self.dynamics, self.folder / "bare.npz")
        evaluations = self.dynamics.steps + 1
        spent = time.process_time() - cpu, time.perf_counter() - wall
        return Cost(*(1e3 * seconds / evaluations for seconds in spent), len(self.dynamics.structure))


class Lammps:
    """A deck, run as a user runs it."""

    def __init__(
        self, name: str, pair: str, installation: Installation, dynamics: Dynamics, ranks: int, folder: Path
    ) -> None:
        self.name, self.ranks, self.folder, self.installation = name, ranks, folder, installation
        self.atoms, self.steps = len(dynamics.structure), dynamics.steps
        placed = Placed.of(dynamics.structure)
        symbols = write_data(folder / "water.data", dynamics.structure, placed, dynamics.masses, dynamics.velocities)
        (folder / "in.deck").write_text(
            f"""units metal
read_data water.data
{pair.format(elements=" ".join(symbols))}
neighbor {SKIN} bin
neigh_modify every 1 delay 0 check yes
timestep {TIMESTEP * 1e-3}
fix move all nve
run 1
run {self.steps}
"""
        )

    def measure(self) -> Cost:
        done = subprocess.run(
            self.installation.command(["-in", "in.deck"], self.ranks),
            cwd=self.folder,
            env={**self.installation.environment, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        log = done.stdout
        wall = 1e3 * float(re.findall(r"Loop time of (\S+)", log)[-1]) / self.steps
        used = float(re.findall(r"(\S+)% CPU use", log)[-1]) / 100  # of each process, on average
        evaluated = re.findall(r"the last step evaluated (\d+\S*) atoms", log)
        ghosts = self.ranks * float(re.findall(r"Nghost:\s+(\S+) ave", log)[-1])
        return Cost(wall * used * self.ranks, wall, float(evaluated[-1]) if evaluated else self.atoms + ghosts)


def ways(artifact: Path, molecules: int, all_ranks: list[int], folder: Path) -> list[Bare | Lammps]:
    structure = water_box(molecules)
    dynamics = thermal(Dynamics(structure, np.zeros_like(structure.positions), TIMESTEP, STEPS[molecules]), 300.0, 0)
    manifest = inspect(artifact)
    reach = manifest.layers * manifest.cutoff + SKIN
    program = artifact
    loaded = load(artifact)
    if loaded.kernel == "fused":
        program = folder / "fused.pt"
        recast(loaded, program)
    write_mliap(artifact, folder / "student.mliap", overwrite=True)
    plugin = f'plugin load "{build_plugin(echo=print)}"\npair_style mlff "{program}" outside ignore'
    mliap = f'pair_style mliap unified "{folder / "student.mliap"}" 1\ncomm_modify cutoff {reach}'
    found: list[Bare | Lammps] = [Bare(artifact, dynamics, folder)]
    for ranks in all_ranks:
        for name, pair, installed in (("mlff", plugin, stock), ("mliap", mliap, built)):
            try:
                installation = installed()
            except MissingEngineError as error:
                print(f"without {name}: {error}")
                continue
            own = folder / f"{molecules}-{name}-{ranks}"
            own.mkdir()
            pair_commands = f"{pair}\npair_coeff * * {{elements}}"
            found.append(Lammps(f"`pair_style {name}`", pair_commands, installation, dynamics, ranks, own))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--molecules", type=int, nargs="+", choices=STEPS, default=[64, 512, 4096])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args()
    if given.smoke:
        given.molecules, given.ranks, given.rounds = [8], [1], 1
    torch.set_num_threads(1)
    artifact = given.artifact.absolute()
    manifest = inspect(artifact)
    print(
        f"{manifest.architecture}, {manifest.layers} layers x {manifest.cutoff:g} Å, {manifest.dtype}, "
        f"kernel {load(artifact).kernel}; load of the machine {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n"
    )
    print("| atoms | | processes | ghost factor | CPU time, ms/step | beside the artifact | wall time, ms/step |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for molecules in given.molecules:
            measured: dict[int, list[Cost]] = defaultdict(list)
            every = ways(artifact, molecules, given.ranks, Path(scratch))
            for _ in range(given.rounds):
                for place, way in enumerate(every):
                    measured[place].append(way.measure())
            base = statistics.median([cost.cpu for cost in measured[0]])
            for place, way in enumerate(every):
                cpu, wall, evaluated = (
                    statistics.median([getattr(cost, name) for cost in measured[place]])
                    for name in ("cpu", "wall", "evaluated")
                )
                factor = evaluated / (3 * molecules)
                print(
                    f"| {3 * molecules:,} | {way.name} | {way.ranks} | {factor:.2f} | {cpu:.4g} | {cpu / base:.2f} "
                    f"| {wall:.4g} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
