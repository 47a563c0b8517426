"""Artifacts that are missing, damaged, foreign or false: refused before anything of them runs, with a way out."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import students
from forged import off_by, remanifested, rewritten
from mlff_engines import manifest
from mlff_engines.artifact import Artifact, load
from mlff_engines.checkpoint import load_checkpoint, save_checkpoint, set_dtype
from mlff_engines.errors import ArtifactError
from mlff_engines.export import export
from mlff_engines.manifest import inspect
from mlff_engines.models.registry import model_config


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float64 artifact; its checkpoint lies beside it as member-0."""
    return students.artifact(tmp_path_factory.mktemp("student"))


@pytest.mark.fault("A1")
@pytest.mark.parametrize("read", [inspect, load])
def test_missing_path(tmp_path: Path, read: Any) -> None:
    with pytest.raises(ArtifactError, match=r"no artifact at .*absent\.pt; make one with: mlff-export"):
        read(tmp_path / "absent.pt")


@pytest.mark.fault("A2")
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_truncated_file(student: Path, tmp_path: Path, kept: float) -> None:
    content = student.read_bytes()
    short = tmp_path / "short.pt"
    short.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ArtifactError, match=r"short\.pt is (a truncated|no) artifact \(\d+ bytes\); copy it anew"):
        load(short)


@pytest.fixture
def no_execution(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes every way of executing an artifact leave a trace instead."""
    traces: list[str] = []
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: traces.append("jit.load"))
    monkeypatch.setattr(torch, "load", lambda *_, **__: traces.append("load"))
    return traces


@pytest.mark.fault("A3")
@pytest.mark.parametrize("part", ["/code/", "/data/", "data.pkl", "golden.json"])
def test_altered_content_is_not_executed(student: Path, tmp_path: Path, part: str, no_execution: list[str]) -> None:
    """One bit of the code, the weights, the pickle or the golden vectors."""
    done = []

    def flip(name: str, content: bytes) -> bytes:
        if done or part not in name or not content:
            return content
        done.append(name)
        middle = len(content) // 2
        return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]

    altered = rewritten(student, tmp_path / "altered.pt", flip, rehash=False)
    assert done
    for read in (inspect, load):
        with pytest.raises(ArtifactError, match=r"(altered or damaged: SHA-256 .* It was not executed|is damaged)"):
            read(altered)
    assert no_execution == []


@pytest.mark.fault("A3")
def test_altered_claims_are_not_believed(student: Path, tmp_path: Path, no_execution: list[str]) -> None:
    def farther(name: str, content: bytes) -> bytes:
        return content.replace(b'"cutoff": 4.0', b'"cutoff": 4.5') if name.endswith(manifest.MANIFEST) else content

    altered = rewritten(student, tmp_path / "altered.pt", farther, rehash=False)
    with pytest.raises(ArtifactError, match="It was not executed"):
        load(altered)
    assert no_execution == []


@pytest.mark.fault("A3")
def test_added_code_is_not_executed(student: Path, tmp_path: Path, no_execution: list[str]) -> None:
    added = Path(shutil.copy(student, tmp_path / "added.pt"))
    with zipfile.ZipFile(added, "a") as archive:
        archive.writestr(f"{archive.namelist()[0].split('/')[0]}/code/more.py", "def f(): pass")
    with pytest.raises(ArtifactError, match="It was not executed"):
        load(added)
    assert no_execution == []


@pytest.mark.fault("A3")
def test_damaged_disk_block(student: Path, tmp_path: Path) -> None:
    """A flipped bit anywhere in the file, where zip's own checksum notices or ours does."""
    content, path = student.read_bytes(), tmp_path / "damaged.pt"
    expected, rng, noticed = manifest.read(student), np.random.default_rng(0), 0
    directory = 4000  # bytes at the end: each of these says more than one of a weight
    for at in [*rng.integers(len(content), size=200), *rng.integers(len(content) - directory, len(content), size=200)]:
        damaged = bytearray(content)
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            found = manifest.read(path)
        except ArtifactError:
            noticed += 1
        else:  # padding between the entries, dates: nothing that is read has changed
            assert found == expected
    assert noticed > 300


@pytest.mark.fault("A4")
def test_a_checkpoint_is_told_apart(student: Path) -> None:
    folder = student.parent / "member-0"
    for path in (folder, folder / "config.yaml", next(folder.glob("*.safetensors"))):
        with pytest.raises(ArtifactError, match=rf"is a checkpoint, not an artifact; export it: mlff-export {folder}"):
            load(path)


@pytest.mark.fault("A4")
def test_a_pickle_is_told_apart_and_not_loaded(tmp_path: Path, no_execution: list[str]) -> None:
    weights = {"weight": torch.zeros(2)}
    zipped, plain, text, foreign = (tmp_path / name for name in ("zipped.pt", "plain.pt", "text.pt", "foreign.pt"))
    torch.save(weights, zipped)
    torch.save(weights, plain, _use_new_zipfile_serialization=False)
    text.write_text("no model")
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), str(foreign))
    for path, message in (
        (zipped, "has no manifest: it is a torch file made by another program"),
        (plain, "is a pickle"),
        (text, "is no artifact"),
        (foreign, "has no manifest: it is a torch file made by another program"),
    ):
        with pytest.raises(ArtifactError, match=rf"{path.name} {message}.*mlff-export CHECKPOINT -o {path.stem}\.pt"):
            load(path)
    assert no_execution == []


@pytest.mark.fault("A5")
def test_newer_schema(student: Path, tmp_path: Path, no_execution: list[str]) -> None:
    """Recognised before anything else of the manifest is understood."""

    def newer(manifest: dict[str, Any]) -> None:
        manifest.clear()
        manifest.update(schema_version=2, something="else")

    path = remanifested(student, tmp_path / "newer.pt", newer)
    with pytest.raises(ArtifactError, match="schema version 2; this mlff-engines reads up to 1: upgrade mlff-engines"):
        load(path)
    assert no_execution == []


@pytest.mark.fault("A6")
def test_untested_torch_warns_and_replays(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = remanifested(student, tmp_path / "old.pt", lambda manifest: manifest.update(torch_version="1.99.0"))
    replayed = []
    monkeypatch.setattr(Artifact, "verify", lambda self: replayed.append(self))
    with pytest.warns(UserWarning, match=r"made with torch 1\.99\.0 and runs on .*: replaying its golden vectors"):
        load(path)
    assert len(replayed) == 1
    # the same release is no news, whatever its build
    same = ".".join(torch.__version__.split(".")[:2]) + ".9+cu999"
    path = remanifested(student, tmp_path / "same.pt", lambda manifest: manifest.update(torch_version=same))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(path)
    assert len(replayed) == 1


@pytest.mark.fault("A6", "A11")
def test_untested_torch_that_computes_otherwise_is_refused(student: Path, tmp_path: Path) -> None:
    path = off_by(student, tmp_path / "off.pt", 1e-6)
    path = remanifested(path, tmp_path / "old.pt", lambda manifest: manifest.update(torch_version="1.99.0"))
    with (
        pytest.warns(UserWarning, match="replaying"),
        pytest.raises(ArtifactError, match=r"golden vector .* made with torch 1\.99\.0, running"),
    ):
        load(path)


OPERATOR = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
import students
from mlff_engines import artifact
from mlff_engines.checkpoint import load_checkpoint
from mlff_engines.manifest import inspect

torch.library.define("mlff_tests::shifted", "(Tensor x) -> Tensor")
torch.library.impl("mlff_tests::shifted", "default", lambda x: x + 1)

class Shifted(torch.nn.Module):
    def __init__(self, potential):
        super().__init__()
        self.potential = potential

    def forward(self, graph: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        out = self.potential(graph)
        out["node_energy"] = torch.ops.mlff_tests.shifted(out["node_energy"])
        return out

folder = Path({folder!r})
manifest = inspect(folder / "student-float64.pt")
potential, _ = load_checkpoint(folder / "member-0")
artifact.save(folder / "shifted.pt", artifact.script(Shifted(potential)), manifest, [])
"""


@pytest.mark.fault("A7")
def test_missing_custom_operator(tmp_path: Path) -> None:
    """Made where the operator exists, loaded where it does not."""
    students.artifact(tmp_path)
    program = tmp_path / "program.py"  # TorchScript reads the source of what it scripts
    program.write_text(OPERATOR.format(tests=str(Path(students.__file__).parent), folder=str(tmp_path)))
    run = subprocess.run([sys.executable, str(program)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert inspect(tmp_path / "shifted.pt").architecture == "painn"
    with pytest.raises(ArtifactError, match=r"uses the operator mlff_tests::shifted, which this installation does not"):
        load(tmp_path / "shifted.pt")


@pytest.mark.fault("A8")
def test_cuda_artifact_on_the_cpu(student: Path, tmp_path: Path) -> None:
    """Storages that name a CUDA device, as one saved on a GPU has them, are moved."""
    moved = []

    def on_cuda(name: str, content: bytes) -> bytes:
        if not name.endswith(".pkl"):
            return content
        cpu, cuda = b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"
        moved.append(content.count(cpu))
        return content.replace(cpu, cuda)

    path = rewritten(student, tmp_path / "cuda.pt", on_cuda)
    assert sum(moved) > 0
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.jit.load(str(path))  # so the file does ask for a GPU
    loaded = load(path)
    assert {tensor.device.type for tensor in loaded.module.state_dict().values()} == {"cpu"}
    loaded.verify()


@pytest.mark.fault("A9")
def test_downcast_that_overflows(tmp_path: Path) -> None:
    """A weight of 1e39 is fine in float64 and infinite in float32; it is that of an element nobody uses."""
    folder = students.checkpoint(tmp_path / "large")
    potential, config = load_checkpoint(folder)
    set_dtype(potential, torch.float64)
    model: Any = potential.model
    with torch.no_grad():
        model.network.embedding.weight[50] = 1e39
    save_checkpoint(folder, model, model_config(config.model), config.domain, {})
    made = export([folder], tmp_path / "large.pt", dtype="float64")
    made.verify()
    with pytest.raises(ArtifactError, match=r"embedding\.weight is not finite in float32: use the artifact in float64"):
        load(tmp_path / "large.pt", dtype="float32")
    with pytest.raises(ArtifactError, match=r"embedding\.weight is not finite in torch\.float32: export in float64"):
        export([folder], tmp_path / "single.pt", dtype="float32")
    assert not (tmp_path / "single.pt").exists()


@pytest.mark.fault("A10")
@pytest.mark.parametrize("key", ["units", "cutoff"])
def test_manifest_without_units_or_cutoff(student: Path, tmp_path: Path, key: str, no_execution: list[str]) -> None:
    path = remanifested(student, tmp_path / "less.pt", lambda manifest: manifest.pop(key))
    with pytest.raises(ArtifactError, match=rf"manifest of .*missing key '{key}'. Export the artifact again"):
        load(path)
    assert no_execution == []


@pytest.mark.fault("A10")
def test_manifest_in_other_units(student: Path, tmp_path: Path) -> None:
    def bohr(manifest: dict[str, Any]) -> None:
        manifest["units"]["length"] = "Bohr"

    with pytest.raises(ArtifactError, match=r"units\.length = 'Bohr': Input should be 'Angstrom'"):
        load(remanifested(student, tmp_path / "bohr.pt", bohr))


def test_manifest_that_is_no_manifest(student: Path, tmp_path: Path) -> None:
    for content in (b"[]", b"{", b"null", b'{"schema_version": "x"}'):
        path = rewritten(
            student,
            tmp_path / "odd.pt",
            lambda name, old, content=content: content if name.endswith(manifest.MANIFEST) else old,
            rehash=False,
        )
        with pytest.raises(ArtifactError, match=r"odd\.pt"):
            load(path)


@pytest.mark.fault("A11")
def test_golden_vectors_that_fail(student: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"golden vector 'triclinic box': forces off by .*, allowed 1e-10"):
        load(off_by(student, tmp_path / "off.pt", 1e-6)).verify()
    load(off_by(student, tmp_path / "on.pt", 1e-13)).verify()


@pytest.mark.fault("A11")
def test_no_golden_vectors(student: Path, tmp_path: Path) -> None:
    path = rewritten(
        student, tmp_path / "none.pt", lambda name, content: b"[]" if name.endswith(manifest.GOLDEN) else content
    )
    with pytest.raises(ArtifactError, match="no golden vectors; export it again"):
        load(path).verify()
