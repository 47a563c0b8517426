"""Models for `pair_style mliap` with a fault each, which LAMMPS unpickles by name."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlff_lammps.mliap import MLIAP


class Raises(MLIAP):
    """The bug: an exception at the third step, on the second rank only."""

    calls = 0

    def _compute(self, data: Any) -> None:
        assert self.host is not None
        self.calls += 1
        if self.calls == 3 and self.host.rank == 1:
            raise RuntimeError("injected")
        super()._compute(data)


class Dropping:
    """A coupling, with the bug of some releases: forces of pairs around ghosts are not passed on."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __getattr__(self, name: str) -> Any:
        return getattr(self.data, name)

    def update_pair_forces(self, forces: Any) -> None:
        local = np.asarray(self.data.pair_i) < self.data.nlocal
        self.data.update_pair_forces(np.ascontiguousarray(forces * local[:, None]))


class Drops(MLIAP):
    """A right model under such a LAMMPS."""

    def compute_forces(self, data: Any) -> None:
        super().compute_forces(Dropping(data))
