"""The benchmark of large steps with a dear potential: a row for every scheme, kept between calls."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from ase import Atoms

import students
from mlff_engines.bench.page import markers
from mlff_engines.bench.systems import named
from requirements import REPOSITORY, require_engine

require_engine("ase")


BENCHMARKS = REPOSITORY / "examples" / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("large_steps_ase")


def test_each_scheme_gets_a_row(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verlet, unsafe = script.Scheme(1.0, 1.0), script.Scheme(1.0, 8.0, rigid=False)
    monkeypatch.setattr(script, "SCHEMES", [verlet, unsafe])
    monkeypatch.setattr(script, "TURN", 8.0)
    monkeypatch.setattr(script, "SETTLING", 2.0)
    out, page = tmp_path / "out", tmp_path / "page.md"
    page.write_text("\n".join(markers(script.section("aspirin"))))
    student = students.artifact(tmp_path)
    words = [str(student), "-o", str(out), "--starts", "2", "--picoseconds", "0.016", "--page", str(page)]
    monkeypatch.setattr(sys, "argv", ["large_steps_ase.py", *words])
    script.main()
    capsys.readouterr()
    report = json.loads((out / "report.json").read_text())
    moved, refused = report["rows"]
    assert moved["scheme"] == verlet.name
    assert moved["calls"] == pytest.approx(1000)  # one for each fs
    assert moved["seconds"] > 0
    assert 0 < moved["fluctuation"] < 50  # meV: the true energy, whatever the student
    assert refused["problem"].startswith("2 of 2 refused: a macro-step of 8 fs is unsafe")
    assert f"| {verlet.name} | 1000 |" in page.read_text()

    monkeypatch.setattr(script, "run_all", None)  # both starts are kept
    script.main()
    assert json.loads((out / "report.json").read_text()) == report


def test_a_box_of_water_by_an_artifact(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The student being the true potential, C makes its steps: at the student's, whatever the macro-step."""
    fine, coarse = script.Scheme(1.0, 1.0), script.Scheme(1.0, 2.0)
    monkeypatch.setattr(script, "SCHEMES", [fine, coarse])
    monkeypatch.setattr(script, "TURN", 8.0)
    monkeypatch.setattr(script, "SETTLING", 2.0)
    model = str(students.artifact(tmp_path))
    start = Atoms(named("water-24").structure.numbers, named("water-24").structure.positions)
    start.write(tmp_path / "start.xyz")
    words = [model, "--true", model, "--system", "water-24", "-o", str(tmp_path), "--starts", "1"]
    words += ["--start", str(tmp_path / "start.xyz"), "--picoseconds", "0.016"]
    monkeypatch.setattr(sys, "argv", ["large_steps_ase.py", *words])
    script.main()
    one, other = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert (one["calls"], other["calls"]) == (pytest.approx(1000), pytest.approx(500))
    [found] = [json.loads((tmp_path / "start-0.json").read_text())["runs"]]
    np.testing.assert_allclose(found[fine.name]["energy"][1::2], found[coarse.name]["energy"], atol=1e-5)


def test_flexible_water_by_openmm(script: ModuleType) -> None:
    """The true potential of the water box: forces are its slope, and it is a teacher by its import path."""
    require_engine("openmm")
    box = named("water-192").structure
    atoms = Atoms(box.numbers, box.positions, cell=box.cell, pbc=box.pbc)
    atoms.calc = script.true_potential("flexible_water:FlexibleTIP3P")
    forces = atoms.get_forces()
    assert np.abs(forces.sum(axis=0)).max() < 1e-3  # PME's
    energies = []
    for step in (1e-3, -1e-3):
        moved = atoms.copy()
        moved.calc = atoms.calc
        moved.positions[4] += [step, step, 0]
        energies.append(moved.get_potential_energy())
    assert (energies[1] - energies[0]) / 2e-3 == pytest.approx(forces[4, :2].sum(), abs=2e-4)
    methane = Atoms("CH4", positions=box.positions[:5], cell=box.cell, pbc=True)
    methane.calc = atoms.calc
    with pytest.raises(Exception, match="CH4: flexible TIP3P takes water, as O, H, H for each molecule"):
        methane.get_forces()
