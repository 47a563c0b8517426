"""`pair_style mlff` with the package that torch compiles of an artifact: the eager model's numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import decks
import packages
from decks import TILTED, Deck, water
from mlff_engines.artifact import load
from mlff_engines.structure import Structure
from mlff_engines.validation.result import Claims, deviation
from mlff_engines.validation.static.systems import crystal
from mlff_lammps.engine import LAMMPSEngine
from packages import package
from requirements import require_compiler, require_engine

require_engine("lammps")
require_compiler()

HCO = ("H", "C", "O")


@pytest.fixture
def deck(tmp_path: Path) -> Deck:
    return decks.make_deck(tmp_path)


@pytest.fixture
def student(deck: Deck, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """PaiNN of float32, compiled into the cache of the session; the plug-in, in the user's, has been built."""
    with packages.cache(tmp_path_factory):
        path = packages.student(tmp_path_factory, "plain")
        load(path, kernel="compiled")
        yield path


@pytest.mark.parametrize("ranks", [1, 2])
def test_numbers_of_the_artifact(deck: Deck, student: Path, ranks: int) -> None:
    exact = load(student, kernel="torch", dtype="float64").evaluator(outside="ignore")
    tried = [
        water(2, shape=TILTED),
        crystal(Claims.of(load(student).manifest)),
        Structure(np.array([6]), np.zeros((1, 3))),
    ]
    for structure, found in zip(
        tried, deck.evaluate(f"mlff {student} kernel compiled", tried, elements=HCO, ranks=ranks), strict=True
    ):
        assert max(deviation(found, exact(structure)).values()) < 5e-5


def run(deck: Deck, style: object) -> str:
    structure = water(1)
    decks.write_data(deck.folder / "w.data", structure, HCO)
    return f"{decks.start(structure)}\nread_data w.data\npair_style mlff {style}\npair_coeff * * H C O\nrun 0"


def test_it_is_the_package_that_runs(deck: Deck, student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the deck or by the environment, and only then."""
    plain = "runs in plain torch"
    assert plain in deck.log(run(deck, student))
    assert plain not in deck.log(run(deck, f"{student} kernel compiled"))
    monkeypatch.setenv("MLFF_KERNEL", "compiled")
    assert plain not in deck.log(run(deck, student))
    assert plain in deck.log(run(deck, f"{student} kernel auto"))
    monkeypatch.setenv("MLFF_KERNEL", "fused")
    assert plain in deck.log(run(deck, student))


@pytest.mark.fault("A7")
@pytest.mark.parametrize("ranks", [1, 2])
def test_package_that_is_missing_or_damaged(
    deck: Deck, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    content, digest = package(student).read_bytes(), package(student).with_suffix(".sha256").read_text()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    error = deck.error(run(deck, f"{student} kernel compiled"), ranks=ranks)
    assert f"there is no compiled form of {student} at {package(student)}" in error
    assert f"Compile it here: mlff-export {student} --compile --dtype float32" in error
    package(student).parent.mkdir(parents=True)
    package(student).with_suffix(".sha256").write_text(digest)
    package(student).write_bytes(content)
    deck.log(run(deck, f"{student} kernel compiled"), ranks=ranks)
    middle = len(content) // 2
    package(student).write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    error = deck.error(run(deck, f"{student} kernel compiled"), ranks=ranks)
    assert f"{package(student)} is damaged. Delete it. Compile it here: mlff-export" in error


def test_another_processor(deck: Deck, student: Path) -> None:
    content = deck.plugin.read_bytes()
    assert content.count(b" fma ") == 1
    deck.plugin = deck.folder / "mlffplugin.so"
    deck.plugin.write_bytes(content.replace(b" fma ", b" fmz "))
    error = deck.error(run(deck, f"{student} kernel compiled"))
    assert "compiled models of this plug-in are for a processor with fmz, which this one lacks; or use kernel" in error


def test_judge_runs_what_python_would(deck: Deck, student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFF_KERNEL", "compiled")
    engine = LAMMPSEngine(student, folder=deck.folder / "judge")
    assert engine.artifact == student
    structure = water(2, shape=TILTED)
    expected = load(student, kernel="compiled").evaluator(outside="ignore")(structure)
    assert max(deviation(engine.evaluate(structure), expected).values()) < 1e-6
    engine.close()
    assert "kernel compiled" in (deck.folder / "judge" / "log.lammps").read_text()
