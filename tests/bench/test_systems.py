"""What is timed is what it says: aspirin, and water of the right density and any size."""

from __future__ import annotations

import numpy as np
import pytest

from mlff_engines.bench.systems import FULL, QUICK, TEMPERATURE, named
from mlff_engines.errors import ConfigError
from mlff_engines.neighbors import neighbor_list
from mlff_engines.structure import MASSES
from mlff_engines.units import ATOMIC_MASS, BOLTZMANN
from mlff_engines.validation.engine import kinetic_energy


def test_aspirin_is_a_molecule() -> None:
    aspirin = named("aspirin").structure
    numbers, counts = np.unique(aspirin.numbers, return_counts=True)
    assert dict(zip(numbers.tolist(), counts.tolist(), strict=True)) == {1: 8, 6: 9, 8: 4}
    assert not aspirin.pbc.any()
    index, vectors = neighbor_list(aspirin.positions, aspirin.cell, aspirin.pbc, 1.65)
    assert np.linalg.norm(vectors, axis=1).min() > 0.9
    hydrogens = aspirin.numbers == 1
    assert (np.bincount(index[0], minlength=21)[hydrogens] == 1).all()
    assert index.shape[1] == 2 * 21  # 21 bonds, one ring


@pytest.mark.parametrize("name", ["water-192", "water-999", "water-78"])
def test_water_has_the_density_of_the_liquid(name: str) -> None:
    water = named(name).structure
    atoms = int(name.split("-")[1])
    assert len(water) == atoms
    assert water.numbers.tolist() == [8, 1, 1] * (atoms // 3)
    assert water.pbc.all()
    assert water.volume is not None
    grams = np.array(MASSES)[water.numbers].sum() * ATOMIC_MASS * 1e3
    assert grams / (water.volume * 1e-24) == pytest.approx(0.997, abs=1e-6)
    molecules = water.positions.reshape(-1, 3, 3)
    bonds = np.linalg.norm(molecules[:, 1:] - molecules[:, :1], axis=-1)
    np.testing.assert_allclose(bonds, 0.9572, atol=1e-3)  # the shrunken grid leaves molecules as they are
    oxygen = molecules[:, 0]
    _, vectors = neighbor_list(oxygen, water.cell, water.pbc, 3.2)
    assert np.linalg.norm(vectors, axis=1).min() > 3.0


def test_gaps_are_spread_evenly() -> None:
    """Neighbours of the 333 molecules on a grid for 343: nobody sits at a hole of many."""
    water = named("water-999").structure
    index, _ = neighbor_list(water.positions[::3], water.cell, water.pbc, 3.5)
    assert np.bincount(index[0]).min() >= 4


def test_motion_is_thermal_and_reproducible() -> None:
    start, again = named("water-192").dynamics, named("water-192").dynamics
    np.testing.assert_array_equal(start.velocities, again.velocities)
    free = 3 * 192 - 3
    assert kinetic_energy(start.velocities, start.masses) == pytest.approx(0.5 * free * BOLTZMANN * TEMPERATURE)


def test_standard_systems_exist() -> None:
    assert {name: len(named(name).structure) for name in {*QUICK, *FULL}} == {
        "aspirin": 21,
        "water-192": 192,
        "water-999": 999,
        "water-1536": 1536,
        "water-12288": 12288,
    }


@pytest.mark.parametrize("name", ["water", "water-0", "water-10", "benzene"])
def test_unknown_system(name: str) -> None:
    with pytest.raises(ConfigError, match="allowed: aspirin, or water-N"):
        named(name)
