"""Untrained students with weights that matter, as checkpoints and artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mlff_engines.artifact import Artifact
from mlff_engines.checkpoint import Domain, save_checkpoint
from mlff_engines.export import export
from mlff_engines.manifest import Dtype
from mlff_engines.models.registry import build_model, model_config

E0 = {"H": -13.6, "C": -1029.0, "O": -2041.0}


def checkpoint(folder: Path, seed: int = 0, *, domain: Domain | None = None, **model: Any) -> Path:
    """A checkpoint for H, C and O; `model` changes hyper-parameters."""
    config = model_config({"features": 16, "interactions": 2, "cutoff": 4.0, **model})
    torch.manual_seed(seed)
    student = build_model(config, list(E0), E0, scale=2.0).eval()
    save_checkpoint(folder, student, config, domain or Domain(elements=list(E0)), {"teacher": "none", "frames": {}})
    return folder


def artifact(folder: Path, *, members: int = 1, dtype: Dtype = "float64", **model: Any) -> Path:
    """The exported artifact of one checkpoint, or of an ensemble."""
    made = [checkpoint(folder / f"member-{seed}", seed, **model) for seed in range(members)]
    out = folder / f"student-{dtype}.pt"
    exported: Artifact = export(made, out, dtype=dtype, overwrite=True)
    assert exported.manifest.members == members
    return out
