"""Stage 5: every variant and every baseline from the same starts, into an NPZ file per molecule, variant and replica.

Each replica is sampled at the temperature for `length_ps`, and again without thermostat for `nve_ps`. The arrays of
``MOLECULE/VARIANT_rN.npz``, units of OpenMM, T frames of N atoms and S without thermostat:

| array                        | shape     | what                                                                      |
|------------------------------|-----------|---------------------------------------------------------------------------|
| `time`, `nve_time`           | (T,) (S,) | ps, of the samples                                                        |
| `pos`, `vel`                 | (T, N, 3) | nm and nm/ps, after whole macro-steps                                     |
| `kick`                       | (T, N, 3) | nm/ps, what forces change velocities by in the first half of a time step  |
| `Epot`                       | (T,)      | kJ/mol, true                                                              |
| `nve_Etot`                   | (S,)      | kJ/mol, true potential and kinetic energy, nothing rescaled               |
| `numbers`, `masses`          | (N,)      | atomic numbers; amu                                                       |
| `constraints`, `constraint_lengths` | (C, 2) (C,) | atoms whose distance is fixed, and nm                            |
| `metadata`                   | ()        | JSON: settings, hashes, true calls, wall-clock, what went wrong           |

Energies are found afterwards from the frames: no reporter calls the true potential while it is counted.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import openmm
from openmm import app, unit

from mlff_engines.errors import ConfigError, DataError, SimulationError
from mlff_engines.files import replacing, sha256_of
from mlff_engines.structure import FloatArray
from mlff_openmm.kstep.config import RunConfig, Variant
from mlff_openmm.kstep.corrector import STUDENT_GROUP, count_calls
from mlff_openmm.kstep.drivers import NM, VELOCITY, JumpDynamics, Living, MetropolisSampler
from mlff_openmm.kstep.hybrid import hybrid_integrator
from mlff_openmm.kstep.prepare import Prepared, prepared_in
from mlff_openmm.kstep.samples import Samples, TrueForces, load_true
from mlff_openmm.kstep.simulate import velocity_verlet

HYDROGEN_MASS = 3.024  # amu, after repartitioning: three times its own
JITTER = 0.2  # of the lengths of variant D: no resonance with a period
REFERENCE = "reference"


def run(
    prepared: Path,
    config: RunConfig,
    out: Path,
    *,
    student: Path | None = None,
    jumps: Sequence[Path] = (),
    overwrite: bool = False,
    progress: bool = True,
) -> list[Path]:
    """All variants of all molecules; what is there already from the same settings stays.

    A run that fails, or a macro-step that is refused, is a result: its file holds the frames before, and says why.

    Args:
        prepared: what `mlff_openmm.kstep.prepare.prepare` made.
        config: variants, lengths, starts.
        out: folder of the NPZ files.
        student: artifact, for variants C and D.
        jumps: artifacts of jumps, for variants A; chosen by their k.
        overwrite: make anew what was made with other settings.

    Raises:
        ConfigError: no student or no jump for a variant, a jump for another system, or runs made with other settings.
        DataError: nothing prepared.
    """
    models = _models(config, student, jumps)
    found = []
    for molecule in prepared_in(prepared):
        starts = _Starts(molecule, config, out / molecule.name / "starts.npz", overwrite).positions_and_velocities()
        true = TrueForces(molecule)
        runs = [
            _Run(molecule, config, variant, models.get(variant.name), replica, starts[replica], true)
            for variant in (Variant(kind="verlet", name=REFERENCE), *config.variants)
            for replica in range(config.replicas)
        ]
        with click.progressbar(runs, label=molecule.name, hidden=not progress, item_show_func=str) as bar:
            found += [one.into(out / molecule.name, overwrite) for one in bar]
    return found


def _models(config: RunConfig, student: Path | None, jumps: Sequence[Path]) -> dict[str, Path]:
    """The artifact of each variant that needs one."""
    from mlff_engines.artifact import inspect

    by_steps = {}
    for path in jumps:
        manifest = inspect(path)
        if manifest.jump is None:
            raise ConfigError(f"{path} is no jump but a {manifest.architecture} force field: give it with --student")
        by_steps[manifest.jump.steps] = path
    chosen = {}
    for variant in config.variants:
        if variant.kind in ("A1", "A2"):
            if variant.k not in by_steps:
                raise ConfigError(f"{variant.name}: no jump of {variant.k} steps; given are {sorted(by_steps)}")
            chosen[variant.name] = by_steps[variant.k]
        elif variant.kind in ("C", "D"):
            if student is None:
                raise ConfigError(f"{variant.name} needs a student: --student student.pt")
            chosen[variant.name] = student
    return chosen


def _seed(config: RunConfig, *words: str | int) -> int:
    """Positive and below 2³¹, as OpenMM wants it."""
    numbers = [word if isinstance(word, int) else zlib.crc32(word.encode()) for word in words]
    return int(np.random.SeedSequence([config.seed, *numbers]).generate_state(1)[0] >> 1) or 1


@dataclass(frozen=True)
class _Starts:
    """Equilibrated by the baseline, one of each replica."""

    molecule: Prepared
    config: RunConfig
    file: Path
    overwrite: bool

    def positions_and_velocities(self) -> list[tuple[FloatArray, FloatArray]]:
        """nm and nm/ps; made where they are not there yet."""
        config = self.config
        keys = ("replicas", "temperature_K", "friction_per_ps", "dt_fs", "equilibration_ps", "seed", "platform")
        provenance = {
            "settings": {key: getattr(config, key) for key in keys},
            "sha256": self.molecule.record["sha256"],
        }
        if not _is_made(self.file, provenance, self.overwrite):
            ends = [self._equilibrate(replica) for replica in range(config.replicas)]
            with replacing(self.file) as path:
                x, v = (np.array(part) for part in zip(*ends, strict=True))
                np.savez(path, pos=x, vel=v, metadata=json.dumps(provenance))
        with np.load(self.file) as data:
            return list(zip(data["pos"], data["vel"], strict=True))

    def _equilibrate(self, replica: int) -> tuple[FloatArray, FloatArray]:
        config = self.config
        pdb, system = load_true(self.molecule)
        count_calls(system)
        seed = _seed(config, self.molecule.name, replica)
        integrator = _langevin(config, config.dt_fs, seed)
        living = Living(system, [integrator], config.platform, pdb.positions)
        living.thermalise(config.temperature_K, np.random.default_rng(seed))
        try:
            living.integrator.step(round(1e3 * config.equilibration_ps / config.dt_fs))
        except openmm.OpenMMException as error:
            raise SimulationError(
                f"{self.molecule.name}, replica {replica}: the baseline failed while it was equilibrated: {error}. "
                "Use a smaller dt_fs"
            ) from error
        x, v = living.state()
        return x / NM, v / VELOCITY


def _langevin(config: RunConfig, dt_fs: float, seed: int) -> openmm.Integrator:
    """BAOAB with velocities on step, in the same integrator as variant C."""
    bath = config.temperature_K * unit.kelvin, config.friction_per_ps / unit.picosecond
    integrator = openmm.MTSLangevinIntegrator(*bath, dt_fs * unit.femtosecond, [(0, 1)])
    integrator.setRandomNumberSeed(seed)
    return integrator


class _Stepping(Living):
    """A Context whose integrator's steps are macro-steps."""

    def step(self, count: int = 1) -> None:
        self.integrator.step(count)


@dataclass(frozen=True)
class _Run:
    molecule: Prepared
    config: RunConfig
    variant: Variant
    model: Path | None
    replica: int
    start: tuple[FloatArray, FloatArray]
    true: TrueForces

    def __str__(self) -> str:
        return f"{self.variant.name} {self.replica}"

    @property
    def provenance(self) -> dict[str, Any]:
        """All that decides the frames."""
        return {
            "molecule": self.molecule.name,
            "variant": self.variant.model_dump(),
            "replica": self.replica,
            "settings": self.config.model_dump(exclude={"variants", "replicas"}),
            "sha256": self.molecule.record["sha256"] | ({"model": sha256_of(self.model)} if self.model else {}),
            "versions": {"openmm": openmm.__version__},
        }

    def into(self, folder: Path, overwrite: bool) -> Path:
        """Run what is not yet there; see `run`."""
        file = folder / f"{self.variant.name}_r{self.replica}.npz"
        provenance = json.loads(json.dumps(self.provenance))
        if _is_made(file, provenance, overwrite):
            return file
        thermal = self._sample(self.config.length_ps, thermostat=True)
        free = None
        if self.variant.kind != "D" and self.config.nve_ps and not thermal.problem:
            free = self._sample(self.config.nve_ps, thermostat=False)
        _, system = self._system()
        pairs = [system.getConstraintParameters(i) for i in range(system.getNumConstraints())]
        facts = {
            "macro_step_fs": self.variant.macro_step(self.config.dt_fs),
            "time_step_fs": self._time_step,
            "problem": thermal.problem or (free.problem if free else ""),
            "simulated_ps": thermal.simulated,
            "calls": thermal.calls,
            "seconds": thermal.seconds,
            "counts": thermal.counts,
        }
        with replacing(file) as path:
            np.savez(
                path,
                time=thermal.time,
                pos=thermal.pos,
                vel=thermal.vel,
                kick=thermal.kick,
                Epot=thermal.potential,
                nve_time=free.time if free else np.zeros(0),
                nve_Etot=free.potential + free.kinetic if free else np.zeros(0),
                numbers=self._numbers,
                masses=_masses(system),
                constraints=np.array([(i, j) for i, j, _ in pairs], dtype=np.int64).reshape(-1, 2),
                constraint_lengths=np.array([length._value for _, _, length in pairs]),
                metadata=json.dumps(provenance | facts),
            )
        return file

    @property
    def _time_step(self) -> float:
        """fs, of the innermost steps."""
        variant = self.variant
        if variant.kind in ("C", "D"):
            return self.config.inner_step_fs
        return variant.dt_fs or self.config.dt_fs

    @property
    def _numbers(self) -> Any:
        return np.array([atom.element.atomic_number for atom in self._system()[0].topology.atoms()])

    def _system(self) -> tuple[app.PDBFile, openmm.System]:
        pdb, system = load_true(self.molecule)
        if self.variant.kind == "hmr":
            repartition(system, pdb.topology)
        return pdb, system

    def _sample(self, length: float, *, thermostat: bool) -> Samples:
        samples = Samples(len(self.start[0]))
        try:
            simulation = self._simulation(thermostat)
        except ConfigError as error:
            if self.variant.kind != "C":
                raise
            samples.problem = f"refused: {error}"
            return samples
        setup = dict(simulation.meter.by_purpose)
        macro = 1e-3 * self.variant.macro_step(self.config.dt_fs)
        every = max(1, round(1e-3 * self.config.sample_fs / macro))
        begun = time.perf_counter()
        try:
            for n in range(max(1, round(length / (macro * every)))):
                simulation.step(every)
                x, v = simulation.state()
                if not (np.isfinite(x).all() and np.isfinite(v).all()):
                    raise SimulationError("positions or velocities are not finite")
                samples.add((n + 1) * every * macro, x / NM, v / VELOCITY)
        except (SimulationError, openmm.OpenMMException) as error:
            samples.problem = f"failed after {samples.simulated:.3g} ps: {error}"
        samples.seconds = time.perf_counter() - begun
        samples.calls = {
            "marginal": sum(simulation.meter.by_purpose.values()) - sum(setup.values()),
            "all": sum(simulation.meter.by_purpose.values()),
        }
        if isinstance(simulation, JumpDynamics):
            samples.counts = {"fallbacks": simulation.counts.fallbacks, "clamp_hits": simulation.counts.clamp_hits}
        if isinstance(simulation, MetropolisSampler):
            samples.counts = {"proposals": simulation.proposals.made, "accepted": simulation.proposals.accepted}
        self._energies(samples, simulation)
        return samples

    def _simulation(self, thermostat: bool) -> JumpDynamics | MetropolisSampler | _Stepping:
        config, variant, (x, v) = self.config, self.variant, self.start
        seed = _seed(config, self.molecule.name, variant.name, self.replica, int(thermostat))
        kelvin = config.temperature_K if thermostat else None
        friction = config.friction_per_ps if thermostat else None
        pdb, system = self._system()
        simulation: JumpDynamics | MetropolisSampler | _Stepping
        if variant.kind in ("verlet", "hmr"):
            count_calls(system)
            dt = self._time_step
            integrator = _langevin(config, dt, seed) if thermostat else velocity_verlet(1e-3 * dt)
            simulation = _Stepping(system, [integrator], config.platform, x)
        elif variant.kind in ("A1", "A2"):
            assert self.model is not None
            assert variant.k is not None
            simulation = JumpDynamics(
                pdb.topology, system, self.model, positions=x, steps=variant.k, dt=1e-3 * config.dt_fs,
                corrector=variant.kind, temperature=kelvin, friction=friction, seed=seed, platform=config.platform,
            )  # fmt: skip
        else:
            from openmmml import MLPotential

            # outside its data a student is corrected or rejected, and the gates tell: no warning for every step
            potential = MLPotential(
                "mlff", model=str(self.model), corrector=str(self.molecule.system), outside="ignore"
            )
            mixed = potential.createSystem(pdb.topology, removeCMMotion=False)
            if variant.kind == "C":
                integrator = hybrid_integrator(
                    mixed, 1e-3 * variant.macro_step(config.dt_fs), 1e-3 * config.inner_step_fs,
                    positions=pdb.getPositions(asNumpy=True), temperature=kelvin,
                    friction=config.friction_per_ps, seed=seed, allow_unsafe=variant.allow_unsafe,
                )  # fmt: skip
                simulation = _Stepping(mixed, [integrator], config.platform, x)
            else:
                steps = round(variant.macro_step(config.dt_fs) / config.inner_step_fs)
                return MetropolisSampler(
                    mixed, positions=x, dt=1e-3 * config.inner_step_fs, steps=steps, jitter=JITTER, seed=seed,
                    temperature=config.temperature_K, platform=config.platform,
                )  # fmt: skip
        if variant.kind == "hmr":  # the velocities of the start are those of other masses
            simulation.thermalise(config.temperature_K, np.random.default_rng(seed))
        else:
            simulation.put(x * NM, v * VELOCITY)
        return simulation

    def _energies(self, samples: Samples, simulation: Living) -> None:
        """True energies of the frames, and the kick of the first half time step."""
        particles, inverse = simulation.particles, 1 / simulation.particles.masses[:, None]
        half = 0.5e-3 * self._time_step
        outer = 0.5e-3 * self.variant.macro_step(self.config.dt_fs)
        for x, v in zip(samples.pos, samples.vel, strict=True):
            potential, forces = self.true(x)
            impulse = half * forces
            if self.variant.kind == "C":
                simulation.context.setPositions(x)
                of_student = simulation.context.getState(forces=True, groups={STUDENT_GROUP})
                student = of_student.getForces(asNumpy=True)._value
                impulse = half * student + outer * (forces - student)
            samples.kicks.append(particles.tangent(x * NM, impulse * inverse))
            samples.potentials.append(potential)
            samples.kinetics.append(0.5 * float((v**2 / inverse).sum()))


def repartition(system: openmm.System, topology: app.Topology, mass: float = HYDROGEN_MASS) -> None:
    """Make hydrogens `mass` amu heavy, at the cost of what they are bound to; rigid bonds as before."""
    for one, two in topology.bonds():
        light, heavy = (one, two) if one.element is app.element.hydrogen else (two, one)
        if light.element is not app.element.hydrogen or heavy.element is app.element.hydrogen:
            continue
        added = mass - system.getParticleMass(light.index)._value
        system.setParticleMass(light.index, mass)
        system.setParticleMass(heavy.index, system.getParticleMass(heavy.index)._value - added)


def _masses(system: openmm.System) -> FloatArray:
    return np.array([system.getParticleMass(i)._value for i in range(system.getNumParticles())])


def _is_made(file: Path, provenance: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether `file` is of these settings; if of others, and it must not be overwritten, an error."""
    if not file.exists():
        return False
    try:
        with np.load(file) as data:
            made = json.loads(str(data["metadata"]))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{file} is no run of ours ({error}); remove it") from None
    different = sorted(key for key in provenance if made.get(key) != json.loads(json.dumps(provenance[key])))
    if different and not overwrite:
        raise ConfigError(
            f"{file} was made with another {', '.join(different)}: { {key: made.get(key) for key in different} }, now "
            f"{ {key: provenance[key] for key in different} }. Choose another folder, or --overwrite"
        )
    return not different
