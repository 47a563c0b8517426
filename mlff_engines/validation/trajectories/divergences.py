"""How much two histograms (B,) of counts differ."""

from __future__ import annotations

import numpy as np

from mlff_engines.structure import FloatArray


def jensen_shannon(p: FloatArray, q: FloatArray) -> float:
    """Divergence of two histograms, nat: 0 to ln 2 (Lin, IEEE Trans. Inf. Theory 37, 145 (1991))."""
    p, q = p / p.sum(), q / q.sum()
    middle = 0.5 * (p + q)
    return 0.5 * (_relative_entropy(p, middle) + _relative_entropy(q, middle))


def kullback_leibler(p: FloatArray, q: FloatArray) -> float:
    """Of `p` from `q`, histograms of counts, nat; half a count in every bin that either has seen, or it is infinite."""
    seen = (p + q) > 0
    p, q = p[seen] + 0.5, q[seen] + 0.5
    return _relative_entropy(p / p.sum(), q / q.sum())


def absolute_difference(p: FloatArray, q: FloatArray) -> float:
    """∫|Δp| / ∫p."""
    return float(np.abs(p / p.sum() - q / q.sum()).sum())


def _relative_entropy(p: FloatArray, q: FloatArray) -> float:
    where = p > 0
    return float((p[where] * np.log(p[where] / q[where])).sum())
