"""All stages from one file: molecules to report, and again without doing anything twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mlff_engines import cli
from mlff_engines.errors import ConfigError
from mlff_engines.kstep.pipeline import PipelineConfig, run_stages
from mlff_engines.validation.reports.large_steps import evaluate_runs
from requirements import REPOSITORY, require_engine, require_package

require_engine("openmm")
for module in ("rdkit", "openmmml", "torch_geometric", "MDAnalysis", "jinja2"):
    require_package(module, "openmm")

EXAMPLE = REPOSITORY / "examples" / "kstep.yaml"
FEW = [  # of the example's; A2 costs as much again
    {"kind": "verlet", "dt_fs": 2},
    {"kind": "hmr", "dt_fs": 4},
    {"kind": "A1", "k": 4},
    {"kind": "C", "macro_step_fs": 4, "length_ps": 50},
    {"kind": "D", "trajectory_ps": 0.02},
]


def fails(*args: object) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main([str(arg) for arg in args])
    assert error.value.code


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.npz")} | {
        path: path.stat().st_mtime_ns for path in folder.rglob("*.pt")
    }


@pytest.mark.slow
def test_from_smiles_to_a_report_in_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = yaml.safe_load(EXAMPLE.read_text())
    settings["train"]["k_steps"] = [4]
    settings["run"]["variants"] = FEW
    settings["processes"] = 1
    (tmp_path / "kstep.yaml").write_text(yaml.safe_dump(settings))
    out = tmp_path / "out"
    command = ["kstep", "pipeline", str(tmp_path / "kstep.yaml"), "-o", str(out), "--smoke"]
    cli.main(command)
    report = json.loads((out / "report.json").read_text())
    rows = {row["variant"]: row for row in report["variants"]}
    assert set(rows) == {"verlet-2fs", "hmr-4fs", "A1-k4", "C-4fs", "D-0.02ps"}
    assert {section["system"] for section in report["sections"]} == {"ethanol", "phenol"}
    for name, row in rows.items():
        assert set(row) >= {"variant", "macro_step_fs", "true_calls_per_ns", "gates", "verdict"}
        # so little data cannot show anything but that a run broke
        assert set(row["gates"].values()) - {"inconclusive"} <= {"pass", "fail"}
        assert {code for code, verdict in row["gates"].items() if verdict != "inconclusive"} == {"K1"}, name
        assert row["verdict"] == ("fail" if row["gates"]["K1"] == "fail" else "inconclusive")
        assert row["savings"] is None
    assert rows["verlet-2fs"]["gates"]["K1"] == "pass"
    assert rows["verlet-2fs"]["true_calls_per_ns"] == pytest.approx(5e5, rel=0.02)
    assert rows["hmr-4fs"]["true_calls_per_ns"] == pytest.approx(2.5e5, rel=0.02)
    assert rows["D-0.02ps"]["true_calls_per_ns"] == pytest.approx(5e4, rel=0.02)
    page = (out / "report.html").read_text()
    assert "What the variants cost" in page
    assert "Variant: D-0.02ps" in page
    before = files(out)
    capsys.readouterr()
    cli.main(command)
    assert files(out) == before
    assert "report.html" in capsys.readouterr().out
    fails("kstep", "pipeline", tmp_path / "kstep.yaml", "-o", out)  # without --smoke: other settings
    assert "choose another folder" in capsys.readouterr().err
    # an interrupted pipeline goes on to the same frames
    lost = out / "runs" / "phenol" / "verlet-2fs_r0.npz"
    with np.load(lost) as data:
        positions = data["pos"]
    lost.unlink()
    cli.main(command)
    with np.load(lost) as data:
        np.testing.assert_array_equal(data["pos"], positions)
    # a run that went missing altogether cannot be judged
    for path in (out / "runs" / "ethanol").glob("reference_r*"):
        path.unlink()
    fails("kstep", "evaluate", out / "runs", "-o", tmp_path / "again")
    assert "no runs of the reference" in capsys.readouterr().err


def test_only_what_the_variants_need_is_called(tmp_path: Path) -> None:
    called: list[tuple[str, Any]] = []
    settings = yaml.safe_load(EXAMPLE.read_text())
    (tmp_path / "md.yaml").write_text("length_ns: 0.5")
    settings["md"] = "md.yaml"
    settings["run"]["variants"] = FEW[:2]
    config = PipelineConfig.model_validate(settings)
    run_stages(config, tmp_path, tmp_path / "out", lambda name, arguments: called.append((name, arguments)))
    assert [name for name, _ in called] == ["prepare", "simulate", "run", "evaluate"]
    assert yaml.safe_load((tmp_path / "out" / "configs" / "md.yaml").read_text()) == {
        "length_ns": 0.5,
        "save_forces": True,
    }
    assert "--processes" in called[2][1]
    missing = config.model_copy(update={"md": Path("none.yaml")})
    with pytest.raises(ConfigError, match=r"md: cannot read .*none\.yaml"):
        run_stages(missing, tmp_path, tmp_path / "other", lambda *_: None)


@pytest.mark.parametrize("file", [EXAMPLE, EXAMPLE.parent / "benchmarks" / "large_steps.yaml"], ids=lambda f: f.stem)
def test_example_files_are_read(file: Path) -> None:
    """The configurations that ship are complete and spelled right."""
    from mlff_engines.config import load_yaml, parse
    from mlff_openmm.kstep.config import MDConfig, RunConfig
    from mlff_training.kstep.config import JumpModelConfig, JumpTrainConfig
    from mlff_training.kstep.student import TrajectoryStudentConfig

    config = load_yaml(PipelineConfig, file)
    kinds = {"md": MDConfig, "model": JumpModelConfig, "train": JumpTrainConfig, "student": TrajectoryStudentConfig}
    for name, kind in (kinds | {"run": RunConfig}).items():
        parse(kind, getattr(config, name), name)  # type: ignore[type-var]
    assert isinstance(config.md, dict)
    assert config.sampling is not None
    parse(MDConfig, config.md | config.sampling, "sampling")
    load_yaml(JumpModelConfig, EXAMPLE.parent / "kstep" / "model.yaml")
    load_yaml(JumpTrainConfig, EXAMPLE.parent / "kstep" / "train.yaml")


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    from mlff_engines.errors import DataError

    with pytest.raises(DataError, match="no runs in"):
        evaluate_runs(tmp_path)
