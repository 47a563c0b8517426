"""M7: how long molecules stay molecules, and what is left behind where they do not.

Replicas at constant temperature, each of which ends for good at its first failure: the share that is left over time is
the estimate of E. Kaplan and P. Meier, J. Am. Stat. Assoc. 53, 457 (1958). A molecule has failed when a bond is off by
0.5 Å: X. Fu et al., "Forces are not enough", arXiv:2210.07237.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from mlff_engines.errors import ConfigError, MLFFError, SimulationError
from mlff_engines.files import replacing
from mlff_engines.neighbors import neighbor_list
from mlff_engines.structure import NUMBERS, SYMBOLS, BoolArray, FloatArray, IntArray, Structure
from mlff_engines.units import ACCELERATION, BOLTZMANN
from mlff_engines.validation.engine import Dynamics, Engine, Trajectory, thermal
from mlff_engines.validation.result import NAMES, CheckResult, Curve, Plot, Verdict
from mlff_engines.validation.trajectories.observables import needed, topology

CONFIDENCE = 0.95
GOOD = 0.5  # of the way to a limit: a frame to start again from


@dataclass(frozen=True)
class StabilityOptions:
    """How long to watch, and what counts as broken.

    | field           | unit | meaning                                                                           |
    |-----------------|------|-----------------------------------------------------------------------------------|
    | `replicas`      | -    |                                                                                   |
    | `duration`      | ps   | of each replica                                                                   |
    | `stretch`       | ps   | run and looked at in one go                                                       |
    | `interval`      | fs   | between the samples looked at                                                     |
    | `enough`        | ps   | over all replicas; where nothing fails in less, nothing is concluded              |
    | `bond`          | Å    | change of a bond's length since the start                                         |
    | `chance`        | -    | per sample, that a right thermostat reaches the temperature that counts as a spike |
    | `speed`         | Å/fs | of an atom                                                                        |
    | `min_distances` | Å    | of a pair such as "H-O", by training; by default the sum of the covalent radii    |
    | `closeness`     | -    | share of these distances                                                          |
    | `before`        | -    | samples kept from before a failure                                                |
    """

    replicas: int = 4
    duration: float = 10.0
    stretch: float = 1.0
    interval: float = 10.0
    enough: float = 10.0
    bond: float = 0.5
    chance: float = 1e-12
    speed: float = 1.0
    min_distances: Mapping[str, float] = field(default_factory=dict)
    closeness: float = 0.7
    before: int = 10


@dataclass(frozen=True)
class Failure:
    """Where a replica ended.

    Attributes:
        time: fs since its start.
        reason: what went beyond which limit.
        atoms: that it concerns; none where the engine gave up without naming any.
        restart: the last frame far from every limit.
        frames: samples up to the failure, which is the last one.
        apart: largest difference (eV/Å) between the engine's forces and the eager model's on the frame before; NaN
            where either refuses it.
    """

    time: float
    reason: str
    atoms: Sequence[int]
    restart: Path
    frames: Path
    apart: float


def check_stability(
    engine: Engine, core: Engine, start: Dynamics, folder: Path, options: StabilityOptions | None = None
) -> CheckResult:
    """M7: no replica may break within its duration.

    Each failure leaves `replica-K-restart.xyz` and `replica-K-failure.xyz` in `folder`: see `Failure`.

    Args:
        engine: to be judged.
        core: the eager model in float64; it tells a wrong engine from an unstable model.
        start: structure, time step and temperature, with or without velocities.
        folder: for trajectories and what failures leave.
        options: how long, and the limits.

    Raises:
        ConfigError: `start` has no temperature.
    """
    options = options or StabilityOptions()
    if start.temperature is None:
        raise ConfigError("stability is judged at constant temperature: give the start one")
    folder.mkdir(parents=True, exist_ok=True)
    watch = Watch(start.structure, start.masses, start.temperature, options)
    failures = [_replica(engine, core, start, watch, folder, number) for number in range(options.replicas)]
    times = np.array([options.duration if failure is None else 1e-3 * failure.time for failure in failures])
    broken = [failure for failure in failures if failure is not None]
    survival = _survival(times, np.array([failure is not None for failure in failures]), options.duration)
    plot = Plot("Survival", "time, ps", "share of replicas unbroken", survival)
    verdict: Verdict = "fail" if broken else "pass"
    if broken:
        first = min(broken, key=lambda failure: failure.time)
        detail = f"{len(broken)} of {len(failures)} replicas failed, the first at {1e-3 * first.time:.3g} ps: "
        detail += f"{first.reason}; see {first.restart.name} and {first.frames.name}"
        if np.isfinite(first.apart):
            detail += f"; just before, its forces and the eager model's differ by {first.apart:.1g} eV/Å"
    else:
        detail = f"none of {len(failures)} replicas failed in {times.sum():.3g} ps"
        if times.sum() < options.enough:
            verdict, detail = "inconclusive", f"{detail}; {options.enough:g} ps are needed"
    figures = {
        "time watched, ps": float(times.sum()),
        # exponential waiting times: at this rate, as few failures are as likely as 1 - confidence
        "failures per ps, at most": float(
            needed("scipy.stats").chi2.ppf(CONFIDENCE, 2 * len(broken) + 2) / (2 * times.sum())
        ),
        **{f"replica {n} failed at, ps": f.time / 1e3 for n, f in enumerate(failures) if f is not None},
    }
    return CheckResult("M7", NAMES["M7"], verdict, 1.0 - survival[0].y[-1], 0.0, detail, figures, [plot])


class Watch:
    """How far the samples of a run are from what counts as broken: 0 where it started, 1 at the limit."""

    def __init__(self, structure: Structure, masses: FloatArray, temperature: float, options: StabilityOptions) -> None:
        self.structure, self.masses, self.temperature, self.options = structure, masses, temperature, options
        self.bonds, self._images = _bonds(structure)
        self.lengths = self._lengths(structure.positions[None])[0]
        degrees = 3 * max(len(structure), 1)
        self.spike = float(needed("scipy.stats").chi2.isf(options.chance, degrees)) / degrees  # of the temperature

    def levels(self, run: Trajectory) -> dict[str, FloatArray]:
        """(T,) for each kind of failure."""
        energies = self.masses[:, None] * run.velocities**2 / ACCELERATION
        hot = energies.sum(axis=(1, 2)) / (3 * max(len(self.structure), 1) * BOLTZMANN * self.temperature)
        return {
            "bond": np.abs(self._lengths(run.positions) - self.lengths).max(axis=1, initial=0.0) / self.options.bond,
            "temperature": (hot - 1) / (self.spike - 1),
            "speed": np.linalg.norm(run.velocities, axis=-1).max(axis=1, initial=0.0) / self.options.speed,
            "distance": np.array([self._nearest(x)[0] if np.isfinite(x).all() else np.inf for x in run.positions]),
        }

    def explain(self, kind: str, positions: FloatArray, velocities: FloatArray) -> tuple[str, list[int]]:
        """What is wrong with a frame, and on which atoms."""
        numbers = self.structure.numbers
        if kind == "bond":
            now = self._lengths(positions[None])[0]
            worst = int(np.abs(now - self.lengths).argmax())
            atoms = [int(atom) for atom in self.bonds[worst]]
            return f"bond {_named(numbers, atoms)} is {now[worst]:.2f} Å, from {self.lengths[worst]:.2f} Å", atoms
        if kind == "distance":
            _, atoms, distance = self._nearest(positions)
            return f"{_named(numbers, atoms)} are {distance:.2f} Å apart", atoms
        energies = 0.5 * (self.masses[:, None] * velocities**2).sum(axis=1) / ACCELERATION
        atoms = [int(atom) for atom in np.argsort(energies)[::-1][:3]]
        if kind == "temperature":
            kelvin = 2 * energies.sum() / (3 * len(numbers) * BOLTZMANN)
            return f"{kelvin:.0f} K in a bath of {self.temperature:g} K, most of it on {_named(numbers, atoms)}", atoms
        speeds = np.linalg.norm(velocities, axis=1)
        atom = int(speeds.argmax())
        return f"{_named(numbers, [atom])} moves at {speeds[atom]:.2g} Å/fs", [atom]

    def _lengths(self, positions: FloatArray) -> FloatArray:
        """(T, N, 3) -> (T, bonds). Trajectories are not wrapped: a bond keeps the image that it had at the start."""
        vectors = positions[:, self.bonds[:, 1]] - positions[:, self.bonds[:, 0]] + self._images
        lengths: FloatArray = np.linalg.norm(vectors, axis=-1)
        return lengths

    def _nearest(self, positions: FloatArray) -> tuple[float, list[int], float]:
        """Level, atoms and distance of the pair that is closest for its kind."""
        cell, pbc = self.structure.cell, self.structure.pbc
        pairs, vectors = neighbor_list(positions, cell, pbc, float(self._allowed.max()))
        if not len(vectors):
            return 0.0, [], np.inf
        distances = np.linalg.norm(vectors, axis=1)
        share = distances / self._allowed[tuple(self.structure.numbers[pairs])]
        worst = int(share.argmin())
        level = max(0.0, (1 - share[worst]) / (1 - self.options.closeness))
        return float(level), [int(atom) for atom in pairs[:, worst]], float(distances[worst])

    @cached_property
    def _allowed(self) -> FloatArray:
        """Å, by two atomic numbers; zero where neither atom is there."""
        table, radius = np.zeros((119, 119)), needed("rdkit.Chem").GetPeriodicTable().GetRcovalent
        here = [int(number) for number in np.unique(self.structure.numbers)]
        for a in here:
            for b in here:
                table[a, b] = radius(a) + radius(b)
        for pair, distance in self.options.min_distances.items():
            a, b = (NUMBERS[symbol] for symbol in pair.split("-"))
            table[a, b] = table[b, a] = distance
        return table


def _replica(engine: Engine, core: Engine, start: Dynamics, watch: Watch, folder: Path, number: int) -> Failure | None:
    """Run until something breaks, or to the end."""
    options, temperature = watch.options, watch.temperature
    every = max(1, round(options.interval / start.timestep))
    longest = max(every, round(1e3 * options.stretch / start.timestep) // every * every)
    left, done, stretch = round(1e3 * options.duration / start.timestep), 0, longest
    now = thermal(start, temperature, seed=1 + start.seed + number)
    good, kept = _Sample.of(now), [_Sample.of(now)]
    while left > 0:
        steps = min(stretch, -(-left // every) * every)
        seed = int(np.random.SeedSequence([start.seed, number, done]).generate_state(1)[0] >> 1)
        now = replace(now, steps=steps, every=every, seed=seed)
        try:
            run = engine.run(now, folder / f"replica-{number}-{done}{engine.suffix}")
        except SimulationError as error:
            if stretch > every:  # shorter stretches: what led there is wanted
                stretch = max(every, stretch // 2 // every * every)
                continue
            return _failed(engine, core, watch, folder, number, good, kept, str(error), [])
        levels = watch.levels(run)
        highest = np.max(list(levels.values()), axis=0)
        for sample in range(1, len(run.times)):
            frame = _Sample(done * start.timestep + run.times[sample], run.positions[sample], run.velocities[sample])
            kept = [*kept, frame][-1 - options.before :]
            if not highest[sample] < 1:
                kind = max(levels, key=lambda name: np.nan_to_num(levels[name][sample], nan=np.inf))
                reason, atoms = watch.explain(kind, frame.positions, frame.velocities)
                return _failed(engine, core, watch, folder, number, good, kept, reason, atoms)
            if highest[sample] < GOOD:
                good = frame
        done, left = done + steps, left - steps
        structure = replace(start.structure, positions=run.positions[-1])
        now = replace(now, structure=structure, velocities=run.velocities[-1])
    return None


@dataclass(frozen=True)
class _Sample:
    time: float
    positions: FloatArray
    velocities: FloatArray

    @classmethod
    def of(cls, dynamics: Dynamics) -> _Sample:
        return cls(0.0, dynamics.structure.positions, dynamics.velocities)


def _failed(
    engine: Engine,
    core: Engine,
    watch: Watch,
    folder: Path,
    number: int,
    good: _Sample,
    kept: Sequence[_Sample],
    reason: str,
    atoms: list[int],
) -> Failure:
    restart, frames = (folder / f"replica-{number}-{what}.xyz" for what in ("restart", "failure"))
    _write(restart, watch.structure, [good], "far from every limit", [])
    _write(frames, watch.structure, kept, reason, atoms)
    before = replace(watch.structure, positions=kept[-2 if len(kept) > 1 else -1].positions)
    try:
        apart = float(np.abs(engine.evaluate(before).forces - core.evaluate(before).forces).max(initial=0.0))
    except MLFFError:
        apart = np.nan
    return Failure(kept[-1].time, reason, atoms, restart, frames, apart)


def _write(file: Path, structure: Structure, samples: Sequence[_Sample], reason: str, atoms: Sequence[int]) -> None:
    """Extended XYZ to the last bit; positions in Å, velocities in Å/fs; `culprit` marks the atoms of the last frame."""
    text = []
    periodic = " ".join("TF"[not axis] for axis in structure.pbc)
    lattice = " ".join(repr(float(x)) for x in structure.cell.ravel())
    header = f'Lattice="{lattice}" ' if structure.pbc.any() else ""
    header += f'Properties=species:S:1:pos:R:3:velocities:R:3:culprit:L:1 pbc="{periodic}"'
    header += f" charge={structure.charge:g} multiplicity={structure.spin + 1:g}"
    for sample in samples:
        last = sample is samples[-1]
        comment = reason.replace('"', "'").replace("\n", " ") if last else "before"
        text.append(f'{len(structure)}\n{header} time={float(sample.time)!r} comment="{comment}"')
        for i, number in enumerate(structure.numbers):
            values = " ".join(repr(float(x)) for x in (*sample.positions[i], *sample.velocities[i]))
            text.append(f"{SYMBOLS[number]} {values} {'T' if last and i in atoms else 'F'}")
    with replacing(file) as temporary:
        temporary.write_text("\n".join(text) + "\n", encoding="utf-8")


def _bonds(structure: Structure) -> tuple[IntArray, FloatArray]:
    """Atoms (B, 2), and the lattice vector (B, 3) to add to the second for the nearest image of the first."""
    bonds = topology(structure).bonds
    images = np.zeros((len(bonds), 3))
    if len(bonds) and structure.pbc.any():
        pairs, vectors = neighbor_list(structure.positions, structure.cell, structure.pbc, cutoff=4.0)
        lengths = np.linalg.norm(vectors, axis=1)
        for k, (i, j) in enumerate(bonds):
            between = np.flatnonzero((pairs[0] == i) & (pairs[1] == j))
            nearest = vectors[between[lengths[between].argmin()]]
            images[k] = nearest - (structure.positions[j] - structure.positions[i])
    return bonds, images


def _survival(times: FloatArray, failed: BoolArray, duration: float) -> list[Curve]:
    """Kaplan-Meier estimate over ps, and its confidence limits where anything failed."""
    stats = needed("scipy.stats")
    share = stats.ecdf(stats.CensoredData(uncensored=times[failed], right=times[~failed])).sf
    x = np.unique(np.concatenate([[0.0], times, [duration]]))
    curves = [Curve("estimate", x.tolist(), share.evaluate(x).tolist(), style="steps")]
    if failed.any():
        with warnings.catch_warnings():  # where nobody is left there are no limits; scipy says so at length
            warnings.simplefilter("ignore", RuntimeWarning)
            limits = share.confidence_interval(CONFIDENCE, method="log-log")
        for name, limit, unknown in (("at least", limits.low, 0.0), ("at most", limits.high, 1.0)):
            y = np.nan_to_num(limit.evaluate(x), nan=unknown)
            curves.append(Curve(f"{name}, {CONFIDENCE:.0%} sure", x.tolist(), y.tolist(), style="steps"))
    return curves


def _named(numbers: IntArray, atoms: Sequence[int]) -> str:
    return ", ".join(f"{SYMBOLS[numbers[atom]]}{atom}" for atom in atoms)
