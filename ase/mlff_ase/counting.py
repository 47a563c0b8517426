"""An ASE calculator with a meter at its boundary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes

from mlff_ase.structures import changes
from mlff_engines.kstep.meter import Meter


class CountedCalculator(Calculator):
    """`inner`, counting what it is really asked: by the dynamics, by loggers, by anybody.

    What is asked again at the same configuration is answered from memory and not counted.

    Attributes:
        meter: the count.
    """

    def __init__(self, inner: Calculator) -> None:
        super().__init__()
        self.inner = inner
        self.meter = Meter()
        self.atoms: Atoms | None = None
        self.implemented_properties = list(inner.implemented_properties)

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """Ask `inner`."""
        super().calculate(atoms, properties, system_changes)
        for name in properties:
            if self.inner.calculation_required(self.atoms, [name]):
                self.meter.count()
            self.inner.get_property(name, self.atoms)
        self.results = dict(self.inner.results)

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """See `mlff_ase.structures.changes`."""
        return changes(self.atoms, atoms)

    def remember(self) -> tuple[Atoms | None, dict[str, Any]]:
        """The last configuration and its results, for `recall`."""
        return self.atoms, self.results

    def recall(self, memory: tuple[Atoms | None, dict[str, Any]]) -> None:
        """Go back to what `remember` gave."""
        self.atoms, self.results = memory
