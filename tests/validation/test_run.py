"""A whole validation: what it writes, how it goes on, what it refuses; with the real ASE engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import mlff_engines.validation.run as run
import students
from mlff_engines.artifact import Artifact, load
from mlff_engines.cli import main, mlff
from mlff_engines.errors import ConfigError, SimulationError, StructureError
from mlff_engines.graph import Graph
from mlff_engines.potential import Potential
from mlff_engines.structure import Structure
from mlff_engines.validation import engines
from mlff_engines.validation.builtin import System, argon_artifact
from mlff_engines.validation.dynamics import constant_energy
from mlff_engines.validation.reports.report import Report, read_report
from mlff_engines.validation.result import STATIC, CheckResult
from mlff_engines.validation.run import validate
from requirements import require_compiler, require_engine

require_engine("ase")

QUICK = [*STATIC, "M1", "M2", "M3"]
# twelve neighbours around one atom, at the distance of the pair's minimum
SHELL = np.array([[0, 1, g] for g in (1.618, -1.618)] + [[0, -1, g] for g in (1.618, -1.618)])
CLUSTER = Structure(
    np.full(13, 18),
    3.76 / 2 * np.concatenate([np.zeros((1, 3)), SHELL, SHELL[:, [2, 0, 1]], SHELL[:, [1, 2, 0]]]),
)
SYSTEM = System("cluster", CLUSTER, 25.0)


@pytest.fixture(scope="module")
def argon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return argon_artifact(tmp_path_factory.mktemp("argon"))


@pytest.fixture(scope="module")
def finished(argon: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished validation."""
    folder = tmp_path_factory.mktemp("validation") / "report"
    validate(argon, folder, systems=[SYSTEM], progress=False, command="mlff validate argon.pt")
    return folder


def codes(report: Report) -> list[str]:
    return [result.code for section in report.sections for result in section.results]


def instead(code: str, answer: Callable[[], None]) -> Callable[..., list[CheckResult]]:
    """The static step of `code` does `answer` first."""
    original = run._static

    def step(session: Any, name: str, asked: str) -> list[CheckResult]:
        if asked == code:
            answer()
        return original(session, name, asked)

    return step


def test_a_sound_model_passes_and_is_told_so(finished: Path, argon: Path) -> None:
    report = read_report(finished / "report.json")
    assert codes(report) == QUICK
    assert [(r.code, r.detail) for s in report.sections for r in s.results if not r.passed] == []
    assert (report.verdict, report.exit_code) == ("pass", 0)
    assert report.provenance.sha256 == load(argon).manifest.sha256
    assert report.provenance.command == "mlff validate argon.pt"
    assert {"torch", "numpy", "mlff-engines"} <= set(report.provenance.versions)
    assert [view.name for view in report.views] == ["cluster"]
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "S10" in page
    assert "M3" in page
    assert list((finished / "trajectories" / "cluster" / "ase").glob("M1-*.xyz"))


def test_an_interrupted_validation_goes_on(argon: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    def again() -> None:
        done.append("S1")

    done: list[str] = []
    monkeypatch.setattr(run, "STATIC", {"S1": "", "S2": "", "S8": ""})
    monkeypatch.setitem(run.MOVING, "quick", ("M3",))
    with monkeypatch.context() as patched:
        patched.setattr(run, "_static", instead("S2", interrupt))
        with pytest.raises(KeyboardInterrupt):
            validate(argon, tmp_path / "v", systems=[SYSTEM], progress=False)
    assert not (tmp_path / "v" / "report.json").exists()
    with pytest.raises(ConfigError, match="unfinished validation of another artifact, or with other engines"):
        validate(argon, tmp_path / "v", systems=[SYSTEM], seed=7, progress=False)
    with monkeypatch.context() as patched:
        patched.setattr(run, "_static", instead("S1", again))
        report = validate(argon, tmp_path / "v", systems=[SYSTEM], progress=False)
    assert codes(report) == ["S1", "S2", "S8", "M3"]
    assert done == []  # kept from the first time


@pytest.mark.fault("M5")
def test_ctrl_c_in_the_middle_of_a_run_keeps_what_is_done(
    argon: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ase import Atoms
    from ase.io import write

    from mlff_ase.calculator import MLFFCalculator

    write(tmp_path / "cluster.xyz", Atoms(CLUSTER.numbers, CLUSTER.positions))
    folder, calculate = tmp_path / "v", MLFFCalculator.calculate
    running = folder / "trajectories" / "cluster" / "ase" / "M1-2.xyz"

    def interrupted(self: MLFFCalculator, *args: Any, **options: Any) -> None:
        if running.exists() and running.stat().st_size:
            raise KeyboardInterrupt
        calculate(self, *args, **options)

    arguments = ["validate", str(argon), "--system", str(tmp_path / "cluster.xyz"), "--temperature", "25"]
    monkeypatch.setattr(run, "STATIC", {"S8": ""})
    monkeypatch.setitem(run.MOVING, "quick", ("M1", "M2"))
    monkeypatch.setattr(constant_energy, "Options", partial(constant_energy.Options, law=40))
    with monkeypatch.context() as patched:
        patched.setattr(MLFFCalculator, "calculate", interrupted)
        with pytest.raises(SystemExit, match="130"):
            main([*arguments, "-o", str(folder)])
    assert running.stat().st_size > 0
    kept = {path.name: path.stat().st_mtime_ns for path in (folder / "steps").iterdir()}
    assert list(kept) == ["ase-static-systems-S8.json"]
    assert not (folder / "report.json").exists()
    main([*arguments, "-o", str(folder)])
    assert codes(read_report(folder / "report.json")) == ["S8", "M1", "M2"]
    assert {name: (folder / "steps" / name).stat().st_mtime_ns for name in kept} == kept


def test_a_finished_validation_is_not_touched(finished: Path, argon: Path, tmp_path: Path) -> None:
    before = (finished / "report.json").read_bytes()
    with pytest.raises(ConfigError, match="holds a finished validation; name another folder or pass --overwrite"):
        validate(argon, finished, systems=[SYSTEM], progress=False)
    (tmp_path / "precious.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="holds something else than a validation"):
            validate(argon, tmp_path, systems=[SYSTEM], overwrite=overwrite, progress=False)
    assert (finished / "report.json").read_bytes() == before
    assert (tmp_path / "precious.txt").read_text() == "mine"


@pytest.mark.fault("M6")
def test_a_missing_engine_is_named_and_the_others_go_on(
    argon: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(engines.ENGINES, "nowhere", ("no_such_package.engine", "Engine", "nowhere"))
    monkeypatch.setattr(run, "STATIC", {"S8": ""})
    monkeypatch.setitem(run.MOVING, "quick", ("M2",))
    report = validate(argon, tmp_path / "v", engines=["nowhere", "ase"], systems=[SYSTEM], progress=False)
    assert codes(report) == ["S8", "M2"]
    [problem] = [section.problem for section in report.sections if section.engine == "nowhere"]
    assert "pip install 'mlff-engines[nowhere]'" in problem
    assert (report.verdict, report.exit_code) == ("inconclusive", 3)


def test_a_wrong_engine_fails(argon: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forces of the adapter 1 % too large."""
    from mlff_ase.calculator import MLFFCalculator

    calculate = MLFFCalculator.calculate

    def too_large(self: MLFFCalculator, *args: Any, **options: Any) -> None:
        calculate(self, *args, **options)
        self.results["forces"] = 1.01 * self.results["forces"]

    monkeypatch.setattr(MLFFCalculator, "calculate", too_large)
    monkeypatch.setattr(run, "STATIC", {"S1": "", "S3": ""})
    report = validate(argon, tmp_path / "v", systems=[SYSTEM], progress=False)
    verdicts = {result.code: result.verdict for section in report.sections for result in section.results}
    assert {code for code, verdict in verdicts.items() if verdict == "fail"} >= {"S1", "S3", "M1", "M3"}
    assert report.exit_code == 1


def run_cli(*args: str | Path) -> Any:
    return CliRunner().invoke(mlff, ["validate", *map(str, args)])


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ase import Atoms
    from ase.io import write

    monkeypatch.setattr(run, "STATIC", {"S8": "", "S9": ""})
    monkeypatch.setitem(run.MOVING, "quick", ("M2",))
    write(tmp_path / "cluster.xyz", Atoms(CLUSTER.numbers, CLUSTER.positions))
    done = run_cli("argon", "--system", tmp_path / "cluster.xyz", "--temperature", 25, "-o", tmp_path / "v")
    assert done.exit_code == 0, done.output
    assert "pass: " in done.output
    report = json.loads((tmp_path / "v" / "report.json").read_text())
    assert report["provenance"]["settings"]["temperature of cluster, K"] == 25
    assert report["verdict"] == "pass"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--engines", "asse"], ConfigError, "unknown engine 'asse'; did you mean 'ase'"),
        (["--engines", ","], ConfigError, "no engine named; allowed: .*ase"),
        (["--system", "argon-109"], StructureError, "no built-in system 'argon-109'; did you mean 'argon-108'"),
        (["--system", "broken.xyz"], StructureError, r"cannot read structures from broken\.xyz"),
        (["--system", "helium.xyz"], StructureError, "does not know He"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    arguments: list[str], error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.xyz").write_text("3\nno such file\nAr 0 0\n")
    Path("helium.xyz").write_text("1\n\nHe 0 0 0\n")
    done = run_cli("argon", "-o", tmp_path / "v", *arguments)
    assert isinstance(done.exception, error), done.output
    with pytest.raises(error, match=message):
        raise done.exception
    assert not (tmp_path / "v").exists()


def test_a_kernel_that_is_wrong_does_not_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge's own dynamics use the fast kernel only where it agrees with the eager model."""
    require_compiler()
    path = students.artifact(tmp_path)
    right = run._Session(path, tmp_path, [], 1.0, "cpu", 0)
    assert isinstance(right.core.evaluate.potential, Artifact)  # type: ignore[attr-defined]

    def skewed(self: Artifact, graph: Graph) -> Graph:
        out = original(self, graph)
        return {**out, "edge_gradient": out["edge_gradient"] * (1 + 1e-7)}

    original = Artifact.__call__
    monkeypatch.setattr(Artifact, "__call__", skewed)
    wrong = run._Session(path, tmp_path, [], 1.0, "cpu", 0)
    assert isinstance(wrong.core.evaluate.potential, Potential)  # type: ignore[attr-defined]


def test_only_some_checks(argon: Path, tmp_path: Path) -> None:
    report = validate(argon, tmp_path / "report", systems=[SYSTEM], only=["S9", "M2", "D3"], progress=False)
    assert codes(report) == ["S9", "M2", "D3"]
    assert report.provenance.settings["mode"] == "S9, M2, D3"
    with pytest.raises(ConfigError, match="unknown check 'M22'; did you mean 'M2'"):
        validate(argon, tmp_path / "other", only=["M22"], progress=False)


def test_dynamics_that_explode_are_a_failure_and_the_others_go_on(
    argon: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = run.constant_energy.check_dynamics

    def exploding(*args: Any, only: list[str]) -> list[CheckResult]:
        if only == ["M1"]:
            raise SimulationError("step 7: atom 3 flew away")
        return check(*args, only=only)

    monkeypatch.setattr(run.constant_energy, "check_dynamics", exploding)
    report = validate(argon, tmp_path / "report", systems=[SYSTEM], only=["M1", "M2"], progress=False)
    first, second = report.sections[0].results
    assert (first.code, first.verdict, first.detail) == ("M1", "fail", "step 7: atom 3 flew away")
    assert second.passed
    assert report.exit_code == 1
    assert "atom 3 flew away" in (tmp_path / "report" / "report.html").read_text()
