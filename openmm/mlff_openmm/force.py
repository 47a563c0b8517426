"""An artifact as an OpenMM force.

Nothing here imports torch before a force is made: OpenMM-ML loads this package whenever it is imported.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np
import openmm
from openmm import unit
from openmm.app import Topology

from mlff_engines.errors import ArtifactError, ConfigError, StructureError, suggest
from mlff_engines.structure import FloatArray, Structure
from mlff_engines.units import energy_unit, length_unit

if TYPE_CHECKING:
    from mlff_engines.artifact import Artifact
    from mlff_engines.manifest import Dtype

NAME = "MLFFForce"
PRECISIONS: dict[str, Dtype] = {"single": "float32", "double": "float64"}
NM = length_unit("nm")  # Å
KJ_PER_MOL = energy_unit("kJ/mol")  # eV
ENERGY = 1 / KJ_PER_MOL  # eV to kJ/mol
FORCE = NM / KJ_PER_MOL  # eV/Å to kJ/mol/nm

# one module in memory however many copies of a force OpenMM makes
_loaded: WeakValueDictionary[tuple[str, str, str | None], Artifact] = WeakValueDictionary()


class MLFFForce(openmm.PythonForce):
    """A student as a force of OpenMM, for use without OpenMM-ML.

    >>> system.addForce(MLFFForce("student.pt", topology))

    It gives potential energy and forces of the whole `System`, or of `atoms` alone. It is periodic when the topology
    has box vectors, triclinic ones included. Where it acts on everything, a box may be smaller than twice the cutoff:
    every image counts. Where it acts on some atoms, such a box is refused: they would meet images of themselves,
    which the classical forces count as well. Forces of one System add up: two on the same atoms count them twice.

    A serialized System (`XmlSerializer`, a deep copy, `pickle`) holds a pickle of path, SHA-256, atomic numbers and
    options; not the artifact. Reading one runs that pickle, so read only files that you trust. The artifact must
    still lie at its path and be the same: another hash is refused when a Context first asks for forces. Checkpoints
    and States of a Context hold nothing of the force.

    OpenMM reports every error of a running simulation as `OpenMMException`, with the message below.

    Args:
        path: the artifact.
        topology: elements and box.
        atoms: indices of the atoms it acts on; None means all.
        charge: total charge of these atoms in e.
        spin: number of their unpaired electrons.
        multiplicity: spin + 1, OpenMM-ML's name for the same.
        device: of torch: "cpu", "cuda", "cuda:1", ...; None means CUDA where torch finds one.
        dtype: "float32" or "float64" in place of the artifact's own.
        precision: "single" or "double", OpenMM-ML's name for the same.
        skin: by how much the neighbour list reaches beyond the cutoff: a Quantity, or nm as everywhere in OpenMM.
        outside: "warn", "error" or "ignore" when atoms come closer than in training, or the charge is new.

    Raises:
        ArtifactError: see `mlff_engines.artifact.load`.
        StructureError: an element, charge or spin that the model does not know, or too small a box; when running, also
            what `mlff_engines.evaluator.Evaluator` raises, and energies or forces that are not finite.
        ConfigError: atoms that the topology does not have, or options that contradict each other.
    """

    def __init__(
        self,
        path: str | Path,
        topology: Topology,
        *,
        atoms: Iterable[int] | None = None,
        charge: float = 0.0,
        spin: float | None = None,
        multiplicity: float | None = None,
        device: str | None = None,
        dtype: Dtype | None = None,
        precision: str | None = None,
        skin: Any = 0.1,
        outside: str = "warn",
    ) -> None:
        if precision is not None and precision not in PRECISIONS:
            raise ConfigError(f"precision {precision!r}{suggest(precision, PRECISIONS)}")
        spin = _either("spin", spin, "multiplicity - 1", None if multiplicity is None else multiplicity - 1)
        dtype = _either("dtype", dtype, "precision", None if precision is None else PRECISIONS[precision])
        if unit.is_quantity(skin):
            skin = skin.value_in_unit(unit.nanometer)
        box = topology.getPeriodicBoxVectors()
        chosen = None if atoms is None else _checked(atoms, topology.getNumAtoms())
        device = None if device is None else str(device)
        file = Path(path).absolute()
        artifact = _load(file, None, device, dtype)
        compute = Compute(
            path=str(file),
            sha256=artifact.manifest.sha256,
            numbers=_atomic_numbers(topology, chosen),
            atoms=chosen,
            periodic=box is not None,
            charge=float(charge),
            spin=float(spin or 0.0),
            device=device,
            dtype=dtype,
            skin=float(skin) * NM,
            outside=outside,
        )
        compute.check(None if box is None else np.array(box.value_in_unit(unit.nanometer)) * NM)
        super().__init__(compute)
        self.compute = compute
        self.setName(NAME)
        self.setUsesPeriodicBoundaryConditions(box is not None)
        if chosen is not None:
            self.setParticles(chosen)


@dataclass
class Compute:
    """What OpenMM calls for energy and forces, and what it pickles.

    The Contexts of one System share it, and may run at the same time: every thread has a neighbour list of its own.

    Attributes:
        path: the artifact.
        sha256: that it must have; looked at when it is loaded, at the first call.
        numbers: atomic numbers of the atoms that the force acts on.
        atoms: their indices in the System; None means all.
        periodic: whether to ask OpenMM for a box.
        charge, spin, device, dtype, outside: as of `MLFFForce`.
        skin: Å.
    """

    path: str
    sha256: str
    numbers: list[int]
    atoms: list[int] | None
    periodic: bool
    charge: float
    spin: float
    device: str | None
    dtype: Dtype | None
    skin: float
    outside: str

    def __post_init__(self) -> None:
        self._own = threading.local()

    def __call__(self, state: openmm.State) -> tuple[float, FloatArray]:
        """Potential energy in kJ/mol and forces (N, 3) in kJ/mol/nm of the particles in `state`."""
        worker = self._worker()
        cell = worker.no_cell
        if self.periodic:
            cell = worker.cell(state)
            self._check_box(cell, worker.cutoff)
        positions = worker.positions(state)
        where = positions.tobytes(), cell.tobytes()
        if worker.last is not None and worker.last[0] == where:
            # OpenMM asks again for an energy, another force group, or after a step of zero length
            return worker.last[1]
        try:
            result = worker.evaluate(self._structure(worker, positions, cell))
        except StructureError as error:
            raise StructureError(f"{error}{self._where()}") from error
        # OpenMM takes -1 kJ/mol for any energy that is no float
        found = float(result.energy * ENERGY), result.forces * FORCE
        worker.last = where, found
        return found

    def check(self, cell: FloatArray | None) -> None:
        """Refuse what can be refused without positions; `cell` in Å."""
        worker = self._worker()
        if cell is not None:
            self._check_box(cell, worker.cutoff)
        nowhere = np.zeros((len(self.numbers), 3))
        worker.evaluate.check_composition(self._structure(worker, nowhere, np.eye(3)))

    def _check_box(self, cell: FloatArray, cutoff: float) -> None:
        # in OpenMM's reduced form no lattice vector is shorter than the smallest diagonal element
        if self.atoms is not None and (smallest := float(cell.diagonal().min())) < 2 * cutoff:
            raise StructureError(
                f"the periodic box is {smallest / NM:.4g} nm wide, less than twice the cutoff of {self.path} "
                f"({cutoff / NM:g} nm): the ML atoms would meet their own images, which the classical forces count "
                "too. Use a larger box, or let the potential act on the whole System"
            )

    def _structure(self, worker: _Worker, positions: FloatArray, cell: FloatArray) -> Structure:
        return Structure(worker.numbers, positions, cell, worker.pbc, self.charge, self.spin)

    def _where(self) -> str:
        if self.atoms is None or self.atoms == list(range(len(self.atoms))):
            return ""
        return f". Atoms are counted within the ML region, which is these atoms of the System: {self.atoms}"

    def _worker(self) -> _Worker:
        worker: _Worker | None = getattr(self._own, "worker", None)
        if worker is None:
            worker = self._own.worker = _Worker(self)
        return worker

    def __getstate__(self) -> dict[str, Any]:
        return asdict(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # an error in here would end the process: OpenMM reads a System without looking for one
        self.__dict__.update(state)
        self.__post_init__()


class _Worker:
    """What one thread needs to evaluate, and keeps between calls."""

    def __init__(self, compute: Compute) -> None:
        artifact = _load(Path(compute.path), compute.sha256, compute.device, compute.dtype)
        self.evaluate = artifact.evaluator(skin=compute.skin, outside=compute.outside)
        self.cutoff = artifact.manifest.cutoff
        self.numbers = np.array(compute.numbers, dtype=np.int64)
        self.pbc, self.no_cell = np.full(3, compute.periodic), np.zeros((3, 3))
        self._nm = np.empty((len(self.numbers), 3))
        self._box: Any = None
        self._cell = self.no_cell
        self.last: tuple[tuple[bytes, bytes], tuple[float, FloatArray]] | None = None

    def cell(self, state: openmm.State) -> FloatArray:
        """(3, 3) in Å."""
        box = state.getPeriodicBoxVectors()._value  # nm; a unit's own arithmetic takes 20 µs
        if box != self._box:
            self._box, self._cell = box, np.array(box) * NM
        return self._cell

    def positions(self, state: openmm.State) -> FloatArray:
        """(N, 3) in Å."""
        try:  # private to OpenMM, ten times faster, and without a check of the buffer's size
            if state._getNumParticles() == len(self._nm):
                state._getVectorAsNumpy(openmm.State.Positions, self._nm)
                return self._nm * NM
        except AttributeError:
            pass
        nm: FloatArray = state.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
        if len(nm) != len(self.numbers):
            raise StructureError(
                f"the System has {len(nm)} particles and the Topology of its MLFFForce {len(self.numbers)} atoms; make "
                "the force from the Topology of this System, or name its atoms"
            )
        return nm * NM


def _load(path: Path, sha256: str | None, device: str | None, dtype: Dtype | None) -> Artifact:
    import torch

    from mlff_engines.artifact import load
    from mlff_engines.manifest import inspect

    found = inspect(path).sha256
    if sha256 is not None and found != sha256:
        raise ArtifactError(
            f"{path} is another artifact than the one this System was made with: its SHA-256 is {found[:12]}..., that "
            f"was {sha256[:12]}.... Restore the file, or create the System anew"
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    key = found, device, dtype
    artifact = _loaded.get(key)
    if artifact is None:
        artifact = _loaded[key] = load(path, device, dtype)
    return artifact


def _either(name: str, value: Any, other: str, same: Any) -> Any:
    if value is not None and same is not None and value != same:
        raise ConfigError(f"{name} {value} and {other} {same} contradict each other; give one of them")
    return same if value is None else value


def _checked(atoms: Iterable[int], available: int) -> list[int]:
    """`atoms` as a list; an empty one would mean every atom to OpenMM, a negative one the last."""
    chosen = [int(atom) for atom in atoms]
    wrong = [atom for atom in chosen if not 0 <= atom < available]
    if wrong or not chosen or len(set(chosen)) < len(chosen):
        what = f"{wrong[:10]} of {available} atoms" if wrong else "the same atom twice" if chosen else "no atom at all"
        raise ConfigError(f"atoms names {what}; allowed: indices from 0 to {available - 1}, each once")
    return chosen


def _atomic_numbers(topology: Topology, atoms: Sequence[int] | None) -> list[int]:
    everything = list(topology.atoms())
    numbers = []
    for atom in everything if atoms is None else [everything[i] for i in atoms]:
        if atom.element is None:
            raise StructureError(
                f"atom {atom.index} ({atom.name} of {atom.residue.name}) has no element: an ML potential knows no "
                "extra particles. Use a water model without them, or leave it out of the atoms"
            )
        numbers.append(int(atom.element.atomic_number))
    return numbers
