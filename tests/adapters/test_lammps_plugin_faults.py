"""What `pair_style mlff` refuses: each with a message in log.lammps and a non-zero exit on every rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import decks
import forged
import students
from broken_engines import ARGON_KRYPTON, NOBLE
from decks import Deck
from mlff_engines.checkpoint import Domain, save_checkpoint
from mlff_engines.export import export
from mlff_engines.structure import Structure
from requirements import require_engine

require_engine("lammps")

HCO = ("H", "C", "O")
PAIR = Structure(np.array([1, 6, 8, 1]), np.array([[0.0, 0, 0], [1.2, 0, 0], [9.0, 0, 0], [9.8, 0.1, 0]]))


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    domain = Domain(elements=list(HCO), min_distances={"C-H": 1.1, "H-O": 0.7})
    return students.artifact(tmp_path_factory.mktemp("student"), domain=domain)


@pytest.fixture
def deck(tmp_path: Path) -> Deck:
    return decks.make_deck(tmp_path)


def given(
    deck: Deck,
    style: object,
    *,
    structure: Structure = PAIR,
    coeff: str = "* * H C O",
    start: str = "units metal\natom_style atomic\nboundary f f f",
    then: str = "run 0",
    masses: tuple[float, ...] = (),
) -> str:
    """An input around `pair_style mlff`, in which something can be wrong."""
    decks.write_data(deck.folder / "x.data", structure, HCO, masses)
    return f"{start}\nread_data x.data\npair_style mlff {style}\npair_coeff {coeff}\n{then}"


def test_the_right_input_runs(deck: Deck, student: Path) -> None:
    """And what is wrong in the inputs below is wrong there alone."""
    log = deck.log(given(deck, student))
    assert "WARNING: pair_style mlff" not in log


@pytest.mark.fault("A1", "L6")
@pytest.mark.parametrize("ranks", [1, 2])
def test_missing_artifact(deck: Deck, ranks: int) -> None:
    assert "no artifact at nowhere.pt; make one with: mlff-export" in deck.error(given(deck, "nowhere.pt"), ranks=ranks)


@pytest.mark.fault("A2", "A3", "A4", "A5", "A7", "A10")
def test_files_that_are_no_artifact(deck: Deck, student: Path) -> None:
    content = student.read_bytes()
    (deck.folder / "short.pt").write_bytes(content[: len(content) // 2])
    (deck.folder / "pickle.pt").write_bytes(b"\x80\x04 and so on")
    (deck.folder / "text.pt").write_text("hello")
    # one weight
    position = content.index(b"data/0") + 500
    (deck.folder / "other.pt").write_bytes(
        content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]
    )
    forged.rewritten(student, deck.folder / "golden.pt", swapped_golden, rehash=False)
    forged.remanifested(student, deck.folder / "newer.pt", lambda m: m.update(schema_version=99))
    forged.remanifested(student, deck.folder / "blank.pt", lambda m: m.pop("cutoff"))
    forged.remanifested(student, deck.folder / "unitless.pt", lambda m: m.pop("units"))
    forged.rewritten(student, deck.folder / "operator.pt", unknown_operator)
    for name, message in {
        "short.pt": "short.pt is a truncated artifact",
        "pickle.pt": "pickle.pt is a pickle",
        "text.pt": "text.pt is no artifact (5 bytes)",
        str(student.parent / "member-0"): "is a checkpoint, not an artifact; export it: mlff-export",
        "other.pt": "other.pt was altered or damaged: SHA-256 of its content is",
        "golden.pt": "golden.pt was altered or damaged: SHA-256 of its content is",
        "newer.pt": "newer.pt has schema version 99; this plug-in reads up to 1: upgrade mlff-engines",
        "blank.pt": "key 'cutoff' not found. Export the artifact again",
        "unitless.pt": "key 'units' not found. Export the artifact again",
        "operator.pt": "operator.pt uses the operator aten::no_such_operator",
    }.items():
        assert message in deck.error(given(deck, name)), name


def swapped_golden(name: str, content: bytes) -> bytes:
    return content.replace(b"0", b"1") if name.endswith("golden.json") else content


def unknown_operator(name: str, content: bytes) -> bytes:
    return content.replace(b"torch.silu", b"torch.no_such_operator") if name.endswith(".py") else content


@pytest.mark.fault("A6")
def test_artifact_of_another_torch(deck: Deck, student: Path) -> None:
    older = forged.remanifested(student, deck.folder / "older.pt", lambda m: m.update(torch_version="1.9.0+cpu"))
    log = deck.log(given(deck, older))
    assert "made with torch 1.9.0+cpu and runs on" in log
    assert "mlff verify" in log


@pytest.mark.fault("A9")
def test_weights_that_overflow_in_a_smaller_dtype(deck: Deck) -> None:
    config = ARGON_KRYPTON.model_copy(update={"epsilon": {"Ar": 1e39, "Kr": 0.01}})
    domain = Domain(elements=["Ar", "Kr"])
    path = argon(deck.folder, config, domain, dtype="float64")
    text = given(deck, f"{path} dtype float32", coeff="* * Ar Ar Kr", masses=(39.9, 39.9, 83.8))
    assert "is not finite in float32" in deck.error(text)


def argon(folder: Path, config: object = ARGON_KRYPTON, domain: Domain | None = None, **options: object) -> Path:
    from mlff_engines.models.registry import build_model

    model = build_model(config, NOBLE.elements, NOBLE.e0)  # type: ignore[arg-type]
    domain = domain or Domain(elements=list(NOBLE.elements))
    save_checkpoint(folder / "lj", model, config, domain, {"teacher": "none", "frames": {}})  # type: ignore[arg-type]
    export([folder / "lj"], folder / "lj.pt", overwrite=True, **options)  # type: ignore[arg-type]
    return folder / "lj.pt"


@pytest.mark.fault("L1")
def test_units(deck: Deck, student: Path) -> None:
    text = given(deck, student, start="units lj\natom_style atomic\nboundary f f f")
    assert "units lj; allowed: metal, real" in deck.error(text)


@pytest.mark.fault("L2")
@pytest.mark.parametrize("coeff", ["* * H C", "* * H C O O"])
def test_number_of_elements(deck: Deck, student: Path, coeff: str) -> None:
    error = deck.error(given(deck, student, coeff=coeff))
    assert "one element for each of the 3 atom types" in error
    assert "The model knows H, C, O" in error
    if coeff == "* * H C":
        assert "type 1 -> H\n  type 2 -> C\n  type 3 -> ?" in error


@pytest.mark.fault("L3")
def test_masses_of_other_elements(deck: Deck, student: Path) -> None:
    swapped = deck.error(given(deck, student, masses=(15.999, 12.011, 1.008)))
    assert "type 1 is mapped to H but has mass 15.999, that of O: correct the order of elements" in swapped
    heavy = deck.log(given(deck, student, masses=(3.024, 12.011, 15.999)))
    assert "type 1 is mapped to H but has mass 3.024; the element has 1.008" in heavy


@pytest.mark.fault("L4")
def test_types_without_element(deck: Deck, student: Path) -> None:
    assert "maps type 2 to NULL: its atoms would feel nothing" in deck.error(given(deck, student, coeff="* * H NULL O"))


@pytest.mark.fault("S1")
def test_unknown_element(deck: Deck, student: Path) -> None:
    error = deck.error(given(deck, student, coeff="* * H C Fe"))
    assert "maps type 3 to Fe, which the model does not know; it was trained for H, C, O" in error


@pytest.mark.fault("S4", "L6")
@pytest.mark.parametrize("ranks", [1, 2])
def test_coincident_atoms_end_all_ranks(deck: Deck, student: Path, ranks: int) -> None:
    """With two ranks the fault is on the second alone."""
    positions = PAIR.positions.copy()
    positions[3] = positions[2] + 1e-5
    text = given(deck, student, structure=replace(PAIR, positions=positions))
    error = deck.error(f"processors {ranks} 1 1\n{text}", ranks=ranks)
    assert ("rank 1: " in error) == (ranks == 2)
    assert "atoms 3 (O) and 4 (H) coincide: 1.73205e-05 Angstrom apart" in error


@pytest.mark.fault("S5")
def test_atoms_closer_than_in_training(deck: Deck, student: Path) -> None:
    positions = PAIR.positions.copy()
    positions[1, 0] = 1.0
    close = replace(PAIR, positions=positions)
    said = "atoms 1 (H) and 2 (C) are 1 Angstrom apart; the shortest distance of their elements in the training data is"
    assert deck.log(given(deck, student, structure=close, then="run 0\nrun 0")).count(said) == 1
    assert said in deck.error(given(deck, f"{student} outside error", structure=close))
    assert said not in deck.log(given(deck, f"{student} outside ignore", structure=close))
    # whoever sees it, rank 0 writes it into the log
    positions[3] = positions[2] + [0.5, 0, 0]
    text = given(deck, student, structure=replace(PAIR, positions=positions))
    log = deck.log(f"processors 2 1 1\n{text}", ranks=2)
    assert f"rank 0: {said} 1.1: the model extrapolates" in log
    assert "rank 1: atoms 3 (O) and 4 (H) are 0.5 Angstrom apart" in log


@pytest.mark.fault("M1")
def test_result_that_is_not_finite(deck: Deck) -> None:
    """Lennard-Jones in float32 overflows where atoms all but coincide."""
    path = argon(deck.folder, dtype="float32")
    positions = np.array([[0.0, 0, 0], [4.0, 0, 0], [4.0, 4.0, 0], [4.0, 4.002, 0]])
    text = given(
        deck,
        f"{path} outside ignore",
        structure=replace(PAIR, positions=positions),
        coeff="* * Ar Ar Kr",
        masses=(39.9, 39.9, 83.8),
    )
    error = deck.error(text)
    assert "the model's energy or force is not finite on atom 3 (Kr) at step 0" in error


@pytest.mark.fault("S12")
def test_charge_without_an_input(deck: Deck, student: Path) -> None:
    error = deck.error(given(deck, f"{student} charge 1"))
    assert "charge 1 is not supported: the model has no charge input and was trained at 0" in error


@pytest.mark.fault("M4")
def test_options(deck: Deck, student: Path) -> None:
    for option, message in {
        "devise cpu": "devise cpu is unknown; allowed: device cpu|cuda|cuda:N, threads N",
        "threads 0": "threads 0; allowed: 1 or more",
        "threads": "no value follows threads",
        "dtype half": "dtype half is unknown; allowed",
        "device abacus": "unknown device abacus; allowed: cpu, cuda, cuda:1",
        "device cuda:77": "device cuda:77 was asked for but",
    }.items():
        assert message in deck.error(given(deck, f"{student} {option}")), option


def test_settings_under_which_the_model_misses_neighbours(deck: Deck, student: Path) -> None:
    included = "group h type 1\natom_modify first h\nneigh_modify include h"
    atomic, bonded = "units metal\natom_style atomic", "units metal\natom_style molecular"
    for start, then, message in [
        (f"newton off\n{atomic}", "run 0", "needs newton on"),
        (atomic, f"{included}\nrun 0", "`neigh_modify include` leaves atoms without"),
        (bonded, "run 0", "special_bonds takes bonded neighbours off the list"),
    ]:
        text = given(deck, student, start=f"{start}\nboundary f f f", then=then)
        if start == bonded:
            content = (deck.folder / "x.data").read_text().replace("Atoms # atomic\n\n", "Atoms # molecular\n\n")
            head, atoms = content.split("# molecular\n\n")
            lines = [line.split(" ", 1) for line in atoms.splitlines()]
            with_molecules = "\n".join(f"{tag} 1 {rest}" for tag, rest in lines)
            (deck.folder / "x.data").write_text(f"{head}# molecular\n\n{with_molecules}\n")
            deck.log(text.replace("pair_style", "special_bonds lj/coul 1 1 1\npair_style"))
        assert message in deck.error(text), message
    nameless = f"""{atomic}
atom_modify id no
region box block 0 9 0 9 0 9
create_box 3 box
create_atoms 1 single 1 1 1
mass * 1.0
pair_style mlff {student}
pair_coeff * * H C O
run 0"""
    assert "needs atom ids: remove `atom_modify id no`" in deck.error(nameless)
    excluded = given(deck, student, then="neigh_modify exclude type 1 1\nrun 0")
    assert "`neigh_modify exclude` hides neighbours from the model" in deck.log(excluded)
    grouped = given(deck, student, then="neighbor 2.0 multi\ncomm_modify mode multi\nrun 0")
    assert "needs one ghost cutoff: use comm_modify mode single" in deck.error(grouped, ranks=2)


@pytest.mark.fault("L8")
def test_dangerous_neighbour_builds(deck: Deck, student: Path) -> None:
    fast = """velocity all create 30000 1
fix 1 all nve
timestep 0.0005
neighbor 0.2 bin
neigh_modify every 10 delay 10
run 30"""
    log = deck.log(given(deck, f"{student} outside ignore", then=fast))
    assert "dangerous neighbor builds: some forces missed neighbours" in log
