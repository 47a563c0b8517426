"""Models and engines for the tests of the checks: right ones, and ones with a bug each."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mlff_engines.checkpoint import Domain, set_dtype
from mlff_engines.evaluator import Evaluator
from mlff_engines.graph import Graph, collate, make_graph
from mlff_engines.models.lj import LennardJonesConfig
from mlff_engines.models.registry import build_model, model_config
from mlff_engines.neighbors import VerletList, neighbor_list
from mlff_engines.potential import Ensemble, Potential, edge_forces, edge_virial
from mlff_engines.structure import Result, Structure
from mlff_engines.validation.result import Claims, Evaluate
from mlff_engines.validation.static.neighbor_cases import Search
from mlff_engines.validation.static.systems import cluster, crystal

ARGON_KRYPTON = LennardJonesConfig(
    sigma={"Ar": 3.4, "Kr": 3.65}, epsilon={"Ar": 0.0103, "Kr": 0.0141}, switch=6.5, cutoff=8.0
)
NOBLE = Claims(["Ar", "Kr"], 8.0, {"Ar": -14350.1, "Kr": -75020.3}, spacing=3.8)
ORGANIC = Claims(["H", "C", "O"], 4.0, {"H": -13.6, "C": -1030.2, "O": -2041.3}, layers=2, spacing=1.6)
PAINN = {"features": 8, "interactions": 2, "cutoff": 4.0, "basis_size": 8}


def lennard_jones() -> Potential:
    """The analytic model in float64."""
    model = build_model(ARGON_KRYPTON, NOBLE.elements, NOBLE.e0)
    return Potential(model).eval()


def painn(seed: int = 0, claims: Claims = ORGANIC, dtype: torch.dtype = torch.float64, **options: Any) -> Potential:
    """PaiNN with random weights, none of them zero."""
    torch.manual_seed(seed)
    model = build_model(model_config({**PAINN, "cutoff": claims.cutoff, **options}), claims.elements, claims.e0, 0.7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    set_dtype(model, dtype)
    return Potential(model).eval()


def trained_painn(steps: int) -> tuple[Potential, Claims]:
    """PaiNN after some steps of force matching to Lennard-Jones; after a hundred its forces are 10 % off."""
    claims, teacher = replace(NOBLE, layers=2), evaluator(lennard_jones(), NOBLE)
    student = painn(claims=NOBLE).train()
    graphs, labels = [], []
    for seed in range(4):
        for structure in (cluster(NOBLE, 6, seed), crystal(NOBLE, seed)):
            index, vectors = neighbor_list(structure.positions, structure.cell, structure.pbc, NOBLE.cutoff)
            graphs.append(make_graph(*map(torch.from_numpy, (structure.numbers, index, vectors))))
            labels.append(torch.from_numpy(teacher(structure).forces))
    batch, forces = collate(graphs), torch.cat(labels)
    optimizer = torch.optim.Adam(student.parameters(), 5e-3)
    losses = []
    for _ in range(steps):
        out = student(batch)
        loss = (edge_forces(batch["edge_index"], out["edge_gradient"], len(forces)) - forces).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    return student.eval(), claims


def ensemble() -> Ensemble:
    return Ensemble([painn(seed) for seed in range(3)])


def evaluator(potential: nn.Module, claims: Claims, dtype: torch.dtype = torch.float64, **options: Any) -> Evaluator:
    """The engine of the core: skin, Verlet list and all."""
    domain = Domain(elements=list(claims.elements))
    return Evaluator(potential, domain, claims.cutoff, dtype=dtype, outside="ignore", **options)


@dataclass
class Engine:
    """What `check_model` is given."""

    evaluate: Evaluate
    search: Search = neighbor_list
    model_is_wrong: Potential | None = None  # the engine reproduces a model that is itself wrong


def domain_decomposed(potential: nn.Module, claims: Claims, *, owned_only: bool = True) -> Evaluate:
    """An engine that holds images as explicit ghost atoms, as LAMMPS does, and folds their forces back."""
    reach = claims.layers * claims.cutoff

    def evaluate(structure: Structure) -> Result:
        cell, pbc, atoms = structure.cell, structure.pbc, len(structure)
        # images of a lattice point that neighbour it within the reach, and how far atoms lie apart inside a cell
        span = np.ptp(structure.positions, axis=0).max(initial=0) * 2
        _, vectors = neighbor_list(np.zeros((1, 3)), cell, pbc, reach + span)
        shifts = np.concatenate([np.zeros((1, 3)), vectors])
        images = (shifts[:, None] + structure.positions).reshape(-1, 3)
        parent = np.tile(np.arange(atoms), len(shifts))
        near = np.linalg.norm(images[:, None] - structure.positions, axis=-1).min(axis=1) < reach
        near[:atoms] = True
        images, parent = images[near], torch.from_numpy(parent[near])
        index, vec = neighbor_list(images, np.zeros((3, 3)), np.zeros(3, dtype=bool), claims.cutoff)
        edge_index, edge_vec = torch.from_numpy(index), torch.from_numpy(vec)
        owned = torch.arange(len(images)) < (atoms if owned_only else len(images))
        out = potential(make_graph(torch.from_numpy(structure.numbers)[parent], edge_index, edge_vec, owned=owned))
        forces = edge_forces(edge_index, out["edge_gradient"], len(images))
        energies = (out["node_energy"] * owned).new_zeros(atoms).index_add(0, parent, out["node_energy"] * owned)
        virial = edge_virial(edge_vec, out["edge_gradient"], torch.zeros_like(edge_index[0]), 1)[0].numpy()
        return Result(
            float(energies.sum()),
            energies.numpy(),
            torch.zeros(atoms, 3, dtype=forces.dtype).index_add(0, parent, forces).numpy(),
            virial,
            None if structure.volume is None else -virial / structure.volume,
        )

    return evaluate


class StepCutoff(nn.Module):
    """The bug: cut, not taken to zero."""

    def __init__(self, cutoff: float) -> None:
        super().__init__()
        self.cutoff = cutoff

    def forward(self, r: Tensor) -> Tensor:
        return (r < self.cutoff).to(r.dtype)


class NonConservative(nn.Module):
    """The bug: pair forces scaled by up to 1 + error, depending on the surroundings of either atom."""

    def __init__(self, potential: nn.Module, cutoff: float, error: float) -> None:
        super().__init__()
        self.potential, self.cutoff, self.error = potential, cutoff, error

    def forward(self, graph: Graph) -> Graph:
        out: Graph = self.potential(graph)
        r = torch.linalg.vector_norm(graph["edge_vec"], dim=-1)
        closeness = (1 - r / self.cutoff).clamp(min=0) ** 4
        crowding = torch.zeros_like(out["node_energy"]).index_add(0, graph["edge_index"][0], closeness)
        scale = 1 + self.error * torch.sin(crowding) ** 2
        out["edge_gradient"] = out["edge_gradient"] * scale[graph["edge_index"][0]].unsqueeze(-1)
        return out


class StaleList(VerletList):
    """The bug: built once per composition."""

    def _reach(self, structure: Structure) -> float:
        old = self._reference
        return np.inf if old is not None and np.array_equal(old.numbers, structure.numbers) else -1.0


class FilteredList(VerletList):
    """The bug: some edges are dropped."""

    def __init__(self, cutoff: float, keep: Callable[[Any, Any], Any]) -> None:
        super().__init__(cutoff, 0.0)
        self.keep = keep

    def update(self, structure: Structure) -> tuple[Any, Any]:
        index, vectors = super().update(structure)
        keep = self.keep(index, vectors)
        return index[:, keep], vectors[keep]


def _nearest_image_only(index: Any, vectors: Any) -> Any:
    distance = np.linalg.norm(vectors, axis=1)
    keep = np.zeros(len(distance), dtype=bool)
    order = np.lexsort((distance, index[1], index[0]))
    first = np.diff(index[:, order], axis=1, prepend=-1).any(axis=0)
    keep[order[first]] = True
    return keep


def _filtered(potential: Potential, claims: Claims, keep: Callable[[Any, Any], Any]) -> Engine:
    engine = evaluator(potential, claims)
    engine.neighbors = FilteredList(claims.cutoff, keep)

    def search(positions: Any, cell: Any, pbc: Any, cutoff: float) -> tuple[Any, Any]:
        index, vectors = neighbor_list(positions, cell, pbc, cutoff)
        kept = keep(index, vectors)
        return index[:, kept], vectors[kept]

    return Engine(engine, search)


def _after(potential: Potential, claims: Claims, change: Callable[[Result], Result]) -> Engine:
    engine = evaluator(potential, claims)
    return Engine(lambda structure: change(engine(structure)))


def _before(potential: Potential, claims: Claims, change: Callable[[Structure], Structure]) -> Engine:
    engine = evaluator(potential, claims)
    return Engine(lambda structure: engine(change(structure)))


def truncated_cutoff(potential: Potential, claims: Claims) -> Engine:
    network: Any = potential.model.network
    if hasattr(network, "switching"):
        network.switching = StepCutoff(claims.cutoff - network.switch)
    else:
        network.cutoff_function = StepCutoff(claims.cutoff)
    return Engine(evaluator(potential, claims), model_is_wrong=potential)


def stale_list(potential: Potential, claims: Claims) -> Engine:
    engine = evaluator(potential, claims)
    engine.neighbors = StaleList(claims.cutoff, 0.5)
    return Engine(engine)


def non_conservative(error: float) -> Callable[[Potential, Claims], Engine]:
    return lambda potential, claims: Engine(evaluator(NonConservative(potential, claims.cutoff, error), claims))


def wrong_virial_sign(potential: Potential, claims: Claims) -> Engine:
    return _after(
        potential, claims, lambda r: replace(r, virial=-r.virial, stress=None if r.stress is None else -r.stress)
    )


def wrong_stress_sign(potential: Potential, claims: Claims) -> Engine:
    return _after(potential, claims, lambda r: r if r.stress is None else replace(r, stress=-r.stress))


def swapped_species(potential: Potential, claims: Claims) -> Engine:
    table = np.arange(119)
    table[claims.numbers] = claims.numbers[::-1]
    return _before(potential, claims, lambda s: replace(s, numbers=table[s.numbers]))


def nanometres(potential: Potential, claims: Claims) -> Engine:
    """Of the positions only: a cell that small would have a thousand times the edges."""
    return _before(potential, claims, lambda s: replace(s, positions=s.positions / 10))


def wrong_energy_unit(potential: Potential, claims: Claims) -> Engine:
    return _after(potential, claims, lambda r: replace(r, energy=1.0005 * r.energy, energies=1.0005 * r.energies))


def wrong_unit(potential: Potential, claims: Claims) -> Engine:
    def scaled(r: Result) -> Result:
        stress = None if r.stress is None else 1.0005 * r.stress
        return Result(1.0005 * r.energy, 1.0005 * r.energies, 1.0005 * r.forces, 1.0005 * r.virial, stress)

    return _after(potential, claims, scaled)


def single_precision_sum(potential: Potential, claims: Claims) -> Engine:
    return _after(potential, claims, lambda r: replace(r, energy=float(r.energies.astype(np.float32).sum())))


def single_precision_e0(potential: Potential, claims: Claims) -> Engine:
    e0: Any = potential.model.reference
    e0.e0 = e0.e0.float().double()
    return Engine(evaluator(potential, claims))


def single_precision_positions(potential: Potential, claims: Claims) -> Engine:
    return _before(potential, claims, lambda s: replace(s, positions=s.positions.astype(np.float32)))


def nearest_image_only(potential: Potential, claims: Claims) -> Engine:
    return _filtered(potential, claims, _nearest_image_only)


def no_self_images(potential: Potential, claims: Claims) -> Engine:
    return _filtered(potential, claims, lambda index, _: index[0] != index[1])


def half_list(potential: Potential, claims: Claims) -> Engine:
    return _filtered(potential, claims, lambda index, _: index[0] <= index[1])


def no_reaction(potential: Potential, claims: Claims) -> Engine:
    """F_i += g without F_j -= g."""
    seen: Graph = {}

    def noting(graph: Graph) -> Graph:
        seen.update({**graph, **potential(graph)})
        return seen

    whole = Evaluator(
        noting, Domain(elements=list(claims.elements)), claims.cutoff, dtype=torch.float64, outside="ignore"
    )

    def evaluate(structure: Structure) -> Result:
        right = whole(structure)
        none = torch.zeros(len(structure), 3, dtype=torch.float64)
        return replace(right, forces=none.index_add(0, seen["edge_index"][0], seen["edge_gradient"]).numpy())

    return Engine(evaluate)


def unwrapped_atoms(potential: Potential, claims: Claims) -> Engine:
    """A search in the 27 cells around the home cell that takes atoms to lie inside it."""

    def search(positions: Any, cell: Any, pbc: Any, cutoff: float) -> tuple[Any, Any]:
        index, vectors, shifts = [], [], itertools.product(*[(-1, 0, 1) if p else (0,) for p in pbc])
        for shift in shifts:
            vec = positions[None] - positions[:, None] + np.array(shift) @ cell
            close = (vec**2).sum(-1) < cutoff**2
            if not any(shift):
                np.fill_diagonal(close, False)
            index.append(np.argwhere(close).T)
            vectors.append(vec[close])
        return np.concatenate(index, axis=1), np.concatenate(vectors)

    class Naive(VerletList):
        def update(self, structure: Structure) -> tuple[Any, Any]:
            return search(structure.positions, structure.cell, structure.pbc, self.cutoff)

    engine = evaluator(potential, claims)
    engine.neighbors = Naive(claims.cutoff, 0.0)
    return Engine(engine, search)


def ghosts_counted(potential: Potential, claims: Claims) -> Engine:
    return Engine(domain_decomposed(potential, claims, owned_only=False))


MODELS: dict[str, tuple[Callable[[], Potential], Claims]] = {
    "lj": (lennard_jones, NOBLE),
    "painn": (painn, ORGANIC),
}


@dataclass(frozen=True)
class Bug:
    """`caught`: the checks that fail for every one of `models`; others may fail besides."""

    make: Callable[[Potential, Claims], Engine]
    caught: str
    models: tuple[str, ...] = tuple(MODELS)


BUGS = {
    # the engine is right, its model is wrong: only what needs no reference can show it
    "cutoff truncated, no envelope": Bug(truncated_cutoff, "S7"),
    "stale neighbour list": Bug(stale_list, "S1 S5 S6"),
    "1 % non-conservative force": Bug(non_conservative(1e-2), "S1 S2 S3 S4"),
    "0.1 % non-conservative force": Bug(non_conservative(1e-3), "S1 S2 S3 S4"),
    "wrong sign of the virial": Bug(wrong_virial_sign, "S1 S2 S4"),
    "wrong sign of the stress alone": Bug(wrong_stress_sign, "S4"),
    "two species swapped": Bug(swapped_species, "S1 S2 S9"),
    "positions in nm for Å": Bug(nanometres, "S1 S2 S3 S6 S7"),
    "energy unit off by 1.0005": Bug(wrong_energy_unit, "S1 S2 S3 S4 S9"),
    "energy and force unit off by 1.0005": Bug(wrong_unit, "S1 S2 S9"),
    "energy summed in float32": Bug(single_precision_sum, "S1 S2 S3 S4 S5 S7 S9 S10"),
    "E0 in float32": Bug(single_precision_e0, "S1 S2 S9"),
    "positions in float32": Bug(single_precision_positions, "S1 S2 S3 S4 S5 S6 S7 S9 S10"),
    "nearest image only": Bug(nearest_image_only, "S1 S6 S8"),
    "edges to an atom's own images dropped": Bug(no_self_images, "S1 S6 S8"),
    "half neighbour list": Bug(half_list, "S1 S2 S5 S6 S8 S10"),
    "reaction forces missing": Bug(no_reaction, "S1 S2 S3"),
    "atoms taken to lie inside the box": Bug(unwrapped_atoms, "S6 S8"),
    "ghost atoms counted": Bug(ghosts_counted, "S1 S6", ("lj",)),
}
