"""A trainer's state in one safetensors file: written atomically, checked when read, the one before kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mlff_engines.errors import TrainingError
from mlff_engines.files import replacing

State = dict[str, Any]


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write nested dicts and lists of tensors and plain values; the state before goes to `<name>.previous`.

    Raises:
        TrainingError: if the disk is full or not writable; earlier states are untouched.
    """
    tensors: dict[str, Tensor] = {}
    plain = _take_tensors(state, "", tensors)
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    text = json.dumps(plain)
    try:
        for left in path.parent.glob(f".{path.stem}.*.tmp{path.suffix}"):
            left.unlink(missing_ok=True)  # by a process killed while it saved
        with replacing(path) as temporary:
            temporary.write_bytes(save(tensors, metadata={"state": text, "sha256": _digest(tensors, text)}))
            if path.exists():
                path.replace(_previous(path))
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"cannot save the training state to {path}: {error}. Earlier states are intact; "
            "free space or choose another folder, then resume"
        ) from None


def load_state(path: Path) -> tuple[State, str | None]:
    """The newest readable state, and a message when it is not the latest one.

    Raises:
        TrainingError: if neither the latest nor the previous state can be read.
    """
    problems = []
    for candidate in (path, _previous(path)):
        try:
            state = _read(candidate)
        except (OSError, SafetensorError, ValueError) as error:
            problems.append(f"{candidate}: {error}")
        else:
            return state, f"{problems[0]}; fell back to {candidate}" if problems else None
    raise TrainingError("no readable training state: " + "; ".join(problems) + ". Start the run anew in another folder")


def has_state(path: Path) -> bool:
    """Whether there is anything to resume from."""
    return path.exists() or _previous(path).exists()


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Every leaf that differs, as key -> "old -> new"."""
    found: dict[str, str] = {}
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found |= differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found[f"{prefix}{key}"] = f"{before} -> {after}"
    return found


def _previous(path: Path) -> Path:
    return path.with_name(path.name + ".previous")


def _read(path: Path) -> State:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    text = metadata.get("state", "")
    if metadata.get("sha256") != _digest(tensors, text):
        raise ValueError("damaged: its checksum does not fit")
    state = _put_tensors(json.loads(text), tensors)
    assert isinstance(state, dict)
    return state


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _take_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON, its tensors moved to `tensors` under the path that leads to them."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"__tensor__": name}
    if isinstance(value, Mapping):
        # JSON knows only string keys; optimisers number their parameters
        return {"__dict__": [[key, _take_tensors(v, f"{name}/{key}", tensors)] for key, v in value.items()]}
    if isinstance(value, list | tuple):
        return [_take_tensors(v, f"{name}/{i}", tensors) for i, v in enumerate(value)]
    return value


def _put_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if "__tensor__" in value:
            return tensors[value["__tensor__"]]
        return {key: _put_tensors(v, tensors) for key, v in value["__dict__"]}
    if isinstance(value, list):
        return [_put_tensors(v, tensors) for v in value]
    return value
