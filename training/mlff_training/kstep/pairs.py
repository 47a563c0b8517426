"""Stage 3: pairs (x, v) at t and t + k·dt, from trajectories of constant energy.

The arrays of ``dataset_kK.npz``, P pairs of M molecules, the atoms of all pairs one after another (A in all):

| array                        | shape    | what                                                                   |
|------------------------------|----------|------------------------------------------------------------------------|
| `x_t`, `x_tk`                | (A, 3)   | nm, centre of mass at the origin                                       |
| `v_t`, `v_tk`                | (A, 3)   | nm/ps, no net momentum                                                 |
| `f_t`                        | (A, 3)   | kJ/mol/nm, where all trajectories have forces                          |
| `atom_types`                 | (A,)     | atomic numbers                                                         |
| `masses`                     | (A,)     | amu                                                                    |
| `first_atom`                 | (P + 1,) | where the atoms of each pair begin                                     |
| `molecule_id`                | (P,)     | index of `molecules`                                                   |
| `segment`                    | (P,)     | number of the constant-energy segment in its trajectory                |
| `temperature`                | (P,)     | K                                                                      |
| `next`                       | (P,)     | the pair that begins where this one ends, or -1: jumps can be chained  |
| `molecules`                  | (M,)     | names                                                                  |

``dataset_kK.json`` beside it: k, time step, constraints, masses by element, hashes of sources and of the file.
Frames of trajectories are those of `mlff kstep simulate`: on-step velocities of velocity Verlet. Pairs from a
thermostatted run would teach a jump to cool.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mlff_engines.config import Config, parse
from mlff_engines.errors import ConfigError, DataError
from mlff_engines.files import replacing, sha256_of
from mlff_engines.models.jump import JumpTerms
from mlff_engines.structure import SYMBOLS, FloatArray, IntArray

STEPS = (4, 8, 12, 16)
REQUIRED = ("pos", "vel", "segment", "step", "numbers", "masses", "metadata")
CONSTRAINTS: dict[str | None, Literal["none", "hbonds"]] = {None: "none", "HBonds": "hbonds"}
SAME_MASS = 1e-3  # relative


class PairsRecord(Config):
    """The content of ``dataset_kK.json``."""

    terms: JumpTerms
    pairs: int
    molecules: list[str]
    sources: dict[str, str]
    stride: int
    sha256: str


@dataclass(frozen=True)
class Pairs:
    """A data set that was read, see the table above."""

    record: PairsRecord
    arrays: Mapping[str, Any]
    path: Path

    def __len__(self) -> int:
        return self.record.pairs


def make_pairs(trajectories: Sequence[Path], k: int, out: Path, *, stride: int = 1) -> Path:
    """Write ``out/dataset_kK.npz`` and its JSON.

    Args:
        trajectories: NPZ files of `mlff kstep simulate`.
        k: steps of a jump.
        stride: take every such-many-th frame as a start.

    Raises:
        ConfigError: k or stride below 1.
        DataError: a file that is no trajectory, no two frames k steps apart, periodic boxes, trajectories of different
            time steps or constraints, or masses that are no function of the element.
    """
    if k < 1 or stride < 1:
        raise ConfigError(f"k = {k}, stride {stride}; allowed: 1 or more")
    if not trajectories:
        raise DataError("no trajectories given: run mlff kstep simulate")
    runs = [read_run(path) for path in trajectories]
    terms = _common_terms(runs, k)
    molecules = sorted({run["meta"]["molecule"] for run in runs})
    forces = all("forces" in run for run in runs)
    columns: dict[str, list[Any]] = {name: [] for name in ("x_t", "v_t", "x_tk", "v_tk", "atom_types", "masses", "f_t")}
    per_pair: dict[str, list[Any]] = {name: [] for name in ("molecule_id", "segment", "temperature", "next", "atoms")}
    segments = 0
    for run in runs:
        begin, end = _frames_apart(run, k, stride)
        numbers, masses = run["numbers"], run["masses"]
        x, v = _centred(run["pos"], masses), _centred(run["vel"], masses)
        made, count, size = sum(map(len, per_pair["atoms"])), len(begin), len(numbers)
        for name, of, frames in (("x_t", x, begin), ("v_t", v, begin), ("x_tk", x, end), ("v_tk", v, end)):
            columns[name].append(of[frames].reshape(-1, 3))
        if forces:
            columns["f_t"].append(run["forces"][begin].reshape(-1, 3))
        columns["atom_types"].append(np.tile(numbers, count))
        columns["masses"].append(np.tile(masses, count))
        where = {frame: made + n for n, frame in enumerate(begin.tolist())}
        per_pair["next"].append([where.get(frame, -1) for frame in end.tolist()])
        per_pair["molecule_id"].append(np.full(count, molecules.index(run["meta"]["molecule"])))
        per_pair["segment"].append(run["segment"][begin] + segments)
        per_pair["temperature"].append(np.full(count, float(run["meta"]["temperature_K"])))
        per_pair["atoms"].append(np.full(count, size))
        segments += int(run["segment"].max()) + 1
    arrays = {name: np.concatenate(parts) for name, parts in columns.items() if parts}
    pairs = {name: np.concatenate(parts) for name, parts in per_pair.items()}
    first_atom = np.concatenate([[0], np.cumsum(pairs.pop("atoms"))])
    path = out / f"dataset_k{k}.npz"
    with replacing(path) as temporary:
        content: dict[str, Any] = {**arrays, **pairs, "first_atom": first_atom, "molecules": np.array(molecules)}
        np.savez(temporary, **content)
        digest = sha256_of(temporary)
    record = PairsRecord(
        terms=terms,
        pairs=len(pairs["next"]),
        molecules=molecules,
        sources={run["path"].name: sha256_of(run["path"]) for run in runs},
        stride=stride,
        sha256=digest,
    )
    with replacing(path.with_suffix(".json")) as temporary:
        temporary.write_text(record.model_dump_json(indent=1))
    return path


def load_pairs(path: Path) -> Pairs:
    """Read a data set, its hash checked.

    Raises:
        DataError: missing, not what its JSON says, or made by another program.
    """
    try:
        record = parse(PairsRecord, json.loads(path.with_suffix(".json").read_text()), str(path.with_suffix(".json")))
        digest = sha256_of(path)
        with np.load(path) as data:
            arrays = {name: data[name] for name in data.files}
    except (OSError, ValueError, ConfigError) as error:
        raise DataError(f"cannot read the pairs in {path}: {error}. Make them with mlff kstep dataset") from None
    if digest != record.sha256:
        raise DataError(
            f"{path} is not the file its JSON describes: SHA-256 {digest[:12]}..., expected {record.sha256[:12]}.... "
            "Make the data set anew"
        )
    return Pairs(record, arrays, path)


def split_pairs(
    pairs: Pairs, path: Path, *, valid: float = 0.2, seed: int = 0, by: Literal["molecule", "segment"] = "molecule"
) -> dict[str, IntArray]:
    """Training and validation pairs; what is split is kept in the JSON file `path`, and used again for every k.

    Args:
        valid: fraction of the molecules, or of the segments.
        by: whole molecules, to see how a jump carries over; whole segments, where there are too few molecules.

    Raises:
        ConfigError: too few molecules or segments.
        DataError: the file speaks of other molecules.
    """
    molecule = pairs.arrays["molecules"][pairs.arrays["molecule_id"]]
    names = (
        molecule if by == "molecule" else np.char.add(np.char.add(molecule, ":"), pairs.arrays["segment"].astype(str))
    )
    known = sorted(set(names.tolist()))
    if path.exists():
        kept = json.loads(path.read_text())
        lost = sorted(set(known) - {name for part in ("train", "valid") for name in kept.get(part, [])})
        if kept.get("by") != by or lost:
            raise DataError(
                f"{path} splits by {kept.get('by')} and does not know {', '.join(lost[:5]) or 'this kind'}: "
                "remove it to split anew"
            )
    else:
        order = np.random.default_rng(seed).permutation(len(known))
        count = max(1, round(valid * len(known)))
        if count >= len(known):
            raise ConfigError(
                f"{len(known)} {by}(s) cannot be split into training and validation"
                + ("; split by segment, or simulate more molecules" if by == "molecule" else "; simulate longer")
            )
        aside = sorted(known[i] for i in order[:count])
        kept = {"by": by, "seed": seed, "train": sorted(set(known) - set(aside)), "valid": aside}
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(kept, indent=1))
    return {part: np.flatnonzero(np.isin(names, kept[part])) for part in ("train", "valid")}


def read_run(path: Path) -> dict[str, Any]:
    """The arrays of a trajectory, with `meta` and `path`.

    Raises:
        DataError: it is none of `mlff kstep simulate`, periodic, or not finite.
    """
    try:
        with np.load(path) as data:
            run: dict[str, Any] = {name: data[name] for name in data.files}
        missing = sorted(set(REQUIRED) - set(run))
        if missing:
            raise ValueError(f"it has no {', '.join(missing)}")
        meta = json.loads(str(run["metadata"]))
        missing = sorted({"molecule", "temperature_K", "dt_fs"} - set(meta))
        if missing:
            raise ValueError(f"its metadata have no {', '.join(missing)}")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no trajectory of mlff kstep simulate: {error}") from None
    if np.abs(run.get("box", np.zeros(1))).max() > 0:
        raise DataError(f"{path} is periodic: jumps are made for molecules in vacuum or implicit solvent")
    if not (np.isfinite(run["pos"]).all() and np.isfinite(run["vel"]).all()):
        raise DataError(f"{path} has positions or velocities that are not finite: simulate it anew")
    return run | {"meta": meta, "path": path}


def _common_terms(runs: Sequence[Mapping[str, Any]], k: int) -> JumpTerms:
    """What all runs have in common, or an error."""

    def constraints(run: Mapping[str, Any]) -> Literal["none", "hbonds"]:
        named = run["meta"].get("settings", {}).get("constraints")
        if named not in CONSTRAINTS:
            raise DataError(f"{run['path']} has the constraints {named}; allowed: HBonds or none")
        return CONSTRAINTS[named]

    first, masses = runs[0], dict[str, float]()
    for run in runs:
        ours, theirs = (run["meta"]["dt_fs"], constraints(run)), (first["meta"]["dt_fs"], constraints(first))
        if ours != theirs:
            raise DataError(
                f"{run['path']} has time step (fs) and constraints {ours}, {first['path']} {theirs}: a jump is made "
                "for one of each"
            )
        for number, mass in zip(run["numbers"].tolist(), run["masses"].tolist(), strict=True):
            seen = masses.setdefault(SYMBOLS[number], mass)
            if abs(mass / seen - 1) > SAME_MASS:
                raise DataError(
                    f"{run['path']} has atoms of {SYMBOLS[number]} of {mass:g} and {seen:g} amu: masses must be a "
                    "function of the element (no hydrogen mass repartitioning)"
                )
    temperatures = sorted({float(run["meta"]["temperature_K"]) for run in runs})
    return JumpTerms(
        steps=k,
        timestep=first["meta"]["dt_fs"],
        masses=dict(sorted(masses.items())),
        constraints=constraints(first),
        temperatures=temperatures,
    )


def _frames_apart(run: Mapping[str, Any], k: int, stride: int) -> tuple[IntArray, IntArray]:
    """Frames that begin and end a pair."""
    keys = list(zip(run["segment"].tolist(), run["step"].tolist(), strict=True))
    where = {key: frame for frame, key in enumerate(keys)}
    found = [(frame, where[s, n + k]) for frame, (s, n) in enumerate(keys) if (s, n + k) in where][::stride]
    if not found:
        apart = sorted({b - a for (s, a), (t, b) in itertools.pairwise(keys) if s == t})
        raise DataError(
            f"{run['path']} has no two frames {k} steps apart (frames lie {apart} steps apart, segments are "
            f"{int(run['step'].max())} steps long): set save_interval_steps to a "
            "divisor of k, and burst_steps to k or more"
        )
    begin, end = np.array(found).T
    return begin, end


def _centred(vectors: FloatArray, masses: FloatArray) -> FloatArray:
    """(T, N, 3) less their mass-weighted mean."""
    mean: FloatArray = np.einsum("i,tia->ta", masses, vectors) / masses.sum()
    return vectors - mean[:, None]
