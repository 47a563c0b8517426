"""From a model's energies to edge gradients, and from these to forces, virial and stress: the only place for both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mlff_engines.graph import Graph


class Potential(nn.Module):
    """An `AtomicModel` with the one call of automatic differentiation.

    In training mode the gradient can itself be differentiated. Call it with gradients enabled (TorchScript cannot
    enable them itself): neither under `torch.no_grad` nor `torch.inference_mode`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, graph: Graph) -> Graph:
        """`node_energy` (N,) eV and `edge_gradient` g = d(Σ owned node_energy)/d edge_vec (E, 3) eV/Å."""
        return self.differentiate(graph)

    def differentiate(self, graph: Graph) -> Graph:
        """The same, by automatic differentiation; a kernel overrides `forward` alone."""
        edge_vec = graph["edge_vec"].detach().requires_grad_(True)
        inputs = graph.copy()
        inputs["edge_vec"] = edge_vec
        out: Graph = self.model(inputs)
        owned_energy = (out["node_energy"] * graph["owned"]).sum()
        gradient = torch.autograd.grad([owned_energy], [edge_vec], create_graph=self.training)[0]
        assert gradient is not None
        if self.training:
            out["edge_vec"] = edge_vec  # the leaf: second derivatives need it
        else:
            out["node_energy"] = out["node_energy"].detach()
        out["edge_gradient"] = gradient
        return out


class Ensemble(nn.Module):
    """Several potentials as one: their mean, and how far they disagree.

    `energy_std` (B,) is the standard deviation of the members' total energies and `force_std` (N,) the root mean
    square deviation of their force vectors, sqrt(<|F_m - <F>|²>), both over members (Zhang et al., DP-GEN,
    Comput. Phys. Commun. 253, 107206 (2020), Eq. 3).
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, graph: Graph) -> Graph:
        """`node_energy` and `edge_gradient` of the mean, `energy_std` and `force_std`."""
        energies: list[Tensor] = []
        gradients: list[Tensor] = []
        forces: list[Tensor] = []
        n_atoms = graph["numbers"].shape[0]
        for member in self.members:
            out = member(graph)
            energies.append(out["node_energy"])
            gradients.append(out["edge_gradient"])
            forces.append(edge_forces(graph["edge_index"], out["edge_gradient"], n_atoms))
        node_energy = torch.stack(energies)  # (M, N)
        totals = node_energy.new_zeros((node_energy.shape[0], graph["charge"].shape[0]))
        totals = totals.index_add(1, graph["batch"], node_energy * graph["owned"])
        member_forces = torch.stack(forces)  # (M, N, 3)
        return {
            "node_energy": node_energy.mean(0),
            "edge_gradient": torch.stack(gradients).mean(0),
            "energy_std": totals.std(0, unbiased=False),
            "force_std": (member_forces - member_forces.mean(0)).square().sum(-1).mean(0).sqrt(),
        }


def edge_forces(edge_index: Tensor, edge_gradient: Tensor, n_atoms: int) -> Tensor:
    """Forces (N, 3) in eV/Å: F_i += g, F_j -= g for every edge i -> j."""
    forces = edge_gradient.new_zeros((n_atoms, 3))
    return forces.index_add(0, edge_index[0], edge_gradient).index_add(0, edge_index[1], -edge_gradient)


def edge_virial(edge_vec: Tensor, edge_gradient: Tensor, edge_batch: Tensor, n_structures: int) -> Tensor:
    """Virial (B, 3, 3) in eV: W = -Σ edge_vec ⊗ g, symmetrised. `edge_batch` (E,) tells each edge's structure."""
    outer = edge_vec.unsqueeze(-1) * edge_gradient.unsqueeze(-2)  # (E, 3, 3)
    total = outer.new_zeros((n_structures, 3, 3)).index_add(0, edge_batch, outer)
    return -0.5 * (total + total.transpose(-1, -2))


def stress_of(virial: Tensor, volume: Tensor) -> Tensor:
    """Stress (B, 3, 3) in eV/Å³, tension positive: -W/V = (1/V) dE/dε."""
    return -virial / volume.reshape(-1, 1, 1)
