"""M7: molecules that hold, molecules that break, and what a failure leaves behind."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import students
from mlff_engines.errors import ConfigError, SimulationError, StructureError
from mlff_engines.structure import FloatArray, Result, Structure
from mlff_engines.units import ACCELERATION
from mlff_engines.validation.core_engine import CoreEngine
from mlff_engines.validation.dynamics.stability import StabilityOptions, Watch, check_stability
from mlff_engines.validation.engine import Dynamics, Trajectory
from requirements import require_engine

WATER = Structure(np.array([8, 1, 1]), np.array([[0.0, 0, 0], [0.757, 0.586, 0], [-0.757, 0.586, 0]]))
OPTIONS = StabilityOptions(replicas=3, duration=0.4, stretch=0.1, interval=2.0, enough=1.0)


def start(structure: Structure = WATER, temperature: float | None = 300.0) -> Dynamics:
    still = np.zeros_like(structure.positions)
    return Dynamics(structure, still, timestep=1.0, steps=0, temperature=temperature, friction=5.0)


def springs(stiffness: float = 30.0) -> Callable[[Structure], Result]:
    """Harmonic O-H and H-H distances of water."""
    pairs = [(0, 1), (0, 2), (1, 2)]
    rest = [np.linalg.norm(WATER.positions[j] - WATER.positions[i]) for i, j in pairs]

    def evaluate(structure: Structure) -> Result:
        forces, energy = np.zeros((3, 3)), 0.0
        for (i, j), length in zip(pairs, rest, strict=True):
            vector = structure.positions[j] - structure.positions[i]
            distance = np.linalg.norm(vector)
            energy += 0.5 * stiffness * (distance - length) ** 2
            pull = stiffness * (distance - length) * vector / distance
            forces[i] += pull
            forces[j] -= pull
        return Result(float(energy), np.full(3, energy / 3), forces, np.zeros((3, 3)))

    return evaluate


def sample(positions: FloatArray, velocities: FloatArray | None = None) -> Trajectory:
    x = np.asarray(positions, dtype=float)[None]
    v = np.zeros_like(x) if velocities is None else velocities[None]
    return Trajectory(np.zeros(1), np.zeros(1), np.zeros(1), x, v)


def watch(structure: Structure = WATER, options: StabilityOptions = OPTIONS) -> Watch:
    return Watch(structure, start(structure).masses, 300.0, options)


def test_a_molecule_that_holds_passes(tmp_path: Path) -> None:
    engine = CoreEngine(springs())
    result = check_stability(engine, engine, start(), tmp_path, OPTIONS)
    assert result.passed, result
    assert result.figure == 0
    assert result.figures["time watched, ps"] == pytest.approx(1.2)
    assert result.figures["failures per ps, at most"] == pytest.approx(3.0 / 1.2, rel=0.01)
    assert list(result.plots[0].curves[0].y) == [1.0, 1.0]
    assert not list(tmp_path.glob("*.xyz"))
    briefly = check_stability(engine, engine, start(), tmp_path, replace(OPTIONS, enough=10.0))
    assert briefly.verdict == "inconclusive"


@pytest.mark.fault("M1")
def test_a_bond_that_breaks_is_captured(tmp_path: Path) -> None:
    """Springs too weak to hold hydrogen at this temperature."""
    require_engine("ase")
    ase_io = importlib.import_module("ase.io")
    engine, core = CoreEngine(springs(0.2)), CoreEngine(springs())
    result = check_stability(engine, core, start(), tmp_path, replace(OPTIONS, closeness=0.01))
    assert result.verdict == "fail"
    assert result.figure == 1.0
    assert "bond O0, H" in result.detail
    assert "-restart.xyz" in result.detail
    assert "eager model's differ by" in result.detail
    curve = result.plots[0].curves[0]
    assert curve.y[0] == 1.0
    assert curve.y[-1] == 0.0
    assert len(result.plots[0].curves) == 3

    frames = ase_io.read(tmp_path / "replica-0-failure.xyz", index=":")
    last = frames[-1]
    assert 2 <= len(frames) <= OPTIONS.before + 1
    lengths = [np.linalg.norm(last.positions[h] - last.positions[0]) for h in (1, 2)]
    assert max(abs(length - 0.957) for length in lengths) > 0.5
    culprits = np.flatnonzero(last.arrays["culprit"])
    assert culprits[0] == 0
    assert len(culprits) == 2
    assert "bond" in last.info["comment"]
    assert last.info["time"] == pytest.approx(1e3 * result.figures["replica 0 failed at, ps"])
    assert not any(frame.arrays["culprit"].any() for frame in frames[:-1])

    # the restart is far from the limits, whole to the last bit, and dynamics goes on from it
    restart = ase_io.read(tmp_path / "replica-0-restart.xyz")
    again = sample(restart.positions, restart.arrays["velocities"])
    assert max(float(level.max()) for level in watch().levels(again).values()) < 0.5
    stretch = int(restart.info["time"] // 100) * 100
    written = np.load(tmp_path / f"replica-0-{stretch}.npz")
    at = int((restart.info["time"] - stretch) / OPTIONS.interval)
    assert (written["positions"][at] == restart.positions).all()
    assert (written["velocities"][at] == restart.arrays["velocities"]).all()


def test_what_each_limit_catches() -> None:
    far = WATER.positions + np.array([[0, 0, 0], [0.6, 0, 0], [0, 0, 0]])
    assert watch().levels(sample(far))["bond"][0] >= 1
    assert watch().explain("bond", far, np.zeros((3, 3)))[1] == [0, 1]
    close = WATER.positions * np.array([[1.0], [1.0], [0.5]])
    levels = watch().levels(sample(close))
    assert levels["distance"][0] >= 1 > levels["bond"][0]
    assert watch().explain("distance", close, np.zeros((3, 3)))[1] in ([0, 2], [2, 0])
    fast = np.array([[0, 0, 0], [0, 1.1, 0], [0, 0, 0]])
    levels = watch().levels(sample(WATER.positions, fast))
    assert levels["speed"][0] >= 1
    assert levels["temperature"][0] >= 1
    assert watch().explain("speed", WATER.positions, fast)[1] == [1]
    reason, atoms = watch().explain("temperature", WATER.positions, fast)
    assert "K in a bath of 300 K" in reason
    assert atoms[0] == 1
    lost = np.full((3, 3), np.nan)
    assert not max(level.max() for level in watch().levels(sample(lost)).values()) < 1


def test_trained_distances_replace_covalent_radii() -> None:
    assert watch().levels(sample(WATER.positions))["distance"][0] < 0.5
    strict = watch(options=replace(OPTIONS, min_distances={"H-H": 2.2}))
    assert strict.levels(sample(WATER.positions))["distance"][0] >= 0.9


def test_bonds_across_the_boundary_keep_their_image() -> None:
    """An atom that leaves the box by one side stays bonded."""
    cell = 8.0 * np.eye(3)
    wrapped = replace(WATER, positions=WATER.positions % 8.0, cell=cell, pbc=np.ones(3, dtype=bool))
    across = watch(wrapped)
    assert across.lengths == pytest.approx([0.957, 0.957], abs=1e-3)
    moved = sample(wrapped.positions + np.array([20.0, 0, 0]))
    assert max(float(level.max()) for level in across.levels(moved).values()) < 0.1


def test_right_thermostats_do_not_spike() -> None:
    """Two thousand samples of the temperature of three atoms."""
    rng, masses = np.random.default_rng(0), start().masses
    spread = np.sqrt(8.617333e-5 * 300 / masses * ACCELERATION)
    velocities = spread[:, None] * rng.standard_normal((2_000, 3, 3))
    positions = np.broadcast_to(WATER.positions, velocities.shape)
    none = np.zeros(len(velocities))
    assert watch().levels(Trajectory(none, none, none, positions, velocities))["temperature"].max() < 0.8


@pytest.mark.fault("M1")
def test_an_engine_that_gives_up_is_captured(tmp_path: Path) -> None:
    """Refused from a certain step on: it is approached in ever shorter stretches."""
    right = springs()

    def evaluate(structure: Structure) -> Result:
        evaluate.calls += 1  # type: ignore[attr-defined]
        if evaluate.calls > 250:  # type: ignore[attr-defined]
            raise StructureError("the model's energy is not finite")
        return right(structure)

    evaluate.calls = 0  # type: ignore[attr-defined]
    core = CoreEngine(right)
    result = check_stability(CoreEngine(evaluate), core, start(), tmp_path, replace(OPTIONS, replicas=1))
    assert result.verdict == "fail"
    assert "not finite" in result.detail
    assert result.figures["replica 0 failed at, ps"] == pytest.approx(0.2)
    assert (tmp_path / "replica-0-restart.xyz").is_file()


def test_replicas_that_last_are_censored(tmp_path: Path) -> None:
    """Two fail, two last: Kaplan-Meier by hand."""

    class Breaking(CoreEngine):
        runs = 0

        def run(self, dynamics: Dynamics, file: Path) -> Trajectory:
            self.runs += 1
            if self.runs in (2, 4) or dynamics.steps < 10:
                raise SimulationError("step 1: gone")
            return super().run(dynamics, file)

    options = replace(OPTIONS, replicas=4, duration=0.1, stretch=0.1, interval=100.0)
    engine = Breaking(springs())
    result = check_stability(engine, engine, start(), tmp_path, options)
    assert result.figure == pytest.approx(0.5)
    assert list(result.plots[0].curves[0].y) == pytest.approx([0.5, 0.5])
    low, high = result.plots[0].curves[1:]
    assert 0 < low.y[-1] < 0.5 < high.y[-1] < 1


def test_ase_with_random_weights_falls_apart(tmp_path: Path) -> None:
    """The real engine, and the eager model to compare with: it is the model's fault, not the engine's."""
    require_engine("ase")
    from mlff_ase.engine import ASEEngine
    from mlff_engines.artifact import load

    artifact = students.artifact(tmp_path)
    core = CoreEngine(load(artifact).evaluator(skin=0.0, outside="ignore"))
    engine = ASEEngine(artifact, folder=tmp_path)
    result = check_stability(engine, core, start(temperature=2000.0), tmp_path / "runs", replace(OPTIONS, replicas=2))
    assert result.verdict == "fail"
    assert (tmp_path / "runs" / f"replica-0-0{engine.suffix}").is_file()
    apart = float(result.detail.rsplit("differ by ", 1)[1].split()[0])
    assert apart < 1e-9


def test_stability_needs_a_temperature(tmp_path: Path) -> None:
    engine = CoreEngine(springs())
    with pytest.raises(ConfigError, match="give the start one"):
        check_stability(engine, engine, start(temperature=None), tmp_path)
