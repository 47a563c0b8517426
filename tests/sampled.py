"""Systems whose ensembles are sampled within seconds: liquid argon, and harmonic molecules in vacuum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from mlff_engines.models.lj import ARGON
from mlff_engines.structure import Result, Structure
from mlff_engines.validation.builtin import ARGON_TEMPERATURE, argon_box
from mlff_engines.validation.core_engine import CoreEngine
from mlff_engines.validation.dynamics.replicas import EnsembleOptions
from mlff_engines.validation.engine import Dynamics, Trajectory


class Named(CoreEngine):
    """The core engine under another name, whose thermostat may be off by some degrees."""

    def __init__(self, name: str, evaluate: Callable[[Structure], Result], warmer: float = 0.0) -> None:
        super().__init__(evaluate)
        self.name, self.warmer = name, warmer  # type: ignore[misc]
        self.started = 0

    def run(self, dynamics: Dynamics, file: Path) -> Trajectory:
        self.started += 1
        assert dynamics.temperature is not None
        return super().run(replace(dynamics, temperature=dynamics.temperature + self.warmer), file)


FIRST, SECOND = np.triu_indices(108, 1)


def argon(sigma: float = ARGON.sigma["Ar"]) -> Callable[[Structure], Result]:
    """The shipped model, in numpy for nearest images of 108 atoms: many times as fast as through torch."""
    epsilon, switch, cutoff = ARGON.epsilon["Ar"], ARGON.switch, ARGON.cutoff

    def evaluate(structure: Structure) -> Result:
        x = structure.positions.T.copy()
        d = x.take(SECOND, axis=1) - x.take(FIRST, axis=1)
        d -= structure.cell[0, 0] * np.rint(d / structure.cell[0, 0])
        square = np.einsum("ke,ke->e", d, d)
        near = np.flatnonzero(square < cutoff**2)
        i, j, d, r2 = FIRST[near], SECOND[near], d.take(near, axis=1), square[near]
        r, x6 = np.sqrt(r2), (sigma**2 / r2) ** 3
        pair, slope = 4 * epsilon * x6 * (x6 - 1), 24 * epsilon * x6 * (1 - 2 * x6) / r2
        t = np.maximum(r - switch, 0.0) / (cutoff - switch)
        factor = 1 - t**3 * (10 - 15 * t + 6 * t * t)
        slope = slope * factor - pair * (30 / (cutoff - switch)) * np.square(t * (1 - t)) / r
        forces = np.stack([np.bincount(i, f, 108) - np.bincount(j, f, 108) for f in slope * d], axis=1)
        energy = float(pair @ factor)
        virial = np.diag([-float(slope @ r2) / 3] * 3)  # its trace is right, and nothing else is asked
        return Result(energy, np.full(108, energy / 108), forces, virial)

    return evaluate


LIQUID = Dynamics(argon_box(3), np.zeros((108, 3)), 10.0, 7000, 10, ARGON_TEMPERATURE, friction=5.0)
OPTIONS = EnsembleOptions(equilibration=1200, margin=0.35)


MOLECULES = 6
SHAPE = np.array([[0.0, 0.0, 0.0], [0.76, 0.59, 0.0], [-0.76, 0.59, 0.0]])
BONDS = ((0, 1, 0.962, 2.0), (0, 2, 0.962, 2.0), (1, 2, 1.52, 1.0))  # atoms, Å, eV/Å²


def molecules(stiffer: float = 1.0) -> Callable[[Structure], Result]:
    """OHH of three springs, each tied to a place of its own: modes that only the thermostat couples."""
    places = SITES + SHAPE

    def evaluate(structure: Structure) -> Result:
        x = structure.positions.reshape(MOLECULES, 3, 3)
        away = x - places
        energy, forces = 0.15 * float(np.square(away).sum()), -0.3 * away
        for a, b, length, k in BONDS:
            d = x[:, b] - x[:, a]
            r = np.sqrt(np.square(d).sum(axis=1))[:, None]
            energy += 0.5 * stiffer * k * float(np.square(r - length).sum())
            pull = stiffer * k * (r - length) / r * d
            forces[:, a] += pull
            forces[:, b] -= pull
        forces = forces.reshape(-1, 3)
        return Result(energy, np.full(len(forces), energy / len(forces)), forces, np.zeros((3, 3)))

    return evaluate


SITES = 5.0 * np.stack(np.meshgrid(range(3), range(2), [0], indexing="ij"), -1).reshape(-1, 1, 3)
VAPOUR = Dynamics(
    Structure(np.array([8, 1, 1] * MOLECULES), (SITES + SHAPE).reshape(-1, 3)),
    np.zeros((3 * MOLECULES, 3)),
    timestep=2.0,
    steps=9000,
    every=8,
    temperature=300.0,
    friction=25.0,
    masses=np.array([16.0, 4.0, 4.0] * MOLECULES),  # heavy hydrogen bears a longer time step
)
CHOICE = EnsembleOptions(margin=0.25, resolution=0.06)

BRIEF = replace(VAPOUR, steps=40, every=20)


def first(runs: list[Trajectory], samples: int) -> list[Trajectory]:
    names = ("times", "potential", "kinetic", "positions", "velocities", "pressure")
    return [replace(run, **{name: getattr(run, name)[:samples] for name in names}) for run in runs]
