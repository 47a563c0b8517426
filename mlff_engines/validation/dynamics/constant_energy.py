"""M1-M4: the time step's law, reversal, the eager model's own trajectory, and drift. All at constant energy."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mlff_engines.errors import MLFFError
from mlff_engines.manifest import Dtype
from mlff_engines.structure import MASSES, FloatArray, Structure
from mlff_engines.units import ACCELERATION
from mlff_engines.validation import result
from mlff_engines.validation.engine import Dynamics, Engine, Trajectory, thermal
from mlff_engines.validation.result import NAMES, ROUNDING, CheckResult, Curve, Evaluate, Plot, Verdict
from mlff_engines.validation.trajectories.observables import needed

# M1: of the ratio, whose right value is 4. M2, M3: Å (for M3 also eV per atom). M4: meV/atom/ps.
# float32 in M2 and M3: forces off by S1's 5e-5 eV/Å carry a hydrogen atom about 1e-3 Å away within these steps.
TOLERANCES: dict[str, dict[Dtype, float]] = {
    "M1": {"float64": 0.5, "float32": 0.5},
    "M2": {"float64": 1e-8, "float32": 1e-3},
    "M3": {"float64": 1e-6, "float32": 1e-3},
    "M4": {"float64": 1e-3, "float32": 1e-2},
}
PHASE = 0.25  # radians of the fastest vibration per time step: about 25 steps a period
SURE = 3.0  # standard errors


@dataclass(frozen=True)
class Options:
    """How long the checks run, in steps of the start's time step unless said otherwise.

    | field      | meaning                                                                                            |
    |------------|----------------------------------------------------------------------------------------------------|
    | `law`      | M1, at the whole step: 7 times as many evaluations                                                 |
    | `reversal` | M2, one way                                                                                        |
    | `same`     | M3                                                                                                 |
    | `drift`    | M4, in half steps                                                                                  |
    | `blocks`   | M1, M4: stretches taken to be independent; each should cover many periods of the fastest vibration |
    """

    law: int = 800
    reversal: int = 250
    same: int = 100
    drift: int = 20_000
    blocks: int = 16


def starting(core: Engine, structure: Structure, temperature: float, seed: int = 0) -> Dynamics:
    """Velocities of `temperature` (K) and a time step for `structure`; no steps yet.

    The step follows from the fastest vibration there is at the start (`PHASE`), and is at most 1 fs for hydrogen, or as
    the square root of the lightest mass: where atoms are not bound, they meet later.
    """
    still = Dynamics(structure, np.zeros_like(structure.positions), timestep=1.0, steps=0)
    longest = np.sqrt(still.masses.min(initial=np.inf) / MASSES[1])
    fastest = fastest_vibration(core.evaluate, still)
    step = float(f"{min(longest, PHASE / fastest if fastest > 0 else np.inf):.2g}")
    return thermal(replace(still, timestep=step), temperature, seed)


def fastest_vibration(evaluate: Evaluate, dynamics: Dynamics, iterations: int = 12) -> float:
    """Angular frequency in rad/fs, by power iteration on the mass-weighted Hessian: a few per cent too low."""
    structure, weights = dynamics.structure, np.sqrt(dynamics.masses)[:, None]
    mode, square = np.random.default_rng(0).standard_normal(structure.positions.shape), 0.0
    for _ in range(iterations):
        mode /= np.linalg.norm(mode) or 1.0
        shift = 1e-3 * mode / weights
        ahead, behind = (
            evaluate(replace(structure, positions=structure.positions + sign * shift)).forces for sign in (1, -1)
        )
        mode = -(ahead - behind) / 2e-3 / weights * ACCELERATION
        square = float(np.linalg.norm(mode))
    return float(np.sqrt(square))


def check_dynamics(
    engine: Engine,
    core: Engine,
    start: Dynamics,
    folder: Path,
    options: Options | None = None,
    only: Collection[str] = tuple(TOLERANCES),
) -> list[CheckResult]:
    """Run M1-M4 on one engine.

    Args:
        engine: to be judged.
        core: the eager model in float64.
        start: structure, velocities and time step; see `starting`.
        folder: for the native trajectories.
        options: lengths.
        only: codes of the checks to run.

    Returns:
        One result per check. A check that the engine answers with an error has failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checks = {
        "M1": check_time_step_law,
        "M2": check_reversal,
        "M3": check_same_trajectory,
        "M4": check_drift,
    }
    results = []
    for code in (code for code in checks if code in only):
        try:
            results.append(checks[code](engine, core, start, folder, options or Options()))
        except MLFFError as error:
            results.append(_judged(code, engine, "fail", np.nan, f"{type(error).__name__}: {error}"))
    return results


def check_time_step_law(engine: Engine, core: Engine, start: Dynamics, folder: Path, options: Options) -> CheckResult:
    """M1: at dt, dt/2, dt/4 the total energy's standard deviation falls by 4 each time.

    Velocity Verlet conserves H + dt² H₂ + O(dt⁴) of a smooth conservative model exactly (Hairer, Lubich and Wanner,
    Geometric Numerical Integration, IX.8), so what is left in H is dt² H₂. An energy that jumps, forces that are not
    its gradient and forgotten neighbours leave their own mark, which no smaller step removes.

    Where the first ratio is too large, higher orders are to blame and the steps are halved once more. Fluctuations
    that the precision's rounding of the energy accounts for decide nothing.
    """
    fractions = [1, 2, 4]
    runs: list[Trajectory] = []
    while len(runs) < len(fractions):
        k = fractions[len(runs)]
        stretch = replace(start, timestep=start.timestep / k, steps=options.law * k, every=k)
        runs.append(engine.run(stretch, folder / f"M1-{k}{engine.suffix}"))
        if len(runs) == 3 and _ratio(runs[0], runs[1], options.blocks).high:
            fractions.append(8)
    ratios = [_ratio(coarse, fine, options.blocks) for coarse, fine in zip(runs[-3:-1], runs[-2:], strict=True)]
    worst = max(ratios, key=lambda ratio: ratio.off)
    deviations = [float(run.total.std()) for run in runs]
    last_digits = ROUNDING * abs(float(runs[-1].potential[0]))
    noise = max(rounding_noise(engine, replace(start.structure, positions=runs[-1].positions[-1])), last_digits)
    allowed = result.TOLERANCES["S1"][engine.dtype] * len(start.structure) + last_digits
    verdict: Verdict = worst.verdict
    detail = " and ".join(str(ratio) for ratio in ratios) + " each time the step is halved"
    if verdict != "pass" and deviations[-1] <= SURE * noise <= SURE * allowed:
        verdict = "inconclusive"
        detail += f"; the smallest fluctuation is {engine.dtype}'s rounding: try a longer time step or more heat"
    elif verdict == "inconclusive":
        detail += "; run longer"
    atoms = max(len(start.structure), 1)
    steps = [start.timestep / k for k in fractions]
    fluctuation = [1e3 * d / atoms for d in deviations]
    law = [fluctuation[-1] * (step / steps[-1]) ** 2 for step in steps]
    figures = {f"fluctuation at {step:g} fs, meV/atom": f for step, f in zip(steps, fluctuation, strict=True)}
    for which, ratio in zip(("first", "second"), ratios, strict=True):
        figures[f"{which} ratio"] = float(np.exp(ratio.log))
        figures[f"{which} ratio's standard error"] = float(np.exp(ratio.log) * ratio.error)
    return _judged(
        "M1",
        engine,
        verdict,
        abs(np.exp(worst.log) - 4),
        detail,
        figures | {"rounding of the energy, meV/atom": 1e3 * noise / atoms},
        [
            Plot(
                "Fluctuation of the total energy",
                "time step, fs",
                "standard deviation, meV/atom",
                [Curve(engine.name, steps, fluctuation, style="points"), Curve("dt²", steps, law)],
                "log-log",
            ),
            _energies([(f"{step:g} fs", run) for step, run in zip(steps, runs, strict=True)], atoms),
        ],
    )


def check_reversal(engine: Engine, core: Engine, start: Dynamics, folder: Path, options: Options) -> CheckResult:
    """M2: turned round after some steps, the atoms come back to where they started."""
    steps = options.reversal
    every = max(1, steps // 50)
    there = engine.run(replace(start, steps=steps, every=every), folder / f"M2-there{engine.suffix}")
    turned = replace(start.structure, positions=there.positions[-1])
    back = engine.run(
        replace(start, structure=turned, velocities=-there.velocities[-1], steps=steps, every=every),
        folder / f"M2-back{engine.suffix}",
    )
    apart = _farthest(back.positions - there.positions[::-1])
    moved = float(_farthest(there.positions - there.positions[0]).max())
    return _compared(
        "M2",
        engine,
        float(apart[-1]),
        f"Å from the start after {steps} steps there and back",
        moved,
        {"velocities, Å/fs": float(_farthest(back.velocities[-1:] + start.velocities)[0])},
        Plot("Way back against way there", "time, fs", "largest distance, Å", [_growth(back.times, apart)], "log"),
    )


def check_same_trajectory(engine: Engine, core: Engine, start: Dynamics, folder: Path, options: Options) -> CheckResult:
    """M3: positions, velocities, energies and pressure of the eager model, step by step.

    The figure is the largest of |Δx| (Å), |Δv| (Å over the time that the fastest vibration takes for one radian), |ΔE|
    (potential and kinetic) and |ΔP| V (eV per atom).
    """
    stretch = replace(start, steps=options.same, every=max(1, options.same // 50))
    found = engine.run(stretch, folder / f"M3{engine.suffix}")
    expected = core.run(stretch, folder / f"M3-core{core.suffix}")
    atoms = max(len(start.structure), 1)
    apart = {
        "positions": _farthest(found.positions - expected.positions),
        "velocities": _farthest(found.velocities - expected.velocities) * start.timestep / PHASE,
        "potential energy": np.maximum(
            np.abs(found.potential - expected.potential) - ROUNDING * np.abs(expected.potential), 0
        )
        / atoms,
        "kinetic energy": np.abs(found.kinetic - expected.kinetic) / atoms,
    }
    if found.pressure is not None and expected.pressure is not None and "virial" in engine.offers:
        apart["pressure"] = np.abs(found.pressure - expected.pressure) * (start.structure.volume or 0.0) / atoms
    worst = max(apart, key=lambda name: _nan_is_worst(apart[name]))
    return _compared(
        "M3",
        engine,
        _nan_is_worst(apart[worst]),
        f"{worst} within {options.same} steps",
        float(_farthest(expected.positions - expected.positions[0]).max()),
        {
            f"{name}, {'Å' if name in ('positions', 'velocities') else 'eV/atom'}": _nan_is_worst(values)
            for name, values in apart.items()
        },
        Plot(
            "Against the eager model",
            "time, fs",
            "largest difference, Å or eV/atom",
            [_growth(found.times, values, name) for name, values in apart.items()],
            "log",
        ),
    )


def check_drift(engine: Engine, core: Engine, start: Dynamics, folder: Path, options: Options) -> CheckResult:
    """M4: slope of the total energy per atom, its standard error from means over blocks; also against the eager model.

    Where slope and error leave it open on which side of the tolerance the truth lies, longer runs will tell.
    """
    atoms = max(len(start.structure), 1)
    stretch = replace(start, timestep=start.timestep / 2, steps=options.drift, every=max(1, options.drift // 2000))
    runs = {
        name: one.run(stretch, folder / f"M4-{name}{one.suffix}") for name, one in (("engine", engine), ("core", core))
    }
    (slope, error), (expected, its_error) = (_slope(run, atoms, options.blocks) for run in runs.values())
    tolerance = TOLERANCES["M4"][engine.dtype]
    detail = f"{slope:.2g} ± {error:.1g} meV/atom/ps; the eager model {expected:.2g} ± {its_error:.1g}"
    verdict: Verdict = "pass"
    if not abs(slope) - SURE * error <= tolerance:
        verdict = "fail"
    elif not abs(slope - expected) <= SURE * np.hypot(error, its_error) + 0.5 * tolerance:
        verdict, detail = "fail", f"{detail}: too far apart"
    elif not max(abs(slope), error) <= tolerance:
        needed = options.drift * max(2.0, (SURE * error / tolerance) ** (2 / 3))  # the error falls as T^-3/2
        verdict, detail = "inconclusive", f"{detail}; run about {needed:.1g} steps"
    return _judged(
        "M4",
        engine,
        verdict,
        abs(slope),
        detail,
        {
            "slope, meV/atom/ps": slope,
            "standard error, meV/atom/ps": error,
            "slope of the eager model, meV/atom/ps": expected,
            "its standard error, meV/atom/ps": its_error,
        },
        [_energies([(engine.name, runs["engine"]), ("eager model", runs["core"])], atoms)],
    )


def rounding_noise(engine: Engine, structure: Structure, points: int = 17) -> float:
    """Standard deviation (eV) of the energy's rounding: by differences between close-by structures.

    J. Moré and S. Wild, SIAM J. Sci. Comput. 33, 1292 (2011), algorithm ECnoise: the k-th differences of a smooth
    function vanish as the k-th power of the distance, those of noise have variance (2k)!/(k!)²; here k = 4. `structure`
    should be no symmetric one, whose energy hardly changes.
    """
    step = 1e-4 * np.random.default_rng(0).uniform(-1, 1, structure.positions.shape)
    line = [replace(structure, positions=structure.positions + i * step) for i in range(points)]
    differences = np.diff([engine.evaluate(point).energy for point in line], 4)
    return float(np.sqrt(np.mean(differences**2) / 70))


@dataclass(frozen=True)
class _Ratio:
    """Logarithm of two standard deviations' ratio, and its standard error."""

    log: float
    error: float

    @property
    def off(self) -> float:
        """How far from log 4; infinite for what is no number."""
        return abs(self.log - np.log(4)) if np.isfinite(self.log) else np.inf

    @property
    def high(self) -> bool:
        return bool(self.log > np.log(4 + TOLERANCES["M1"]["float64"]))

    @property
    def verdict(self) -> Verdict:
        tolerance = TOLERANCES["M1"]["float64"]
        beyond = max(self.log - np.log(4 + tolerance), np.log(4 - tolerance) - self.log)
        if not beyond <= SURE * self.error:
            return "fail"
        return "pass" if beyond <= 0 and 4 * self.error <= tolerance else "inconclusive"

    def __str__(self) -> str:
        return f"{np.exp(self.log):.2f} ± {np.exp(self.log) * self.error:.2f}"


def _ratio(coarse: Trajectory, fine: Trajectory, blocks: int) -> _Ratio:
    """Of the total energies; both runs follow one path at first, and the error knows of it."""
    squares = [(run.total - run.total.mean()) ** 2 for run in (coarse, fine)]
    with np.errstate(divide="ignore", invalid="ignore"):
        log = 0.5 * np.log(squares[0].mean() / squares[1].mean())
        share = 0.5 * (squares[0] / squares[0].mean() - squares[1] / squares[1].mean())
        means = [block.mean() for block in np.array_split(share, blocks)]
        return _Ratio(float(log), float(np.std(means, ddof=1) / np.sqrt(blocks)))


def _slope(run: Trajectory, atoms: int, blocks: int) -> tuple[float, float]:
    """With its standard error, in meV/atom/ps."""
    times, energies = (
        [float(block.mean()) for block in np.array_split(values, blocks)]
        for values in (1e-3 * run.times, 1e3 * (run.total - run.total[0]) / atoms)
    )
    fit = needed("scipy.stats").linregress(times, energies)
    return float(fit.slope), float(fit.stderr)


def _compared(
    code: str, engine: Engine, figure: float, detail: str, moved: float, figures: dict[str, float], plot: Plot
) -> CheckResult:
    """Against the tolerance; of atoms at rest nothing is learned."""
    tolerance = TOLERANCES[code][engine.dtype]
    verdict: Verdict = "pass" if figure <= tolerance else "fail"
    if verdict == "pass" and moved < 10 * tolerance:
        verdict, detail = "inconclusive", f"the atoms moved by {moved:.1g} Å only: start with more heat"
    return _judged(code, engine, verdict, figure, detail, figures | {"way of the farthest atom, Å": moved}, [plot])


def _judged(
    code: str,
    engine: Engine,
    verdict: Verdict,
    figure: float,
    detail: str,
    figures: dict[str, float] | None = None,
    plots: Sequence[Plot] = (),
) -> CheckResult:
    tolerance = TOLERANCES[code][engine.dtype]
    return CheckResult(code, NAMES[code], verdict, float(figure), tolerance, detail, figures or {}, plots)


def _farthest(differences: FloatArray) -> FloatArray:
    """(T, N, 3) -> (T,): the longest vector of each sample."""
    lengths: FloatArray = np.linalg.norm(differences, axis=-1).max(axis=-1, initial=0.0)
    return lengths


def _nan_is_worst(values: FloatArray) -> float:
    return float(values.max(initial=0.0)) if np.isfinite(values).all() else np.inf


def _growth(times: FloatArray, apart: FloatArray, label: str = "") -> Curve:
    shown = apart > 0
    return Curve(label, times[shown].tolist(), apart[shown].tolist())


def _energies(runs: Sequence[tuple[str, Trajectory]], atoms: int) -> Plot:
    curves = [
        Curve(label, run.times.tolist(), (1e3 * (run.total - run.total[0]) / atoms).tolist()) for label, run in runs
    ]
    return Plot("Total energy", "time, fs", "E - E(0), meV/atom", curves)
