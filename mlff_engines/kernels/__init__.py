"""Models again, as single operators in C++ with hand-written gradients; the plain torch form is their reference.

A kernel computes what its `Potential` computes, to rounding in float64 and to the stated error of its tables in
float32, and takes its place. One that cannot be built is done without.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from mlff_engines import native
from mlff_engines.errors import KernelWarning, MissingEngineError
from mlff_engines.kernels.painn import FusedPaiNN, memory
from mlff_engines.potential import Ensemble, Potential

__all__ = ["FUSED", "available", "fuse", "library", "load_operators", "loaded", "memory"]

SOURCE = Path(__file__).parent / "painn.cpp"
FLAGS = ("-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-maybe-uninitialized")
FUSED: dict[str, Callable[[Potential], Potential]] = {"painn": FusedPaiNN}  # by architecture


def library() -> Path:
    """The shared library of all kernels, built if need be; `torch.ops.load_library` or `dlopen` registers them.

    Raises:
        MissingEngineError: it cannot be built.
    """
    return native.operator_library("mlff-kernels", SOURCE, flags=FLAGS)


@functools.cache
def load_operators() -> None:
    """Make `torch.ops.mlff` known to this process.

    Raises:
        MissingEngineError: the library cannot be built or loaded.
    """
    path = library()
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise MissingEngineError(f"cannot load {path}: {error}. Delete it, and it is built again") from None


def loaded() -> bool:
    """Whether this process knows the operators already."""
    return load_operators.cache_info().currsize > 0


@functools.cache
def available() -> bool:
    """Whether the kernels can be used here; says once why not."""
    try:
        load_operators()
    except MissingEngineError as error:
        warnings.warn(
            f"{error}. Until then models run in plain torch, several times slower (kernel='torch' or MLFF_KERNEL=torch "
            "asks for that)",
            KernelWarning,
            stacklevel=2,
        )
        return False
    return True


def fuse(potential: Potential | Ensemble, architectures: Sequence[str]) -> Potential | Ensemble:
    """`potential`, eager, on the CPU and in its final dtype, with the operators in place; weights keep their names.

    Args:
        potential: one, or an ensemble.
        architectures: of each member; all have a kernel. The operators must have been loaded.
    """
    members = [member for member in potential.modules() if isinstance(member, Potential)]
    fused = [FUSED[name](member) for name, member in zip(architectures, members, strict=True)]
    return (fused[0] if isinstance(potential, Potential) else Ensemble(fused)).eval()
