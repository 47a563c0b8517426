"""Training that takes a second: a few copper and gold atoms with ASE's EMT labels, a model of eight features."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator

from mlff_engines.checkpoint import Domain
from mlff_engines.models.registry import build_model, model_config
from mlff_training.data.dataset import GraphDataset
from mlff_training.distributed import World
from mlff_training.loop import TrainConfig, Trainer

MODEL = {"features": 8, "interactions": 2, "cutoff": 4.0, "basis_size": 6}
E0 = {"Cu": 3.0, "Au": 3.5}  # near the energies that EMT gives atoms of small clusters


def labelled(atoms: Atoms, names: Sequence[str] = ("energy", "forces", "energies")) -> Atoms:
    """`atoms` with the EMT labels of these names."""
    engine = atoms.copy()
    engine.calc = EMT()
    atoms.calc = SinglePointCalculator(atoms, **{name: engine.calc.get_property(name, engine) for name in names})
    return atoms


def clusters(count: int, seed: int = 0, size: int = 4) -> list[Atoms]:
    """Copper clusters (one gold atom) of `size` atoms, each shaken in its own way."""
    rng = np.random.default_rng(seed)
    corners = 2.5 * np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1]], dtype=float)
    symbols = ["Au"] + ["Cu"] * (size - 1)
    return [labelled(Atoms(symbols, corners[:size] + rng.normal(0, 0.15, (size, 3)))) for _ in range(count)]


def crystals(count: int, seed: int = 0) -> list[Atoms]:
    """Strained and shaken cubic cells of three copper atoms and one of gold, with stress."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        atoms = bulk("Cu", cubic=True)
        atoms.symbols[0] = "Au"
        atoms.set_cell(atoms.cell @ (np.eye(3) + rng.normal(0, 0.03, (3, 3))), scale_atoms=True)
        atoms.positions += rng.normal(0, 0.1, (len(atoms), 3))
        made.append(labelled(atoms, ("energy", "forces", "energies", "stress")))
    return made


def trainer(
    folder: Path,
    train: Sequence[Atoms],
    valid: Sequence[Atoms],
    config: Mapping[str, Any] | None = None,
    *,
    weights_seed: int = 0,
    world: World | None = None,
    **more: Any,
) -> Trainer:
    """A trainer with a tiny model; `config` overrides short, quiet defaults."""
    defaults = {"epochs": 3, "batch_size": 4, "warmup_steps": 3, "learning_rate": 5e-3, "tensorboard": False}
    settings = TrainConfig.model_validate({**defaults, **(config or {})})
    kind = torch.float64 if settings.dtype == "float64" else torch.float32
    model = model_config(MODEL)
    torch.manual_seed(weights_seed)
    student = build_model(model, ["Cu", "Au"], E0)
    student.network.to(kind)
    sets = [GraphDataset(frames, model.cutoff, kind) for frames in (train, valid)]
    return Trainer(student, model, Domain(elements=["Cu", "Au"]), *sets, settings, folder, world=world, **more)


def rows(folder: Path) -> list[dict[str, float]]:
    """The rows of log.csv."""
    with (folder / "log.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every tensor and plain value in nested dicts and lists, with its path."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from leaves(part, f"{name}/{key}")
    elif isinstance(value, list | tuple):
        for i, part in enumerate(value):
            yield from leaves(part, f"{name}/{i}")
    else:
        yield name, value


def differing(one: Any, other: Any) -> list[str]:
    """Paths of everything that is not bitwise the same in two nested structures."""
    a, b = dict(leaves(one)), dict(leaves(other))
    return sorted(name for name in a.keys() | b.keys() if _bits(a.get(name)) != _bits(b.get(name)))


def _bits(value: Any) -> Any:
    """Something that is equal only for the same bits, NaN included."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
    return value
