"""Every error a user can meet, in one hierarchy.

MLFFError                      anything this library refuses or cannot do; the CLIs print it and exit 1
├── ConfigError                a configuration, option or argument is wrong
├── ArtifactError              an artifact or checkpoint is missing, damaged, foreign or not what it claims
├── StructureError             a structure cannot be evaluated: elements, cell, positions, charge, spin
├── DataError                  a data set is incomplete, inconsistent or in doubtful units
├── TeacherError               a teacher is missing, failed or answered nonsense
├── TrainingError              training diverged, or its saved state cannot be used
├── MissingEngineError         an engine is not installed or not built
└── SimulationError            molecular dynamics left the region in which a result means anything

Each message says what was got, what is allowed and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MLFFError(Exception):
    """Base of all errors raised on purpose by mlff-engines; `exit_code` is what the command lines exit with."""

    exit_code = 1


class ConfigError(MLFFError):
    """A configuration, option or argument is wrong."""


class ArtifactError(MLFFError):
    """An artifact or checkpoint is missing, damaged, foreign or not what it claims."""


class StructureError(MLFFError):
    """A structure cannot be evaluated."""


class DataError(MLFFError):
    """A data set is incomplete, inconsistent or in doubtful units."""


class TeacherError(MLFFError):
    """A teacher is missing, failed or answered nonsense."""


class TrainingError(MLFFError):
    """Training diverged, or its saved state cannot be used."""


class MissingEngineError(MLFFError):
    """An engine is not installed or not built."""


class SimulationError(MLFFError):
    """Molecular dynamics left the region in which a result means anything."""


class ExtrapolationWarning(UserWarning):
    """A structure lies outside what the model was trained on."""


class KernelWarning(UserWarning):
    """The fused kernels cannot be built here; models run in plain torch."""


def suggest(got: str, allowed: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest of `allowed`, else ``"; allowed: ..."``."""
    names = sorted(allowed)
    near = difflib.get_close_matches(got, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; allowed: {', '.join(names)}"
