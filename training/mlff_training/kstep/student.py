"""A student force field from the same trajectories as the jumps: what variants C and D have inside."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from pydantic import Field

from mlff_engines.config import Config
from mlff_engines.errors import DataError
from mlff_engines.export import export
from mlff_engines.structure import SYMBOLS
from mlff_engines.units import energy_unit, length_unit
from mlff_training.data.checks import check_frames
from mlff_training.kstep.pairs import read_run
from mlff_training.loop import TrainConfig
from mlff_training.student import split_frames, train_student

NM, KJ_PER_MOL = length_unit("nm"), energy_unit("kJ/mol")


class TrajectoryStudentConfig(Config):
    """A file for `mlff kstep student`."""

    frames: int = Field(3000, ge=2, description="taken of all trajectories together, spread evenly")
    valid: float = Field(0.1, gt=0, lt=1, description="fraction set aside, whole segments of constant energy")
    split_seed: int = Field(0, description="of that choice")
    model: dict[str, Any] = Field(default_factory=dict, description="architecture and hyper-parameters")
    train: TrainConfig = Field(TrainConfig(), description="the training loop")


def train_trajectory_student(trajectories: Sequence[Path], config: TrajectoryStudentConfig, folder: Path) -> Path:
    """Train in `folder` and export to ``folder/student.pt``; what is there of this training stays or goes on.

    Args:
        trajectories: NPZ files of `mlff kstep simulate` with `save_forces`.

    Raises:
        DataError: a file that is no trajectory or has no forces, or too few segments to set some aside.
        TrainingError: the folder holds another training.
    """
    frames = read_frames(trajectories, config.frames)
    check_frames(frames, "trajectories", trust_units=True)  # energies of force fields have no zero to tell units by
    parts = split_frames(frames, {"train": None, "valid": config.valid}, config.split_seed, "group", folder)
    found = train_student(parts, _e0(frames), config.model, config.train, folder, teacher="mlff kstep simulate")
    artifact = folder / "student.pt"
    export([folder / "best"], artifact, overwrite=True)
    (folder / "summary.json").write_text(json.dumps(found["valid"], indent=1) + "\n")
    return artifact


def read_frames(trajectories: Sequence[Path], count: int) -> list[Atoms]:
    """`count` labelled frames of all trajectories together, or all there are; a group is a segment.

    Raises:
        DataError: see `train_trajectory_student`.
    """
    if not trajectories:
        raise DataError("no trajectories given: run mlff kstep simulate")
    share = -(-count // len(trajectories))
    found = []
    for path in trajectories:
        run = read_run(path)
        if "forces" not in run or "Epot" not in run:
            raise DataError(f"{path} has no forces: simulate it anew with save_forces: true")
        total = len(run["pos"])
        for frame in np.unique(np.linspace(0, total - 1, min(share, total)).astype(int)).tolist():
            atoms = Atoms(run["numbers"], NM * run["pos"][frame])
            atoms.calc = SinglePointCalculator(
                atoms,
                energy=KJ_PER_MOL * float(run["Epot"][frame]),
                forces=KJ_PER_MOL / NM * run["forces"][frame],
            )
            atoms.info |= {"group": f"{path.stem}:{run['segment'][frame]}", "level": "true potential"}
            found.append(atoms)
    return found


def _e0(frames: Sequence[Atoms]) -> Mapping[str, float]:
    """Least squares of smallest norm: only the molecules of the data are ever asked for."""
    elements = sorted({int(z) for atoms in frames for z in atoms.numbers})
    counts = np.array([[(atoms.numbers == z).sum() for z in elements] for atoms in frames], dtype=np.float64)
    energies = np.array([atoms.get_potential_energy() for atoms in frames])
    solution = np.linalg.lstsq(counts, energies, rcond=1e-10)[0]
    return {SYMBOLS[z]: float(e) for z, e in zip(elements, solution, strict=True)}
