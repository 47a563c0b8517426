"""What is validated when nobody names a structure: systems that follow from an artifact, and liquid argon."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mlff_engines.artifact import Artifact
from mlff_engines.checkpoint import Domain, save_checkpoint
from mlff_engines.errors import StructureError, suggest
from mlff_engines.export import export
from mlff_engines.manifest import Dtype
from mlff_engines.models.lj import ARGON
from mlff_engines.models.registry import build_model
from mlff_engines.structure import MASSES, NUMBERS, FloatArray, Structure
from mlff_engines.units import ATOMIC_MASS
from mlff_engines.validation.result import Claims
from mlff_engines.validation.static.symmetry import random_rotation
from mlff_engines.validation.static.systems import ALL, TRICLINIC, crystal, joined

ARGON_DENSITY, ARGON_TEMPERATURE = 1.374, 94.4  # g/cm³, K: Rahman's liquid, Phys. Rev. 136, A405 (1964)
ARGON_CLOSEST = 3.1  # Å: about 2 k_B T per pair
WATER_DENSITY, WATER_TEMPERATURE = 0.997, 298.15  # g/cm³, K
# Å: one molecule as in the vapour, r(OH) 0.9572 Å and 104.52° (Benedict et al., J. Chem. Phys. 24, 1139 (1956))
WATER = np.array([[0.0, 0.0, 0.0], [0.7569, 0.5859, 0.0], [-0.7569, 0.5859, 0.0]])


@dataclass(frozen=True)
class System:
    """A structure to validate an artifact on, and the temperature (K) of its dynamics."""

    name: str
    structure: Structure
    temperature: float = 300.0


def builtin_systems(artifact: Artifact) -> dict[str, System]:
    """Systems by name: the first makes a good one for dynamics, all serve the static checks.

    Training structures as the artifact recorded them; the first, where it is a molecule, also in a periodic box, in a
    triclinic box and twice as far fragments, else as a slab; liquid water where H and O are known; liquid argon; a
    rattled crystal of all elements.
    """
    elements = set(artifact.manifest.domain.elements)
    found: list[System] = []
    trained = [g for g in artifact.golden if g.name.startswith("structure")]
    found += [System(f"training-{n}", g.structure) for n, g in enumerate(trained)]
    if trained:
        found += _surroundings(trained[0].structure, artifact.manifest.cutoff * artifact.manifest.layers)
    if elements >= {"H", "O"}:
        found += [System(f"water-{n}", water_box(n), WATER_TEMPERATURE) for n in (64, 216)]
    if "Ar" in elements:
        found.append(System("argon-108", disordered(argon_box(3), ARGON_CLOSEST), ARGON_TEMPERATURE))
    found.append(System("crystal", crystal(Claims.of(artifact.manifest))))
    return {system.name: system for system in found}


def named_system(name: str, artifact: Artifact) -> System:
    """The built-in system `name`.

    Raises:
        StructureError: there is none of this name for this artifact.
    """
    systems = builtin_systems(artifact)
    if name not in systems:
        raise StructureError(f"no file and no built-in system {name!r}{suggest(name, systems)}")
    return systems[name]


def argon_artifact(folder: Path, dtype: Dtype = "float64") -> Path:
    """The analytic Lennard-Jones model of argon as an artifact, for engines to be tried without any training."""
    model = build_model(ARGON, ["Ar"], {"Ar": 0.0}).eval()
    domain = Domain(elements=["Ar"], min_distances={"Ar-Ar": 2.9})
    save_checkpoint(folder / "argon", model, ARGON, domain, {"teacher": "Lennard-Jones, analytic"})
    export([folder / "argon"], folder / "argon.pt", dtype=dtype, overwrite=True)
    return folder / "argon.pt"


def argon_box(cells: int) -> Structure:
    """`cells`³ cubic cells of four atoms at the density of the liquid, still in order."""
    lattice = np.array([[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
    return _packed(lattice, [NUMBERS["Ar"]] * 4, cells, (4 * MASSES[18] * ATOMIC_MASS * 1e3 / ARGON_DENSITY) ** (1 / 3))


def disordered(box: Structure, closest: float) -> Structure:
    """The atoms of a cubic box one by one at random, `closest` Å or more from each other.

    A liquid forgets this within picoseconds; a superheated crystal takes tens of them to melt.
    """
    edge, rng = float(box.cell[0, 0]), np.random.default_rng(0)
    placed = np.empty((0, 3))
    while len(placed) < len(box):
        candidate = edge * rng.random(3)
        apart = placed - candidate
        apart -= edge * np.rint(apart / edge)
        if (np.square(apart).sum(axis=1) >= closest**2).all():
            placed = np.vstack([placed, candidate])
    return replace(box, positions=placed)


def water_box(molecules: int) -> Structure:
    """`molecules` (a cube) turned at random on a cubic grid, at the density of the liquid."""
    side, rng = round(molecules ** (1 / 3)), np.random.default_rng(0)
    edge = ((MASSES[8] + 2 * MASSES[1]) * ATOMIC_MASS * 1e3 / WATER_DENSITY) ** (1 / 3)
    box = _packed(np.zeros((1, 3)), [NUMBERS["O"]], side, edge)
    turned = np.concatenate([oxygen + WATER @ random_rotation(rng).T for oxygen in box.positions])
    return replace(box, numbers=np.array([8, 1, 1] * len(box)), positions=turned)


def _packed(sites: FloatArray, numbers: Sequence[int], cells: int, edge_cm: float) -> Structure:
    edge = 1e8 * edge_cm
    corners = np.stack(np.meshgrid(*[np.arange(cells, dtype=float)] * 3, indexing="ij"), -1).reshape(-1, 1, 3)
    positions = edge * (corners + sites).reshape(-1, 3)
    return Structure(np.array([*numbers] * cells**3), positions, cells * edge * np.eye(3), ALL.copy())


def _surroundings(structure: Structure, reach: float) -> list[System]:
    if structure.pbc.any():
        return [System("slab", replace(structure, pbc=np.array([True, True, False])))]
    extent = np.ptp(structure.positions, axis=0)
    cell = np.diag(extent + 3.0)  # molecules feel their images
    away = replace(structure, positions=structure.positions + np.array([extent[0] + reach + 1.0, 0, 0]))
    return [
        System("periodic-box", replace(structure, cell=cell, pbc=ALL.copy())),
        System("triclinic-box", replace(structure, cell=cell @ TRICLINIC, pbc=ALL.copy())),
        System("slab", replace(structure, cell=cell, pbc=np.array([True, True, False]))),
        System("far-fragments", joined(structure, away)),
    ]
