"""One step under `pair_style mliap unified`: what LAMMPS hands over, checked, evaluated and handed back."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlff_engines.artifact import Artifact, load
from mlff_engines.errors import ArtifactError, ConfigError, SimulationError
from mlff_engines.evaluator import COINCIDENT
from mlff_engines.graph import make_graph
from mlff_engines.manifest import inspect
from mlff_engines.structure import MASSES, NUMBERS, FloatArray
from mlff_engines.units import KCAL_PER_MOL
from mlff_lammps.exchange import LayerByLayer, synchronize
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
        kinds, there = len(self.elements), self.artifact.device
        self._numbers = torch.tensor([NUMBERS[symbol] for symbol in self.elements], device=there)
        self._min_square = torch.zeros((kinds, kinds), dtype=torch.float64, device=there)  # Å²
        for pair, distance in manifest.domain.min_distances.items():
            a, b = (self.elements.index(symbol) for symbol in pair.split("-"))
            self._min_square[a, b] = self._min_square[b, a] = distance**2
        self._close: set[tuple[int, ...]] = set()  # pairs of elements already warned of
        self._layer_by_layer: LayerByLayer | None = None  # where LAMMPS exchanges features
        self._probed = False
        self._built_at: FloatArray | None = None  # positions when the neighbour list was built
        domain = manifest.domain
        host.say(
            f"{path.name}: {manifest.architecture} for {' '.join(self.elements)}, {self.layers} x {self.cutoff:g} Å, "
            f"{manifest.dtype}, units {units}, charge {domain.charges[0]:g}, unpaired electrons {domain.spins[0]:g}\n"
            f"  needs: {self._hint()}"
        )

    def _hint(self) -> str:
        """The pair_coeff command that the masses of the types suggest."""
        known = {symbol: MASSES[NUMBERS[symbol]] for symbol in self.elements}
        fitting = [[symbol for symbol, mass in known.items() if abs(mass - m) <= 0.5] for m in self.host.masses]
        named = [found[0] if found else f"E{kind + 1}" for kind, found in enumerate(fitting)]
        return f"pair_coeff * * {' '.join(named) or 'E1 E2 ...'} (type 1, 2, ... = one of {' '.join(known)})"

    def check(self, data: Any) -> str | None:
        """What must be right before anything is evaluated, on every rank; a warning, if there is reason for one.

        Raises:
            ConfigError: units, elements, masses, ghosts or the LAMMPS itself do not suit the model.
            SimulationError: atoms have moved further than the neighbour list allows, or coincide.
        """
        if hasattr(data, "forward_exchange"):
            self._check_exchange(data)
        else:
            self._check_list(data)
        return self._check_distances(data) if data.npairs else None

    def _check_list(self, data: Any) -> None:
        """Without KOKKOS: the neighbour list is what the model needs, and still holds."""
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

    def __call__(self, data: Any) -> None:
        """Energies and pair forces of one step."""
        artifact, device = self.artifact, self.artifact.device
        atoms, pairs = data.ntotal, data.npairs
        data.energy = 0.0
        exchanging = self._layer_by_layer
        if not (data.nlistatoms or pairs or exchanging):
            return
        synchronize(device)
        centres, neighbours = (_tensor(data, name, pairs, device) for name in ("pair_i", "pair_j"))
        vectors = torch.as_tensor(data.rij, device=device) if pairs else torch.zeros((0, 3), device=device)
        elements = _tensor(data, "elems", atoms, device)
        listed = _tensor(data, "iatoms", data.nlistatoms, device)
        owned = torch.zeros(atoms, dtype=torch.bool, device=device)
        owned[listed] = True
        if exchanging:
            pair_used, atom_used = owned[centres], torch.ones_like(owned)
        else:
            pair_used, atom_used = _reachable(owned, centres, neighbours, self.layers)
        place = atom_used.cumsum(0) - 1
        dtype, domain = artifact.dtype, artifact.manifest.domain
        graph = make_graph(
            self._numbers[elements[atom_used]],
            torch.stack([place[centres[pair_used]], place[neighbours[pair_used]]]),
            vectors[pair_used].to(dtype),
            owned=owned[atom_used],
            charge=torch.tensor(domain.charges[:1], dtype=dtype, device=device),
            spin=torch.tensor(domain.spins[:1], dtype=dtype, device=device),
        )
        with torch.enable_grad():
            out = exchanging(graph, data) if exchanging else artifact(graph)
        energies = torch.zeros(atoms, dtype=torch.float64, device=device)
        energies[atom_used] = out["node_energy"] / self._energy_unit
        forces = torch.zeros((pairs, 3), dtype=torch.float64, device=device)
        forces[pair_used] = out["edge_gradient"].double() / self._energy_unit
        self._check_finite(energies[listed], forces, listed, centres)
        if len(listed):
            _set_energies(data, energies[listed])
            data.energy = float(energies[listed].sum())
        _pass_on(data, forces)

    def _check_exchange(self, data: Any) -> None:
        """With KOKKOS: LAMMPS' atoms lie on the device, what its C interface shows of them may be old."""
        device = self.artifact.device
        elements = _tensor(data, "elems", data.ntotal, device)
        if self._layer_by_layer is None:
            self._layer_by_layer = LayerByLayer(self.artifact, self.host)
            self.host.say(
                "features of ghost atoms are exchanged between layers: `unified FILE 0`, without comm_modify "
                "cutoff, is enough"
            )
            owned = torch.zeros(len(elements), dtype=torch.bool, device=device)
            owned[_tensor(data, "iatoms", data.nlistatoms, device)] = True
            self._layer_by_layer.probe(data, elements, owned)
        if bool((elements < 0).any()):
            raise ConfigError(
                "pair_coeff maps a type to NULL, but every atom acts on the model's: give each type one of "
                f"{' '.join(self.elements)}"
            )

    def _check_types(self, data: Any) -> None:
        """Every type is an element with its mass, and no pair is left out of the list."""
        host = self.host
        elements = _tensor(data, "elems", data.ntotal)
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
        centres, neighbours = (_tensor(data, name, data.npairs) for name in ("pair_i", "pair_j"))
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
        probe = PROBE * torch.arange(1, 3 * data.npairs + 1, dtype=torch.float64).reshape(-1, 3) % 1.0
        before = torch.as_tensor(data.f).clone()
        _pass_on(data, probe)
        found = torch.as_tensor(data.f) - before
        _pass_on(data, -probe)
        expected = torch.zeros_like(before).index_add(0, centres, probe).index_add(0, neighbours, -probe)
        off = float((found - expected).abs().max())
        if off > 1e-6 * max(1.0, float(before.abs().max())):
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

    def _check_distances(self, data: Any) -> str | None:
        device = self.artifact.device
        centres, neighbours = (_tensor(data, name, data.npairs, device) for name in ("pair_i", "pair_j"))
        elements = _tensor(data, "elems", data.ntotal, device)
        square = torch.as_tensor(data.rij, device=device).square().sum(dim=1)
        owned = torch.zeros(data.ntotal, dtype=torch.bool, device=device)
        owned[_tensor(data, "iatoms", data.nlistatoms, device)] = True
        trained = self._min_square[elements[centres], elements[neighbours]].clamp(min=COINCIDENT**2)
        close = torch.nonzero((square < trained) & owned[centres]).squeeze(1)
        if not len(close):
            return None
        worst = int(close[(square - trained)[close].argmin()])
        i, j = int(centres[worst]), int(neighbours[worst])
        distance = float(square[worst]) ** 0.5
        tags, kinds = self.host.tags(data.ntotal), sorted((int(elements[i]), int(elements[j])))
        pair = " and ".join(f"{tags[k]} ({self.elements[int(elements[k])]})" for k in (i, j))
        if distance < COINCIDENT:
            raise SimulationError(f"atoms {pair} coincide: {distance:.2g} Å apart. Move one of them")
        if tuple(kinds) in self._close:
            return None
        self._close.add(tuple(kinds))
        return (
            f"atoms {pair} are {distance:.3f} Å apart; the shortest distance of their elements in the training data "
            f"is {float(trained[worst]) ** 0.5:.3f} Å: the model extrapolates, its forces may be wrong"
        )

    def _check_finite(self, energies: Tensor, forces: Tensor, listed: Tensor, centres: Tensor) -> None:
        bad = torch.cat([listed[~energies.isfinite()], centres[~forces.isfinite().all(dim=1)]]).tolist()
        if bad:
            tag = self.host.tags(max(bad) + 1)[bad[0]]
            raise SimulationError(
                f"the model's energy or force on atom {tag} is not finite: the structure is far outside the "
                "trained range, or the time step is too long"
            )


@functools.lru_cache(maxsize=2)
def _loaded(path: Path, _sha256: str, device: str) -> Artifact:
    """One for all the pair styles of a process, one after another: `clear` is frequent in loops of decks."""
    return load(path, device)


def _reachable(owned: Tensor, centres: Tensor, neighbours: Tensor, layers: int) -> tuple[Tensor, Tensor]:
    """Which pairs (P,) and atoms (N,) the energies of `owned` (N,) depend on, `layers` messages deep."""
    inner = owned.clone()
    for _ in range(layers - 1):
        inner[neighbours[inner[centres]]] = True
    pairs = inner[centres]
    inner[neighbours[pairs]] = True
    return pairs, inner


def _tensor(data: Any, name: str, count: int, device: torch.device | str = "cpu") -> Tensor:
    """The first `count` integers of a field; the coupling cannot make arrays of none."""
    if not count:
        return torch.zeros(0, dtype=torch.int64, device=device)
    return torch.as_tensor(getattr(data, name)[:count], device=device).long()


def _set_energies(data: Any, energies: Tensor) -> None:
    """Of the atoms listed: a plain LAMMPS takes an array, one with KOKKOS has it filled."""
    try:
        held = data.eatoms
    except AttributeError:
        data.eatoms = energies.cpu().numpy()
    else:
        torch.as_tensor(held).copy_(energies)


def _pass_on(data: Any, forces: Tensor) -> None:
    """Forces (P, 3), to LAMMPS; the coupling takes the address of the first, wherever its own arrays lie."""
    if not len(forces):
        return
    there = torch.as_tensor(data.rij).device
    given = forces.to(there).contiguous()
    synchronize(there)
    data.update_pair_forces(given.numpy() if there.type == "cpu" else given)
    synchronize(there)
