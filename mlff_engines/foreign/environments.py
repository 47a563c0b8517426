"""Other packages, each in a virtual environment of its own: their dependencies clash with ours and with each other's.

Environments lie in the user's cache and are made once. None brings CUDA along where the torch that is pinned here is
one for CPUs; that is for pip's own configuration to say.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlff_engines.errors import ConfigError, MissingEngineError, suggest
from mlff_engines.files import replacing
from mlff_engines.native import cache, locked

TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Environment:
    """What is installed.

    Attributes:
        package: what it is about.
        requirements: for pip.
        bare: to be installed without their dependencies, which are wrong; those needed are among `requirements`.
    """

    package: str
    requirements: tuple[str, ...]
    bare: tuple[str, ...] = ()


ENVIRONMENTS: dict[str, Environment] = {
    "schnetpack": Environment(
        "schnetpack",
        (
            *(TORCH, "numpy==2.4.6", "ase==3.29.0", "h5py", "pyyaml", "hydra-core==1.3.8", "hydra-colorlog==1.2.0"),
            *("pytorch-lightning==2.6.6", "torchmetrics==1.9.0", "fasteners", "dirsync", "torch-ema==0.3", "tqdm"),
            "matscipy==1.3.1",
        ),
        bare=("schnetpack==2.1.1",),  # it wants sympy 1.12, with which no torch since 2.5 works
    ),
    "torchmdnet": Environment("torchmd-net", (TORCH, "torchmd-net==3.1.0")),
    "mace": Environment("mace-torch", (TORCH, "mace-torch==0.3.16")),
    "nequip": Environment("nequip and nequip-allegro", (TORCH, "nequip==0.19.1", "nequip-allegro==0.8.3")),
    "deepmd": Environment(
        "deepmd-kit",
        # the torch and the MPI that its wheel is built for, and what else its PyTorch backend imports
        ("torch==2.11.0", "mpich==5.0.2", "e3nn==0.6.0", "ase==3.29.0", "deepmd-kit==3.2.0"),
    ),
    "so3krates": Environment("so3krates-torch", (TORCH, "so3krates-torch==0.2.1")),
}


def folder(name: str) -> Path:
    """Where the environment `name` is, or will be.

    Raises:
        ConfigError: there is no environment of this name.
    """
    if name not in ENVIRONMENTS:
        raise ConfigError(f"no package {name!r} here{suggest(name, ENVIRONMENTS)}")
    wanted = ENVIRONMENTS[name]
    key = json.dumps([wanted.requirements, wanted.bare, sys.version])
    return cache() / "peers" / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def at_hand(name: str) -> Path | None:
    """The interpreter of the environment `name`; None if it has not been made."""
    home = folder(name)
    return home / "bin" / "python" if (home / "complete").is_file() else None


def make(name: str, echo: Callable[[str], None] = lambda line: None) -> Path:
    """The interpreter of the environment `name`, which is made if need be: minutes, and a gigabyte or two.

    Raises:
        ConfigError: there is no environment of this name.
        MissingEngineError: it cannot be made; with the last words of pip.
    """
    home = folder(name)
    with locked(home.with_suffix(".lock")):
        if at_hand(name) is None:
            wanted = ENVIRONMENTS[name]
            echo(f"making an environment for {wanted.package}, once: {home}")
            shutil.rmtree(home, ignore_errors=True)
            _do([sys.executable, "-m", "venv", str(home)], f"make {home}")
            pip = [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet"]
            _do([*pip, *wanted.requirements], f"install {wanted.package}")
            if wanted.bare:
                _do([*pip, "--no-deps", *wanted.bare], f"install {wanted.package}")
            with replacing(home / "complete") as temporary:
                temporary.write_text("\n".join((*wanted.requirements, *wanted.bare)))
    return home / "bin" / "python"


def _do(command: list[str], doing: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise MissingEngineError(f"cannot {doing}: " + " | ".join(said[-3:]))
