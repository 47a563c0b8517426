"""Gates on large time steps: what `mlff kstep run` made, against the reference from the same starts.

| code | gate                  | figure                                                                      |
|------|-----------------------|-----------------------------------------------------------------------------|
| K1   | the run               | replicas that failed, were refused or broke a bond                          |
| K2   | NVE drift             | median over replicas of the slope of the true energy, kJ/mol/ps/atom        |
| K3   | temperatures          | deviation of the kinetic and the configurational one from that asked for    |
| K4   | equipartition         | the same of elements, heavy atoms, translation, rotation and inner motion   |
| K5   | bonds and angles      | Jensen-Shannon divergence, nat, the largest of any kind                     |
| K6   | dihedrals             | the same                                                                    |
| K7   | heavy-atom distances  | ∫|Δp| / ∫p of the pair distances up to 12 Å, the largest of any kind        |
| K8   | torsion rates         | |ln| of the slowest dihedral's rate of changing basins over the reference's |

A figure passes when it lies below its first threshold with `CONFIDENCE` standard errors to spare, it fails when it lies
above its second by more than `critical` ones, both from enough replicas and independent samples; else the data decide
nothing. Divergences have no standard error but a null: those of random divisions of the blocks of two runs of the
reference, which sample the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlff_engines.errors import StructureError
from mlff_engines.structure import FloatArray, IntArray, Structure
from mlff_engines.units import BOLTZMANN
from mlff_engines.validation.dynamics.large_step_distributions import Kind, Replicas, compare, internal, kinds_of
from mlff_engines.validation.dynamics.statistics import CONFIDENCE, LEAST_SAMPLES, critical, effective_samples
from mlff_engines.validation.result import CheckResult, Curve, Plot, Verdict
from mlff_engines.validation.trajectories.divergences import absolute_difference, jensen_shannon
from mlff_engines.validation.trajectories.kinetic import kinetic_energies
from mlff_engines.validation.trajectories.observables import Topology, topology

NAMES = {
    "K1": "runs to the end",
    "K2": "true total energy does not drift",
    "K3": "kinetic and configurational temperature",
    "K4": "equipartition by group",
    "K5": "distributions of bonds and angles",
    "K6": "distributions of dihedrals",
    "K7": "distributions of heavy-atom distances",
    "K8": "rate of the slowest dihedral",
}
THRESHOLDS = {  # pass, fail; see the table above
    "K2": (5e-4, 5e-3),
    "K3": (0.005, 0.02),
    "K4": (0.01, 0.03),
    "K5": (1e-3, 5e-3),
    "K6": (5e-3, 2.5e-2),
    "K7": (0.01, 0.05),
    "K8": (math.log(1.25), math.log(1.25)),  # 0.8 to 1.25 passes, what surely is beyond fails
}
BEYOND_NULL = 1.5  # times the 95th percentile of the null
DRIFT_SHARE = 3.0  # times the reference's
LEAST_REPLICAS, LEAST_NVE = 5, 100.0  # ps; less never passes
LEAST_FRAMES = 4  # of a replica, to know a correlation by
CORE = 30.0  # degrees about the top of a basin
BASIN = 0.1  # of the highest top: lower ones are none
BROKEN = 1.5  # times the mean length of a bond in the reference
BURN_IN = 0.1  # of each replica: starts are in equilibrium already, but in that of the reference


@dataclass(frozen=True)
class Run:
    """One variant on one molecule, R replicas of T frames of N atoms.

    | field                    | shape          | unit                                                           |
    |--------------------------|----------------|----------------------------------------------------------------|
    | `positions`              | (R, T, N, 3)   | Å                                                              |
    | `velocities`, `kicks`    | (R, T, N, 3)   | Å/fs; on step, and what half a time step adds                  |
    | `slopes`, `curvatures`   | (R, T)         | of the configurational temperature; ratio of means: kT in eV   |
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
    slopes: FloatArray
    curvatures: FloatArray
    nve: Sequence[FloatArray]
    temperature: float
    problems: Mapping[int, str]
    draws_velocities: bool = False

    @property
    def kept(self) -> Replicas:
        """Without the burn-in."""
        burnt = int(BURN_IN * len(self.times))
        return Replicas(self.times[burnt:], self.positions[:, burnt:])


def judge(run: Run, reference: Run, replicate: Run | None) -> list[CheckResult]:
    """All gates that apply to `run`.

    Args:
        replicate: the reference once more, with other noise, for the null; None: no divergence can pass or fail.
    """
    try:
        bonded = _bonded(reference)
    except StructureError:  # an element without a radius
        bonded = None
    results = [_completes(run, reference, bonded)]
    asked = [code for code in THRESHOLDS if not (run.draws_velocities and code in ("K2", "K4", "K8"))]
    if run.positions.shape[1] < LEAST_FRAMES:
        detail = f"{run.positions.shape[1]} frames; {LEAST_FRAMES} are needed: run longer"
        undecided = [
            CheckResult(code, NAMES[code], "inconclusive", math.nan, THRESHOLDS[code][0], detail) for code in asked
        ]
        return results + undecided
    if run.nve and "K2" in asked:
        results.append(_drift(run, reference))
    results += _temperatures(run)
    if bonded is None:
        return results
    others = [reference, *([] if replicate is None else [replicate])]
    kinds = kinds_of(run.numbers, bonded, reference.constraints, [run.kept, *(one.kept for one in others)])
    results += [
        _divergence(code, chosen, replicate is not None, len(run.positions)) for code, chosen in kinds.items() if chosen
    ]
    slowest = slowest_dihedral(reference)
    if slowest is not None and "K8" in asked:
        results.append(_rates(run, others, slowest))
    return results


def error_of(results: Sequence[CheckResult]) -> float:
    """The largest figure in units of what passes, over all gates but K1; the error that savings are compared at."""
    shares = [result.figure / result.tolerance for result in results if result.code != "K1"]
    return math.nan if not shares or any(math.isnan(share) for share in shares) else max(shares)


def slowest_dihedral(reference: Run) -> Basins | None:
    """Of all dihedrals with several basins the one with the fewest effective samples; None where none has."""
    try:
        members = _bonded(reference).dihedrals
    except StructureError:
        return None
    found = [basins for row in members if len((basins := Basins.of(reference, row)).tops) > 1]
    return min(found, key=lambda basins: basins.samples(reference), default=None)


@dataclass(frozen=True)
class Basins:
    """Where a dihedral (4,) stays: `tops` in degrees, the maxima of its distribution."""

    atoms: IntArray
    tops: FloatArray

    @classmethod
    def of(cls, run: Run, atoms: IntArray) -> Basins:
        """As `run` shows them, in bins of 10°, smoothed over three."""
        counts, edges = np.histogram(_angles(run, atoms), 36, (-180, 180))
        smooth = np.roll(counts, -1) + counts + np.roll(counts, 1)
        high = (smooth >= np.roll(smooth, 1)) & (smooth > np.roll(smooth, -1)) & (smooth > BASIN * smooth.max())
        tops: list[float] = []
        for top in (0.5 * (edges[1:] + edges[:-1])[high]).tolist():
            if all(_apart(top, other) > 2 * CORE for other in tops):
                tops.append(top)
        return cls(atoms, np.array(tops))

    def samples(self, run: Run) -> float:
        """Effective ones of all replicas, the fewer of cosine and sine."""
        radians = np.radians(_angles(run, self.atoms))
        return min(effective_samples(np.cos(radians)), effective_samples(np.sin(radians)))

    def changes(self, run: Run) -> int:
        """How often the dihedral came within `CORE` of another top than the one that it was at last."""
        angles = _angles(run, self.atoms)
        distance = _apart(angles[..., None], self.tops)
        core = np.where(distance.min(-1) < CORE, distance.argmin(-1), -1)
        return sum(int((np.diff(row[row >= 0]) != 0).sum()) for row in core)

    def duration(self, run: Run) -> float:
        """ps, of all replicas."""
        return len(run.positions) * run.kept.interval * len(run.kept.times)


def _apart(one: Any, other: Any) -> Any:
    """Degrees between two angles, 0 to 180."""
    return np.abs((one - other + 180) % 360 - 180)


def _angles(run: Run, atoms: IntArray) -> FloatArray:
    """Degrees (R, T)."""
    [values] = internal(run.numbers, run.kept.positions, atoms[None]).values()
    return values[..., 0]


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


def _completes(run: Run, reference: Run, bonded: Topology | None) -> CheckResult:
    replicas = max(len(run.positions), len(run.problems))
    problems = dict(run.problems)
    if bonded is not None and len(bonded.bonds):
        usual = _lengths(reference, bonded.bonds).mean((0, 1))
        for replica, lengths in enumerate(_lengths(run, bonded.bonds)):
            broken = np.argwhere(~(lengths < BROKEN * usual))
            if len(broken):
                frame, bond = broken[0]
                pair = " and ".join(str(atom) for atom in bonded.bonds[bond])
                problems.setdefault(replica, f"broke the bond of atoms {pair} after {run.times[frame]:.3g} ps")
    detail = "; ".join(f"replica {n} {text}" for n, text in sorted(problems.items())) or f"{replicas} replicas"
    verdict: Verdict = "fail" if problems else "pass"
    return CheckResult("K1", NAMES["K1"], verdict, float(len(problems)), 0.0, detail)


def _lengths(run: Run, bonds: IntArray) -> FloatArray:
    """Å (R, T, B)."""
    lengths: FloatArray = np.linalg.norm(
        run.positions[..., bonds[:, 0], :] - run.positions[..., bonds[:, 1], :], axis=-1
    )
    return lengths


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
    shares = _kinetic(run) | {CONFIGURATIONAL: _configurational(run)}
    first = [name for name in (WHOLE, CONFIGURATIONAL) if name in shares]
    results = []
    for code, names in (("K3", first), ("K4", [name for name in shares if name not in first])):
        verdicts, details = [], {}
        for name in names:
            off, error, samples = shares[name]
            reasons = _too_few(len(run.positions))
            if samples < LEAST_SAMPLES:
                reasons.append(f"{samples:.0f} independent samples; {LEAST_SAMPLES:g} are needed")
            verdicts.append(_verdict(abs(off), error, code, reasons, tests=len(names)))
            details[name] = "; ".join([f"{name}: {100 * off:+.2f} ± {100 * error:.2g} %", *reasons])
        if not names:
            continue
        worst = max(names, key=lambda name: np.nan_to_num(abs(shares[name][0]), nan=np.inf))
        undecided = "pass" if set(verdicts) == {"pass"} else "inconclusive"
        verdict: Verdict = "fail" if "fail" in verdicts else undecided  # type: ignore[assignment]
        figures = {f"{name} (K)": run.temperature * (1 + shares[name][0]) for name in names}
        figures |= {f"{name}: standard error (K)": run.temperature * shares[name][1] for name in names}
        figure = abs(shares[worst][0])
        results.append(CheckResult(code, NAMES[code], verdict, figure, THRESHOLDS[code][0], details[worst], figures))
    return results


WHOLE, CONFIGURATIONAL = "all atoms", "configurational"
Share = tuple[float, float, float]  # relative deviation of a temperature, its standard error, independent samples


def _kinetic(run: Run) -> dict[str, Share]:
    """By group of atoms or motion; nothing where velocities are random numbers."""
    if run.draws_velocities:
        return {}
    kinetic, freedom = kinetic_energies(
        run.numbers, run.masses, run.constraints, run.positions, run.velocities, run.kicks
    )
    shares = {}
    for name, energy in kinetic.items():
        if freedom[name].mean() < 0.5:
            continue
        ratio = 2 * energy / (BOLTZMANN * run.temperature * freedom[name].mean())
        shares[name] = _share(ratio)
    return shares


def _configurational(run: Run) -> Share:
    """Linearised about the ratio of means."""
    burnt = int(BURN_IN * len(run.times))
    curvatures, slopes = run.curvatures[:, burnt:], run.slopes[:, burnt:] / (BOLTZMANN * run.temperature)
    mean = float(curvatures.mean())
    if not (np.isfinite(slopes).all() and mean > 0):
        return math.nan, math.inf, 0.0
    ratio = float(slopes.mean()) / mean
    _, error, samples = _share((slopes - ratio * curvatures) / mean, burnt=0.0)
    return ratio - 1, error, samples


def _share(ratio: FloatArray, burnt: float = BURN_IN) -> Share:
    ratio = ratio[:, int(burnt * ratio.shape[1]) :]
    samples = effective_samples(ratio) if ratio.shape[1] > 1 else 0.0
    error = float(ratio.std() / math.sqrt(samples)) if samples > 1 else math.inf
    return float(ratio.mean()) - 1, error, samples


def _divergence(code: str, kinds: dict[str, Kind], known: bool, replicas: int) -> CheckResult:
    found = compare(code, kinds, absolute_difference if code == "K7" else jensen_shannon, known)
    name, (low, high) = found.worst, THRESHOLDS[code]
    figure, usual = found.by_kind[name], found.usual
    lacking = _too_few(replicas)
    if not known:
        lacking.append("no second run of the reference (verlet at the same time step) to tell chance by")
    elif not math.isfinite(usual):
        lacking.append("the reference is too short to tell chance by: let it run longer than the variant")
    if found.samples < LEAST_SAMPLES:
        lacking.append(f"{found.samples:.0f} independent samples; {LEAST_SAMPLES:g} are needed")
    reasons = []
    if usual > low:
        reasons.append(f"two runs of the reference differ by {usual:.2g}; {low:g} is to be seen")
    verdict: Verdict = "inconclusive"
    if not lacking and figure > max(high, BEYOND_NULL * usual):
        verdict = "fail"
    elif not lacking and not reasons and figure <= min(low, BEYOND_NULL * usual):
        verdict = "pass"
    detail = "; ".join([f"{name}: {figure:.2g}, null {usual:.2g}", *lacking, *reasons])
    return CheckResult(code, NAMES[code], verdict, figure, low, detail, found.figures, found.plots)


def _rates(run: Run, others: Sequence[Run], basins: Basins) -> CheckResult:
    """Changes of basin as a Poisson process; the ratio of two rates has a relative variance of 1/n + 1/n'."""
    mine, time = basins.changes(run), basins.duration(run)
    usual, long = sum(map(basins.changes, others)), sum(map(basins.duration, others))
    which = "-".join(map(str, basins.atoms.tolist()))
    detail = f"dihedral {which}: {mine} changes of basin in {time:.3g} ps, the reference {usual} in {long:.3g} ps"
    figures = {"rate (1/ps)": mine / time, "reference (1/ps)": usual / long}
    low, _ = THRESHOLDS["K8"]
    if not mine or not usual:
        return CheckResult("K8", NAMES["K8"], "inconclusive", math.nan, low, detail, figures)
    figure, error = abs(math.log(mine / time * long / usual)), math.sqrt(1 / mine + 1 / usual)
    return CheckResult("K8", NAMES["K8"], _verdict(figure, error, "K8", []), figure, low, detail, figures)


def _bonded(run: Run) -> Topology:
    return topology(Structure(run.numbers, run.positions[0, 0]))
