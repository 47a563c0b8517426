"""`mlff kstep prepare` and `mlff kstep simulate`, as the shell calls them."""

from __future__ import annotations

from pathlib import Path

import yaml
from click.testing import CliRunner

from mlff_engines.errors import ConfigError
from requirements import require_engine, require_package

require_engine("openmm")
require_package("rdkit", "openmm")

from mlff_openmm.kstep.commands import prepare, simulate  # noqa: E402


def test_from_smiles_to_trajectories(tmp_path: Path) -> None:
    (tmp_path / "molecules.smi").write_text("C methane\n")
    config = {"length_ns": 1e-4, "equilibration_ps": 0.01, "nve_window_ps": 0.05, "temperature_K": [280, 300]}
    (tmp_path / "md.yaml").write_text(yaml.safe_dump(config))
    run = CliRunner()
    made = run.invoke(
        prepare, [str(tmp_path / "molecules.smi"), str(tmp_path / "md.yaml"), "-o", str(tmp_path / "molecules")]
    )
    assert made.exit_code == 0, made.output
    assert "methane: 5 atoms, mmff94, 4 constraints" in made.output
    command = [str(tmp_path / "molecules"), str(tmp_path / "md.yaml"), "-o", str(tmp_path / "runs")]
    for _ in range(2):
        done = run.invoke(simulate, command)
        assert done.exit_code == 0, done.output
        assert {p.name for p in (tmp_path / "runs").iterdir()} == {"methane_280K.npz", "methane_300K.npz"}


def test_keys_are_listed_and_typos_explained(tmp_path: Path) -> None:
    listed = CliRunner().invoke(prepare, ["--keys"])
    assert "nve_window_ps" in listed.output
    (tmp_path / "md.yaml").write_text("temperatur_K: 300")
    failed = CliRunner().invoke(simulate, [str(tmp_path), str(tmp_path / "md.yaml"), "-o", str(tmp_path / "runs")])
    assert isinstance(failed.exception, ConfigError)
    assert "did you mean 'temperature_K'" in str(failed.exception)
