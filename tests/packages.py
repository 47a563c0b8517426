"""Tiny artifacts, and a cache in which torch compiles each of them once for all tests of a session."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import students
from broken_engines import ARGON_KRYPTON, NOBLE
from mlff_engines import native
from mlff_engines.checkpoint import Domain, save_checkpoint
from mlff_engines.compilation import place
from mlff_engines.export import export
from mlff_engines.manifest import inspect
from mlff_engines.models.registry import build_model

DTYPES = {"plain": "float32", "charged": "float64", "argon": "float32", "argons": "float64"}
CHARGED = Domain(elements=list(students.E0), charges=[0.0, 1.0], spins=[0.0, 2.0])


def student(factory: pytest.TempPathFactory, name: str) -> Path:
    """One of `DTYPES`: PaiNN, without and with charge and spin, Lennard-Jones, and an ensemble of two of these.

    The checkpoint of its first member lies beside it as member-0.
    """
    folder, out = shared(factory) / name, shared(factory) / name / "student.pt"
    with native.locked(folder / "lock"):
        if out.is_file():
            return out
        if name in ("plain", "charged"):
            more = {"charge": True, "spin": True, "domain": CHARGED, "interactions": 1} if name == "charged" else {}
            students.artifact(folder, dtype=DTYPES[name], features=8, basis_size=8, **more).rename(out)
        else:
            members = []
            for number, depth in enumerate([1.0, 1.2] if name == "argons" else [1.0]):
                epsilon = {symbol: depth * value for symbol, value in ARGON_KRYPTON.epsilon.items()}
                config = ARGON_KRYPTON.model_copy(update={"epsilon": epsilon})
                model = build_model(config, NOBLE.elements, NOBLE.e0).eval()
                members.append(folder / f"member-{number}")
                save_checkpoint(members[-1], model, config, Domain(elements=list(NOBLE.elements)), {})
            export(members, out, dtype=DTYPES[name])
    return out


@contextmanager
def cache(factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache of the session in place of the user's, whose fused kernels it shares."""
    kernels, folder = native.cache() / "kernels", shared(factory) / "cache"
    kernels.mkdir(parents=True, exist_ok=True)
    with native.locked(folder / "lock"):
        link = folder / "mlff-engines" / "kernels"
        link.parent.mkdir(exist_ok=True)
        if not link.exists():
            link.symlink_to(kernels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


def shared(factory: pytest.TempPathFactory) -> Path:
    """Folder of all processes of a session."""
    base = factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"


def package(artifact: Path) -> Path:
    """Where the compiled form of `artifact` is or would be, in its own dtype on the CPU."""
    manifest = inspect(artifact)
    return place(manifest.sha256, getattr(torch, manifest.dtype), torch.device("cpu"))


def put(content: bytes, artifact: Path) -> None:
    """As the package of `artifact`, with the hash that belongs to it."""
    package(artifact).write_bytes(content)
    package(artifact).with_suffix(".sha256").write_text(hashlib.sha256(content).hexdigest())
