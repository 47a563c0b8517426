"""D2-D5: skins, checkpoints, repetition and memory: what an adapter can get wrong with a right model."""

from __future__ import annotations

import copy
import ctypes
import gc
import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mlff_engines.errors import MLFFError
from mlff_engines.manifest import Dtype
from mlff_engines.structure import FloatArray, Result
from mlff_engines.validation import result
from mlff_engines.validation.engine import Dynamics, Engine, MakeEngine, Trajectory
from mlff_engines.validation.result import NAMES, CheckResult, Curve, Plot, Verdict, Worst
from mlff_engines.validation.trajectories.observables import needed

# D2, D3: Å, Å/fs and eV per atom. D4: eV, eV/Å, Å, Å/fs. D5: MiB.
# float32: a sum in another order differs by its rounding, and moves hydrogen by as much as M3 allows for S1
TOLERANCES: dict[str, dict[Dtype, float]] = {
    "D2": {"float64": 1e-6, "float32": 1e-3},
    "D3": {"float64": 1e-10, "float32": 1e-4},
    "D4": {"float64": 0.0, "float32": 0.0},
    "D5": {"float64": 4.0, "float32": 4.0},
}
SKINS = (0.0, 0.3, 2.0)  # Å
Make = Callable[[str, float], Engine]  # name of the instance, skin


@dataclass(frozen=True)
class Options:
    """How long the checks run.

    Attributes:
        steps: of every run; D3 takes twice as many.
        drift: Å by which D2 moves the whole system meanwhile.
        rounds: of D4 in each of two threads; 0 where an engine must not be used from threads.
        evaluations: of D5.
        warm_up: of these, before memory is first looked at.
    """

    steps: int = 200
    drift: float = 6.0
    rounds: int = 10
    evaluations: int = 5000
    warm_up: int = 500


def check_adapter(
    make: MakeEngine,
    artifact: Path,
    start: Dynamics,
    folder: Path,
    *,
    device: str = "cpu",
    dtype: Dtype | None = None,
    options: Options | None = None,
    only: Collection[str] = tuple(TOLERANCES),
) -> list[CheckResult]:
    """Run D2-D5 on one adapter.

    Args:
        make: engines, as many as the checks need.
        artifact: what they run.
        start: structure, velocities and time step; see `mlff_engines.validation.dynamics.constant_energy.starting`.
        folder: for engines and trajectories.
        device, dtype: of the engines.
        options: lengths.
        only: codes of the checks to run.

    Returns:
        One result per check. A check that the adapter answers with an error has failed.
    """
    options = options or Options()
    folder.mkdir(parents=True, exist_ok=True)

    def made(name: str, skin: float = 0.5) -> Engine:
        (folder / name).mkdir(parents=True, exist_ok=True)
        return make(artifact, folder=folder / name, device=device, dtype=dtype, skin=skin)

    checks: dict[str, Callable[[], CheckResult]] = {
        "D2": lambda: check_skins(made, start, folder, options),
        "D3": lambda: check_restart(made, start, folder, options),
        "D4": lambda: check_repetition(made, start, folder, options, on_cpu=device == "cpu"),
        "D5": lambda: check_memory(made, start, options),
    }
    results = []
    for code in (code for code in checks if code in only):
        try:
            results.append(checks[code]())
        except MLFFError as error:
            tolerance = TOLERANCES[code][dtype or "float64"]
            detail = f"{type(error).__name__}: {error}"
            results.append(CheckResult(code, NAMES[code], "fail", np.nan, tolerance, detail))
    return results


def check_skins(make: Make, start: Dynamics, folder: Path, options: Options) -> CheckResult:
    """D2: the same trajectory with every skin. Without one, neighbours are searched at every step: that is the truth.

    Run twice: as it is, and drifting as a whole, which no force feels and every list has to follow.
    """
    engines = [make(f"D2-skin-{skin:g}", skin) for skin in SKINS]
    stretch = replace(start, steps=options.steps, every=max(1, options.steps // 50))
    push = options.drift / (options.steps * start.timestep) / np.sqrt(3)
    worst, curves, slowest = Worst(detail="to the last bit"), [], np.inf
    for what, dynamics in (("", stretch), ("drifting", replace(stretch, velocities=start.velocities + push))):
        label = f"{what} ".lstrip()
        exact, *others = (
            engine.run(dynamics, folder / f"D2-{what}{skin:g}{engine.suffix}")
            for skin, engine in zip(SKINS, engines, strict=True)
        )
        slowest = float(np.linalg.norm(exact.positions[-1] - exact.positions[0], axis=-1).min(initial=np.inf))
        for skin, run in zip(SKINS[1:], others, strict=True):
            apart = _apart(run, exact)
            worst.see(float(apart.max()), f"{label}with a skin of {skin:g} Å, against none")
            curves.append(_growth(f"{label}{skin:g} Å", run, apart))
    verdict: Verdict | None = None
    if slowest < max(SKINS) / 2 and worst.figure <= TOLERANCES["D2"][engines[0].dtype]:
        verdict, worst.detail = "inconclusive", f"an atom moved by {slowest:.2g} Å only: drift further"
    plot = Plot("Against skin 0", "time, fs", "largest difference, Å, Å/fs or eV/atom", curves, "log")
    return _judged("D2", engines[0].dtype, worst, {"way of the slowest atom, Å": slowest}, [plot], verdict)


def check_restart(make: Make, start: Dynamics, folder: Path, options: Options) -> CheckResult:
    """D3: stopped half-way and taken up by a new instance from positions and velocities, as if never stopped.

    Not to the last bit where the new instance searches its neighbours at another moment: sums then have another order.
    """
    engine, stopped, resumed = (make(f"D3-{name}", 0.5) for name in ("whole", "stopped", "resumed"))
    half = replace(start, steps=options.steps, every=max(1, options.steps // 25))
    half = replace(half, steps=half.steps // half.every * half.every)
    whole = engine.run(replace(half, steps=2 * half.steps), folder / f"D3-whole{engine.suffix}")
    first = stopped.run(half, folder / f"D3-stopped{engine.suffix}")
    middle = replace(start.structure, positions=first.positions[-1])
    second = resumed.run(
        replace(half, structure=middle, velocities=first.velocities[-1]), folder / f"D3-resumed{engine.suffix}"
    )
    same = slice(half.samples - 1, None)
    rest = Trajectory(
        whole.times[same],
        whole.potential[same],
        whole.kinetic[same],
        whole.positions[same],
        whole.velocities[same],
    )
    apart = _apart(second, rest)
    worst = Worst(detail="to the last bit")
    worst.see(float(apart.max()), f"within {half.steps} steps after the stop")
    plot = Plot(
        "Resumed against never stopped",
        "time since the stop, fs",
        "largest difference, Å, Å/fs or eV/atom",
        [_growth("", second, apart)],
        "log",
    )
    return _judged("D3", engine.dtype, worst, {"bitwise": float(worst.figure == 0)}, [plot])


def check_repetition(
    make: Make, start: Dynamics, folder: Path, options: Options, *, on_cpu: bool = True
) -> CheckResult:
    """D4: one structure after others, in another instance, in two threads at once, and a run made twice: to the bit.

    On a GPU sums have no fixed order: there, to S1's tolerance.
    """
    engine, other = make("D4-one", 0.5), make("D4-two", 0.5)
    structures = [start.structure, replace(start.structure, positions=1.2 * start.structure.positions)]
    found, expected, worst = [], [], Worst(detail="to the last bit")
    for structure in structures:
        found.append(engine.evaluate(structure))
        expected.append(copy.deepcopy(found[-1]))

    def repeated(where: str, one: Engine, rounds: int = 1) -> None:
        for _ in range(rounds):
            for structure, right in zip(structures, expected, strict=True):
                worst.see(_difference(one.evaluate(structure), right, one.offers), where)

    repeated("the same structures again", engine)
    for one, right in zip(found, expected, strict=True):
        worst.see(_difference(one, right, engine.offers), "a result that a later evaluation overwrote")
    repeated("another instance", other)
    if options.rounds:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda one: repeated("two threads at once", one, options.rounds), (engine, other)))
    short = replace(start, steps=min(options.steps, 50), every=1)
    once, again = (one.run(short, folder / f"D4-{n}{one.suffix}") for n, one in enumerate((engine, other)))
    worst.see(float(_apart(again, once).max()), "the same run again, in another instance")
    tolerance = TOLERANCES["D4"][engine.dtype] if on_cpu else result.TOLERANCES["S1"][engine.dtype]
    return _judged("D4", engine.dtype, worst, tolerance=tolerance)


def check_memory(make: Make, start: Dynamics, options: Options) -> CheckResult:
    """D5: this process holds no more after thousands of evaluations than after the first hundreds.

    The figure is the growth of the resident memory from the first to the last quarter of the readings, each taken
    after free memory was given back. Atoms move enough for new neighbour lists, and sizes alternate.
    """
    engine, rng = make("D5", 0.5), np.random.default_rng(0)
    atoms = len(start.structure)
    fewer = replace(
        start.structure,
        numbers=start.structure.numbers[: max(1, atoms // 2)],
        positions=start.structure.positions[: max(1, atoms // 2)],
    )
    process, calls, held = needed("psutil").Process(), [], []
    apart = max(1, (options.evaluations - options.warm_up) // 16)
    for call in range(options.evaluations):
        structure = fewer if call % 10 == 9 else start.structure
        moved = structure.positions + rng.uniform(-0.05, 0.05, (len(structure), 3)) + call % 7
        engine.evaluate(replace(structure, positions=moved))
        if call >= options.warm_up and call % apart == 0:
            _give_back()
            calls.append(call)
            held.append(process.memory_info().rss / 2**20)
    quarter = max(1, len(held) // 4)
    growth = float(np.median(held[-quarter:]) - np.median(held[:quarter]))
    worst = Worst(figure=max(growth, 0.0), detail=f"MiB in {options.evaluations - options.warm_up} evaluations")
    plot = Plot("Memory", "evaluations", "resident, MiB", [Curve("", calls, held)])
    return _judged("D5", engine.dtype, worst, {"resident, MiB": held[-1]}, [plot])


def _give_back() -> None:
    """Hand free memory back to the system: else a leak fits unseen into what earlier work has freed."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None  # glibc alone has it
    if trim is not None:
        trim(0)


def _apart(found: Trajectory, expected: Trajectory) -> FloatArray:
    """(T,) largest difference of positions (Å), velocities (Å/fs) and energies (eV per atom)."""
    atoms = max(expected.positions.shape[1], 1)
    differences = [
        np.abs(found.positions - expected.positions).max(axis=(1, 2), initial=0.0),
        np.abs(found.velocities - expected.velocities).max(axis=(1, 2), initial=0.0),
        np.abs(found.potential - expected.potential) / atoms,
        np.abs(found.kinetic - expected.kinetic) / atoms,
    ]
    largest: FloatArray = np.max(differences, axis=0)
    return largest


def _difference(found: Result, expected: Result, offers: Collection[str]) -> float:
    """Largest of the plain differences of what the engine offers."""
    return max(
        float(np.max(np.abs(getattr(found, name) - getattr(expected, name)), initial=0.0))
        for name in ("energy", "energies", "forces", "virial")
        if name in offers
    )


def _growth(label: str, run: Trajectory, apart: FloatArray) -> Curve:
    shown = apart > 0
    return Curve(label, run.times[shown].tolist(), apart[shown].tolist())


def _judged(
    code: str,
    dtype: Dtype,
    worst: Worst,
    figures: dict[str, float] | None = None,
    plots: Sequence[Plot] = (),
    verdict: Verdict | None = None,
    tolerance: float | None = None,
) -> CheckResult:
    allowed = TOLERANCES[code][dtype] if tolerance is None else tolerance
    found: Verdict = verdict or ("pass" if worst.figure <= allowed else "fail")
    return CheckResult(code, NAMES[code], found, worst.figure, allowed, worst.detail, figures or {}, plots)
