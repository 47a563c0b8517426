"""How kernels enter: every adapter gets them from `load`, and an installation without a compiler does without."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import students
from broken_engines import ARGON_KRYPTON, NOBLE, ORGANIC
from mlff_engines import cli, kernels, native
from mlff_engines.artifact import Artifact, load
from mlff_engines.checkpoint import Domain, load_checkpoint, save_checkpoint
from mlff_engines.errors import ArtifactError, MissingEngineError
from mlff_engines.export import export
from mlff_engines.manifest import inspect
from mlff_engines.models.registry import build_model
from mlff_engines.potential import Ensemble, Potential
from mlff_engines.validation.result import STATIC, Claims
from mlff_engines.validation.static.conformance import check_model
from mlff_engines.validation.static.parity import reference
from mlff_engines.validation.static.systems import cluster
from requirements import require_compiler

require_compiler()


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 artifact of plain torch; its checkpoint lies beside it as member-0."""
    return students.artifact(tmp_path_factory.mktemp("student"), dtype="float32")


@pytest.fixture(scope="module")
def named(student: Path) -> Path:
    """The same, with the operator in its program."""
    path = student.with_name("fused.pt")
    export([student.parent / "member-0"], path, kernel="fused")
    return path


def forces(artifact: Artifact) -> Any:
    return artifact.evaluator(outside="ignore")(cluster(ORGANIC, 9)).forces


def test_the_faster_form_is_chosen_unless_told_otherwise(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(student).kernel == load(student, kernel="fused").kernel == "fused"
    assert load(student, kernel="torch").kernel == "torch"
    monkeypatch.setenv("MLFF_KERNEL", "torch")
    assert load(student).kernel == "torch"
    assert load(student, kernel="auto").kernel == "fused"
    monkeypatch.setenv("MLFF_KERNEL", "fuse")
    with pytest.raises(ArtifactError, match="kernel 'fuse'; did you mean 'fused'"):
        load(student)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kernel", ["torch", "fused"])
@pytest.mark.parametrize("program", ["student", "named"])
def test_every_form_gives_the_same(program: str, kernel: str, dtype: Any, request: pytest.FixtureRequest) -> None:
    made = load(request.getfixturevalue(program), kernel=kernel, dtype=dtype)
    assert (made.kernel, made.dtype) == (kernel, getattr(torch, dtype))
    made.verify()
    exact = load(request.getfixturevalue("student"), kernel="torch", dtype="float64")
    np.testing.assert_allclose(forces(made), forces(exact), rtol=0, atol=1e-11 if dtype == "float64" else 2e-5)
    torch.testing.assert_close(
        dict(made.eager().state_dict()), dict(exact.eager().state_dict()), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.check(*STATIC)
@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_every_static_check_passes_with_the_kernel_on(tmp_path: Path, dtype: Any, members: int) -> None:
    path = students.artifact(tmp_path, members=members, dtype=dtype, features=24)
    loaded, double = load(path, kernel="fused"), load(path, kernel="fused", dtype="float64")
    potentials = [load_checkpoint(tmp_path / f"member-{seed}")[0] for seed in range(members)]
    claims = Claims.of(loaded.manifest)
    results = check_model(
        loaded.evaluator(outside="ignore"),
        claims,
        reference=reference(Ensemble(potentials), claims.cutoff),
        upcast=double.evaluator(outside="ignore"),
    )
    assert [result.code for result in results] == list(STATIC)
    assert [result for result in results if not result.passed] == []


def test_manifest_and_inspect_name_the_kernel(student: Path, named: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (inspect(student).kernel, inspect(named).kernel) == ("torch", "fused")
    cli.main(["inspect", str(named)])
    assert "kernel fused" in capsys.readouterr().out


def test_command_line_exports_the_operator(student: Path, tmp_path: Path) -> None:
    out = tmp_path / "fused.pt"
    cli.export([str(student.parent / "member-0"), "-o", str(out), "--kernel", "fused"])
    assert inspect(out).kernel == "fused"


def test_architecture_without_a_kernel(tmp_path: Path) -> None:
    model = build_model(ARGON_KRYPTON, NOBLE.elements, NOBLE.e0).eval()
    save_checkpoint(tmp_path / "argon", model, ARGON_KRYPTON, Domain(elements=list(NOBLE.elements)), {})
    path = tmp_path / "argon.pt"
    with pytest.raises(ArtifactError, match="no fused kernel for lj: export with --kernel torch"):
        export([tmp_path / "argon"], path, kernel="fused")
    export([tmp_path / "argon"], path)
    assert load(path).kernel == "torch"
    with pytest.raises(ArtifactError, match="no fused kernel for architecture lj: use kernel='auto' or 'torch'"):
        load(path, kernel="fused")


NO_COMPILER = """
import sys, warnings
import numpy as np
from mlff_engines.artifact import load
from mlff_engines.errors import ArtifactError, KernelWarning
from mlff_engines.structure import Structure
student, named = sys.argv[1:]
for call in range(2):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = load(student)
    assert [w.category for w in caught if "kernel" in str(w.message)] == ([] if call else [KernelWarning]), caught
    if not call:
        print(caught[0].message)
    assert loaded.kernel == "torch"
loaded.verify()
for path, kernel in ((student, "fused"), (named, "auto")):
    try:
        load(path, kernel=kernel)
    except ArtifactError as error:
        print(error)
    else:
        raise AssertionError(path)
"""


@pytest.mark.fault("A7")
def test_no_compiler(student: Path, named: Path, tmp_path: Path) -> None:
    """Plain torch and one warning; an artifact that names the operator says what to do."""
    environment = {**os.environ, "CXX": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path), "MLFF_KERNEL": ""}
    command = [sys.executable, "-c", NO_COMPILER, str(student), str(named)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    warned, first, second = run.stdout.splitlines()
    assert "no C++ compiler 'no-such-compiler'. Install g++" in warned
    assert "Until then models run in plain torch" in warned
    assert f"{student} cannot run its fused kernel: no C++ compiler" in first
    assert first.endswith("Or load it with kernel='torch'")
    assert f"{named} cannot run its fused kernel: no C++ compiler" in second
    assert second.endswith("Or export its checkpoint again with --kernel torch")


@pytest.mark.fault("A7")
def test_operator_of_another_version(named: Path, tmp_path: Path) -> None:
    """As made by a later mlff-engines, whose operator is not the one built here."""
    from forged import rewritten

    def later(name: str, content: bytes) -> bytes:
        return content.replace(b"painn_v1", b"painn_v9")

    path = rewritten(named, tmp_path / "later.pt", later)
    with pytest.raises(ArtifactError, match="uses the operator mlff::painn_v9, which this installation does not have"):
        load(path)


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that notes each call and takes its time, and an empty cache."""
    log, program = tmp_path / "calls", tmp_path / "slow-g++"
    program.write_text(f'#!/bin/sh\necho call >>"{log}"\nsleep 0.5\nexec {native.compiler()} "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("CXX", str(program))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return log


def source(tmp_path: Path, text: str = 'extern "C" int answer() { return 42; }') -> Path:
    (tmp_path / "source").mkdir(exist_ok=True)
    path = tmp_path / "source" / "answer.cpp"
    path.write_text(text)
    return path


def test_builders_at_once_build_once(tmp_path: Path, counted: Path) -> None:
    program = "import sys; from mlff_engines.native import *; print(operator_library('answer', Path(sys.argv[1])))"
    command = [sys.executable, "-c", program, str(source(tmp_path))]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = {process.communicate()[0] for process in running}
    assert len(answers) == 1
    assert Path(answers.pop().strip()).is_file()
    assert counted.read_text() == "call\n"


def test_library_is_built_anew_when_anything_changes(
    tmp_path: Path, counted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = native.operator_library("answer", source(tmp_path))
    assert native.operator_library("answer", source(tmp_path)) == first
    paths = {first, native.operator_library("answer", source(tmp_path), flags=["-DMORE"])}
    (tmp_path / "source" / "header.h").write_text("// new")
    paths.add(native.operator_library("answer", source(tmp_path)))
    monkeypatch.setattr(torch, "__version__", "99.0")
    paths.add(native.operator_library("answer", source(tmp_path)))
    monkeypatch.setattr(native, "processor", lambda: "another")
    paths.add(native.operator_library("answer", source(tmp_path)))
    assert len(paths) == 5
    assert counted.read_text() == 5 * "call\n"


@pytest.mark.usefixtures("counted")
def test_failed_build_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(MissingEngineError, match=r"cannot compile answer\.cpp \(exit code 1\)(.|\n)*error: .*nonsense"):
        native.operator_library("answer", source(tmp_path, "nonsense;"))
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file() and file.suffix != ".lock"]


def test_cache_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(MissingEngineError, match=r"cannot build into .*: .* writable, or set XDG_CACHE_HOME"):
        native.operator_library("answer", source(tmp_path))


def test_library_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(kernels, "library", lambda: broken)
    with pytest.raises(MissingEngineError, match=r"cannot load .*broken\.so: .* Delete it, and it is built again"):
        kernels.load_operators.__wrapped__()


def test_ensemble_of_the_artifact_is_fused_member_by_member(tmp_path: Path) -> None:
    loaded = load(students.artifact(tmp_path, members=2))
    assert isinstance(loaded.module, Ensemble)
    assert all(isinstance(member, Potential) for member in loaded.module.members)
    assert loaded.kernel == "fused"
