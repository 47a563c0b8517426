"""A trained model on disk: weights as safetensors, everything else as YAML. These two are the truth.

A checkpoint is a folder with `config.yaml` and the weights file that it names. Writing `config.yaml` is the last
step, so a killed run leaves either the old checkpoint or the new one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from mlff_engines.config import Config, load_yaml, parse
from mlff_engines.errors import ArtifactError
from mlff_engines.files import replacing, sha256_of
from mlff_engines.models.jump import JumpConfig, JumpModel, JumpTerms
from mlff_engines.models.registry import ModelConfig, build_model, model_config
from mlff_engines.potential import Potential
from mlff_engines.structure import Structure

SCHEMA = 1


class Domain(Config):
    """Where a model may be asked: what it was trained on."""

    elements: list[str] = Field(description="element symbols")
    min_distances: dict[str, float] = Field(
        default_factory=dict, description="shortest distance seen in training per pair such as 'C-H', Å"
    )
    charges: list[float] = Field(default=[0.0], description="total charges seen in training, e")
    spins: list[float] = Field(default=[0.0], description="numbers of unpaired electrons seen in training")


class StructureRecord(Config):
    """A `Structure` as plain values."""

    numbers: list[int]
    positions: list[list[float]]
    cell: list[list[float]]
    pbc: list[bool]
    charge: float
    spin: float

    @classmethod
    def of(cls, structure: Structure) -> StructureRecord:
        """Record `structure`."""
        return StructureRecord(
            numbers=structure.numbers.tolist(),
            positions=structure.positions.tolist(),
            cell=structure.cell.tolist(),
            pbc=structure.pbc.tolist(),
            charge=structure.charge,
            spin=structure.spin,
        )

    @property
    def structure(self) -> Structure:
        """The structure recorded."""
        positions = np.array(self.positions, dtype=np.float64).reshape(-1, 3)
        return Structure(
            np.array(self.numbers), positions, np.array(self.cell), np.array(self.pbc), self.charge, self.spin
        )


class CheckpointConfig(Config):
    """The content of `config.yaml`."""

    schema_version: int = SCHEMA
    model: dict[str, Any] = Field(description="architecture and hyper-parameters")
    jump: JumpTerms | None = Field(None, description="what a jump is tied to; none for a potential")
    domain: Domain
    structures: list[StructureRecord] = Field(
        default_factory=list, description="some training structures, to try the exported model on"
    )
    training: dict[str, Any] = Field(default_factory=dict, description="provenance: data, teacher, errors, versions")
    weights: str = Field(description="file name of the weights")
    sha256: str = Field(description="of the weights file")


def save_checkpoint(
    folder: Path,
    model: torch.nn.Module,
    config: ModelConfig | JumpConfig,
    domain: Domain,
    training: dict[str, Any],
    structures: Sequence[Structure] = (),
    jump: JumpTerms | None = None,
) -> None:
    """Write a checkpoint of an `AtomicModel`, or of a `JumpModel` with its terms, replacing the one in `folder`."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    data = save(tensors)
    digest = hashlib.sha256(data).hexdigest()
    weights = f"model-{digest[:12]}.safetensors"
    with replacing(folder / weights) as temporary:
        temporary.write_bytes(data)
    content = CheckpointConfig(
        model=config.model_dump(),
        jump=jump,
        domain=domain,
        structures=[StructureRecord.of(structure) for structure in structures],
        training=training,
        weights=weights,
        sha256=digest,
    )
    with replacing(folder / "config.yaml") as temporary:
        exclude = {"jump"} if jump is None else None  # files of potentials stay readable for older versions
        temporary.write_text(yaml.safe_dump(content.model_dump(exclude=exclude), sort_keys=False))
    for stale in folder.glob("model-*.safetensors"):
        if stale.name != weights:
            stale.unlink()


def load_checkpoint(folder: Path) -> tuple[Potential, CheckpointConfig]:
    """The potential in evaluation mode, and what is known about it.

    Raises:
        ArtifactError: the folder is no checkpoint, its weights are missing, damaged or not those the YAML names.
    """
    config, tensors = read_checkpoint(folder)
    if config.jump is not None:
        raise ArtifactError(f"{folder} holds a jump of {config.jump.steps} steps, not a potential")
    elements = config.domain.elements
    model = build_model(model_config(config.model, str(folder)), elements, dict.fromkeys(elements, 0.0))
    _fill(model, model.network, tensors, folder)
    return Potential(model).eval(), config


def load_jump_checkpoint(folder: Path) -> tuple[JumpModel, CheckpointConfig]:
    """The jump in evaluation mode, and what is known about it.

    Raises:
        ArtifactError: as `load_checkpoint`; also a potential.
    """
    config, tensors = read_checkpoint(folder)
    if config.jump is None:
        raise ArtifactError(f"{folder} holds a potential, not a jump")
    model = JumpModel(parse(JumpConfig, config.model, str(folder)), config.jump)
    _fill(model, model.network, tensors, folder)
    return model.eval(), config


def read_checkpoint(folder: Path) -> tuple[CheckpointConfig, dict[str, Tensor]]:
    """What the files of a checkpoint say, hashes checked.

    Raises:
        ArtifactError: as `load_checkpoint`.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        what = "does not exist" if not folder.exists() else "is a file" if folder.is_file() else "has no config.yaml"
        raise ArtifactError(f"{folder} {what}; expected a checkpoint folder such as runs/NAME/best, made by training")
    config = load_yaml(CheckpointConfig, path)
    if config.schema_version > SCHEMA:
        raise ArtifactError(
            f"{path} has schema version {config.schema_version}; this mlff-engines reads up to {SCHEMA}: upgrade it"
        )
    weights = folder / config.weights
    try:
        if sha256_of(weights) != config.sha256:
            raise ArtifactError(f"{weights} is not the file {path} names: its SHA-256 differs. Restore the checkpoint")
        tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"cannot read the weights {weights}: {error}") from None
    return config, tensors


def _fill(model: torch.nn.Module, network: torch.nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    dtypes = {t.dtype for name, t in tensors.items() if name.startswith("network.") and t.is_floating_point()}
    if len(dtypes) == 1:  # else loading would round them to the default
        network.to(dtypes.pop())
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ArtifactError(f"{folder}: the weights file does not fit the model of config.yaml: {error}") from None


def set_dtype(potential: torch.nn.Module, dtype: torch.dtype) -> None:
    """Cast networks to float32 or float64 (references stay float64).

    Raises:
        ArtifactError: a weight that was finite is not any more.
    """
    potential.to(dtype)
    for name, tensor in potential.state_dict().items():
        if tensor.is_floating_point() and "reference" not in name.split(".") and not tensor.isfinite().all():
            raise ArtifactError(f"{name} is not finite in {dtype}: export in float64 instead")
