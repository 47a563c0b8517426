"""An artifact as an ASE calculator."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.stress import full_3x3_to_voigt_6_stress

from mlff_ase.structures import changes, to_structure
from mlff_engines.artifact import Artifact, load
from mlff_engines.errors import ArtifactError
from mlff_engines.manifest import Dtype
from mlff_engines.neighbors import SKIN


class MLFFCalculator(Calculator):
    """Energies, forces and stress of a student.

    >>> atoms.calc = MLFFCalculator("student.pt")

    | result        | shape  | unit  | meaning                                                            |
    |---------------|--------|-------|--------------------------------------------------------------------|
    | `energy`, `free_energy` | - | eV | potential energy                                                  |
    | `energies`    | (N,)   | eV    | per-atom energies                                                  |
    | `forces`      | (N, 3) | eV/Å  |                                                                    |
    | `stress`      | (6,)   | eV/Å³ | Voigt order, tension positive; only with three periodic axes       |
    | `virial`      | (3, 3) | eV    | -stress x volume, also where there is no volume                    |
    | `energy_std`  | -      | eV    | ensembles: standard deviation over the members                     |
    | `force_std`   | (N,)   | eV/Å  | ensembles: root mean square deviation of the force vectors          |

    Total charge and multiplicity are read from `atoms.info["charge"]` and `atoms.info["multiplicity"]`.

    Args:
        path: the artifact.
        device: "cpu", "cuda", "cuda:1", ...
        dtype: "float32" or "float64" in place of the artifact's own.
        skin: Å by which the neighbour list reaches beyond the cutoff, so that it is reused over steps.
        outside: "warn", "error" or "ignore" when atoms come closer than in training, or the charge is new.

    Raises:
        ArtifactError: see `mlff_engines.artifact.load`.
        StructureError: when evaluated, see `mlff_engines.evaluator.Evaluator`.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        device: str = "cpu",
        dtype: Dtype | None = None,
        skin: float = SKIN,
        outside: str = "warn",
    ) -> None:
        super().__init__()
        self._options: dict[str, Any] = {"device": device, "dtype": dtype, "skin": skin, "outside": outside}
        self._path = Path(path).absolute()
        self._load()

    def _load(self) -> None:
        options = self._options
        self.artifact: Artifact = load(self._path, options["device"], options["dtype"])
        self._evaluate = self.artifact.evaluator(skin=options["skin"], outside=options["outside"])
        self.implemented_properties = ["energy", "free_energy", "energies", "forces", "stress", "virial"]
        if self.artifact.manifest.members > 1:
            self.implemented_properties += ["energy_std", "force_std"]

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """Everything at once, whatever is asked for: it is one evaluation."""
        if atoms is not None and self.atoms is not None and list(system_changes) == ["positions"]:
            self.atoms.positions[:] = atoms.positions  # what a copy holds besides has not changed
        else:
            super().calculate(atoms, properties, system_changes)
        result = self._evaluate(to_structure(self.atoms))
        self.results = {
            "energy": result.energy,
            "free_energy": result.energy,
            "energies": result.energies,
            "forces": result.forces,
            "virial": result.virial,
        }
        if result.stress is not None:
            self.results["stress"] = full_3x3_to_voigt_6_stress(result.stress)
        if result.energy_std is not None:
            self.results |= {"energy_std": result.energy_std, "force_std": result.force_std}

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """See `mlff_ase.structures.changes`."""
        return changes(self.atoms, atoms)

    def __getstate__(self) -> dict[str, Any]:
        """A path and options: neither module nor neighbour list travels."""
        return {"path": self._path, "options": self._options, "sha256": self.artifact.manifest.sha256}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"], **state["options"])  # type: ignore[misc]
        if self.artifact.manifest.sha256 != state["sha256"]:
            raise ArtifactError(
                f"{self._path} is another artifact than the one that was pickled; make a new calculator"
            )
