"""The ways to make new structures from one: relaxation, molecular dynamics, rattling, normal modes.

Each is a generator of frames that carry the teacher's labels where the teacher was asked anyway. A teacher that fails,
or forces that explode, end a trajectory with `Exploded`; the frames before are good.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from ase import Atoms, units
from ase.constraints import FixCom
from ase.data import covalent_radii
from ase.md.langevin import Langevin
from ase.neighborlist import neighbor_list
from ase.optimize import FIRE

from mlff_engines.errors import TeacherError
from mlff_engines.structure import FloatArray
from mlff_training.teachers.calculator import TeacherCalculator, hessian_row
from mlff_training.teachers.labelling import with_labels
from mlff_training.teachers.remote import TeacherLost


class Exploded(Exception):
    """The trajectory left the region in which a structure means anything."""


def relaxation(
    atoms: Atoms, calculator: TeacherCalculator, fmax: float, steps: int, max_force: float
) -> Iterator[Atoms]:
    """Frames of a minimisation (FIRE, Bitzek 2006) at fixed cell until no force exceeds `fmax` (eV/Å)."""
    moving = _start(atoms, calculator)
    try:
        for _ in FIRE(moving, logfile=None).irun(fmax=fmax, steps=steps):
            yield _frame(moving, calculator, max_force)
    except TeacherError as error:
        raise _explosion(error) from error


def dynamics(
    atoms: Atoms,
    calculator: TeacherCalculator,
    *,
    temperature: float,
    steps: int,
    interval: int,
    timestep: float,
    friction: float,
    seed: int,
    max_force: float,
) -> Iterator[Atoms]:
    """Every `interval`-th frame of Langevin dynamics (Vanden-Eijnden and Ciccotti 2006, equation 23).

    Args:
        atoms: where it starts; the velocities are drawn anew.
        calculator: the teacher.
        temperature: K.
        steps: number of time steps.
        interval: steps between frames.
        timestep: fs.
        friction: 1/fs.
        seed: seeds velocities and noise.
        max_force: eV/Å; a larger force on an atom is an explosion.
    """
    rng = np.random.default_rng(seed)
    moving = _start(atoms, calculator)
    moving.set_constraint(FixCom())
    masses = moving.get_masses()[:, None]
    moving.set_momenta(rng.standard_normal((len(moving), 3)) * np.sqrt(masses * units.kB * temperature))
    integrator = Langevin(
        moving,
        timestep * units.fs,
        temperature_K=temperature,
        friction=friction / units.fs,
        fixcm=False,
        rng=rng,
        logfile=None,
    )
    try:
        for step, _ in enumerate(integrator.irun(steps)):
            frame = _frame(moving, calculator, max_force) if step % interval == 0 else None
            if frame is not None and step:
                yield frame
    except TeacherError as error:
        raise _explosion(error) from error


def rattling(
    atoms: Atoms,
    calculator: TeacherCalculator,
    *,
    amplitude: float,
    count: int,
    relax_steps: int,
    seed: int,
    max_force: float,
) -> Iterator[Atoms]:
    """Structures rattled by normal noise of `amplitude` (Å), each with the frames of a few relaxation steps."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        rattled = atoms.copy()
        rattled.positions += rng.normal(scale=amplitude, size=rattled.positions.shape)
        if too_close(rattled):
            continue
        try:
            yield from relaxation(rattled, calculator, 1e-3, relax_steps, max_force)
        except Exploded:
            continue  # one rattled too far says nothing about the next


def normal_modes(
    atoms: Atoms, calculator: TeacherCalculator, *, temperature: float, count: int, seed: int, min_wavenumber: float
) -> Iterator[Atoms]:
    """Displacements of a minimum along its normal modes: the classical harmonic ensemble at `temperature` (K).

    With M^(-1/2) H M^(-1/2) = U ω² Uᵀ: ΔR = M^(-1/2) U q, q_k normal with variance kT/ω_k². Modes below
    `min_wavenumber` (cm⁻¹) - translation, rotation, what is not harmonic - stay at rest. The Hessian H comes from
    central differences of the teacher's forces. Frames have no labels.
    """
    try:
        rows = [hessian_row(calculator, atoms, index).ravel() for index in range(3 * len(atoms))]
    except TeacherError as error:
        raise _explosion(error) from error
    hessian = np.array(rows)
    scale = 1 / np.sqrt(np.repeat(atoms.get_masses(), 3))
    squares, modes = np.linalg.eigh((hessian + hessian.T) / 2 * np.outer(scale, scale))
    modes *= np.sign(modes[np.abs(modes).argmax(axis=0), range(len(squares))])  # else a seed would not decide the sign
    lowest = min_wavenumber * units.invcm / (units._hbar * units.J * units.s)  # angular frequency in ASE's units
    vibrations = squares > lowest**2
    widths = np.sqrt(units.kB * temperature / squares[vibrations])
    rng = np.random.default_rng(seed)
    for _ in range(count):
        displaced = atoms.copy()
        displaced.calc = None
        q = widths * rng.standard_normal(len(widths))
        displaced.positions += (scale * (modes[:, vibrations] @ q)).reshape(-1, 3)
        if not too_close(displaced):
            yield displaced


def too_close(atoms: Atoms, fraction: float = 0.6) -> bool:
    """Whether two atoms are nearer than this fraction of the sum of their covalent radii (Cordero 2008)."""
    if not len(atoms):
        return False
    radii: FloatArray = fraction * covalent_radii[atoms.numbers]
    return len(neighbor_list("i", atoms, list(radii))) > 0


def _start(atoms: Atoms, calculator: TeacherCalculator) -> Atoms:
    moving = atoms.copy()
    moving.set_constraint()
    moving.calc = calculator
    return moving


def _frame(moving: Atoms, calculator: TeacherCalculator, max_force: float) -> Atoms:
    """The present structure with the labels the teacher has just computed for it."""
    calculator.get_property("forces", moving)
    results = dict(calculator.results)
    force = float(np.abs(results["forces"]).max(initial=0.0))
    if force > max_force:
        raise Exploded(f"a force of {force:.3g} eV/Å")
    frame = with_labels(moving, results, calculator.config)
    frame.arrays.pop("momenta", None)
    return frame


def _explosion(error: TeacherError) -> Exception:
    # a lost process says nothing about the structure
    return error if isinstance(error, TeacherLost) else Exploded(str(error))
