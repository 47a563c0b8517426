"""The first trial must be able to fail: wrong forces and broken bonds are seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT
from ase.io import read

from mlff_training.trial import BROKEN, TrialConfig, dt2_law, nve, thermal

LAW = TrialConfig(timestep=4.0, law_ps=0.2, nve_temperature=300.0)


class NotConservative(EMT):
    """EMT whose forces are 1 % off in a direction that no energy explains."""

    def calculate(self, atoms: Atoms | None = None, properties: object = None, system_changes: object = None) -> None:
        super().calculate(atoms, properties, all_changes)
        forces = self.results["forces"]
        self.results["forces"] = forces + 0.01 * np.roll(forces, 1, axis=1)


@pytest.fixture
def cluster() -> Atoms:
    corners = 2.5 * np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0.2]])
    return Atoms("Cu5", corners)


def test_dt2_law_of_a_sound_model(cluster: Atoms) -> None:
    assert dt2_law(cluster, EMT, LAW) == pytest.approx([4, 4], abs=0.5)


def test_dt2_law_catches_forces_that_are_no_gradient(cluster: Atoms) -> None:
    assert min(dt2_law(cluster, NotConservative, LAW)) < 3.0


def test_nve_conserves_and_keeps_its_frames(cluster: Atoms, tmp_path: Path) -> None:
    moving = thermal(cluster, 300.0, seed=1)
    assert np.abs(moving.get_momenta().sum(axis=0)).max() < 1e-12
    moving.calc = EMT()
    times, energies, change = nve(moving, 0.2, 2.0, tmp_path / "nve.traj")
    assert np.ptp(energies) < 0.02
    assert change > 0
    assert len(read(tmp_path / "nve.traj", ":")) == len(times) == len(energies)


def test_a_broken_bond_is_seen(tmp_path: Path) -> None:
    class Free(Calculator):
        implemented_properties = ("energy", "forces")

        def calculate(self, atoms: Atoms, properties: object, changes: object) -> None:
            self.results = {"energy": 0.0, "forces": np.zeros((len(atoms), 3))}

    water = thermal(molecule("H2O"), 300.0, seed=2)
    water.calc = Free()
    change = nve(water, 0.1, 1.0, tmp_path / "nve.traj")[2]
    assert change > BROKEN
