"""LAMMPS inputs around `pair_style mlff`, run by the real `lmp`, and what it said of a structure."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import requirements
from mlff_engines.errors import MLFFError
from mlff_engines.structure import MASSES, NUMBERS, SYMBOLS, FloatArray, Result, Structure
from mlff_engines.units import KCAL_PER_MOL
from mlff_lammps.plugin import Lammps, build_plugin, wheel

# LAMMPS, update.cpp: its unit of energy over Å³ in its unit of pressure
NKTV2P = {"metal": 1.6021765e6, "real": 68568.415}
EV = {"metal": 1.0, "real": KCAL_PER_MOL}
TILTED = np.array([[1.0, 0.0, 0.0], [0.2, 0.95, 0.0], [-0.15, 0.1, 1.05]])


@dataclass
class Deck:
    """Runs inputs in a folder of its own."""

    folder: Path
    lammps: Lammps
    plugin: Path

    def run(self, text: str, *, ranks: int = 1, timeout: float = 180) -> subprocess.CompletedProcess[str]:
        """`lmp` on `text`, with `plugin load` before it; the log is log.lammps in the folder."""
        (self.folder / "in.deck").write_text(f"plugin load {self.plugin}\n{text}\n")
        mpi = [str(Path(sys.executable).parent / "mpiexec"), "-n", str(ranks)] if ranks > 1 else []
        environment = {**self.lammps.environment(), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        command = [*mpi, str(self.lammps.executable), "-in", "in.deck"]
        return subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=timeout
        )

    def log(self, text: str, *, ranks: int = 1) -> str:
        """The log of a run that must succeed."""
        done = self.run(text, ranks=ranks)
        assert done.returncode == 0, done.stdout + done.stderr
        return (self.folder / "log.lammps").read_text()

    def error(self, text: str, *, ranks: int = 1) -> str:
        """What log.lammps says of a run that must fail; every rank ends, none by a C++ abort."""
        done = self.run(text, ranks=ranks)
        assert done.returncode == 1, done.stdout + done.stderr
        log = (self.folder / "log.lammps").read_text()
        assert "ERROR: " in log, log
        assert "terminate called" not in done.stdout + done.stderr
        return log[log.index("ERROR: ") :]

    def evaluate(
        self,
        style: str,
        structures: Sequence[Structure],
        *,
        elements: Sequence[str],
        ranks: int = 1,
        before: str = "",
        coeffs: Sequence[str] = (),
        units: str = "metal",
        skin: float = 1.0,
    ) -> list[Result]:
        """Energies, forces and virials of `structures`, one after another in one process."""
        parts = []
        for number, structure in enumerate(structures):
            write_data(self.folder / f"{number}.data", structure, elements)
            parts.append(
                f"""clear
{start(structure, units)}
{before}
read_data {number}.data
neighbor {skin} bin
pair_style {style}
{chr(10).join(coeffs or [f"pair_coeff * * {' '.join(elements)}"])}
compute e all pe/atom
compute w all pressure NULL pair
compute s all stress/atom NULL pair
thermo_style custom step pe c_w[1] c_w[2] c_w[3] c_w[4] c_w[5] c_w[6]
dump d all custom 1 {number}.dump id fx fy fz c_e c_s[1] c_s[2] c_s[3] c_s[4] c_s[5] c_s[6]
dump_modify d sort id format float %.17g
run 0
print "$(pe:%.17g) $(vol:%.17g) $(c_w[1]:%.17g) $(c_w[2]:%.17g) $(c_w[3]:%.17g) $(c_w[4]:%.17g) $(c_w[5]:%.17g) &
 $(c_w[6]:%.17g)" file {number}.txt
"""
            )
        self.log("".join(parts), ranks=ranks)
        return [self._result(number, units) for number in range(len(structures))]

    def _result(self, number: int, units: str) -> Result:
        energy, volume, *pressure = (float(v) for v in (self.folder / f"{number}.txt").read_text().split())
        atoms = np.loadtxt(self.folder / f"{number}.dump", skiprows=9, ndmin=2)
        assert (atoms[:, 0] == np.arange(1, len(atoms) + 1)).all()
        ev = EV[units]
        virial = symmetric(ev * np.array(pressure) * volume / NKTV2P[units])
        # the virials of the atoms add up to that of the box
        of_atoms = symmetric(-ev * atoms[:, 5:].sum(axis=0) / NKTV2P[units])
        assert np.allclose(of_atoms, virial, rtol=1e-12, atol=1e-10)
        return Result(ev * energy, ev * atoms[:, 4], ev * atoms[:, 1:4], virial)


def start(structure: Structure, units: str = "metal") -> str:
    """The head of an input for `structure`."""
    boundary = " ".join("p" if periodic else "f" for periodic in structure.pbc)
    return f"units {units}\natom_style atomic\nboundary {boundary}"


def write_data(path: Path, structure: Structure, elements: Sequence[str], masses: Sequence[float] = ()) -> None:
    """A LAMMPS data file; cells have their vectors below the diagonal, and room is left along axes that are open."""
    cell, low = structure.cell.copy(), np.zeros(3)
    for axis in np.flatnonzero(~structure.pbc):
        span = np.ptp(structure.positions[:, axis]) + 20.0
        cell[axis], low[axis] = span * np.eye(3)[axis], structure.positions[:, axis].min() - 10.0
    assert np.allclose(np.triu(cell, 1), 0)
    high = low + np.diag(cell)
    lines = ["from the tests", f"{len(structure)} atoms", f"{len(elements)} atom types"]
    lines += [f"{low[k]:.17g} {high[k]:.17g} {name}lo {name}hi" for k, name in enumerate("xyz")]
    if np.tril(cell, -1).any():
        lines.append(f"{cell[1, 0]:.17g} {cell[2, 0]:.17g} {cell[2, 1]:.17g} xy xz yz")
    lines += ["", "Masses", ""]
    masses = masses or [MASSES[NUMBERS[symbol]] for symbol in elements]
    lines += [f"{kind} {mass}" for kind, mass in enumerate(masses, 1)]
    lines += ["", "Atoms # atomic", ""]
    for tag, (z, position) in enumerate(zip(structure.numbers, structure.positions, strict=True), 1):
        x, y, z_ = position
        lines.append(f"{tag} {list(elements).index(SYMBOLS[z]) + 1} {x:.17g} {y:.17g} {z_:.17g}")
    path.write_text("\n".join(lines) + "\n")


def symmetric(xx_yy_zz_xy_xz_yz: FloatArray) -> FloatArray:
    xx, yy, zz, xy, xz, yz = xx_yy_zz_xy_xz_yz
    return np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])


def thermo(log: str) -> dict[str, FloatArray]:
    """The columns of every table of thermodynamic output in a log, by name."""
    columns: dict[str, list[float]] = {}
    names: list[str] = []
    for line in log.splitlines():
        words = line.split()
        if words[:1] == ["Step"]:
            names = words
        elif words[:1] == ["Loop"]:
            names = []
        elif names and words[0].isdigit() and len(words) == len(names):
            for name, word in zip(names, words, strict=True):
                columns.setdefault(name, []).append(float(word))
    return {name: np.array(values) for name, values in columns.items()}


def make_deck(folder: Path) -> Deck:
    """A deck in `folder`; builds the plug-in when there is none yet. No compiler is as good as no LAMMPS."""
    try:
        lammps = wheel()
        return Deck(folder, lammps, build_plugin(lammps))
    except MLFFError as error:
        if "no C++ compiler" in str(error):
            requirements.missing("lammps", str(error))
        raise


def water(side: int, seed: int = 3, shape: FloatArray | None = None) -> Structure:
    """side³ molecules of water at its density, in a cubic box or one of `shape`."""
    rng = np.random.default_rng(seed)
    length = 3.1 * side
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), axis=-1).reshape(-1, 3) * 3.1
    molecule = np.array([[0.0, 0.0, 0.0], [0.96, 0.0, 0.0], [-0.24, 0.93, 0.0]])
    positions = (grid[:, None] + molecule + rng.uniform(-0.15, 0.15, (side**3, 3, 3))).reshape(-1, 3)
    shape = np.eye(3) if shape is None else shape
    return Structure(np.tile([8, 1, 1], side**3), positions @ shape, length * shape, np.ones(3, dtype=bool))


def chain() -> Structure:
    """Longer than a message travels: a rank does not see all atoms, and what it sees of far ones is incomplete."""
    rng = np.random.default_rng(5)
    positions = np.stack([1.6 * np.arange(24), *rng.uniform(-0.4, 0.4, (2, 24))], axis=-1)
    return Structure(np.tile([6, 1, 8], 8), positions)


def half_empty() -> Structure:
    """All atoms in one end of the box."""
    dense = water(2)
    return replace(dense, cell=dense.cell * np.array([[1.0], [1.0], [6.0]]))
