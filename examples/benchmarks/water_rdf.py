"""Radial distribution functions of liquid water by a student, beside experiment.

mlff train examples/benchmarks/deepmd_water.yaml -o runs/deepmd_water
mlff-export runs/deepmd_water/best -o runs/deepmd_water/student.pt
python examples/benchmarks/water_rdf.py runs/deepmd_water/student.pt -o runs/water_rdf     (needs ../shared/data)

Replicas of the 64 molecules of the training set start from different frames of it and run at 298 K and constant
volume. Langevin dynamics has no memory: it goes on in segments, each from where the last ended, so that the run can be
interrupted, repeated and made longer (`--length`). `--smoke` tries the path.
"""

import argparse
import functools
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch

from mlff_ase.engine import ASEEngine
from mlff_ase.structures import to_structure
from mlff_engines.files import replacing
from mlff_engines.manifest import inspect
from mlff_engines.structure import NUMBERS, FloatArray, Structure
from mlff_engines.validation.engine import Dynamics, thermal
from mlff_engines.validation.trajectories.observables import Frames, joined, rdf, read_frames
from mlff_training.data.deepmd import read_deepmd

TEMPERATURE = 298.0  # K, of the experiments
TIMESTEP, EVERY = 0.5, 20  # fs, steps
SEGMENT = 1000  # steps
FRICTION = 2.0  # 1/ps
# pair -> experiment below ../shared/data/water_exp_rdf
EXPERIMENT = {
    ("O", "O"): "mdgrad_water_exp_298K_redd.csv",
    ("O", "H"): "mdgrad_water_exp_jcp_oh.npy",
    ("H", "H"): "mdgrad_water_exp_jcp_hh.npy",
}
BIN, R_MAX = 0.05, 6.0  # Å


@functools.cache
def engine(artifact: Path) -> ASEEngine:
    torch.set_num_threads(1)
    return ASEEngine(artifact, folder=artifact.parent)


def advance(artifact: Path, folder: Path, replica: int, segment: int, steps: int, start: Structure) -> None:
    """One segment of one replica, unless it is there already; its end is written last."""
    trajectory, end = folder / f"{replica}-{segment:04d}.xyz", folder / f"{replica}-{segment:04d}.npz"
    if end.exists():
        return
    seed = 10_000 * replica + segment
    dynamics = Dynamics(start, np.zeros_like(start.positions), TIMESTEP, steps, EVERY, TEMPERATURE, FRICTION, seed=seed)
    if segment:
        with np.load(folder / f"{replica}-{segment - 1:04d}.npz") as last:
            dynamics = replace(
                dynamics, structure=replace(start, positions=last["positions"]), velocities=last["velocities"]
            )
    else:
        dynamics = thermal(dynamics, TEMPERATURE, seed=replica)
    found = engine(artifact).run(dynamics, trajectory)
    with replacing(end) as temporary:
        np.savez(
            temporary,
            positions=found.positions[-1],
            velocities=found.velocities[-1],
            potential=found.potential,
            kinetic=found.kinetic,
        )


def belongs_to(folder: Path, artifact: Path) -> None:
    """Refuse to go on with segments of another student or other settings."""
    settings = {
        "sha256": inspect(artifact).sha256,
        **{name: globals()[name] for name in ("TEMPERATURE", "TIMESTEP", "EVERY", "SEGMENT", "FRICTION")},
    }
    note = folder / "settings.json"
    if note.exists() and json.loads(note.read_text()) != settings:
        raise SystemExit(f"{folder} holds a run of another student or other settings: give another folder with -o")
    with replacing(note) as temporary:
        temporary.write_text(json.dumps(settings, indent=2) + "\n")


def collect(folder: Path, replica: int, segments: range, structure: Structure) -> Frames:
    """The frames of one replica; the first of a segment is the last of the one before."""
    parts = [read_frames(folder / f"{replica}-{k:04d}.xyz", structure, EVERY * TIMESTEP) for k in segments]
    return joined([replace(part, times=part.times[1:], positions=part.positions[1:]) for part in parts])


def experiment(path: Path) -> FloatArray:
    """Distances in Å and g(r), digitised, in order of distance."""
    table = np.load(path) if path.suffix == ".npy" else np.loadtxt(path, delimiter=",")
    return table[np.argsort(table[:, 0])]


def draw(
    curves: dict[tuple[str, str], tuple[FloatArray, FloatArray, FloatArray]], data: Path, what: str, out: Path
) -> dict[str, dict[str, float]]:
    """A panel for each pair; returns the mean deviation from experiment and the peaks beyond the molecule."""
    figures = {}
    with mpl.rc_context({"svg.hashsalt": "mlff", "svg.fonttype": "none", "font.size": 9}):
        figure, panels = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
        for panel, (pair, (r, g, error)) in zip(panels, curves.items(), strict=True):
            measured = experiment(data / "water_exp_rdf" / EXPERIMENT[pair])
            panel.plot(*measured.T, color="black", lw=1, ls="--", label="experiment")
            panel.plot(r, g, color="tab:blue", lw=1.2, label="student")
            panel.fill_between(r, g - error, g + error, color="tab:blue", alpha=0.3, lw=0)
            panel.set(title="–".join(pair), xlabel="r / Å", ylabel="g(r)", xlim=(1, R_MAX), ylim=(0, 3.4))
            beyond = {"OO": 2.0, "OH": 1.4, "HH": 1.9}["".join(pair)]  # Å, outside the molecule
            shared = (r > beyond) & (r < measured[-1, 0])
            peak, there = np.argmax(np.where(r > beyond, g, 0)), measured[measured[:, 0] > beyond]
            figures["-".join(pair)] = {
                "mean absolute deviation": float(np.abs(g - np.interp(r, *measured.T))[shared].mean()),
                "peak of the student / Å": float(r[peak]),
                "its height": float(g[peak]),
                "standard error": float(error[peak]),
                "peak of the experiment / Å": float(there[np.argmax(there[:, 1]), 0]),
                "height in the experiment": float(there[:, 1].max()),
            }
        panels[0].legend(frameon=False)
        figure.suptitle(what, fontsize=9)
        with replacing(out) as temporary:
            figure.savefig(temporary, metadata={"Date": None} if out.suffix == ".svg" else None)
        plt.close(figure)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path)
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/water_rdf"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="with deepmd_water and water_exp_rdf")
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--equilibration", type=float, default=1.0, help="ps, not analysed")
    parser.add_argument("--length", type=float, default=5.0, help="ps of each replica, analysed")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--figure", type=Path, help="default: OUT/water_rdf.svg")
    parser.add_argument("--smoke", action="store_true", help="a few steps only")
    arguments = parser.parse_args()

    folder = arguments.out / "smoke" if arguments.smoke else arguments.out
    belongs_to(folder, arguments.student)
    steps = 2 * EVERY if arguments.smoke else SEGMENT
    per_ps = 1e3 / (TIMESTEP * steps)
    discard, keep = (
        (1, 1)
        if arguments.smoke
        else (round(arguments.equilibration * per_ps), max(round(arguments.length * per_ps), 1))
    )
    boxes = [to_structure(atoms) for atoms in read_deepmd(arguments.data / "deepmd_water")]
    starts = boxes[:: len(boxes) // arguments.replicas][: arguments.replicas]
    replicas = range(len(starts))
    with ProcessPoolExecutor(arguments.processes, multiprocessing.get_context("spawn")) as pool:
        for segment in range(discard + keep):
            tasks = [
                pool.submit(advance, arguments.student, folder, replica, segment, steps, starts[replica])
                for replica in replicas
            ]
            for task in tasks:
                task.result()
            print(f"{(segment + 1) / per_ps:.2f} ps of {(discard + keep) / per_ps:.2f} ps", flush=True)

    curves = {}
    segments = range(discard, discard + keep)
    frames = [collect(folder, replica, segments, starts[replica]) for replica in replicas]
    for first, second in EXPERIMENT:
        found = [rdf(one, NUMBERS[first], NUMBERS[second], r_max=R_MAX, bin_width=BIN) for one in frames]
        g = np.array([g for _, g in found])
        curves[first, second] = found[0][0], g.mean(axis=0), g.std(axis=0, ddof=1) / np.sqrt(len(g))
    length = keep / per_ps
    what = f"{len(starts[0]) // 3} H2O, {TEMPERATURE:g} K, {len(frames)} x {length:g} ps; band: standard error"
    figure = arguments.figure or folder / "water_rdf.svg"
    figures = draw(curves, arguments.data, what, figure)
    (folder / "water_rdf.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
