"""A student's first trial: the teacher's trajectories that it never saw, and dynamics of its own in each engine.

This is what a newcomer looks at after distilling, not a validation: `mlff validate` is that.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.neighborlist import natural_cutoffs, neighbor_list
from pydantic import Field, ValidationError

from mlff_engines.artifact import load
from mlff_engines.config import Config
from mlff_engines.errors import MissingEngineError
from mlff_engines.evaluator import Evaluator
from mlff_engines.files import replacing
from mlff_engines.structure import FloatArray
from mlff_engines.validation.core_engine import CoreEngine
from mlff_engines.validation.dynamics.constant_energy import Options, check_dynamics
from mlff_engines.validation.engine import Dynamics as EngineDynamics
from mlff_engines.validation.engine import Engine, Trajectory, thermal
from mlff_engines.validation.engines import make_engine
from mlff_training.data.labels import results
from mlff_training.sampling.sample import Dynamics, SamplingConfig, sample
from mlff_training.student import structure_of
from mlff_training.teachers.config import TeacherConfig

BROKEN = 0.5  # Å that a bond may be longer or shorter than at the start (MLIPAudit's criterion)
ENERGY_TRACE = 5.0  # fs between the frames that are kept of a trajectory


class TrialConfig(Config):
    """What the student is tried on."""

    temperatures: tuple[float, ...] = Field((300.0, 400.0), min_length=1, description="of teacher trajectories, K")
    seed: int = Field(9001, description="of teacher trajectories and velocities; one that was never sampled")
    frames: int = Field(100, ge=1, description="per teacher trajectory")
    engines: tuple[str, ...] = Field(
        ("ase",), description="in which it runs its own dynamics; missing ones are left out"
    )
    nve_ps: float = Field(10.0, gt=0, description="length of the student's own dynamics, ps")
    nve_temperature: float = Field(300.0, gt=0, description="K")
    timestep: float = Field(0.5, gt=0, description="fs")
    law_ps: float = Field(0.5, gt=0, description="length of each of the three runs of the dt² law, ps")


class EngineTrial(Config):
    """What the student's own dynamics showed in one engine."""

    nve_drift: float = Field(description="slope of the total energy, meV/atom/ps")
    largest_bond_change: float = Field(description="Å, over the whole of the student's own dynamics")
    bonds_intact: bool
    dt2_ratios: list[float] = Field(description="of std(E_total) at dt, dt/2, dt/4 in float64; a sound model has 4")


class Trial(Config):
    """What the trial found."""

    artifact_sha256: str
    force_mae: dict[str, float] = Field(description="meV/Å, by temperature of the teacher's trajectory")
    energy_mae: dict[str, float] = Field(description="meV/atom, after the mean difference of each trajectory")
    nve_ps: float
    engines: dict[str, EngineTrial]
    missing: dict[str, str] = Field(description="engines that are not installed, and how to install them")


def try_student(
    artifact: Path, start: Sequence[Atoms], teacher: TeacherConfig, config: TrialConfig, folder: Path
) -> Trial:
    """Try `artifact`; writes `trial.json`, `student_vs_teacher.png`, the teacher's `test.xyz` and, by engine, `nve`."""
    manifest = load(artifact).manifest
    report = folder / "trial.json"
    if report.exists():
        with suppress(ValidationError):  # of another version: tried anew
            done = Trial.model_validate_json(report.read_text())
            if done.artifact_sha256 == manifest.sha256 and {*done.engines, *done.missing} == {*config.engines}:
                return done
    test = teacher_trajectories(start, teacher, config, folder)
    student = load(artifact).evaluator(outside="ignore")
    rows = {temperature: compare(student, frames) for temperature, frames in test.items()}

    nearest = min(config.temperatures, key=lambda t: abs(t - config.nve_temperature))
    warm = test[f"{nearest:g} K"][-1]
    found: dict[str, EngineTrial] = {}
    missing: dict[str, str] = {}
    traces: dict[str, Trajectory] = {}
    for name in config.engines:
        try:
            own, exact = (make_engine(name, artifact, folder=folder / name, dtype=dtype) for dtype in (None, "float64"))
        except MissingEngineError as error:
            missing[name] = str(error)
            continue
        found[name], traces[name] = try_engine(own, exact, warm, config, folder / name)
    trial = Trial(
        artifact_sha256=manifest.sha256,
        force_mae={t: 1e3 * float(np.abs(r["forces"][0] - r["forces"][1]).mean()) for t, r in rows.items()},
        energy_mae={t: 1e3 * float(np.abs(r["energy"][0] - r["energy"][1]).mean()) for t, r in rows.items()},
        nve_ps=config.nve_ps,
        engines=found,
        missing=missing,
    )
    plot(rows, traces, folder / "student_vs_teacher.png")
    with replacing(report) as temporary:
        temporary.write_text(json.dumps(trial.model_dump(), indent=1))
    return trial


def try_engine(
    own: Engine, exact: Engine, warm: Atoms, config: TrialConfig, folder: Path
) -> tuple[EngineTrial, Trajectory]:
    """The student's own dynamics in one engine, in its own precision and in float64."""
    still = EngineDynamics(structure_of(warm), np.zeros((len(warm), 3)), config.timestep, 0)
    moving = thermal(still, config.nve_temperature, config.seed)
    folder.mkdir(parents=True, exist_ok=True)
    run = nve(own, moving, config.nve_ps, folder)
    law = Options(law=round(1e3 * config.law_ps / config.timestep))
    [checked] = check_dynamics(exact, CoreEngine(exact.evaluate), moving, folder, law, only=["M1"])
    change = bond_change(warm, run.positions)
    slope = float(np.polyfit(1e-3 * run.times, run.total, 1)[0]) if len(run.times) > 2 else 0.0
    found = EngineTrial(
        nve_drift=1e3 * slope / len(warm),
        largest_bond_change=change,
        bonds_intact=change < BROKEN,
        dt2_ratios=[checked.figures.get(name, np.nan) for name in ("first ratio", "second ratio")],
    )
    return found, run


def nve(engine: Engine, start: EngineDynamics, picoseconds: float, folder: Path) -> Trajectory:
    """Dynamics of the student's own, into `nve` with the engine's ending."""
    every = max(1, round(ENERGY_TRACE / start.timestep))
    steps = round(1e3 * picoseconds / start.timestep)
    return engine.run(replace(start, steps=steps, every=every), folder / f"nve{engine.suffix}")


def bond_change(atoms: Atoms, positions: FloatArray) -> float:
    """The largest change (Å) of a bond over positions (T, N, 3) that are not wrapped.

    Bonds are the pairs within 1.2 times their covalent radii in `atoms`.
    """
    centre, neighbour, vectors = neighbor_list("ijD", atoms, [1.2 * radius for radius in natural_cutoffs(atoms)])
    image = vectors - (atoms.positions[neighbour] - atoms.positions[centre])
    lengths = np.linalg.norm(positions[:, neighbour] - positions[:, centre] + image, axis=-1)
    return float(np.abs(lengths - np.linalg.norm(vectors, axis=-1)).max(initial=0.0))


def teacher_trajectories(
    start: Sequence[Atoms], teacher: TeacherConfig, config: TrialConfig, folder: Path
) -> dict[str, list[Atoms]]:
    """The teacher's own dynamics at each temperature, 10 fs between frames, the first 250 fs left out."""
    interval, skipped = max(1, round(10.0 / config.timestep)), 25
    md = Dynamics(
        temperatures=config.temperatures,
        seeds=(config.seed,),
        steps=interval * (config.frames + skipped),
        interval=interval,
        timestep=config.timestep,
    )
    frames = sample(
        start, teacher, SamplingConfig(md=md, duplicate=0.0), folder / "test.xyz", workers=len(config.temperatures)
    )
    found: dict[str, list[Atoms]] = {f"{temperature:g} K": [] for temperature in config.temperatures}
    for group, members in groupby(frames, key=lambda atoms: str(atoms.info["group"])):
        trajectory = list(members)
        for temperature in config.temperatures:
            if f"-md-{temperature:g}K-" in group:
                found[f"{temperature:g} K"] += trajectory[skipped:]
    return found


def compare(student: Evaluator, frames: Sequence[Atoms]) -> dict[str, tuple[FloatArray, FloatArray]]:
    """(teacher, student) values: every force component in eV/Å, and energies per atom in eV less their means."""
    known = [results(atoms) for atoms in frames]
    predicted = [student(structure_of(atoms)) for atoms in frames]
    energies = [
        np.array([energy / len(atoms) for energy, atoms in zip(both, frames, strict=True)])
        for both in ([label["energy"] for label in known], [result.energy for result in predicted])
    ]
    return {
        "forces": (
            np.concatenate([label["forces"].ravel() for label in known]),
            np.concatenate([result.forces.ravel() for result in predicted]),
        ),
        "energy": (energies[0] - energies[0].mean(), energies[1] - energies[1].mean()),
    }


def plot(rows: dict[str, dict[str, tuple[FloatArray, FloatArray]]], traces: dict[str, Trajectory], path: Path) -> None:
    """Forces and energies of student against teacher, and the total energy of the student's own dynamics."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    axes = figure.subplots(1, 3)
    panels = (("forces", "force component, eV/Å", 1.0), ("energy", "energy, meV/atom", 1e3))
    for axis, (what, unit, scale) in zip(axes, panels, strict=False):
        for temperature, values in rows.items():
            teacher, student = (scale * v for v in values[what])
            mae = np.abs(teacher - student).mean() * (1e3 if what == "forces" else 1.0)
            name = "meV/Å" if what == "forces" else "meV/atom"
            axis.plot(teacher, student, ".", markersize=3, label=f"{temperature}: MAE {mae:.2f} {name}")
        ends = [*axis.get_xlim()]
        axis.plot(ends, ends, "k-", linewidth=0.5)
        axis.set(xlabel=f"teacher {unit}", ylabel=f"student {unit}")
        axis.legend()
    for name, run in traces.items():
        per_atom = 1e3 * (run.total - run.total[0]) / run.positions.shape[1]
        axes[2].plot(1e-3 * run.times, per_atom, label=name)
    axes[2].set(xlabel="time, ps", ylabel="total energy - start, meV/atom", title="the student's own NVE dynamics")
    axes[2].legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
