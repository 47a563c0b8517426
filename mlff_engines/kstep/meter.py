"""Counting what the true potential is asked, at its boundary, by whomever."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class Meter:
    """Evaluations of one potential, by purpose.

    >>> with meter.purpose("check"):
    ...     field(x)

    Attributes:
        by_purpose: evaluations under each name; what is not in a `purpose` block counts as "dynamics".
    """

    def __init__(self) -> None:
        self.by_purpose: Counter[str] = Counter()
        self._purpose = "dynamics"

    @property
    def calls(self) -> int:
        """All evaluations."""
        return sum(self.by_purpose.values())

    def count(self) -> None:
        """One more."""
        self.by_purpose[self._purpose] += 1

    @contextmanager
    def purpose(self, name: str) -> Iterator[None]:
        """Evaluations inside count under `name`."""
        before, self._purpose = self._purpose, name
        try:
            yield
        finally:
            self._purpose = before
