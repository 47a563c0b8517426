"""What the judge asks of an engine: evaluate a structure, run molecular dynamics. Every adapter package has one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from mlff_engines.manifest import Dtype
from mlff_engines.neighbors import SKIN
from mlff_engines.structure import MASSES, FloatArray, Result, Structure
from mlff_engines.units import ACCELERATION, BOLTZMANN
from mlff_engines.validation.result import CheckResult, Claims, Evaluate


@dataclass(frozen=True)
class Dynamics:
    """One stretch of molecular dynamics at constant volume: velocity Verlet, or Langevin with a temperature.

    | field         | shape  | unit   | meaning                                                            |
    |---------------|--------|--------|--------------------------------------------------------------------|
    | `structure`   |        |        | where it starts                                                    |
    | `velocities`  | (N, 3) | Å/fs   | at the same time as the positions, not half a step away            |
    | `timestep`    | -      | fs     |                                                                    |
    | `steps`       | -      | -      |                                                                    |
    | `every`       | -      | -      | steps between samples; the start is the first sample               |
    | `temperature` | -      | K      | None: NVE by velocity Verlet; else NVT by the engine's own Langevin |
    | `friction`    | -      | 1/ps   | of Langevin                                                        |
    | `seed`        | -      | -      | of Langevin                                                        |
    | `masses`      | (N,)   | amu    | standard atomic weights by default                                 |
    """

    structure: Structure
    velocities: FloatArray
    timestep: float
    steps: int
    every: int = 1
    temperature: float | None = None
    friction: float = 1.0
    seed: int = 0
    masses: FloatArray = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        if not len(self.masses):
            object.__setattr__(self, "masses", np.array(MASSES)[self.structure.numbers])

    @property
    def samples(self) -> int:
        """Number of samples, the start included."""
        return self.steps // self.every + 1


@dataclass(frozen=True)
class Trajectory:
    """What a run yields; T samples of N atoms.

    | field        | shape     | unit | meaning                                                               |
    |--------------|-----------|------|-----------------------------------------------------------------------|
    | `times`      | (T,)      | fs   |                                                                       |
    | `potential`  | (T,)      | eV   | potential energy as the engine reports it                             |
    | `kinetic`    | (T,)      | eV   | of the velocities at the time of the positions                        |
    | `positions`  | (T, N, 3) | Å    | float64, not wrapped into the cell                                    |
    | `velocities` | (T, N, 3) | Å/fs | at the time of the positions                                          |
    | `pressure`   | (T,)      | eV/Å³| of virial and kinetic energy; None where not offered, or without volume |
    | `file`       |           |      | the trajectory in the engine's native format                          |
    """

    times: FloatArray
    potential: FloatArray
    kinetic: FloatArray
    positions: FloatArray
    velocities: FloatArray
    pressure: FloatArray | None = None
    file: Path | None = None

    @property
    def total(self) -> FloatArray:
        """Total energy (T,), eV."""
        return self.potential + self.kinetic


class Engine(Protocol):
    """An artifact in one MD engine.

    Attributes:
        name: as in the table of `mlff_engines.validation.engines`.
        offers: of `mlff_engines.validation.result.EVERYTHING`, what `evaluate` really gets from the engine; the rest of
            its result is NaN.
        suffix: of its native trajectories, e.g. ".dcd".
        dtype: precision of the whole: float32 if either network or engine is.
    """

    name: str
    offers: frozenset[str]
    suffix: str
    dtype: Dtype

    def evaluate(self, structure: Structure) -> Result:
        """One evaluation by the engine itself, in whatever way its users get one.

        Raises:
            MLFFError: the engine refuses the structure.
        """
        ...

    def run(self, dynamics: Dynamics, file: Path) -> Trajectory:
        """Molecular dynamics by the engine's own integrator, into its native trajectory `file`, whose folder exists.

        Raises:
            SimulationError: the run failed; what was written stays readable.
        """
        ...

    def versions(self) -> Mapping[str, str]:
        """Of the engine and whatever of its builds matters to a result."""
        ...

    def own_checks(self, expected: Evaluate, claims: Claims) -> Mapping[str, Callable[[], CheckResult]]:
        """What only this engine has to show, by code: D1, D6. `expected` is the eager model."""
        ...


class MakeEngine(Protocol):
    """How an adapter package makes its engine. `skin` in Å; the files of the engine go below `folder`."""

    def __call__(
        self, artifact: Path, *, folder: Path, device: str = "cpu", dtype: Dtype | None = None, skin: float = SKIN
    ) -> Engine:
        """The engine for one artifact."""
        ...


def thermal(dynamics: Dynamics, temperature: float, seed: int) -> Dynamics:
    """`dynamics` with Maxwell-Boltzmann velocities of exactly `temperature` (K), its centre of mass at rest."""
    rng = np.random.default_rng(seed)
    masses = dynamics.masses[:, None]
    velocities = rng.standard_normal((len(masses), 3)) / np.sqrt(masses)
    velocities -= (masses * velocities).sum(axis=0) / masses.sum()
    free = max(3 * len(masses) - 3, 1)
    have = kinetic_energy(velocities, dynamics.masses)
    want = 0.5 * free * BOLTZMANN * temperature
    return replace(dynamics, velocities=velocities * np.sqrt(want / have) if have > 0 else velocities)


def kinetic_energy(velocities: FloatArray, masses: FloatArray) -> float:
    """Σ m v²/2 in eV, from Å/fs and amu."""
    return float(0.5 * (masses[:, None] * velocities**2).sum() / ACCELERATION)
