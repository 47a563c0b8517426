"""An artifact as the model of `pair_style mliap unified`.

    pair_style mliap unified student.mliap 1
    pair_coeff * * H C O
    comm_modify cutoff 12.0

LAMMPS hands over the atoms of one domain, its ghosts, and every pair within the cutoff. Messages of a network with
several layers need ghosts as far as layers x cutoff, and their pairs too: hence the `1` (ghost neighbours) and the
`comm_modify cutoff`. A LAMMPS with KOKKOS on GPUs exchanges features between layers instead and needs neither (not yet
tried on one; see `mlff_lammps.exchange`). The model runs on owned and ghost atoms alike, sums the energies of the owned
and passes the gradient of that sum for every pair, which LAMMPS turns into forces, ghosts' included, and virials:

| LAMMPS                  | here                                                                               |
|-------------------------|------------------------------------------------------------------------------------|
| `rij` = x_j - x_i       | `edge_vec`, Å                                                                      |
| `fij`: f_i += fij, f_j -= fij, virial -rij·fij | `edge_gradient` g = d(Σ owned node_energy)/d edge_vec, as it is |
| `eatoms`, `energy`      | `node_energy` of owned atoms                                                       |

Everything that a deck can get wrong is checked here before the first step, and on all ranks together.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlff_engines.errors import ArtifactError
from mlff_lammps.host import Host

if TYPE_CHECKING:
    from mlff_lammps.forces import Forces

# What can fail, torch's import included, must fail inside `Host.together`: when unpickling raises on one rank, LAMMPS
# waits for the others for ever. So this module imports little.


class MLIAP:
    """What LAMMPS calls. `load_unified(MLIAP("student.pt"))` from Python; decks name a file made by `write_mliap`.

    Total charge and unpaired electrons are the first that the artifact was trained for.

    Args:
        artifact: the path.
        sha256: the hash that its manifest must have; None takes whatever is there.
        device: where it runs; MLFF_DEVICE, or the CPU, by default.
    """

    # LAMMPS reads these four when the pair style is set
    ndescriptors = 1
    nparams = 1
    element_types: list[str]
    rcutfac: float  # half the cutoff: LAMMPS doubles it

    def __init__(self, artifact: str | Path, sha256: str | None = None, device: str | None = None) -> None:
        self.path = Path(artifact).absolute()
        self.sha256 = sha256
        self.device = device or os.environ.get("MLFF_DEVICE", "cpu")
        self.host: Host | None = None
        self._forces: Forces | None = None

    def __reduce__(self) -> tuple[type[MLIAP], tuple[str, str | None]]:
        """Class, path and hash: a file of this needs no trust beyond that of the artifact, which is checked."""
        return type(self), (str(self.path), self.sha256)

    @property
    def interface(self) -> Any:
        """LAMMPS' side of the coupling."""
        return self._interface

    @interface.setter
    def interface(self, value: Any) -> None:
        # LAMMPS sets this once, while it reads `pair_style`
        self._interface = value
        self.host = Host.behind(value)
        self.host.together(self._load)

    def compute_descriptors(self, data: Any) -> None:
        """Nothing: `compute_forces` does it all."""

    def compute_gradients(self, data: Any) -> None:
        """Nothing: `compute_forces` does it all."""

    def compute_forces(self, data: Any) -> None:
        """Energies and pair forces of one step."""
        assert self.host is not None
        warnings: list[str | None] = []
        self.host.together(lambda: warnings.append(self._check(data)))  # before any rank waits in an exchange
        self.host.warn(warnings[0])
        self.host.together(lambda: self._compute(data))

    def _load(self) -> None:
        from mlff_lammps.forces import Forces

        assert self.host is not None
        self._forces = Forces(self.path, self.sha256, self.device, self.host)
        self.element_types = self._forces.elements
        self.rcutfac = 0.5 * self._forces.cutoff

    def _check(self, data: Any) -> str | None:
        assert self._forces is not None
        return self._forces.check(data)

    def _compute(self, data: Any) -> None:
        assert self._forces is not None
        self._forces(data)


def write_mliap(artifact: Path, out: Path, *, overwrite: bool = False) -> None:
    """Write the file for `pair_style mliap unified`: a pickle of class, path and hash, nothing else.

    Args:
        artifact: must stay where it is.
        out: the file; its name must not end in `.pt` or `.pth`, which LAMMPS would hand to torch.
        overwrite: replace an existing one.

    Raises:
        ArtifactError: no or damaged artifact; `out` exists or is misnamed.
    """
    from mlff_engines.files import replacing
    from mlff_engines.manifest import inspect

    if out.suffix in {".pt", ".pth"}:
        raise ArtifactError(
            f"{out}: LAMMPS takes *{out.suffix} for a torch file; name it {out.with_suffix('.mliap').name}"
        )
    if out.exists() and not overwrite:
        raise ArtifactError(f"{out} exists; choose another name or pass --overwrite")
    model = MLIAP(artifact, inspect(artifact).sha256)
    with replacing(out) as temporary:
        temporary.write_bytes(pickle.dumps(model))
