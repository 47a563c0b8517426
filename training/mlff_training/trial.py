"""A student's first trial: the teacher's trajectories that it never saw, and molecular dynamics of its own.

This is what a newcomer looks at after distilling, not a validation: `mlff_engines.validation` is that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator
from ase.io.trajectory import Trajectory
from ase.md.verlet import VelocityVerlet
from ase.neighborlist import natural_cutoffs, neighbor_list
from pydantic import Field

from mlff_engines.artifact import load
from mlff_engines.config import Config
from mlff_engines.evaluator import Evaluator
from mlff_engines.files import replacing
from mlff_engines.structure import FloatArray
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
    nve_ps: float = Field(10.0, gt=0, description="length of the student's own dynamics, ps")
    nve_temperature: float = Field(300.0, gt=0, description="K")
    timestep: float = Field(0.5, gt=0, description="fs")
    law_ps: float = Field(0.5, gt=0, description="length of each of the three runs of the dt² law, ps")


class Trial(Config):
    """What the trial found."""

    artifact_sha256: str
    force_mae: dict[str, float] = Field(description="meV/Å, by temperature of the teacher's trajectory")
    energy_mae: dict[str, float] = Field(description="meV/atom, after the mean difference of each trajectory")
    nve_ps: float
    nve_drift: float = Field(description="slope of the total energy, meV/atom/ps")
    largest_bond_change: float = Field(description="Å, over the whole of the student's own dynamics")
    bonds_intact: bool
    dt2_ratios: list[float] = Field(description="of std(E_total) at dt, dt/2, dt/4 in float64; a sound model has 4")


def try_student(
    artifact: Path,
    start: Sequence[Atoms],
    teacher: TeacherConfig,
    config: TrialConfig,
    folder: Path,
    calculator: Callable[..., Calculator],
) -> Trial:
    """Try `artifact`; writes `trial.json`, `student_vs_teacher.png`, `nve.traj` and the teacher's `test.xyz`."""
    manifest = load(artifact).manifest
    report = folder / "trial.json"
    if report.exists():
        done = Trial.model_validate_json(report.read_text())
        if done.artifact_sha256 == manifest.sha256:
            return done
    test = teacher_trajectories(start, teacher, config, folder)
    student = load(artifact).evaluator(outside="ignore")
    rows = {temperature: compare(student, frames) for temperature, frames in test.items()}

    nearest = min(config.temperatures, key=lambda t: abs(t - config.nve_temperature))
    warm = test[f"{nearest:g} K"][-1]
    moving = thermal(warm, config.nve_temperature, config.seed)
    moving.calc = calculator(artifact, outside="ignore")
    times, energies, bond_change = nve(moving, config.nve_ps, config.timestep, folder / "nve.traj")
    slope = float(np.polyfit(times, energies, 1)[0]) if len(times) > 2 else 0.0

    found = Trial(
        artifact_sha256=manifest.sha256,
        force_mae={t: 1e3 * float(np.abs(r["forces"][0] - r["forces"][1]).mean()) for t, r in rows.items()},
        energy_mae={t: 1e3 * float(np.abs(r["energy"][0] - r["energy"][1]).mean()) for t, r in rows.items()},
        nve_ps=config.nve_ps,
        nve_drift=1e3 * slope / len(moving),
        largest_bond_change=bond_change,
        bonds_intact=bond_change < BROKEN,
        dt2_ratios=dt2_law(warm, lambda: calculator(artifact, dtype="float64", outside="ignore"), config),
    )
    plot(rows, times, energies / len(moving), folder / "student_vs_teacher.png")
    with replacing(report) as temporary:
        temporary.write_text(json.dumps(found.model_dump(), indent=1))
    return found


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


def thermal(atoms: Atoms, temperature: float, seed: int) -> Atoms:
    """A copy with velocities of `temperature` (K), its centre of mass at rest."""
    moving = Atoms(numbers=atoms.numbers, positions=atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    moving.info = {key: atoms.info[key] for key in ("charge", "multiplicity") if key in atoms.info}
    masses = moving.get_masses()[:, None]
    spread = np.sqrt(units.kB * temperature / masses)
    velocities = spread * np.random.default_rng(seed).standard_normal((len(moving), 3))
    moving.set_velocities(velocities - (masses * velocities).sum(axis=0) / masses.sum())
    return moving


def nve(moving: Atoms, picoseconds: float, timestep: float, path: Path) -> tuple[FloatArray, FloatArray, float]:
    """Velocity Verlet into an ASE trajectory; times (ps), total energies (eV) and the largest change of a bond (Å).

    Bonds are the pairs within 1.2 times their covalent radii at the start.
    """
    bonded = neighbor_list("ij", moving, [1.2 * radius for radius in natural_cutoffs(moving)])
    pairs = [(i, j) for i, j in zip(*bonded, strict=True) if i < j]

    def lengths() -> FloatArray:
        return np.array([moving.get_distance(i, j, mic=bool(moving.pbc.any())) for i, j in pairs])

    times, energies, change, at_start = [], [], 0.0, lengths()
    interval = max(1, round(ENERGY_TRACE / timestep))
    integrator = VelocityVerlet(moving, timestep * units.fs)
    with replacing(path) as temporary, Trajectory(temporary, "w") as trajectory:
        for step, _ in enumerate(integrator.irun(round(1e3 * picoseconds / timestep))):
            if step % interval == 0:
                trajectory.write(moving)
                times.append(step * timestep * 1e-3)
                energies.append(moving.get_total_energy())
                change = max(change, float(np.abs(lengths() - at_start).max(initial=0.0)))
                if change > 10 * BROKEN:
                    break
    return np.array(times), np.array(energies), change


def dt2_law(atoms: Atoms, calculator: Callable[[], Calculator], config: TrialConfig) -> list[float]:
    """Ratios of std(E_total) at dt, dt/2 and dt/4 over one stretch of time from one start.

    Velocity Verlet conserves the energy up to terms of order dt² if, and only if, forces are the gradient of a smooth
    energy (Hairer, Lubich, Wanner, Geometric Numerical Integration, chapter IX): each ratio is then 4.
    """
    deviations = []
    for divisor in (1, 2, 4):
        moving = thermal(atoms, config.nve_temperature, config.seed)
        moving.calc = calculator()
        integrator = VelocityVerlet(moving, config.timestep / divisor * units.fs)
        steps = round(1e3 * config.law_ps / config.timestep)
        energies = [
            moving.get_total_energy() for step, _ in enumerate(integrator.irun(steps * divisor)) if step % divisor == 0
        ]
        deviations.append(float(np.std(energies)))
    return [coarse / fine for coarse, fine in pairwise(deviations)]


def plot(
    rows: dict[str, dict[str, tuple[FloatArray, FloatArray]]], times: FloatArray, energies: FloatArray, path: Path
) -> None:
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
    axes[2].plot(times, 1e3 * (energies - energies[0]))
    axes[2].set(xlabel="time, ps", ylabel="total energy - start, meV/atom", title="the student's own NVE dynamics")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
