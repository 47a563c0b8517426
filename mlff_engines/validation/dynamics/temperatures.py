"""M6: kinetic energies, their partition and the response of the potential energy are those of the temperature.

The tests are those of `physical_validation` (Merz and Shirts, PLoS ONE 13, e0202764 (2018)): mean and width of the
kinetic energy; the same for every element and for translation, rotation and inner motion of molecules; the ratio of the
distributions of the potential energy at two temperatures (Shirts, J. Chem. Theory Comput. 9, 909 (2013)). All together
fail a right engine as rarely as one normal variable exceeds 3 sigma.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlff_engines.errors import MLFFError, StructureError
from mlff_engines.structure import SYMBOLS, FloatArray, IntArray, Structure
from mlff_engines.units import ACCELERATION, BOLTZMANN
from mlff_engines.validation.dynamics.replicas import (
    EnsembleOptions,
    equilibrate,
    mean_square_frequencies,
    run_replicas,
    temperature_of,
)
from mlff_engines.validation.dynamics.statistics import (
    LEAST_REPLICAS,
    LEAST_SAMPLES,
    Difference,
    autocorrelation_time,
    critical,
    equilibrated,
)
from mlff_engines.validation.engine import Dynamics, Engine, Trajectory
from mlff_engines.validation.result import NAMES, CheckResult, Curve, Plot, Verdict
from mlff_engines.validation.trajectories.observables import needed, topology

DECORRELATION = 4.0  # relaxation times between samples taken as independent: e^-4 of the correlation is left
COORDINATES = 300_000  # frames x atoms that equipartition is calculated for: a loop in Python
SLOPE = 0.2  # relative error of the slope of the two temperatures, at most
BOOTSTRAPS = 1000


def check_temperatures(
    engine: Engine, core: Engine, start: Dynamics, folder: Path, options: EnsembleOptions | None = None
) -> CheckResult:
    """M6: run what is missing in `folder`, also at a second temperature, then judge.

    Args:
        engine, core: the engine on trial; the eager model, which says where to start and how stiff the atoms are.
        start: temperature, time step, length; its velocities and seed are not used.
        folder: of the trajectories; those of M5 are used.
        options: see there.
    """
    options = options or EnsembleOptions()
    start = equilibrate(core, start, options, folder)
    try:
        runs = run_replicas(engine, start, options, folder)
        hot = second_temperature(runs, start, options)
        hot_runs = run_replicas(engine, hot, options, folder)
        frequencies = mean_square_frequencies(core.evaluate, runs, start)
    except MLFFError as error:
        return CheckResult("M6", NAMES["M6"], "fail", np.nan, 1.0, f"{type(error).__name__}: {error}")
    return compare_temperatures(runs, hot_runs, start, hot, options, frequencies, engine.name)


def second_temperature(runs: Sequence[Trajectory], start: Dynamics, options: EnsembleOptions) -> Dynamics:
    """`start` at the temperature where the potential energies lie two standard deviations higher, or less far."""
    temperature = temperature_of(start)
    spread = float(np.mean([run.potential[len(run.times) // 2 :].std() for run in runs]))
    step = min(options.temperature_step, 2 * BOLTZMANN * temperature / spread) if spread > 0 else 0.0
    return replace(start, temperature=round(temperature * (1 + (step or options.temperature_step)), 1))


def compare_temperatures(
    runs: Sequence[Trajectory],
    hot_runs: Sequence[Trajectory],
    start: Dynamics,
    hot: Dynamics,
    options: EnsembleOptions,
    frequencies: FloatArray,
    name: str = "engine",
) -> CheckResult:
    """M6 of replicas already made.

    Args:
        runs, hot_runs: of the engine at two temperatures.
        start, hot: what they ran.
        options: see there.
        frequencies: see `mean_square_frequencies`.
        name: of the engine, for the plots.

    Returns:
        figure: the largest of |deviation| / (what is allowed) over all tests.
    """
    if not all(np.isfinite(run.total).all() and np.isfinite(run.velocities).all() for run in (*runs, *hot_runs)):
        return CheckResult("M6", NAMES["M6"], "fail", np.nan, 1.0, f"{name}: energies or velocities are not finite")
    cuts = [equilibrated(np.array([run.potential for run in part])) for part in (runs, hot_runs)]
    kept = [_from(run, cuts[0]) for run in runs]
    lacking = []
    if len(runs) < LEAST_REPLICAS:
        lacking.append(f"{len(runs)} replicas; {LEAST_REPLICAS} are needed")
    if any(2 * cut >= len(part[0].times) - 1 for cut, part in zip(cuts, (runs, hot_runs), strict=True)):
        lacking.append("equilibrium came in the second half or not at all: equilibrate or run longer")
    kinetic = _kinetic_energies(kept, start, frequencies)
    energies = [
        _independent(np.array([run.potential[cut:] for run in part]))
        for part, cut in zip((runs, hot_runs), cuts, strict=True)
    ]
    samples = min(*(len(part.samples) for part in kinetic), *(len(part) for part in energies))
    if samples < LEAST_SAMPLES:
        lacking.append(f"{samples} independent samples; {LEAST_SAMPLES:g} are needed: run longer")
        return CheckResult("M6", NAMES["M6"], "inconclusive", np.nan, 1.0, "; ".join(lacking))
    tests = _kinetic_tests(kinetic, start, options)
    significance, error = _two_temperatures(energies, start, hot)
    tests.append(Difference("ratio of two temperatures", "sigma", significance, 1.0, math.inf))
    if error > SLOPE:
        lacking.append(f"the ratio of two temperatures is known to {error:.0%}; {SLOPE:.0%} are needed: run longer")
    limit = critical(len(tests))
    shares = [(t.significance / limit, f"{t.name}: off by {t.value:.3g} ± {t.error:.2g} {t.unit}") for t in tests]
    whole = tests[0]
    shares.append((whole.resolved, f"{whole.name}: known to {whole.error:.2g} K; {whole.margin:.2g} K matter"))
    figure, worst = max(shares)
    verdicts = [t.verdict(len(tests)) for t in tests]
    verdict: Verdict = "fail" if "fail" in verdicts else "pass"
    if verdict == "pass" and (lacking or "inconclusive" in verdicts):
        verdict = "inconclusive"
    figures = {f"{t.name}: difference ({t.unit})": t.value for t in tests}
    figures |= {f"{t.name}: standard error ({t.unit})": t.error for t in tests[:-1]}
    figures |= {"independent samples": float(samples), "allowed (sigma)": limit}
    figures |= {"second temperature (K)": temperature_of(hot), "relative error of the ratio": error}
    return CheckResult(
        "M6",
        NAMES["M6"],
        verdict,
        figure,
        1.0,
        "; ".join([worst, *lacking]),
        figures,
        [_kinetic_plot(name, kinetic[0], temperature_of(start))],
    )


@dataclass(frozen=True)
class _Part:
    """Independent samples (n,) of the kinetic energy, eV, of some degrees of freedom.

    `bound` is the relative error that integrators may make.
    """

    name: str
    samples: FloatArray
    freedom: float
    bound: float


def _kinetic_energies(runs: Sequence[Trajectory], start: Dynamics, frequencies: FloatArray) -> list[_Part]:
    """Of all atoms, of every element, and of the motions of molecules."""
    numbers, masses = start.structure.numbers, start.masses
    wrong = start.timestep**2 / 12 * frequencies  # ω²h²/4, mean over the three directions of every atom
    whole = _Part(
        "kinetic energy", _independent(np.array([run.kinetic for run in runs])), 3.0 * len(numbers), float(wrong.mean())
    )
    parts = [whole]
    if len(set(numbers.tolist())) > 1:
        atoms = np.array([0.5 * masses * np.square(run.velocities).sum(axis=2) for run in runs]) / ACCELERATION
        for number in sorted(set(numbers.tolist())):
            of = numbers == number
            samples = _independent(atoms[:, :, of].sum(axis=2))
            name = f"kinetic energy of {SYMBOLS[number]}"
            parts.append(_Part(name, samples, 3.0 * np.count_nonzero(of), float(wrong[of].mean())))
    return parts + _motions(runs, start, whole)


def _motions(runs: Sequence[Trajectory], start: Dynamics, whole: _Part) -> list[_Part]:
    """Translation, rotation and inner motion of all molecules together; nothing where they are not told apart."""
    members = _molecules(start.structure)
    sizes = [len(atoms) for atoms in members]
    if max(sizes, default=1) == 1 or 2 in sizes:  # two atoms have no moment of inertia about their axis
        return []
    order = np.concatenate(members)
    most = math.ceil(len(runs) * len(runs[0].times) * len(order) / COORDINATES)
    every = max(_spacing(np.array([run.kinetic for run in runs])), most)
    data = _data(len(order), temperature_of(start))
    validation = _physical_validation()
    data.system.mass = start.masses[order]
    data.system.molecule_idx = np.cumsum([0, *sizes[:-1]])
    data.system.nconstraints_per_molecule = np.zeros(len(sizes))
    positions, velocities = (
        np.concatenate([getattr(run, what)[::every][:, order] for run in runs]) for what in ("positions", "velocities")
    )
    data.trajectory = validation.data.TrajectoryData(positions, velocities / math.sqrt(ACCELERATION))
    with _quiet():
        validation.kinetic_energy.equipartition(data, verbosity=0, data_is_uncorrelated=True)
    found = []
    for motion in ("translational", "rotational", "internal"):
        freedom = sum(molecule[motion] for molecule in data.system.ndof_per_molecule)
        total = np.array([frame[motion].sum() for frame in data.observables.kinetic_energy_per_molecule])
        if freedom > 0:
            samples = _independent(total.reshape(len(runs), -1))
            bound = whole.bound * (whole.freedom / freedom if motion == "internal" else 1)  # all of it may be there
            found.append(_Part(f"{motion} kinetic energy", samples, float(freedom), bound))
    return found


def _molecules(structure: Structure) -> list[IntArray]:
    try:
        bonds = topology(structure).bonds
    except StructureError:
        return []
    atoms = len(structure)
    graph = needed("scipy.sparse").coo_array((np.ones(len(bonds)), bonds.T), shape=(atoms, atoms))
    count, label = needed("scipy.sparse.csgraph").connected_components(graph, directed=False)
    return [np.flatnonzero(label == molecule) for molecule in range(count)]


def _kinetic_tests(parts: Sequence[_Part], start: Dynamics, options: EnsembleOptions) -> list[Difference]:
    """Temperatures by mean and by width of every part; the mean of all atoms must be resolved as well."""
    temperature, validation = temperature_of(start), _physical_validation()
    atoms = len(start.structure)
    tests = []
    for part in parts:
        data = _data(atoms, temperature, 3 * atoms - part.freedom)
        data.observables = validation.data.ObservableData(kinetic_energy=part.samples)
        with _quiet():
            sigmas = validation.kinetic_energy.distribution(
                data, verbosity=0, bs_repetitions=BOOTSTRAPS, bootstrap_seed=0, data_is_uncorrelated=True
            )
        shape, count = part.freedom / 2, len(part.samples)
        by_mean = part.samples.mean() / (shape * BOLTZMANN)
        by_width = part.samples.std() / (math.sqrt(shape) * BOLTZMANN)
        # of the gamma distribution that is expected: a narrow sample takes its own error for too small
        errors = (math.sqrt(1 / (shape * count)), math.sqrt((0.5 + 1.5 / shape) / count))
        margin = options.margin * temperature / math.sqrt(shape)
        margins = (margin if part is parts[0] else math.inf, math.inf)
        for what, found, sigma, least, matters in zip(
            ("mean", "width"), (by_mean, by_width), sigmas, errors, margins, strict=True
        ):
            off, name = float(found) - temperature, f"temperature by {what} of {part.name}"
            error = max(abs(off) / sigma, temperature * least)
            tests.append(Difference(name, "K", off, error, matters, temperature * part.bound))
    return tests


def _two_temperatures(energies: Sequence[FloatArray], start: Dynamics, hot: Dynamics) -> tuple[float, float]:
    """Sigmas by which the ratio of the distributions is off, and its relative standard error."""
    validation = _physical_validation()
    mean = float(
        np.concatenate(energies).mean()
    )  # only differences count, and totals of 1e6 eV leave exponentials none
    simulations = []
    for samples, dynamics in zip(energies, (start, hot), strict=True):
        data = _data(len(dynamics.structure), temperature_of(dynamics))
        data.observables = validation.data.ObservableData(potential_energy=samples - mean)
        simulations.append(data)
    slope = (1 / temperature_of(start) - 1 / temperature_of(hot)) / BOLTZMANN
    x = np.concatenate(energies) - mean
    weights = 1 / (2 + 2 * np.cosh(np.clip(slope * x, -500, 500)))
    information = float(weights @ np.square(x - weights @ x / weights.sum()))
    error = 1 / (slope * math.sqrt(information)) if information > 0 else math.inf
    try:
        with _quiet():
            [sigmas] = validation.ensemble.check(*simulations, verbosity=0, data_is_uncorrelated=True)
    except validation.util.error.InputError:  # no overlap, at temperatures chosen to have one
        return math.inf, error
    return float(sigmas), error


def _data(atoms: int, temperature: float, fixed: float = 0.0) -> Any:
    """A simulation in our units, for `physical_validation`; `fixed` degrees of freedom do not move."""
    data = _physical_validation().data
    units = data.UnitData(
        kb=BOLTZMANN,
        energy_conversion=1.0,
        length_conversion=1.0,
        volume_conversion=1.0,
        temperature_conversion=1.0,
        pressure_conversion=1.0,
        time_conversion=1.0,
    )
    ensemble = data.EnsembleData(ensemble="NVT", natoms=atoms, volume=1.0, temperature=temperature)
    system = data.SystemData(natoms=atoms, nconstraints=fixed, ndof_reduction_tra=0, ndof_reduction_rot=0)
    return data.SimulationData(units=units, ensemble=ensemble, system=system)


def _independent(series: FloatArray) -> FloatArray:
    """Samples (n,) of (R, T) with hardly any correlation left, of all replicas; none of a constant."""
    spacing = _spacing(series)
    return series[:, ::spacing].ravel() if spacing else series[:0].ravel()


def _spacing(series: FloatArray) -> int:
    """Of samples of (R, T) that are as good as independent; 0 for a constant."""
    tau = autocorrelation_time(series)
    if math.isinf(tau):
        return 0
    relaxation = 0.5 / math.atanh(0.5 / tau) if tau > 0.5 else 0.0  # of the exponential with this τ
    return max(math.ceil(DECORRELATION * relaxation), 1)


def _from(run: Trajectory, cut: int) -> Trajectory:
    return replace(
        run,
        times=run.times[cut:],
        potential=run.potential[cut:],
        kinetic=run.kinetic[cut:],
        positions=run.positions[cut:],
        velocities=run.velocities[cut:],
        pressure=None,
    )


def _physical_validation() -> Any:
    logger = logging.getLogger("pymbar")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it logs advice on its use when imported
    try:
        return needed("physical_validation")
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """`physical_validation` prints at every verbosity, and its seed becomes that of the whole process."""
    state = np.random.get_state()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        np.random.set_state(state)


def _kinetic_plot(name: str, part: _Part, temperature: float) -> Plot:
    density, edges = np.histogram(part.samples, bins=30, density=True)
    x = np.linspace(edges[0], edges[-1], 120)
    expected = needed("scipy.stats").gamma.pdf(x, part.freedom / 2, scale=BOLTZMANN * temperature)
    return Plot(
        "kinetic energy",
        "kinetic energy (eV)",
        "probability density (1/eV)",
        [
            Curve(name, (0.5 * (edges[1:] + edges[:-1])).tolist(), density.tolist(), style="steps"),
            Curve(f"Maxwell-Boltzmann at {temperature:g} K", x.tolist(), expected.tolist()),
        ],
    )
