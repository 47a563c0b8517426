"""Distributions of internal coordinates: a run's against those of the reference, with chance told by the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mlff_engines.structure import FloatArray, IntArray
from mlff_engines.validation.dynamics.statistics import autocorrelation_time, block_count
from mlff_engines.validation.result import Curve, Plot
from mlff_engines.validation.trajectories.divergences import kullback_leibler
from mlff_engines.validation.trajectories.observables import Frames, Topology, internal_coordinates

BINS = {2: (0.01, None), 3: (2.0, None), 4: (10.0, (-180.0, 180.0))}  # Å or degrees, by the width of the members
PAIR_BIN, PAIR_MAX = 0.2, 12.0  # Å
DIVISIONS = 300  # of the null
MEANINGS = {"K5": "length (Å) or angle (degrees)", "K6": "dihedral (degrees)", "K7": "distance (Å)"}

Measure = Callable[[FloatArray, FloatArray], float]  # of two histograms of counts


@dataclass(frozen=True)
class Replicas:
    """What a simulation gave: `times` (T,) ps, `positions` (R, T, N, 3) Å."""

    times: FloatArray
    positions: FloatArray

    @property
    def interval(self) -> float:
        """ps."""
        return float(self.times[1] - self.times[0]) if len(self.times) > 1 else 1.0


@dataclass(frozen=True)
class Kind:
    """Samples of one kind of coordinate, in blocks (B, n, M) that last equally long in a run and in the reference.

    Attributes:
        run: blocks of the run.
        reference: all samples of the reference, one block.
        pool: blocks of all runs of the reference.
        every: which of the pool's frames are as far apart as the run's.
        samples: independent ones of the run.
        edges: of the bins.
    """

    run: FloatArray
    reference: FloatArray
    pool: FloatArray
    every: int
    samples: float
    edges: FloatArray

    def counts(self, blocks: FloatArray) -> FloatArray:
        """Histogram (B, bins) of each block; what lies beyond counts in the last bins: a run may break in between."""
        low, high = self.edges[0], self.edges[-1]
        held = np.clip(np.nan_to_num(blocks, nan=high), low, high).reshape(len(blocks), -1)
        bins = len(self.edges) - 1  # all of one width
        at = np.minimum(((held - low) * (bins / (high - low))).astype(np.int64), bins - 1)
        at += bins * np.arange(len(blocks))[:, None]
        return np.bincount(at.ravel(), minlength=bins * len(blocks)).reshape(-1, bins).astype(float)

    def totals(self) -> tuple[FloatArray, FloatArray]:
        """Histograms of the run and of the reference."""
        return self.counts(self.run).sum(axis=0), self.counts(self.reference)[0]

    def chance(self, measure: Measure, rng: np.random.Generator) -> FloatArray:
        """`measure` of random divisions of the pool, (`DIVISIONS`,): as many blocks as the run has, and the others.

        Infinite where the pool has no more than the run.
        """
        pool, thin = self.counts(self.pool), self.counts(self.pool[:, :: self.every])
        size = len(self.run)
        if len(pool) <= size:
            return np.full(DIVISIONS, np.inf)
        taken = rng.permuted(np.tile(np.arange(len(pool)) < size, (DIVISIONS, 1)), axis=1).astype(float)
        divisions = zip(taken @ thin, (1 - taken) @ pool, strict=True)
        return np.array([measure(run, reference) for run, reference in divisions])


def kinds_of(
    numbers: IntArray, bonded: Topology, constraints: IntArray, runs: Sequence[Replicas]
) -> dict[str, dict[str, Kind]]:
    """By gate and kind, of a run, the reference and perhaps its second run."""
    found: dict[str, dict[str, Kind]] = {"K5": {}, "K6": {}, "K7": {}}
    fixed = {tuple(sorted(pair)) for pair in constraints.tolist()}
    free = np.array([bond for bond in bonded.bonds.tolist() if tuple(sorted(bond)) not in fixed], dtype=np.int64)
    heavy = np.flatnonzero(numbers != 1)
    pairs = np.array([(i, j) for n, i in enumerate(heavy) for j in heavy[n + 1 :]], dtype=np.int64)
    members = [("K5", free.reshape(-1, 2)), ("K5", bonded.angles), ("K6", bonded.dihedrals), ("K7", pairs)]
    for code, atoms in members:
        if not len(atoms):
            continue
        width, limits = (PAIR_BIN, (0.0, PAIR_MAX)) if code == "K7" else BINS[atoms.shape[1]]
        values = [internal(numbers, run.positions, atoms) for run in runs]
        for kind in values[0]:
            found[code][kind] = _kind([value[kind] for value in values], runs, width, limits)
    return found


def internal(numbers: IntArray, positions: FloatArray, members: IntArray) -> dict[str, FloatArray]:
    """`internal_coordinates` of all replicas (R, T, N, 3) Å: (R, T, number of that kind)."""
    frames = positions.reshape(-1, *positions.shape[2:])
    none, times = np.zeros(3, dtype=bool), np.arange(len(frames), dtype=float)
    found = internal_coordinates(Frames(numbers, frames, np.zeros((3, 3)), none, times), members)
    return {kind: values.reshape(*positions.shape[:2], -1) for kind, values in found.items()}


def _kind(
    values: Sequence[FloatArray], runs: Sequence[Replicas], width: float, limits: tuple[float, float] | None
) -> Kind:
    usual = values[1:]
    low, high = limits or (min(v.min() for v in usual) - width, max(v.max() for v in usual) + width)
    edges = np.linspace(low, high, max(round((high - low) / width), 1) + 1)
    every = max(1, round(runs[0].interval / runs[1].interval))
    # in frames of the run; the slower of the two says how long a block must be, for both
    taus = [_tau(values[0]), _tau(values[1]) / every]
    replicas, frames = values[0].shape[:2]
    shortest = min(frames, *(v.shape[1] // every for v in usual))
    size = max(1, shortest // max(block_count(shortest, max(taus)), 1))
    blocks = [_blocks(values[0], size), *(_blocks(v, size * every) for v in usual)]
    samples = replicas * frames / (2 * taus[0])
    return Kind(
        blocks[0], values[1].reshape(1, -1, values[1].shape[2]), np.concatenate(blocks[1:]), every, samples, edges
    )


def _tau(values: FloatArray) -> float:
    """Of the slowest member of a kind (R, T, M), in samples; as long as a replica where nothing moves."""
    taus = [autocorrelation_time(values[..., n]) for n in range(values.shape[2])]
    return min(max(taus), float(values.shape[1]))


def _blocks(values: FloatArray, size: int) -> FloatArray:
    """(R, T, M) as blocks (B, size, M)."""
    count = values.shape[1] // size
    return values[:, : size * count].reshape(len(values) * count, size, values.shape[2])


@dataclass(frozen=True)
class Divergences:
    """How much each kind differs, and how much two runs of the reference would: 95 % of chance lies below `usual`."""

    by_kind: dict[str, float]
    usual: float
    samples: float
    figures: dict[str, float]
    plots: list[Plot]

    @property
    def worst(self) -> str:
        """The kind that differs most."""
        return max(self.by_kind, key=lambda kind: self.by_kind[kind])


def compare(code: str, kinds: dict[str, Kind], measure: Measure, known: bool, shown: int = 2) -> Divergences:
    """All `kinds` of a gate.

    Args:
        known: there are two runs of the reference; else nothing tells chance.
        shown: how many of the kinds that differ most are plotted.
    """
    rng, null = np.random.default_rng(0), np.zeros(DIVISIONS)
    by_kind, figures, curves = {}, {}, {}
    for name, kind in kinds.items():
        run, reference = kind.totals()
        by_kind[name] = measure(run, reference)
        figures[f"{name}: Kullback-Leibler divergence (nat)"] = kullback_leibler(run, reference)
        middles = 0.5 * (kind.edges[1:] + kind.edges[:-1])
        seen = np.flatnonzero(run + reference)
        part = slice(max(seen[0] - 1, 0), seen[-1] + 2)
        curves[name] = [
            Curve(label, middles[part].tolist(), (counts / counts.sum())[part].tolist(), style="steps")
            for label, counts in (("variant", run), ("reference", reference))
        ]
        if known:
            null = np.maximum(null, kind.chance(measure, rng))
    usual = float(np.percentile(null, 95)) if known else np.inf
    figures |= {f"{kind}: figure": value for kind, value in by_kind.items()} | {"95 % of chance lies below": usual}
    most = sorted(by_kind, key=lambda kind: -by_kind[kind])[:shown]
    plots = [Plot(name, MEANINGS[code], "probability per bin", curves[name]) for name in most]
    return Divergences(by_kind, usual, min(kind.samples for kind in kinds.values()), figures, plots)
