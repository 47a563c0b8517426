"""Reading labelled structures from the community's layouts; writing them as extended XYZ.

| format   | recognised by                                      | units unless stated |
|----------|----------------------------------------------------|---------------------|
| xyz      | a text file that begins with a number of atoms     | eV, Å               |
| rMD17    | npz: nuclear_charges, coords, energies, forces     | kcal/mol, Å         |
| sGDML    | npz: z, R, E, F (e_unit, r_unit)                   | kcal/mol, Å         |
| PhysNet  | npz: Z, R, E, F (N, Q, D)                          | eV, Å               |
| DeePMD   | a folder with type.raw, or a folder of such        | eV, Å               |
| ASE db   | a database that ASE can open (SQLite, JSON)        | eV, Å               |

Nothing is unpickled.
"""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from ase import Atoms
from ase.db import connect
from ase.stress import voigt_6_to_full_3x3_stress

from mlff_engines.errors import DataError
from mlff_training.data.deepmd import read_deepmd
from mlff_training.data.labels import attach, resolve_units, results, set_state
from mlff_training.data.xyz import STATE_KEYS, read_xyz, take_labels, write_xyz

__all__ = ["convert", "describe", "read", "write_xyz"]

# label set -> keys of energies and forces, level of theory
RMD17_LABELS = {
    "default": ("energies", "forces", "PBE/def2-SVP"),
    "old": ("old_energies", "old_forces", "PBE+vdW-TS"),
}
NPZ_KEYS = {
    "rMD17": ("nuclear_charges", "coords", "energies", "forces"),
    "sGDML": ("z", "R", "E", "F"),
    "PhysNet": ("Z", "R", "E", "F"),
}
Arrays = dict[str, npt.NDArray[Any]]


def read(
    path: str | Path, *, energy_unit: str | None = None, length_unit: str | None = None, labels: str | None = "default"
) -> list[Atoms]:
    """Read labelled structures (see `mlff_training.data.labels`), the format recognised from the content.

    Args:
        path: file or folder.
        energy_unit: energy unit of the file where it states none and the format's convention is wrong for it.
        length_unit: likewise for lengths.
        labels: which labels where there are several: "old" for the original labels in rMD17 files; "plain", "REF" or
            "DFT" for XYZ files and databases; None reads XYZ files and databases without any labels, too.

    Raises:
        DataError: unreadable, unknown format or missing keys (T1), ragged or truncated (T2), ambiguous stress (T5),
            unknown or contradictory units.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return read_deepmd(path, energy_unit=energy_unit, length_unit=length_unit, labels=labels)
        with path.open("rb") as file:
            head = file.read(256)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if head.startswith(b"PK\x03\x04"):
        return _read_npz(path, energy_unit, length_unit, labels)
    sqlite = head.startswith(b"SQLite format 3\x00")
    if sqlite or head.lstrip().startswith(b"{"):
        return _read_ase_db(path, sqlite, energy_unit, length_unit, labels)
    if head.split(b"\n", 1)[0].strip().isdigit() or not head.strip():
        return read_xyz(path, energy_unit=energy_unit, length_unit=length_unit, labels=labels)
    raise DataError(
        f"{path} has no known format: it begins with {head[:40]!r}. Expected extended XYZ, a DeePMD folder, an ASE "
        f"database, or an npz file with the keys of one format ({_npz_formats()})"
    )


def convert(
    source: str | Path,
    target: str | Path,
    *,
    overwrite: bool = False,
    energy_unit: str | None = None,
    length_unit: str | None = None,
    labels: str | None = "default",
    level: str | None = None,
    charge: float | None = None,
    multiplicity: int | None = None,
) -> dict[str, Any]:
    """Read any known format and write canonical extended XYZ.

    Args:
        source: file or folder to read.
        target: file to write, ending in .xyz or .extxyz.
        overwrite: replace an existing `target`.
        energy_unit: see `read`.
        length_unit: see `read`.
        labels: see `read`.
        level: level of theory, where the source does not state it.
        charge: total charge to write into every frame, in e.
        multiplicity: spin multiplicity to write into every frame.

    Returns:
        `describe` of what was written.

    Raises:
        DataError: as `read`, or for a target that exists, or a level that contradicts the source.
    """
    target = Path(target)
    if target.suffix not in (".xyz", ".extxyz"):
        raise DataError(f"cannot write {target}: expected a name ending in .xyz or .extxyz")
    if target.exists() and not overwrite:
        raise DataError(f"{target} exists; choose another name or pass --overwrite")
    frames = read(source, energy_unit=energy_unit, length_unit=length_unit, labels=labels)
    for number, atoms in enumerate(frames):
        if level is not None and atoms.info["level"] not in ("unknown", level):
            raise DataError(f"{source}, frame {number} states level {atoms.info['level']!r}, not {level!r}")
        given = {"level": level, "charge": charge, "multiplicity": multiplicity}
        atoms.info.update((key, value) for key, value in given.items() if value is not None)
        set_state(atoms, f"{source}, frame {number}")
    write_xyz(target, frames)
    return describe(frames)


def describe(frames: Sequence[Atoms]) -> dict[str, Any]:
    """What a set holds, ready for JSON: counts, compositions, ranges (eV, eV/Å), groups, levels, states.

    `energy_per_atom` and `max_force` are [smallest, largest] over the frames that have them, else None.
    """
    labels = [results(atoms) for atoms in frames]
    energies = [label["energy"] / len(atoms) for label, atoms in zip(labels, frames, strict=True) if "energy" in label]
    forces = [np.linalg.norm(label["forces"], axis=1).max(initial=0.0) for label in labels if "forces" in label]
    states = Counter((float(a.info.get("charge", 0.0)), int(a.info.get("multiplicity", 1))) for a in frames)
    return {
        "frames": len(frames),
        "atoms": sum(map(len, frames)),
        "compositions": dict(Counter(atoms.get_chemical_formula() for atoms in frames).most_common()),
        "periodic": sum(bool(atoms.pbc.any()) for atoms in frames),
        "labels": {name: sum(name in label for label in labels) for name in sorted(set().union(*labels))},
        "hessian_rows": sum("hessian_row" in atoms.arrays for atoms in frames),
        "energy_per_atom": [float(min(energies)), float(max(energies))] if energies else None,
        "max_force": [float(min(forces)), float(max(forces))] if forces else None,
        "levels": dict(Counter(atoms.info.get("level", "unknown") for atoms in frames)),
        "groups": len({atoms.info["group"] for atoms in frames if "group" in atoms.info}),
        "states": [{"charge": q, "multiplicity": m, "frames": count} for (q, m), count in states.items()],
    }


def _npz_formats() -> str:
    return "; ".join(f"{name}: {', '.join(keys)}" for name, keys in NPZ_KEYS.items())


def _read_npz(path: Path, energy_unit: str | None, length_unit: str | None, labels: str | None) -> list[Atoms]:
    data = _load_npz(path)
    name = next((name for name, keys in NPZ_KEYS.items() if all(key in data for key in keys)), None)
    if name is None:
        raise DataError(
            f"{path}: found the keys {', '.join(sorted(data))}; expected all of one format ({_npz_formats()})"
        )
    if name == "rMD17":
        return _read_rmd17(data, path, energy_unit, length_unit, labels or "default")
    if labels not in ("default", None):
        raise DataError(f"{path} ({name}) has one set of labels only; got labels={labels!r}, allowed: 'default'")
    if name == "sGDML":
        stated = {kind: _text(data[key]) for kind, key in (("energy", "e_unit"), ("length", "r_unit")) if key in data}
        convention, level = ("kcal/mol", "Angstrom"), _text(data["theory"]) if "theory" in data else "unknown"
        numbers, count = data["z"], None
    else:
        stated, convention, level = dict[str, str](), ("eV", "Angstrom"), "unknown"
        numbers = data["Z"]
        count = data["N"].ravel() if "N" in data else None
    file_units = resolve_units(str(path), stated, energy_unit, length_unit, convention)
    columns: Arrays = {key: data[key] for key in ("R", "E", "F", "Q", "D") if key in data}
    if numbers.ndim == 2:
        columns["Z"] = numbers
        if count is not None:
            columns["N"] = count
    _require_whole(path, columns, atoms=numbers.shape[-1])
    frames = []
    for i in range(len(data["R"])):
        where = f"{path}, frame {i}"
        z = numbers[i] if numbers.ndim == 2 else numbers
        n = int(np.count_nonzero(z)) if count is None else int(count[i])
        if n > len(z) or (z[:n] < 1).any() or (z[n:] != 0).any():
            raise DataError(f"{where} is ragged: N = {n}, but Z has {np.count_nonzero(z)} atoms: {z.tolist()}")
        atoms = Atoms(z[:n].astype(int), np.array(data["R"][i][:n], dtype=np.float64))
        if "lattice" in data:  # sGDML: columns are the lattice vectors
            atoms.set_cell(data["lattice"].reshape(3, 3).T)
            atoms.pbc = True
        atoms.info = {"level": level}
        if "Q" in data:
            atoms.info["charge"] = float(data["Q"].reshape(-1)[i])
        set_state(atoms, where)
        given = {"energy": data["E"].reshape(-1)[i], "forces": data["F"][i][:n]}
        if "D" in data:
            given["dipole"] = data["D"][i]
        frames.append(attach(atoms, given, file_units, where))
    return frames


def _read_rmd17(data: Arrays, path: Path, energy_unit: str | None, length_unit: str | None, labels: str) -> list[Atoms]:
    if labels not in RMD17_LABELS:
        raise DataError(f"{path} (rMD17): labels={labels!r}; allowed: {', '.join(map(repr, RMD17_LABELS))}")
    energy_key, forces_key, level = RMD17_LABELS[labels]
    missing = {energy_key, forces_key} - set(data)
    if missing:
        raise DataError(f"{path}: labels={labels!r} needs {sorted(missing)}; found {', '.join(sorted(data))}")
    numbers = data["nuclear_charges"].astype(int)
    columns = {key: data[key] for key in ("coords", energy_key, forces_key)}
    _require_whole(path, columns, atoms=len(numbers))
    file_units = resolve_units(str(path), {}, energy_unit, length_unit, ("kcal/mol", "Angstrom"))
    frames = []
    for i, positions in enumerate(data["coords"]):
        atoms = Atoms(numbers, np.array(positions, dtype=np.float64), info={"level": level})
        where = f"{path}, frame {i}"
        set_state(atoms, where)
        given = {"energy": data[energy_key].reshape(-1)[i], "forces": data[forces_key][i]}
        frames.append(attach(atoms, given, file_units, where))
    return frames


def _load_npz(path: Path) -> Arrays:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except ValueError as error:
        raise DataError(f"{path} holds Python objects or damaged arrays, which are not loaded: {error}") from None
    except (zipfile.BadZipFile, EOFError, OSError, KeyError) as error:
        raise DataError(f"{path} is truncated or damaged: {error}. Copy or download it again") from None


def _text(array: npt.NDArray[Any]) -> str:
    value = array.reshape(-1)[0].item()
    return value.decode() if isinstance(value, bytes) else str(value)


def _require_whole(path: Path, columns: Arrays, atoms: int) -> None:
    """Every column has a row per frame, and every row its atoms (T2)."""
    lengths = {key: len(array) for key, array in columns.items()}
    shortest = min(lengths.values())
    if len(set(lengths.values())) > 1:
        short = sorted(key for key, length in lengths.items() if length == shortest)
        raise DataError(
            f"{path} is ragged: frame {shortest} is missing from {', '.join(short)} (frames per key: {lengths}). "
            "The file is truncated or its keys belong to different sets"
        )
    for key in {"R", "F", "coords", "forces", "old_forces"} & set(columns):
        if columns[key].shape[1:] != (atoms, 3):
            raise DataError(f"{path}: {key} has shape {columns[key].shape}; expected ({shortest}, {atoms}, 3)")
    for key in {"E", "Q", "N", "energies", "old_energies"} & set(columns):
        if columns[key].size != shortest:
            raise DataError(f"{path}: {key} has shape {columns[key].shape}; expected one number per frame")


def _read_ase_db(
    path: Path, sqlite: bool, energy_unit: str | None, length_unit: str | None, labels: str | None
) -> list[Atoms]:
    try:
        database = connect(path, type="db" if sqlite else "json")
        metadata = database.metadata
        rows = list(database.select())
    except Exception as error:  # sqlite3, json, ASE and KeyError: whatever a damaged file provokes
        raise DataError(f"{path} is not a readable ASE database: {error!r}") from None
    # SchNetPack keeps labels in `data` and their units in the metadata
    by_label = metadata.get("_property_unit_dict", {})
    stated = {kind: by_label[key] for kind, key in (("energy", "energy"), ("force", "forces")) if by_label.get(key)}
    if metadata.get("_distance_unit"):
        stated["length"] = metadata["_distance_unit"]
    file_units = resolve_units(str(path), stated, energy_unit, length_unit)
    frames = []
    for number, row in enumerate(rows):
        where = f"{path}, frame {number} (id {row.id})"
        atoms = row.toatoms()
        # SchNetPack stores every number as an array of one
        data = {k: v.item() if isinstance(v, np.ndarray) and v.size == 1 else v for k, v in row.data.items()}
        computed = results(atoms)
        if "stress" in computed:  # ASE's own, so in ASE's order
            computed["stress"] = voigt_6_to_full_3x3_stress(computed["stress"])
        found = {**computed, **row.key_value_pairs, **data}
        taken = take_labels(found, labels, where)
        atoms.info = {}
        for key, aliases in STATE_KEYS.items():
            atoms.info.update((key, found[alias]) for alias in aliases if alias in found)
        if "group" in found:
            atoms.info["group"] = found["group"]
        set_state(atoms, where)
        frames.append(attach(atoms, taken, file_units, where))
    return frames
