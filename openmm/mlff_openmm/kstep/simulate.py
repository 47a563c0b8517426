"""Stage 2: Langevin dynamics, and segments of constant energy that branch off it, into an NPZ file per molecule.

The arrays of ``NAME_TEMPERATUREK.npz``, units of OpenMM, T frames of N atoms:

| array                 | shape     | what                                                                             |
|-----------------------|-----------|----------------------------------------------------------------------------------|
| `pos`                 | (T, N, 3) | nm                                                                               |
| `vel`                 | (T, N, 3) | nm/ps, at the same time as the positions                                         |
| `forces`              | (T, N, 3) | kJ/mol/nm, where asked for                                                       |
| `box`                 | (3, 3)    | nm, rows a, b, c; zeros in vacuum or implicit solvent                            |
| `Epot`, `Ekin`, `Etot`| (T,)      | kJ/mol                                                                           |
| `segment`             | (T,)      | number of the constant-energy segment that the frame belongs to                  |
| `step`                | (T,)      | time steps since that segment began                                              |
| `window`              | (T,)      | True in a long window, False in a burst                                          |
| `numbers`, `masses`   | (N,)      | atomic numbers; amu                                                              |
| `constraints`         | (C, 2)    | atoms whose distance is fixed                                                    |
| `constraint_lengths`  | (C,)      | nm                                                                               |
| `metadata`            | ()        | JSON: molecule, time step, temperature, thermostat, settings, seeds, hashes      |

A pair for k steps is two frames of one `segment` whose `step` differs by k. Segments are velocity Verlet (RATTLE'd) at
the time step of the thermostatted run, started from it: bursts sample the canonical distribution densely and short,
windows show the conservation of energy. Frames of displaced atoms, segments of their own, teach a force field how
stiff a molecule is. After each of them the thermostatted run goes on from where it was.

`LangevinMiddleIntegrator` keeps velocities half a step behind its positions; half a kick brings them on step, for it is
BAOAB read from another point of its cycle (Zhang et al., J. Phys. Chem. A 123, 6056 (2019)).
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import openmm
from openmm import unit

from mlff_engines.errors import ConfigError, DataError, SimulationError
from mlff_engines.files import replacing
from mlff_engines.structure import FloatArray
from mlff_openmm.kstep.config import MDConfig
from mlff_openmm.kstep.prepare import Prepared, prepared_in, system_settings

CONSTRAINT_TOLERANCE = {"Reference": 1e-8, "CPU": 1e-8}
SINGLE_TOLERANCE = 1e-6  # what mixed precision can do
BROKEN_CONSTRAINT = 1e-4  # relative
PER_FRAME = ("pos", "vel", "forces", "Epot", "Ekin", "Etot", "segment", "step", "window")


def simulate(
    prepared: Path, config: MDConfig, out: Path, *, overwrite: bool = False, progress: bool = True
) -> list[Path]:
    """Trajectories of all molecules in `prepared` at all temperatures.

    Cycles of Langevin dynamics with bursts, each ended by a window, are kept one by one in ``NAME_TEMPERATUREK.parts/``
    until the run is complete: a repeated call goes on after the last that is there, to the very frames of an
    uninterrupted run.

    Args:
        prepared: what `mlff_openmm.kstep.prepare.prepare` made.
        config: the same as there.
        out: folder of the NPZ files.
        overwrite: start anew what was made with other settings.

    Raises:
        ConfigError: molecules prepared, or trajectories begun, with other settings.
        DataError: nothing prepared.
        SimulationError: positions or energies that are not finite, or constraints that are not met.
    """
    runs = [
        Run(molecule, config, temperature) for molecule in prepared_in(prepared) for temperature in config.temperature_K
    ]
    return [run.into(out, overwrite=overwrite, progress=progress) for run in runs]


@dataclass(frozen=True)
class Run:
    """One molecule at one temperature."""

    molecule: Prepared
    config: MDConfig
    temperature: float

    def __post_init__(self) -> None:
        made, wanted = self.molecule.record["settings"], system_settings(self.config)
        different = sorted(key for key in wanted if made[key] != wanted[key])
        if different:
            raise ConfigError(
                f"{self.molecule.system} was prepared with { {key: made[key] for key in different} }, this run asks "
                f"for { {key: wanted[key] for key in different} }: use the same md.yaml, or prepare the molecules anew"
            )

    @property
    def name(self) -> str:
        """Of the file."""
        return f"{self.molecule.name}_{self.temperature:g}K"

    @property
    def cycles(self) -> int:
        """Stretches of Langevin dynamics, all of the same length."""
        return max(1, round(1e3 * self.config.length_ns / self.config.nve_interval_ps))

    @property
    def provenance(self) -> dict[str, Any]:
        """All that decides the frames."""
        settings = self.config.model_dump(exclude={"temperature_K"})
        return {
            "molecule": self.molecule.name,
            "source": self.molecule.record["source"],
            "temperature_K": self.temperature,
            "dt_fs": self.config.dt_fs,
            "thermostat": f"LangevinMiddleIntegrator, {self.config.friction_per_ps:g}/ps; none while frames are saved",
            "settings": settings,
            "sha256": self.molecule.record["sha256"],
            "versions": {"openmm": openmm.__version__},
        }

    def into(self, out: Path, *, overwrite: bool = False, progress: bool = True) -> Path:
        """Run what is not yet there; see `simulate`."""
        file, parts = out / f"{self.name}.npz", out / f"{self.name}.parts"
        if file.exists() and self._is_this(file, overwrite):
            return file
        done = sorted(parts.glob("*.npz"))
        if done and not self._is_this(done[0], overwrite):
            shutil.rmtree(parts)
            done = []
        with click.progressbar(
            length=self.cycles, label=self.name, hidden=not progress, show_pos=True, item_show_func=str
        ) as bar:
            bar.update(len(done))
            for cycle in range(len(done), self.cycles):
                part = parts / f"{cycle:05d}.npz"
                arrays = self._cycle(cycle, done[-1] if done else None)
                _save(part, **arrays, metadata=json.dumps(self.provenance))
                done.append(part)
                bar.update(1)
        self._join(done, file)
        shutil.rmtree(parts)
        return file

    def _cycle(self, cycle: int, before: Path | None) -> dict[str, Any]:
        """The frames of a cycle by array, and the state at its end for the cycle after."""
        pdb, system = self.molecule.load()
        frames: list[dict[str, Any]] = []
        try:
            engine = _Engine(system, self.config, self.temperature, self._seed(cycle))
            if before is None:
                engine.start(pdb.getPositions(asNumpy=True).value_in_unit(unit.nanometer), self._seed(-1))
                engine.langevin(self._steps(self.config.equilibration_ps))
            else:
                with np.load(before) as last:
                    engine.restore((last["end_pos"], last["end_vel"]))
            frames.extend(self._segments(engine, cycle))
            end = engine.state()
        except openmm.OpenMMException as error:
            raise SimulationError(f"{self.name}, cycle {cycle}: {error}. {_ADVICE}") from error
        arrays = {key: np.array([frame[key] for frame in frames]) for key in frames[0]}
        self._check(arrays, system, cycle)
        return arrays | {"end_pos": end[0], "end_vel": end[1]}

    def _segments(self, engine: _Engine, cycle: int) -> Iterator[dict[str, Any]]:
        """Langevin dynamics with bursts, then a window: frames of the constant-energy segments."""
        config = self.config
        steps = self._steps(1e3 * config.length_ns / self.cycles)
        displaced = bool(config.displaced_nm)
        stride = max(1, self._steps(config.burst_interval_ps)) if config.burst_steps or displaced else steps
        segment = cycle * ((1 + displaced) * -(-steps // stride) + 1)
        rng = np.random.default_rng(self._seed(cycle))
        for begun in range(0, steps, stride):
            engine.langevin(min(stride, steps - begun))
            if config.burst_steps:
                for frame in engine.constant_energy(config.burst_steps):
                    yield frame | {"segment": segment, "window": False}
                segment += 1
            if displaced:
                yield engine.displaced(config.displaced_nm, rng) | {"segment": segment, "window": False}
                segment += 1
        window = self._steps(config.nve_window_ps)
        if window:
            for frame in engine.constant_energy(window):
                yield frame | {"segment": segment, "window": True}

    def _steps(self, ps: float) -> int:
        return round(1e3 * ps / self.config.dt_fs)

    def _seed(self, cycle: int) -> int:
        """Positive and below 2³¹, as OpenMM wants it; another for every molecule, temperature and cycle."""
        words = [self.config.seed, zlib.crc32(self.name.encode()), cycle + 1]
        return int(np.random.SeedSequence(words).generate_state(1)[0] >> 1) or 1

    def _check(self, arrays: dict[str, Any], system: openmm.System, cycle: int) -> None:
        finite = np.isfinite(arrays["Etot"]) & np.isfinite(arrays["pos"]).all((1, 2))
        if not finite.all():
            frame = int(np.argmin(finite))
            raise SimulationError(
                f"{self.name}, cycle {cycle}: energy or positions are not finite in frame {frame}. {_ADVICE}"
            )
        pairs, lengths = _constraints(system)
        distances = np.linalg.norm(arrays["pos"][:, pairs[:, 0]] - arrays["pos"][:, pairs[:, 1]], axis=2)
        off = np.abs(distances / lengths - 1)
        if off.max(initial=0.0) > BROKEN_CONSTRAINT:
            frame, worst = (int(index) for index in np.unravel_index(np.argmax(off), off.shape))
            raise SimulationError(
                f"{self.name}, cycle {cycle}, frame {frame}: the constrained distance of atoms {pairs[worst].tolist()} "
                f"is {distances[frame, worst]:.5f} nm in place of {lengths[worst]:.5f}. {_ADVICE}"
            )

    def _is_this(self, file: Path, overwrite: bool) -> bool:
        """Whether `file` is of this very run; if not, and it must not be overwritten, an error."""
        made, now = _provenance(file), json.loads(json.dumps(self.provenance))
        different = sorted(key for key in now if made.get(key) != now[key])
        if different and not overwrite:
            raise ConfigError(
                f"{file} was made with another {', '.join(different)}: "
                f"{ {key: made.get(key) for key in different} }, now { {key: now[key] for key in different} }. "
                "Choose another folder, or --overwrite"
            )
        return not different

    def _join(self, parts: list[Path], file: Path) -> None:
        loaded = [dict(np.load(part)) for part in parts]
        joined = {key: np.concatenate([part[key] for part in loaded]) for key in PER_FRAME if key in loaded[0]}
        pdb, system = self.molecule.load()
        pairs, lengths = _constraints(system)
        box = system.getDefaultPeriodicBoxVectors() if system.usesPeriodicBoundaryConditions() else None
        _save(
            file,
            **joined,
            box=np.zeros((3, 3)) if box is None else np.array(box.value_in_unit(unit.nanometer)),
            numbers=np.array([atom.element.atomic_number for atom in pdb.topology.atoms()]),
            masses=np.array(
                [system.getParticleMass(i).value_in_unit(unit.dalton) for i in range(system.getNumParticles())]
            ),
            constraints=pairs,
            constraint_lengths=lengths,
            metadata=json.dumps(self.provenance | {"seeds": [self._seed(cycle) for cycle in range(-1, self.cycles)]}),
        )


_ADVICE = "Use a smaller dt_fs, constraints, or a longer equilibration; what was saved before stays"


class _Engine:
    """One living Context that switches between Langevin dynamics and velocity Verlet."""

    def __init__(self, system: openmm.System, config: MDConfig, temperature: float, seed: int) -> None:
        self._config, self._temperature, self._dt = config, temperature, 1e-3 * config.dt_fs
        self._tolerance = CONSTRAINT_TOLERANCE.get(config.platform, SINGLE_TOLERANCE)
        self._integrator = openmm.CompoundIntegrator()
        langevin = openmm.LangevinMiddleIntegrator(temperature, config.friction_per_ps, self._dt)
        for integrator in (langevin, velocity_verlet(self._dt)):
            integrator.setRandomNumberSeed(seed)  # the last one seeds all on the Reference platform
            integrator.setConstraintTolerance(self._tolerance)
            self._integrator.addIntegrator(integrator)
        properties = {} if config.platform in CONSTRAINT_TOLERANCE else {"Precision": "mixed"}
        if config.platform == "CPU":
            properties = {"Threads": "1"}  # else forces are summed in an order of their own
        platform = openmm.Platform.getPlatform(config.platform)
        self._context = openmm.Context(system, self._integrator, platform, properties)
        self._masses = np.array([[system.getParticleMass(i)._value] for i in range(system.getNumParticles())])

    def start(self, positions: FloatArray, seed: int) -> None:
        self._context.setPositions(positions)
        self._context.applyConstraints(self._tolerance)
        self._context.setVelocitiesToTemperature(self._temperature, seed)

    def langevin(self, steps: int) -> None:
        self._integrator.setCurrentIntegrator(0)
        self._integrator.step(steps)

    def constant_energy(self, steps: int) -> Iterator[dict[str, Any]]:
        """Frames of velocity Verlet from the state of the Langevin dynamics, to which it returns afterwards."""
        before = self.state()
        self._integrator.setCurrentIntegrator(1)
        forces = self._context.getState(forces=True).getForces(asNumpy=True)._value
        self._context.setVelocities(before[1] + self._dt / 2 * forces / self._masses)
        self._context.applyVelocityConstraints(self._tolerance)
        every = self._config.save_interval_steps
        for step in range(0, steps + 1, every):
            if step:
                self._integrator.step(every)
            yield self._frame(step)
        self.restore(before)

    def displaced(self, width: float, rng: np.random.Generator) -> dict[str, Any]:
        """A frame with positions off by `width` nm in each direction, constraints met."""
        before = self.state()
        self._context.setPositions(before[0] + rng.normal(0, width, before[0].shape))
        self._context.applyConstraints(self._tolerance)
        frame = self._frame(0)
        self.restore(before)
        return frame

    def _frame(self, step: int) -> dict[str, Any]:
        state = self._context.getState(positions=True, velocities=True, forces=self._config.save_forces, energy=True)
        velocities = state.getVelocities(asNumpy=True)._value
        potential = state.getPotentialEnergy()._value
        kinetic = 0.5 * float((self._masses * velocities**2).sum())
        frame = {"pos": state.getPositions(asNumpy=True)._value, "vel": velocities, "step": step}
        if self._config.save_forces:
            frame["forces"] = state.getForces(asNumpy=True)._value
        return frame | {"Epot": potential, "Ekin": kinetic, "Etot": potential + kinetic}

    def state(self) -> tuple[FloatArray, FloatArray]:
        """Positions and velocities."""
        state = self._context.getState(positions=True, velocities=True)
        return state.getPositions(asNumpy=True)._value, state.getVelocities(asNumpy=True)._value

    def restore(self, state: tuple[FloatArray, FloatArray]) -> None:
        self._context.setPositions(state[0])
        self._context.setVelocities(state[1])


def velocity_verlet(dt: float) -> openmm.CustomIntegrator:
    """Velocity Verlet at `dt` ps with RATTLE; velocities on step, unlike those of `VerletIntegrator`."""
    return openmm.MTSIntegrator(dt, [(0, 1)])


def _constraints(system: openmm.System) -> tuple[Any, FloatArray]:
    """Pairs (C, 2) and lengths (C,) in nm."""
    found = [system.getConstraintParameters(i) for i in range(system.getNumConstraints())]
    pairs = np.array([(i, j) for i, j, _ in found], dtype=np.int64).reshape(-1, 2)
    return pairs, np.array([length.value_in_unit(unit.nanometer) for _, _, length in found])


def _save(file: Path, **arrays: Any) -> None:
    with replacing(file) as path:
        np.savez(path, **arrays)


def _provenance(file: Path) -> Any:
    try:
        with np.load(file) as data:
            return json.loads(str(data["metadata"]))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{file} is no trajectory of ours ({error}); remove it, or --overwrite") from None
