"""The benchmark of large steps with a dear potential: a row for every scheme, kept between calls."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

import students
from mlff_engines.bench.page import markers
from requirements import REPOSITORY, require_engine

require_engine("ase")


def test_each_scheme_gets_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = REPOSITORY / "examples" / "benchmarks" / "large_steps_aspirin.py"
    spec = importlib.util.spec_from_file_location("large_steps_aspirin", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)  # its dataclass looks there
    spec.loader.exec_module(script)
    verlet, unsafe = script.Scheme(1.0, 1.0), script.Scheme(1.0, 8.0, rigid=False)
    monkeypatch.setattr(script, "SCHEMES", [verlet, unsafe])
    monkeypatch.setattr(script, "TURN", 8.0)
    monkeypatch.setattr(script, "SETTLING", 2.0)
    out, page = tmp_path / "out", tmp_path / "page.md"
    page.write_text("\n".join(markers(script.SECTION)))
    student = students.artifact(tmp_path)
    words = [str(student), "-o", str(out), "--starts", "2", "--picoseconds", "0.016", "--page", str(page)]
    monkeypatch.setattr(sys, "argv", [path.name, *words])
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
