"""What a wrong deck, model or LAMMPS is told under `pair_style mliap`, on every rank and in log.lammps."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

import broken_mliap
import lammps_runs
import students
from lammps_runs import Ran, crystal, deck, lmp, write_structure
from mlff_engines.checkpoint import Domain
from mlff_engines.structure import Structure
from mlff_lammps.mliap import MLIAP, write_mliap

lammps_runs.require_build()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    shutil.copy(students.artifact(folder, features=8), folder / "student.pt")
    write_mliap(folder / "student.pt", folder / "student.mliap")
    return folder


@pytest.fixture
def work(tmp_path: Path, home: Path) -> Path:
    write_structure(tmp_path, crystal())
    shutil.copy(home / "student.mliap", tmp_path)
    return tmp_path


def refused(ran: Ran) -> str:
    """The log of a run that must have failed, cleanly."""
    assert ran.code > 0, ran.output  # neither a success nor a signal
    assert "ERROR" in ran.log
    return ran.log


@pytest.mark.fault("L1")
def test_units_other_than_metal_and_real_are_refused_at_once(work: Path) -> None:
    log = refused(lmp(work, deck("student.mliap", "H C O", units="lj"), ranks=2))
    assert "units lj; this model works with units metal or units real" in log
    assert "pair_coeff *" not in log.split("units lj;")[1]


@pytest.mark.fault("L2")
@pytest.mark.parametrize("elements", ["H", "H C", "H C O H"])
def test_wrong_number_of_elements_is_told_with_the_command_that_fits(work: Path, elements: str) -> None:
    log = refused(lmp(work, deck("student.mliap", elements)))
    assert f"names {len(elements.split())} elements for 3 atom types" in log
    assert "needs: pair_coeff * * H C O (type 1, 2, ... = one of H C O)" in log


@pytest.mark.fault("S1")
def test_element_unknown_to_the_model_is_named(work: Path) -> None:
    assert "pair_coeff gives type 2 the element N, unknown to the model" in refused(
        lmp(work, deck("student.mliap", "H N O"))
    )


@pytest.mark.fault("L3")
def test_masses_of_other_elements_are_refused(work: Path) -> None:
    log = refused(lmp(work, deck("student.mliap", "H O C"), ranks=2))
    assert "maps type 2 to O, but its mass is 12.011, that of C (1 = H, 2 = O, 3 = C)" in log


@pytest.mark.fault("L3")
def test_masses_of_no_other_element_are_legal_and_told(work: Path) -> None:
    ran = lmp(work, deck("student.mliap", "H C O", after="mass 1 2.014\nrun 0\nrun 0"))
    assert ran.code == 0, ran.output
    assert ran.log.count("WARNING: pair_coeff maps type 1 to H, but its mass is 2.014; the element has 1.008") == 1


@pytest.mark.fault("L4")
def test_null_types_are_refused(work: Path) -> None:
    assert "pair_coeff maps a type to NULL: give each an element" in refused(
        lmp(work, deck("student.mliap", "H NULL O"))
    )
    hybrid = deck("student.mliap", "H C O").replace("pair_style mliap", "pair_style hybrid/overlay zero 4.0 mliap")
    hybrid = hybrid.replace("pair_coeff * * H C O", "pair_coeff * * zero\npair_coeff * * mliap H NULL O")
    assert "maps type 2 to NULL (1 = H, 2 = NULL, 3 = O)" in refused(lmp(work, hybrid, ranks=2))


@pytest.mark.fault("L5", "S2")
def test_without_pairs_atoms_have_their_own_energy(work: Path) -> None:
    far = np.array([[0.0, 0.0, 0.0], [30.0, 0.0, 0.0], [60.0, 0.0, 0.0]])
    write_structure(work, Structure(np.array([1, 6, 8]), far, 90.0 * np.eye(3), np.ones(3, dtype=bool)))
    ran = lmp(work, deck("student.mliap", "H C O", after="run 0\nprint 'energy $(pe:%.15g)'"), ranks=2)
    assert ran.code == 0, ran.output
    energy = float(ran.log.rsplit("energy ", 1)[1].split()[0])
    assert energy == pytest.approx(sum(students.E0.values()), abs=1e-9)


@pytest.mark.fault("L6")
def test_exception_on_one_rank_ends_all_with_its_message(work: Path, home: Path) -> None:
    log = refused(broken(work, home, broken_mliap.Raises, "timestep 0.0001\nfix 1 all nve\nrun 50"))
    assert "ERROR: pair_style mliap: rank 1: RuntimeError: injected" in log


@pytest.mark.fault("L6", "S4")
def test_coincident_atoms_on_one_rank_end_all_and_are_named(work: Path) -> None:
    positions = np.array([[1.0, 1.0, 1.0], [2.0, 1.0, 1.0], [31.0, 1.0, 1.0], [31.0, 1.0, 1.0]])
    write_structure(work, Structure(np.array([1, 6, 8, 8]), positions, 40.0 * np.eye(3), np.ones(3, dtype=bool)))
    text = deck("student.mliap", "H C O", before="processors 2 1 1")
    log = refused(lmp(work, text, ranks=2))
    assert "rank 1: atoms 3 (O) and 4 (O) coincide: 0 Å apart. Move one of them" in log


@pytest.mark.fault("S5")
@pytest.mark.parametrize("ranks", [1, 2])
def test_atoms_closer_than_in_training(work: Path, ranks: int) -> None:
    """Told once, whichever rank sees it."""
    domain = Domain(elements=list(students.E0), min_distances={"C-H": 1.1, "H-O": 0.7})
    write_mliap(students.artifact(work / "near", domain=domain), work / "near.mliap")
    positions = np.array([[1.0, 1.0, 1.0], [3.0, 1.0, 1.0], [31.0, 1.0, 1.0], [32.0, 1.0, 1.0]])
    write_structure(work, Structure(np.array([1, 8, 6, 1]), positions, 40.0 * np.eye(3), np.ones(3, dtype=bool)))
    text = deck("near.mliap", "H C O", before=f"processors {ranks} 1 1", after="run 0\nrun 0")
    log = lmp(work, text, ranks=ranks).log
    said = "are 1.000 Å apart; the shortest distance of their elements in the training data is 1.100 Å"
    assert log.count(said) == 1
    assert ("WARNING: pair_style mliap: rank 1: atoms " in log) == (ranks == 2)


@pytest.mark.fault("L7")
def test_too_few_ghosts_are_refused_with_the_cutoff_needed(work: Path) -> None:
    short = deck("student.mliap", "H C O").replace("cutoff 10.0", "cutoff 8.3")
    log = refused(lmp(work, short, ranks=2))
    assert "reach 8.3 Å beyond each domain, and this model needs 8.5 Å (2 layers x 4 Å + 0.5 Å skin)" in log
    assert "Add to the deck: comm_modify cutoff 8.5" in log
    assert lmp(work, short.replace("cutoff 8.3", "cutoff 8.5")).code == 0


@pytest.mark.fault("L7")
def test_pairs_of_ghosts_must_be_asked_for(work: Path) -> None:
    log = refused(lmp(work, deck("student.mliap", "H C O").replace("student.mliap 1", "student.mliap 0")))
    assert "write `pair_style mliap unified FILE 1`" in log


@pytest.mark.fault("L7")
def test_lammps_that_drops_the_forces_of_ghosts_is_refused(work: Path, home: Path) -> None:
    assert "this LAMMPS does not pass the forces of all pairs on" in refused(
        broken(work, home, broken_mliap.Drops, "run 0")
    )


@pytest.mark.fault("L8")
def test_stale_neighbour_list_ends_the_run(work: Path) -> None:
    text = deck("student.mliap", "H C O", after="velocity all create 30000 1\nfix 1 all nve\nrun 100")
    log = refused(lmp(work, text.replace("every 1 delay 0 check yes", "every 100 delay 0 check no"), ranks=2))
    assert "since the neighbour list was built" in log
    assert "neigh_modify every 1 delay 0 check yes" in log


@pytest.mark.fault("L8", "S14")
def test_bonded_pairs_taken_out_of_the_list_are_refused(work: Path) -> None:
    data = (work / "atoms.data").read_text().replace("3 atom types", "3 atom types\n1 bonds\n1 bond types")
    head, atoms = data.split("Atoms # atomic\n\n")
    rows = [f"{n} 1 {rest}" for n, rest in (row.split(" ", 1) for row in atoms.splitlines() if row)]
    (work / "atoms.data").write_text("\n".join([f"{head}Atoms # bond", "", *rows, "", "Bonds", "", "1 1 1 2", ""]))
    text = deck("student.mliap", "H C O").replace("atom_style atomic", "atom_style bond")
    text = text.replace("comm_modify", "bond_style harmonic\nbond_coeff 1 0.0 1.0\ncomm_modify")
    assert "special_bonds lj/coul 1.0 1.0 1.0" in refused(lmp(work, text))
    ran = lmp(work, text.replace("bond_style", "special_bonds lj/coul 1.0 1.0 1.0\nbond_style"))
    assert ran.code == 0, ran.output


@pytest.mark.fault("A1")
def test_missing_artifact_is_told_on_all_ranks(work: Path, home: Path) -> None:
    shutil.copy(home / "student.pt", work / "gone.pt")
    write_mliap(work / "gone.pt", work / "gone.mliap")
    (work / "gone.pt").unlink()
    assert f"no artifact at {work / 'gone.pt'}" in refused(lmp(work, deck("gone.mliap", "H C O"), ranks=2))


@pytest.mark.fault("A3")
def test_another_artifact_under_the_same_name_is_refused(work: Path, home: Path) -> None:
    shutil.copy(home / "student.pt", work / "moving.pt")
    write_mliap(work / "moving.pt", work / "moving.mliap")
    students.artifact(work / "other", dtype="float32").replace(work / "moving.pt")
    log = refused(lmp(work, deck("moving.mliap", "H C O")))
    assert "is another artifact than the one this file was written for" in log


def broken(work: Path, home: Path, kind: type[MLIAP], after: str) -> Ran:
    """A run of two ranks with a model of `broken_mliap`."""
    (work / "broken.mliap").write_bytes(pickle.dumps(kind(home / "student.pt")))
    path = os.pathsep.join([lammps_runs.require_build().environment["PYTHONPATH"], str(Path(__file__).parent.parent)])
    return lmp(work, deck("broken.mliap", "H C O", after=after), ranks=2, PYTHONPATH=path)
