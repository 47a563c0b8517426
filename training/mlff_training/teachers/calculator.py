"""A teacher as an ASE calculator: every answer is checked, wherever the teacher runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes

from mlff_engines.errors import TeacherError
from mlff_engines.structure import FloatArray
from mlff_training.teachers.config import TeacherConfig, state_of


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
