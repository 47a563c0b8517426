"""What was measured: one row for each subject on each system with each number of threads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from mlff_engines.config import Config
from mlff_engines.files import replacing


class Row(Config):
    """One subject on one system.

    A call is one evaluation of energy and forces, or one MD step. Steps are timed many at a time: percentiles are
    those of the means of such bursts.
    """

    system: str
    atoms: int
    threads: int
    what: str
    median_ms: float | None = Field(None, description="of a call, by the clock; none: see `reason`")
    p95_ms: float | None = Field(None, description="95th percentile")
    cpu_ms: float | None = Field(None, description="median processor time of a call, all threads together")
    calls: int = Field(0, description="timed")
    rss_mb: float | None = Field(None, description="peak of the resident memory, MB")
    base_mb: float | None = Field(None, description="resident memory before the system was prepared, MB")
    reason: str | None = Field(None, description="why there is no figure")


def row_of(samples: Sequence[dict[str, Any]], **of: Any) -> Row:
    """The row of all samples of a worker, see `mlff_engines.bench.worker`; `of` tells system, atoms, threads, what."""
    wall, cpu = (np.concatenate([sample[clock] for sample in samples]) for clock in ("wall", "cpu"))
    return Row(
        **of,
        median_ms=float(np.median(wall)),
        p95_ms=float(np.percentile(wall, 95)),
        cpu_ms=float(np.median(cpu)),
        calls=len(wall),
        rss_mb=samples[-1]["rss_mb"],
        base_mb=samples[-1]["base_mb"],
    )


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """A JSON list, one row a line."""
    lines = ",\n".join(json.dumps(row.model_dump()) for row in rows)
    with replacing(path) as temporary:
        temporary.write_text(f"[\n{lines}\n]\n" if lines else "[]\n")


def read_rows(path: Path) -> list[Row]:
    """The rows of a file that `write_rows` made; none where there is no file."""
    return [Row.model_validate(row) for row in json.loads(path.read_text())] if path.is_file() else []
