"""The benchmark of large steps with a dear potential: a row for every scheme, kept between calls."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import students
from mlff_engines.bench.page import markers
from requirements import REPOSITORY, require_engine

require_engine("ase")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = REPOSITORY / "examples" / "benchmarks" / "large_steps_ase.py"
    spec = importlib.util.spec_from_file_location("large_steps_ase", path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, made)  # its dataclass looks there
    spec.loader.exec_module(made)
    return made


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
    assert refused["problem"].startswith("refused: a macro-step of 8 fs is unsafe")
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
    words = [model, "--true", model, "--system", "water-24", "-o", str(tmp_path), "--starts", "1"]
    monkeypatch.setattr(sys, "argv", ["large_steps_ase.py", *words, "--picoseconds", "0.016"])
    script.main()
    one, other = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert (one["calls"], other["calls"]) == (pytest.approx(1000), pytest.approx(500))
    [found] = [json.loads((tmp_path / "start-0.json").read_text())["runs"]]
    np.testing.assert_allclose(found[fine.name]["energy"][1::2], found[coarse.name]["energy"], atol=1e-5)
