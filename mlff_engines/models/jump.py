"""A jump: positions and velocities k time steps ahead, from those now. An equivariant encoder with vector heads.

    v_i -> v_i - v_com;  (q, μ) = encoder(graph; μ_i = u_i ⊗ w(z_i), |u_i|² in q),  u_i = v_i/sqrt(kT°/m_i)
    Δx_i = bound(a(z_i)·head_x(μ_i, q_i)) [+ v_i k dt];  Δv_i = b(z_i)·head_v(μ_i, q_i);  F_i = c·head_F(μ_i, q_i)

- equivariant under rotations and reflections, whatever the weights;
- bound(d) = d·tanh(|d|/d_max)/(|d|/d_max) keeps the direction, as tanh of each component would not;
- Σ m Δv = 0 and Σ m Δx = P k dt, projected out: momentum is conserved and the centre of mass flies straight.

The heads are the gated equivariant blocks of PaiNN (Schütt, Unke, Gastegger, arXiv 2102.03150, Fig. 3 and Sec. 4.2).

In goes a graph of `mlff_engines.graph` with `velocities` and `temperature`, see `INPUTS`.

| out            | shape  | unit  | meaning                                                    |
|----------------|--------|-------|------------------------------------------------------------|
| `dx`, `dv`     | (N, 3) | Å, Å/fs | float64, momentum projected                              |
| `clamped`      | (N,)   | -     | whether the bound shortened the displacement much          |
| `drift_x`, `drift_v` | (B, 3) | Å, Å/fs | of the centre of mass, before the projection         |
| `forces`       | (N, 3) | eV/Å  | only with a force head: at the positions now               |
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mlff_engines.config import Config
from mlff_engines.errors import ConfigError, MissingEngineError
from mlff_engines.graph import INPUTS as EDGES
from mlff_engines.graph import Graph, TensorSpec
from mlff_engines.models.base import Float64
from mlff_engines.models.painn import Message, Update, _dense, _mlp
from mlff_engines.models.radial import BasisName, CutoffName, make_basis, make_cutoff
from mlff_engines.structure import MAX_ATOMIC_NUMBER, NUMBERS
from mlff_engines.units import ACCELERATION, BOLTZMANN

REFERENCE_TEMPERATURE = 300.0  # K, of the scales of velocities
INPUTS = {name: EDGES[name] for name in ("numbers", "edge_index", "edge_vec", "batch")} | {
    "velocities": TensorSpec("(N, 3)", "float64", "Å/fs", "now"),
    "temperature": TensorSpec("(B,)", "float", "K", "read only if the model takes it; else only its length"),
}


class JumpConfig(Config):
    """Hyper-parameters of a jump."""

    arch: Literal["painn_jump", "torchmdnet_et_jump"] = "painn_jump"
    features: int = Field(64, ge=2, description="F, channels of the scalar and vector features")
    interactions: int = Field(3, ge=1, description="number of message and update blocks, or of attention layers")
    heads: int = Field(8, ge=1, description="of the attention; read by torchmdnet_et_jump alone")
    cutoff: float = Field(5.0, gt=0, description="interaction cutoff, Å")
    basis: BasisName = Field("bessel", description="radial basis; torchmdnet_et_jump has its own, expnorm")
    basis_size: int = Field(20, ge=2, description="number of radial basis functions")
    cutoff_function: CutoffName = Field(
        "cosine", description="envelope that takes messages to zero at the cutoff; torchmdnet_et_jump: cosine"
    )
    vector_features: int = Field(32, ge=1, description="channels of the vector heads")
    from_flight: bool = Field(False, description="predict what free flight lacks, instead of the whole displacement")
    bounded: bool = Field(True, description="bound the displacement smoothly")
    max_displacement: float = Field(1.5, gt=0, description="Å; the bound")
    forces: bool = Field(False, description="a third head for the forces at the start")
    temperature: bool = Field(False, description="take the temperature as an input")

    @property
    def hops(self) -> int:
        """Edges that an atom sees along; the transformer embeds the neighbours before its layers."""
        return self.interactions + (self.arch == "torchmdnet_et_jump")


class JumpTerms(Config):
    """What a jump is tied to: elsewhere it means nothing."""

    steps: int = Field(ge=1, description="k, base time steps per jump")
    timestep: float = Field(gt=0, description="base time step, fs")
    masses: dict[str, float] = Field(description="amu, by element")
    constraints: Literal["none", "hbonds"] = Field("none", description="bonds constrained in the training runs")
    ensemble: Literal["nve"] = Field("nve", description="of the trajectories that the training pairs come from")
    temperatures: list[float] = Field(min_length=1, description="K, of the runs that these started from")

    @model_validator(mode="after")
    def _known(self) -> JumpTerms:
        bad = [f"{e} {m:g}" for e, m in self.masses.items() if e not in NUMBERS or not m > 0]
        if bad or not self.masses:
            raise ValueError(f"masses of elements in amu above 0 are needed; got {', '.join(bad) or 'none'}")
        return self

    @property
    def interval(self) -> float:
        """fs."""
        return self.steps * self.timestep


class JumpReference(Float64):
    """Masses and scales by atomic number, (119,) float64."""

    def __init__(self, terms: JumpTerms, scales: Mapping[str, tuple[float, float]] | None, force_scale: float) -> None:
        super().__init__()
        masses, dx, dv = (torch.full((MAX_ATOMIC_NUMBER + 1,), torch.nan, dtype=torch.float64) for _ in range(3))
        for symbol, mass in terms.masses.items():
            thermal = (BOLTZMANN * REFERENCE_TEMPERATURE * ACCELERATION / mass) ** 0.5
            masses[NUMBERS[symbol]] = mass
            found = (thermal * terms.interval, thermal) if scales is None else scales[symbol]
            dx[NUMBERS[symbol]], dv[NUMBERS[symbol]] = found
        self.masses, self.dx, self.dv = nn.Buffer(masses), nn.Buffer(dx), nn.Buffer(dv)
        self.force = nn.Buffer(torch.tensor(force_scale, dtype=torch.float64))
        self.thermal = nn.Buffer((BOLTZMANN * REFERENCE_TEMPERATURE * ACCELERATION / masses) ** 0.5)


class JumpModel(nn.Module):
    """The network, its scales and the projection of momentum.

    Args:
        scales: typical Δx (Å) and Δv (Å/fs) by element; by default those of thermal flight.
        force_scale: eV/Å, typical force.
    """

    def __init__(
        self,
        config: JumpConfig,
        terms: JumpTerms,
        scales: Mapping[str, tuple[float, float]] | None = None,
        force_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.network = NETWORKS[config.arch](config)
        self.reference = JumpReference(terms, scales, force_scale)
        self.interval = terms.interval
        self.from_flight = config.from_flight
        self.bounded = config.bounded
        self.max_displacement = config.max_displacement

    def forward(self, graph: Graph) -> Graph:
        """See the tables above."""
        numbers, batch = graph["numbers"], graph["batch"]
        mass = self.reference.masses.index_select(0, numbers).unsqueeze(-1)  # (N, 1)
        total = mass.new_zeros((graph["temperature"].shape[0], 1)).index_add(0, batch, mass)
        velocities = graph["velocities"].double()
        flying = self.mean(velocities, mass, total, batch)  # (B, 3)
        relative = velocities - flying.index_select(0, batch)

        inputs = graph.copy()
        inputs["velocities"] = (relative / self.reference.thermal.index_select(0, numbers).unsqueeze(-1)).to(
            graph["edge_vec"].dtype
        )
        heads = self.network(inputs).double()  # (N, 3, 2 or 3)
        dx = heads[:, :, 0] * self.reference.dx.index_select(0, numbers).unsqueeze(-1)
        dv = heads[:, :, 1] * self.reference.dv.index_select(0, numbers).unsqueeze(-1)
        clamped = torch.zeros_like(numbers, dtype=torch.bool)
        if self.bounded:
            reach = torch.sqrt(dx.square().sum(-1, keepdim=True) + 1e-20) / self.max_displacement
            clamped = reach.squeeze(-1) > 1.0
            dx = dx * torch.tanh(reach) / reach
        if self.from_flight:
            dx = dx + relative * self.interval
        drift_x, drift_v = self.mean(dx, mass, total, batch), self.mean(dv, mass, total, batch)
        out = {
            "dx": dx + (flying * self.interval - drift_x).index_select(0, batch),
            "dv": dv - drift_v.index_select(0, batch),
            "clamped": clamped,
            "drift_x": drift_x,
            "drift_v": drift_v,
        }
        if heads.shape[2] > 2:
            out["forces"] = heads[:, :, 2] * self.reference.force
        return out

    def mean(self, vectors: Tensor, mass: Tensor, total: Tensor, batch: Tensor) -> Tensor:
        """Mass-weighted means (B, 3)."""
        return vectors.new_zeros((total.shape[0], 3)).index_add(0, batch, mass * vectors) / total


class JumpNetwork(nn.Module):
    """Raw vectors (N, 3, heads). The interactions are those of the subclass: `_interact`."""

    def __init__(self, config: JumpConfig) -> None:
        super().__init__()
        n_features = config.features
        self.features = n_features
        self.takes_temperature = config.temperature
        self.reference_temperature = REFERENCE_TEMPERATURE
        self.embedding = nn.Embedding(MAX_ATOMIC_NUMBER + 1, n_features)
        self.moving = nn.Embedding(MAX_ATOMIC_NUMBER + 1, n_features)
        self.state = _mlp(n_features + 1 + int(config.temperature), n_features, n_features)
        self.hidden = GatedVectors(n_features, n_features, config.vector_features)
        self.heads = GatedVectors(config.vector_features, config.vector_features, 2 + int(config.forces))

    def forward(self, graph: Graph) -> Tensor:
        """From a graph whose `velocities` are in units of thermal ones."""
        numbers, u = graph["numbers"], graph["velocities"]
        q = self.embedding(numbers)
        parts = [q, u.square().sum(-1, keepdim=True)]
        if self.takes_temperature:
            relative = graph["temperature"].to(q.dtype) / self.reference_temperature - 1.0
            parts.append(relative.index_select(0, graph["batch"]).unsqueeze(-1))
        q = q + self.state(torch.cat(parts, dim=-1))
        mu = normalised(u.unsqueeze(-1) * self.moving(numbers).unsqueeze(1))  # (N, 3, F)
        q, mu = self._interact(q, mu, graph)
        q, mu = self.hidden(q, mu)
        raw: Tensor = self.heads(q, mu)[1]
        return raw

    def _interact(self, q: Tensor, mu: Tensor, graph: Graph) -> tuple[Tensor, Tensor]:
        """New `q` (N, F) and `mu` (N, 3, F)."""
        raise NotImplementedError


class PaiNNJump(JumpNetwork):
    """With PaiNN's messages and updates."""

    def __init__(self, config: JumpConfig) -> None:
        super().__init__(config)
        n_features, layers = config.features, config.interactions
        self.basis = make_basis(config.basis, config.basis_size, config.cutoff)
        self.cutoff_function = make_cutoff(config.cutoff_function, config.cutoff)
        self.filter_net = _dense(config.basis_size, layers * 3 * n_features)
        self.messages = nn.ModuleList(Message(n_features, first=False) for _ in range(layers))
        self.updates = nn.ModuleList(Update(n_features, last=False) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(n_features) for _ in range(layers))

    def _interact(self, q: Tensor, mu: Tensor, graph: Graph) -> tuple[Tensor, Tensor]:
        edge_index, edge_vec = graph["edge_index"], graph["edge_vec"]
        distance = torch.linalg.vector_norm(edge_vec, dim=-1)
        direction = edge_vec / distance.unsqueeze(-1)
        envelope = self.cutoff_function(distance).unsqueeze(-1)
        filters = (self.filter_net(self.basis(distance)) * envelope).split(3 * self.features, dim=-1)
        blocks = zip(self.messages, self.updates, self.norms)  # noqa: B905 (TorchScript)
        for layer, (message, update, norm) in enumerate(blocks):
            q, mu = message(q, mu, filters[layer], direction, edge_index)
            q, mu = update(q, normalised(mu))
            q, mu = norm(q), normalised(mu)
        return q, mu


class TorchMDNetJump(JumpNetwork):
    """With the interactions of the equivariant transformer of Thölke, De Fabritiis (arXiv 2202.02541, Sec. 2.3).

    The blocks are those of TorchMD-Net, over the edges of the graph; its own neighbour list, which wants boxes of
    certain shapes, and its embedding of atoms are not used. The exported program needs no TorchMD-Net.

    Raises:
        ConfigError: heads that do not divide the features.
        MissingEngineError: TorchMD-Net is not installed.
    """

    def __init__(self, config: JumpConfig) -> None:
        super().__init__(config)
        made = _equivariant_transformer(config)
        self.distance_expansion = made.distance_expansion
        self.neighbor_embedding = made.neighbor_embedding
        self.attention_layers = made.attention_layers
        self.out_norm = made.out_norm

    def _interact(self, q: Tensor, mu: Tensor, graph: Graph) -> tuple[Tensor, Tensor]:
        near = torch.linalg.vector_norm(graph["edge_vec"], dim=-1)
        # there, row 0 is where a message comes from and row 1 where it goes to; an atom attends to itself too
        atoms = torch.arange(q.shape[0], device=q.device)
        edges = torch.cat([graph["edge_index"].flip(0), torch.stack([atoms, atoms])], dim=1)
        edge_vec = graph["edge_vec"]
        distance = torch.cat([near, near.new_zeros(q.shape[0])])
        direction = torch.cat([edge_vec / near.unsqueeze(-1), edge_vec.new_zeros((q.shape[0], 3))])
        radial = self.distance_expansion(distance)
        q = self._embed_neighbors(q, graph, near, radial[: near.shape[0]])
        for layer in self.attention_layers:
            dq, dmu = layer(q, mu, edges, distance, radial, direction)
            q, mu = q + dq, mu + dmu
        return self.out_norm(q), normalised(mu)

    def _embed_neighbors(self, q: Tensor, graph: Graph, distance: Tensor, radial: Tensor) -> Tensor:
        """Eq. 3, by TorchMD-Net's layers; its code picks edges by a mask, which torch cannot compile."""
        filters = self.neighbor_embedding.distance_proj(radial)
        filters = filters * self.neighbor_embedding.cutoff(distance).unsqueeze(-1)
        species = self.neighbor_embedding.embedding(graph["numbers"])
        messages = filters * species.index_select(0, graph["edge_index"][1])
        around = torch.zeros_like(q).index_add(0, graph["edge_index"][0], messages)
        combined: Tensor = self.neighbor_embedding.combine(torch.cat([q, around], dim=-1))
        return combined


def _equivariant_transformer(config: JumpConfig) -> Any:
    """TorchMD-Net's, with the cutoff on vectors too: without it an edge at the cutoff would still count."""
    if config.features % config.heads:
        raise ConfigError(
            f"{config.features} features do not divide by {config.heads} attention heads; choose a number of heads "
            "that does, such as 1, 2, 4 or 8"
        )
    try:
        package = import_module("torchmdnet.models.torchmd_et")
    except ImportError as error:
        raise MissingEngineError(
            f"arch torchmdnet_et needs TorchMD-Net ({error}): pip install torchmd-net, or choose arch painn"
        ) from error
    return package.TorchMD_ET(
        hidden_channels=config.features,
        num_layers=config.interactions,
        num_rbf=config.basis_size,
        num_heads=config.heads,
        cutoff_upper=config.cutoff,
        max_z=MAX_ATOMIC_NUMBER + 1,
        vector_cutoff=True,
    )


NETWORKS: dict[str, type[JumpNetwork]] = {"painn_jump": PaiNNJump, "torchmdnet_et_jump": TorchMDNetJump}


def normalised(mu: Tensor) -> Tensor:
    """`mu` (N, 3, F) of at most unit root mean square per atom; small ones stay as they are.

    Vectors that start from velocities, not from zero as in PaiNN, would grow with the square of themselves in each
    update. (As the equivariant layer normalisation of Liao, Smidt, Equiformer, arXiv 2206.11990, Sec. 4.1.)
    """
    return mu * torch.rsqrt(1 + mu.square().mean(dim=(1, 2), keepdim=True))


class GatedVectors(nn.Module):
    """Scalars (N, F) and vectors (N, 3, F) to (N, G) and (N, 3, G): vectors are mixed, and scaled by scalars."""

    def __init__(self, scalars: int, vectors: int, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.mix = _dense(vectors, outputs, bias=False)
        self.norm_mix = _dense(vectors, outputs, bias=False)
        self.gate = _mlp(scalars + outputs, scalars, 2 * outputs)

    def forward(self, q: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
        """New `q` (N, G) and `mu` (N, 3, G)."""
        length = torch.sqrt(self.norm_mix(mu).square().sum(1) + 1e-8)  # a finite slope at zero
        scalars, gates = self.gate(torch.cat([q, length], dim=-1)).split(self.outputs, dim=-1)
        return nn.functional.silu(scalars), gates.unsqueeze(1) * self.mix(mu)
