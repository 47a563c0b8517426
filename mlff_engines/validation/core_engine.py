"""The engine that every other is judged by: the eager model and two textbook integrators."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from mlff_engines.errors import MLFFError, SimulationError
from mlff_engines.files import replacing
from mlff_engines.manifest import Dtype
from mlff_engines.structure import FloatArray, Result, Structure
from mlff_engines.units import ACCELERATION, BOLTZMANN
from mlff_engines.validation.engine import Dynamics, Trajectory, kinetic_energy
from mlff_engines.validation.result import EVERYTHING, CheckResult, Claims, Evaluate


class CoreEngine:
    """Velocity Verlet and BAOAB Langevin around any evaluation.

    | equation                                        | variable      |
    |-------------------------------------------------|---------------|
    | B: v += h/2 F/m                                 | `kick`        |
    | A: x += h v (NVE), h/2 v twice (NVT)            | `drift`       |
    | O: v = c v + sqrt((1 - c²) k_B T/m) ξ, c = e^-γh | `c`, `noise` |

    NVE: Swope et al., J. Chem. Phys. 76, 637 (1982). NVT: Leimkuhler and Matthews, Appl. Math. Res. Express 2013, 34;
    configurations are those of the temperature up to O(h²), and exactly so for a harmonic well.

    Args:
        evaluate: energies, forces and virial.
        dtype: its precision.
    """

    name = "core"
    offers = EVERYTHING
    suffix = ".npz"

    def __init__(self, evaluate: Callable[[Structure], Result], dtype: Dtype = "float64") -> None:
        self.evaluate = evaluate
        self.dtype: Dtype = dtype

    def run(self, dynamics: Dynamics, file: Path) -> Trajectory:
        """Molecular dynamics; `file` holds the fields of the trajectory.

        Raises:
            SimulationError: the model refuses a structure on the way.
        """
        samples: list[tuple[float, float, float, FloatArray, FloatArray, float]] = []
        h, masses = dynamics.timestep, dynamics.masses[:, None]
        x, v = dynamics.structure.positions.copy(), dynamics.velocities.copy()
        rng, c, spread = np.random.default_rng(dynamics.seed), 1.0, np.zeros(())
        if dynamics.temperature is not None:
            c = float(np.exp(-dynamics.friction * 1e-3 * h))
            spread = np.sqrt((1 - c**2) * BOLTZMANN * dynamics.temperature * ACCELERATION / masses)
        for step in range(dynamics.steps + 1):
            try:
                result = self.evaluate(replace(dynamics.structure, positions=x))
            except MLFFError as error:
                raise SimulationError(f"step {step}: {error}") from error
            kick = 0.5 * h * ACCELERATION * result.forces / masses
            if step:
                v += kick
            if step % dynamics.every == 0:
                kinetic = kinetic_energy(v, dynamics.masses)
                volume = dynamics.structure.volume
                pressure = np.nan if volume is None else (2 * kinetic + np.trace(result.virial)) / (3 * volume)
                samples.append((step * h, result.energy, kinetic, x.copy(), v.copy(), float(pressure)))
            v += kick
            if dynamics.temperature is None:
                x = x + h * v
            else:
                x = x + 0.5 * h * v
                v = c * v + spread * rng.standard_normal(v.shape)
                x = x + 0.5 * h * v
        times, potential, kinetics, positions, velocities, pressures = (np.array(column) for column in zip(*samples))  # noqa: B905
        with replacing(file) as temporary, temporary.open("wb") as stream:
            np.savez(stream, times=times, positions=positions, velocities=velocities)
        offered = None if dynamics.structure.volume is None else pressures
        return Trajectory(times, potential, kinetics, positions, velocities, offered, file)

    def versions(self) -> Mapping[str, str]:
        """Of torch."""
        return {"torch": str(torch.__version__)}

    def own_checks(self, expected: Evaluate, claims: Claims) -> Mapping[str, Callable[[], CheckResult]]:
        """None."""
        return {}
