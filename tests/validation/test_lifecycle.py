"""D2-D5 pass right adapters and fail ones whose bug is no matter of the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import students
from mlff_engines.artifact import load
from mlff_engines.manifest import Dtype
from mlff_engines.neighbors import VerletList
from mlff_engines.structure import FloatArray, Result, Structure
from mlff_engines.validation.builtin import argon_artifact, argon_box
from mlff_engines.validation.core_engine import CoreEngine
from mlff_engines.validation.dynamics.constant_energy import starting
from mlff_engines.validation.engine import Dynamics, Trajectory
from mlff_engines.validation.lifecycle import TOLERANCES, Options, check_adapter
from mlff_engines.validation.result import NAMES, CheckResult
from requirements import require_engine

SHORT = Options(steps=50, rounds=2, evaluations=240, warm_up=80)


@pytest.fixture(scope="module")
def argon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return argon_artifact(tmp_path_factory.mktemp("argon"))


@pytest.fixture(scope="module")
def start(argon: Path) -> Dynamics:
    """Hot, so that atoms soon meet others."""
    core = CoreEngine(load(argon).evaluator(outside="ignore"))
    return starting(core, argon_box(2), 600.0)


def core_engine(
    artifact: Path, *, folder: Path, device: str = "cpu", dtype: Dtype | None = None, skin: float = 0.5
) -> CoreEngine:
    """The smallest adapter there is."""
    loaded = load(artifact, device, dtype)
    return CoreEngine(loaded.evaluator(skin=skin, outside="ignore"), dtype or loaded.manifest.dtype)


def failed(results: list[CheckResult]) -> dict[str, str]:
    return {result.code: result.detail for result in results if not result.passed}


def test_right_adapter_passes(argon: Path, start: Dynamics, tmp_path: Path) -> None:
    results = check_adapter(core_engine, argon, start, tmp_path, options=SHORT)
    assert [result.code for result in results] == list(TOLERANCES)
    assert failed(results) == {}
    assert [result.name for result in results] == [NAMES[code] for code in TOLERANCES]
    found = {result.code: result for result in results}
    assert found["D2"].figures["way of the slowest atom, Å"] > 1
    assert found["D3"].figure < 1e-12
    assert found["D4"].detail == "to the last bit"


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_ase_passes(argon: Path, start: Dynamics, dtype: Dtype, tmp_path: Path) -> None:
    require_engine("ase")
    from mlff_ase.engine import ASEEngine

    options = replace(SHORT, steps=30, evaluations=160)
    assert failed(check_adapter(ASEEngine, argon, start, tmp_path, dtype=dtype, options=options)) == {}


def test_ase_passes_with_a_student(tmp_path: Path) -> None:
    """Messages over two layers; the weights are random, so the run is short."""
    require_engine("ase")
    from mlff_ase.engine import ASEEngine

    artifact = students.artifact(tmp_path)
    rng = np.random.default_rng(0)
    positions = 1.4 * np.stack(np.meshgrid(*[np.arange(2.0)] * 3), -1).reshape(-1, 3) + 0.1 * rng.random((8, 3))
    structure = Structure(np.array([1, 6, 8, 1, 1, 6, 8, 1]), positions)
    short = Dynamics(structure, 1e-3 * rng.standard_normal((8, 3)), timestep=0.1, steps=0)
    options = Options(steps=20, rounds=5, evaluations=160, warm_up=80)
    assert failed(check_adapter(ASEEngine, artifact, short, tmp_path, options=options)) == {}


class TooLateList(VerletList):
    """The bug: searched anew when an atom has moved by the skin, not by half of it."""

    def _reach(self, structure: Structure) -> float:
        self.skin *= 2
        try:
            return super()._reach(structure)
        finally:
            self.skin /= 2


def too_late_list(artifact: Path, *, skin: float = 0.5, **options: Any) -> CoreEngine:
    engine = core_engine(artifact, skin=skin, **options)
    engine.evaluate.neighbors = TooLateList(engine.evaluate.neighbors.cutoff, skin)  # type: ignore[attr-defined]
    return engine


class RoundedStart(CoreEngine):
    """A checkpoint in text with six digits: velocities are read back from it."""

    def run(self, dynamics: Dynamics, file: Path) -> Trajectory:
        velocities = np.vectorize(lambda v: float(f"{v:.6g}"))(dynamics.velocities)
        return super().run(replace(dynamics, velocities=velocities), file)


class ForgottenVelocities(CoreEngine):
    """Velocities drawn by the engine itself."""

    def run(self, dynamics: Dynamics, file: Path) -> Trajectory:
        drawn = np.random.default_rng(0).standard_normal(dynamics.velocities.shape)
        return super().run(replace(dynamics, velocities=1e-3 * drawn), file)


def running(kind: type[CoreEngine]) -> Callable[..., CoreEngine]:
    return lambda artifact, **options: kind(core_engine(artifact, **options).evaluate)


def noisy(artifact: Path, **options: Any) -> CoreEngine:
    """Sums in an order of chance."""
    engine, rng = core_engine(artifact, **options), np.random.default_rng()

    def evaluate(structure: Structure) -> Result:
        found = engine.evaluate(structure)
        return replace(found, forces=found.forces * (1 + 1e-15 * rng.integers(-2, 3, found.forces.shape)))

    return CoreEngine(evaluate)


def one_buffer(artifact: Path, **options: Any) -> CoreEngine:
    """Every instance writes its forces into the same array, and hands it out."""
    engine = core_engine(artifact, **options)

    def evaluate(structure: Structure) -> Result:
        found = engine.evaluate(structure)
        BUFFER[: len(structure)] = found.forces
        return replace(found, forces=BUFFER[: len(structure)])

    return CoreEngine(evaluate)


BUFFER: FloatArray = np.zeros((1000, 3))


def leaking(artifact: Path, **options: Any) -> CoreEngine:
    """Keeps every neighbour list, in a process whose earlier work has left much memory free."""
    engine, kept = core_engine(artifact, **options), []
    earlier = [np.ones(12_000) for _ in range(2000)]  # 190 MB
    kept.append(earlier[-1])  # nothing of it falls off the end of the heap
    del earlier

    def evaluate(structure: Structure) -> Result:
        found = engine.evaluate(structure)
        kept.extend(np.ones(12_000) for _ in range(2))
        return found

    return CoreEngine(evaluate)


@pytest.mark.parametrize(
    ("code", "make"),
    [
        ("D2", too_late_list),
        ("D3", running(RoundedStart)),
        ("D3", running(ForgottenVelocities)),
        ("D4", noisy),
        ("D4", one_buffer),
        ("D5", leaking),
    ],
)
def test_bug_is_caught(code: str, make: Any, argon: Path, start: Dynamics, tmp_path: Path) -> None:
    [result] = check_adapter(make, argon, start, tmp_path, options=SHORT, only=[code])
    assert result.verdict == "fail", result


def test_a_system_that_stays_where_it_is_says_nothing_of_skins(argon: Path, start: Dynamics, tmp_path: Path) -> None:
    class NoDrift(CoreEngine):
        """Takes out the motion of the centre of mass."""

        def run(self, dynamics: Dynamics, file: Path) -> Trajectory:
            velocities = dynamics.velocities - dynamics.velocities.mean(axis=0)
            return super().run(replace(dynamics, velocities=0.01 * velocities), file)

    [result] = check_adapter(running(NoDrift), argon, start, tmp_path, options=SHORT, only=["D2"])
    assert result.verdict == "inconclusive"
    assert "drift further" in result.detail


def test_an_adapter_that_refuses_has_failed(argon: Path, start: Dynamics, tmp_path: Path) -> None:
    helium = replace(start, structure=replace(start.structure, numbers=np.full(len(start.structure), 2)))
    results = check_adapter(core_engine, argon, helium, tmp_path, options=SHORT)
    assert [result.verdict for result in results] == ["fail"] * 4
    assert all("does not know He" in result.detail for result in results)
