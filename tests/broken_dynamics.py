"""Engines whose molecular dynamics has a bug each, for the tests of M1-M4, and which check catches it.

The bugs of an evaluation are those of `broken_engines`, put behind right integrators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize

import broken_engines
from broken_engines import MODELS, evaluator
from mlff_engines.neighbors import VerletList
from mlff_engines.potential import Potential
from mlff_engines.structure import FloatArray, Result, Structure
from mlff_engines.units import ACCELERATION
from mlff_engines.validation.builtin import argon_box
from mlff_engines.validation.core_engine import CoreEngine
from mlff_engines.validation.dynamics.constant_energy import Options, starting
from mlff_engines.validation.engine import Dynamics, Trajectory, kinetic_energy
from mlff_engines.validation.result import Claims, Evaluate
from mlff_engines.validation.static.systems import crystal

SHORT = Options(law=40, reversal=30, same=30, drift=320)


@cache
def start(model: str) -> Dynamics:
    """Hot liquid of two noble gases, where many pairs cross the cutoff; for random weights, a relaxed crystal."""
    make, claims = MODELS[model]
    core = CoreEngine(evaluator(make(), claims))
    if model == "lj":
        box = argon_box(2)
        return starting(core, replace(box, numbers=np.array([18, 36] * (len(box) // 2))), 250.0, seed=1)
    return starting(core, relaxed(core.evaluate, crystal(claims)), 100.0, seed=1)


def relaxed(evaluate: Evaluate, structure: Structure) -> Structure:
    """A minimum of the energy near `structure`."""
    offset = evaluate(structure).energy

    def of(positions: FloatArray) -> tuple[float, FloatArray]:
        found = evaluate(replace(structure, positions=positions.reshape(-1, 3)))
        return found.energy - offset, -found.forces.ravel()

    best = minimize(of, structure.positions.ravel(), jac=True, method="L-BFGS-B", options={"gtol": 1e-2})
    return replace(structure, positions=best.x.reshape(-1, 3))


def right(potential: Potential, claims: Claims) -> CoreEngine:
    return CoreEngine(evaluator(potential, claims))


def evaluating(name: str) -> Callable[[Potential, Claims], CoreEngine]:
    """A bug of `broken_engines`."""
    return lambda potential, claims: CoreEngine(broken_engines.BUGS[name].make(potential, claims).evaluate)


class RarelyUpdatedList(VerletList):
    """The bug: without a skin, and searched anew at every 25th step only."""

    calls = 0

    def _reach(self, structure: Structure) -> float:
        self.calls += 1
        return np.inf if self.calls % 25 != 1 else -1.0


def rarely_updated_list(potential: Potential, claims: Claims) -> CoreEngine:
    engine = evaluator(potential, claims)
    engine.neighbors = RarelyUpdatedList(claims.cutoff, 0.0)
    return CoreEngine(engine)


def lagging_energy(potential: Potential, claims: Claims) -> CoreEngine:
    """The energy of the step before."""
    engine, last = evaluator(potential, claims), [None]

    def evaluate(structure: Structure) -> Result:
        found = engine(structure)
        energy, last[0] = last[0], found.energy  # type: ignore[call-overload]
        return found if energy is None else replace(found, energy=energy)

    return CoreEngine(evaluate)


class HalfStepVelocities(CoreEngine):
    """Leapfrog whose velocities are taken for those of the time of the positions, at the start and in the samples."""

    def run(self, dynamics: Dynamics, file: Path) -> Trajectory:
        def kick(x: FloatArray) -> FloatArray:
            forces = self.evaluate(replace(dynamics.structure, positions=x)).forces
            return 0.5 * dynamics.timestep * ACCELERATION * forces / dynamics.masses[:, None]

        started = dynamics.velocities + kick(dynamics.structure.positions)
        whole = super().run(replace(dynamics, velocities=started), file)
        velocities = np.array([v - kick(x) for x, v in zip(whole.positions, whole.velocities, strict=True)])
        kinetic = np.array([kinetic_energy(v, dynamics.masses) for v in velocities])
        return replace(whole, velocities=velocities, kinetic=kinetic)


class ThermostatOn(CoreEngine):
    def run(self, dynamics: Dynamics, file: Path) -> Trajectory:
        return super().run(replace(dynamics, temperature=100.0, friction=0.01), file)


class WrongTimeUnit(CoreEngine):
    def run(self, dynamics: Dynamics, file: Path) -> Trajectory:
        found = super().run(replace(dynamics, timestep=1.0005 * dynamics.timestep), file)
        return replace(found, times=found.times / 1.0005)


class RoundedMasses(CoreEngine):
    def run(self, dynamics: Dynamics, file: Path) -> Trajectory:
        return super().run(replace(dynamics, masses=np.round(dynamics.masses)), file)


class WrappedPositions(CoreEngine):
    def run(self, dynamics: Dynamics, file: Path) -> Trajectory:
        found, cell = super().run(dynamics, file), dynamics.structure.cell
        return replace(found, positions=(found.positions @ np.linalg.inv(cell)) % 1.0 @ cell)


class SinglePrecisionSteps(CoreEngine):
    """Positions and velocities kept in float32 from step to step, and float64 claimed."""

    def run(self, dynamics: Dynamics, file: Path) -> Trajectory:
        parts = list(self._steps(dynamics, file))[:: dynamics.every]
        joined: dict[str, Any] = {
            name: np.concatenate([getattr(part, name)[:1] for part in parts])
            for name in ("potential", "kinetic", "positions", "velocities", "pressure")
            if getattr(parts[0], name) is not None
        }
        return Trajectory(dynamics.timestep * dynamics.every * np.arange(len(parts)), **joined, file=file)

    def _steps(self, dynamics: Dynamics, file: Path) -> Iterator[Trajectory]:
        for _ in range(dynamics.steps + 1):
            part = super().run(replace(dynamics, steps=1, every=1), file)
            yield part
            x, v = (a[-1].astype(np.float32).astype(np.float64) for a in (part.positions, part.velocities))
            dynamics = replace(dynamics, structure=replace(dynamics.structure, positions=x), velocities=v)


def running(kind: type[CoreEngine]) -> Callable[[Potential, Claims], CoreEngine]:
    return lambda potential, claims: kind(evaluator(potential, claims))


@dataclass(frozen=True)
class Bug:
    """`caught`: the checks that fail for every one of `models`; `missed`: those that pass for the first of them."""

    make: Callable[[Potential, Claims], CoreEngine]
    caught: str
    missed: str = ""
    models: tuple[str, ...] = tuple(MODELS)
    faithful: bool = False  # the eager model is wrong in the same way


BUGS = {
    "cutoff truncated, no envelope": Bug(evaluating("cutoff truncated, no envelope"), "M1", "M2 M3", faithful=True),
    "stale neighbour list": Bug(evaluating("stale neighbour list"), "M3", "M2", ("lj",)),
    "neighbour list updated too rarely": Bug(rarely_updated_list, "M1 M2 M3", "", ("lj",)),
    "1 % non-conservative force": Bug(evaluating("1 % non-conservative force"), "M1 M3", "M2"),
    "0.1 % non-conservative force": Bug(evaluating("0.1 % non-conservative force"), "M1 M3", "M2"),
    "wrong sign of the virial": Bug(evaluating("wrong sign of the virial"), "M3", "M1 M2"),
    "two species swapped": Bug(evaluating("two species swapped"), "M3"),
    "positions in nm for Å": Bug(evaluating("positions in nm for Å"), "M3"),
    "energy unit off by 1.0005": Bug(evaluating("energy unit off by 1.0005"), "M1 M3", "M2"),
    "energy and force unit off by 1.0005": Bug(evaluating("energy and force unit off by 1.0005"), "M3", "M1 M2"),
    "energy summed in float32": Bug(evaluating("energy summed in float32"), "M1 M3", "M2"),
    "energy of the step before": Bug(lagging_energy, "M1 M3", "M2", ("lj",)),
    "velocities half a step off": Bug(running(HalfStepVelocities), "M1 M2 M3", "", ("lj",)),
    "thermostat left on": Bug(running(ThermostatOn), "M1 M2 M3", "", ("lj",)),
    "time unit off by 1.0005": Bug(running(WrongTimeUnit), "M3", "M1 M2", ("lj",)),
    "masses rounded to integers": Bug(running(RoundedMasses), "M3", "M2", ("lj",)),
    "positions wrapped into the cell": Bug(running(WrappedPositions), "M3", "", ("lj",)),
    "positions and velocities kept in float32": Bug(running(SinglePrecisionSteps), "M2 M3", "", ("lj",)),
}
