"""Labelled structures as batches of graphs for training: edges computed once, splits that do not leak."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from ase import Atoms
from torch import Tensor
from torch.utils.data import Dataset
from torch_geometric.data import Data

from mlff_engines.errors import DataError
from mlff_engines.files import replacing
from mlff_engines.graph import INPUTS, Graph
from mlff_engines.neighbors import neighbor_list
from mlff_engines.structure import SYMBOLS
from mlff_training.data.duplicates import duplicate_pairs
from mlff_training.data.labels import DataWarning, results

LABELS = ("energy", "forces", "stress", "volume", "energies", "hessian_row", "hessian_index")


class LabelledGraph(Data):
    """One structure: the inputs of `mlff_engines.graph.INPUTS` and its labels.

    | label           | shape     | dtype   | unit  | meaning                                                         |
    |-----------------|-----------|---------|-------|-----------------------------------------------------------------|
    | `energy`        | (1,)      | float64 | eV    | total energy                                                    |
    | `forces`        | (N, 3)    | dtype   | eV/Å  | -dE/dR                                                          |
    | `stress`        | (1, 3, 3) | dtype   | eV/Å³ | tension positive; NaN where a frame has none                    |
    | `volume`        | (1,)      | float64 | Å³    | NaN without three periodic axes                                 |
    | `energies`      | (N,)      | float64 | eV    | per-atom energies                                               |
    | `hessian_row`   | (N, 3)    | dtype   | eV/Å² | d²E/(dR_k dR)                                                   |
    | `hessian_index` | (1,)      | int64   | -     | k = 3*atom + axis, within its own structure (not shifted)       |
    """

    def __inc__(self, key: str, value: Any, *args: Any, **kwargs: Any) -> Any:
        # torch-geometric would shift every key with "index" in its name
        return 0 if key == "hessian_index" else super().__inc__(key, value, *args, **kwargs)


class GraphDataset(Dataset[Data]):
    """Labelled structures as graphs; the edges of each are computed when first asked for, and kept.

    `stress` is there if any frame has one. `energies` and `hessian_row` are there if every frame has them.

    Args:
        frames: see `mlff_training.data.labels`; every frame needs an energy and, unless it is a single atom, forces.
        cutoff: Å.
        dtype: of edge vectors, forces, stress and Hessian rows.

    Attributes:
        digest: SHA-256 of all structures and labels, in their order.

    Raises:
        DataError: for an empty set, or a frame without energy or forces.
    """

    def __init__(self, frames: Sequence[Atoms], cutoff: float, dtype: torch.dtype = torch.float32) -> None:
        if not frames:
            raise DataError("a data set needs at least one frame; got none")
        self.frames, self.cutoff, self.dtype = list(frames), float(cutoff), dtype
        self._labels = [results(atoms) for atoms in self.frames]
        for number, (atoms, label) in enumerate(zip(self.frames, self._labels, strict=True)):
            missing = [name for name in ("energy", "forces") if name not in label]
            if missing == ["forces"] and len(atoms) == 1:
                label["forces"] = np.zeros((1, 3))
            elif missing:
                raise DataError(
                    f"frame {number} ({atoms.get_chemical_formula()}) has no {' and no '.join(missing)}; found "
                    f"{sorted(label) or 'no labels'}. Label it or remove it"
                )
        self._has_stress = any("stress" in label for label in self._labels)
        self._has_energies = self._in_all("energies", ["energies" in label for label in self._labels])
        self._has_hessian = self._in_all("hessian_row", ["hessian_row" in atoms.arrays for atoms in self.frames])
        self.digest = digest(self.frames)
        self._graphs: list[Data | None] = [None] * len(self.frames)

    @staticmethod
    def _in_all(name: str, present: list[bool]) -> bool:
        if any(present) and not all(present):
            warnings.warn(
                f"{name} is left out: only {sum(present)} of {len(present)} frames have it", DataWarning, stacklevel=3
            )
        return all(present)

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> Data:
        graph = self._graphs[index]
        if graph is None:
            graph = self._graphs[index] = self._build(index)
        return graph

    def _build(self, index: int) -> Data:
        atoms, label = self.frames[index], self._labels[index]
        cell = np.asarray(atoms.cell)
        edge_index, edge_vec = neighbor_list(atoms.positions, cell, atoms.pbc, self.cutoff)
        graph = LabelledGraph(
            numbers=torch.as_tensor(atoms.numbers, dtype=torch.int64),
            edge_index=torch.from_numpy(edge_index),
            edge_vec=self._float(edge_vec),
            owned=torch.ones(len(atoms), dtype=torch.bool),
            charge=self._float([atoms.info.get("charge", 0.0)]),
            spin=self._float([atoms.info.get("multiplicity", 1) - 1]),
            num_nodes=len(atoms),
            energy=torch.tensor([label["energy"]], dtype=torch.float64),
            forces=self._float(label["forces"]),
        )
        if self._has_stress:
            xx, yy, zz, yz, xz, xy = label.get("stress", np.full(6, np.nan))
            graph.stress = self._float([[[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]]])
            volume = abs(np.linalg.det(cell)) if atoms.pbc.all() else np.nan
            graph.volume = torch.tensor([volume], dtype=torch.float64)
        if self._has_energies:
            graph.energies = torch.as_tensor(label["energies"], dtype=torch.float64)
        if self._has_hessian:
            graph.hessian_row = self._float(atoms.arrays["hessian_row"])
            graph.hessian_index = torch.tensor([atoms.info["hessian_index"]], dtype=torch.int64)
        return graph

    def _float(self, values: Any) -> Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.float64)).to(self.dtype)


def to_graph(batch: Data) -> Graph:
    """The model's inputs out of a batch of a torch-geometric `DataLoader`, or out of one `LabelledGraph`."""
    graph: Graph = {name: batch[name] for name in INPUTS if name in batch}
    if "batch" not in graph:
        graph["batch"] = torch.zeros_like(graph["numbers"])
    return graph


def labels_of(batch: Data) -> dict[str, Tensor]:
    """The labels out of a batch, see `LabelledGraph`."""
    return {name: batch[name] for name in LABELS if name in batch}


def digest(frames: Sequence[Atoms]) -> str:
    """SHA-256 of structures, charge, multiplicity and labels, in their order; metadata (level, group) do not count."""
    hashed = hashlib.sha256()
    for atoms in frames:
        state = [atoms.info.get("charge", 0.0), atoms.info.get("multiplicity", 1), atoms.info.get("hessian_index", -1)]
        arrays = {"numbers": atoms.numbers, "positions": atoms.positions, "cell": np.asarray(atoms.cell)}
        arrays |= {"pbc": atoms.pbc, "state": np.array(state), **results(atoms)}
        if "hessian_row" in atoms.arrays:
            arrays["hessian_row"] = atoms.arrays["hessian_row"]
        for name, value in sorted(arrays.items()):
            array = np.ascontiguousarray(value, dtype="<f8") + 0.0  # no minus zero
            hashed.update(f"{name}{array.shape}".encode() + array.tobytes())
    return hashed.hexdigest()


def split(
    frames: Sequence[Atoms],
    parts: Mapping[str, float],
    seed: int = 0,
    by: Literal["group", "frame"] = "group",
) -> dict[str, list[int]]:
    """Indices of each part; copies of one structure stay together, and by "group" so does every group.

    The shuffle orders hashes of `seed` and content: it depends on no library version and on no order of frames.

    Args:
        frames: a frame without `info["group"]` is a group of its own.
        parts: part -> number of frames (int), or fraction of all (float). Counts are met exactly, unless they add up
            to all frames: these, like fractions, are met as nearly as the groups allow, and no frame is left out.
        seed: of the shuffle.
        by: "frame" ignores groups.

    Raises:
        DataError: for parts that cannot be had: more than there is, or groups that do not fit.
    """
    targets = _targets(parts, len(frames))
    everything = sum(targets.values()) == len(frames)
    clusters = _clusters(frames, by)
    order = {c[0]: hashlib.sha256(f"{seed}:{digest([frames[c[0]]])}".encode()).hexdigest() for c in clusters}
    clusters.sort(key=lambda cluster: (-len(cluster), order[cluster[0]]))  # large ones find room first
    chosen: dict[str, list[int]] = {name: [] for name in targets}
    for cluster in clusters:
        need = {name: target - len(chosen[name]) for name, target in targets.items()}
        fitting = [name for name in targets if need[name] >= len(cluster)]
        if fitting:
            name = max(fitting, key=lambda part: need[part] / targets[part])
        elif everything:
            name = max(targets, key=lambda part: (not chosen[part], need[part]))
        else:
            continue
        chosen[name] += cluster
    short = {n: len(chosen[n]) for n, target in targets.items() if not chosen[n] or len(chosen[n]) < 0.5 * target}
    counted = all(isinstance(part, int) for part in parts.values()) and not everything
    if short or (counted and any(len(chosen[name]) != target for name, target in targets.items())):
        sizes = sorted(map(len, clusters), reverse=True)
        raise DataError(
            f"cannot split {len(frames)} frames into {dict(parts)}: the {len(clusters)} groups (copies counted as one; "
            f"largest {sizes[:5]}) give { ({name: len(indices) for name, indices in chosen.items()}) }. "
            + ("Ask for other sizes, or split by='frame'" if by == "group" else "Ask for other sizes")
        )
    return {name: sorted(indices) for name, indices in chosen.items()}


def _targets(parts: Mapping[str, float], total: int) -> dict[str, int]:
    values = list(parts.values())
    if not values or any(value <= 0 for value in values):
        raise DataError(f"cannot split into {dict(parts)}: expected positive counts or fractions")
    if all(isinstance(value, int) for value in values):
        targets = {name: int(value) for name, value in parts.items()}
    elif all(isinstance(value, float) and value <= 1 for value in values) and sum(values) <= 1 + 1e-9:
        edges = np.round(np.cumsum([0.0, *values]) * total).astype(int)
        targets = dict(zip(parts, np.diff(edges).tolist(), strict=True))
    else:
        raise DataError(f"cannot split into {dict(parts)}: expected all counts, or fractions that sum to at most 1")
    if sum(targets.values()) > total or min(targets.values()) < 1:
        raise DataError(
            f"cannot split {total} frames into {dict(parts)}: {targets} frames; every part needs at least one"
        )
    return targets


def _clusters(frames: Sequence[Atoms], by: str) -> list[list[int]]:
    """Frames that must stay together: connected by a common group or by being copies."""
    parent = list(range(len(frames)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first_of: dict[str, int] = {}
    links = duplicate_pairs(frames)
    if by == "group":
        links += [
            (first_of.setdefault(atoms.info["group"], i), i) for i, atoms in enumerate(frames) if "group" in atoms.info
        ]
    for i, j in links:
        parent[max(root(i), root(j))] = min(root(i), root(j))
    members = defaultdict(list)
    for i in range(len(frames)):
        members[root(i)].append(i)
    return list(members.values())


def save_splits(path: str | Path, splits: Mapping[str, Sequence[int]], frames: Sequence[Atoms]) -> None:
    """Write indices and the digest of the data they belong to, as JSON, atomically."""
    content = {"data_sha256": digest(frames), "frames": len(frames), "splits": {k: list(v) for k, v in splits.items()}}
    with replacing(Path(path)) as temporary:
        temporary.write_text(json.dumps(content) + "\n")


def load_splits(path: str | Path, frames: Sequence[Atoms]) -> dict[str, list[int]]:
    """Read what `save_splits` wrote.

    Raises:
        DataError: unreadable, or made for other data.
    """
    try:
        content = json.loads(Path(path).read_text())
        splits, made_for = {str(k): [int(i) for i in v] for k, v in content["splits"].items()}, content["data_sha256"]
    except OSError as error:
        raise DataError(f"cannot read the splits {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no file of splits: {error!r}; make it again") from None
    if made_for != digest(frames):
        raise DataError(
            f"{path} was made for other data ({content.get('frames')} frames, sha256 {made_for[:12]}...); "
            f"got {len(frames)} frames, sha256 {digest(frames)[:12]}.... Split again"
        )
    return splits


def statistics(frames: Sequence[Atoms], cutoff: float = 5.0) -> dict[str, Any]:
    """What a model records about its training data, ready for JSON.

    | key            | unit | meaning                                                                             |
    |----------------|------|-------------------------------------------------------------------------------------|
    | `elements`     | -    | symbols by atomic number                                                            |
    | `min_distance` | Å    | "C-H" -> shortest distance seen below 5 Å, images included; symbols alphabetically  |
    | `force_rms`    | eV/Å | rms force component, None without forces                                            |
    | `frames`       | -    | number of frames                                                                    |
    | `neighbors`    | -    | mean number of neighbours of an atom within `cutoff`                                |
    """
    reach = 5.0
    shortest: dict[str, float] = {}
    edges = 0
    for atoms in frames:
        (i, j), vec = neighbor_list(atoms.positions, np.asarray(atoms.cell), atoms.pbc, max(cutoff, reach))
        distance = np.sqrt((vec**2).sum(axis=1))
        edges += int((distance < cutoff).sum())
        pair = np.minimum(atoms.numbers[i], atoms.numbers[j]) * 200 + np.maximum(atoms.numbers[i], atoms.numbers[j])
        for code in np.unique(pair[distance < reach]):
            name = "-".join(sorted((SYMBOLS[code // 200], SYMBOLS[code % 200])))
            shortest[name] = min(shortest.get(name, np.inf), float(distance[pair == code].min()))
    forces = [f.ravel() for atoms in frames if (f := results(atoms).get("forces")) is not None]
    n_atoms = sum(map(len, frames))
    return {
        "elements": [SYMBOLS[z] for z in sorted({int(z) for atoms in frames for z in atoms.numbers})],
        "min_distance": dict(sorted(shortest.items())),
        "force_rms": float(np.sqrt((np.concatenate(forces) ** 2).mean())) if forces else None,
        "frames": len(frames),
        "neighbors": edges / n_atoms if n_atoms else 0.0,
    }
