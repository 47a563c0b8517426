"""A jump compiled by torch: the numbers of its artifact for any system, and never trusted untried."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import packages
from kstep_jumps import ETHANOL, M, checkpoint
from mlff_engines import cli, native
from mlff_engines.errors import ArtifactError, KernelWarning
from mlff_engines.kstep.learned import LearnedJump, export_jump
from mlff_engines.manifest import inspect
from mlff_engines.structure import Structure
from packages import package, put
from requirements import require_compiler

require_compiler()


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One for the whole session: compiling takes up to a minute."""
    with packages.cache(tmp_path_factory):
        yield


@pytest.fixture
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A jump with every input and output."""
    folder = packages.shared(tmp_path_factory) / "jump"
    out = folder / "jump.pt"
    with native.locked(folder / "lock"):
        if not out.is_file():
            export_jump(checkpoint(folder / "best", temperature=True, forces=True), out)
    return out


SYSTEMS = {
    "ethanol": ETHANOL,
    "one atom": Structure(ETHANOL.numbers[:1], ETHANOL.positions[:1]),
    "two atoms": Structure(ETHANOL.numbers[:2], ETHANOL.positions[:2]),
    "far apart": Structure(ETHANOL.numbers, 10 * ETHANOL.positions),
    "a crystal": Structure(ETHANOL.numbers, ETHANOL.positions, 5 * np.eye(3), np.ones(3, dtype=bool)),
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_any_size(path: Path, system: str) -> None:
    plain, compiled = (LearnedJump.load(path, kernel=kernel) for kernel in ("torch", "compiled"))
    assert (plain.kernel, compiled.kernel) == ("torch", "compiled")
    structure = SYSTEMS[system]
    velocities = np.random.default_rng(2).normal(0, 0.01, (len(structure), 3))
    expected, found = (jump.evaluate(structure, velocities, 310.0) for jump in (plain, compiled))
    assert list(found) == list(inspect(path).outputs)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=2e-6, msg=lambda text, of=name: f"{of}: {text}")
    momentum = M[: len(structure)] @ found["dv"].numpy()
    np.testing.assert_allclose(momentum, 0, atol=1e-12)


def test_velocities_and_temperature_are_inputs(path: Path) -> None:
    """Traced, either could have become a constant."""
    jump = LearnedJump.load(path, kernel="compiled")
    velocities = np.random.default_rng(2).normal(0, 0.01, (9, 3))
    found = [jump(ETHANOL, v, t).dx for v, t in ((velocities, 300.0), (velocities, 500.0), (-velocities, 300.0))]
    for other in found[1:]:
        assert np.abs(other - found[0]).max() > 1e-5


def test_package_is_used_where_it_is(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.export([str(path), "--compile"])
    assert "compiled for this machine, as the float64 model on 2 structures" in capsys.readouterr().out
    assert LearnedJump.load(path).kernel == "compiled"
    assert LearnedJump.load(path, dtype="float64").kernel == "torch"  # none of that dtype
    monkeypatch.setenv("MLFF_KERNEL", "torch")
    assert LearnedJump.load(path).kernel == "torch"
    monkeypatch.setenv("MLFF_KERNEL", "fused")
    with pytest.raises(ArtifactError, match=r"there is no fused kernel for jumps, such as .*: use kernel='auto'"):
        LearnedJump.load(path)
    monkeypatch.setenv("MLFF_KERNEL", "compiled")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ArtifactError, match=r"has no compiled form here: no C\+\+ compiler .*Or use kernel='torch'"):
        LearnedJump.load(path)


@pytest.mark.fault("A11")
def test_package_of_another_jump(path: Path, tmp_path: Path) -> None:
    """Refused where it was asked for; done without, and said so, where it was not."""
    other = tmp_path / "jump.pt"
    export_jump(checkpoint(tmp_path / "best", seed=1, temperature=True, forces=True), other)
    LearnedJump.load(path, kernel="compiled")
    put(package(path).read_bytes(), other)
    with pytest.raises(ArtifactError, match=r"golden vector .* off by .*is not this artifact\. Delete it"):
        LearnedJump.load(other, kernel="compiled")
    with pytest.warns(KernelWarning, match=r"is not this artifact.*Plain torch is used"):
        assert LearnedJump.load(other).kernel == "torch"
