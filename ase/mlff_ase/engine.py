"""ASE as the judge sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ase
import numpy as np
from ase import Atoms, units
from ase.io.extxyz import write_extxyz
from ase.md.langevin import Langevin
from ase.md.md import MolecularDynamics
from ase.md.verlet import VelocityVerlet
from ase.stress import voigt_6_to_full_3x3_stress

from mlff_ase.calculator import MLFFCalculator
from mlff_engines.errors import MLFFError, SimulationError
from mlff_engines.manifest import Dtype
from mlff_engines.neighbors import SKIN
from mlff_engines.structure import Result, Structure
from mlff_engines.validation.engine import Dynamics, Trajectory
from mlff_engines.validation.result import EVERYTHING, CheckResult, Claims, Evaluate


class ASEEngine:
    """An artifact through `MLFFCalculator`, with ASE's velocity Verlet and Langevin. See `MakeEngine`."""

    name = "ase"
    offers = EVERYTHING
    suffix = ".xyz"

    def __init__(
        self, artifact: Path, *, folder: Path, device: str = "cpu", dtype: Dtype | None = None, skin: float = SKIN
    ) -> None:
        self.calculator = MLFFCalculator(artifact, device=device, dtype=dtype, skin=skin, outside="ignore")
        self.dtype: Dtype = dtype or self.calculator.artifact.manifest.dtype

    def evaluate(self, structure: Structure) -> Result:
        """What `atoms.calc` says."""
        atoms = self._atoms(structure)
        calculator = self.calculator
        calculator.calculate(atoms)
        results: dict[str, Any] = calculator.results
        return Result(
            results["energy"],
            results["energies"],
            results["forces"],
            results["virial"],
            voigt_6_to_full_3x3_stress(results["stress"]) if "stress" in results else None,
            results.get("energy_std"),
            results.get("force_std"),
        )

    def run(self, dynamics: Dynamics, file: Path) -> Trajectory:
        """Velocity Verlet or Langevin into extended XYZ, which ASE, MDAnalysis and OVITO read."""
        atoms = self._atoms(dynamics.structure)
        atoms.set_masses(dynamics.masses)
        atoms.set_velocities(dynamics.velocities / units.fs)
        atoms.calc = self.calculator
        integrator = _integrator(atoms, dynamics)
        samples = []
        with file.open("w", encoding="utf-8") as written:
            try:
                for step, _ in enumerate(integrator.irun(dynamics.steps)):
                    if step % dynamics.every == 0:
                        write_extxyz(written, [atoms])
                        pressure = np.nan
                        if atoms.pbc.all():
                            pressure = -np.trace(atoms.get_stress(voigt=False, include_ideal_gas=True)) / 3
                        samples.append(
                            (
                                step * dynamics.timestep,
                                atoms.get_potential_energy(),
                                atoms.get_kinetic_energy(),
                                atoms.get_positions(),
                                atoms.get_velocities() * units.fs,
                                pressure,
                            )
                        )
            except MLFFError as error:
                raise SimulationError(f"step {integrator.nsteps}: {error}") from error
        times, potential, kinetic, positions, velocities, pressures = (np.array(c) for c in zip(*samples, strict=True))
        offered = pressures if atoms.pbc.all() else None
        return Trajectory(times, potential, kinetic, positions, velocities, offered, file)

    def versions(self) -> Mapping[str, str]:
        """Of ASE."""
        return {"ase": str(ase.__version__)}

    def own_checks(self, expected: Evaluate, claims: Claims) -> Mapping[str, Callable[[], CheckResult]]:
        """None."""
        return {}

    @staticmethod
    def _atoms(structure: Structure) -> Atoms:
        info = {"charge": structure.charge, "multiplicity": structure.spin + 1}
        return Atoms(structure.numbers, structure.positions, cell=structure.cell, pbc=structure.pbc, info=info)


def _integrator(atoms: Atoms, dynamics: Dynamics) -> MolecularDynamics:
    timestep = dynamics.timestep * units.fs
    if dynamics.temperature is None:
        return VelocityVerlet(atoms, timestep)
    return Langevin(
        atoms,
        timestep,
        temperature_K=dynamics.temperature,
        friction=dynamics.friction / (1e3 * units.fs),
        fixcm=False,
        rng=np.random.default_rng(dynamics.seed),
    )
