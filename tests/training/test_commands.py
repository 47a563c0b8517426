"""The steps of the pipeline as commands: each alone, each fed by the one before."""

from __future__ import annotations

from pathlib import Path

import pytest
from ase.build import bulk, molecule
from click.testing import CliRunner, Result

from mlff_engines.cli import mlff, mlff_export
from mlff_engines.errors import ConfigError, DataError
from mlff_engines.manifest import inspect
from mlff_training.data.formats import read
from mlff_training.distill import isolated_energies
from mlff_training.teachers.config import TeacherConfig
from mlff_training.teachers.make import make_teacher

CONFIG = """
start: [water.xyz]
teacher: {name: gfn2-xtb}
workers: 1
sampling: {md: {temperatures: [300], steps: 60, interval: 2}, select: 20}
"""
TRAINING = """
data: {train: [labels.xyz], valid: 4, split_by: frame}
model: {features: 8, interactions: 1}
train: {epochs: 2, batch_size: 4, tensorboard: false}
"""


def run(*arguments: str, command: object = mlff) -> Result:
    return CliRunner().invoke(command, arguments, catch_exceptions=False)  # type: ignore[arg-type]


@pytest.mark.slow
def test_step_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    molecule("H2O").write("water.xyz")
    Path("distill.yaml").write_text(CONFIG)
    Path("train.yaml").write_text(TRAINING)
    assert "20 structures" in run("sample", "distill.yaml", "-o", "sampled.xyz").output
    assert "20 labelled" in run("label", "distill.yaml", "sampled.xyz", "-o", "labels.xyz").output
    assert read(Path("labels.xyz"))[0].info["level"] == "GFN2-xTB"
    said = run("train", "train.yaml", "-o", "run").output
    assert "valid: forces MAE" in said
    assert run("run/best", "-o", "student.pt", "--check", "water.xyz", command=mlff_export).exit_code == 0
    assert inspect("student.pt").domain.elements == ["H", "O"]
    assert "elements            H" in run("inspect", "student.pt").output
    assert "golden vectors reproduced" in run("verify", "student.pt").output


@pytest.mark.fault("M3")
def test_convert_and_describe_data(data_dir: Path, tmp_path: Path) -> None:
    source, target = str(data_dir / "ethanol_ccsdt" / "ethanol_ccsd_t-train.npz"), str(tmp_path / "ethanol.xyz")
    assert "1000" in run("data", "convert", source, target).output
    said = run("data", "inspect", target).output
    assert "C2H6O" in said
    assert "Psi4: CCSD(T), cc-pVTZ" in said
    with pytest.raises(DataError, match="overwrite"):
        run("data", "convert", source, target)


def test_distill_asks_for_what_it_lacks(tmp_path: Path) -> None:
    config = tmp_path / "distill.yaml"
    config.write_text("teacher: {name: emt}\n")
    with pytest.raises(ConfigError, match=r"names no `output`; give the folder of the run with -o DIR"):
        run("distill", str(config))
    with pytest.raises(ConfigError, match=r"start: \[FILE, ...\]"):
        run("distill", str(config), "-o", str(tmp_path / "run"))
    config.write_text("start: [a.xyz]\nsampling: {md: {seeds: [9001]}}\n")
    with pytest.raises(ConfigError, match=r"trial\.seed 9001 is also sampled"):
        run("distill", str(config), "-o", str(tmp_path / "run"))


def test_isolated_atoms_are_asked_of_the_teacher(tmp_path: Path) -> None:
    found = isolated_energies([molecule("H2O")], TeacherConfig(name="gfn2-xtb"), tmp_path / "isolated.xyz")
    # a hydrogen atom of GFN2-xTB has -0.3935 Hartree
    assert found["H"] == pytest.approx(-10.707, abs=0.01)
    water = molecule("H2O")
    water.calc = make_teacher(TeacherConfig(name="gfn2-xtb"))
    binding = water.get_potential_energy() - 2 * found["H"] - found["O"]
    assert -15 < binding < -8  # experiment -10.1 eV; without spin polarisation GFN2-xTB binds atoms too strongly
    copper = isolated_energies([bulk("Cu")], TeacherConfig(name="emt"), tmp_path / "copper.xyz")
    assert copper["Cu"] == pytest.approx(3.51, abs=0.01)


def test_keys_are_listed_with_defaults_and_meaning() -> None:
    said = run("distill", "--keys").output
    for line in said.splitlines():
        name, _, rest = line.partition(" ")
        assert rest.strip().startswith(("default", "required")), line
        assert name
    assert "train.learning_rate" in said
