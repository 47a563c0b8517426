"""`mlff lammps run`, the launcher, LAMMPS from Python, and the example decks."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import lammps_runs
import requirements
import students
from lammps_runs import crystal, deck, write_structure
from mlff_engines.checkpoint import load_checkpoint
from mlff_engines.errors import ConfigError, MissingEngineError
from mlff_engines.validation.static.parity import reference
from mlff_lammps import build
from mlff_lammps.commands import lammps
from mlff_lammps.mliap import write_mliap
from mlff_lammps.run import run_deck

lammps_runs.require_build()
DECKS = requirements.REPOSITORY / "examples" / "lammps_decks"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decks")
    shutil.copy(students.artifact(folder, features=8), folder / "student.pt")
    write_mliap(folder / "student.pt", folder / "student.mliap")
    return folder


@pytest.fixture
def work(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the students and a structure."""
    for name in ("student.pt", "student.mliap"):
        shutil.copy(home / name, tmp_path)
    write_structure(tmp_path, crystal())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def printed(path: Path) -> list[dict[str, float]]:
    """The rows of every thermo table of a log."""
    rows, names = [], None
    for line in path.read_text().splitlines():
        words = line.split()
        if words[:1] == ["Step"]:
            names = words
        elif names and words and words[0].isdigit() and len(words) == len(names):
            rows.append(dict(zip(names, map(float, words), strict=True)))
        elif names and words[:1] == ["Loop"]:
            names = None
    return rows


@pytest.mark.parametrize(
    ("name", "ranks"), [("minimise", 1), ("nvt", 1), ("npt", 1), ("d3", 1), ("mpi", 2)], ids=lambda value: str(value)
)
def test_example_decks_run_under_mliap(work: Path, name: str, ranks: int) -> None:
    for path in DECKS.iterdir():
        shutil.copy(path, work)
    settings = ["-var", "way", "mliap", "-var", "range", "9.0", "-var", "steps", "2", "-var", "relax", "1"]
    assert run_deck(Path(f"water_{name}.in"), settings, ranks=ranks, mliap=True) == 0
    rows = printed(work / "log.lammps")
    assert np.isfinite([value for row in rows for value in row.values()]).all()
    first, last = rows[0], rows[-1]
    assert last["Step"] > first["Step"]
    if name == "minimise":
        assert last["PotEng"] < first["PotEng"]
        assert (work / "water_minimised.data").exists()
    if name == "npt":
        assert last["Volume"] != rows[-2]["Volume"]
    if name == "d3":
        assert last["c_d3"] < -1.0
        assert last["c_student"] + last["c_d3"] == pytest.approx(last["PotEng"], abs=1e-2)


@pytest.mark.parametrize("name", ["nvt", "d3"])
def test_example_decks_run_with_the_plugin(work: Path, name: str) -> None:
    for path in DECKS.iterdir():
        shutil.copy(path, work)
    assert run_deck(Path(f"water_{name}.in"), ["-var", "steps", "2", "-var", "relax", "1"]) == 0
    rows = printed(work / "log.lammps")
    assert np.isfinite([value for row in rows for value in row.values()]).all()
    assert rows[-1]["Step"] > rows[0]["Step"]


def test_launcher_needs_no_variables(work: Path, home: Path) -> None:
    """`lmp-mliap -in deck` from an empty environment, as a batch job may have it."""
    (work / "in.deck").write_text(deck("student.mliap", "H C O", after="run 0\nprint 'energy $(pe:%.15g)'"))
    launcher = build.write_launcher(build.find_build())
    assert launcher == Path(sys.executable).parent / "lmp-mliap"
    done = subprocess.run([launcher, "-in", "in.deck"], env={}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    expected = reference(load_checkpoint(home / "member-0")[0], 4.0)(crystal()).energy
    energy = float(done.stdout.rsplit("energy ", 1)[1].split()[0])
    assert energy == pytest.approx(expected, rel=1e-14)
    # a deck on standard input, which PYTHONUNBUFFERED would cut off
    with (work / "in.deck").open() as stream:
        again = subprocess.run(
            [launcher], env={"PYTHONUNBUFFERED": "1"}, stdin=stream, capture_output=True, text=True, timeout=300
        )
    assert float(again.stdout.rsplit("energy ", 1)[1].split()[0]) == energy


def test_python_hands_the_model_over_without_a_pickle(work: Path, home: Path) -> None:
    commands = deck("EXISTS", "H C O").splitlines()
    (work / "drive.py").write_text(
        f"""
from lammps import lammps
from lammps.mliap import activate_mliappy, load_unified

from mlff_lammps.mliap import MLIAP

lmp = lammps(cmdargs=["-log", "none", "-screen", "none"])
activate_mliappy(lmp)
load_unified(MLIAP("student.pt"))
lmp.commands_list({commands!r})
forces = lmp.numpy.extract_atom("f")[: lmp.get_natoms()].copy()
print("energy", repr(lmp.get_thermo("pe")), "largest", float(abs(forces).max()))
lmp.close()
"""
    )
    out = subprocess.run(
        [sys.executable, "-c", "import sys; from pathlib import Path; from mlff_lammps.run import run_deck\n"
         "sys.exit(run_deck(Path('drive.py'), mliap=True))"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert out.returncode == 0, out.stdout + out.stderr
    _, energy, _, largest = out.stdout.split()
    expected = reference(load_checkpoint(home / "member-0")[0], 4.0)(crystal())
    assert float(energy) == pytest.approx(expected.energy, rel=1e-14)
    assert float(largest) == pytest.approx(np.abs(expected.forces).max(), rel=1e-10)


def test_decks_that_cannot_run_are_refused_with_the_command_that_can(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"no deck at absent\.in"):
        run_deck(Path("absent.in"))
    (work / "in.deck").write_text(deck("student.mliap", "H C O"))
    with pytest.raises(ConfigError, match=r"mlff lammps run --mliap in\.deck"):
        run_deck(Path("in.deck"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(work / "empty"))
    with pytest.raises(MissingEngineError, match="mlff lammps build"):
        run_deck(Path("in.deck"), mliap=True)


def test_exit_code_is_that_of_lammps(work: Path) -> None:
    (work / "in.deck").write_text("units metal\nnonsense\n")
    run = CliRunner().invoke(lammps, ["run", "in.deck", "-log", "mine.log"])
    assert run.exit_code == 1
    assert "Unknown command: nonsense" in (work / "mine.log").read_text()
    (work / "in.deck").write_text('units metal\nprint "temperature ${T}"\n')
    assert CliRunner().invoke(lammps, ["run", "--np", "2", "in.deck", "-var", "T", "300"]).exit_code == 0
    assert "temperature 300" in (work / "log.lammps").read_text()


def test_cost_per_step(home: Path) -> None:
    """The script of docs/benchmarks.md."""
    script = requirements.REPOSITORY / "examples" / "benchmarks" / "lammps_cost.py"
    command = [sys.executable, str(script), str(home / "student.pt"), "--smoke"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| 24 ")]
    assert [row[1].strip() for row in rows] == ["artifact", "`pair_style mlff`", "`pair_style mliap`"]
    costs = np.array([[float(cell) for cell in row[2:]] for row in rows])
    assert np.isfinite(costs).all()
    assert (costs[:, [0, 1, -1]] > 0).all()  # processes, ghost factor, wall time; some kernels count CPU time by ticks
    assert costs[0, 1] == costs[1, 1] == 1.0  # the plug-in folds its ghosts
    assert costs[2, 1] > 5
