"""Toy teachers that go wrong on purpose; tests make this folder importable for the teacher's process."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from ase.calculators.calculator import Calculator, all_changes


class Springs(Calculator):
    """E = k/2 Σ|r - r0|² + charge, r0 = the first structure seen; each call is a line in `log`.

    x of atom 0 above 100 Å triggers what `trouble` says.
    """

    implemented_properties = ("energy", "forces", "energies")

    def __init__(
        self,
        k: float = 1.0,
        log: str | None = None,
        seconds: float = 0.0,
        trouble: str = "",
        anchor: list[list[float]] | None = None,
    ) -> None:
        super().__init__()
        self.k, self.log, self.seconds, self.trouble = k, log, seconds, trouble
        self.anchor = 0.0 if anchor is None else np.array(anchor)
        print("built with much chatter")

    def calculate(self, atoms: Any = None, properties: Any = None, system_changes: list[str] = all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        print("chatter from Python", flush=True)
        os.write(1, b"chatter from C\n")
        if self.log is not None:
            with Path(self.log).open("a") as file:
                file.write(f"{os.getpid()} {self.atoms.positions[0, 0]:.3f}\n")
        time.sleep(self.seconds)
        shift = self.atoms.positions - self.anchor
        energies = 0.5 * self.k * (shift**2).sum(axis=1)
        self.results = {"energy": energies.sum(), "energies": energies, "forces": -self.k * shift}
        if self.atoms.positions[0, 0] > 100:
            self._make_trouble()

    def _make_trouble(self) -> None:
        if self.trouble == "exit":
            print("out of cheese", file=sys.stderr, flush=True)
            os._exit(3)
        if self.trouble == "hang":
            time.sleep(600)
        if self.trouble == "nan":
            self.results["forces"][0, 0] = np.nan
        if self.trouble == "raise":
            raise RuntimeError("SCF not converged")


class Lesser(Springs):
    """Has no forces."""

    implemented_properties = ("energy",)


class Committee(Springs):
    """Gives `energies` that are no partition of the energy."""

    def calculate(self, atoms: Any = None, properties: Any = None, system_changes: list[str] = all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        self.results["energies"] = np.full(len(self.atoms), self.results["energy"])


class Charged(Springs):
    """Answers with the charge and spin it finds in info."""

    def calculate(self, atoms: Any = None, properties: Any = None, system_changes: list[str] = all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        self.results["energy"] = 10 * self.atoms.info["q"] + self.atoms.info["s"]


def stiff(k: float) -> float:
    """A nested option."""
    return 10 * k
