"""Stage 5: every variant and every baseline from the same starts, into an NPZ file per molecule, variant and replica.

Each replica is sampled at the temperature for `length_ps`, and again without thermostat for `nve_ps`. The arrays of
``MOLECULE/VARIANT_rN.npz``, units of OpenMM, T frames of N atoms and S without thermostat:

| array                        | shape     | what                                                                      |
|------------------------------|-----------|---------------------------------------------------------------------------|
| `time`, `nve_time`           | (T,) (S,) | ps, of the samples                                                        |
| `pos`, `vel`                 | (T, N, 3) | nm and nm/ps, after whole macro-steps                                     |
| `kick`                       | (T, N, 3) | nm/ps, what forces change velocities by in the first half of a time step  |
| `Epot`                       | (T,)      | kJ/mol, true                                                              |
| `slope`, `curvature`         | (T,)      | kJ/mol/(amu nm²): their means have the ratio kT, see `configurational`    |
| `nve_Etot`                   | (S,)      | kJ/mol, true potential and kinetic energy, nothing rescaled               |
| `numbers`, `masses`          | (N,)      | atomic numbers; amu                                                       |
| `constraints`, `constraint_lengths` | (C, 2) (C,) | atoms whose distance is fixed, and nm                            |
| `metadata`                   | ()        | JSON: settings, hashes, true calls, wall-clock, what went wrong           |

Energies are found afterwards from the frames: no reporter calls the true potential while it is counted. With `dcd`, the
frames stand in ``MOLECULE/VARIANT_rN.dcd`` besides; ``molecules/MOLECULE.pdb`` is their topology.
"""

from __future__ import annotations

import json
import multiprocessing
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
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
from mlff_openmm.kstep.corrector import count_calls
from mlff_openmm.kstep.drivers import NM, VELOCITY, JumpDynamics, Living, MetropolisSampler
from mlff_openmm.kstep.hybrid import multiple_time_steps
from mlff_openmm.kstep.prepare import Prepared, prepared_in
from mlff_openmm.kstep.samples import Samples
from mlff_openmm.kstep.simulations import Recipe, Simulation, needs_jump, needs_student

REFERENCE = "reference"


def run(
    prepared: Path,
    config: RunConfig,
    out: Path,
    *,
    student: Path | None = None,
    jumps: Sequence[Path] = (),
    processes: int = 1,
    overwrite: bool = False,
    progress: bool = True,
) -> list[Path]:
    """All variants of all molecules; what is there already from the same settings stays.

    A run that fails, or a macro-step that is refused, is a result: its file holds the frames before, and says why.

    Args:
        prepared: what `mlff_openmm.kstep.prepare.prepare` made.
        config: variants, lengths, starts.
        out: folder of the NPZ files.
        student: artifact, for variants C and D and the student alone.
        jumps: artifacts of jumps, for variants A and jumps alone; chosen by their k.
        processes: how many simulations at a time.
        overwrite: make anew what was made with other settings.

    Raises:
        ConfigError: no student or no jump for a variant, a jump for another system, or runs made with other settings.
        DataError: nothing prepared.
    """
    models = _models(config, student, jumps)
    reference = Variant(kind="verlet", name=REFERENCE, length_ps=config.reference_ps)
    runs = []
    for molecule in prepared_in(prepared):
        starts = _Starts(molecule, config, out / molecule.name / "starts.npz", overwrite).positions_and_velocities()
        for variant in (reference, *config.variants):
            recipe = Recipe(molecule, config, variant, models.get(variant.name))
            runs += [_Run(recipe, replica, starts[replica]) for replica in range(config.replicas)]
    with click.progressbar(length=len(runs), label="runs", hidden=not progress, show_pos=True) as bar:
        for _ in _all(runs, out, overwrite, processes):
            bar.update(1)
    return [one.file(out) for one in runs]


def _all(runs: Sequence[_Run], out: Path, overwrite: bool, processes: int) -> Iterator[Path]:
    if processes == 1:
        yield from (one.into(out, overwrite) for one in runs)
        return
    # spawned: torch and OpenMM have threads, which do not survive a fork
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_one_thread) as pool:
        waiting = [pool.submit(one.into, out, overwrite) for one in runs]
        try:
            for done in as_completed(waiting):
                yield done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _models(config: RunConfig, student: Path | None, jumps: Sequence[Path]) -> dict[str, Path]:
    """The artifact of each variant that needs one."""
    from mlff_engines.manifest import inspect

    by_steps = {}
    for path in jumps:
        manifest = inspect(path)
        if manifest.jump is None:
            raise ConfigError(f"{path} is no jump but a {manifest.architecture} force field: give it with --student")
        by_steps[manifest.jump.steps] = path
    chosen = {}
    for variant in config.variants:
        if needs_jump(variant):
            if variant.k not in by_steps:
                raise ConfigError(f"{variant.name}: no jump of {variant.k} steps; given are {sorted(by_steps)}")
            chosen[variant.name] = by_steps[variant.k]
        elif needs_student(variant):
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
        pdb, system = self.molecule.load_moving()
        count_calls(system)
        seed = _seed(config, self.molecule.name, replica)
        step = 1e-3 * config.dt_fs
        integrator = multiple_time_steps(step, [(0, 1)], config.temperature_K, config.friction_per_ps, seed)
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


@dataclass(frozen=True)
class _Run:
    recipe: Recipe
    replica: int
    begin: tuple[FloatArray, FloatArray]  # nm and nm/ps

    @property
    def config(self) -> RunConfig:
        return self.recipe.config

    @property
    def variant(self) -> Variant:
        return self.recipe.variant

    @property
    def provenance(self) -> dict[str, Any]:
        """All that decides the frames."""
        model = self.recipe.model
        return {
            "molecule": self.recipe.molecule.name,
            "variant": self.variant.model_dump(),
            "replica": self.replica,
            "settings": self.config.model_dump(exclude={"variants", "replicas", "reference_ps", "dcd"}),
            "sha256": self.recipe.molecule.record["sha256"] | ({"model": sha256_of(model)} if model else {}),
            "versions": {"openmm": openmm.__version__},
        }

    def file(self, out: Path) -> Path:
        return out / self.recipe.molecule.name / f"{self.variant.name}_r{self.replica}.npz"

    def into(self, out: Path, overwrite: bool) -> Path:
        """Run what is not yet there; see `run`."""
        file = self.file(out)
        provenance = json.loads(json.dumps(self.provenance))
        if _is_made(file, provenance, overwrite):
            return file
        config, variant = self.config, self.variant
        thermal = self._sample(variant.length_ps or config.length_ps, thermostat=True)
        alone = config.nve_ps if variant.nve_ps is None else variant.nve_ps
        free = None
        if variant.kind != "D" and alone and not thermal.problem:
            free = self._sample(alone, thermostat=False)
        pdb, system = self.recipe.system()
        pairs = [system.getConstraintParameters(i) for i in range(system.getNumConstraints())]
        facts = {
            "macro_step_fs": config.macro_step(variant),
            "time_step_fs": config.time_step(variant),
            "problem": thermal.problem or (free.problem if free else ""),
            "simulated_ps": thermal.simulated,
            "calls": thermal.calls,
            "seconds": thermal.seconds,
            "counts": thermal.counts,
        }
        if config.dcd:
            _write_dcd(file.with_suffix(".dcd"), pdb.topology, thermal)
        with replacing(file) as path:
            np.savez(
                path,
                time=thermal.time,
                pos=thermal.pos,
                vel=thermal.vel,
                kick=thermal.kick,
                Epot=thermal.potential,
                slope=thermal.slope,
                curvature=thermal.curvature,
                nve_time=free.time if free else np.zeros(0),
                nve_Etot=free.potential + free.kinetic if free else np.zeros(0),
                numbers=np.array([atom.element.atomic_number for atom in pdb.topology.atoms()]),
                masses=np.array([system.getParticleMass(i)._value for i in range(system.getNumParticles())]),
                constraints=np.array([(i, j) for i, j, _ in pairs], dtype=np.int64).reshape(-1, 2),
                constraint_lengths=np.array([length._value for _, _, length in pairs]),
                metadata=json.dumps(provenance | facts),
            )
        return file

    def _sample(self, length: float, *, thermostat: bool) -> Samples:
        config, recipe = self.config, self.recipe
        samples = Samples(len(self.begin[0]))
        seed = _seed(config, recipe.molecule.name, self.variant.name, self.replica, int(thermostat))
        try:
            simulation = recipe.start(*self.begin, seed, thermostat=thermostat)
        except ConfigError as error:
            if self.variant.kind not in ("C", "mts"):
                raise
            samples.problem = f"refused: {error}"
            return samples
        setup = simulation.meter.calls
        macro = recipe.macro_step
        every = max(1, round(1e-3 * config.sample_fs / macro))
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
        samples.calls = {"marginal": simulation.meter.calls - setup, "all": simulation.meter.calls}
        samples.counts = _counts(simulation)
        samples.evaluate(recipe, simulation, thermostat=thermostat)
        return samples


def _counts(simulation: Simulation) -> dict[str, int]:
    if isinstance(simulation, JumpDynamics):
        return {"fallbacks": simulation.counts.fallbacks, "clamp_hits": simulation.counts.clamp_hits}
    if isinstance(simulation, MetropolisSampler):
        return {"proposals": simulation.proposals.made, "accepted": simulation.proposals.accepted}
    return {}


def _write_dcd(file: Path, topology: app.Topology, samples: Samples) -> None:
    interval = samples.times[0] if samples.times else 1.0
    with replacing(file) as path, path.open("wb") as stream:
        dcd = app.DCDFile(stream, topology, interval * unit.picosecond)
        for x in samples.xs:
            dcd.writeModel(x * unit.nanometer)


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
