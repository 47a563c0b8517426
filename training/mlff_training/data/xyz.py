"""Extended XYZ, the canonical format of labelled structures.

Every frame that `write_xyz` writes states its units (`energy_unit=eV length_unit=Angstrom`), charge, multiplicity and
level of theory, and numbers with all their digits. `read_xyz` also reads what the community writes: ASE's units
(eV, Å) where a frame states none, and the label keys of the table `LABELS`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.io import extxyz
from ase.outputs import ArrayProperty, all_outputs

from mlff_engines.errors import DataError, suggest
from mlff_engines.files import replacing
from mlff_training.data.labels import attach, resolve_units, results, set_state

# label set -> label -> keys that name it, in headers, per-atom columns and ASE databases
LABELS: dict[str, dict[str, tuple[str, ...]]] = {
    "plain": {
        "energy": ("energy", "Energy", "total_energy"),
        "forces": ("forces", "force", "Forces"),
        "stress": ("stress", "Stress"),
        "virial": ("virial", "virials", "Virial"),
        "energies": ("energies", "local_energy", "atomic_energies"),
        "dipole": ("dipole",),
    },
    "REF": {
        "energy": ("REF_energy", "ref_energy", "energy_ref"),
        "forces": ("REF_forces", "ref_forces", "forces_ref", "ref_force"),
        "stress": ("REF_stress", "ref_stress"),
        "virial": ("REF_virial", "REF_virials", "ref_virial", "ref_virials"),
        "energies": ("REF_energies",),
        "dipole": ("REF_dipole", "ref_dipole"),
    },
    "DFT": {
        "energy": ("DFT_energy", "dft_energy", "energy_dft"),
        "forces": ("DFT_forces", "dft_forces", "DFT_force", "dft_force"),
        "stress": ("DFT_stress", "dft_stress"),
        "virial": ("DFT_virial", "dft_virial", "dft_virials"),
        "energies": (),
        "dipole": ("DFT_dipole", "dft_dipole"),
    },
}
STATE_KEYS = {
    "charge": ("charge", "total_charge", "Charge"),
    "multiplicity": ("multiplicity", "spin_multiplicity", "mult"),
    "level": ("level", "level_of_theory"),
}
UNIT_KEYS = {
    "energy": ("energy_unit", "energy_units"),
    "length": ("length_unit", "length_units"),
    "force": ("force_unit", "force_units", "forces_unit", "forces_units"),
    "stress": ("stress_unit", "stress_units"),
}
# further results of an ASE calculator, kept beside any label set
OTHER_RESULTS = ("free_energy", "charges", "magmoms", "magmom")
_PER_ATOM = {
    name for name, kind in all_outputs.items() if isinstance(kind, ArrayProperty) and kind.shapespec[0] == "natoms"
}


def read_xyz(
    path: Path, *, energy_unit: str | None = None, length_unit: str | None = None, labels: str | None = "default"
) -> list[Atoms]:
    """Read every frame of an (extended) XYZ file into eV and Å.

    Args:
        path: the file.
        energy_unit: energy unit of frames that state none (default eV).
        length_unit: length unit of frames that state none (default Angstrom).
        labels: the label set, a key of `LABELS` ("plain": without prefix); "default" takes the only one there is;
            None asks for no labels.

    Raises:
        DataError: naming file and frame: no labels or several sets of them (T1), a frame cut short or ragged (T2),
            an ambiguous stress (T5), unknown units.
    """
    return [
        _frame(text, f"{path}, frame {number}", energy_unit, length_unit, labels)
        for number, text in enumerate(_frame_texts(path))
    ]


def write_xyz(path: str | Path, frames: Iterable[Atoms]) -> None:
    """Write labelled structures (eV, Å) as canonical extended XYZ, atomically and without losing a digit.

    Raises:
        DataError: for something in `info` or `arrays` that the format cannot hold; nothing is written then.
    """
    path = Path(path)
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(_text(atoms, f"{path}, frame {number}") for number, atoms in enumerate(frames))


def take_labels(found: dict[str, Any], labels: str | None, where: str) -> dict[str, Any]:
    """Take the labels of one label set out of `found` (key -> value); what is no label stays.

    Raises:
        DataError: for no energy, more than one label set, or two different values of one label (T1).
    """
    present = {
        name: keys
        for name, table in LABELS.items()
        if (keys := [key for aliases in table.values() for key in aliases if key in found])
    }
    if labels is None:
        chosen = next(iter(present), "plain")
    elif labels == "default" and len(present) > 1:
        raise DataError(
            f"{where} holds several label sets: {present}. "
            f"Choose one by labels={' or labels='.join(map(repr, present))}"
        )
    elif labels == "default":
        chosen = next(iter(present), "plain")
    elif labels not in LABELS:
        raise DataError(f"unknown label set {labels!r}{suggest(labels, LABELS)}")
    else:
        chosen = labels
    taken = {}
    for label, aliases in LABELS[chosen].items():
        values = {key: found.pop(key) for key in aliases if key in found}
        if len(values) > 1 and not _all_equal(list(values.values())):
            raise DataError(f"{where}: {label} is given more than once and differently, as {', '.join(values)}")
        if values:
            taken[label] = next(iter(values.values()))
    taken |= {key: found.pop(key) for key in OTHER_RESULTS if key in found}
    if labels is not None and "energy" not in taken:
        expected = ", ".join(LABELS[chosen]["energy"] if labels != "default" else _all_keys("energy"))
        raise DataError(
            f"{where} has no energy: found {sorted(found) + sorted(taken) or 'nothing'}; expected one of {expected}"
        )
    return taken


def _all_keys(label: str | None = None) -> list[str]:
    """Every key that names `label`, or any label."""
    return [key for table in LABELS.values() for name in table if label in (None, name) for key in table[name]]


def _all_equal(values: list[Any]) -> bool:
    return all(np.array_equal(np.asarray(values[0]), np.asarray(value), equal_nan=True) for value in values[1:])


def _frame_texts(path: Path) -> Iterator[str]:
    """The text of each frame, after checking that it is whole."""
    try:
        lines = path.read_text(encoding="utf-8").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a text file: {error}") from None
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise DataError(f"{path} is empty: expected extended XYZ frames")
    start = frame = 0
    while start < len(lines):
        where = f"{path}, frame {frame} (line {start + 1})"
        if not lines[start].strip().isdigit():
            raise DataError(
                f"{where}: expected the number of atoms, found {lines[start][:60]!r}. "
                "The frame before has more or fewer atoms than it says, or the file is damaged"
            )
        atoms = int(lines[start])
        rows = lines[start + 2 : start + 2 + atoms]
        if len(rows) < atoms:
            raise DataError(
                f"{where} is cut short: {len(rows)} of {atoms} atoms. Remove this last frame or write the file again"
            )
        declared = re.search(r"Properties=\"?([^\s\"]+)", lines[start + 1]) if atoms else None
        if declared:
            columns = sum(int(count) for count in declared.group(1).split(":")[2::3] if count.isdigit())
            for atom, row in enumerate(rows):
                if len(row.split()) != columns:
                    raise DataError(
                        f"{where}: atom {atom} has {len(row.split())} columns, but Properties={declared.group(1)} "
                        f"needs {columns}: {row[:80]!r}"
                    )
        yield "\n".join([*lines[start : start + 2], *rows, ""])
        start += 2 + atoms
        frame += 1


def _frame(text: str, where: str, energy_unit: str | None, length_unit: str | None, labels: str | None) -> Atoms:
    header: dict[str, Any] = {}

    def parse(comment: str) -> dict[str, Any]:
        """Keep every key from ASE, which would move some into a calculator and drop the asymmetry of a stress."""
        keys: dict[str, Any] = extxyz.key_val_str_to_dict(comment)
        header.update((key, keys.pop(key)) for key in list(keys) if key not in ("Lattice", "pbc", "Properties"))
        return keys

    try:
        atoms = next(iter(extxyz.read_xyz(StringIO(text), index=0, properties_parser=parse)))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OSError) as error:
        if "special 3x3 matrix" in str(error):
            raise DataError(
                f"{where}: stress and virial need 9 numbers; 6 have no order that all agree on ({error})"
            ) from None
        raise DataError(f"{where} cannot be read: {error!r}") from None
    found = header | results(atoms)
    found |= {key: atoms.arrays.pop(key) for key in _all_keys() if key in atoms.arrays}
    stated = {kind: str(found.pop(key)) for kind, keys in UNIT_KEYS.items() for key in keys if key in found}
    unknown = [key for key in found if re.search(r"(^|_)units?($|_)", key, re.IGNORECASE)]
    if unknown:
        known = [key for keys in UNIT_KEYS.values() for key in keys]
        raise DataError(
            f"{where} states {unknown[0]}={found[unknown[0]]!r}, an unknown unit key{suggest(unknown[0], known)}"
        )
    taken = take_labels(found, labels, where)
    for key, aliases in STATE_KEYS.items():
        values = {alias: found.pop(alias) for alias in aliases if alias in found}
        if len(values) > 1 and not _all_equal(list(values.values())):
            raise DataError(f"{where} gives {key} more than once and differently: {values}")
        if values:
            found[key] = next(iter(values.values()))
    atoms.info = found
    set_state(atoms, where)
    return attach(atoms, taken, resolve_units(where, stated, energy_unit, length_unit), where)


def _text(atoms: Atoms, where: str) -> str:
    """One frame of canonical extended XYZ."""
    labels = results(atoms)
    stress = labels.pop("stress", None)
    atoms_like = {name: array for name, array in atoms.arrays.items() if name not in ("numbers", "positions")}
    clash = sorted(set(_all_keys()) & (set(atoms_like) | set(atoms.info)))
    if clash:
        raise DataError(f"{where}: {clash[0]!r} in info or arrays would be read back as a label; remove or rename it")
    per_atom = {name: np.asarray(labels.pop(name)) for name in list(labels) if name in _PER_ATOM}
    columns = {"pos": atoms.positions, **per_atom, **atoms_like}
    properties, cells = ["species:S:1"], [atoms.get_chemical_symbols()]
    for name, array in columns.items():
        kind = {"f": "R", "i": "I", "u": "I", "b": "L", "U": "S"}.get(array.dtype.kind)
        if kind is None or array.ndim > 2:
            raise DataError(f"{where}: arrays[{name!r}] ({array.dtype}, {array.shape}) does not fit into extended XYZ")
        rows = array.reshape(len(atoms), -1)
        properties.append(f"{name}:{kind}:{rows.shape[1]}")
        cells.append([" ".join(_number(value) for value in row) for row in rows.tolist()])
    info = {"charge": 0.0, "multiplicity": 1, "level": "unknown", **atoms.info}
    header = ["energy_unit=eV length_unit=Angstrom"]
    if atoms.cell.any():
        header.insert(0, f'Lattice="{" ".join(_number(x) for x in np.asarray(atoms.cell).ravel().tolist())}"')
    header.append(f"Properties={':'.join(properties)}")
    header += [f"{key}={_value(key, value, where)}" for key, value in (labels | info).items() if value is not None]
    if stress is not None:
        xx, yy, zz, yz, xz, xy = np.asarray(stress).tolist()
        header.append(f'stress="{" ".join(map(_number, (xx, xy, xz, xy, yy, yz, xz, yz, zz)))}"')
    header.append(f'pbc="{" ".join(_number(bool(axis)) for axis in atoms.pbc)}"')
    lines = [str(len(atoms)), " ".join(header), *(" ".join(row) for row in zip(*cells, strict=True)), ""]
    return "\n".join(lines)


def _number(value: Any) -> str:
    return ("T" if value else "F") if isinstance(value, bool) else str(value)  # str(float) is exact


def _value(key: str, value: Any, where: str) -> str:
    """`value` such that reading gives it back; as JSON where plain text would turn into something else."""
    if re.search(r"[\s=\"'{}\[\]\\,]", key) or not key:
        raise DataError(f"{where}: info key {key!r} does not fit into extended XYZ; rename it")
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.size > 1 and value.dtype.kind in "fi":
        return f'"{" ".join(map(_number, value.tolist()))}"'
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, bool | int | float):
        return _number(value)
    if isinstance(value, str) and re.fullmatch(r"[^=\"'{}\[\]\\\n\r]+", value):
        plain = f'"{value}"' if re.search(r"[\s,]", value) else value
        parsed = extxyz.key_val_str_to_dict(f"{key}={plain}")[key]
        if isinstance(parsed, str) and parsed == value:
            return plain
    try:
        text = json.dumps(value)
    except TypeError:
        raise DataError(f"{where}: info[{key!r}] = {value!r} does not fit into extended XYZ; remove it") from None
    text = f"_JSON {text}".replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'
