"""The simulation of each variant and baseline, from a start: a living Context that makes macro-steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openmm
from openmm import app

from mlff_engines.errors import ConfigError
from mlff_engines.kstep.jumps import ballistic
from mlff_engines.structure import FloatArray
from mlff_openmm.kstep.config import OF_JUMP, OF_STUDENT, RunConfig, Variant
from mlff_openmm.kstep.corrector import STUDENT_GROUP, count_calls
from mlff_openmm.kstep.drivers import NM, VELOCITY, JumpDynamics, Living, MetropolisSampler
from mlff_openmm.kstep.hybrid import hybrid_integrator, multiple_time_steps
from mlff_openmm.kstep.mmff import PAIRS
from mlff_openmm.kstep.prepare import Prepared

HYDROGEN_MASS = 3.024  # amu, after repartitioning: three times its own
JITTER = 0.2  # of the lengths of variant D: no resonance with a period
NONBONDED = (openmm.NonbondedForce, openmm.CustomNonbondedForce, openmm.GBSAOBCForce, openmm.CustomGBForce)
SLOW_GROUP = 1  # of the nonbonded forces, for multiple time steps


class Stepping(Living):
    """A Context whose integrator's steps are macro-steps."""

    def step(self, count: int = 1) -> None:
        """Macro-steps."""
        self.integrator.step(count)


Simulation = JumpDynamics | MetropolisSampler | Stepping


@dataclass(frozen=True)
class Recipe:
    """What a variant does to a molecule.

    Attributes:
        model: artifact of the student or jump, if it needs one.
    """

    molecule: Prepared
    config: RunConfig
    variant: Variant
    model: Path | None = None

    def start(self, x: FloatArray, v: FloatArray, seed: int, *, thermostat: bool) -> Simulation:
        """The simulation from positions (N, 3) nm and velocities nm/ps.

        Raises:
            ConfigError: an unsafe macro-step, or nonbonded forces that cannot be told from others.
            MLFFError: see `JumpDynamics` and `mlff_openmm.force.MLFFForce`.
        """
        make: dict[str, Callable[[FloatArray, int, bool], Simulation]] = {
            "jump": self._jump,
            "A1": self._jump,
            "A2": self._jump,
            "D": self._sampler,
        }
        simulation = make.get(self.variant.kind, self._stepping)(x, seed, thermostat)
        if self.variant.kind == "hmr":  # the velocities of the start are those of other masses
            simulation.thermalise(self.config.temperature_K, np.random.default_rng(seed))
        elif self.variant.kind != "D":
            simulation.put(x * NM, v * VELOCITY)
        return simulation

    def system(self) -> tuple[app.PDBFile, openmm.System]:
        """The true one, with the masses of the variant."""
        pdb, system = self.molecule.load_moving()
        if self.variant.kind == "hmr":
            repartition(system, pdb.topology)
        return pdb, system

    @property
    def macro_step(self) -> float:
        """ps."""
        return 1e-3 * self.config.macro_step(self.variant)

    def _kelvin(self, thermostat: bool) -> float | None:
        return self.config.temperature_K if thermostat else None

    def _stepping(self, x: FloatArray, seed: int, thermostat: bool) -> Stepping:
        config, kelvin, inner = self.config, self._kelvin(thermostat), 1e-3 * self.config.time_step(self.variant)
        if self.variant.kind in ("C", "student"):
            pdb, system = self._corrected()
        else:
            pdb, system = self.system()
            count_calls(system)
        if self.variant.kind == "C":
            where = [pdb.getPositions(asNumpy=True)._value, x]
            integrator = hybrid_integrator(
                system, self.macro_step, inner, positions=where, temperature=kelvin, friction=config.friction_per_ps,
                seed=seed, allow_unsafe=self.variant.allow_unsafe,
            )  # fmt: skip
        else:
            groups = [(STUDENT_GROUP, round(self.macro_step / inner))]
            if self.variant.kind == "mts":
                _split(system, self.variant.name)
                groups = [(SLOW_GROUP, 1), *groups]
            integrator = multiple_time_steps(self.macro_step, groups, kelvin, config.friction_per_ps, seed)
        return Stepping(system, [integrator], config.platform, x)

    def _jump(self, x: FloatArray, seed: int, thermostat: bool) -> JumpDynamics:
        config, variant = self.config, self.variant
        assert variant.k is not None
        pdb, system = self.system()
        jump = ballistic(variant.k * config.dt_fs) if variant.ballistic else self.model
        assert jump is not None
        return JumpDynamics(
            pdb.topology, system, jump, positions=x, steps=variant.k, dt=1e-3 * config.dt_fs,
            corrector=None if variant.kind == "jump" else variant.kind, temperature=self._kelvin(thermostat),  # type: ignore[arg-type]
            friction=config.friction_per_ps if thermostat else None, seed=seed, platform=config.platform,
        )  # fmt: skip

    def _sampler(self, x: FloatArray, seed: int, thermostat: bool) -> MetropolisSampler:
        config = self.config
        inner = 1e-3 * config.time_step(self.variant)
        return MetropolisSampler(
            self._corrected()[1], positions=x, dt=inner, steps=round(self.macro_step / inner), jitter=JITTER,
            temperature=config.temperature_K, seed=seed, platform=config.platform,
        )  # fmt: skip

    def _corrected(self) -> tuple[app.PDBFile, openmm.System]:
        from openmmml import MLPotential

        pdb, _ = self.molecule.load()
        # outside its data a student is corrected or rejected, and the gates tell: no warning for every step
        potential = MLPotential("mlff", model=str(self.model), corrector=str(self.molecule.system), outside="ignore")
        return pdb, potential.createSystem(pdb.topology, removeCMMotion=False)


def needs_student(variant: Variant) -> bool:
    """Whether the artifact of a force field must be given."""
    return variant.kind in OF_STUDENT


def needs_jump(variant: Variant) -> bool:
    """Whether the artifact of a jump must be given."""
    return variant.kind in OF_JUMP and not variant.ballistic


def _split(system: openmm.System, name: str) -> None:
    """Nonbonded forces into `SLOW_GROUP`; the true potential is counted there, as its dear part.

    Raises:
        ConfigError: the potential is not a sum of bonded and nonbonded forces.
    """
    kinds = {True: 0, False: 0}
    for force in system.getForces():
        counts = isinstance(force, openmm.PythonForce)  # the counter itself, or a learned potential
        slow = isinstance(force, NONBONDED) or force.getName() == PAIRS
        kinds[slow] += not counts
        force.setForceGroup(SLOW_GROUP if slow or counts else 0)
    if not all(kinds.values()):
        raise ConfigError(
            f"{name}: multiple time steps need a potential of bonded and nonbonded forces; this one has "
            f"{kinds[False]} and {kinds[True]}. Leave the variant out"
        )


def repartition(system: openmm.System, topology: app.Topology, mass: float = HYDROGEN_MASS) -> None:
    """Make hydrogens `mass` amu heavy, at the cost of what they are bound to; rigid bonds as before."""
    for one, two in topology.bonds():
        light, heavy = (one, two) if one.element is app.element.hydrogen else (two, one)
        if light.element is not app.element.hydrogen or heavy.element is app.element.hydrogen:
            continue
        added = mass - system.getParticleMass(light.index)._value
        system.setParticleMass(light.index, mass)
        system.setParticleMass(heavy.index, system.getParticleMass(heavy.index)._value - added)
