"""What goes into an evaluation and what comes out of it, as plain arrays that no engine owns."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from mlff_engines.errors import StructureError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

MAX_ATOMIC_NUMBER = 118

# fmt: off
SYMBOLS = (
    "X",
    "H", "He",
    "Li", "Be", "B", "C", "N", "O", "F", "Ne",
    "Na", "Mg", "Al", "Si", "P", "S", "Cl", "Ar",
    "K", "Ca", "Sc", "Ti", "V", "Cr", "Mn", "Fe", "Co", "Ni", "Cu", "Zn", "Ga", "Ge", "As", "Se", "Br", "Kr",
    "Rb", "Sr", "Y", "Zr", "Nb", "Mo", "Tc", "Ru", "Rh", "Pd", "Ag", "Cd", "In", "Sn", "Sb", "Te", "I", "Xe",
    "Cs", "Ba", "La", "Ce", "Pr", "Nd", "Pm", "Sm", "Eu", "Gd", "Tb", "Dy", "Ho", "Er", "Tm", "Yb", "Lu",
    "Hf", "Ta", "W", "Re", "Os", "Ir", "Pt", "Au", "Hg", "Tl", "Pb", "Bi", "Po", "At", "Rn",
    "Fr", "Ra", "Ac", "Th", "Pa", "U", "Np", "Pu", "Am", "Cm", "Bk", "Cf", "Es", "Fm", "Md", "No", "Lr",
    "Rf", "Db", "Sg", "Bh", "Hs", "Mt", "Ds", "Rg", "Cn", "Nh", "Fl", "Mc", "Lv", "Ts", "Og",
)
# amu, by atomic number. Standard atomic weights (IUPAC 2016: Meija et al., Pure Appl. Chem. 88, 265); where there is
# none, the mass of a long-lived isotope
MASSES = (
    0, 1.008, 4.002602, 6.94, 9.0121831, 10.81, 12.011, 14.007, 15.999, 18.998403163, 20.1797, 22.98976928, 24.305,
    26.9815385, 28.085, 30.973761998, 32.06, 35.45, 39.948, 39.0983, 40.078, 44.955908, 47.867, 50.9415, 51.9961,
    54.938044, 55.845, 58.933194, 58.6934, 63.546, 65.38, 69.723, 72.63, 74.921595, 78.971, 79.904, 83.798, 85.4678,
    87.62, 88.90584, 91.224, 92.90637, 95.95, 97.90721, 101.07, 102.9055, 106.42, 107.8682, 112.414, 114.818,
    118.71, 121.76, 127.6, 126.90447, 131.293, 132.90545196, 137.327, 138.90547, 140.116, 140.90766, 144.242,
    144.91276, 150.36, 151.964, 157.25, 158.92535, 162.5, 164.93033, 167.259, 168.93422, 173.054, 174.9668, 178.49,
    180.94788, 183.84, 186.207, 190.23, 192.217, 195.084, 196.966569, 200.592, 204.38, 207.2, 208.9804, 208.98243,
    209.98715, 222.01758, 223.01974, 226.02541, 227.02775, 232.0377, 231.03588, 238.02891, 237.04817, 244.06421,
    243.06138, 247.07035, 247.07031, 251.07959, 252.083, 257.09511, 258.09843, 259.101, 262.11, 267.122, 268.126,
    271.134, 270.133, 269.1338, 278.156, 281.165, 281.166, 285.177, 286.182, 289.19, 289.194, 293.204, 293.208,
    294.214,
)
# fmt: on
NUMBERS = {symbol: number for number, symbol in enumerate(SYMBOLS)}


@dataclass(frozen=True)
class Structure:
    """Atoms in space.

    | field       | shape  | dtype   | unit | meaning                                                     |
    |-------------|--------|---------|------|-------------------------------------------------------------|
    | `numbers`   | (N,)   | int64   | -    | atomic numbers                                              |
    | `positions` | (N, 3) | float64 | Å    | need not lie inside the cell                                |
    | `cell`      | (3, 3) | float64 | Å    | rows are the lattice vectors; read only along periodic axes |
    | `pbc`       | (3,)   | bool    | -    | which lattice vectors are periodic                          |
    | `charge`    | -      | float   | e    | total charge                                                |
    | `spin`      | -      | float   | -    | unpaired electrons, i.e. multiplicity - 1                   |

    Raises:
        StructureError: for arrays of the wrong shape, coordinates that are not finite, or a singular cell.
    """

    numbers: IntArray
    positions: FloatArray
    cell: FloatArray = field(default_factory=lambda: np.zeros((3, 3)))
    pbc: BoolArray = field(default_factory=lambda: np.zeros(3, dtype=bool))
    charge: float = 0.0
    spin: float = 0.0

    def __post_init__(self) -> None:
        numbers = np.ascontiguousarray(self.numbers, dtype=np.int64)
        positions = np.ascontiguousarray(self.positions, dtype=np.float64)
        cell = np.ascontiguousarray(self.cell, dtype=np.float64)
        pbc = np.asarray(self.pbc, dtype=np.bool_)
        if pbc.shape != (3,):
            pbc = np.broadcast_to(pbc, 3)
        pbc = np.ascontiguousarray(pbc)
        for name, array in (("numbers", numbers), ("positions", positions), ("cell", cell), ("pbc", pbc)):
            object.__setattr__(self, name, array)
        if numbers.ndim != 1 or positions.shape != (len(numbers), 3) or cell.shape != (3, 3):
            raise StructureError(
                f"got numbers {numbers.shape}, positions {positions.shape}, cell {cell.shape}; "
                "expected (N,), (N, 3) and (3, 3)"
            )
        _check_numbers(numbers.tobytes())
        if not np.isfinite(positions).all():
            self._report_not_finite()
        _checked_volume(cell.tobytes(), pbc.tobytes())

    def _report_not_finite(self) -> None:
        bad = np.flatnonzero(~np.isfinite(self.positions).all(axis=1))
        atom = bad[0]
        raise StructureError(
            f"atom {atom} ({SYMBOLS[self.numbers[atom]]}) has a coordinate that is not finite: "
            f"{self.positions[atom].tolist()}; {len(bad)} such atom(s). "
            "The dynamics that led here has probably exploded"
        )

    @property
    def volume(self) -> float | None:
        """Volume in Å³ for three periodic axes, else None: a slab or molecule has no defined volume."""
        return _checked_volume(self.cell.tobytes(), self.pbc.tobytes())

    def __len__(self) -> int:
        return len(self.numbers)


# once per composition and cell, for most dynamics never change them
@lru_cache(maxsize=16)
def _check_numbers(as_bytes: bytes) -> None:
    numbers = np.frombuffer(as_bytes, dtype=np.int64)
    bad = np.flatnonzero((numbers < 1) | (numbers > MAX_ATOMIC_NUMBER))
    if len(bad):
        raise StructureError(f"atomic number {numbers[bad[0]]} of atom {bad[0]}; allowed: 1 to {MAX_ATOMIC_NUMBER}")


@lru_cache(maxsize=16)
def _checked_volume(cell_bytes: bytes, pbc_bytes: bytes) -> float | None:
    """As `Structure.volume`.

    Raises:
        StructureError: a singular cell.
    """
    cell, pbc = np.frombuffer(cell_bytes).reshape(3, 3), np.frombuffer(pbc_bytes, dtype=np.bool_)
    periodic = cell[pbc]
    if not len(periodic):
        return None
    gram = periodic @ periodic.T
    lengths = np.sqrt(np.diag(gram))
    # the volume (area, length) spanned, relative to an orthogonal cell of the same edges
    spanned = np.sqrt(max(np.linalg.det(gram), 0.0)) if np.isfinite(gram).all() else 0.0
    if not np.isfinite(cell).all() or (lengths < 1e-6).any() or spanned < 1e-6 * lengths.prod():
        raise StructureError(
            f"the cell is singular along its periodic axes: cell {cell.tolist()}, pbc {pbc.tolist()}. "
            "Give non-zero, linearly independent lattice vectors or switch pbc off"
        )
    return abs(float(np.linalg.det(cell))) if pbc.all() else None


@dataclass(frozen=True)
class Result:
    """What one evaluation of a `Structure` yields.

    | field        | shape  | unit | meaning                                                               |
    |--------------|--------|------|-----------------------------------------------------------------------|
    | `energy`     | -      | eV   | potential energy, the sum of `energies`                               |
    | `energies`   | (N,)   | eV   | per-atom energies, E0 included                                        |
    | `forces`     | (N, 3) | eV/Å | -dE/dr                                                                |
    | `virial`     | (3, 3) | eV   | -Σ edge_vec ⊗ dE/d edge_vec = -dE/dε for a symmetric strain ε         |
    | `stress`     | (3, 3) | eV/Å³| -virial/volume, tension positive; None without three periodic axes    |
    | `energy_std` | -      | eV   | ensembles only: standard deviation of the members' energies           |
    | `force_std`  | (N,)   | eV/Å | ensembles only: root mean square deviation of the members' force vectors |
    """

    energy: float
    energies: FloatArray
    forces: FloatArray
    virial: FloatArray
    stress: FloatArray | None = None
    energy_std: float | None = None
    force_std: FloatArray | None = None
