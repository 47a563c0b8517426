"""The bugs of docs/conformance.md around a trained student, by the script that makes its table for any."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from broken_dynamics import SHORT, relaxed
from broken_engines import NOBLE, PAINN, trained_painn
from mlff_engines.artifact import Artifact, load
from mlff_engines.checkpoint import Domain, save_checkpoint
from mlff_engines.export import export
from mlff_engines.models.registry import model_config
from mlff_engines.validation.core_engine import CoreEngine
from mlff_engines.validation.dynamics.constant_energy import starting
from mlff_engines.validation.engine import Dynamics
from mlff_engines.validation.static.systems import cluster
from requirements import REPOSITORY

TEMPERATURE = 30.0  # K
# bug -> checks that fail, others may fail besides
CAUGHT = {
    "cutoff truncated, no envelope": "S7",
    "stale neighbour list": "S1",
    "0.1 % non-conservative force": "S1 M1 M3",
    "1 % non-conservative force": "S1 M1 M3",
    "wrong sign of the virial": "S1",
    "two species swapped": "S1 S9 M3",
    "positions in nm for Å": "S1 M3",
    "energy and force unit off by 1.0005": "S1 S9 M3",
    "energy unit off by 1.0005": "S1 S9 M1 M3",
    "energy summed in float32": "S1 S9 M1 M3",
}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = REPOSITORY / "examples" / "benchmarks" / "injected_bugs.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("student")
    potential, claims = trained_painn(steps=100)
    config = model_config({**PAINN, "cutoff": claims.cutoff})
    domain = Domain(elements=list(claims.elements), min_distances={"Ar-Ar": 3.2, "Ar-Kr": 3.2, "Kr-Kr": 3.2})
    save_checkpoint(folder / "member-0", potential.model, config, domain, {"teacher": "Lennard-Jones, analytic"})
    export([folder / "member-0"], folder / "student.pt", dtype="float64")
    return load(folder / "student.pt")


@pytest.fixture(scope="module")
def start(student: Artifact) -> Dynamics:
    """A warm cluster. On the sites of a crystal vectors of PaiNN vanish, where their lengths are all but a cusp."""
    core = CoreEngine(student.evaluator(outside="ignore"))
    return starting(core, relaxed(core.evaluate, cluster(NOBLE, 6, 1)), TEMPERATURE, seed=1)


@pytest.mark.check("S1", "S7", "S9")
def test_right_student_passes(script: ModuleType, student: Artifact, start: Dynamics, tmp_path: Path) -> None:
    results = list(script.judged(script.RIGHT, student, start, tmp_path, SHORT, ("S1", "S7", "S9", "M1", "M2", "M3")))
    assert len(results) == 6
    assert [result for result in results if not result.passed] == []


@pytest.mark.check("S1", "S7", "S9")
@pytest.mark.parametrize("bug", CAUGHT)
def test_bug_is_caught(bug: str, script: ModuleType, student: Artifact, start: Dynamics, tmp_path: Path) -> None:
    with np.errstate(all="ignore"):  # some explode
        results = list(script.judged(bug, student, start, tmp_path, SHORT, CAUGHT[bug].split()))
    assert {result.code: result.verdict for result in results} == dict.fromkeys(CAUGHT[bug].split(), "fail"), results


def test_the_script_makes_the_table_of_these_bugs(script: ModuleType) -> None:
    assert set(CAUGHT) < set(script.BUGS)
