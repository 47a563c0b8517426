"""Independent runs of one system at constant temperature, kept on disk so that none is made twice."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mlff_engines.errors import ConfigError
from mlff_engines.files import replacing
from mlff_engines.structure import FloatArray
from mlff_engines.units import ACCELERATION, BOLTZMANN
from mlff_engines.validation.engine import Dynamics, Engine, Trajectory, thermal
from mlff_engines.validation.result import Evaluate

RATTLE = 0.05  # Å
SERIES = ("times", "potential", "kinetic", "positions", "velocities")
SAME_FORCES = 1e-5  # relative to the largest, and eV/Å: two builds of one model differ less, two models more


@dataclass(frozen=True)
class EnsembleOptions:
    """How the replicas of M5 and M6 are run, and what counts as equal.

    Attributes:
        replicas: per engine and temperature; 4 at least for a verdict.
        seed: of velocities and thermostats.
        equilibration: steps that the core runs before all replicas, where the start is far from equilibrium.
        margin: differences of means that matter, in standard deviations of the observable itself. A fifth is what a
            change of the temperature by 2 % does to 100 atoms; that takes some 1000 effective samples per engine.
        resolution: of distribution functions; mean error to expect of a right model, relative to the mean.
        bin_width: of distribution functions, Å.
        r_max: Å, of distribution functions; by default 10, half the smallest width of the cell, or the molecule.
        temperature_step: largest relative step of the second temperature of M6.
    """

    replicas: int = 4
    seed: int = 0
    equilibration: int = 0
    margin: float = 0.2
    resolution: float = 0.02
    bin_width: float = 0.05
    r_max: float | None = None
    temperature_step: float = 0.15


def run_replicas(engine: Engine, start: Dynamics, options: EnsembleOptions, folder: Path) -> list[Trajectory]:
    """`options.replicas` runs of `start` in `folder`, each with velocities and a thermostat of its own.

    A replica is kept as .samples.npz beside its native trajectory and read again when start, seed, engine, versions
    and forces are the same; one that is missing, was interrupted or is another's is made anew.

    Raises:
        ConfigError: `start` has no temperature.
        SimulationError: a run failed.
    """
    return [run_replica(engine, start, options, folder, index) for index in range(options.replicas)]


def run_replica(engine: Engine, start: Dynamics, options: EnsembleOptions, folder: Path, index: int) -> Trajectory:
    """One of `run_replicas`."""
    temperature = temperature_of(start)
    # other random numbers for every engine: they are compared as independent
    words = [options.seed, zlib.crc32(engine.name.encode()), index]
    velocities, thermostat = (int(s) >> 3 | 1 for s in np.random.SeedSequence(words).generate_state(2))
    dynamics = replace(thermal(start, temperature, velocities), seed=thermostat)
    return _kept(engine, dynamics, folder / f"{engine.name}-{temperature:g}K-{options.seed}-{index}{engine.suffix}")


def equilibrate(core: Engine, start: Dynamics, options: EnsembleOptions, folder: Path) -> Dynamics:
    """`start` from where `core` comes to after `options.equilibration` steps; kept like a replica."""
    if not options.equilibration:
        return start
    dynamics = replace(thermal(start, temperature_of(start), options.seed), seed=options.seed + 1)
    dynamics = replace(dynamics, steps=options.equilibration, every=options.equilibration)
    run = _kept(core, dynamics, folder / f"{core.name}-equilibration-{options.seed}{core.suffix}")
    return replace(start, structure=replace(start.structure, positions=run.positions[-1]))


def temperature_of(start: Dynamics) -> float:
    """In K.

    Raises:
        ConfigError: there is none.
    """
    if start.temperature is None or not start.temperature > 0:
        raise ConfigError(f"temperature {start.temperature}: ensembles are sampled by Langevin dynamics above 0 K")
    return start.temperature


def mean_square_frequencies(evaluate: Evaluate, runs: Sequence[Trajectory], start: Dynamics) -> FloatArray:
    """Σ over x, y, z of <F²> / (m k_B T) per atom, 1/fs²: no vibration of the atom alone is faster than its root.

    Langevin integrators of second order with a time step h, be they velocity Verlet, BAOAB or others, differ by up to
    ω²h²/4 in the mean potential or kinetic energy of a vibration ω (Leimkuhler and Matthews, J. Chem. Phys. 138,
    174102 (2013)).
    """
    frames = [run.positions[-1 - index * len(run.times) // 8] for run in runs for index in range(4)]
    squares = [
        np.square(evaluate(replace(start.structure, positions=positions)).forces).sum(axis=1) for positions in frames
    ]
    found: FloatArray = np.mean(squares, axis=0) * ACCELERATION / (start.masses * BOLTZMANN * temperature_of(start))
    return found


def _kept(engine: Engine, dynamics: Dynamics, file: Path) -> Trajectory:
    store, key = file.with_suffix(".samples.npz"), _key(engine, dynamics)
    forces = _forces(engine, dynamics)
    if store.is_file() and file.is_file():
        with np.load(store) as saved:
            close = SAME_FORCES * (1 + np.abs(forces).max(initial=0.0))
            if str(saved["key"]) == key and np.abs(saved["forces"] - forces).max(initial=0.0) <= close:
                series = {name: saved[name] for name in SERIES}
                return Trajectory(**series, pressure=saved.get("pressure"), file=file)
    store.unlink(missing_ok=True)
    file.unlink(missing_ok=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    run = engine.run(dynamics, file)
    series = {name: getattr(run, name) for name in SERIES}
    if run.pressure is not None:
        series["pressure"] = run.pressure
    with replacing(store) as temporary, temporary.open("wb") as stream:
        np.savez(stream, key=np.array(key), forces=forces, **series)
    return replace(run, file=file)


def _forces(engine: Engine, dynamics: Dynamics) -> FloatArray:
    """The answer that tells one model from another: forces off the symmetric places of a crystal."""
    rattle = RATTLE * np.random.default_rng(0).uniform(-1, 1, dynamics.structure.positions.shape)
    return engine.evaluate(replace(dynamics.structure, positions=dynamics.structure.positions + rattle)).forces


def _key(engine: Engine, dynamics: Dynamics) -> str:
    structure = dynamics.structure
    arrays: Iterable[FloatArray] = (
        structure.numbers.astype(float),
        structure.positions,
        structure.cell,
        structure.pbc.astype(float),
        dynamics.velocities,
        dynamics.masses,
    )
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    settings = ("timestep", "steps", "every", "temperature", "friction", "seed")
    numbers = [structure.charge, structure.spin, *(getattr(dynamics, name) for name in settings)]
    digest.update(json.dumps([engine.name, engine.dtype, dict(engine.versions()), numbers], sort_keys=True).encode())
    return digest.hexdigest()
