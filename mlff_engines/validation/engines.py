"""Every engine that the judge knows, found by name. An adapter package is imported only when it is asked for."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import cast

from mlff_engines.errors import ConfigError, MissingEngineError, suggest
from mlff_engines.manifest import Dtype
from mlff_engines.neighbors import SKIN
from mlff_engines.validation.engine import Engine, MakeEngine

# name -> (module, class, extra that installs it)
ENGINES: dict[str, tuple[str, str, str]] = {
    "ase": ("mlff_ase.engine", "ASEEngine", "ase"),
    "openmm": ("mlff_openmm.engine", "OpenMMEngine", "openmm"),
    "lammps": ("mlff_lammps.engine", "LAMMPSEngine", "lammps"),
    "lammps-mliap": ("mlff_lammps.engine", "LAMMPSMLIAPEngine", "lammps"),
}


def make_engine(
    name: str, artifact: Path, *, folder: Path, device: str = "cpu", dtype: Dtype | None = None, skin: float = SKIN
) -> Engine:
    """The engine `name` for one artifact; see `MakeEngine`.

    Raises:
        ConfigError: an unknown name.
        MissingEngineError: it is not installed, or not built; the message says how to get it.
    """
    if name not in ENGINES:
        raise ConfigError(f"unknown engine {name!r}{suggest(name, ENGINES)}")
    module, attribute, extra = ENGINES[name]
    try:
        make = cast(MakeEngine, getattr(importlib.import_module(module), attribute))
    except ImportError as error:  # an engine's folder may be importable without the engine: its names are not
        raise MissingEngineError(
            f"engine {name} cannot be imported ({error}): pip install 'mlff-engines[{extra}]'"
        ) from None
    return make(artifact, folder=folder, device=device, dtype=dtype, skin=skin)
