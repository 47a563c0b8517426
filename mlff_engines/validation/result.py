"""What a check is asked, what it answers, and how exact the answer has to be."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from mlff_engines.manifest import Dtype, Manifest
from mlff_engines.structure import NUMBERS, FloatArray, Result, Structure

Evaluate = Callable[[Structure], Result]  # any engine
EVERYTHING = frozenset({"energy", "energies", "forces", "virial", "spread"})  # of an ensemble, the last

Verdict = Literal["pass", "fail", "inconclusive"]

STATIC = {
    "S1": "equal to the eager model",
    "S2": "equal to the eager model call after call",
    "S3": "forces are the gradient of the energy",
    "S4": "virial and stress are its strain derivatives",
    "S5": "rotation, inversion, permutation, translation",
    "S6": "the same crystal described otherwise",
    "S7": "continuous at the cutoff, zero beyond",
    "S8": "neighbours",
    "S9": "isolated atoms have E0, far fragments add up",
    "S10": "order and subset of the elements",
}
LIFECYCLE = {
    "D1": "the same on every number of processes",
    "D2": "the same with every skin",
    "D3": "goes on from a checkpoint as if never stopped",
    "D4": "the same again, from another instance, on other threads",
    "D5": "memory stays flat",
    "D6": "end points of mixed systems",
}
DYNAMICS = {
    "M1": "energy fluctuates as the square of the time step",
    "M2": "reversible in time",
    "M3": "the same trajectory as the eager model",
    "M4": "total energy does not drift",
    "M5": "the same ensemble as the eager model",
    "M6": "kinetic energies are those of the temperature",
    "M7": "stays stable",
}
NAMES = STATIC | LIFECYCLE | DYNAMICS

# energies and virials in eV per atom, forces in eV/Å; above 1 relative to the largest force or virial
TOLERANCES: dict[str, dict[Dtype, float]] = {
    "S1": {"float64": 1e-10, "float32": 5e-5},
    "S2": {"float64": 1e-12, "float32": 5e-5},
    "S3": {"float64": 10.0, "float32": 10.0},  # in units of the finite difference's own uncertainty
    "S4": {"float64": 1e-6, "float32": 1e-3},  # relative to the largest component
    "S5": {"float64": 1e-8, "float32": 1e-4},
    "S6": {"float64": 1e-10, "float32": 1e-5},
    "S7": {"float64": 1e-10, "float32": 1e-5},
    "S8": {"float64": 0.0, "float32": 0.0},  # wrong edges
    "S9": {"float64": 1e-10, "float32": 1e-4},
    "S10": {"float64": 1e-10, "float32": 5e-5},
}
ROUNDING = 4 * float(np.finfo(float).eps)


@dataclass(frozen=True)
class Claims:
    """What a model says of itself, for the checks to hold it to.

    Attributes:
        elements: symbols.
        cutoff: Å.
        e0: eV, energy of the isolated atom per symbol.
        layers: message-passing steps; atoms further apart than layers x cutoff never feel each other.
        dtype: precision of the network.
        charges, spins: total charges (e) and numbers of unpaired electrons to try; the first are those of every
            structure, and 0 unless the model is for one other value only.
        spacing: Å, a typical distance of neighbouring atoms.
        offers: which of `EVERYTHING` the engine gives; the rest is not compared.
    """

    elements: Sequence[str]
    cutoff: float
    e0: Mapping[str, float]
    layers: int = 1
    dtype: Dtype = "float64"
    charges: Sequence[float] = (0.0,)
    spins: Sequence[float] = (0.0,)
    spacing: float = 1.7
    offers: Collection[str] = EVERYTHING

    @classmethod
    def of(cls, manifest: Manifest) -> Claims:
        """The claims of an artifact."""
        domain = manifest.domain
        return cls(
            domain.elements,
            manifest.cutoff,
            manifest.e0,
            manifest.layers,
            manifest.dtype,
            _to_try(manifest.takes_charge, domain.charges),
            _to_try(manifest.takes_spin, domain.spins),
            1.2 * max(domain.min_distances.values(), default=1.4),
        )

    @property
    def numbers(self) -> list[int]:
        """Atomic numbers of `elements`."""
        return [NUMBERS[symbol] for symbol in self.elements]


@dataclass(frozen=True)
class Curve:
    """One curve of a plot; `error` is the half width of its band. A violin has its samples in `y`, all at one `x`."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] | None = None
    style: Literal["line", "points", "steps", "violin"] = "line"


@dataclass(frozen=True)
class Plot:
    """What a person should look at beside a figure. `x` and `y` name the axes with their units."""

    title: str
    x: str
    y: str
    curves: Sequence[Curve]
    scale: Literal["linear", "log", "log-log"] = "linear"


@dataclass(frozen=True)
class CheckResult:
    """Outcome of one check.

    Attributes:
        code, name: see `NAMES`.
        verdict: "inconclusive" when the data could not have shown a fault; never a pass.
        figure: passes when <= `tolerance`; not a number never does.
        tolerance: in the units of the figure.
        detail: where the figure comes from.
        figures: other numbers worth keeping, by name with unit.
        plots: what to look at.
    """

    code: str
    name: str
    verdict: Verdict
    figure: float
    tolerance: float
    detail: str
    figures: Mapping[str, float] = field(default_factory=dict)
    plots: Sequence[Plot] = ()

    @property
    def passed(self) -> bool:
        """Whether the verdict is "pass"."""
        return self.verdict == "pass"


@dataclass
class Worst:
    """The largest deviation seen so far, and where; of the quantities that the engine offers."""

    offers: Collection[str] = EVERYTHING
    figure: float = 0.0
    detail: str = field(default="")

    def see(self, figure: float, detail: str) -> None:
        """Keep `figure` if it is the largest; one that is not a number is."""
        if not figure <= self.figure and not np.isnan(self.figure):
            self.figure, self.detail = figure, detail

    def compare(self, where: str, found: Result, expected: Result) -> None:
        """Keep the largest deviation of `found` from `expected` if it is the largest so far."""
        for quantity, figure in deviation(found, expected, self.offers).items():
            self.see(figure, f"{quantity} of {where}")

    def judged(self, code: str, dtype: Dtype) -> CheckResult:
        """Against the tolerance of check `code`."""
        tolerance = TOLERANCES[code][dtype]
        return CheckResult(
            code, NAMES[code], "pass" if self.figure <= tolerance else "fail", self.figure, tolerance, self.detail
        )


def deviation(found: Result, expected: Result, offers: Collection[str] = EVERYTHING) -> dict[str, float]:
    """Largest differences by quantity among those the engine offers, in the units of `TOLERANCES`.

    Energies may differ by their rounding in float64 besides: E0s of 1e5 eV leave no more digits.
    """
    atoms = max(len(expected.energies), 1)
    scale = max(1.0, _largest(expected.forces), _largest(expected.virial) / atoms)
    energy = abs(found.energy - expected.energy) - ROUNDING * abs(expected.energy)
    energies = _largest(found.energies - expected.energies) - ROUNDING * _largest(expected.energies)
    differences = {
        "energy": np.maximum(energy, 0.0) / atoms,
        "energies": np.maximum(energies, 0.0),
        "forces": _largest(found.forces - expected.forces),
        "virial": _largest(found.virial - expected.virial) / atoms,
    }
    differences = {name: value for name, value in differences.items() if name in offers}
    if "spread" in offers and expected.energy_std is not None and expected.force_std is not None:
        given = found.energy_std is not None and found.force_std is not None
        differences["energy_std"] = abs(found.energy_std - expected.energy_std) / atoms if given else np.nan  # type: ignore[operator]
        differences["force_std"] = _largest(found.force_std - expected.force_std) if given else np.nan  # type: ignore[operator]
    return {name: float(value / scale) for name, value in differences.items()}


def _to_try(taken: bool, trained: Sequence[float]) -> list[float]:
    return [0.0, *([q for q in trained if q] or [1.0])] if taken else list(trained[:1])


def _largest(values: FloatArray) -> float:
    return float(np.abs(values).max(initial=0.0))
