"""The example with OpenMM-ML runs, with a student that it makes on the way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from requirements import REPOSITORY, require_engine

require_engine("openmm")


@pytest.mark.slow
def test_openmm_alanine_dipeptide(tmp_path: Path) -> None:
    script = REPOSITORY / "examples" / "openmm_alanine_dipeptide.py"
    threads = {"OPENMM_CPU_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), "--smoke"],
        cwd=tmp_path,
        env=os.environ | threads,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "of 8 frames nearest to alpha R" in done.stdout
    made = tmp_path / "runs" / "alanine_dipeptide"
    for name in ("student.pt", "peptide.dcd", "ramachandran.png"):
        assert (made / name).stat().st_size > 0, name
