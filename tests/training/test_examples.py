"""Every example runs, with --smoke settings; and the pipeline it runs resumes."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from mlff_engines.config import Config, load_yaml
from mlff_engines.errors import MLFFError
from mlff_training.distill import DistillConfig
from mlff_training.student import StudentConfig
from requirements import REPOSITORY, require_engine

EXAMPLES = REPOSITORY / "examples"
KSTEP = {
    "kstep": ("mlff_engines.kstep.pipeline", "PipelineConfig"),
    "large_steps_water": ("mlff_training.distill", "DistillConfig"),
    "large_steps": ("mlff_engines.kstep.pipeline", "PipelineConfig"),
    "md": ("mlff_openmm.kstep.config", "MDConfig"),
    "model": ("mlff_training.kstep.config", "JumpModelConfig"),
    "train": ("mlff_training.kstep.config", "JumpTrainConfig"),
}
MLFF = [sys.executable, "-m", "mlff_engines.cli"]


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def ethanol(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the quickstart has run with --smoke."""
    folder = tmp_path_factory.mktemp("quickstart")
    said = run(*MLFF, "distill", str(EXAMPLES / "ethanol.yaml"), "--smoke", cwd=folder)
    assert "MLFFCalculator" in said
    return folder


@pytest.mark.slow
def test_quickstart_leaves_what_it_promises(ethanol: Path) -> None:
    made = ethanol / "runs" / "ethanol"
    for name in (
        "student.pt",
        "trial/student_vs_teacher.png",
        "trial/ase/nve.xyz",
        "trial/openmm/nve.dcd",
        "member-0/best/config.yaml",
    ):
        assert (made / name).stat().st_size > 0, name
    trial = json.loads((made / "trial" / "trial.json").read_text())
    assert trial["force_mae"]["300 K"] > 0
    assert set(trial["engines"]) == {"ase", "lammps", "openmm"}
    assert "forces" in run(*MLFF, "verify", str(made / "student.pt"), cwd=ethanol)
    assert "GFN2-xTB" in run(*MLFF, "inspect", str(made / "student.pt"), cwd=ethanol)


@pytest.mark.slow
def test_quickstart_again_does_nothing_twice(ethanol: Path) -> None:
    made = ethanol / "runs" / "ethanol"
    log, trial = (made / "member-0" / "log.csv").read_text(), (made / "trial" / "trial.json").stat().st_mtime_ns
    run(*MLFF, "distill", str(EXAMPLES / "ethanol.yaml"), "--smoke", cwd=ethanol)
    assert (made / "member-0" / "log.csv").read_text() == log
    assert (made / "trial" / "trial.json").stat().st_mtime_ns == trial


@pytest.mark.slow
def test_ase_dynamics(ethanol: Path) -> None:
    student = ethanol / "runs" / "ethanol" / "student.pt"
    script, structure = str(EXAMPLES / "ase_dynamics.py"), str(EXAMPLES / "ethanol.xyz")
    assert " ps " in run(sys.executable, script, str(student), structure, "--smoke", cwd=ethanol)
    assert (ethanol / "langevin.traj").stat().st_size > 0


@pytest.mark.slow
def test_first_student(tmp_path: Path) -> None:
    assert "energy" in run(sys.executable, str(EXAMPLES / "first_student.py"), "--smoke", cwd=tmp_path)


CONFIGURATIONS = sorted(EXAMPLES.rglob("*.yaml"))
CONFIGURATIONS.remove(EXAMPLES / "benchmarks" / "same_accuracy.yaml")  # a script's own: test_same_accuracy.py


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_configurations_are_valid(path: Path) -> None:
    kind: type[Config] = StudentConfig if path.parent.name == "benchmarks" else DistillConfig
    if path.stem in KSTEP:
        require_engine("openmm")
        module, name = KSTEP[path.stem]
        kind = getattr(importlib.import_module(module), name)
    load_yaml(kind, path)


def test_no_example_is_left_out() -> None:
    tested = "".join(test.read_text(encoding="utf-8") for test in REPOSITORY.glob("tests/**/test_*.py"))
    for script in EXAMPLES.glob("*.py"):
        assert script.name in tested, f"{script.name} runs in no test"


@pytest.mark.fault("M4")
def test_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    config = tmp_path / "typo.yaml"
    config.write_text("train: {epocs: 3}\n")
    with pytest.raises(MLFFError, match=r"unknown key 'train\.epocs'; did you mean 'epochs'\?"):
        load_yaml(DistillConfig, config)
