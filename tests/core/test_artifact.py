"""Artifacts: equal to the eager model, self-describing, independent of each other."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import students
from broken_engines import ORGANIC
from mlff_engines import artifact
from mlff_engines.artifact import load
from mlff_engines.checkpoint import load_checkpoint, set_dtype
from mlff_engines.errors import ArtifactError, StructureError
from mlff_engines.graph import make_graph
from mlff_engines.manifest import Golden, Manifest, inspect
from mlff_engines.neighbors import neighbor_list
from mlff_engines.validation.result import Claims
from mlff_engines.validation.static.conformance import check_model
from mlff_engines.validation.static.parity import reference
from mlff_engines.validation.static.systems import cluster


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float64 artifact; its checkpoint lies beside it as member-0."""
    return students.artifact(tmp_path_factory.mktemp("student"))


@pytest.mark.check("S1", "S2")
@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_artifact_equals_the_eager_model(tmp_path: Path, dtype: Any, members: int) -> None:
    """Every static check on the TorchScript form, with calls of many shapes among them."""
    path = students.artifact(tmp_path, members=members, dtype=dtype)
    loaded = load(path, kernel="torch")
    claims = Claims.of(loaded.manifest)
    potentials = nn.ModuleList(load_checkpoint(tmp_path / f"member-{seed}")[0] for seed in range(members))
    results = check_model(
        loaded.evaluator(outside="ignore"),
        claims,
        reference=reference(potentials, claims.cutoff),
        only=["S1", "S2", "S9"],
    )
    assert [(r.code, r.passed) for r in results] == [("S1", True), ("S2", True), ("S9", True)], results


@pytest.mark.check("S2")
@pytest.mark.parametrize("optimized", [False, True])
def test_module_equals_eager_in_either_executor(student: Path, optimized: bool) -> None:
    """Also in an engine that leaves the profiling executor on: it compiles anew after some calls."""
    module = load(student, kernel="torch").module
    eager, _ = load_checkpoint(student.parent / "member-0")
    set_dtype(eager, torch.float64)
    eager.eval()
    with torch.jit.optimized_execution(optimized):
        for call, atoms in enumerate((5, 5, 5, 9, 2, 1, 5, 12, 9)):
            structure = cluster(ORGANIC, atoms, seed=call)
            index, vectors = neighbor_list(structure.positions, structure.cell, structure.pbc, 4.5)
            graph = make_graph(*map(torch.from_numpy, (structure.numbers, index, vectors)))
            expected, found = eager(graph), module(graph)
            for name, tensor in expected.items():
                torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-12)


def test_manifest_says_what_the_model_is(student: Path) -> None:
    manifest = inspect(student)
    assert manifest.architecture == "painn"
    assert manifest.units.model_dump() == {"length": "Angstrom", "energy": "eV"}
    assert (manifest.cutoff, manifest.layers, manifest.members, manifest.dtype) == (4.0, 2, 1, "float64")
    assert manifest.e0 == students.E0
    assert manifest.outputs == ["node_energy", "edge_gradient"]
    assert manifest.weights_sha256 == [load_checkpoint(student.parent / "member-0")[1].sha256]
    assert all(field.description or name in UNDESCRIBED for name, field in Manifest.model_fields.items())


UNDESCRIBED = {
    "schema_version",
    "kind",
    "architecture",
    "units",
    "dtype",
    "takes_charge",
    "takes_spin",
    "domain",
    "torch_version",
}


def test_verify_replays_every_golden_vector(student: Path) -> None:
    loaded = load(student)
    found = loaded.verify()
    assert set(found) == {g.name for g in loaded.golden} == {"isolated H", "isolated C", "isolated O", "triclinic box"}
    assert max(max(deviations.values()) for deviations in found.values()) < 1e-11


def test_device_and_dtype_can_be_chosen(student: Path) -> None:
    single = load(student, dtype="float32")
    assert single.dtype == torch.float32
    structure = cluster(ORGANIC)
    double_result, single_result = (a.evaluator(outside="ignore")(structure) for a in (load(student), single))
    assert 0 < np.abs(double_result.forces - single_result.forces).max() < 1e-4
    assert max(single.verify()["triclinic box"].values()) < 5e-5
    with pytest.raises(ArtifactError, match="dtype 'float16'; allowed: float32, float64"):
        load(student, dtype="float16")  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a host without CUDA is meant")
def test_absent_device_is_named(student: Path) -> None:
    with pytest.raises(ArtifactError, match=r"device cuda was asked for but this torch .* sees no CUDA: use cpu"):
        load(student, device="cuda")


def test_unknown_device_is_explained(student: Path) -> None:
    with pytest.raises(ArtifactError, match="unknown device 'gpu'; allowed: cpu, cuda"):
        load(student, device="gpu")


def test_golden_deviation_of_nan_is_no_pass(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(student)
    monkeypatch.setattr(Golden, "deviation", lambda *_: {"energy": float("nan")})
    with pytest.raises(ArtifactError, match="energy off by nan"):
        loaded.verify()


def test_failed_save_leaves_the_old_artifact(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(shutil.copy(student, tmp_path / "student.pt"))
    before = path.read_bytes()

    def interrupted(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(artifact, "seal", interrupted)
    loaded_module: Any = torch.jit.load(str(student))
    with pytest.raises(KeyboardInterrupt):
        artifact.save(path, loaded_module, Manifest.model_construct(), [])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["student.pt"]


def test_evaluators_share_no_state(student: Path) -> None:
    loaded = load(student)
    one, other = loaded.evaluator(outside="ignore"), loaded.evaluator(outside="ignore")
    first, second = cluster(ORGANIC, seed=1), cluster(ORGANIC, seed=2)
    expected = one(first).forces
    other(second)
    assert (one(first).forces == expected).all()
    assert one.neighbors is not other.neighbors


def test_module_needs_gradients(student: Path) -> None:
    """Under no_grad the evaluator still works: it enables them."""
    with torch.no_grad():
        forces = load(student).evaluator(outside="ignore")(cluster(ORGANIC)).forces
    assert np.abs(forces).max() > 0


def test_error_of_the_structure_is_no_artifact_error(student: Path) -> None:
    with pytest.raises(StructureError):
        load(student).evaluator()(cluster(ORGANIC, numbers=[7]))


@pytest.mark.parametrize("members", [1, 2])
def test_float32_artifact_in_float64_is_its_eager_model(tmp_path: Path, members: int) -> None:
    """Weights of float32, everything else in float64: isolated atoms too."""
    loaded = load(students.artifact(tmp_path, members=members, dtype="float32"), dtype="float64")
    claims = replace(Claims.of(loaded.manifest), dtype="float64")
    expected = reference(loaded.eager(), claims.cutoff)
    results = check_model(loaded.evaluator(outside="ignore"), claims, reference=expected, only=["S1", "S9"])
    assert [(r.code, r.verdict) for r in results] == [("S1", "pass"), ("S9", "pass")], results
