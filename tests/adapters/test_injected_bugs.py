"""Each bug of docs/conformance.md, put into each adapter, is caught; the right adapter passes the same checks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import broken_adapters
import broken_dynamics
import lammps_runs
import requirements
from broken_adapters import BUGS
from broken_dynamics import SHORT, right
from broken_engines import NOBLE, lennard_jones
from mlff_engines.validation.dynamics.constant_energy import check_dynamics
from mlff_engines.validation.engine import Engine
from mlff_engines.validation.result import STATIC, CheckResult
from mlff_engines.validation.static.conformance import check_model
from mlff_engines.validation.static.parity import reference

ENGINES = sorted({engine for cases in BUGS.values() for engine in cases})


def slow(engine: str) -> list[pytest.MarkDecorator]:
    """Every bug needs a new process of LAMMPS, with a Python of its own inside."""
    return [pytest.mark.slow] if engine == "lammps-mliap" else []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the artifacts are, made once."""
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as made:
        yield made


def require(engine: str) -> None:
    if engine == "lammps-mliap":
        lammps_runs.require_build()
        return
    requirements.require_engine(engine)
    if engine == "lammps":
        requirements.require_compiler()


def judged(engine: Engine, codes: str, folder: Path) -> list[CheckResult]:
    """Of these checks, those that fail."""
    claims = replace(NOBLE, offers=engine.offers)
    static = [code for code in codes.split() if code in STATIC]
    moving = [code for code in codes.split() if code not in STATIC]
    expected, core = reference(lennard_jones(), NOBLE.cutoff), right(lennard_jones(), NOBLE)
    with np.errstate(all="ignore"):  # some explode
        results = check_model(engine.evaluate, claims, reference=expected, only=static)
        results += check_dynamics(engine, core, broken_dynamics.start("lj"), folder, SHORT, only=moving)
    assert [result.code for result in results] == codes.split()
    return [result for result in results if result.verdict == "fail"]


def ended(engine: Engine) -> closing[Engine] | nullcontext[Engine]:
    return closing(engine) if hasattr(engine, "close") else nullcontext(engine)


@pytest.mark.parametrize("engine", [pytest.param(engine, marks=slow(engine)) for engine in ENGINES])
def test_right_adapters_pass(engine: str, folder: Path, patch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    require(engine)
    asked = {code for cases in BUGS.values() if engine in cases for code in cases[engine].caught.split()}
    with ended(broken_adapters.broken("", engine, folder, patch)) as made:
        assert judged(made, " ".join(sorted(asked, key=lambda code: (code[0] != "S", code))), tmp_path) == []


@pytest.mark.check("S1", "S4", "S9")
@pytest.mark.parametrize(
    ("bug", "engine"),
    [pytest.param(bug, engine, marks=slow(engine)) for bug, cases in BUGS.items() for engine in cases],
)
def test_bug_is_caught(bug: str, engine: str, folder: Path, patch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    require(engine)
    case = BUGS[bug][engine]
    with ended(broken_adapters.broken(bug, engine, folder, patch)) as made:
        found = judged(made, case.caught, tmp_path)
    assert [result.code for result in found] == case.caught.split()
    if case.refusal:
        assert any(case.refusal in result.detail for result in found), found
