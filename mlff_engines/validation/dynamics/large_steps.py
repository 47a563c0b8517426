"""Gates on large time steps: what `mlff kstep run` made, against the reference from the same starts.

| code | gate                  | figure                                                                      |
|------|-----------------------|-----------------------------------------------------------------------------|
| K1   | the run               | replicas that failed or were refused                                        |
| K2   | NVE drift             | median over replicas of the slope of the true energy, kJ/mol/ps/atom        |
| K3   | kinetic temperature   | deviation relative to the one asked for                                     |
| K4   | equipartition         | the same of elements, heavy atoms, translation, rotation and inner motion   |
| K5   | bonds and angles      | Jensen-Shannon divergence, nat, the largest of any kind                     |
| K6   | dihedrals             | the same                                                                    |
| K7   | heavy-atom distances  | ∫|Δp| / ∫p of the pair distances up to 12 Å, the largest of any kind        |

A figure passes when it lies below its first threshold with `CONFIDENCE` standard errors to spare, it fails when it lies
above its second by more than `critical` ones, both from enough replicas and independent samples; else the data decide
nothing. Divergences have no standard error but a null: those of random divisions of the blocks of two runs of the
reference, which sample the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mlff_engines.errors import StructureError
from mlff_engines.structure import FloatArray, IntArray, Structure
from mlff_engines.units import BOLTZMANN
from mlff_engines.validation.dynamics.statistics import (
    CONFIDENCE,
    LEAST_SAMPLES,
    autocorrelation_time,
    block_count,
    critical,
    effective_samples,
)
from mlff_engines.validation.result import CheckResult, Curve, Plot, Verdict
from mlff_engines.validation.trajectories.divergences import absolute_difference, jensen_shannon, kullback_leibler
from mlff_engines.validation.trajectories.kinetic import kinetic_energies
from mlff_engines.validation.trajectories.observables import Frames, internal_coordinates, topology

NAMES = {
    "K1": "runs to the end",
    "K2": "true total energy does not drift",
    "K3": "kinetic temperature",
    "K4": "equipartition by group",
    "K5": "distributions of bonds and angles",
    "K6": "distributions of dihedrals",
    "K7": "distributions of heavy-atom distances",
}
THRESHOLDS = {  # pass, fail; see the table above
    "K2": (5e-4, 5e-3),
    "K3": (0.005, 0.02),
    "K4": (0.01, 0.03),
    "K5": (1e-3, 5e-3),
    "K6": (5e-3, 2.5e-2),
    "K7": (0.01, 0.05),
}
BINS = {2: (0.01, None), 3: (2.0, None), 4: (10.0, (-180.0, 180.0))}  # Å or degrees, by the width of the members
PAIR_BIN, PAIR_MAX = 0.2, 12.0  # Å
BEYOND_NULL = 1.5  # times the 95th percentile of the null
DRIFT_SHARE = 3.0  # times the reference's
LEAST_REPLICAS, LEAST_NVE = 5, 100.0  # ps; less never passes
LEAST_FRAMES = 4  # of a replica, to know a correlation by
DIVISIONS = 300  # of the null
BURN_IN = 0.1  # of each replica: starts are in equilibrium already, but in that of the reference


@dataclass(frozen=True)
class Run:
    """One variant on one molecule, R replicas of T frames of N atoms.

    | field                    | shape          | unit                                                           |
    |--------------------------|----------------|----------------------------------------------------------------|
    | `positions`              | (R, T, N, 3)   | Å                                                              |
    | `velocities`, `kicks`    | (R, T, N, 3)   | Å/fs; on step, and what half a time step adds                  |
    | `constraints`            | (C, 2)         | atoms whose distance is fixed                                  |
    | `times`                  | (T,)           | ps                                                             |
    | `nve`                    | R of (2, S)    | ps and kJ/mol: times and total energies without thermostat     |
    | `temperature`            | -              | K                                                              |
    | `problems`               | -              | why replicas failed, by number                                 |
    | `draws_velocities`       | -              | they are random numbers and tell nothing: variant D            |
    """

    variant: str
    molecule: str
    numbers: IntArray
    masses: FloatArray
    constraints: IntArray
    times: FloatArray
    positions: FloatArray
    velocities: FloatArray
    kicks: FloatArray
    nve: Sequence[FloatArray]
    temperature: float
    problems: Mapping[int, str]
    draws_velocities: bool = False


def judge(run: Run, reference: Run, replicate: Run | None) -> list[CheckResult]:
    """All gates that apply to `run`.

    Args:
        replicate: the reference once more, with other noise, for the null; None: no divergence can pass or fail.
    """
    results = [_completes(run)]
    if run.positions.shape[1] < LEAST_FRAMES:
        detail = f"{run.positions.shape[1]} frames; {LEAST_FRAMES} are needed: run longer"
        codes = [code for code in THRESHOLDS if not (run.draws_velocities and code in ("K2", "K3", "K4"))]
        return results + [
            CheckResult(code, NAMES[code], "inconclusive", math.nan, THRESHOLDS[code][0], detail) for code in codes
        ]
    if not run.draws_velocities:
        if run.nve:
            results.append(_drift(run, reference))
        results += _temperatures(run)
    kinds = _coordinates(run, reference, replicate)
    for code, chosen in kinds.items():
        if chosen:
            results.append(_divergence(code, chosen, replicate is not None))
    return results


def error_of(results: Sequence[CheckResult]) -> float:
    """The largest figure in units of what passes, over all gates but K1; the error that savings are compared at."""
    shares = [result.figure / result.tolerance for result in results if result.code != "K1"]
    return math.nan if not shares or any(math.isnan(share) for share in shares) else max(shares)


def slowest_dihedral(run: Run) -> tuple[str, float]:
    """The kind and effective samples of the dihedral with the fewest; none: ("", nan)."""
    found = {
        kind: min(effective_samples(np.cos(values)), effective_samples(np.sin(values)))
        for kind, values in _dihedrals(run).items()
    }
    return min(found.items(), key=lambda item: item[1]) if found else ("", math.nan)


def slopes(run: Run) -> FloatArray:
    """Of the total energy of each replica that has three samples without thermostat or more, kJ/mol/ps/atom."""
    parts = [np.polyfit(times, energy, 1)[0] for times, energy in run.nve if len(times) > 2]
    return np.array(parts) / len(run.numbers)


def _verdict(
    figure: float, error: float, code: str, lacking: Sequence[str], besides: Sequence[str] = (), tests: int = 1
) -> Verdict:
    """With `lacking` data there is neither pass nor fail; with what speaks against it `besides`, no pass."""
    low, high = THRESHOLDS[code]
    if lacking or not math.isfinite(error):
        return "inconclusive"
    if figure - critical(tests) * error > high:
        return "fail"
    return "pass" if not besides and figure + CONFIDENCE * error <= low else "inconclusive"


def _too_few(count: int) -> list[str]:
    return [] if count >= LEAST_REPLICAS else [f"{count} replicas; {LEAST_REPLICAS} are needed"]


def _completes(run: Run) -> CheckResult:
    replicas = max(len(run.positions), len(run.problems))
    detail = "; ".join(f"replica {n} {text}" for n, text in sorted(run.problems.items())) or f"{replicas} replicas"
    verdict: Verdict = "fail" if run.problems else "pass"
    return CheckResult("K1", NAMES["K1"], verdict, float(len(run.problems)), 0.0, detail)


def _drift(run: Run, reference: Run) -> CheckResult:
    found, expected = slopes(run), slopes(reference)
    low, high = THRESHOLDS["K2"]
    if not len(found):
        detail = "too few samples without thermostat"
        return CheckResult("K2", NAMES["K2"], "inconclusive", math.nan, low, detail)
    median = float(np.median(np.abs(found)))
    quartiles = np.percentile(found, [25, 75])
    rng = np.random.default_rng(0)
    error = float(np.median(np.abs(rng.choice(found, (1000, len(found)))), axis=1).std())
    usual = float(np.median(np.abs(expected))) if len(expected) else math.nan
    length = min(float(times[-1]) for times, _ in run.nve if len(times))
    lacking, reasons = _too_few(len(found)), []
    if length < 0.99 * LEAST_NVE:
        reasons.append(f"{length:.3g} ps; {LEAST_NVE:g} ps are needed")
    if not median - CONFIDENCE * error <= DRIFT_SHARE * usual:
        reasons.append(f"more than {DRIFT_SHARE:g} times the reference's {usual:.2g}")
    verdict = _verdict(median, error, "K2", lacking, reasons)
    detail = "; ".join([f"median {median:.2g} ± {error:.1g} kJ/mol/ps/atom in {length:.3g} ps", *lacking, *reasons])
    energies = [energy - energy[0] for _, energy in run.nve if len(energy)]
    figures = {
        "first quartile (kJ/mol/ps/atom)": float(quartiles[0]),
        "third quartile (kJ/mol/ps/atom)": float(quartiles[1]),
        "standard deviation of the total energy (kJ/mol)": float(np.median([energy.std() for energy in energies])),
        "reference (kJ/mol/ps/atom)": usual,
        "fails above (kJ/mol/ps/atom)": high,
    }
    curves = [Curve(f"replica {n}", t.tolist(), (e - e[0]).tolist()) for n, (t, e) in enumerate(run.nve) if len(t)]
    plot = Plot("true total energy without thermostat", "time (ps)", "change (kJ/mol)", curves)
    return CheckResult("K2", NAMES["K2"], verdict, median, low, detail, figures, [plot])


def _temperatures(run: Run) -> list[CheckResult]:
    kinetic, freedom = kinetic_energies(
        run.numbers, run.masses, run.constraints, run.positions, run.velocities, run.kicks
    )
    shares = {}
    for name, energy in kinetic.items():
        if freedom[name].mean() < 0.5:
            continue
        ratio = 2 * energy / (BOLTZMANN * run.temperature * freedom[name].mean())
        ratio = ratio[:, int(BURN_IN * ratio.shape[1]) :]
        samples = effective_samples(ratio) if ratio.shape[1] > 1 else 0.0
        error = float(ratio.std() / math.sqrt(samples)) if samples > 1 else math.inf
        shares[name] = (float(ratio.mean()) - 1, error, samples)
    results = []
    for code, names in (("K3", ["all atoms"]), ("K4", [name for name in shares if name != "all atoms"])):
        verdicts, details = [], {}
        for name in names:
            off, error, samples = shares[name]
            reasons = _too_few(len(run.positions))
            if samples < LEAST_SAMPLES:
                reasons.append(f"{samples:.0f} independent samples; {LEAST_SAMPLES:g} are needed")
            verdicts.append(_verdict(abs(off), error, code, reasons, tests=len(names)))
            details[name] = "; ".join([f"{name}: {100 * off:+.2f} ± {100 * error:.2g} %", *reasons])
        worst = max(names, key=lambda name: abs(shares[name][0]))
        undecided = "pass" if set(verdicts) == {"pass"} else "inconclusive"
        verdict: Verdict = "fail" if "fail" in verdicts else undecided  # type: ignore[assignment]
        figures = {f"{name} (K)": run.temperature * (1 + shares[name][0]) for name in names}
        figures |= {f"{name}: standard error (K)": run.temperature * shares[name][1] for name in names}
        figure = abs(shares[worst][0])
        results.append(CheckResult(code, NAMES[code], verdict, figure, THRESHOLDS[code][0], details[worst], figures))
    return results


@dataclass(frozen=True)
class _Kind:
    """Samples (blocks, n) of one kind of coordinate: of the run, the reference, and both runs of the reference."""

    run: FloatArray
    reference: FloatArray
    pool: FloatArray
    samples: float  # independent ones of the run
    replicas: int
    bins: Callable[[FloatArray], FloatArray]  # counts per block


def _coordinates(run: Run, reference: Run, replicate: Run | None) -> dict[str, dict[str, _Kind]]:
    """By gate and kind."""
    first = reference.positions[0, 0]
    try:
        bonded = topology(_structure(reference.numbers, first))
    except StructureError:
        return {}
    runs = [run, reference, *([replicate] if replicate is not None else [])]
    found: dict[str, dict[str, _Kind]] = {"K5": {}, "K6": {}, "K7": {}}
    fixed = {tuple(sorted(pair)) for pair in reference.constraints.tolist()}
    free = np.array([bond for bond in bonded.bonds.tolist() if tuple(sorted(bond)) not in fixed], dtype=np.int64)
    for code, members in (("K5", free.reshape(-1, 2)), ("K5", bonded.angles), ("K6", bonded.dihedrals)):
        if len(members):
            width, limits = BINS[members.shape[1]]
            values = [internal(one, members) for one in runs]
            for kind in values[0]:
                found[code][kind] = _kind([value[kind] for value in values], width, limits)
    heavy = np.flatnonzero(reference.numbers != 1)
    pairs = np.array([(i, j) for n, i in enumerate(heavy) for j in heavy[n + 1 :]], dtype=np.int64).reshape(-1, 2)
    if len(pairs):
        values = [internal(one, pairs) for one in runs]
        for kind in values[0]:
            found["K7"][kind] = _kind([value[kind] for value in values], PAIR_BIN, (0.0, PAIR_MAX))
    return found


def internal(run: Run, members: IntArray) -> dict[str, FloatArray]:
    """`internal_coordinates` of all replicas after the burn-in: (R, T, number of that kind)."""
    kept = run.positions[:, int(BURN_IN * run.positions.shape[1]) :]
    frames = _frames(run.numbers, kept.reshape(-1, *kept.shape[2:]))
    found = internal_coordinates(frames, members)
    return {kind: values.reshape(len(kept), kept.shape[1], -1) for kind, values in found.items()}


def _dihedrals(run: Run) -> dict[str, FloatArray]:
    """Radians (R, T) of every dihedral."""
    if run.positions.shape[1] < 2:
        return {}
    try:
        members = topology(_structure(run.numbers, run.positions[0, 0])).dihedrals
    except StructureError:
        return {}
    found = {}
    for row in members:
        [(kind, values)] = internal(run, row[None]).items()
        found[f"{kind} {'-'.join(map(str, row.tolist()))}"] = np.radians(values[..., 0])
    return found


def _kind(values: Sequence[FloatArray], width: float, limits: tuple[float, float] | None) -> _Kind:
    usual = values[1:]
    low, high = limits or (min(v.min() for v in usual) - width, max(v.max() for v in usual) + width)
    edges = np.linspace(low, high, max(round((high - low) / width), 1) + 1)

    def counts(blocks: FloatArray) -> FloatArray:
        """What lies beyond counts in the last bins: atoms may be anywhere before a run fails."""
        return np.array(
            [np.histogram(np.clip(np.nan_to_num(block, nan=high), low, high), edges)[0] for block in blocks],
            dtype=float,
        )

    tau = max(_tau(v) for v in values)
    blocks = [_blocks(v, max(block_count(v.shape[1], tau), 1)) for v in values]
    pool = np.concatenate(blocks[1:])
    replicas, frames = values[0].shape[:2]
    return _Kind(blocks[0], blocks[1], pool, replicas * frames / (2 * tau), replicas, counts)


def _tau(values: FloatArray) -> float:
    """Of the slowest member of a kind (R, T, M), in samples; as long as a replica where nothing moves."""
    taus = [autocorrelation_time(values[..., n]) for n in range(values.shape[2])]
    return min(max(taus), float(values.shape[1]))


def _blocks(values: FloatArray, count: int) -> FloatArray:
    size = values.shape[1] // count
    cut = values[:, : size * count]
    return cut.reshape(len(values) * count, size * values.shape[2])


def _divergence(code: str, kinds: Mapping[str, _Kind], known: bool) -> CheckResult:
    measure = absolute_difference if code == "K7" else jensen_shannon
    figures, curves, worst = {}, {}, {}
    null = np.zeros(DIVISIONS)
    rng = np.random.default_rng(0)
    for name, kind in kinds.items():
        run, reference, pool = (kind.bins(part) for part in (kind.run, kind.reference, kind.pool))
        every = -(-kind.pool.shape[1] // kind.run.shape[1])
        thin = kind.bins(kind.pool[:, ::every])  # as few samples as the run has
        total = run.sum(axis=0), reference.sum(axis=0)
        worst[name] = measure(*total)
        figures[f"{name}: Kullback-Leibler divergence (nat)"] = kullback_leibler(*total)
        curves[name] = total
        if known:
            for n in range(DIVISIONS):
                order = rng.permutation(len(pool))
                one, two = thin[order[: len(run)]], pool[order[len(run) :]]
                null[n] = max(null[n], measure(one.sum(axis=0), two.sum(axis=0)))
    figure = max(worst.values())
    usual = float(np.percentile(null, 95)) if known else math.inf
    low, high = THRESHOLDS[code]
    samples = min(kind.samples for kind in kinds.values())
    lacking = _too_few(min(kind.replicas for kind in kinds.values()))
    if not known:
        lacking.append("no second run of the reference (verlet at the same time step) to tell chance by")
    if samples < LEAST_SAMPLES:
        lacking.append(f"{samples:.0f} independent samples; {LEAST_SAMPLES:g} are needed")
    reasons = []
    if usual > low:
        reasons.append(f"two runs of the reference differ by {usual:.2g}; {low:g} is to be seen")
    verdict: Verdict = "inconclusive"
    if not lacking and figure > max(high, BEYOND_NULL * usual):
        verdict = "fail"
    elif not lacking and not reasons and figure <= min(low, BEYOND_NULL * usual):
        verdict = "pass"
    name = max(worst, key=lambda kind: worst[kind])
    detail = "; ".join([f"{name}: {figure:.2g}, null {usual:.2g}", *lacking, *reasons])
    figures |= {f"{kind}: figure": value for kind, value in worst.items()} | {"95 % of the null": usual}
    x = np.arange(len(curves[name][0]), dtype=float).tolist()
    shown = [
        Curve(label, x, (part / part.sum()).tolist(), style="steps")
        for label, part in zip(("variant", "reference"), curves[name], strict=True)
    ]
    plot = Plot(f"{name}, where they differ most", "bin", "probability", shown)
    return CheckResult(code, NAMES[code], verdict, figure, low, detail, figures, [plot])


def _structure(numbers: IntArray, positions: FloatArray) -> Structure:
    return Structure(numbers, positions)


def _frames(numbers: IntArray, positions: FloatArray) -> Frames:
    none = np.zeros(3, dtype=bool)
    return Frames(numbers, positions, np.zeros((3, 3)), none, np.arange(len(positions), dtype=float))
