"""The folders named after engines never shadow the engines, and the tree holds nothing it must not."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from types import ModuleType

import pytest

import requirements
from requirements import ENGINES, REPOSITORY

PACKAGES = {
    "ase": "mlff_ase",
    "lammps": "mlff_lammps",
    "openmm": "mlff_openmm",
    "training": "mlff_training",
}
# a pickle runs code when it is loaded; weights travel as safetensors, settings as YAML or JSON
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
# pieces, so that this file does not contain what it looks for
MACHINE_PATHS = "(?:^|[^A-Za-z0-9_.~])/(?:work|home|root|tmp|opt|Users|mnt|scratch)/[A-Za-z]"
PACKAGE_HOSTS = "(?:extra-)?index-" + "url|find-" + "links"


def layout_problems(root: Path) -> list[str]:
    """Why one of the top-level folders could be taken for a package, or a test for an engine."""
    problems = []
    for folder, package in PACKAGES.items():
        entries = [path for path in (root / folder).iterdir() if not path.name.startswith((".", "__pycache__"))]
        problems += [
            f"{path.relative_to(root)} is importable as {folder}.{path.stem}"
            for path in entries
            if path.suffix in {".py", ".pyi", ".so", ".pyc"}
        ]
        packages = sorted(path.name for path in entries if path.is_dir())
        if packages != [package]:
            problems.append(f"{folder}/ holds the folders {packages}; allowed: {package} alone")
        problems += [
            f"{folder}/{package}/{name} is missing"
            for name in ("__init__.py", "py.typed")
            if not (root / folder / package / name).is_file()
        ]
    for top in ("tests", "examples"):
        paths = [path for path in (root / top).rglob("*") if "__pycache__" not in path.parts]
        problems += [f"{path.relative_to(root)} is named after an engine" for path in paths if path.stem in ENGINES]
        problems += [f"{path.relative_to(root)} makes {top} a package" for path in paths if path.name == "__init__.py"]
    return problems


def test_layout() -> None:
    assert layout_problems(REPOSITORY) == []


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("ase/__init__.py", "ase/__init__.py is importable"),
        ("lammps/build.py", "lammps/build.py is importable as lammps.build"),
        ("openmm/helpers/x.py", "openmm/ holds the folders ['helpers', 'mlff_openmm']"),
        ("tests/ase/test_x.py", "tests/ase is named after an engine"),
        ("tests/core/openmm.py", "tests/core/openmm.py is named after an engine"),
        ("examples/lammps.py", "examples/lammps.py is named after an engine"),
        ("tests/core/__init__.py", "tests/core/__init__.py makes tests a package"),
    ],
)
def test_layout_notices(tmp_path: Path, path: str, problem: str) -> None:
    for folder, package in PACKAGES.items():
        (tmp_path / folder / package).mkdir(parents=True)
        for name in ("__init__.py", "py.typed"):
            (tmp_path / folder / package / name).touch()
    assert layout_problems(tmp_path) == []
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).touch()
    assert any(found.startswith(problem) for found in layout_problems(tmp_path)), layout_problems(tmp_path)


def where(engine: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """The file from which ``python -c`` in `directory` takes the engine's real name."""
    program = f"from {engine} import {ENGINES[engine]}; import {engine}; print({engine}.__file__)"
    return subprocess.run([sys.executable, "-c", program], cwd=directory, capture_output=True, text=True)


@pytest.mark.parametrize("engine", ENGINES)
def test_engine_is_the_installed_one(engine: str, require_engine: Callable[[str], ModuleType]) -> None:
    """Inside pytest, and in ``python -c`` from the root of the repository: two search paths."""
    module = require_engine(engine)
    assert module.__file__
    assert Path(module.__file__).parent.parent.name == "site-packages"
    run = where(engine, REPOSITORY)
    assert run.returncode == 0, run.stderr
    assert Path(run.stdout.strip()) == Path(module.__file__)


def test_shadowing_is_noticed(tmp_path: Path, require_engine: Callable[[str], ModuleType]) -> None:
    require_engine("ase")
    (tmp_path / "ase" / "mlff_ase").mkdir(parents=True)
    assert where("ase", tmp_path).returncode == 0
    (tmp_path / "ase" / "__init__.py").touch()
    assert "cannot import name 'Atoms'" in where("ase", tmp_path).stderr


def sources() -> list[Path]:
    roots = [REPOSITORY / "mlff_engines", *(REPOSITORY / folder / package for folder, package in PACKAGES.items())]
    # what stands in `theirs` runs in the environments of other packages
    return sorted(path for root in roots for path in root.rglob("*.py") if "theirs" not in path.parts)


def forbidden(source: str, *, torchscript: bool = False, allowed: Collection[str] = ()) -> list[str]:
    """Names in the source of one module that no module of ours may use; `torchscript` allows torch.jit."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute | ast.Name):
            names = [ast.unparse(node)]
        elif isinstance(node, ast.keyword) and node.arg in {"allow_pickle", "weights_only"}:
            names = [f"{node.arg}={ast.unparse(node.value)}"]
        else:
            continue
        for name in names:
            if (
                name.split(".")[0] in PICKLES
                or name in {"torch.load", "torch.save", "allow_pickle=True", "weights_only=False", "eval", "exec"}
                or (f"{name}.".startswith("torch.jit.") and not torchscript)
            ):
                found.add(name)
    return sorted(found - {*allowed})


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_source_uses_nothing_forbidden(path: Path) -> None:
    """No pickle, no execution of text, and TorchScript in one file only.

    LAMMPS' ML-IAP unpickles a file of ours, which holds a class, a path and a hash: it is written, never read.
    """
    torchscript = path == REPOSITORY / "mlff_engines" / "artifact.py"
    allowed = {"pickle", "pickle.dumps"} if path == REPOSITORY / "lammps" / "mlff_lammps" / "mliap.py" else set()
    assert forbidden(path.read_text(encoding="utf-8"), torchscript=torchscript, allowed=allowed) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import dump",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import torch\ntorch.jit.script(f)",
        "from torch import jit",
        "from torch.jit import script",
        "import torch.jit",
        "eval('1')",
    ],
)
def test_forbidden_name_is_noticed(source: str) -> None:
    assert forbidden(source)


def tracked_texts() -> dict[str, str]:
    """Every text file that is, or is about to be, under version control."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if run.returncode:
        pytest.skip("no git checkout here, so no list of tracked files")
    texts = {}
    for name in filter(None, run.stdout.split("\0")):
        path = REPOSITORY / name
        try:
            texts[name] = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):  # binary, or deleted and not yet committed
            continue
    return texts


def machine_words(texts: dict[str, str]) -> list[str]:
    """``file:line: text`` of each line that names a place on one machine or a package host."""
    pattern = re.compile(f"{MACHINE_PATHS}|{PACKAGE_HOSTS}")
    return [
        f"{name}:{number}: {line.strip()}"
        for name, text in texts.items()
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]


def test_no_machine_paths_in_tracked_text() -> None:
    assert machine_words(tracked_texts()) == []


@pytest.mark.parametrize("line", ["read('" + "/home" + "/me/data')", "x = " + "/work" + "/main", "--index-" + "url=x"])
def test_machine_path_is_noticed(line: str) -> None:
    assert machine_words({"a.py": f"one\n{line}\n"}) == [f"a.py:2: {line}"]


def test_relative_and_web_paths_are_fine() -> None:
    line = "../shared/data tests/tmp/x https://example.org/home/page ~/opt/x a.b/work/y"
    assert machine_words({"a.md": line}) == []


def test_missing_engine_skips_unless_required(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder is importable without its engine; only the missing real name tells."""
    monkeypatch.setitem(requirements.ENGINES, "training", "loop_of_an_engine")
    monkeypatch.delenv("MLFF_REQUIRE", raising=False)
    with pytest.raises(pytest.skip.Exception, match="training is not installed"):
        requirements.require_engine("training")
    monkeypatch.setenv("MLFF_REQUIRE", "ase, training")
    with pytest.raises(pytest.fail.Exception, match="required by MLFF_REQUIRE"):
        requirements.require_engine("training")
    monkeypatch.setenv("MLFF_REQUIRE", "asse")
    with pytest.raises(pytest.UsageError, match="asse"):
        requirements.require_engine("training")


def test_missing_data_skips_unless_required(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFF_TEST_DATA", str(tmp_path / "absent"))
    monkeypatch.delenv("MLFF_REQUIRE", raising=False)
    with pytest.raises(pytest.skip.Exception, match="set MLFF_TEST_DATA"):
        requirements.require_data()
    monkeypatch.setenv("MLFF_REQUIRE", "data")
    with pytest.raises(pytest.fail.Exception, match="set MLFF_TEST_DATA"):
        requirements.require_data()
