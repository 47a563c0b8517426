"""What a trajectory shows: how it is read back, radial distribution functions, bonds, angles and dihedrals.

The work is done by MDAnalysis (Michaud-Agrawal et al., J. Comput. Chem. 32, 2319 (2011)) and mdtraj (McGibbon et al.,
Biophys. J. 109, 1528 (2015)). Both hold coordinates in float32: 1e-6 Å in a box of 12 Å.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlff_engines.errors import ConfigError, DataError, StructureError, suggest
from mlff_engines.structure import SYMBOLS, BoolArray, FloatArray, IntArray, Structure
from mlff_engines.validation.engine import Trajectory

FORMATS = {".xyz": "XYZ", ".extxyz": "XYZ", ".lammpstrj": "LAMMPSDUMP", ".dump": "LAMMPSDUMP", ".dcd": "DCD"}
PAIRS_AT_ONCE = 10_000_000  # distances held in memory


def needed(module: str) -> Any:
    """A module of the extra `validation`.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{(error.name or module).split('.')[0]} is not installed: pip install 'mlff-engines[validation]'"
        ) from None


@dataclass(frozen=True)
class Frames:
    """Configurations of one system, one after another; T frames of N atoms at constant cell.

    | field        | shape     | unit | meaning                                                 |
    |--------------|-----------|------|---------------------------------------------------------|
    | `numbers`    | (N,)      | -    | atomic numbers                                          |
    | `positions`  | (T, N, 3) | Å    | as the engine wrote them, in its own orientation        |
    | `cell`       | (3, 3)    | Å    | rows are the lattice vectors                            |
    | `pbc`        | (3,)      | -    | which of them are periodic                              |
    | `times`      | (T,)      | fs   |                                                         |
    | `velocities` | (T, N, 3) | Å/fs | None where the file has none                            |
    """

    numbers: IntArray
    positions: FloatArray
    cell: FloatArray
    pbc: BoolArray
    times: FloatArray
    velocities: FloatArray | None = None

    def __len__(self) -> int:
        return len(self.times)

    @classmethod
    def of(cls, trajectory: Trajectory, structure: Structure) -> Frames:
        """The samples that an engine returned."""
        return cls(
            structure.numbers,
            trajectory.positions,
            structure.cell,
            structure.pbc,
            trajectory.times,
            trajectory.velocities,
        )

    @property
    def interval(self) -> float:
        """Time between frames, fs.

        Raises:
            DataError: fewer than two frames, or times that are not evenly spaced.
        """
        steps = np.diff(self.times)
        if not len(steps) or not np.allclose(steps, steps[0], rtol=1e-6):
            raise DataError(f"{len(self)} frames that are not evenly spaced in time; give at least two that are")
        return float(steps[0])


def read_frames(file: Path, structure: Structure, interval: float) -> Frames:
    """An engine's native trajectory, up to the last whole frame, without velocities: these are in what `run` returns.

    MDAnalysis moves the origin of a LAMMPS box to zero: where shrink-wrapped boundaries move it from frame to frame,
    positions hold within a frame alone.

    Args:
        file: extended XYZ, a LAMMPS dump (.lammpstrj, .dump) or a DCD.
        structure: the system: its numbers, in the order of the file; its cell where the file has none.
        interval: fs between frames.

    Raises:
        DataError: the file is missing, of another format, empty, or of another number of atoms.
    """
    reader = needed("MDAnalysis.coordinates.core").reader
    if file.suffix not in FORMATS:
        raise DataError(f"{file}: no reader for {file.suffix!r}{suggest(file.suffix, FORMATS)}")
    if not file.is_file():
        raise DataError(f"no trajectory at {file}: run the engine first")
    positions, cell = [], structure.cell
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the DCD reader, about what is not used here
        try:
            with reader(str(file), format=FORMATS[file.suffix], dt=interval * 1e-3) as trajectory:
                if trajectory.n_atoms != len(structure):
                    raise DataError(f"{file} has {trajectory.n_atoms} atoms, the structure {len(structure)}")
                for frame in range(len(trajectory)):
                    try:
                        step = trajectory[frame]
                    except (EOFError, ValueError, IndexError):  # the engine was stopped while writing
                        break
                    positions.append(step.positions.astype(float))
                    if step.dimensions is not None and step.dimensions.all():
                        cell = step.triclinic_dimensions.astype(float)
        except (TypeError, ValueError, OSError, EOFError, IndexError) as error:
            raise DataError(f"{file} is not a readable {FORMATS[file.suffix]} trajectory: {error}") from error
    if not positions:
        raise DataError(f"{file} has no whole frame")
    times = interval * np.arange(len(positions), dtype=float)
    return Frames(structure.numbers, np.array(positions), cell, structure.pbc, times)


def joined(parts: Sequence[Frames]) -> Frames:
    """Positions of several runs of one system, one after another, as if they were one run evenly spaced in time.

    Averages over frames hold; correlations in time do only if each run went on one interval after the last ended.
    """
    positions = np.concatenate([part.positions for part in parts])
    times = parts[0].times[0] + parts[0].interval * np.arange(len(positions), dtype=float)
    return replace(parts[0], positions=positions, times=times, velocities=None)


def standard(frames: Frames) -> tuple[FloatArray, FloatArray | None]:
    """Positions (T, N, 3) and cell (3, 3) turned: the cell lower triangular, as mdtraj and MDAnalysis want it.

    Axes without periodicity get a vector so long that no image is near. The cell is None without periodic axes.
    """
    if not frames.pbc.any():
        return frames.positions, None
    cell = frames.cell.copy()
    missing = np.flatnonzero(~frames.pbc)
    if len(missing):
        # the orthogonal complement of the periodic vectors
        extent = np.ptp(frames.positions.reshape(-1, 3), axis=0).max()
        cell[missing] = np.linalg.svd(cell[frames.pbc])[2][-len(missing) :] * (4 * extent + 100)
        cell[missing[0]] *= np.sign(np.linalg.det(cell))
    turn, triangular = np.linalg.qr(cell.T)
    sign = np.sign(np.diag(triangular))
    turn, triangular = turn * sign, triangular * sign[:, None]
    return frames.positions @ turn, triangular.T


def rdf(
    frames: Frames, first: int, second: int, *, r_max: float, bin_width: float = 0.05
) -> tuple[FloatArray, FloatArray]:
    """Radial distribution function of the elements `first` and `second` (atomic numbers), by mdtraj.

    g(r) = <pairs in the shell> / (pairs / V x volume of the shell), over all frames and without an atom's pair with
    itself: 1 for an ideal gas of any size (Allen and Tildesley, Computer Simulation of Liquids, 2nd ed., Eq. 8.17).

    Returns:
        centres of the bins in Å, and g without unit; both of length r_max / bin_width.

    Raises:
        StructureError: the system is not periodic in three directions, `r_max` reaches an image of the same atom, or
            there are no such pairs.
    """
    names = f"{SYMBOLS[first]}-{SYMBOLS[second]}"
    positions, cell = standard(frames)
    if cell is None or not frames.pbc.all():
        raise StructureError(f"g(r) of {names} needs a volume: pbc {frames.pbc.tolist()}; give a periodic box")
    limit = 0.5 * float((1 / np.linalg.norm(np.linalg.inv(cell), axis=0)).min())
    if not 0 < r_max <= limit * (1 + 1e-6):
        raise StructureError(f"g(r) up to {r_max:g} Å; half the smallest width of the cell allows {limit:.6g} Å")
    (a,), (b,) = np.nonzero(frames.numbers == first), np.nonzero(frames.numbers == second)
    pairs = np.stack(np.meshgrid(a, b, indexing="ij"), axis=-1).reshape(-1, 2)
    pairs = pairs[pairs[:, 0] < pairs[:, 1]] if first == second else pairs
    if not len(pairs):
        raise StructureError(f"there is no pair {names} among {len(a)} and {len(b)} atoms")
    bins = round(r_max / bin_width)
    mdtraj = needed("mdtraj")
    topology = mdtraj.Topology()
    residue = topology.add_residue("X", topology.add_chain())
    for number in frames.numbers:
        topology.add_atom(SYMBOLS[number], mdtraj.element.get_by_symbol(SYMBOLS[number]), residue)
    block = max(PAIRS_AT_ONCE // len(pairs), 1)
    g = np.zeros(bins)
    for start in range(0, len(frames), block):
        part = positions[start : start + block] / 10  # nm
        trajectory = mdtraj.Trajectory(part, topology)
        trajectory.unitcell_vectors = np.broadcast_to(cell / 10, (len(part), 3, 3)).astype(np.float32)
        r, found = mdtraj.compute_rdf(trajectory, pairs, r_range=(0.0, r_max / 10), n_bins=bins)
        g += len(part) / len(frames) * found
    return 10 * r.astype(float), g


@dataclass(frozen=True)
class Topology:
    """Who is bonded to whom, by atom index: bonds (B, 2), angles (A, 3) and dihedrals (D, 4), chained in this order."""

    bonds: IntArray
    angles: IntArray
    dihedrals: IntArray


def topology(structure: Structure) -> Topology:
    """Bonds shorter than 0.55 of the sum of the van der Waals radii, as in VMD; angles and dihedrals along them.

    Raises:
        StructureError: MDAnalysis has no radius of an element.
    """
    still = Frames(structure.numbers, structure.positions[None], structure.cell, structure.pbc, np.zeros(1))
    positions, cell = standard(still)
    analysis = needed("MDAnalysis")
    universe = analysis.Universe.empty(len(structure), trajectory=True)
    universe.add_TopologyAttr("types", [SYMBOLS[number] for number in structure.numbers])
    guess = needed("MDAnalysis.guesser").DefaultGuesser(universe, box=_box(cell))
    try:
        universe.add_TopologyAttr("bonds", guess.guess_bonds(universe.atoms, positions[0].astype(np.float32)))
    except ValueError as error:
        raise StructureError(f"bonds cannot be told from distances: {error}") from None
    universe.add_TopologyAttr("angles", guess.guess_angles(universe.bonds))
    dihedrals = guess.guess_dihedrals(universe.angles)
    found = (universe.bonds.to_indices(), universe.angles.to_indices(), dihedrals)
    return Topology(
        *(
            np.array(sorted(tuple(int(i) for i in row) for row in part), dtype=np.int64).reshape(-1, width)
            for part, width in zip(found, (2, 3, 4), strict=True)
        )
    )


def internal_coordinates(frames: Frames, members: IntArray) -> dict[str, FloatArray]:
    """Lengths, angles or dihedrals over time, of nearest images: which, the width of `members` says.

    Args:
        frames: the trajectory.
        members: of a `Topology`: bonds (B, 2), angles (A, 3) or dihedrals (D, 4).

    Returns:
        by kind, such as "C-H" or "H-C-O", an array (T, number of that kind): Å, or degrees in [0, 180] for angles and
        (-180, 180] for dihedrals, positive when clockwise along the bond (IUPAC).
    """
    distances = needed("MDAnalysis.lib.distances")
    calculate = {2: distances.calc_bonds, 3: distances.calc_angles, 4: distances.calc_dihedrals}[members.shape[1]]
    positions, cell = standard(frames)
    columns = [positions[:, members[:, k]].reshape(-1, 3) for k in range(members.shape[1])]
    values = calculate(*columns, box=_box(cell)).reshape(len(frames), len(members))
    if members.shape[1] > 2:
        values = np.degrees(values)
    if members.shape[1] == 4 and frames.pbc.all() and np.linalg.det(frames.cell) < 0:
        values = -values  # a left-handed cell is mirrored by `standard`
    kinds: dict[str, list[int]] = {}
    for k, atoms in enumerate(members):
        symbols = [SYMBOLS[number] for number in frames.numbers[atoms]]
        kinds.setdefault("-".join(min(symbols, symbols[::-1])), []).append(k)
    return {kind: values[:, found] for kind, found in sorted(kinds.items())}


def distribution(
    values: FloatArray, bin_width: float, limits: tuple[float, float] | None = None
) -> tuple[FloatArray, FloatArray]:
    """Probability density of `values`: centres of the bins, in the unit of the values, and density, in its inverse.

    Args:
        values: any shape.
        bin_width: in the unit of the values.
        limits: first and last edge, values outside are not counted; by default, what the values span and an empty bin
            on either side.
    """
    low, high = limits or (float(values.min()) - bin_width, float(values.max()) + bin_width)
    bins = max(int(np.ceil((high - low) / bin_width - 1e-9)), 1)
    density, edges = np.histogram(values, bins=bins, range=(low, low + bins * bin_width), density=True)
    return 0.5 * (edges[1:] + edges[:-1]), density


def _box(cell: FloatArray | None) -> Any:
    """Lengths (Å) and angles (degrees) of a cell, as MDAnalysis wants it."""
    return None if cell is None else needed("MDAnalysis.lib.mdamath").triclinic_box(*cell)
