"""What the tables of the fused kernel do to forces and to the conservation of energy: their resolution, swept.

python examples/benchmarks/table_error.py runs/ethanol/student.pt examples/ethanol.xyz

The kernel reads radial filters from piecewise polynomials (mlff_engines/kernels/table.py). They are continuous, but
their slopes, and with them the forces, jump at the ends of the intervals: by less than rounding at the resolution that
the kernel chooses for itself (the row marked with a star), visibly with much fewer intervals. The forces' error is that
beside plain torch in float64, over frames of the dynamics. The drift is the slope of the total energy over time in NVE
with velocity Verlet from the same start: mean and standard error over replicas. `--smoke` tries the path.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.io import read

from mlff_engines.artifact import load
from mlff_engines.bench.page import fill
from mlff_engines.errors import MLFFError
from mlff_engines.kernels import table
from mlff_engines.md.dynamics import BatchDynamics, draw_velocities
from mlff_engines.md.integrators import VelocityVerlet
from mlff_engines.md.replicas import Replicas
from mlff_engines.structure import Structure

SECTION = "table error"
TEMPERATURE, TIMESTEP, EVERY = 300.0, 0.5, 20  # K, fs, steps between energies
SWEEP = {"float32": (2, 4, 8, 16, 32), "float64": (1, 2, 4, 8, 16)}  # intervals, beside the kernel's own
FRAMES = 20  # on which forces are compared


@dataclass
class Found:
    """One resolution; errors relative to the largest value, of forces in eV/Å, drift in meV/atom/ps."""

    intervals: int
    value_error: float
    slope_error: float
    force_error: float
    fluctuation: float
    drift: float
    uncertainty: float


@contextmanager
def tables_of(intervals: int | None) -> Iterator[None]:
    """Kernels made meanwhile have so many intervals, whatever their error; None: as many as they need."""
    kept = table.INTERVALS, table.BOUND
    if intervals is not None:
        table.INTERVALS, table.BOUND = [intervals], dict.fromkeys(table.BOUND, math.inf)
    try:
        yield
    finally:
        table.INTERVALS, table.BOUND = kept


def moving(artifact: Any, start: Structure, replicas: int, length: float) -> tuple[np.ndarray, list[Structure]]:
    """Total energies (samples, replicas), eV, of NVE from `start` over `length` ps, and frames of the first replica."""
    batch = Replicas([start] * replicas)
    draw_velocities(batch, TEMPERATURE, seeds=range(replicas))
    dynamics = BatchDynamics(artifact, batch, VelocityVerlet(TIMESTEP))
    energies = [dynamics.conserved().numpy().copy()]
    frames: list[Structure] = []
    steps = max(2 * EVERY, round(1e3 * length / TIMESTEP))
    for step in dynamics.run(steps, every=EVERY):
        energies.append(dynamics.conserved().numpy().copy())
        if len(frames) < FRAMES * step / steps:
            frames.append(replace(start, positions=batch.positions[batch.atoms(0)].numpy().copy()))
    if dynamics.failed:
        raise MLFFError(f"replicas {sorted(dynamics.failed)} left the path; start from a relaxed structure")
    return np.array(energies), frames


def judged(path: Path, dtype: str, intervals: int | None, start: Structure, frames: Sequence[Structure],
           exact: Sequence[np.ndarray], replicas: int, length: float) -> Found:  # fmt: skip
    """The kernel with so many intervals, against the forces `exact` of `frames`."""
    with tables_of(intervals):
        artifact = load(path, dtype=dtype, kernel="fused")  # type: ignore[arg-type]
    kernel: Any = artifact.module
    evaluate = artifact.evaluator(outside="ignore")
    error = max(float(np.abs(evaluate(s).forces - f).max()) for s, f in zip(frames, exact, strict=True))
    energies, _ = moving(artifact, start, replicas, length)
    time = 1e-3 * TIMESTEP * EVERY * np.arange(len(energies))
    slopes = 1e3 * np.polyfit(time, energies, 1)[0] / len(start)
    return Found(
        intervals=kernel.intervals,
        value_error=kernel.value_error,
        slope_error=kernel.slope_error,
        force_error=error,
        fluctuation=float(1e3 * energies.std(axis=0).mean() / len(start)),
        drift=float(slopes.mean()),
        uncertainty=float(slopes.std(ddof=1) / math.sqrt(replicas)) if replicas > 1 else math.nan,
    )


def markdown(found: dict[str, list[Found]]) -> str:
    lines = [
        "| | intervals | error of W | of dW/dr | largest force error, eV/Å | energy fluctuation, meV/atom "
        "| drift, meV/atom/ps |",
        "|---" * 7 + "|",
    ]
    for dtype, rows in found.items():
        own = rows[-1].intervals
        for row in rows:
            cells = [f"{row.intervals}{' *' if row.intervals == own else ''}"]
            cells += [f"{value:.1e}" for value in (row.value_error, row.slope_error, row.force_error)]
            cells += [f"{row.fluctuation:.4f}", f"{row.drift:+.1e} ± {row.uncertainty:.0e}"]
            lines.append(f"| {dtype} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("start", type=Path, help="a molecule near its minimum, as ASE reads it")
    parser.add_argument("--length", type=float, default=5.0, help="ps of each run (default 5)")
    parser.add_argument("--replicas", type=int, default=4, help="of each run (default 4)")
    parser.add_argument("--page", type=Path, help="put the table between the markers of this page")
    parser.add_argument("--smoke", action="store_true", help="only try the path")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    atoms = read(options.start)
    start = Structure(atoms.numbers, atoms.positions)
    length, replicas = (0.1, 2) if options.smoke else (options.length, options.replicas)
    plain = load(options.artifact, dtype="float64", kernel="torch")
    _, frames = moving(plain, start, 1, min(length, 1.0))
    evaluate = plain.evaluator(outside="ignore")
    exact = [evaluate(frame).forces for frame in frames]
    found: dict[str, list[Found]] = {}
    for dtype, sweep in SWEEP.items():
        for intervals in (*(sweep[1:3] if options.smoke else sweep), None):
            row = judged(options.artifact, dtype, intervals, start, frames, exact, replicas, length)
            print(dtype, row, file=sys.stderr, flush=True)
            found.setdefault(dtype, []).append(row)
    print(markdown(found))
    if options.page is not None:
        about = (
            f"{atoms.get_chemical_formula()}, {replicas} replicas of {length:g} ps NVE at {TEMPERATURE:g} K and "
            f"{TIMESTEP} fs; the star marks what the kernel chooses for this student."
        )
        command = f"python examples/benchmarks/table_error.py student.pt {options.start.name}"
        fill(options.page, SECTION, "\n\n".join([f"```sh\n{command}\n```", about, markdown(found)]))


if __name__ == "__main__":
    try:
        main()
    except MLFFError as error:
        sys.exit(f"error: {error}")
