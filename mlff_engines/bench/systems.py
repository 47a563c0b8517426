"""What is timed: aspirin, and boxes of liquid water of any size."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlff_engines.errors import ConfigError
from mlff_engines.structure import NUMBERS, FloatArray, Structure
from mlff_engines.validation.builtin import water_box
from mlff_engines.validation.engine import Dynamics, thermal

TEMPERATURE = 300.0  # K
TIMESTEP = 0.5  # fs
QUICK = ("aspirin", "water-192", "water-999", "water-12288")
FULL = ("aspirin", "water-192", "water-999", "water-1536", "water-12288")
# symbol, x, y, z in Å: a conformer of acetylsalicylic acid, relaxed with MMFF94
ASPIRIN = """
C  3.078  1.183 -0.840  C  2.032  0.461 -0.044  O  2.103  0.246  1.159  O  1.007  0.069 -0.898
C -0.057 -0.533 -0.220  C -0.103 -1.931 -0.237  C -1.153 -2.594  0.395  C -2.156 -1.863  1.030
C -2.117 -0.464  1.029  C -1.067  0.219  0.396  C -1.034  1.705  0.366  O -0.229  2.411 -0.214
O -2.036  2.259  1.076  H  2.632  2.043 -1.346  H  3.528  0.500 -1.564  H  3.858  1.546 -0.166
H  0.678 -2.500 -0.733  H -1.189 -3.681  0.395  H -2.974 -2.380  1.526  H -2.916  0.082  1.525
H -1.883  3.222  0.983
"""


@dataclass(frozen=True)
class System:
    """A structure with thermal velocities."""

    name: str
    structure: Structure

    @property
    def dynamics(self) -> Dynamics:
        """The start of molecular dynamics at 300 K."""
        still = Dynamics(self.structure, np.zeros_like(self.structure.positions), TIMESTEP, 1)
        return thermal(still, TEMPERATURE, seed=0)

    def plain(self) -> dict[str, Any]:
        """As a worker gets it.

        | key                           | unit  |
        |-------------------------------|-------|
        | `numbers`, `masses`           | -, amu |
        | `positions`, `cell`, `pbc`    | Å     |
        | `velocities`, `timestep`      | Å/fs, fs |
        """
        s, start = self.structure, self.dynamics
        arrays = {name: getattr(s, name).tolist() for name in ("numbers", "positions", "cell", "pbc")}
        moving = {"masses": start.masses.tolist(), "velocities": start.velocities.tolist(), "timestep": TIMESTEP}
        return {"name": self.name, **arrays, **moving}


def named(name: str) -> System:
    """`aspirin`, or `water-N` with N atoms.

    Raises:
        ConfigError: another name.
    """
    water = re.fullmatch(r"water-(\d+)", name)
    if name == "aspirin":
        words = np.array(ASPIRIN.split()).reshape(-1, 4)
        return System(name, Structure(np.array([NUMBERS[s] for s in words[:, 0]]), words[:, 1:].astype(float)))
    if water and int(water[1]) and int(water[1]) % 3 == 0:
        return System(name, water_of(int(water[1]) // 3))
    raise ConfigError(f"no system {name!r}; allowed: aspirin, or water-N with N atoms, three for each molecule")


def water_of(molecules: int) -> Structure:
    """Any number of molecules at the density of the liquid: on a grid with, unless it is a cube, evenly spread gaps."""
    sites = int(np.ceil(round(molecules ** (1 / 3), 9))) ** 3
    box = water_box(sites)
    kept = np.linspace(0, sites, molecules, endpoint=False).astype(int)
    inside = box.positions.reshape(-1, 3, 3)
    oxygen: FloatArray = inside[:, :1]
    shrink = (molecules / sites) ** (1 / 3)
    moved = (oxygen * shrink + (inside - oxygen))[kept]
    return replace(box, numbers=box.numbers[: 3 * molecules], positions=moved.reshape(-1, 3), cell=box.cell * shrink)
