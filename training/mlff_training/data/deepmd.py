"""The npy layout of DeePMD-kit: type.raw, type_map.raw, nopbc, set.*/{coord,energy,force,virial,box,atom_ener}.npy."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from ase import Atoms

from mlff_engines.errors import DataError
from mlff_engines.structure import NUMBERS
from mlff_training.data.labels import DataWarning, Units, attach, resolve_units, set_state

# file -> numbers per frame: fixed, and per atom
PER_FRAME = {
    "coord": (0, 3),
    "energy": (1, 0),
    "force": (0, 3),
    "virial": (9, 0),
    "box": (9, 0),
    "atom_ener": (0, 1),
    "real_atom_types": (0, 1),
}
Arrays = dict[str, npt.NDArray[Any]]


def read_deepmd(
    path: Path, *, energy_unit: str | None = None, length_unit: str | None = None, labels: str | None = "default"
) -> list[Atoms]:
    """Read one system (a folder with type.raw) or every system below a folder, each then a `group` of its own.

    A virial is -dE/dε in eV, so stress = -virial/volume (DeePMD-kit documentation, "Formats of a system").

    Raises:
        DataError: for missing files (T1), a ragged or truncated array (T2), a virial without a box (T5).
    """
    if labels not in ("default", None):
        raise DataError(f"{path} (DeePMD) has one set of labels only; got labels={labels!r}, allowed: 'default'")
    file_units = resolve_units(str(path), {}, energy_unit, length_unit)
    systems = sorted(file.parent for file in path.rglob("type.raw"))
    if not systems:
        found = sorted(entry.name for entry in path.iterdir())[:10]
        raise DataError(f"{path}: found {found or 'nothing'}; expected a DeePMD system: type.raw, type_map.raw, set.*/")
    frames: list[Atoms] = []
    for system in systems:
        group = system.relative_to(path).as_posix() if len(systems) > 1 else None
        frames += _read_system(system, file_units, group)
    return frames


def _read_system(system: Path, file_units: Units, group: str | None) -> list[Atoms]:
    map_file = system / "type_map.raw"
    if not map_file.exists():
        raise DataError(f"{system} has no type_map.raw: expected the element symbol of each type of type.raw")
    symbols = map_file.read_text().split()
    unknown = [symbol for symbol in symbols if symbol not in NUMBERS]
    if unknown:
        raise DataError(f"{map_file}: {unknown[0]!r} is no element; write element symbols")
    try:
        types = np.array((system / "type.raw").read_text().split(), dtype=int)
    except ValueError as error:
        raise DataError(f"{system / 'type.raw'}: expected integers: {error}") from None
    sets = sorted(entry for entry in system.glob("set.*") if entry.is_dir())
    if not sets:
        found = sorted(entry.name for entry in system.iterdir())
        raise DataError(f"{system}: found {found}; expected set.*/ with npy files (convert *.raw files with dpdata)")
    periodic = not (system / "nopbc").exists()
    frames: list[Atoms] = []
    for folder in sets:
        data = _load_set(folder, len(types), periodic)
        for i in range(len(data["coord"])):
            where = f"{folder}, frame {i}"
            kinds = data["real_atom_types"][i].astype(int) if "real_atom_types" in data else types
            atoms = _frame(data, i, kinds, symbols, periodic, where)
            if group is not None:
                atoms.info["group"] = group
            set_state(atoms, where)
            frames.append(attach(atoms, _labels(data, i, kinds >= 0), file_units, where))
    return frames


def _frame(data: Arrays, i: int, kinds: npt.NDArray[np.int_], symbols: list[str], periodic: bool, where: str) -> Atoms:
    if kinds.max(initial=0) >= len(symbols):
        raise DataError(f"{where} has type {kinds.max()}, but type_map.raw names {len(symbols)} types: {symbols}")
    real = kinds >= 0  # the mixed-type layout pads with virtual atoms of type -1
    numbers = [NUMBERS[symbols[kind]] for kind in kinds[real]]
    cell = np.array(data["box"][i], dtype=np.float64).reshape(3, 3) if periodic else None
    positions = np.array(data["coord"][i], dtype=np.float64).reshape(-1, 3)[real]
    return Atoms(numbers, positions, cell=cell, pbc=periodic)


def _labels(data: Arrays, i: int, real: npt.NDArray[np.bool_]) -> dict[str, Any]:
    labels: dict[str, Any] = {"energy": data["energy"].reshape(-1)[i]}
    if "force" in data:
        labels["forces"] = data["force"][i].reshape(-1, 3)[real]
    if "atom_ener" in data:
        labels["energies"] = data["atom_ener"][i].reshape(-1)[real]
    if "virial" in data:
        labels["virial"] = data["virial"][i].reshape(3, 3)
    return labels


def _load_set(folder: Path, n_atoms: int, periodic: bool) -> Arrays:
    present = {file.stem: file for file in sorted(folder.glob("*.npy"))}
    needed = {"coord", "energy"} | ({"box"} if periodic else set())
    if needed - set(present):
        raise DataError(
            f"{folder}: found {sorted(present)}; expected {sorted(needed)} and force, virial, atom_ener where known"
            + ("; a molecule without a box needs an empty file `nopbc` beside type.raw" if "coord" in present else "")
        )
    unread = sorted(set(present) - set(PER_FRAME))
    if unread:
        warnings.warn(f"{folder}: not read: {', '.join(f'{name}.npy' for name in unread)}", DataWarning, stacklevel=2)
    data: Arrays = {}
    for name in sorted(set(present) & set(PER_FRAME)):
        try:
            data[name] = np.load(present[name], allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise DataError(f"{present[name]} is truncated or holds Python objects: {error}") from None
    frames = {name: len(array) for name, array in data.items()}
    shortest = min(frames.values())
    if len(set(frames.values())) > 1:
        short = sorted(name for name, length in frames.items() if length == shortest)
        raise DataError(f"{folder} is ragged: frame {shortest} is missing from {', '.join(short)} ({frames})")
    for name, array in data.items():
        fixed, per_atom = PER_FRAME[name]
        if array.size != shortest * (fixed + per_atom * n_atoms):
            raise DataError(
                f"{folder}/{name}.npy has shape {array.shape}; type.raw with {n_atoms} atoms needs "
                f"({shortest}, {fixed + per_atom * n_atoms})"
            )
    return data
