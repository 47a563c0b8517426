"""Teachers: any ASE calculator, in this process or in another environment, with charge and spin taken seriously.

A teacher is named by a short name of `TEACHERS` or by an import path. Total charge and multiplicity are data of each
structure (`atoms.info["charge"]`, `atoms.info["multiplicity"]`); a teacher that cannot use them refuses the structure.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from pydantic import Field, model_validator

from mlff_engines.config import Config
from mlff_engines.errors import StructureError, TeacherError, suggest
from mlff_engines.files import sha256_of
from mlff_engines.structure import FloatArray
from mlff_training import teacher_worker
from mlff_training.teacher_table import TEACHERS, TeacherSpec

State = list[tuple[str, str, float]]


_ROUTE = re.compile(r"(info|parameter|array):(\w+)(?:=(S|unpaired))?")


class TeacherConfig(Config):
    """Which teacher, and where it lives."""

    name: str = Field("gfn2-xtb", description=f"one of {', '.join(TEACHERS)}, or an import path 'package.module:Class'")
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="arguments of the calculator; a value {call: 'package.module:function', options: {...}} is built, "
        "{import: 'torch:float64'} is looked up",
    )
    python: Path | None = Field(
        None, description="interpreter of the environment the teacher is installed in; default: this"
    )
    level: str | None = Field(None, description="level of theory written beside each label")
    charge: str | None = Field(
        None,
        description="how the calculator takes the total charge: 'info:KEY' (atoms.info), 'parameter:KEY' "
        "(calculator.set) or 'array:initial_charges' (their sum); default: as the table of teachers says",
    )
    multiplicity: str | None = Field(
        None,
        description="likewise for the multiplicity 2S+1; append '=S' or '=unpaired' where S or 2S is expected",
    )
    timeout: float = Field(600.0, gt=0, description="seconds a teacher in another process may take to load or answer")
    threads: int = Field(1, ge=1, description="threads of the teacher")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.name not in TEACHERS and ":" not in self.name:
            raise ValueError(
                f"unknown teacher {self.name!r}{suggest(self.name, TEACHERS)}; "
                "or give an import path 'package.module:Class'"
            )
        missing = [option for option in self.spec.required if option not in self.options]
        if missing:
            raise ValueError(f"the teacher {self.name} needs the options {missing}: {self.spec.description}")
        for key, route in (("charge", self.charge), ("multiplicity", self.multiplicity)):
            if route is not None and not _ROUTE.fullmatch(route):
                raise ValueError(f"{key} = {route!r}; expected info:KEY, parameter:KEY or array:KEY")
        return self

    @property
    def spec(self) -> TeacherSpec:
        """The row of `TEACHERS`, or one made up for an import path."""
        return TEACHERS.get(self.name) or TeacherSpec(self.name, self.name.split(".")[0].split(":")[0], "import path")

    @cached_property
    def level_of_theory(self) -> str:
        """What `info["level"]` of this teacher's labels says; two differently set up teachers never share it."""
        if self.level is not None:
            return self.level
        if self.spec.level is not None and not self.options:
            return self.spec.level
        return f"{self.name}#{self.digest[:8]}"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that decides a label: name, options and the contents of the files they name."""
        decisive = {
            "path": self.spec.path,
            "options": _with_contents({**self.spec.options, **self.options}),
            "charge": self.charge or self.spec.charge,
            "multiplicity": self.multiplicity or self.spec.multiplicity,
        }
        return hashlib.sha256(json.dumps(decisive, sort_keys=True, default=str).encode()).hexdigest()

    @property
    def thread_limits(self) -> dict[str, str]:
        """The environment variables that hold a teacher to its `threads`."""
        return {f"{library}_NUM_THREADS": str(self.threads) for library in ("OMP", "MKL", "OPENBLAS")}

    @property
    def install_line(self) -> str:
        """The command that installs this teacher where it is looked for."""
        return f"{self.python or 'python'} -m pip install {self.spec.install}"


# options that name files of parameters; others name logs and scratch folders, whose contents decide nothing
_PARAMETER_FILE = re.compile("model|weights|checkpoint|param|base_calc")


def _with_contents(value: Any, is_file: bool = False) -> Any:
    if isinstance(value, dict):
        return {key: _with_contents(part, bool(_PARAMETER_FILE.search(key))) for key, part in value.items()}
    if isinstance(value, list):
        return [_with_contents(part, is_file) for part in value]
    if is_file and isinstance(value, str) and Path(value).is_file():
        return sha256_of(Path(value))
    return value


def state_of(config: TeacherConfig, atoms: Atoms) -> State:
    """Charge and spin of `atoms` in the form the teacher takes.

    Raises:
        StructureError: if the teacher cannot use them, or if no such spin state exists.
    """
    charge = float(atoms.info.get("charge", 0.0))
    multiplicity = int(atoms.info.get("multiplicity", 1))
    routes = {
        "charge": (charge, 0.0, config.charge or config.spec.charge),
        "multiplicity": (multiplicity, 1, config.multiplicity or config.spec.multiplicity),
    }
    state: State = []
    for name, (value, neutral, route) in routes.items():
        if route is None:
            if value != neutral:
                raise StructureError(
                    f"{atoms.get_chemical_formula()} has {name} {value:g}, which the teacher {config.name} cannot use. "
                    f"Take another teacher or, if this one can, say how: `{name}: info:KEY` in the teacher's section"
                )
            continue
        match = _ROUTE.fullmatch(route)
        assert match is not None
        place, key, quantity = match.groups()
        sent = {None: value, "S": (value - 1) / 2, "unpaired": value - 1}[quantity]
        state.append((place, key, sent))
        if name == "multiplicity":
            _check_electrons(atoms, charge, multiplicity)
    return state


def _check_electrons(atoms: Atoms, charge: float, multiplicity: int) -> None:
    """Some codes silently compute half-filled orbitals for an impossible pair of charge and multiplicity."""
    numbers = atoms.numbers
    # f-in-core and effective-core parametrisations change the parity of lanthanides and actinides
    if charge != round(charge) or ((numbers >= 57) & (numbers <= 71) | (numbers >= 89)).any():
        return
    electrons = int(numbers.sum() - round(charge))
    if (electrons - (multiplicity - 1)) % 2 or multiplicity - 1 > electrons:
        raise StructureError(
            f"{atoms.get_chemical_formula()} with charge {charge:g} has {electrons} electrons, which cannot have "
            f"multiplicity {multiplicity}; set atoms.info['multiplicity'] = {2 if electrons % 2 else 1} (2S+1), say"
        )


class TeacherCalculator(Calculator):
    """An ASE calculator that honours `info["charge"]` and `info["multiplicity"]` and answers finite numbers or raises.

    Results: energy and free_energy (eV), forces (N, 3) (eV/Å), and where the teacher has them energies (N,) (eV) and,
    for three periodic axes, stress (6,) (eV/Å³, ASE's order and sign).
    """

    implemented_properties = ("energy", "free_energy", "forces", "energies", "stress")

    def __init__(self, config: TeacherConfig) -> None:
        super().__init__()
        self.config = config
        self._fresh = False

    def reset(self) -> None:
        """Forget everything: the next answer depends on its structure alone."""
        super().reset()
        self._fresh = True

    def check_state(self, atoms: Atoms, tol: float = 0.0) -> list[str]:
        """What changed since the last structure, of all that a teacher sees: charge and multiplicity count."""
        last = self.atoms
        if last is None:
            return list(all_changes)
        changes = [
            name
            for name in ("numbers", "positions", "cell", "pbc")
            if not np.array_equal(getattr(last, name), getattr(atoms, name))
        ]
        return changes if state_of(self.config, atoms) == state_of(self.config, last) else [*changes, "info"]

    def get_property(self, name: str, atoms: Atoms | None = None, allow_calculation: bool = True) -> Any:
        """As ASE's, but a moved atom is no reason to forget what the teacher can start from."""
        if atoms is not None and (self.check_state(atoms) or not self.results):
            if not allow_calculation:
                return None
            self.calculate(atoms)
        if name not in self.results:
            raise PropertyNotImplementedError(
                f"the teacher {self.config.name} gives no {name} here; it gives {', '.join(sorted(self.results))}"
            )
        result = self.results[name]
        return result.copy() if isinstance(result, np.ndarray) else result

    def calculate(
        self, atoms: Atoms | None = None, properties: Any = None, system_changes: list[str] = all_changes
    ) -> None:
        """Evaluate everything the teacher offers.

        Raises:
            StructureError: for a charge or multiplicity the teacher cannot use.
            TeacherError: if it fails or answers something that is not finite.
        """
        super().calculate(atoms, properties, system_changes)
        request = {
            "numbers": self.atoms.numbers,
            "positions": self.atoms.positions,
            "cell": self.atoms.cell.array,
            "pbc": self.atoms.pbc,
            "state": state_of(self.config, self.atoms),
            "fresh": self._fresh,
        }
        self._fresh = False
        self.results = {}
        self.results = checked(self._evaluate(request), self.atoms, self.config.name)

    def _evaluate(self, request: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def close(self) -> None:
        """Free what the teacher holds."""


def checked(answer: Mapping[str, Any], atoms: Atoms, name: str) -> dict[str, Any]:
    """The results in ASE's shapes; TeacherError when energy or forces are missing, misshapen or not finite."""
    what = f"the teacher {name}, {atoms.get_chemical_formula()}"
    missing = [key for key in ("energy", "forces") if key not in answer]
    if missing:
        raise TeacherError(f"{what}: no {' and '.join(missing)}; it offers {sorted(answer)}. A teacher must give both")
    results: dict[str, Any] = {}
    shapes = {"energy": 1, "forces": 3 * len(atoms), "energies": len(atoms)}
    for key, value in answer.items():
        array = np.asarray(value, dtype=np.float64)
        if not np.isfinite(array).all():
            raise TeacherError(f"{what}: {key} is not finite (NaN or Inf); the label is refused")
        if key == "stress":
            results[key] = _voigt(array, what)
        elif array.size == shapes[key]:
            results[key] = array.reshape(-1, 3) if key == "forces" else array.reshape(-1)
        elif key != "energies":  # committees give the members' energies under this name
            raise TeacherError(f"{what}: {key} has shape {array.shape}; expected {shapes[key]} numbers")
    results["energy"] = results["free_energy"] = float(results["energy"][0])
    energies = results.get("energies")
    if energies is not None and not math.isclose(energies.sum(), results["energy"], rel_tol=1e-5, abs_tol=1e-3):
        del results["energies"]  # no partition of the energy, so nothing a student could match
    return results


def _voigt(stress: FloatArray, what: str) -> FloatArray:
    if stress.size == 6:
        return stress.reshape(6)
    if stress.size != 9:
        raise TeacherError(f"{what}: stress has shape {stress.shape}; expected (6,) or (3, 3)")
    full = stress.reshape(3, 3)
    voigt: FloatArray = ((full + full.T) / 2).ravel()[[0, 4, 8, 5, 2, 1]]
    return voigt


class LocalCalculator(TeacherCalculator):
    """A teacher in this process."""

    def __init__(self, config: TeacherConfig) -> None:
        super().__init__(config)
        before = dict(os.environ)
        os.environ |= config.thread_limits  # read once, when a library is loaded; small systems crawl with many threads
        try:
            self._teacher = teacher_worker.build(config.spec.path, {**config.spec.options, **config.options})
        except Exception as error:
            raise build_error(config, teacher_worker.failure(error)) from error
        finally:
            for name in config.thread_limits:
                os.environ.pop(name)
                if name in before:
                    os.environ[name] = before[name]

    def _evaluate(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            return teacher_worker.evaluate(self._teacher, **request)
        except Exception as error:
            raise TeacherError(
                f"the teacher {self.config.name} failed on {self.atoms.get_chemical_formula()}: {error}"
            ) from error


def build_error(config: TeacherConfig, answer: Mapping[str, Any], log: str = "") -> TeacherError:
    """What to say about a teacher that could not be made."""
    where = f"in {config.python}" if config.python else "in this environment"
    if answer.get("missing"):
        return TeacherError(
            f"the teacher {config.name} is not installed {where}: no module {answer['missing']!r}. Install it with "
            f"`{config.install_line}`, or set `python:` to the interpreter of an environment that has it"
        )
    return TeacherError(
        f"cannot make the teacher {config.name} ({config.spec.path}) {where}: {answer['error']}; "
        f"options: {dict(config.options)}{log}"
    )


def make_teacher(config: TeacherConfig) -> TeacherCalculator:
    """The teacher as an ASE calculator; with `python:` in a child process of that interpreter.

    Raises:
        TeacherError: if it is not installed (with the line that installs it) or cannot be made.
    """
    if config.python is None:
        return LocalCalculator(config)
    from mlff_training.remote_teacher import RemoteCalculator

    return RemoteCalculator(config)


def hessian_row(calculator: Calculator, atoms: Atoms, index: int, delta: float = 0.005) -> FloatArray:
    """Row `index` = 3*atom + axis of the Hessian, d²E/(dR_index dR), by central differences of forces.

    Args:
        calculator: anything with ASE's `get_forces`.
        atoms: the structure; not changed.
        index: which coordinate is displaced.
        delta: displacement in Å; the error is O(delta²).

    Returns:
        (N, 3), eV/Å².
    """
    forces: dict[Literal[-1, 1], FloatArray] = {}
    signs: tuple[Literal[-1, 1], ...] = (1, -1)
    for sign in signs:
        displaced = atoms.copy()
        displaced.set_constraint()
        displaced.positions[divmod(index, 3)] += sign * delta
        forces[sign] = calculator.get_property("forces", displaced)
    row: FloatArray = -(forces[1] - forces[-1]) / (2 * delta)
    return row
