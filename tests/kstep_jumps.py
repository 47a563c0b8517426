"""Untrained jumps of ethanol, as checkpoints."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch

from mlff_engines.checkpoint import Domain, save_checkpoint
from mlff_engines.config import parse
from mlff_engines.models.jump import JumpConfig, JumpModel, JumpTerms
from mlff_engines.structure import SYMBOLS, Structure
from requirements import missing

ETHANOL = Structure(
    np.array([6, 6, 8, 1, 1, 1, 1, 1, 1]),
    np.array(
        [
            [1.17, -0.41, 0.0], [0.0, 0.56, 0.0], [-1.19, -0.22, 0.0], [-1.95, 0.37, 0.0], [2.12, 0.13, 0.0],
            [1.13, -1.05, 0.88], [1.13, -1.05, -0.88], [0.05, 1.2, 0.88], [0.05, 1.2, -0.88],
        ]
    ),
)  # fmt: skip
MASSES = {"H": 1.008, "C": 12.011, "O": 15.999}
TERMS = JumpTerms(steps=4, timestep=2.0, masses=MASSES, constraints="hbonds", temperatures=[300.0])
M = np.array([MASSES[SYMBOLS[z]] for z in ETHANOL.numbers])
SETTINGS = {"features": 8, "interactions": 2, "cutoff": 4.0, "vector_features": 6}


def checkpoint(folder: Path, seed: int = 0, terms: JumpTerms = TERMS, **settings: object) -> Path:
    """A checkpoint of random weights; `settings` changes hyper-parameters."""
    config = parse(JumpConfig, SETTINGS | settings, "test")
    torch.manual_seed(seed)
    model = JumpModel(config, terms)
    save_checkpoint(folder, model, config, Domain(elements=list(MASSES)), {"teacher": "none"}, [ETHANOL], terms)
    return folder


def require_torchmdnet() -> None:
    """Skips where TorchMD-Net is not installed."""
    if importlib.util.find_spec("torchmdnet") is None:
        missing("torchmdnet", "TorchMD-Net is not installed: pip install torchmd-net")
