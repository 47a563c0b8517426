"""Which teacher, where it lives, and how it takes charge and spin.

Total charge and multiplicity are data of each structure (`atoms.info["charge"]`, `atoms.info["multiplicity"]`); a
teacher that cannot use them refuses the structure.
"""

from __future__ import annotations

import hashlib
import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from ase import Atoms
from pydantic import Field, model_validator

from mlff_engines.config import Config
from mlff_engines.errors import StructureError, suggest
from mlff_engines.files import sha256_of
from mlff_training.teachers.table import TEACHERS, TeacherSpec

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
