"""Adapters with a bug each, put where such a bug would live, and which check catches it.

The model is right in all but two cases: Lennard-Jones for argon and krypton, as an artifact. ASE and OpenMM are patched
in this process; the plug-in of LAMMPS is compiled from changed sources; `pair_style mliap` loads a class of this module
in the process of LAMMPS.
"""

from __future__ import annotations

import os
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from broken_engines import ARGON_KRYPTON, NOBLE, NonConservative, StaleList, lennard_jones
from mlff_engines import artifact, native
from mlff_engines.checkpoint import Domain, save_checkpoint
from mlff_engines.evaluator import Evaluator
from mlff_engines.export import export
from mlff_engines.files import replacing
from mlff_engines.neighbors import VerletList
from mlff_engines.structure import IntArray, Structure
from mlff_engines.validation.engine import Engine
from mlff_engines.validation.engines import make_engine
from mlff_lammps.mliap import MLIAP

Inject = Callable[[pytest.MonkeyPatch], None]
TESTS = Path(__file__).resolve().parent
NAME = "MLFF_TEST_BUG"  # the variable that names the bug of a LAMMPS process
OFF, SHORT = 1.0005, 0.9
PERMUTED = np.arange(119)
PERMUTED[NOBLE.numbers] = NOBLE.numbers[::-1]


@dataclass(frozen=True)
class Bug:
    """`caught`: checks that fail; others may fail besides."""

    inject: Inject
    caught: str
    error: float = 0.0  # of a model whose forces are not conservative
    refusal: str = ""  # the adapter itself stops such a run, with these words


def student(folder: Path, error: float = 0.0) -> Path:
    """The artifact, or one whose program is of forces with an error; it claims the same."""
    out = folder / f"noble-{error:g}.pt"
    if not out.exists():
        domain = Domain(elements=list(NOBLE.elements))
        save_checkpoint(folder / "noble", lennard_jones().model, ARGON_KRYPTON, domain, {"teacher": "analytic"})
        right = export([folder / "noble"], out, dtype="float64", overwrite=True)
        if error:
            wrong = artifact.script(NonConservative(lennard_jones(), NOBLE.cutoff, error))
            artifact.save(out, wrong, right.manifest, right.golden)
    return out


def broken(bug: str, engine: str, folder: Path, patch: pytest.MonkeyPatch) -> Engine:
    """The engine with a bug, or with none; as long as `patch` lasts."""
    case = BUGS[bug][engine] if bug else Bug(nothing, "")
    case.inject(patch)
    return make_engine(engine, student(folder, case.error), folder=folder / f"{engine}-{[*BUGS, ''].index(bug)}")


def nothing(patch: pytest.MonkeyPatch) -> None:
    """The adapter is right."""


def wrapped(name: str, around: Callable[[Any], Any]) -> Inject:
    """What is called `name`, as "package.module:Class.method", becomes `around` it."""

    def inject(patch: pytest.MonkeyPatch) -> None:
        found = re.fullmatch(r"(.+)[.:](\w+)", name)
        assert found is not None
        owner = pkgutil.resolve_name(found[1])
        patch.setattr(owner, found[2], around(getattr(owner, found[2])))

    return inject


def together(*injected: Inject) -> Inject:
    def inject(patch: pytest.MonkeyPatch) -> None:
        for one in injected:
            one(patch)

    return inject


def mapped(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function whose result is changed."""
    return lambda function: lambda *args, **options: change(function(*args, **options))


def then(change: Callable[[Any], None]) -> Callable[[Any], Any]:
    """A method after which the object is changed."""

    def around(method: Any) -> Any:
        def both(self: Any, *args: Any, **options: Any) -> None:
            method(self, *args, **options)
            change(self)

        return both

    return around


def shortened(evaluate: Evaluator) -> None:
    evaluate.neighbors = VerletList(SHORT * evaluate.neighbors.cutoff, evaluate.neighbors.skin)


def never_rebuilt(evaluate: Evaluator) -> None:
    evaluate.neighbors = StaleList(evaluate.neighbors.cutoff, evaluate.neighbors.skin)


def swapped(structure: Structure) -> Structure:
    return replace(structure, numbers=PERMUTED[structure.numbers])


def in_nm(structure: Structure) -> Structure:
    return replace(structure, positions=structure.positions / 10)


def scaled(calculator: Any) -> None:
    calculator.results = {name: OFF * value for name, value in calculator.results.items()}


def rounded_sum(calculator: Any) -> None:
    calculator.results["energy"] = float(calculator.results["energies"].astype(np.float32).sum())


ASE = "mlff_ase.calculator:"
OPENMM = "mlff_openmm.force:"
FORCES = "mlff_lammps.forces:"
LAMMPS = "mlff_lammps.engine:LAMMPSEngine"


def rarely_rebuilt(engine: Any) -> None:
    engine.settings.append("neigh_modify every 1000 delay 1000 check no")


# file of the plug-in: bug -> (C++ as it is, as it becomes)
CHANGES = {
    "short": ("square >= cutoff_square", f'square >= (bug("short") ? {SHORT**2!r} : 1.0) * cutoff_square'),
    "virial": ("virial[k] += w[k];", 'virial[k] += bug("virial") ? -w[k] : w[k];'),
    "species": (
        "graph.numbers.push_back(numbers[type[i]]);",
        'graph.numbers.push_back(numbers[bug("species") ? atom->ntypes + 1 - type[i] : type[i]]);',
    ),
    "nm": (
        "{dx, dy, dz}",
        '{dx * (bug("nm") ? 0.1 : 1.0), dy * (bug("nm") ? 0.1 : 1.0), dz * (bug("nm") ? 0.1 : 1.0)}',
    ),
    "unit": ("1.0 / mlff::KCAL_PER_MOL : 1.0;", f'1.0 / mlff::KCAL_PER_MOL : bug("unit") ? {OFF!r} : 1.0;'),
    "sum": (
        "eng_vdwl += energy;",
        'eng_vdwl = bug("sum") ? float(eng_vdwl + energy) : eng_vdwl + energy;',
    ),
}
ASKED = f"""
#include <cstdlib>
#include <cstring>
static bool bug(const char *name)
{{
  static const char *given = std::getenv("{NAME}");
  return given && !std::strcmp(given, name);
}}
"""


def changed_sources(sources: Path) -> Path:
    """A copy of the plug-in's sources that has every bug, one at a time; always at one place, to be compiled once."""
    folder = native.cache() / "lammps-plugin" / "with-bugs"
    folder.mkdir(parents=True, exist_ok=True)
    for path in filter(Path.is_file, sources.iterdir()):
        text = path.read_text(encoding="utf-8")
        if path.name == "pair_mlff.cpp":
            text = ASKED + text
            for old, new in CHANGES.values():
                assert text.count(old) == 1, f"{path} has {old!r} {text.count(old)} times: adapt this bug to it"
                text = text.replace(old, new)
        with replacing(folder / path.name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return folder


def compiled(bug: str) -> Inject:
    """A bug of `CHANGES`."""

    def inject(patch: pytest.MonkeyPatch) -> None:
        patch.setenv(NAME, bug)
        wrapped("mlff_lammps.plugin:SOURCES", changed_sources)(patch)

    return inject


class BrokenMLIAP(MLIAP):
    """With the bug that the environment names."""

    def _load(self) -> None:
        _inside(os.environ[NAME])
        super()._load()


@cache
def _inside(bug: str) -> None:
    """Once per process, though every `clear` of a deck loads the model again."""
    INSIDE[bug](pytest.MonkeyPatch())


def inside(bug: str) -> Inject:
    """A bug of `INSIDE`, in the process of LAMMPS."""

    def inject(patch: pytest.MonkeyPatch) -> None:
        patch.setenv(NAME, bug)
        patch.setenv("PYTHONPATH", str(TESTS), prepend=os.pathsep)
        patch.setattr("mlff_lammps.mliap.MLIAP", BrokenMLIAP)

    return inject


def _short(forces: Any) -> None:
    forces.cutoff *= SHORT


def _swapped(forces: Any) -> None:
    forces._numbers = forces._numbers.flip(0)


def _off(forces: Any) -> None:
    forces._energy_unit /= OFF


def _rounded(call: Any) -> Any:
    def rounded(self: Any, data: Any) -> None:
        call(self, data)
        data.energy = float(np.asarray(data.eatoms).astype(np.float32).sum())

    return rounded


def _vectors_in_nm(make_graph: Any) -> Any:
    return lambda numbers, index, vectors, **more: make_graph(numbers, index, vectors / 10, **more)


INSIDE: dict[str, Inject] = {
    "short": wrapped(FORCES + "Forces.__init__", then(_short)),
    "species": wrapped(FORCES + "Forces.__init__", then(_swapped)),
    "nm": wrapped(FORCES + "make_graph", _vectors_in_nm),
    "unit": wrapped(FORCES + "Forces.__init__", then(_off)),
    "sum": wrapped(FORCES + "Forces.__call__", _rounded),
}


def _numbers_swapped(numbers: list[int]) -> list[int]:
    found: IntArray = PERMUTED[numbers]
    return found.tolist()


# bug -> engine -> how it comes about, what catches it. OpenMM asks no force for its virial.
BUGS: dict[str, dict[str, Bug]] = {
    "neighbours to 0.9 of the cutoff only": {
        "ase": Bug(wrapped(ASE + "MLFFCalculator._load", then(lambda self: shortened(self._evaluate))), "S1 M1 M3"),
        "openmm": Bug(wrapped(OPENMM + "_Worker.__init__", then(lambda self: shortened(self.evaluate))), "S1 M1 M3"),
        "lammps": Bug(compiled("short"), "S1 M1 M3"),
        "lammps-mliap": Bug(inside("short"), "S1 M1 M3"),
    },
    "stale neighbour list": {
        "ase": Bug(wrapped(ASE + "MLFFCalculator._load", then(lambda self: never_rebuilt(self._evaluate))), "S1 M3"),
        "openmm": Bug(wrapped(OPENMM + "_Worker.__init__", then(lambda self: never_rebuilt(self.evaluate))), "S1 M3"),
        "lammps": Bug(wrapped(LAMMPS + ".__init__", then(rarely_rebuilt)), "M2 M3"),
        "lammps-mliap": Bug(
            wrapped(LAMMPS + ".__init__", then(rarely_rebuilt)), "M2 M3", refusal="since the neighbour list was built"
        ),
    },
    "1 % non-conservative force": {
        engine: Bug(nothing, "S1 M1 M3", error=1e-2) for engine in ("ase", "openmm", "lammps", "lammps-mliap")
    },
    "0.1 % non-conservative force": {
        engine: Bug(nothing, "S1 M1 M3", error=1e-3) for engine in ("ase", "openmm", "lammps", "lammps-mliap")
    },
    "wrong sign of the virial": {
        "ase": Bug(wrapped(ASE + "full_3x3_to_voigt_6_stress", mapped(np.negative)), "S4 M3"),
        "lammps": Bug(compiled("virial"), "S1 M3"),
        "lammps-mliap": Bug(
            together(*(wrapped(f"mlff_lammps.engine:{name}", np.negative) for name in ("NKTV2P", "BAR"))), "S1 M3"
        ),
    },
    "two species swapped": {
        "ase": Bug(wrapped(ASE + "to_structure", mapped(swapped)), "S1 S9 M3"),
        "openmm": Bug(wrapped(OPENMM + "_atomic_numbers", mapped(_numbers_swapped)), "S1 S9 M3"),
        "lammps": Bug(compiled("species"), "S1 M3"),
        "lammps-mliap": Bug(inside("species"), "S1 S9 M3"),
    },
    "positions in nm for Å": {
        "ase": Bug(wrapped(ASE + "to_structure", mapped(in_nm)), "S1 M3"),
        "openmm": Bug(wrapped(OPENMM + "_Worker.positions", mapped(lambda x: x / 10)), "S1 M3"),
        "lammps": Bug(compiled("nm"), "S1 M3"),
        "lammps-mliap": Bug(inside("nm"), "S1 M3"),
    },
    "energy and force unit off by 1.0005": {
        "ase": Bug(wrapped(ASE + "MLFFCalculator.calculate", then(scaled)), "S1 S9 M3"),
        "openmm": Bug(
            together(*(wrapped(OPENMM + name, lambda unit: OFF * unit) for name in ("ENERGY", "FORCE"))), "S1 S9 M3"
        ),
        "lammps": Bug(compiled("unit"), "S1 S9 M3"),
        "lammps-mliap": Bug(inside("unit"), "S1 S9 M3"),
    },
    "energy summed in float32": {
        "ase": Bug(wrapped(ASE + "MLFFCalculator.calculate", then(rounded_sum)), "S1 S9 M1 M3"),
        "openmm": Bug(wrapped(OPENMM + "ENERGY", np.float32), "S1 S9 M1 M3"),
        "lammps": Bug(compiled("sum"), "S1 S9 M1 M3"),
        "lammps-mliap": Bug(inside("sum"), "S1 S9 M1 M3"),
    },
}
