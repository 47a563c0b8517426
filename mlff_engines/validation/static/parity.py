"""S1, S2: the same numbers as the eager model in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from mlff_engines.checkpoint import set_dtype
from mlff_engines.graph import make_graph
from mlff_engines.neighbors import neighbor_list_reference
from mlff_engines.potential import Potential
from mlff_engines.structure import FloatArray, Result, Structure
from mlff_engines.validation.result import CheckResult, Claims, Curve, Evaluate, Plot, Worst, deviation
from mlff_engines.validation.static.systems import cluster

# as compared: above 1, relative to the largest force or virial
UNITS = {"energy": "eV/atom", "energies": "eV", "forces": "eV/Å", "virial": "eV/atom"}
MOST_POINTS = 1000  # per structure in a plot


def reference(potential: nn.Module, cutoff: float) -> Evaluate:
    """An eager `Potential` or `Ensemble` in float64 on brute-force neighbours, to judge every engine by.

    It shares no code with what it judges: forces are derivatives by positions, virials by a strain, and an
    ensemble's spread is taken from the members' own forces.
    """
    exact = copy.deepcopy(potential)
    set_dtype(exact, torch.float64)
    models = [part.eval().model for part in exact.modules() if isinstance(part, Potential)]

    def evaluate(structure: Structure) -> Result:
        index, vectors = neighbor_list_reference(structure.positions, structure.cell, structure.pbc, cutoff)
        edge_index = torch.from_numpy(index)
        start = torch.from_numpy(structure.positions)
        offset = torch.from_numpy(vectors) - (start[edge_index[1]] - start[edge_index[0]])
        found = []
        for model in models:
            positions, strain = start.clone().requires_grad_(), torch.zeros(3, 3, dtype=start.dtype, requires_grad=True)
            edges = positions[edge_index[1]] - positions[edge_index[0]] + offset
            graph = make_graph(
                torch.from_numpy(structure.numbers),
                edge_index,
                edges + edges @ (strain + strain.T) / 2,
                charge=torch.tensor([structure.charge], dtype=start.dtype),
                spin=torch.tensor([structure.spin], dtype=start.dtype),
            )
            energies = model(graph)["node_energy"]
            slopes = torch.autograd.grad(energies.sum(), [positions, strain])
            found.append((energies.detach().numpy(), -slopes[0].numpy(), -slopes[1].numpy()))
        energies_m, forces_m, virial_m = (np.stack(part) for part in zip(*found, strict=True))  # members first
        energies, forces, virial = energies_m.mean(0), forces_m.mean(0), virial_m.mean(0)
        spread = len(models) > 1
        return Result(
            energy=float(energies.sum()),
            energies=energies,
            forces=forces,
            virial=virial,
            stress=None if structure.volume is None else -virial / structure.volume,
            energy_std=float(energies_m.sum(1).std()) if spread else None,
            force_std=np.sqrt(((forces_m - forces) ** 2).sum(-1).mean(0)) if spread else None,
        )

    return evaluate


def check_parity(
    evaluate: Evaluate, expected: Evaluate, claims: Claims, structures: Mapping[str, Structure]
) -> CheckResult:
    """S1: energy, per-atom energies, forces and virial on every structure, and again after its atoms moved."""
    rng = np.random.default_rng(0)
    worst, by_quantity, forces = Worst(claims.offers), dict.fromkeys(UNITS, 0.0), []
    for name, structure in structures.items():
        rattle = 0.25 * claims.spacing * rng.uniform(-1, 1, structure.positions.shape)
        wide = replace(structure, positions=1.5 * structure.positions, cell=1.5 * structure.cell)
        # one after another: a neighbour list kept too long shows
        for label, case in (
            (name, structure),
            (f"{name}, atoms moved", replace(structure, positions=structure.positions + rattle)),
            (f"{name}, expanded", wide),
            (f"{name}, back again", structure),
        ):
            found, right = evaluate(case), expected(case)
            worst.compare(label, found, right)
            for quantity, figure in deviation(found, right, claims.offers).items():
                by_quantity[quantity] = max(by_quantity.get(quantity, 0.0), figure)
            if label == name:
                forces.append((name, right.forces.ravel(), found.forces.ravel()))
    shown = {f"{name}, {unit}": by_quantity[name] for name, unit in UNITS.items() if name in claims.offers}
    return replace(worst.judged("S1", claims.dtype), figures=shown, plots=_parity_plots(forces))


def _parity_plots(forces: Sequence[tuple[str, FloatArray, FloatArray]]) -> list[Plot]:
    """Forces of the engine against the eager model's, and what is left of them."""
    few = [(name, right[:MOST_POINTS], found[:MOST_POINTS]) for name, right, found in forces]
    axis = "force component of the eager model, eV/Å"
    return [
        Plot("Parity of forces", axis, "engine, eV/Å", _points(few, lambda right, found: found)),
        Plot("What is left", axis, "engine - eager model, eV/Å", _points(few, lambda right, found: found - right)),
    ]


def _points(
    forces: Sequence[tuple[str, FloatArray, FloatArray]], value: Callable[[FloatArray, FloatArray], FloatArray]
) -> list[Curve]:
    return [
        Curve(name, right.tolist(), value(right, found).tolist(), style="points")
        for name, right, found in forces
        if np.isfinite(found).all() and np.abs(right).max(initial=0.0) > 0
    ]


def check_calls(evaluate: Evaluate, expected: Evaluate, claims: Claims) -> CheckResult:
    """S2: call after call with other shapes, when an executor has specialised its code to the earlier ones."""
    worst = Worst(claims.offers)
    for call, atoms in enumerate((5, 5, 5, 9, 2, 1, 5, 12, 9)):
        structure = cluster(claims, atoms, seed=call)
        worst.compare(f"call {call + 1}, {atoms} atoms", evaluate(structure), expected(structure))
    return worst.judged("S2", claims.dtype)
