"""From labelled frames to a trained student: references, domain, model and the loop, put together once."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from ase import Atoms
from pydantic import Field

import mlff_engines
from mlff_engines.checkpoint import Domain, load_checkpoint
from mlff_engines.config import Config
from mlff_engines.errors import ConfigError
from mlff_engines.files import replacing
from mlff_engines.models.registry import build_model, model_config
from mlff_engines.structure import Structure
from mlff_training.data.checks import check_frames
from mlff_training.data.dataset import GraphDataset, digest, load_splits, save_splits, split, statistics
from mlff_training.data.duplicates import check_splits
from mlff_training.data.e0 import fit_e0
from mlff_training.data.formats import read
from mlff_training.distributed import world
from mlff_training.loop import TrainConfig, Trainer
from mlff_training.losses import validate

Frames = Sequence[Atoms]


class DataConfig(Config):
    """Where the labelled frames come from. Files may be extended XYZ, npz, DeePMD folders or ASE databases."""

    train: list[Path] = Field(min_length=1, description="files of training frames")
    valid: list[Path] | float | int = Field(
        0.1, description="files of validation frames, or the number or fraction to set aside from `train`"
    )
    test: list[Path] | float | int = Field(
        [], description="likewise for frames used only for the final errors; default none"
    )
    train_size: int | None = Field(None, ge=1, description="use only so many of the training frames")
    split_seed: int = Field(0, description="of the shuffle before the split")
    split_by: Literal["group", "frame"] = Field("group", description="keep trajectories (groups) whole or not")
    energy_unit: str | None = Field(None, description="unit of energies where the file does not say")
    length_unit: str | None = Field(None, description="unit of lengths where the file does not say")
    trust_units: bool = Field(False, description="skip the checks that guess wrong units from unlikely values")
    labels: str | None = Field(None, description="which labels, where a file has several (rMD17: 'old')")


class StudentConfig(Config):
    """A file for `mlff train`."""

    data: DataConfig = Field(description="labelled frames")
    e0: Literal["fit", "isolated"] | dict[str, float] = Field("fit", description="reference energies per element, eV")
    model: dict[str, Any] = Field(default_factory=dict, description="architecture and hyper-parameters")
    train: TrainConfig = Field(TrainConfig(), description="the training loop")
    device: str = Field("cpu", description="cpu, cuda, cuda:1, ...")


def load_data(config: DataConfig, folder: Path) -> dict[str, list[Atoms]]:
    """Training, validation and test frames; a split made here is kept in `folder/split.json` and used again."""

    def read_all(paths: Sequence[Path]) -> list[Atoms]:
        kept = {"energy_unit": config.energy_unit, "length_unit": config.length_unit, "labels": config.labels}
        return [frame for path in paths for frame in read(path, **kept)]

    train = read_all(config.train)
    elsewhere = {"valid": config.valid, "test": config.test}
    given = {name: read_all(source) for name, source in elsewhere.items() if isinstance(source, list)}
    set_aside = {name: size for name, size in elsewhere.items() if not isinstance(size, list)}
    if set_aside:
        sizes = {"train": config.train_size, **set_aside}
        given |= split_frames(train, sizes, config.split_seed, config.split_by, folder)
    else:
        given["train"] = train[: config.train_size]
    for name, frames in given.items():
        if frames:
            check_frames(frames, f"data.{name}", trust_units=config.trust_units)
    return given


def split_frames(
    frames: Frames,
    sizes: Mapping[str, float | None],
    seed: int,
    by: Literal["group", "frame"],
    folder: Path,
) -> dict[str, list[Atoms]]:
    """Divide `frames`; the part whose size is None takes the rest. Kept in `folder/split.json` and used again."""
    path = folder / "split.json"
    if path.exists():
        indices = load_splits(path, frames)
    else:
        counts = {k: round(v * len(frames)) if isinstance(v, float) else v for k, v in sizes.items() if v is not None}
        rest = len(frames) - sum(counts.values())
        indices = split(frames, {k: counts.get(k, rest) for k in sizes}, seed, by)
        save_splits(path, indices, frames)
    return {name: [frames[i] for i in chosen] for name, chosen in indices.items()}


def train_student(
    parts: Mapping[str, Frames],
    e0: Literal["fit", "isolated"] | Mapping[str, float],
    model: Mapping[str, Any],
    train: TrainConfig,
    folder: Path,
    *,
    device: str = "cpu",
    teacher: str | None = None,
    allow_config_change: bool = False,
) -> dict[str, dict[str, float]]:
    """Train on `parts` ("train", "valid" and perhaps "test") in `folder`; the best checkpoint is `folder/best`.

    Returns:
        errors of the best checkpoint in eV and Å, by part ("valid", and "test" if there is one); they are also written
        to `folder/errors.json`.

    Raises:
        DataError: duplicates across the parts, missing labels, or no reference energy for an element.
        TrainingError: see `Trainer`.
    """
    check_splits(parts)
    torch.set_num_threads(train.threads)
    config = model_config(model)
    kind = torch.float64 if train.dtype == "float64" else torch.float32
    sets = {name: GraphDataset(parts[name], config.cutoff, kind) for name in ("train", "valid")}
    facts = statistics(parts["train"], config.cutoff)
    reference = fit_e0(parts["train"], e0)
    domain = domain_of(parts["train"], facts)
    for name, trained, taken in (("charge", domain.charges, config.charge), ("spin", domain.spins, config.spin)):
        if len(trained) > 1 and not taken:
            raise ConfigError(
                f"the training data have several values of {name} ({trained}) but the model does not take it; "
                f"set model.{name}: true"
            )
    torch.manual_seed(train.seed)
    student = build_model(config, domain.elements, reference.e0, scale=facts["force_rms"] or 1.0)
    student.network.to(kind)
    provenance = {
        "teacher": teacher or sorted({str(atoms.info.get("level", "unknown")) for atoms in parts["train"]}),
        "frames": {name: len(frames) for name, frames in parts.items()},
        "data_sha256": {name: digest(frames) for name, frames in parts.items() if len(frames)},
        "e0": reference.note,
        "train": train.model_dump(mode="json"),
        "versions": {
            "mlff-engines": mlff_engines.__version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
    }
    with world(device) as processes:
        trainer = Trainer(
            student,
            config,
            domain,
            sets["train"],
            sets["valid"],
            train,
            folder,
            world=processes,
            provenance=provenance,
            structures=some_structures(parts["train"]),
            device=device,
            allow_config_change=allow_config_change,
        )
        found = {"valid": trainer.run()}
        if processes.rank == 0:
            if parts.get("test"):
                best, _ = load_checkpoint(folder / "best")
                test = GraphDataset(parts["test"], config.cutoff, kind)
                found["test"] = validate(best.to(device), test, train.loss, train.batch_size, torch.device(device))
            with replacing(folder / "errors.json") as temporary:
                temporary.write_text(json.dumps(found, indent=1))
    return found


def domain_of(frames: Frames, facts: Mapping[str, Any]) -> Domain:
    """Elements, shortest distances, charges and spins of `frames`, whose `statistics` are `facts`."""
    return Domain(
        elements=facts["elements"],
        min_distances={pair: round(distance, 4) for pair, distance in facts["min_distance"].items()},
        charges=sorted({float(atoms.info.get("charge", 0.0)) for atoms in frames}),
        spins=sorted({float(atoms.info.get("multiplicity", 1) - 1) for atoms in frames}),
    )


def some_structures(frames: Frames, count: int = 2) -> list[Structure]:
    """The smallest frame and others spread over the set."""
    smallest = min(range(len(frames)), key=lambda i: len(frames[i]))
    spread = np.linspace(0, len(frames) - 1, count, dtype=int).tolist()
    return [structure_of(frames[i]) for i in dict.fromkeys([smallest, *spread][:count])]


def structure_of(atoms: Atoms) -> Structure:
    """The structure of a frame, its charge and multiplicity taken from `atoms.info`."""
    charge, spin = float(atoms.info.get("charge", 0.0)), float(atoms.info.get("multiplicity", 1) - 1)
    return Structure(atoms.numbers, atoms.positions, np.array(atoms.cell), atoms.pbc, charge, spin)
