"""One step under `pair_style mliap unified`: what LAMMPS hands over, checked, evaluated and handed back."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlff_engines.artifact import Artifact, inspect, load
from mlff_engines.errors import ArtifactError, ConfigError, SimulationError
from mlff_engines.graph import make_graph
from mlff_engines.structure import MASSES, NUMBERS, BoolArray, FloatArray, IntArray
from mlff_engines.units import KCAL_PER_MOL
from mlff_lammps.host import Host

# LAMMPS' styles with lengths in Å: one of its energy units in eV
ENERGY_UNITS = {"metal": 1.0, "real": KCAL_PER_MOL}
PROBE = 2.0**-10  # multiples of this add up exactly
BIGINT = ctypes.c_int64  # LAMMPS' numbers of atoms and bonds


class Forces:
    """An artifact in one pair style.

    Args:
        path: of the artifact.
        sha256: the hash that its manifest must have, if any.
        device: where it runs.
        host: LAMMPS.

    Raises:
        ArtifactError: see `mlff_engines.artifact.load`; also another hash.
        ConfigError: LAMMPS' units are neither metal nor real.
    """

    def __init__(self, path: Path, sha256: str | None, device: str, host: Host) -> None:
        self.host = host
        units = host.units
        if units not in ENERGY_UNITS:
            raise ConfigError(
                f"units {units}; this model works with {' or '.join(f'units {name}' for name in ENERGY_UNITS)}. "
                "Change the units command, and with it timestep, temperatures and pressures of the deck"
            )
        self._energy_unit = ENERGY_UNITS[units]
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))  # as LAMMPS does
        manifest = inspect(path)
        if sha256 not in (None, manifest.sha256):
            raise ArtifactError(
                f"{path} is another artifact than the one this file was written for ({manifest.sha256[:12]}..., not "
                f"{str(sha256)[:12]}...). It was not executed; write the file again: "
                f"mlff-export --engine lammps-mliap {path.name} -o {path.with_suffix('.mliap').name}"
            )
        self.artifact = _loaded(path, manifest.sha256, device)
        self.layers, self.cutoff = manifest.layers, manifest.cutoff
        self.elements = list(manifest.domain.elements)
        self._numbers = torch.tensor([NUMBERS[symbol] for symbol in self.elements])
        self._probed = False
        self._built_at: FloatArray | None = None  # positions when the neighbour list was built
        host.say(
            f"{path.name}: {manifest.architecture} for {' '.join(self.elements)}, {self.layers} x {self.cutoff:g} Å, "
            f"{manifest.dtype}, units {units}\n  needs: {self._hint()}"
        )

    def _hint(self) -> str:
        """The pair_coeff command that the masses of the types suggest."""
        known = {symbol: MASSES[NUMBERS[symbol]] for symbol in self.elements}
        fitting = [[symbol for symbol, mass in known.items() if abs(mass - m) <= 0.5] for m in self.host.masses]
        named = [found[0] if found else f"E{kind + 1}" for kind, found in enumerate(fitting)]
        return f"pair_coeff * * {' '.join(named) or 'E1 E2 ...'} (type 1, 2, ... = one of {' '.join(known)})"

    def __call__(self, data: Any) -> None:
        """Energies and pair forces of one step."""
        artifact = self.artifact
        self._check(data)
        atoms, pairs = data.ntotal, data.npairs
        data.energy = 0.0
        if not data.nlistatoms and not pairs:
            return
        centres, neighbours = _array(data, "pair_i", pairs), _array(data, "pair_j", pairs)
        vectors = data.rij if pairs else np.zeros((0, 3))
        listed = _array(data, "iatoms", data.nlistatoms)
        owned = np.zeros(atoms, dtype=bool)
        owned[listed] = True
        pair_used, atom_used = _reachable(owned, centres, neighbours, self.layers)
        place = np.cumsum(atom_used) - 1
        edge_index = np.stack([place[centres[pair_used]], place[neighbours[pair_used]]])
        elements = torch.from_numpy(_array(data, "elems", atoms)[atom_used])
        device, dtype, domain = artifact.device, artifact.dtype, artifact.manifest.domain
        graph = make_graph(
            self._numbers[elements].to(device),
            torch.from_numpy(edge_index).to(device),
            torch.from_numpy(vectors[pair_used]).to(device, dtype),
            owned=torch.from_numpy(owned[atom_used]).to(device),
            charge=torch.tensor(domain.charges[:1], dtype=dtype, device=device),
            spin=torch.tensor(domain.spins[:1], dtype=dtype, device=device),
        )
        with torch.enable_grad():
            out = artifact(graph)
        energies = np.zeros(atoms)
        energies[atom_used] = out["node_energy"].cpu().numpy() / self._energy_unit
        forces = np.zeros((pairs, 3))
        forces[pair_used] = out["edge_gradient"].double().cpu().numpy() / self._energy_unit
        self._check_finite(energies[listed], forces, listed, centres)
        if len(listed):
            data.eatoms = energies[listed]
            data.energy = float(energies[listed].sum())
        if pairs:  # the coupling takes the address of the first
            data.update_pair_forces(forces)

    def _check(self, data: Any) -> None:
        host = self.host
        settings = host.neighbors
        if settings is None or settings.ago == 0:
            self._check_types(data)
            self._check_pairs(data)
        if settings is None:
            return
        positions = host.positions(data.nlocal)
        if settings.ago == 0 or self._built_at is None or len(self._built_at) != len(positions):
            self._check_ghosts(settings.skin)
            self._built_at = positions
        moved = np.sqrt(((positions - self._built_at) ** 2).sum(axis=1).max(initial=0.0))
        if 2 * moved > settings.skin and settings.ago > 0:
            raise SimulationError(
                f"an atom has moved {moved:.3g} Å in the {settings.ago} steps since the neighbour list was built, more "
                f"than half the skin of {settings.skin:g} Å: pairs may be missing. Use neigh_modify every 1 delay 0 "
                "check yes, or a larger skin (neighbor ... bin); if the list is built at every step already, the "
                "dynamics explodes: use a smaller timestep"
            )

    def _check_types(self, data: Any) -> None:
        """Every type is an element with its mass, and no pair is left out of the list."""
        host = self.host
        elements = _array(data, "elems", data.ntotal)
        types = host.types(data.ntotal)
        table = dict(sorted(set(zip(types.tolist(), elements.tolist(), strict=True))))
        named = {kind: self.elements[element] if element >= 0 else "NULL" for kind, element in table.items()}
        shown = ", ".join(f"{kind} = {symbol}" for kind, symbol in named.items())
        null = [kind for kind, symbol in named.items() if symbol == "NULL"]
        if null:
            raise ConfigError(
                f"pair_coeff maps type {null[0]} to NULL ({shown}), but every atom acts on the model's: give each type "
                f"one of {' '.join(self.elements)}"
            )
        bonds = host.integers("nbonds", 1, BIGINT)
        lj, coulomb = host.constants("special_lj", 4), host.constants("special_coul", 4)
        if bonds and bonds[0] and any(a == b == 0 for a, b in zip(lj[1:], coulomb[1:], strict=True)):
            raise ConfigError(
                "special_bonds takes bonded pairs out of the neighbour list, and so out of the model: use "
                "special_bonds lj/coul 1.0 1.0 1.0"
            )
        masses = host.masses
        for kind, symbol in named.items() if masses else ():
            mass, own = masses[kind - 1], MASSES[NUMBERS[symbol]]
            others = [other for other in named.values() if abs(mass - MASSES[NUMBERS[other]]) <= 0.1]
            if abs(mass - own) <= 0.5:
                continue
            what = f"pair_coeff maps type {kind} to {symbol}, but its mass is {mass:g}"
            if others:
                raise ConfigError(
                    f"{what}, that of {others[0]} ({shown}): correct the order of elements in pair_coeff, or the mass"
                )
            if self._built_at is None:  # isotopes and repartitioned masses are legal: once is enough
                host.say(f"WARNING: {what}; the element has {own:g}")

    def _check_pairs(self, data: Any) -> None:
        """The list has the pairs of ghosts, and the coupling passes their forces on."""
        centres, neighbours = _array(data, "pair_i", data.npairs), _array(data, "pair_j", data.npairs)
        outwards = int(((centres < data.nlocal) & (neighbours >= data.nlocal)).sum())
        inwards = int(((centres >= data.nlocal) & (neighbours < data.nlocal)).sum())
        if self.layers > 1 and inwards != outwards:
            raise ConfigError(
                "LAMMPS gives no pairs of ghost atoms, which a model of several layers needs: write `pair_style mliap "
                "unified FILE 1`. If the deck says so, this LAMMPS ignores it (some releases of 2025 do): mlff lammps "
                "build makes one that does not"
            )
        if self._probed or not data.npairs or data.f is None:
            return
        # what LAMMPS does with a small known pair force, which is then taken back
        probe = PROBE * np.arange(1, 3 * data.npairs + 1, dtype=float).reshape(-1, 3) % 1.0
        before = data.f.copy()
        data.update_pair_forces(np.ascontiguousarray(probe))
        found = data.f - before
        data.update_pair_forces(np.ascontiguousarray(-probe))
        expected = np.zeros_like(before)
        np.add.at(expected, centres, probe)
        np.subtract.at(expected, neighbours, probe)
        off = float(np.abs(found - expected).max())
        if off > 1e-6 * max(1.0, float(np.abs(before).max())):
            raise ConfigError(
                f"this LAMMPS does not pass the forces of all pairs on (a known force came out {off:.3g} wrong): some "
                "releases of 2025 drop those of ghost atoms. Use another: mlff lammps build makes one"
            )
        self._probed = True

    def _check_ghosts(self, skin: float) -> None:
        host, cutoff, layers = self.host, self.cutoff, self.layers
        needed, have = layers * cutoff + skin, host.ghost_cutoff
        if layers == 1 or have is None or (host.ranks == 1 and not host.periodic):
            return
        if have < needed - 1e-9:
            raise ConfigError(
                f"ghost atoms reach {have:g} Å beyond each domain, and this model needs {needed:g} Å ({layers} layers "
                f"x {cutoff:g} Å + {skin:g} Å skin). Add to the deck: comm_modify cutoff {needed:g}"
            )

    def _check_finite(self, energies: FloatArray, forces: FloatArray, listed: IntArray, centres: IntArray) -> None:
        bad = [*listed[~np.isfinite(energies)], *centres[~np.isfinite(forces).all(axis=1)]]
        if bad:
            tag = self.host.tags(int(max(bad)) + 1)[bad[0]]
            raise SimulationError(
                f"the model's energy or force on atom {tag} is not finite: atoms coincide, or the structure is far "
                "outside the trained range"
            )


@functools.lru_cache(maxsize=2)
def _loaded(path: Path, _sha256: str, device: str) -> Artifact:
    """One for all the pair styles of a process, one after another: `clear` is frequent in loops of decks."""
    return load(path, device)


def _reachable(owned: BoolArray, centres: IntArray, neighbours: IntArray, layers: int) -> tuple[BoolArray, BoolArray]:
    """Which pairs (P,) and atoms (N,) the energies of `owned` (N,) depend on, `layers` messages deep."""
    inner = owned.copy()
    for _ in range(layers - 1):
        inner[neighbours[inner[centres]]] = True
    pairs = inner[centres]
    inner[neighbours[pairs]] = True
    return pairs, inner


def _array(data: Any, name: str, count: int) -> IntArray:
    """The first `count` integers of a field; the coupling cannot make arrays of none."""
    return np.asarray(getattr(data, name)[:count], dtype=np.int64) if count else np.zeros(0, dtype=np.int64)
