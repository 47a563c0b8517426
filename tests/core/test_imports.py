"""Who may import whom: the contracts hold, and each notices its violation."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from requirements import REPOSITORY

FOLDERS = ["mlff_engines", "training", "ase", "lammps", "openmm"]


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    program = "import sys; from importlinter.cli import lint_imports_command as run; sys.argv[0] = 'x'; run()"
    search_path = os.pathsep.join(str(root / folder) for folder in [".", *FOLDERS[1:]])
    return subprocess.run(
        [sys.executable, "-c", program, "--no-cache", "--no-logo"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": search_path},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the packages, to be broken on purpose."""
    for folder in FOLDERS:
        shutil.copytree(REPOSITORY / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    return tmp_path


def test_contracts_hold(tree: Path) -> None:
    run = lint_imports(tree)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize(
    ("module", "statement", "contract"),
    [
        ("mlff_engines/units.py", "import ase", "The core knows no engine"),
        ("mlff_engines/structure.py", "from openmm import System", "The core knows no engine"),
        ("mlff_engines/cli.py", "def f():\n    from mlff_training import loop", "The core knows no engine"),
        ("mlff_engines/errors.py", "from mlff_engines import units", "knowledge flows one way"),
        ("mlff_engines/graph.py", "from mlff_engines import structure", "names table and the units stand alone"),
        ("mlff_engines/new.py", "import math", "knowledge flows one way"),
        ("mlff_engines/models/new.py", "from mlff_engines import neighbors", "Models never build edges"),
        ("mlff_engines/models/new.py", "import vesin", "Models never build edges"),
        ("ase/mlff_ase/__init__.py", "import mlff_training", "An adapter knows the core"),
        ("lammps/mlff_lammps/__init__.py", "import mlff_ase", "An adapter knows the core"),
        ("ase/mlff_ase/__init__.py", "import openmm", "The ASE adapter knows no other"),
        ("lammps/mlff_lammps/__init__.py", "import ase", "The LAMMPS adapter knows no other"),
        ("openmm/mlff_openmm/__init__.py", "import lammps", "The OpenMM adapter knows no other"),
        ("training/mlff_training/__init__.py", "import openmm", "Training knows ASE"),
        ("ase/mlff_ase/__init__.py", "from mlff_engines import cli", "Nothing imports the command line"),
    ],
)
def test_violation_is_noticed(tree: Path, module: str, statement: str, contract: str) -> None:
    path = tree / module
    path.write_text((path.read_text() if path.exists() else '"""New."""\n') + f"\n{statement}\n")
    run = lint_imports(tree)
    assert run.returncode == 1, run.stdout + run.stderr
    broken = [line for line in run.stdout.splitlines() if line.endswith("BROKEN")]
    assert any(contract in line for line in broken), run.stdout
