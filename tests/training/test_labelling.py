from __future__ import annotations

import json
import multiprocessing
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator

from mlff_engines.errors import DataError, StructureError, TeacherError
from mlff_training.data.xyz import read_xyz
from mlff_training.teachers.calculator import hessian_row
from mlff_training.teachers.config import TeacherConfig
from mlff_training.teachers.journal import Journal
from mlff_training.teachers.labelling import label
from mlff_training.teachers.make import make_teacher

TOYS = Path(__file__).parent


@pytest.fixture(autouse=True)
def _toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOYS))


def toy(log: Path, **options: object) -> TeacherConfig:
    return TeacherConfig(name="toy_teachers:Springs", options={"log": str(log), **options})


def helium(count: int, start: float = 0.0) -> list[Atoms]:
    return [Atoms("He", positions=[[start + n, 0, 0]], info={"group": f"g{n % 3}"}) for n in range(count)]


def calls(log: Path) -> list[float]:
    return [float(line.split()[1]) for line in log.read_text().splitlines()] if log.exists() else []


def test_labels_are_those_of_the_teacher(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frames = []
    for number in range(6):
        atoms = molecule("CH3CH2OH" if number % 2 else "H2O")
        atoms.positions += rng.normal(0, 0.05, atoms.positions.shape)
        atoms.info.update(group=f"t{number}", charge=-1.0 if number == 2 else 0.0)
        atoms.info["multiplicity"] = 2 if number == 2 else 1
        frames.append(atoms)
    labelled = label(frames, TeacherConfig(), tmp_path / "labels.xyz", workers=2, progress=False)
    for atoms, given, read in zip(labelled, frames, read_xyz(tmp_path / "labels.xyz"), strict=True):
        reference = make_teacher(TeacherConfig())
        for frame in (atoms, read):
            np.testing.assert_array_equal(frame.positions, given.positions)
            assert frame.info["group"] == given.info["group"]
            assert frame.info["charge"] == given.info["charge"]
            assert frame.info["level"] == "GFN2-xTB"
            # bitwise: a label depends on its structure alone, not on the worker's history
            assert frame.get_potential_energy() == reference.get_property("energy", given)
            np.testing.assert_array_equal(frame.get_forces(), reference.get_property("forces", given))
            np.testing.assert_array_equal(frame.calc.results["energies"], reference.get_property("energies", given))
        assert given.calc is None


EXECUTORS: dict[str, Callable[[], Executor]] = {
    "threads": lambda: ThreadPoolExecutor(2),
    "processes": lambda: ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")),
}


@pytest.mark.parametrize("kind", EXECUTORS)
def test_any_executor(kind: str, tmp_path: Path) -> None:
    with EXECUTORS[kind]() as executor:
        labelled = label(helium(5), toy(tmp_path / "log"), tmp_path / "out.xyz", executor=executor, progress=False)
    assert [atoms.get_potential_energy() for atoms in labelled] == [0, 0.5, 2, 4.5, 8]
    assert len(calls(tmp_path / "log")) == 5


def test_nothing_is_paid_for_twice(tmp_path: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "out.xyz"
    frames = helium(4) + helium(2)  # two are asked for twice
    first = label(frames, toy(log), out, progress=False)
    assert sorted(calls(log)) == [0, 1, 2, 3]
    assert [atoms.get_potential_energy() for atoms in first] == [0, 0.5, 2, 4.5, 0, 0.5]
    label([*frames, *helium(1, start=7)], toy(log), out, progress=False)  # a longer list: only what is new
    assert sorted(calls(log)) == [0, 1, 2, 3, 7]
    label(first, toy(log), tmp_path / "other.xyz", progress=False)  # labelled at this level already
    assert len(calls(log)) == 5
    label(first, toy(log, k=2.0), tmp_path / "other.xyz", progress=False)  # another teacher
    assert len(calls(log)) == 9


@pytest.mark.fault("T4")
def test_nan_is_never_a_label(tmp_path: Path) -> None:
    log = tmp_path / "log"
    given = helium(1)[0]
    given.info["level"] = toy(log).level_of_theory
    given.calc = SinglePointCalculator(given, energy=np.nan, forces=np.zeros((1, 3)))
    (relabelled,) = label([given], toy(log), tmp_path / "out.xyz", progress=False)
    assert relabelled.get_potential_energy() == 0
    with pytest.raises(TeacherError, match=r"failed on 1 of 1.*not finite"):
        label(helium(1, start=200), toy(log, trouble="nan"), tmp_path / "nan.xyz", progress=False)
    assert not (tmp_path / "nan.xyz").exists()


def test_failures_are_listed_and_tried_again(tmp_path: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "out.xyz"
    frames = [*helium(9), *helium(1, start=200)]
    labelled = label(frames, toy(log, trouble="raise"), out, progress=False)
    assert len(labelled) == len(read_xyz(out)) == 9
    (failure,) = json.loads((tmp_path / "out.xyz.failed.json").read_text())
    assert failure["structure"] == 9
    assert "SCF not converged" in failure["reason"]
    label(frames, toy(log, trouble="raise"), out, progress=False)
    assert calls(log).count(200) == 2
    assert len(calls(log)) == 11


@pytest.mark.parametrize("trouble", ["raise", "exit"])
def test_too_many_failures_are_an_error(trouble: str, tmp_path: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "out.xyz"
    out.write_text("what was here")
    frames = [*helium(5), *helium(200, start=200)]
    with pytest.raises(TeacherError, match=r"failed on \d+ of 205 structures, more than the 1% allowed; structure 5"):
        label(frames, toy(log, trouble=trouble, seconds=0.02), out, max_failed=0.01, progress=False)
    assert out.read_text() == "what was here"
    assert len(calls(log)) < 205  # it does not try all of them first, however late it hears of the third failure
    before = len(calls(log))
    label(frames[:5], toy(log, trouble=trouble, seconds=0.02), out, progress=False)
    assert len(calls(log)) == before  # the good ones were kept


def test_hessian_rows(tmp_path: Path) -> None:
    frames = []
    for seed in range(4):
        frames.append(molecule("H2O"))
        frames[-1].rattle(0.05, seed=seed)
    out = tmp_path / "out.xyz"
    labelled = label(frames, TeacherConfig(), out, hessian_rows=True, seed=1, progress=False)
    again = label(frames, TeacherConfig(), tmp_path / "again.xyz", hessian_rows=True, seed=1, progress=False)
    other = label(frames, TeacherConfig(), tmp_path / "other.xyz", hessian_rows=True, seed=2, progress=False)
    indices = [atoms.info["hessian_index"] for atoms in labelled]
    assert indices == [atoms.info["hessian_index"] for atoms in again]
    assert indices != [atoms.info["hessian_index"] for atoms in other]
    assert len(set(indices)) > 1
    calculator = make_teacher(TeacherConfig())
    for atoms in read_xyz(out):
        index = atoms.info["hessian_index"]
        expected = hessian_row(calculator, atoms, index)
        np.testing.assert_allclose(atoms.arrays["hessian_row"], expected, atol=1e-3 * np.abs(expected).max())
        assert np.abs(expected.sum(axis=0)).max() < 1e-2 * np.abs(expected).max()  # translation
    # rows for structures that have their labels: the labels stay
    added = label(labelled, TeacherConfig(), tmp_path / "added.xyz", hessian_rows=True, seed=3, progress=False)
    assert [a.get_potential_energy() for a in added] == [a.get_potential_energy() for a in labelled]


@pytest.mark.fault("S12")
def test_unusable_charge_is_refused_before_any_call(tmp_path: Path) -> None:
    frames = helium(3)
    frames[2].info["charge"] = 1
    with pytest.raises(StructureError, match=r"structure 2: He has charge 1"):
        label(frames, toy(tmp_path / "log"), tmp_path / "out.xyz", progress=False)
    assert not calls(tmp_path / "log")


@pytest.mark.fault("M6")
def test_missing_teacher_is_one_error_and_not_many_failures(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"not installed.*pip install absent"):
        label(helium(3), TeacherConfig(name="absent:Calculator"), tmp_path / "out.xyz", progress=False)


def test_no_structures(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no structures"):
        label([], TeacherConfig(), tmp_path / "out.xyz")


def test_two_runs_into_one_output(tmp_path: Path) -> None:
    with Journal(tmp_path / "out.xyz.journal"), pytest.raises(DataError, match="another run is writing"):
        label(helium(1), toy(tmp_path / "log"), tmp_path / "out.xyz", progress=False)


def test_torn_last_record_is_redone(tmp_path: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "out.xyz"
    first = label(helium(5), toy(log), out, progress=False)
    journal = tmp_path / "out.xyz.journal"
    journal.write_bytes(journal.read_bytes()[:-40])
    second = label(helium(5), toy(log), out, progress=False)
    assert len(calls(log)) == 6
    assert [a.get_potential_energy() for a in first] == [a.get_potential_energy() for a in second]


def test_damaged_record_is_redone(tmp_path: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "out.xyz"
    label(helium(5), toy(log), out, progress=False)
    journal = tmp_path / "out.xyz.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b"energy", b"enemy!")
    journal.write_bytes(b"".join(lines))
    with pytest.warns(UserWarning, match="1 damaged record"):
        label(helium(5), toy(log), out, progress=False)
    assert len(calls(log)) == 6


SCRIPT = """
    import signal, sys
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background, shells have it ignored
    sys.path.insert(0, {toys!r})
    from ase import Atoms
    from pathlib import Path
    from mlff_training.teachers.labelling import label
    from mlff_training.teachers.config import TeacherConfig
    frames = [Atoms("He", positions=[[n, 0, 0]]) for n in range(100)]
    options = {{"log": {log!r}, "seconds": 0.05}}
    label(frames, TeacherConfig(name="toy_teachers:Springs", options=options), Path({out!r}), workers=2)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_run_loses_no_finished_label(number: signal.Signals, tmp_path: Path) -> None:
    log, out, journal = tmp_path / "log", tmp_path / "out.xyz", tmp_path / "out.xyz.journal"
    script = SCRIPT.format(toys=str(TOYS), log=str(log), out=str(out))
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as run:
        assert run.stderr is not None
        while not journal.exists() or journal.read_bytes().count(b"\n") < 8:
            assert run.poll() is None, run.stderr.read()
            time.sleep(0.01)
        run.send_signal(number)
        assert run.wait(timeout=20) != 0
    assert not out.exists()
    finished = journal.read_bytes().count(b"\n")
    assert 8 <= finished < 100
    deadline = time.monotonic() + 5
    teachers = {int(line.split()[0]) for line in log.read_text().splitlines()}
    assert len(teachers) == 2
    while any(Path(f"/proc/{pid}").exists() for pid in teachers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in teachers)
    begun = len(calls(log))
    assert begun - finished <= 2 * 2  # what the two teachers were at, or had just answered
    frames = [Atoms("He", positions=[[n, 0, 0]]) for n in range(100)]
    config = TeacherConfig(name="toy_teachers:Springs", options={"log": str(log), "seconds": 0.05})
    labelled = label(frames, config, out, workers=2, progress=False)
    assert len(calls(log)) - begun == 100 - finished  # only the rest
    assert [atoms.get_potential_energy() for atoms in labelled] == [0.5 * n**2 for n in range(100)]
    assert out.stat().st_size > 0
