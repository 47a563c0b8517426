"""What one core of this machine can do: a matrix product, and triads a = b + s·c in the cache and in main memory.

A subject of the benchmark, see `mlff_engines.bench.worker`: it is timed in turn with the models, so that whatever slows
them slows it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mlff_engines.bench.worker import Work

SIDE = 384  # of the matrices: three of them are 1.8 MB
IN_CACHE = 1 << 14  # numbers in each of three arrays: 200 kB in all, in the L2 cache of every processor in use
IN_MEMORY = 1 << 25  # 400 MB in all, in no cache
REPEATS = {"product": 4, "triad-cache": 400, "triad-memory": 1}  # in one call, which is then some milliseconds
AMOUNT = {  # operations or bytes of one call
    "product": 2.0 * SIDE**3 * REPEATS["product"],
    "triad-cache": 3.0 * 4 * IN_CACHE * REPEATS["triad-cache"],
    "triad-memory": 3.0 * 4 * IN_MEMORY * REPEATS["triad-memory"],
}
WORDS = {
    "product": f"a product of matrices of {SIDE} by {SIDE}",
    "triad-cache": "a triad in the L2 cache",
    "triad-memory": "a triad in main memory",
}
UNITS = {"product": "Gflop/s", "triad-cache": "GB/s", "triad-memory": "GB/s"}


def open_subject(what: str, options: dict[str, Any]) -> tuple[Callable[[dict[str, Any]], Work], dict[str, Any]]:
    """`what` is a key of `AMOUNT`; the system does not matter."""
    torch.manual_seed(0)
    repeats = range(REPEATS[what])
    if what == "product":
        a, b, c = (torch.randn(SIDE, SIDE) for _ in range(3))

        def product() -> None:
            for _ in repeats:
                torch.mm(a, b, out=c)

        return lambda system: product, {"torch": str(torch.__version__)}
    size = IN_CACHE if what == "triad-cache" else IN_MEMORY
    out, first, second = (torch.ones(size) for _ in range(3))

    def triad() -> None:
        for _ in repeats:
            torch.add(first, second, alpha=0.5, out=out)

    return lambda system: triad, {"torch": str(torch.__version__)}
