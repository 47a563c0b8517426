"""Decks for the tests of LAMMPS, run as a user runs them."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import requirements
from mlff_engines.errors import MissingEngineError
from mlff_engines.structure import MASSES, Structure
from mlff_lammps.build import find_build
from mlff_lammps.deck import Placed, write_data
from mlff_lammps.run import Installation, built

SECONDS = 300  # a run that takes longer hangs


def require_build() -> Installation:
    """The LAMMPS of `mlff lammps build`; a skip, or a failure where MLFF_REQUIRE names lammps-mliap."""
    requirements.require_engine("lammps")
    try:
        find_build()
    except MissingEngineError as error:
        requirements.missing("lammps-mliap", str(error))
    return built()


@dataclass
class Ran:
    """What a run left."""

    code: int
    log: str
    output: str


def crystal(atoms: int = 8, seed: int = 1, vacuum: float = 0.0) -> Structure:
    """A rattled triclinic box of H, C and O, or of layers with `vacuum` Å between them."""
    side = round((atoms / 2) ** (1 / 3) + 0.5)
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), -1).reshape(-1, 3)[:atoms]
    cell = 1.9 * side * np.array([[1.0, 0.0, 0.0], [0.2, 0.95, 0.0], [-0.15, 0.1, 1.05]])
    positions = (grid / side) @ cell + rng.uniform(-0.1, 0.1, grid.shape)
    cell[2, 2] += vacuum
    numbers = np.array([1, 6, 8])[np.arange(len(grid)) % 3]
    return Structure(numbers, positions, cell, np.ones(3, dtype=bool))


def write_structure(folder: Path, structure: Structure, velocities: np.ndarray | None = None) -> list[str]:
    """`atoms.data` in `folder`, and the elements of its types."""
    masses = np.array(MASSES)[structure.numbers]
    return write_data(folder / "atoms.data", structure, Placed.of(structure), masses, velocities)


def deck(model: str, elements: str, *, after: str = "run 0", before: str = "", units: str = "metal") -> str:
    """A deck for `atoms.data` with `pair_style mliap`."""
    return f"""units {units}
atom_style atomic
box tilt large
{before}
read_data atoms.data
pair_style mliap unified {model} 1
pair_coeff * * {elements}
comm_modify cutoff 10.0
neighbor 0.5 bin
neigh_modify every 1 delay 0 check yes
{after}
"""


def lmp(folder: Path, text: str, ranks: int = 1, **variables: str) -> Ran:
    """Run a deck in `folder` with the LAMMPS of `mlff lammps build`."""
    installation = require_build()
    (folder / "in.deck").write_text(text)
    (folder / "log.lammps").unlink(missing_ok=True)
    done = subprocess.run(
        installation.command(["-in", "in.deck"], ranks),
        cwd=folder,
        env={**installation.environment, **variables},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    log = folder / "log.lammps"
    return Ran(done.returncode, log.read_text() if log.exists() else "", done.stdout + done.stderr)
