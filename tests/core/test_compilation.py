"""Models compiled by torch: the artifact's numbers for any system, made once, never trusted untried."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import packages
from broken_engines import NOBLE, ORGANIC
from mlff_engines import cli, compilation, native
from mlff_engines.artifact import load, recast
from mlff_engines.compilation import Compiled, Signature, place
from mlff_engines.errors import ArtifactError, KernelWarning, MissingEngineError
from mlff_engines.graph import INPUTS, Graph, collate, make_graph
from mlff_engines.manifest import inspect
from mlff_engines.neighbors import neighbor_list
from mlff_engines.validation.result import STATIC, Claims
from mlff_engines.validation.static.conformance import check_model
from mlff_engines.validation.static.parity import reference
from mlff_engines.validation.static.systems import cluster
from packages import package, put
from requirements import require_compiler

require_compiler()
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One for the whole session: compiling takes up to a minute."""
    with packages.cache(tmp_path_factory) as folder:
        yield folder


@pytest.fixture(params=packages.DTYPES)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every artifact in turn."""
    return packages.student(tmp_path_factory, request.param)


@pytest.fixture
def argon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packages.student(tmp_path_factory, "argon")


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    return tmp_path / "empty"


@pytest.mark.check(*STATIC)
def test_every_static_check_passes(path: Path) -> None:
    compiled, exact = load(path, kernel="compiled"), load(path, kernel="torch", dtype="float64")
    assert (compiled.kernel, compiled.dtype) == ("compiled", getattr(torch, compiled.manifest.dtype))
    claims = Claims.of(compiled.manifest)
    results = check_model(
        compiled.evaluator(outside="ignore"),
        claims,
        reference=reference(compiled.eager(), claims.cutoff),
        upcast=exact.evaluator(outside="ignore"),
    )
    assert [result.code for result in results] == list(STATIC)
    assert [result for result in results if not result.passed] == []


def some(claims: Claims, dtype: torch.dtype, atoms: int, seed: int = 0, **more: float) -> Graph:
    structure = cluster(claims, atoms, seed=seed)
    index, vectors = neighbor_list(structure.positions, structure.cell, structure.pbc, claims.cutoff)
    given = {name: torch.tensor([value], dtype=dtype) for name, value in more.items()}
    return make_graph(
        torch.from_numpy(structure.numbers), torch.from_numpy(index), torch.from_numpy(vectors).to(dtype), **given
    )


def graphs(claims: Claims, dtype: torch.dtype) -> dict[str, Graph]:
    """Every size that dimensions are known to go wrong at."""
    many = some(claims, dtype, 12)
    lone, pair = some(claims, dtype, 1), some(claims, dtype, 2)
    assert lone["edge_index"].shape == (2, 0)
    nothing = {name: tensor[..., :0] if name == "edge_index" else tensor[:0] for name, tensor in many.items()}
    one_way = {**pair, "edge_index": pair["edge_index"][:, :1], "edge_vec": pair["edge_vec"][:1]}
    batch = collate([some(claims, dtype, 4, seed, charge=seed % 2, spin=2.0 * (seed % 2)) for seed in range(3)])
    return {
        "many": many,
        "no atom": {**nothing, "charge": many["charge"], "spin": many["spin"]},
        "one atom": lone,
        "atoms far apart": collate([lone, lone, lone]),
        "two atoms": pair,
        "one edge": one_way,
        "ghosts": {**many, "owned": torch.arange(12) < 5},
        "a batch, charged and not": batch,
    }


def test_any_size(path: Path) -> None:
    compiled = load(path, kernel="compiled")
    plain = load(path, kernel="torch")
    tolerance = 1e-11 if compiled.dtype == torch.float64 else 2e-4
    for name, graph in graphs(Claims.of(compiled.manifest), compiled.dtype).items():
        expected, found = plain(graph), compiled(graph)
        assert list(found) == list(compiled.manifest.outputs)
        for output, tensor in expected.items():
            assert found[output].dtype == tensor.dtype
            torch.testing.assert_close(
                found[output], tensor, rtol=1e-9 if compiled.dtype == torch.float64 else 1e-5, atol=tolerance, msg=name
            )


def test_arguments_of_another_layout_or_dtype(argon: Path) -> None:
    """Machine code does not look at these; a caller may have either."""
    compiled, graph = load(argon, kernel="compiled"), some(NOBLE, torch.float32, 12)
    expected = compiled(graph)
    transposed = graph["edge_index"].T.contiguous().T
    assert not transposed.is_contiguous()
    odd = {**graph, "edge_index": transposed, "edge_vec": graph["edge_vec"].double()}
    for name, tensor in compiled(odd).items():
        assert torch.equal(tensor, expected[name])


def test_once_compiled_it_is_loaded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler too, and without what takes torch seconds to import."""
    load(path, kernel="compiled")
    program = (
        "import sys; from mlff_engines.artifact import load; a = load(sys.argv[1], kernel='compiled'); "
        "assert a.kernel == 'compiled' and 'torch._inductor' not in sys.modules; print(a.verify())"
    )
    monkeypatch.setenv("CXX", "no-such-compiler")
    run = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "triclinic box" in run.stdout


def test_package_is_for_one_torch_processor_artifact_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {place("a", torch.float32, CPU), place("b", torch.float32, CPU), place("a", torch.float64, CPU)}
    monkeypatch.setattr(torch, "__version__", "99.0")
    paths.add(place("a", torch.float32, CPU))
    monkeypatch.setattr(native, "processor", lambda: ("another",))
    paths.add(place("a", torch.float32, CPU))
    assert len(paths) == 5


def test_automatic_choice(argon: Path, tmp_path_factory: pytest.TempPathFactory, empty: Path) -> None:
    """A package that is there, but for a fused kernel; and none is made unasked."""
    plain = packages.student(tmp_path_factory, "plain")
    assert load(argon).kernel == "torch"
    assert not list(empty.rglob("*.pt2"))
    with packages.cache(tmp_path_factory):
        for path, kernel in ((argon, "compiled"), (plain, "fused")):
            load(path, kernel="compiled")
            assert load(path).kernel == kernel
            assert load(path, kernel="torch").kernel == "torch"


def test_environment_asks_for_it(argon: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFF_KERNEL", "compiled")
    assert load(argon).kernel == "compiled"


def test_weights_stay_those_of_the_artifact(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    path = packages.student(tmp_path_factory, "plain")
    compiled, plain = load(path, kernel="compiled"), load(path, kernel="torch")
    for name, tensor in compiled.eager().state_dict().items():
        assert torch.equal(tensor.nan_to_num(), plain.eager().state_dict()[name].nan_to_num())
    recast(compiled, tmp_path / "again.pt")
    assert inspect(tmp_path / "again.pt").kernel == "torch"
    load(tmp_path / "again.pt", kernel="torch").verify()


def other_weights(path: Path, tmp_path: Path) -> Path:
    """The same model, its package with the weights of another."""
    made = load(path, kernel="torch")
    with torch.no_grad():
        for name, tensor in made.module.named_parameters():
            if "epsilon" in name:
                tensor.mul_(2.0)
    evaluate = made.evaluator(outside="ignore")
    made.golden = [g.record(g.name, g.structure, evaluate(g.structure)) for g in made.golden]
    recast(made, tmp_path / "other.pt")
    package(tmp_path / "other.pt").parent.mkdir(parents=True, exist_ok=True)
    load(path, kernel="compiled")
    put(package(path).read_bytes(), tmp_path / "other.pt")
    return tmp_path / "other.pt"


def truncated(path: Path, tmp_path: Path) -> Path:
    return _rewritten(path, tmp_path, lambda content: content[: len(content) // 2])


def altered(path: Path, tmp_path: Path) -> Path:
    """One bit of the machine code."""
    middle = 0x4000

    def flip(content: bytes) -> bytes:
        at = content.index(b"\x7fELF") + middle
        return content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :]

    return _rewritten(path, tmp_path, flip)


def no_package(path: Path, tmp_path: Path) -> Path:
    found = _rewritten(path, tmp_path, lambda content: content)
    put(b"not a package", found)
    return found


def _rewritten(path: Path, tmp_path: Path, change: Any) -> Path:
    load(path, kernel="compiled")
    content = package(path).read_bytes()
    copy = tmp_path / "copy.pt"
    recast(load(path, kernel="torch"), copy)
    put(content, copy)
    package(copy).write_bytes(change(content))
    return copy


@pytest.mark.fault("A11")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (other_weights, r"golden vector .* off by .*is not this artifact\. Delete it if it is there"),
        (truncated, r"\.pt2 is damaged\. Delete it, and it is compiled again"),
        (altered, r"\.pt2 is damaged\. Delete it, and it is compiled again"),
        (no_package, r"cannot load .*\.pt2: .*\. Delete it, and it is compiled again"),
    ],
)
def test_package_that_is_not_the_artifact(argon: Path, tmp_path: Path, damage: Any, message: str) -> None:
    """Refused where it was asked for; done without, and said so, where it was not."""
    path = damage(argon, tmp_path)
    assert package(path).is_file()
    with pytest.raises(ArtifactError, match=message):
        load(path, kernel="compiled")
    with pytest.warns(KernelWarning, match=message + r".*Plain torch is used"):
        found = load(path)
    assert found.kernel == "torch"
    found.verify()


@pytest.mark.fault("A11")
def test_compiled_wrongly_it_never_enters_the_cache(
    argon: Path, tmp_path: Path, empty: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler that makes something else of a model than it is."""
    with packages.cache(tmp_path_factory):
        other = other_weights(argon, tmp_path)
        wrong = tmp_path / "wrong.pt2"
        shutil.copy(package(argon), wrong)
    monkeypatch.setattr(compilation, "_compile", lambda *arguments: shutil.copy(wrong, arguments[-1]))
    with pytest.raises(ArtifactError, match="golden vector"):
        load(other, kernel="compiled")
    assert not list(empty.rglob("*.pt2"))


class Branching(nn.Module):
    """Its program depends on the values of its input: nothing that can be traced."""

    def forward(self, graph: Graph) -> dict[str, Tensor]:
        vectors = graph["edge_vec"]
        return {"edge_gradient": vectors if float(vectors.sum()) > 0 else -vectors}


def test_model_that_cannot_be_compiled(tmp_path: Path) -> None:
    with pytest.raises(MissingEngineError, match=r"torch .* cannot compile the model \(\w+: "):
        compilation.package(
            tmp_path / "x.pt2", Branching, Signature(INPUTS, ["edge_gradient"], torch.float32, CPU), lambda _: None
        )
    assert not list(tmp_path.glob("*.pt2"))


@pytest.mark.fault("A7")
@pytest.mark.usefixtures("empty")
def test_no_compiler(argon: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ArtifactError, match=r"has no compiled form here: no C\+\+ compiler .*Or use kernel='torch'"):
        load(argon, kernel="compiled")


def test_cache_that_cannot_be_written(argon: Path, empty: Path) -> None:
    empty.write_text("a file, not a folder")
    with pytest.raises(ArtifactError, match=r"cannot compile into .*: .* writable, or set XDG_CACHE_HOME"):
        load(argon, kernel="compiled")


def test_loader_of_another_torch(argon: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(argon, kernel="compiled")
    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", lambda path, name: None)
    with pytest.raises(MissingEngineError, match="compiled models need a newer torch than"):
        Compiled(package(argon), Signature(INPUTS, ["node_energy"], torch.float32, CPU))


def test_command_line(argon: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(argon, kernel="compiled")
    cli.export([str(argon), "--compile"])
    assert f"{argon}: compiled for this machine, as the float64 model on 3 structures" in capsys.readouterr().out
    for arguments in ([str(argon)], [str(argon.parent / "member-0"), "--compile"]):
        with pytest.raises(SystemExit) as stop:
            cli.export(arguments)
        assert stop.value.code == 2
        assert "Missing option '-o' / '--out'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert np.isfinite(load(argon).evaluator(outside="ignore")(cluster(NOBLE)).forces).all()
    assert ORGANIC.cutoff != NOBLE.cutoff
