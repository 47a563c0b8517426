"""Make structures worth labelling: trajectories of several kinds, then the ones farthest apart."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ase import Atoms
from pydantic import Field

from mlff_engines.config import Config
from mlff_engines.errors import DataError, StructureError, TeacherError
from mlff_training.data.xyz import read_xyz, write_xyz
from mlff_training.sampling import trajectories
from mlff_training.sampling.selection import descriptors, farthest_points
from mlff_training.sampling.trajectories import Exploded
from mlff_training.teachers.calculator import TeacherCalculator
from mlff_training.teachers.config import TeacherConfig, state_of
from mlff_training.teachers.parallel import as_done, progress_bar, teacher_here, workers_for

Positive = Annotated[float, Field(gt=0)]


class SamplingWarning(UserWarning):
    """A trajectory ended early or gave nothing; what it gave before is used."""


class Relaxation(Config):
    """Relax every starting structure first; trajectories start at the minimum, and the way there is sampled too."""

    fmax: Positive = Field(0.02, description="largest force left on an atom, eV/Å")
    steps: int = Field(300, ge=1, description="at most this many steps")


class Dynamics(Config):
    """Langevin dynamics with the teacher, one trajectory per temperature and seed."""

    temperatures: tuple[Positive, ...] = Field((300.0, 500.0), min_length=1, description="K")
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="one trajectory each, at every temperature")
    steps: int = Field(5000, ge=1, description="time steps per trajectory")
    interval: int = Field(10, ge=1, description="time steps between frames")
    timestep: Positive = Field(0.5, description="fs; 0.5 suits hydrogen")
    friction: Positive = Field(0.01, description="1/fs")


class Rattle(Config):
    """Random displacements, each followed by a few relaxation steps whose frames are kept."""

    amplitudes: tuple[Positive, ...] = Field((0.05, 0.15), min_length=1, description="Å, per coordinate")
    count: int = Field(10, ge=1, description="rattled structures per amplitude")
    relax_steps: int = Field(5, ge=0, description="relaxation steps after each")
    seed: int = 0


class NormalModes(Config):
    """Harmonic displacements of the relaxed structure; costs 6N teacher calls for the Hessian."""

    temperatures: tuple[Positive, ...] = Field((300.0,), min_length=1, description="K")
    count: int = Field(50, ge=1, description="structures per temperature")
    seed: int = 0
    min_wavenumber: Positive = Field(50.0, description="cm⁻¹; softer modes are not displaced")


class SamplingConfig(Config):
    """What to sample; a section left out (null) is skipped."""

    relax: Relaxation | None = Field(default_factory=Relaxation)
    md: Dynamics | None = Field(default_factory=Dynamics)
    rattle: Rattle | None = None
    normal_modes: NormalModes | None = None
    select: int | None = Field(
        None, ge=1, description="keep this many, the farthest apart; default: all but duplicates"
    )
    duplicate: float = Field(1e-3, ge=0, description="structures whose descriptors are nearer than this are the same")
    max_force: Positive = Field(100.0, description="eV/Å; a larger force ends a trajectory as exploded")


@dataclass(frozen=True)
class _Job:
    """One trajectory: all that decides its frames, and the file they go to."""

    name: str
    atoms: Atoms
    teacher: TeacherConfig
    settings: Relaxation | Dynamics | Rattle | NormalModes
    at: float  # temperature (K), amplitude (Å), or 0
    seed: int
    max_force: float
    path: Path


def sample(
    start: Sequence[Atoms],
    teacher: TeacherConfig,
    config: SamplingConfig,
    out: Path,
    *,
    executor: Executor | None = None,
    workers: int = 1,
    progress: bool = True,
) -> list[Atoms]:
    """Sample structures around `start`, drop duplicates, select, and write them to `out`.

    Every trajectory has a file of its own in ``<out>.trajectories/``, named for what it is and a hash of what decided
    it: a repeated call runs only what is not yet there. Frames for which the teacher was asked carry its labels;
    `mlff_training.teachers.labelling.label` does not pay for them again. ``info["group"]`` names the trajectory.

    Args:
        start: structures to start from, with `info` charge and multiplicity.
        teacher: who moves the atoms.
        config: what to sample.
        out: the extended XYZ file to write.
        executor: any `concurrent.futures.Executor` that sees the same files; default: `workers` teacher processes here.
        workers: number of teacher processes without an `executor`.
        progress: show a progress bar.

    Returns:
        The selected structures, in the order of their trajectories.

    Raises:
        DataError: for nothing to start from.
        StructureError: if the teacher cannot use a structure's charge or multiplicity.
        TeacherError: if the teacher cannot be made, its process is lost, or nothing at all could be sampled.
    """
    if not start:
        raise DataError(f"no structures to start sampling from for {out}")
    for number, atoms in enumerate(start):
        try:
            state_of(teacher, atoms)
        except StructureError as error:
            raise StructureError(f"starting structure {number}: {error}") from None
    folder = out.with_name(out.name + ".trajectories")
    frames: list[Atoms] = []
    with workers_for(executor, workers, teacher) as (running, its_teacher):
        origins = [_named(atoms, number) for number, atoms in enumerate(start)]
        if config.relax is not None:
            jobs = [_job(f"{name}-relax", a, its_teacher, config.relax, 0.0, 0, config, folder) for name, a in origins]
            relaxed = _run(jobs, running, "relaxations", progress)
            frames += [frame for path in relaxed for frame in path]
            origins = [(name, path[-1] if path else a) for (name, a), path in zip(origins, relaxed, strict=True)]
        else:
            frames += [atoms for _, atoms in origins]
        jobs = [job for name, atoms in origins for job in _jobs(name, atoms, its_teacher, config, folder)]
        frames += [frame for path in _run(jobs, running, "trajectories", progress) for frame in path]
    if not frames:
        raise TeacherError(f"not one structure could be sampled for {out}; see the warnings for the reasons")
    chosen = farthest_points(descriptors(frames), config.select, config.duplicate)
    selected = [frames[number] for number in chosen]
    if config.select is not None and len(selected) < config.select:
        warnings.warn(
            f"{config.select} structures were asked for, but only {len(selected)} of the {len(frames)} sampled differ; "
            "sample longer or at more temperatures",
            SamplingWarning,
            stacklevel=2,
        )
    write_xyz(out, selected)
    return selected


def _named(atoms: Atoms, number: int) -> tuple[str, Atoms]:
    """A name that is unique and fit for a file, and the structure without another's labels."""
    given = str(atoms.info.get("group", atoms.get_chemical_formula()))
    name = f"{number}-" + "".join(c if c.isalnum() or c in "-_." else "_" for c in given)
    bare = Atoms(numbers=atoms.numbers, positions=atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    bare.info = {key: atoms.info[key] for key in ("charge", "multiplicity") if key in atoms.info}
    bare.info["group"] = name
    return name, bare


def _jobs(name: str, atoms: Atoms, teacher: TeacherConfig, config: SamplingConfig, folder: Path) -> Iterator[_Job]:
    if (md := config.md) is not None:
        for temperature in md.temperatures:
            for seed in md.seeds:
                label = f"{name}-md-{temperature:g}K-seed{seed}"
                yield _job(label, atoms, teacher, md, temperature, seed, config, folder)
    if (rattle := config.rattle) is not None:
        for amplitude in rattle.amplitudes:
            label = f"{name}-rattle-{amplitude:g}A"
            yield _job(label, atoms, teacher, rattle, amplitude, rattle.seed, config, folder)
    if (modes := config.normal_modes) is not None:
        for temperature in modes.temperatures:
            label = f"{name}-modes-{temperature:g}K"
            yield _job(label, atoms, teacher, modes, temperature, modes.seed, config, folder)


def _job(
    name: str,
    atoms: Atoms,
    teacher: TeacherConfig,
    settings: Relaxation | Dynamics | Rattle | NormalModes,
    at: float,
    seed: int,
    config: SamplingConfig,
    folder: Path,
) -> _Job:
    # other seeds and temperatures of the same section are no reason to run this trajectory again
    own = settings.model_dump(exclude={"temperatures", "seeds", "amplitudes", "seed"})
    decisive = hashlib.sha256(json.dumps([teacher.digest, own, at, seed, config.max_force]).encode())
    for array in (atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc):
        decisive.update(array.tobytes())
    decisive.update(json.dumps(state_of(teacher, atoms)).encode())
    path = folder / f"{name}-{decisive.hexdigest()[:12]}.xyz"
    return _Job(name, atoms, teacher, settings, at, seed, config.max_force, path)


def _run(jobs: list[_Job], executor: Executor, what: str, progress: bool) -> list[list[Atoms]]:
    """Run the jobs that have no file yet; the frames of all, always as read from the files."""
    left = [job for job in jobs if not job.path.exists()]
    with progress_bar(what, len(left), progress and bool(left)) as advance:
        for batch in as_done(executor, _trajectory, left):
            for number, trouble in batch:
                if trouble is not None:
                    warnings.warn(f"trajectory {left[number].name} {trouble}", SamplingWarning, stacklevel=3)
            advance(len(batch))
    return [read_xyz(job.path, labels=None) if job.path.exists() else [] for job in jobs]


def _trajectory(job: _Job) -> str | None:
    """Run one trajectory into its file, in a worker; returns what went wrong, if anything did."""
    frames = []
    trouble = None
    try:
        for frame in _frames(job, teacher_here(job.teacher)):
            frame.info["group"] = job.name
            frames.append(frame)
    except Exploded as error:
        trouble = f"was stopped after {len(frames)} frame(s): {error}"
    if frames:
        write_xyz(job.path, frames)
    return trouble if frames or trouble else "gave no frames"


def _frames(job: _Job, calculator: TeacherCalculator) -> Iterator[Atoms]:
    calculator.reset()
    settings = job.settings
    if isinstance(settings, Relaxation):
        return trajectories.relaxation(job.atoms, calculator, settings.fmax, settings.steps, job.max_force)
    if isinstance(settings, Dynamics):
        return trajectories.dynamics(
            job.atoms,
            calculator,
            temperature=job.at,
            steps=settings.steps,
            interval=settings.interval,
            timestep=settings.timestep,
            friction=settings.friction,
            seed=job.seed,
            max_force=job.max_force,
        )
    if isinstance(settings, Rattle):
        return trajectories.rattling(
            job.atoms,
            calculator,
            amplitude=job.at,
            count=settings.count,
            relax_steps=settings.relax_steps,
            seed=job.seed,
            max_force=job.max_force,
        )
    return trajectories.normal_modes(
        job.atoms,
        calculator,
        temperature=job.at,
        count=settings.count,
        seed=job.seed,
        min_wavenumber=settings.min_wavenumber,
    )
