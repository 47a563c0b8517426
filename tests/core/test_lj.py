"""Lennard-Jones against its formula, written out pair by pair."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from mlff_engines.checkpoint import Domain, load_checkpoint, save_checkpoint
from mlff_engines.errors import ConfigError
from mlff_engines.evaluator import Evaluator
from mlff_engines.export import export
from mlff_engines.models.lj import ARGON, LennardJonesConfig
from mlff_engines.models.registry import build_model, model_config
from mlff_engines.potential import Potential
from mlff_engines.structure import Structure

MIXED = LennardJonesConfig(sigma={"Ar": 3.4, "Ne": 2.8}, epsilon={"Ar": 0.0103, "Ne": 0.0031}, switch=5.0, cutoff=7.0)


def evaluate(config: LennardJonesConfig, e0: dict[str, float]) -> Evaluator:
    potential = Potential(build_model(config, list(e0), e0)).eval()
    return Evaluator(potential, Domain(elements=list(e0)), config.cutoff, dtype=torch.float64)


def dimer(numbers: list[int], r: float) -> Structure:
    return Structure(np.array(numbers), np.array([[0, 0, 0], [0, 0, r]]))


@pytest.mark.parametrize("r", [2.5, 3.1, 4.9, 5.5, 6.9, 7.0, 9.0])
@pytest.mark.parametrize("numbers", [[18, 18], [18, 10]])
def test_pair_energy_and_force(numbers: list[int], r: float) -> None:
    sigma, epsilon = (3.4, 0.0103) if numbers[1] == 18 else (3.1, math.sqrt(0.0103 * 0.0031))

    def energy(r: float) -> float:
        if r >= 7:
            return 0.0
        x = max(0.0, (r - 5) / 2)
        return 4 * epsilon * ((sigma / r) ** 12 - (sigma / r) ** 6) * (1 - 10 * x**3 + 15 * x**4 - 6 * x**5)

    found = evaluate(MIXED, {"Ar": -1.0, "Ne": 2.0})(dimer(numbers, r))
    e0 = sum({18: -1.0, 10: 2.0}[z] for z in numbers)
    assert found.energy == pytest.approx(e0 + energy(r), abs=1e-14)
    slope = (energy(r + 1e-5) - energy(r - 1e-5)) / 2e-5
    assert found.forces[1, 2] == pytest.approx(-slope, abs=1e-8)


def test_argon_has_its_minimum_where_it_belongs() -> None:
    engine, r = evaluate(ARGON, {"Ar": 0.0}), 2 ** (1 / 6) * 3.4
    found = engine(dimer([18, 18], r))
    assert found.energy == pytest.approx(-120 * 8.617333262e-5)
    assert np.abs(found.forces).max() < 1e-15
    # repelled when closer, drawn when further: the virial of two atoms is -r dE/dr
    assert engine(dimer([18, 18], 0.9 * r)).virial[2, 2] > 0
    assert engine(dimer([18, 18], 1.1 * r)).virial[2, 2] < 0


def test_argon_crystal() -> None:
    """Face-centred cubic at a = 5.26 Å: attraction counted by shells 12, 6, 24, 12, 24 at √k a/√2."""
    a = 5.26
    corners = a * np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    config = LennardJonesConfig(sigma={"Ar": 3.4}, epsilon={"Ar": 0.0103}, switch=8.4, cutoff=8.5)
    found = evaluate(config, {"Ar": 0.0})(Structure(np.full(4, 18), corners, a * np.eye(3), np.ones(3)))
    shells = {1: 12, 2: 6, 3: 24, 4: 12, 5: 24}
    radii = {k: math.sqrt(k / 2) * a for k in shells}
    assert radii[5] < 8.4 < math.sqrt(3) * a
    expected = sum(n * 2 * 0.0103 * ((3.4 / radii[k]) ** 12 - (3.4 / radii[k]) ** 6) for k, n in shells.items())
    assert found.energy / 4 == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_checkpoint_and_artifact(tmp_path: Any, dtype: Any) -> None:
    """An artifact like any other; float64 parameters keep their digits on disk."""
    model = build_model(ARGON, ["Ar"], {"Ar": 0.0}).eval()
    save_checkpoint(tmp_path / "argon", model, ARGON, Domain(elements=["Ar"]), {})
    loaded, _ = load_checkpoint(tmp_path / "argon")
    assert torch.equal(loaded.model.network.sigma, model.network.sigma)
    made = export([tmp_path / "argon"], tmp_path / "argon.pt", dtype=dtype)
    assert made.manifest.architecture == "lj"
    structure = dimer([18, 18], 3.9)
    found = made.evaluator(outside="ignore")(structure)
    expected = evaluate(ARGON, {"Ar": 0.0})(structure)
    np.testing.assert_allclose(found.forces, expected.forces, atol=1e-15 if dtype == "float64" else 1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epsilon": {"Kr": 0.01}}, "not one list"),
        ({"sigma": {"Xx": 1.0}, "epsilon": {"Xx": 1.0}}, "not one list"),
        ({"switch": 9.0}, "switch 9 Å must lie below cutoff 8.5 Å"),
        ({"charge": True}, "charge"),
    ],
)
def test_wrong_parameters_are_explained(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_config(ARGON.model_dump() | change)
