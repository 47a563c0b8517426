"""One teacher behind a pipe, and the two calls a teacher needs wherever it lives: `build` and `evaluate`.

Run as a file by the interpreter of any environment: it needs ASE, NumPy and the teacher there, nothing of ours.

A message is 8 bytes (big endian) of length, then that much JSON; an array is
``{"dtype": "<f8", "shape": [N, 3], "data": base64}``. Nothing is ever unpickled.

| request                                                   | answer                                                |
|-----------------------------------------------------------|-------------------------------------------------------|
| ``{"build": "package.module:Class", "options": {...}}``   | ``{"properties": ["energy", ...]}``                   |
| ``{"numbers", "positions", "cell", "pbc", "state", ...}`` | ``{"results": {"energy": ..., "forces": ...}}``       |
| either, gone wrong                                        | ``{"error": text, "missing": module or null}``        |
"""

from __future__ import annotations

import base64
import importlib
import json
import os
import struct
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

WANTED = ("energy", "forces", "energies", "stress")


def load(path: str) -> Any:
    """The object named ``package.module:name``."""
    module, _, name = path.partition(":")
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def build(path: str, options: dict[str, Any]) -> Any:
    """Call the class or function named by `path`; options like ``{call: path, options: {...}}`` are built first."""
    return load(path)(**{key: _resolve(value) for key, value in options.items()})


def _resolve(value: Any) -> Any:
    if isinstance(value, dict) and "call" in value:
        return build(value["call"], value.get("options", {}))
    if isinstance(value, dict) and set(value) == {"import"}:
        return load(value["import"])
    if isinstance(value, list):
        return [_resolve(part) for part in value]
    return {key: _resolve(part) for key, part in value.items()} if isinstance(value, dict) else value


def evaluate(
    calculator: Any,
    numbers: Any,
    positions: Any,
    cell: Any,
    pbc: Any,
    state: list[tuple[str, str, float]],
    fresh: bool,
) -> dict[str, Any]:
    """Energy (eV), forces (eV/Å) and, where the teacher has them, per-atom energies and stress of one structure.

    Args:
        calculator: any ASE calculator.
        numbers: (N,) atomic numbers.
        positions: (N, 3), Å.
        cell: (3, 3), Å.
        pbc: (3,).
        state: charge and spin as this teacher takes them: (`info`, `parameter` or `array`; key; value).
        fresh: forget what earlier structures left behind (an SCF guess, say).
    """
    from ase import Atoms

    # nothing but what is stated here reaches the teacher: some act on any `charge` they find in info
    atoms = Atoms(numbers=numbers, positions=positions, cell=cell, pbc=pbc)
    changed = {key: value for where, key, value in state if where == "parameter"}
    changed = {key: value for key, value in changed.items() if calculator.parameters.get(key) != value}
    seen = getattr(calculator, "_mlff_state", None)
    if fresh or changed or seen != state:
        calculator.reset()  # not every calculator notices a changed charge
        calculator._mlff_state = state
    if changed:
        calculator.set(**changed)
    for where, key, value in state:
        if where == "info":
            atoms.info[key] = value
        elif where == "array" and len(atoms):
            atoms.new_array(key, np.array([value] + [0.0] * (len(atoms) - 1)))  # only the sum counts
    offered = calculator.implemented_properties
    wanted = [name for name in WANTED if name in offered and (name != "stress" or all(pbc))]
    try:
        changes = calculator.check_state(atoms)
        if changes:
            calculator.results = {}
        if any(name not in calculator.results for name in wanted):
            # one call for all: asked one by one, some calculators compute each anew
            calculator.calculate(atoms, wanted, changes)
        return {name: np.array(calculator.results[name], dtype=float) for name in wanted if name in calculator.results}
    except BaseException:
        calculator.reset()  # a failed SCF must not be the start of the next
        raise


def send(stream: BinaryIO, message: dict[str, Any]) -> None:
    """Write one message."""
    data = json.dumps(message, default=encode).encode()
    stream.write(struct.pack(">Q", len(data)) + data)
    stream.flush()


def decode(data: bytes) -> dict[str, Any]:
    """The message in `data` (without its length)."""
    message: dict[str, Any] = json.loads(data, object_hook=_array)
    return message


def failure(error: BaseException) -> dict[str, Any]:
    """The answer that tells of `error`."""
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return {"error": f"{text} ({Path(where.filename).name}, line {where.lineno})", "missing": missing}


def encode(value: Any) -> Any:
    """What JSON cannot hold, in a form it can."""
    if isinstance(value, np.ndarray):
        data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return {"dtype": value.dtype.str, "shape": value.shape, "data": data}
    return value.item() if isinstance(value, np.generic) else str(value)


def _array(value: dict[str, Any]) -> Any:
    if set(value) != {"dtype", "shape", "data"}:
        return value
    array = np.frombuffer(base64.b64decode(value["data"]), dtype=value["dtype"])
    return array.reshape(value["shape"]).copy()


def _exit_with(parent: int) -> None:
    """A computation may run for hours without reading the pipe: notice a killed parent all the same."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def main() -> None:
    """Serve until the pipe closes."""
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    # whatever a teacher prints, from Python or Fortran, goes to stderr and not between our messages
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    threading.Thread(target=_exit_with, args=(os.getppid(),), daemon=True).start()
    calculator = None
    while len(header := requests.read(8)) == 8:
        request = decode(requests.read(struct.unpack(">Q", header)[0]))
        try:
            if "build" in request:
                sys.path.extend(entry for entry in request["sys_path"] if entry not in sys.path)
                calculator = build(request["build"], request["options"])
                answer: dict[str, Any] = {"properties": list(calculator.implemented_properties)}
            else:
                answer = {"results": evaluate(calculator, **request)}
        except Exception as error:
            traceback.print_exc()
            answer = failure(error)
        send(answers, answer)


if __name__ == "__main__":
    # the interpreter puts this file's folder first, where our modules would shadow those of the teacher's environment
    sys.path = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]
    main()
