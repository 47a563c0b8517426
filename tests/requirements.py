"""What a test may skip without, and must not skip without where MLFF_REQUIRE names it.

``MLFF_REQUIRE=ase,data`` turns the skips of tests that need ASE or the real data sets into failures;
``lammps-mliap`` is the LAMMPS that `mlff lammps build` makes.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

# The folder of this name in the repository makes `import NAME` succeed without the engine: only a real name tells.
ENGINES = {"ase": "Atoms", "lammps": "lammps", "openmm": "System"}
MORE = ("compiler", "cuda", "data", "lammps-mliap", "opencl", "schnetpack", "torchmdnet")
PLATFORMS = ("Reference", "CPU", "OpenCL", "CUDA")  # of OpenMM


def require_engine(name: str) -> ModuleType:
    """The engine's module; skips where it is not installed. Callable at the top of a test file or inside a test."""
    module = importlib.import_module(name) if importlib.util.find_spec(name) else None
    if module is None or not hasattr(module, ENGINES[name]):
        missing(name, f"{name} is not installed: pip install 'mlff-engines[{name}]'")
    assert module is not None
    return module


def require_platform(name: str) -> None:
    """Skips where OpenMM has no such platform that works, such as one for GPUs without a GPU."""
    openmm = require_engine("openmm")
    try:
        system = openmm.System()
        system.addParticle(1.0)
        openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform(name))
    except openmm.OpenMMException as error:
        missing(name.lower(), f"OpenMM has no platform {name} here: {error}")


def require_data() -> Path:
    """The folder of real data sets; MLFF_TEST_DATA overrides its default place beside the repository."""
    path = Path(os.environ.get("MLFF_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not path.is_dir():
        missing("data", f"no data at {path}: set MLFF_TEST_DATA to the folder of the data sets")
    return path


def require_package(name: str, engine: str) -> ModuleType:
    """A package that the tests of `engine` need; skips without it, and fails where the engine must not be missing."""
    if importlib.util.find_spec(name) is None:
        missing(engine, f"{name} is not installed: pip install 'mlff-engines[all]'")
    return importlib.import_module(name)


def require_compiler() -> None:
    """Skips where no C++ compiler is installed. Callable at the top of a test file."""
    if not has_compiler():
        missing("compiler", "no C++ compiler: install g++ 11 or newer, or name one with CXX")


def has_compiler() -> bool:
    """Whether kernels can be built here."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def missing(name: str, message: str) -> None:
    """Skips; fails where MLFF_REQUIRE names it."""
    required = [part.strip() for part in os.environ.get("MLFF_REQUIRE", "").split(",") if part.strip()]
    unknown = sorted(set(required) - {*ENGINES, *MORE})
    if unknown:
        raise pytest.UsageError(f"MLFF_REQUIRE names {unknown}; allowed: {', '.join((*ENGINES, *MORE))}")
    if name in required:
        pytest.fail(f"{message} (required by MLFF_REQUIRE={','.join(required)})", pytrace=False)
    pytest.skip(message, allow_module_level=True)
