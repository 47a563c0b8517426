"""How good a jump is: against the ends of pairs, chained, and against flying on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mlff_engines.kstep.learned import LearnedJump
from mlff_engines.models.jump import JumpModel
from mlff_engines.structure import SYMBOLS, Structure
from mlff_training.kstep.batches import NM, NM_PER_PS, PairBatches
from mlff_training.kstep.pairs import Pairs

BINS = 60  # of the histograms of |dx|
MOST_CHAINS = 200


@torch.no_grad()
def validate(model: JumpModel, data: PairBatches, batch_size: int) -> dict[str, float]:
    """Errors over `data`: root mean squares per direction.

    | key           | unit  | meaning                                                                        |
    |---------------|-------|--------------------------------------------------------------------------------|
    | `x_rmse`      | Å     | of positions                                                                   |
    | `v_rmse`      | Å/fs  | of velocities                                                                  |
    | `x_flight`    | Å     | of positions, had the atoms flown on: a jump has to beat it                    |
    | `heat`        | -     | kinetic energy after the jump over the true one; regressions cool              |
    | `clamped`     | -     | fraction of atoms at the bound                                                 |
    """
    model.eval()
    interval = model.interval
    sums = np.zeros(3)
    kinetic, atoms, clamped = np.zeros(2), 0, 0
    count = len(data.part)
    for begin in range(0, count, batch_size):
        batch = data.batch(list(range(begin, min(begin + batch_size, count))))
        out = model(batch.graph)
        mass = model.reference.masses[batch.graph["numbers"]].unsqueeze(-1)
        v = batch.graph["velocities"]
        errors = (out["dx"] - batch.dx, out["dv"] - batch.dv, interval * v - batch.dx)
        sums += [float(e.square().sum()) for e in errors]
        kinetic += [float((mass * (v + dv).square()).sum()) for dv in (out["dv"], batch.dv)]
        atoms, clamped = atoms + len(v), clamped + int(out["clamped"].sum())
    x, v_error, flight = np.sqrt(sums / (3 * atoms))
    return {
        "x_rmse": float(x),
        "v_rmse": float(v_error),
        "x_flight": float(flight),
        "heat": float(kinetic[0] / kinetic[1]),
        "clamped": clamped / atoms,
    }


def rollout(model: JumpModel, jump: LearnedJump, pairs: Pairs, data: PairBatches, jumps: int) -> list[dict[str, float]]:
    """Errors after 1, 2, ... `jumps` chained jumps, where trajectories reach so far; see `validate` for the keys."""
    model.eval()
    follows = pairs.arrays["next"]
    inside = set(data.part.tolist())
    found: list[list[tuple[float, float, float]]] = [[] for _ in range(jumps)]
    starts = data.part[np.linspace(0, len(data.part) - 1, min(len(data.part), MOST_CHAINS), dtype=int)]
    for start in starts.tolist():
        pair, where = start, data.atoms(start)
        x, v = data.x[1][where], data.v[1][where]
        masses = data.masses[where][:, None]
        for n in range(jumps):
            step = jump(Structure(data.numbers[where], x), v, float(data.temperature[start]))
            x, v = x + step.dx, v + step.dv
            end = data.atoms(pair)
            true_x, true_v = NM * pairs.arrays["x_tk"][end], NM_PER_PS * pairs.arrays["v_tk"][end]
            heat = float((masses * v**2).sum() / (masses * true_v**2).sum())
            found[n].append((float(((x - true_x) ** 2).mean()), float(((v - true_v) ** 2).mean()), heat))
            pair = int(follows[pair])
            if pair < 0 or pair not in inside:
                break
    table = []
    for n, errors in enumerate(found):
        if errors:
            x2, v2, heat = np.mean(errors, axis=0)
            table.append(
                {
                    "jumps": float(n + 1),
                    "chains": float(len(errors)),
                    "x_rmse": float(np.sqrt(x2)),
                    "v_rmse": float(np.sqrt(v2)),
                    "heat": float(heat),
                }
            )
    return table


@torch.no_grad()
def displacements(model: JumpModel, data: PairBatches, batch_size: int) -> dict[str, Any]:
    """Histograms of |dx| (Å) of the jump and of the truth, by element, with the bound."""
    model.eval()
    parts: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    count = len(data.part)
    for begin in range(0, count, batch_size):
        batch = data.batch(list(range(begin, min(begin + batch_size, count))))
        lengths = [d.norm(dim=-1).numpy() for d in (model(batch.graph)["dx"], batch.dx)]
        numbers = batch.graph["numbers"].numpy()
        for z in np.unique(numbers).tolist():
            parts.setdefault(z, []).append((lengths[0][numbers == z], lengths[1][numbers == z]))
    bound = model.max_displacement if model.bounded else None
    found: dict[str, Any] = {"bound": bound, "elements": {}}
    for z, pieces in parts.items():
        ours, true = (np.concatenate([piece[i] for piece in pieces]) for i in (0, 1))
        edges = np.linspace(0, 1.05 * max(ours.max(), true.max()), BINS + 1)
        found["elements"][SYMBOLS[z]] = {
            "edges": edges.tolist(),
            "jump": np.histogram(ours, edges, density=True)[0].tolist(),
            "true": np.histogram(true, edges, density=True)[0].tolist(),
            "largest": {"jump": float(ours.max()), "true": float(true.max())},
        }
    return found
