"""M5: an engine samples the ensemble of the eager model: mean energies, pressure, distribution functions.

Replicas of the engine are compared with replicas of the core engine, both at constant temperature by their own Langevin
and with the same time step. What second-order integrators may differ by nevertheless is bounded
(`mean_square_frequencies`) and taken off every difference before its significance is judged. First-order errors, in
friction times time step, are not: an engine that has them needs a small friction or a small time step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from mlff_engines.errors import ConfigError, MLFFError
from mlff_engines.structure import SYMBOLS, FloatArray, IntArray, Structure
from mlff_engines.units import BOLTZMANN, GPA
from mlff_engines.validation.dynamics.replicas import (
    EnsembleOptions,
    equilibrate,
    mean_square_frequencies,
    run_replicas,
    temperature_of,
)
from mlff_engines.validation.dynamics.statistics import (
    LEAST_BLOCKS,
    LEAST_REPLICAS,
    LEAST_SAMPLES,
    Difference,
    ProfileComparison,
    autocorrelation_time,
    block_count,
    block_means,
    compare_means,
    compare_profiles,
    critical,
    effective_samples,
    equilibrated,
)
from mlff_engines.validation.engine import Dynamics, Engine, Trajectory
from mlff_engines.validation.result import NAMES, CheckResult, Curve, Plot, Verdict
from mlff_engines.validation.trajectories.observables import Frames, internal_coordinates, rdf, standard

WIDEST = 10.0  # Å
POTENTIAL, KINETIC, PRESSURE = "potential energy", "kinetic energy", "pressure"
UNITS = {POTENTIAL: "eV", KINETIC: "eV", PRESSURE: "GPa"}


def check_ensemble(
    engine: Engine, core: Engine, start: Dynamics, folder: Path, options: EnsembleOptions | None = None
) -> CheckResult:
    """M5: run what is missing in `folder`, then compare.

    Args:
        engine, core: the engine on trial, and the eager model.
        start: temperature, time step, length; its velocities and seed are not used.
        folder: of the trajectories.
        options: see there.
    """
    options = options or EnsembleOptions()
    start = equilibrate(core, start, options, folder)
    expected = run_replicas(core, start, options, folder)
    try:
        found = run_replicas(engine, start, options, folder)
    except MLFFError as error:
        return _undecided("fail", f"{type(error).__name__}: {error}")
    frequencies = mean_square_frequencies(core.evaluate, expected, start)
    return compare_ensembles(found, expected, start, options, frequencies, engine.name)


def compare_ensembles(
    found: Sequence[Trajectory],
    expected: Sequence[Trajectory],
    start: Dynamics,
    options: EnsembleOptions,
    frequencies: FloatArray,
    name: str = "engine",
) -> CheckResult:
    """M5 of replicas already made.

    Args:
        found, expected: of the engine, and of the core.
        start: what they ran.
        options: see there.
        frequencies: see `mean_square_frequencies`.
        name: of the engine, for the plots.

    Returns:
        figure: the largest of |difference| / (what is allowed) over all observables and gates.

    Raises:
        ConfigError: the two sets share a trajectory.
    """
    sets = (found, expected)
    if any(np.array_equal(a.kinetic, b.kinetic) for a, b in itertools.product(found, expected)):
        raise ConfigError(f"a replica of {name} is also one of the reference's: give runs of other seeds")
    if not all(np.isfinite(run.total).all() and np.isfinite(run.positions).all() for run in found):
        return _undecided("fail", f"energies or positions of {name} are not finite")
    discarded = max(equilibrated(np.array([run.potential for run in runs])) for runs in sets)
    offered = all(run.pressure is not None and np.isfinite(run.pressure).all() for runs in sets for run in runs)
    series = [_series(runs, discarded, offered) for runs in sets]
    tau = max(autocorrelation_time(values) for part in series for values in part.values())
    length = len(found[0].times) - discarded
    blocks = block_count(length, tau)
    lacking = _lacking(series, blocks, discarded, len(found[0].times))
    if blocks < 2 or min(len(runs) for runs in sets) < 2:
        return _undecided("inconclusive", "; ".join(lacking))
    kt = BOLTZMANN * temperature_of(start)
    wrong = 0.25 * start.timestep**2 * frequencies  # of the energy of a vibration, relative to k_B T / 2
    bounds = _bounds(series[1], 0.5 * kt * float(wrong.sum()), float(wrong.max()) / kt, start.structure.volume)
    means = [
        compare_means(a, b, blocks, options.margin * float(b.std()), name=what, unit=UNITS[what], bound=bounds[what])
        for (what, a), b in zip(series[0].items(), series[1].values(), strict=True)
    ]
    axes, profiles = profiles_of(sets, start.structure, options, discarded, blocks)
    potential = series[1][POTENTIAL]
    shift = float(wrong.max()) * float(potential.var()) / kt
    allowed = _profile_bounds(profiles[1], block_means(potential, blocks), shift)
    structure = compare_profiles(profiles[0], profiles[1], allowed, tau * blocks / length)
    if structure.kinds and structure.blocks < LEAST_BLOCKS:
        lacking.append(f"distances change so slowly that there are {structure.blocks:.2g} independent blocks")
    verdict, figure, worst = _judged(means, structure, options)
    if lacking and verdict == "pass":
        verdict = "inconclusive"
    return CheckResult(
        "M5",
        NAMES["M5"],
        verdict,
        figure,
        1.0,
        "; ".join([worst, *lacking]),
        _figures(means, structure, series, discarded * start.every * start.timestep),
        [*_profile_plots(name, axes, profiles, structure), _histograms(name, series)],
    )


def profiles_of(
    sets: Sequence[Sequence[Trajectory]], structure: Structure, options: EnsembleOptions, discarded: int, blocks: int
) -> tuple[dict[str, FloatArray], list[dict[str, FloatArray]]]:
    """Distribution functions of every pair of elements, for every block of every replica.

    g(r) in a box; else, where there is no density to divide by, the probability density of the distances in 1/Å.

    Returns:
        centres of the bins in Å by pair, and for each set (R, blocks, B) by pair.
    """
    numbers = sorted(set(structure.numbers.tolist()))
    still = Frames(structure.numbers, structure.positions[None], structure.cell, structure.pbc, np.zeros(1))
    _, cell = standard(still)
    if cell is None:
        extents = [np.linalg.norm(np.ptp(run.positions, axis=1), axis=1).max() for run in sets[-1]]
        widest = float(max(extents))
    else:
        widest = min(WIDEST, 0.5 * float((1 / np.linalg.norm(np.linalg.inv(cell), axis=0)).min()))
    count = int((options.r_max or widest) / options.bin_width + 1e-6)
    r_max = count * options.bin_width
    axes: dict[str, FloatArray] = {}
    found: list[dict[str, FloatArray]] = []
    for runs in sets:
        parts: dict[str, list[FloatArray]] = {}
        for run in runs:
            size = (len(run.times) - discarded) // blocks
            for start in range(len(run.times) - size * blocks, len(run.times), size):
                part = slice(start, start + size)
                frames = replace(still, positions=run.positions[part], times=run.times[part])
                for kind, (r, g) in _profiles(frames, numbers, r_max, count).items():
                    axes[kind] = r
                    parts.setdefault(kind, []).append(g)
        found.append({kind: np.array(rows).reshape(len(runs), blocks, count) for kind, rows in parts.items()})
    return axes, found


def _profiles(
    frames: Frames, numbers: Sequence[int], r_max: float, count: int
) -> dict[str, tuple[FloatArray, FloatArray]]:
    found = {}
    if frames.pbc.all():
        for a, b in itertools.combinations_with_replacement(numbers, 2):
            if a != b or np.count_nonzero(frames.numbers == a) > 1:
                kind = f"{SYMBOLS[a]}-{SYMBOLS[b]}"
                found[kind] = rdf(frames, a, b, r_max=r_max, bin_width=r_max / count)
        return found
    pairs: IntArray = np.stack(np.triu_indices(len(frames.numbers), 1), axis=1)
    for kind, distances in (internal_coordinates(frames, pairs) if len(pairs) else {}).items():
        counts, edges = np.histogram(distances, bins=count, range=(0.0, r_max))
        found[kind] = (0.5 * (edges[1:] + edges[:-1]), counts / (distances.size * r_max / count))
    return found


def _undecided(verdict: Verdict, detail: str) -> CheckResult:
    return CheckResult("M5", NAMES["M5"], verdict, np.nan, 1.0, detail)


def _series(runs: Sequence[Trajectory], discarded: int, pressure: bool) -> dict[str, FloatArray]:
    """Observables (R, T) by name, in `UNITS`."""
    found = {
        POTENTIAL: np.array([run.potential[discarded:] for run in runs]),
        KINETIC: np.array([run.kinetic[discarded:] for run in runs]),
    }
    if pressure:
        found[PRESSURE] = np.array([run.pressure for run in runs])[:, discarded:] / GPA
    return found


def _lacking(series: Sequence[Mapping[str, FloatArray]], blocks: int, discarded: int, length: int) -> list[str]:
    """What stands against a verdict of "pass"."""
    lacking = []
    replicas = min(len(part[POTENTIAL]) for part in series)
    if replicas < LEAST_REPLICAS:
        lacking.append(f"{replicas} replicas; {LEAST_REPLICAS} are needed")
    if 2 * discarded >= length - 1:
        lacking.append("equilibrium came in the second half or not at all: equilibrate or run longer")
    what, samples = min(
        ((n, effective_samples(v)) for part in series for n, v in part.items()), key=lambda pair: pair[1]
    )
    if samples < LEAST_SAMPLES:
        lacking.append(f"{what} has {samples:.2g} effective samples; {LEAST_SAMPLES:g} are needed: run longer")
    if blocks < 2 or blocks * replicas < LEAST_BLOCKS:
        lacking.append(f"{blocks} independent blocks in each of {replicas} replicas; {LEAST_BLOCKS} are needed in all")
    return lacking


def _bounds(series: Mapping[str, FloatArray], energy: float, relative: float, volume: float | None) -> dict[str, float]:
    """What integrators may differ by: `energy` (eV) and, by linear response of the rest, `relative` / k_B T (1/eV)."""
    bounds = {POTENTIAL: energy, KINETIC: energy}
    if PRESSURE in series and volume is not None:
        covariance = np.cov(series[PRESSURE].ravel(), series[POTENTIAL].ravel())[0, 1]
        bounds[PRESSURE] = 2 * energy / (3 * volume * GPA) + relative * abs(float(covariance))
    return bounds


def _profile_bounds(profiles: Mapping[str, FloatArray], potential: FloatArray, shift: float) -> dict[str, FloatArray]:
    """What follows in every bin from a `shift` (eV) of the potential energy (R, blocks), by linear regression."""
    x = (potential - potential.mean()).ravel()
    return {
        kind: shift * np.abs(x @ (part - part.mean(axis=(0, 1))).reshape(len(x), -1)) / (x @ x)
        for kind, part in profiles.items()
    }


def _judged(
    means: Sequence[Difference], structure: ProfileComparison, options: EnsembleOptions
) -> tuple[Verdict, float, str]:
    """Verdict, largest share of what is allowed, and where."""
    tests = len(means) + bool(structure.kinds)
    verdicts = [difference.verdict(tests) for difference in means]
    shares = []
    for d in means:
        limit = critical(tests, d.freedom)
        text = f"{d.name} differs by {d.value:.3g} ± {d.error:.2g} {d.unit}"
        shares.append((d.significance / limit, f"{text}: {d.significance:.2g} sigma; {limit:.2g} are allowed"))
        shares.append((d.resolved, f"{text}; {d.margin:.2g} {d.unit} matter"))
    if structure.kinds:
        verdicts.append(structure.verdict(tests, options.resolution))
        limit, level = critical(tests), structure.sigma
        shares.append((level / limit, f"distribution functions differ by {level:.2g} sigma; {limit:.2g} are allowed"))
        shares += structure.gates(options.resolution)
    figure, worst = max(shares)
    if "fail" in verdicts:
        return "fail", figure, worst
    if "inconclusive" in verdicts:
        return "inconclusive", figure, f"{worst}; some {math.ceil(figure**2)} times as much data would tell"
    return "pass", figure, worst


def _figures(
    means: Sequence[Difference],
    structure: ProfileComparison,
    series: Sequence[Mapping[str, FloatArray]],
    discarded: float,
) -> dict[str, float]:
    figures = {"discarded (fs)": discarded}
    for d in means:
        figures[f"{d.name}: difference ({d.unit})"] = d.value
        figures[f"{d.name}: standard error ({d.unit})"] = d.error
        figures[f"{d.name}: margin ({d.unit})"] = d.margin
        figures[f"{d.name}: integrators ({d.unit})"] = d.bound
        figures[f"{d.name}: effective samples"] = min(effective_samples(part[d.name]) for part in series)
    if structure.kinds:
        figures["distribution functions: probability"] = structure.level
        figures["distribution functions: independent blocks"] = structure.blocks
    for kind, p in structure.kinds.items():
        figures |= {f"{kind}: rms z": p.rms_z, f"{kind}: mean error": p.error, f"{kind}: floor": p.floor}
        figures[f"{kind}: rms difference"] = p.rms
    return figures


def _profile_plots(
    name: str,
    axes: Mapping[str, FloatArray],
    profiles: Sequence[Mapping[str, FloatArray]],
    structure: ProfileComparison,
) -> list[Plot]:
    plots = []
    for kind, compared in structure.kinds.items():
        curves = [
            Curve(label, axes[kind].tolist(), part[kind].mean(axis=(0, 1)).tolist(), errors.tolist())
            for label, part, errors in zip((name, "eager model"), profiles, compared.errors, strict=True)
        ]
        plots.append(Plot(f"{kind} distances", "r (Å)", "distribution function", curves))
    return plots


def _histograms(name: str, series: Sequence[Mapping[str, FloatArray]]) -> Plot:
    values = [part[POTENTIAL].ravel() for part in series]
    edges = np.histogram_bin_edges(np.concatenate(values), bins=40)
    curves = [
        Curve(
            label,
            (0.5 * (edges[1:] + edges[:-1])).tolist(),
            np.histogram(v, edges, density=True)[0].tolist(),
            style="steps",
        )
        for label, v in zip((name, "eager model"), values, strict=True)
    ]
    return Plot("potential energy", "potential energy (eV)", "probability density (1/eV)", curves)
