"""PaiNN: polarizable atom interaction neural network (Schütt, Unke, Gastegger, ICML 2021, arXiv 2102.03150).

| paper                    | here                                                             |
|--------------------------|------------------------------------------------------------------|
| s_i (scalar features)    | `q` (N, F)                                                       |
| v_i (vector features)    | `mu` (N, 3, F)                                                   |
| W(r_ij)·f_cut, Eq. 7-8   | `filters` (E, 3F) of one layer, from `filter_net` and the cutoff |
| φ(s_j), Eq. 7            | `message_net`                                                    |
| U v_i, V v_i, Eq. 9      | `mu_u`, `mu_v` from `vector_mix`                                 |
| a_ss, a_vv, a_sv         | the three parts of `update_net`, Eq. 9-10                        |

Message (Eq. 7-8):  Δs_i = Σ_j φ_s(s_j) W_s;  Δv_i = Σ_j [v_j φ_vv(s_j) W_vv + φ_vs(s_j) W_vs r_ij/|r_ij|]
Update (Eq. 9-10):  Δs_i = a_ss + a_sv <U v_i, V v_i>;  Δv_i = a_vv U v_i,  a = update_net(s_i, |V v_i|)

The parameters map one to one, shape by shape, to those of SchNetPack 2 (Schütt et al., JCP 158, 144801 (2023)): the
parts of a message come in the order (Δs, W_vs, W_vv), and an update mixes as (V, U).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mlff_engines.config import Config
from mlff_engines.graph import Graph
from mlff_engines.models.radial import BasisName, CutoffName, make_basis, make_cutoff
from mlff_engines.structure import MAX_ATOMIC_NUMBER


class PaiNNConfig(Config):
    """Hyper-parameters of PaiNN."""

    arch: Literal["painn"] = "painn"
    features: int = Field(64, ge=2, description="F, channels of the scalar and vector features")
    interactions: int = Field(3, ge=1, description="number of message and update blocks")
    cutoff: float = Field(5.0, gt=0, description="interaction cutoff, Å")
    basis: BasisName = Field("bessel", description="radial basis")
    basis_size: int = Field(20, ge=2, description="number of radial basis functions")
    cutoff_function: CutoffName = Field("cosine", description="envelope that takes messages to zero at the cutoff")
    charge: bool = Field(False, description="take the total charge as an input")
    spin: bool = Field(False, description="take the number of unpaired electrons as an input")


class PaiNN(nn.Module):
    """Raw per-atom energies from a graph.

    The vector features enter the first layer as zeros and leave the last unread; those terms are skipped.
    """

    def __init__(self, config: PaiNNConfig) -> None:
        super().__init__()
        n_features, layers = config.features, config.interactions
        self.features = n_features
        self.embedding = nn.Embedding(MAX_ATOMIC_NUMBER + 1, n_features)
        self.electronic = ElectronicEmbedding(n_features, config.charge, config.spin)
        self.basis = make_basis(config.basis, config.basis_size, config.cutoff)
        self.cutoff_function = make_cutoff(config.cutoff_function, config.cutoff)
        self.filter_net = _dense(config.basis_size, layers * 3 * n_features)
        self.messages = nn.ModuleList(Message(n_features, first=i == 0) for i in range(layers))
        self.updates = nn.ModuleList(Update(n_features, last=i == layers - 1) for i in range(layers))
        self.readout = nn.Sequential(_dense(n_features, n_features // 2), nn.SiLU(), _dense(n_features // 2, 1))

    def forward(self, graph: Graph) -> Tensor:
        """Raw output y (N,)."""
        numbers, edge_index, edge_vec = graph["numbers"], graph["edge_index"], graph["edge_vec"]
        distance = torch.linalg.vector_norm(edge_vec, dim=-1)  # (E,)
        direction = edge_vec / distance.unsqueeze(-1)  # (E, 3)
        envelope = self.cutoff_function(distance).unsqueeze(-1)
        filters = (self.filter_net(self.basis(distance)) * envelope).split(3 * self.features, dim=-1)

        q = self.embedding(numbers)  # (N, F)
        q = q + self.electronic(q, graph["charge"], graph["spin"], graph["batch"])
        mu = q.new_zeros((q.shape[0], 3, self.features))
        for layer, (message, update) in enumerate(zip(self.messages, self.updates)):  # noqa: B905 (TorchScript)
            q, mu = message(q, mu, filters[layer], direction, edge_index)
            q, mu = update(q, mu)
        y: Tensor = self.readout(q)
        return y.squeeze(-1)


class ElectronicEmbedding(nn.Module):
    """Total charge and unpaired electrons as a change of the initial features of every atom of the structure.

    It depends on the atom's own element only, so that far fragments and domains do not talk through it.
    """

    def __init__(self, features: int, charge: bool, spin: bool) -> None:
        super().__init__()
        self.charge = charge
        self.spin = spin
        inputs = int(charge) + int(spin)
        self.net = _mlp(features + inputs, features, features) if inputs else nn.Identity()

    def forward(self, q: Tensor, charge: Tensor, spin: Tensor, batch: Tensor) -> Tensor:
        """Change of `q` (N, F) from `charge` and `spin` (B,)."""
        parts = [q]
        if self.charge:
            parts.append(charge.to(q.dtype).index_select(0, batch).unsqueeze(-1))
        if self.spin:
            parts.append(spin.to(q.dtype).index_select(0, batch).unsqueeze(-1))
        return self.net(torch.cat(parts, dim=-1)) if len(parts) > 1 else torch.zeros_like(q)


class Message(nn.Module):
    """Eq. 7-8: what the neighbours send."""

    def __init__(self, features: int, first: bool) -> None:
        super().__init__()
        self.features = features
        self.first = first
        self.message_net = _mlp(features, features, 3 * features)

    def forward(
        self, q: Tensor, mu: Tensor, filters: Tensor, direction: Tensor, edge_index: Tensor
    ) -> tuple[Tensor, Tensor]:
        """New `q` (N, F) and `mu` (N, 3, F); `filters` (E, 3F) of this layer, `direction` (E, 3)."""
        centre, neighbour = edge_index[0], edge_index[1]
        x = self.message_net(q)  # (N, 3F)
        if self.first:
            x, filters = x[:, : 2 * self.features], filters[:, : 2 * self.features]
        parts = (filters * x.index_select(0, neighbour)).split(self.features, dim=-1)
        dmu = parts[1].unsqueeze(1) * direction.unsqueeze(-1)  # (E, 3, F)
        if not self.first:
            dmu = dmu + parts[2].unsqueeze(1) * mu.index_select(0, neighbour)
        return q.index_add(0, centre, parts[0].to(q.dtype)), mu.index_add(0, centre, dmu.to(mu.dtype))


class Update(nn.Module):
    """Eq. 9-10: mixing within an atom."""

    def __init__(self, features: int, last: bool) -> None:
        super().__init__()
        self.features = features
        self.last = last
        self.vector_mix = _dense(features, 2 * features, bias=False)
        self.update_net = _mlp(2 * features, features, 3 * features)

    def forward(self, q: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
        """New `q` (N, F) and `mu` (N, 3, F)."""
        mu_v, mu_u = self.vector_mix(mu).split(self.features, dim=-1)  # (N, 3, F) each
        norm = torch.sqrt((mu_v * mu_v).sum(1) + 1e-8)  # a finite slope at zero
        a_ss, a_vv, a_sv = self.update_net(torch.cat([q, norm], dim=-1)).split(self.features, dim=-1)
        q = q + a_ss + a_sv * (mu_v * mu_u).sum(1)
        if not self.last:
            mu = mu + a_vv.unsqueeze(1) * mu_u
        return q, mu


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(_dense(inputs, hidden), nn.SiLU(), _dense(hidden, outputs))


def _dense(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.xavier_uniform_(layer.weight)  # as SchNetPack
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
