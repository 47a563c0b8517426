"""How well a mean over correlated samples is known, and when two such means are the same, are not, or cannot be told.

Series are arrays (R, T, ...): R independent replicas of one process, T samples each. τ is the integrated
autocorrelation time in samples, 1/2 for independent ones; n samples are worth n/(2τ).

| verdict      | of a difference d with standard error s                                                         |
|--------------|-------------------------------------------------------------------------------------------------|
| fail         | \\|d\\| exceeds what integrators may differ by, by more than `critical` standard errors           |
| pass         | no fail, and \\|d\\| + 2s lies within the margin: a difference that matters would have been seen  |
| inconclusive | neither                                                                                         |

So a right model fails no more often than `critical` says, whatever the amount of data, and one that is off by the
margin passes in 2 % of the cases at most, whatever the amount of data: with too little there is no pass.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlff_engines.structure import BoolArray, FloatArray
from mlff_engines.validation.result import Verdict
from mlff_engines.validation.trajectories.observables import needed

SIGMA = 3.0  # a right model fails as rarely as a normal variable lies further out, in any test of one check
CONFIDENCE = 2.0  # standard errors that must fit between a difference and the margin
LEAST_REPLICAS, LEAST_BLOCKS, LEAST_SAMPLES = 4, 10, 50.0  # less never passes
WINDOW = 5.0  # autocorrelations are summed up to this many τ: A. Sokal, in Functional Integration (1997), Sec. 3
BLOCK = 10.0  # τ in a block at least: at 2τ the spread of blocks misses 40 % of the variance of the mean, here 10 %
MOST_BLOCKS = 20  # per replica: longer blocks instead of more
PERMUTATIONS = 20_000
FILLED = 0.9  # of the blocks of either model have counts in a bin that is compared
RMS_Z, MAE = 1.3, 2.0  # gates on distribution functions: root mean square z, and mean error in units of its floor
CHANCE = 0.05  # a rms z above its gate counts where it is less probable: few bins that differ exceed it by chance


def autocorrelation_time(series: FloatArray) -> float:
    """τ of a series (R, T) of replicas, about the mean of all: replicas that disagree have a long one.

    τ = 1/2 + Σ ρ(k) up to the first k >= `WINDOW` τ. Infinite for a constant, which has no sample of its spread.
    """
    length = series.shape[-1]
    x = (series - series.mean()).reshape(-1, length)
    power = np.abs(np.fft.rfft(x, 2 * length)) ** 2
    covariance = np.fft.irfft(power)[:, :length].mean(axis=0) / np.arange(length, 0, -1)
    if not covariance[0] > 1e-24 * np.square(series).max():
        return math.inf
    tau = 0.5 + np.concatenate([[0.0], np.cumsum(covariance[1:] / covariance[0])])
    enough = np.flatnonzero(np.arange(length) >= WINDOW * tau)
    return max(float(tau[enough[0] if len(enough) else -1]), 0.5)


def effective_samples(series: FloatArray) -> float:
    """Independent samples that all replicas of a series (R, T) are worth."""
    return series.size / (2 * autocorrelation_time(series))


def equilibrated(series: FloatArray, candidates: int = 20) -> int:
    """The first sample to keep of a series (R, T): it leaves the most effective samples.

    Chodera, J. Chem. Theory Comput. 12, 1799 (2016), with all replicas together. At most half is discarded; exactly
    half means that equilibrium may not have been reached.
    """
    starts = np.unique(np.linspace(0, series.shape[1] // 2, candidates + 1).astype(int))
    return int(max(starts, key=lambda start: effective_samples(series[:, start:])))


def block_count(length: int, tau: float) -> int:
    """Blocks of at least `BLOCK` τ in one replica of `length` samples; 0 if there is no room for one."""
    return int(min(MOST_BLOCKS, length / (BLOCK * tau)))


def block_means(series: FloatArray, blocks: int) -> FloatArray:
    """Means over `blocks` equal stretches of each replica, (R, blocks, ...); a rest at the front is left out."""
    replicas, length = series.shape[:2]
    size = length // blocks
    cut = series[:, length - size * blocks :]
    means: FloatArray = cut.reshape(replicas, blocks, size, *series.shape[2:]).mean(axis=2)
    return means


def critical(tests: int, freedom: float = math.inf) -> float:
    """The \\|t\\| that a right model exceeds in any of `tests` as rarely as a normal variable exceeds `SIGMA`.

    Bonferroni's bound, which holds however the tests depend on each other; Student's t of `freedom`.
    """
    level = math.erfc(SIGMA / math.sqrt(2)) / tests
    return float(needed("scipy.stats").t.isf(level / 2, freedom))


@dataclass(frozen=True)
class Difference:
    """A difference that should be zero.

    Attributes:
        name, unit: of what.
        value, error: the difference and its standard error.
        margin: the smallest that matters.
        bound: how much of it the integrators may cause.
        freedom: degrees of freedom of the error.
    """

    name: str
    unit: str
    value: float
    error: float
    margin: float
    bound: float = 0.0
    freedom: float = math.inf

    @property
    def significance(self) -> float:
        """Standard errors beyond `bound`."""
        excess = max(abs(self.value) - self.bound, 0.0)
        if self.error > 0:
            return excess / self.error
        return math.inf if excess else 0.0

    @property
    def resolved(self) -> float:
        """The smallest margin that it would pass with, in margins."""
        return (abs(self.value) + CONFIDENCE * self.error) / self.margin if self.margin > 0 else math.inf

    def verdict(self, tests: int) -> Verdict:
        """As one of `tests` of a check; see the table above."""
        if not self.significance <= critical(tests, self.freedom):
            return "fail"
        return "pass" if self.resolved <= 1 else "inconclusive"


def compare_means(
    found: FloatArray, expected: FloatArray, blocks: int, margin: float, *, name: str, unit: str, bound: float = 0.0
) -> Difference:
    """The difference of the means of two series (R, T), its error from the spread of their blocks.

    The spread of means over b samples misses τ/b of the variance of the mean; that is made good for.
    """
    parts = [block_means(series, blocks).ravel() for series in (found, expected)]
    taus = [autocorrelation_time(series) for series in (found, expected)]
    missed = [1 - tau * blocks / found.shape[1] for tau in taus]
    error = math.sqrt(sum(p.var(ddof=1) / len(p) / m for p, m in zip(parts, missed, strict=True)))
    value = float(found.mean() - expected.mean())
    return Difference(name, unit, value, error, margin, bound, sum(len(p) - 1 for p in parts))


@dataclass(frozen=True)
class Profiles:
    """How much two distribution functions differ, of one kind of pairs.

    Attributes:
        rms_z: root mean square over the bins of the difference in standard errors.
        error: mean absolute difference, relative to the mean of the function.
        floor: the same between two sets of replicas of one model, from the spread of the replicas.
        rms: root mean square difference over all bins, as published thresholds have it; not judged.
        errors: standard errors (B,) of the two functions, found and expected.
        bins: which of them count (B,).
    """

    rms_z: float
    error: float
    floor: float
    rms: float
    errors: tuple[FloatArray, FloatArray]
    bins: BoolArray


@dataclass(frozen=True)
class ProfileComparison:
    """All kinds of pairs at once.

    Attributes:
        kinds: by name.
        level: probability that a right model shows a larger rms z in any of them.
        correlated: blocks that one independent block is worth.
        blocks: independent blocks in the smaller set.
    """

    kinds: dict[str, Profiles]
    level: float
    correlated: float
    blocks: float

    @property
    def sigma(self) -> float:
        """Standard deviations of a normal variable as improbable as `level`."""
        return float(needed("scipy.stats").norm.isf(self.level / 2))

    def verdict(self, tests: int, resolution: float) -> Verdict:
        """As one of `tests`; passes when every floor lies below `resolution` and every gate holds."""
        if not self.sigma <= critical(tests):
            return "fail"
        return "pass" if max((share for share, _ in self.gates(resolution)), default=np.inf) <= 1 else "inconclusive"

    def gates(self, resolution: float) -> list[tuple[float, str]]:
        """What every gate has used of what is allowed, and in words."""
        used = []
        for kind, p in self.kinds.items():
            text = f"{kind} distribution function:"
            if self.level <= CHANCE:
                used.append((p.rms_z / RMS_Z, f"{text} rms z {p.rms_z:.3g}; {RMS_Z} is allowed"))
            used.append(
                (p.error / (MAE * p.floor), f"{text} mean error {p.error:.2%}; {MAE:g} x {p.floor:.2%} is allowed")
            )
            used.append((p.floor / resolution, f"{text} known to {p.floor:.2%}; {resolution:.2%} is needed"))
        return used


def compare_profiles(
    found: dict[str, FloatArray], expected: dict[str, FloatArray], bounds: dict[str, FloatArray], missed: float
) -> ProfileComparison:
    """Distribution functions of two models, each (R, blocks, B) by kind, means over the blocks of the replicas.

    z comes from the spread of the blocks within either model. Motions slower than a block show as replicas that differ
    more than their blocks allow, on the average over the bins: all variances grow by that factor. The probability of
    the largest rms z is that among random divisions of all blocks into two models, which needs no assumption on how
    bins depend on each other.

    Args:
        found, expected: at least two replicas each.
        bounds: (B,) by kind, what the integrators may cause.
        missed: share of the variance of a mean that the spread of blocks misses, see `compare_means`.
    """
    sets = (found, expected)
    used: dict[str, BoolArray] = {}
    for kind in found:
        filled = [np.mean(part[kind] > 0, axis=(0, 1)) for part in sets]
        bins = np.maximum(*filled) >= FILLED
        if bins.any():
            used[kind] = bins
    if not used:
        return ProfileComparison({}, 1.0, math.inf, 0.0)
    first, second = (math.prod(next(iter(part.values())).shape[:2]) for part in sets)
    disagreement = [_disagreement(part[kind][..., bins]) for part in sets for kind, bins in used.items()]
    correlated = max(1 / (1 - missed), float(np.mean(disagreement)))
    kinds, blocks, observed = {}, [], []
    for kind, bins in used.items():
        a, b = (part[kind][..., bins] for part in sets)
        flat = np.concatenate([part.reshape(-1, part.shape[-1]) for part in (a, b)])
        excess = np.maximum(np.abs(a.mean(axis=(0, 1)) - b.mean(axis=(0, 1))) - bounds[kind][bins], 0.0)
        z = excess / np.sqrt(correlated * _variance_of_difference(flat, first))
        mean = float(b.mean())
        spread = [
            np.sqrt(correlated * p[kind].var(axis=(0, 1), ddof=1) / n)
            for p, n in zip(sets, (first, second), strict=True)
        ]
        kinds[kind] = Profiles(
            rms_z=float(np.sqrt(np.mean(z**2))),
            error=float(excess.mean()) / mean,
            floor=float(np.mean([_replica_floor(part) for part in (a, b)])) / mean,
            rms=float(np.sqrt(np.mean(np.square(found[kind].mean(axis=(0, 1)) - expected[kind].mean(axis=(0, 1)))))),
            errors=(spread[0], spread[1]),
            bins=bins,
        )
        blocks.append(flat)
        observed.append(float(np.mean(z**2)))
    level = _permutation_level(blocks, first, np.array(observed))
    return ProfileComparison(kinds, level, correlated, min(first, second) / correlated)


def _variance_of_difference(blocks: FloatArray, first: int) -> FloatArray:
    """Of the means of the first blocks and of the rest, (B,), from the spread within either."""
    a, b = blocks[:first], blocks[first:]
    within = len(a) * a.var(axis=0) + len(b) * b.var(axis=0)
    variance: FloatArray = within / (len(blocks) - 2) * (1 / len(a) + 1 / len(b))
    return variance


def _disagreement(profiles: FloatArray) -> float:
    """Variance of the means of the replicas in units of what their blocks (R, n, B) allow; 1 for independent blocks."""
    within = profiles.var(axis=1, ddof=1).mean(axis=0)
    between = profiles.shape[1] * profiles.mean(axis=1).var(axis=0, ddof=1)
    return float(np.mean(between[within > 0] / within[within > 0]))


def _replica_floor(profiles: FloatArray) -> float:
    """Mean absolute difference to expect of the means of two such sets of replicas (R, n, B)."""
    means = profiles.mean(axis=1)
    pairs = [np.abs(a - b).mean() for a, b in itertools.combinations(means, 2)]
    return float(np.mean(pairs)) / math.sqrt(len(means))


def _permutation_level(blocks: Sequence[FloatArray], first: int, observed: FloatArray) -> float:
    """How often a random division of the blocks shows a larger mean square z in any kind, against its usual size.

    Args:
        blocks: (n, B) by kind, those of the first set before those of the second.
        first: number of blocks in the first set.
        observed: mean square z of each kind.
    """
    rng, total = np.random.default_rng(0), len(blocks[0])
    second = total - first
    rows = np.zeros((PERMUTATIONS, total))
    rows[:, :first] = 1.0
    rows = rng.permuted(rows, axis=1)
    squares = np.empty((len(blocks), PERMUTATIONS))
    for k, values in enumerate(blocks):
        x = values - values.mean(axis=0)
        scatter = np.square(x).sum(axis=0)
        for start in range(0, PERMUTATIONS, 1000):
            part = rows[start : start + 1000] @ x  # sums over the first set; those of the second are their negatives
            between = np.square(part) * (1 / first + 1 / second)
            squares[k, start : start + 1000] = np.mean(between * (total - 2) / (scatter - between), axis=1)
    usual, spread = squares.mean(axis=1), squares.std(axis=1)
    largest = ((squares - usual[:, None]) / spread[:, None]).max(axis=0)
    exceeding = np.count_nonzero(largest >= ((observed - usual) / spread).max())
    return (1 + exceeding) / (1 + PERMUTATIONS)
