"""Shared fixtures: where the real data lies, and which engines must not be missing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

import requirements


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Systems here are small: one intra-op thread is fastest and keeps sums in one order."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _kernel() -> None:
    """Without a compiler every artifact that is loaded would warn, and warnings are errors."""
    if not requirements.has_compiler():
        os.environ.setdefault("MLFF_KERNEL", "torch")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the working tree."""
    return requirements.REPOSITORY


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets; MLFF_TEST_DATA overrides its default place beside the repository."""
    return requirements.require_data()


@pytest.fixture(scope="session")
def require_engine() -> Callable[[str], ModuleType]:
    """`require_engine("ase")` is the real engine's module, or a skip, or a failure where MLFF_REQUIRE names it."""
    return requirements.require_engine
