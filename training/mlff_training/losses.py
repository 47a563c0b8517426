"""What a student is asked to match, and how far off it is.

| target             | label (shape)        | unit    | error entering the loss                              |
|--------------------|----------------------|---------|------------------------------------------------------|
| energy             | `energy` (B,)        | eV      | ΔE/N per structure                                   |
| forces             | `forces` (N, 3)      | eV/Å    | every component                                      |
| stress             | `stress` (B, 3, 3)   | eV/Å³   | every component, periodic structures that have one   |
| per-atom energies  | `energies` (N,)      | eV      | every atom, where the teacher gives them             |
| Hessian row        | `hessian_row` (N, 3) | eV/Å²   | every component of one sampled row per structure     |

Hessian rows as targets: Amin, Raja, Krishnapriyan, arXiv 2501.09009. Atomic energies: arXiv 2502.05379.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.loader import DataLoader

from mlff_engines.config import Config
from mlff_engines.errors import DataError, TrainingError
from mlff_engines.graph import Graph
from mlff_engines.potential import Potential, edge_forces, edge_virial, stress_of
from mlff_training.data.dataset import GraphDataset, labels_of, to_graph


class LossConfig(Config):
    """Weights of the targets; a weight of 0 leaves a target out, and a label that is asked for must be in the data."""

    kind: Literal["mse", "huber", "mae"] = Field("mse", description="per-error function")
    huber_delta: float = Field(0.01, gt=0, description="where 'huber' turns linear, in the unit of each target")
    energy: float = Field(1.0, ge=0, description="weight of ΔE/N, eV")
    forces: float = Field(10.0, ge=0, description="weight of force components, eV/Å")
    stress: float = Field(0.0, ge=0, description="weight of stress components, eV/Å³")
    energies: float = Field(0.0, ge=0, description="weight of per-atom energies, eV")
    hessian: float = Field(0.0, ge=0, description="weight of Hessian-row components, eV/Å²")


# one error tensor per target; its mean square and mean absolute value are what is reported
Errors = dict[str, Tensor]

# targets that a data set may lack: their labels, and the frames that must have one
OPTIONAL = {"stress": ("stress", "no"), "energies": ("energies", "not every"), "hessian": ("hessian_row", "not every")}


def require_labels(labels: Mapping[str, Tensor], config: LossConfig, part: str) -> None:
    """Check that `labels`, those of any structure of the `part` set, have what `config` asks for.

    Raises:
        DataError: naming every weight above 0 whose label the data lack.
    """
    missing = [name for name, (label, _) in OPTIONAL.items() if getattr(config, name) and label not in labels]
    if part != "training" and "hessian" in missing:
        missing.remove("hessian")  # Hessian rows are not validated
    if missing:
        asked = "; ".join(
            f"train.loss.{name} is {getattr(config, name):g} but {OPTIONAL[name][1]} {part} frame has the label "
            f"{OPTIONAL[name][0]!r}"
            for name in missing
        )
        zero = ", ".join(f"train.loss.{name}: 0" for name in missing)
        raise DataError(f"{asked}. Label the frames (mlff label) or set {zero}")


def errors(potential: nn.Module, graph: Graph, labels: Mapping[str, Tensor], config: LossConfig) -> Errors:
    """Errors of every target that `labels` and `config` share, in the units of the table above.

    `potential` is an `mlff_engines.potential.Potential`; in training mode the errors can be differentiated.
    """
    out = potential(graph)
    n_atoms, n_structures = len(graph["numbers"]), len(graph["charge"])
    node_energy, gradient = out["node_energy"], out["edge_gradient"]
    found: Errors = {}

    energy = node_energy.new_zeros(n_structures).index_add(0, graph["batch"], node_energy)
    size = torch.bincount(graph["batch"], minlength=n_structures)
    found["energy"] = ((energy - labels["energy"]) / size).to(gradient.dtype)

    forces = edge_forces(graph["edge_index"], gradient, n_atoms)
    found["forces"] = forces - labels["forces"]

    if config.stress and "stress" in labels:
        edge_batch = graph["batch"].index_select(0, graph["edge_index"][0])
        virial = edge_virial(graph["edge_vec"], gradient, edge_batch, n_structures)
        known = labels["stress"].isfinite().all(-1).all(-1)  # a molecule among boxes has none
        # chosen before the division: the gradient through a volume that is NaN would be NaN, used or not
        stress = stress_of(virial[known], labels["volume"][known])
        found["stress"] = (stress - labels["stress"][known]).to(gradient.dtype)
    if config.energies and "energies" in labels:
        found["energies"] = (node_energy - labels["energies"]).to(gradient.dtype)
    if config.hessian and "hessian_row" in labels and potential.training:
        # one force component per structure; structures do not see each other, so one gradient gives every row
        first_atom = F.pad(size.cumsum(0), (1, 0))[:-1]
        component = first_atom * 3 + labels["hessian_index"]
        selected = forces.reshape(-1).index_select(0, component).sum()
        slope = torch.autograd.grad([selected], [out["edge_vec"]], create_graph=True)[0]
        found["hessian"] = edge_forces(graph["edge_index"], slope, n_atoms) - labels["hessian_row"]
    return found


def total_loss(found: Errors, config: LossConfig) -> Tensor:
    """Weighted sum of the mean per-error function of every target."""
    terms = [getattr(config, name) * _penalty(error, config).mean() for name, error in found.items() if error.numel()]
    return torch.stack(terms).sum()


def validate(
    potential: Potential, data: GraphDataset, loss: LossConfig, batch_size: int, device: torch.device
) -> dict[str, float]:
    """Loss, and mean absolute and root mean square error of each target over `data`, in eV and Å.

    Raises:
        TrainingError: an error is not finite; the frames are named.
    """
    potential.eval()
    parts: dict[str, list[Tensor]] = {}
    for number, batch in enumerate(DataLoader(data, batch_size=batch_size)):
        batch = batch.to(device)
        for name, error in errors(potential, to_graph(batch), labels_of(batch), loss).items():
            parts.setdefault(name, []).append(error.detach().double())
            if not error.isfinite().all():
                first = number * batch_size
                raise TrainingError(
                    f"the error of {name} is not finite on a frame from {first} to {first + batch.num_graphs - 1} of "
                    f"{len(data)} for validation; look at these labels, or lower train.learning_rate"
                )
    found = {name: torch.cat(part) for name, part in parts.items()}
    result = {"loss": float(total_loss(found, loss))}
    for name, error in found.items():
        if error.numel():
            result[f"{name}_mae"] = float(error.abs().mean())
            result[f"{name}_rmse"] = float(error.square().mean().sqrt())
    return result


def _penalty(error: Tensor, config: LossConfig) -> Tensor:
    if config.kind == "mse":
        return error.square()
    if config.kind == "mae":
        return error.abs()
    return F.huber_loss(error, torch.zeros_like(error), reduction="none", delta=config.huber_delta)
