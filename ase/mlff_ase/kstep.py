"""Molecular dynamics with large steps: a student does the work, the true potential keeps it honest."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator
from ase.md.md import MolecularDynamics

from mlff_ase.bonds import Constraints, constrain
from mlff_ase.counting import CountedCalculator
from mlff_ase.fields import artifact_field, calculator_field
from mlff_ase.structures import to_structure
from mlff_engines.errors import ConfigError, SimulationError, StructureError, suggest
from mlff_engines.files import replacing
from mlff_engines.kstep.jumps import Displacement, Jump, correct, flow, land
from mlff_engines.kstep.learned import LearnedJump
from mlff_engines.kstep.metropolis import LengthAdaptation, jittered, metropolis
from mlff_engines.kstep.particles import Bath, Evaluation, ForceField, Particles
from mlff_engines.kstep.propagators import Pair, respa, trajectory
from mlff_engines.kstep.stability import require_safe_student
from mlff_engines.manifest import inspect
from mlff_engines.structure import FloatArray

Variant = Literal["A1", "A2", "C", "D"]
VARIANTS = ("A1", "A2", "C", "D")


@dataclass
class Counts:
    """What happened besides steps."""

    clamp_hits: int = 0
    fallbacks: int = 0
    proposals: int = 0
    accepted: int = 0
    failed_proposals: int = 0
    burn_in_proposals: int = 0

    @property
    def acceptance(self) -> float:
        """Of the proposals after the burn-in."""
        return self.accepted / self.proposals if self.proposals else float("nan")


class KStepDynamics(MolecularDynamics):
    """Large steps with a student, corrected by the true potential `atoms.calc`.

    >>> atoms.calc = TBLite(method="GFN2-xTB")
    >>> dynamics = KStepDynamics(atoms, 1 * units.fs, "student.pt", variant="C", steps=6, constraints="hbonds")
    >>> dynamics.run(1000)
    >>> dynamics.meter.calls

    | variant | one step of this object                                          | true calls | time      |
    |---------|------------------------------------------------------------------|------------|-----------|
    | A1      | jump of k time steps, then drift-kick-drift at the true force    | 1          | (k+1)·dt  |
    | A2      | jump of k time steps, then velocity Verlet at the true force     | 2          | (k+1)·dt  |
    | C       | RESPA: k student steps between kicks of the true-minus-student force | 1      | k·dt      |
    | D       | k student steps as a proposal, accepted on the true energy       | 1 energy   | k·dt      |

    A is approximate whatever the step. C's bias falls with the square of its step, and a step that meets a resonance is
    refused. D samples configurations exactly whatever the student, at constant temperature; it has no true dynamics.

    With `friction`, A has noise about each macro-step, C in its inner steps (BAOAB), D keeps exp(-friction·time) of the
    velocities from one proposal to the next; without, D draws new ones for each.

    `atoms.calc` becomes a `CountedCalculator`: loggers and trajectories that ask for energies count too.

    Args:
        atoms: with the true potential as calculator. Bonds are constrained at their present lengths, and velocities
            along them removed.
        timestep: base time step dt, in ASE's unit of time.
        student: the path of an artifact (a potential, or for A a jump), a calculator, or for A a `Jump`. For A, a
            potential makes the jump by k steps of velocity Verlet.
        variant: see above.
        steps: k; for D before the burn-in, which changes it.
        temperature_K: for D and for friction.
        friction: in ASE's 1/time.
        constraints: "hbonds", "none" or pairs of atoms; None takes the `FixBondLengths` of `atoms`.
        seed: of all random numbers.
        fixcm: noise and new velocities carry no net momentum; for potentials that do not depend on where the centre of
            mass is.
        burn_in: D: proposals in which the length is adapted to `acceptance`; samples from them are to be discarded.
        acceptance: D: aimed at in the burn-in.
        jitter: D: lengths are drawn from k·(1 ± jitter).
        longest: D: the most steps that the burn-in may choose.
        allow_unsafe: C: take a macro-step at a resonance all the same, to show what happens. Otherwise the student is
            tried on `atoms` first: 24 true calls, counted as "check".
        trajectory, logfile, loginterval: as of every ASE dynamics.

    Attributes:
        meter: calls of the true potential by purpose: "dynamics", "start", "check", "fallback" and "reporters".
        counts: clamp hits, fallbacks, proposals.

    Raises:
        ConfigError: unknown variant, missing calculator or temperature, a macro-step at a resonance, or a jump made for
            another time step, number of steps, masses or constraints.
        ArtifactError: see `mlff_engines.artifact.load`.
        StructureError: the student does not know an element of `atoms`.
        SimulationError: when run: a jump or trajectory that is not finite or beyond all bounds, constraints that cannot
            be met.
    """

    def __init__(
        self,
        atoms: Atoms,
        timestep: float,
        student: str | Path | Calculator | Jump,
        *,
        variant: Variant = "C",
        steps: int = 4,
        temperature_K: float | None = None,
        friction: float | None = None,
        constraints: Constraints = None,
        seed: int = 0,
        fixcm: bool = True,
        burn_in: int = 0,
        acceptance: float = 0.65,
        jitter: float = 0.0,
        longest: int = 10_000,
        allow_unsafe: bool = False,
        trajectory: str | None = None,
        logfile: Any = None,
        loginterval: int = 1,
    ) -> None:
        self._check(atoms, timestep, variant, steps, temperature_K, friction, jitter)
        self._h = timestep / units.fs
        self.variant, self.steps = variant, steps
        self.temperature, self.friction = temperature_K, None if friction is None else friction * units.fs
        self.rng = np.random.default_rng(seed)
        self.counts = Counts()
        bonds, self._constraints = constrain(atoms, constraints)
        self._particles = Particles(atoms.get_masses(), bonds, still=fixcm)
        self._jitter = jitter
        self._length, self._adaptation = float(steps), LengthAdaptation(burn_in, acceptance, 1, max(longest, steps))
        self._time = 0.0

        true = atoms.calc if isinstance(atoms.calc, CountedCalculator) else CountedCalculator(atoms.calc)
        atoms.calc = true
        self.true, self.meter = true, true.meter
        self._scratch = atoms.copy()  # where fields are evaluated: `atoms` move by whole macro-steps
        self._scratch.set_constraint()
        self._field = calculator_field(true, self._scratch)
        self._set_student(student)
        self._known: tuple[FloatArray, Pair] | None = None

        macro = steps + 1 if variant in ("A1", "A2") else steps
        super().__init__(atoms, macro * timestep, trajectory, logfile, loginterval)
        v = self._particles.tangent(atoms.positions, atoms.get_velocities() * units.fs)
        atoms.set_momenta(self.masses * v / units.fs, apply_constraint=False)
        if variant == "C" and steps > 1 and not allow_unsafe:
            self._refuse_unsafe()

    @staticmethod
    def _check(
        atoms: Atoms,
        timestep: float,
        variant: str,
        steps: int,
        temperature: float | None,
        friction: float | None,
        jitter: float,
    ) -> None:
        if variant not in VARIANTS:
            raise ConfigError(f"variant {variant!r}{suggest(variant, VARIANTS)}")
        if atoms.calc is None:
            raise ConfigError("the atoms have no calculator: set atoms.calc to the true potential")
        if not (timestep > 0 and np.isfinite(timestep)) or steps < 1:
            raise ConfigError(f"timestep {timestep / units.fs:g} fs, {steps} steps; allowed: > 0 fs, 1 or more")
        if (variant == "D" or friction is not None) and not (temperature or 0) > 0:
            raise ConfigError(
                f"variant {variant} with friction {friction} needs a temperature above 0: pass temperature_K"
            )
        if friction is not None and not friction >= 0:
            raise ConfigError(f"friction {friction:g}; allowed: 0 or above, or None")
        if not 0 <= jitter < 1:
            raise ConfigError(f"jitter {jitter:g}; allowed: 0 to below 1")

    def _set_student(self, student: str | Path | Calculator | Jump) -> None:
        learned: LearnedJump | None = None
        field: ForceField | None = None
        if isinstance(student, str | Path):
            if inspect(student).kind == "jump":
                learned = LearnedJump.load(student)
            else:
                field = artifact_field(student, self._scratch)
        elif hasattr(student, "get_property"):
            field = calculator_field(student, self._scratch.copy())
        jumps = field is None
        if jumps and self.variant not in ("A1", "A2"):
            raise ConfigError(
                f"variant {self.variant} needs a student potential, got a jump: a jump is neither reversible nor "
                "volume preserving. Pass the artifact of a potential, or use variant A1 or A2"
            )
        self._student = field
        if field is not None:
            field(self._scratch.get_positions())  # refuses elements it does not know
            self._jump = flow(self._particles, field, self._h, self.steps)
        else:
            self._jump = student if learned is None else self._fitting(learned)  # type: ignore[assignment]

    def _fitting(self, learned: LearnedJump) -> Jump:
        """The jump as a function of positions and velocities, if it was made for this run."""
        learned.require(self._scratch.numbers, self._particles.masses, self._h, self.steps, self._constraints)

        def jump(x: FloatArray, v: FloatArray) -> Displacement:
            self._scratch.positions = x
            return learned(to_structure(self._scratch), v, self.temperature)

        return jump

    def _refuse_unsafe(self) -> None:
        """The rule of `mlff_engines.kstep.stability` at the present configuration."""
        student, x = self._student, self.atoms.get_positions()
        assert student is not None

        def residual(x: FloatArray) -> Evaluation:
            return Evaluation(0.0, self._field(x).forces - student(x).forces)

        with self.meter.purpose("check"):
            require_safe_student(
                student, residual, self._particles, [x], self.steps * self._h, self._h, self.friction or 0.0
            )

    def step(self, forces: Any = None) -> None:
        """One macro-step or proposal."""
        atoms = self.atoms
        x, v = atoms.get_positions(), atoms.get_velocities() * units.fs
        advance = {"A1": self._jump_and_correct, "A2": self._jump_and_correct, "C": self._respa, "D": self._propose}
        try:
            x, v, steps = advance[self.variant](x, v)
        except StructureError as error:  # a structure that no model can be asked about; elements are known here
            raise SimulationError(
                f"step {self.nsteps + 1}: {error}. Use a smaller step, or look at the forces"
            ) from error
        bad = np.flatnonzero(~(np.isfinite(x).all(1) & np.isfinite(v).all(1)))
        if len(bad):
            raise SimulationError(
                f"step {self.nsteps + 1}: position or velocity of atom {bad[0]} is not finite, and of {len(bad) - 1} "
                "more. Use a smaller step, or look at the student's forces"
            )
        atoms.set_positions(x, apply_constraint=False)
        atoms.set_momenta(self.masses * v / units.fs, apply_constraint=False)
        self._time += steps * self._h * units.fs

    def _jump_and_correct(self, x: FloatArray, v: FloatArray) -> tuple[FloatArray, FloatArray, int]:
        particles, k = self._particles, self.steps
        v = self._noise(x, v, (k + 1) * self._h / 2)
        displacement = self._jump(x, v)
        if displacement.clamped:
            self.counts.clamp_hits += displacement.clamped
            self.counts.fallbacks += 1
            with self.meter.purpose("fallback"):
                x, v, _ = trajectory(particles, x, v, self._field(x), self._field, self._h, k + 1)
        else:
            x, v = land(particles, x, v, displacement)
            x, v = correct(particles, x, v, self._field, self._h, "A1" if self.variant == "A1" else "A2")
        return x, self._noise(x, v, (k + 1) * self._h / 2), k + 1

    def _noise(self, x: FloatArray, v: FloatArray, dt: float) -> FloatArray:
        bath = self._bath()
        return v if bath is None else bath(self._particles, x, v, dt)

    def _bath(self) -> Bath | None:
        if self.friction is None:
            return None
        assert self.temperature is not None
        return Bath(self.temperature, self.friction, self.rng)

    def _respa(self, x: FloatArray, v: FloatArray) -> tuple[FloatArray, FloatArray, int]:
        assert self._student is not None
        if self._known is None or not np.array_equal(self._known[0], x):
            with self.meter.purpose("start"):
                self._known = x, Pair(self._field(x), self._student(x))
        here = self._known[1]
        x, v, here = respa(self._particles, x, v, here, self._field, self._student, self._h, self.steps, self._bath())
        self._known = x.copy(), here
        return x, v, self.steps

    def _propose(self, x: FloatArray, v: FloatArray) -> tuple[FloatArray, FloatArray, int]:
        student, temperature, particles = self._student, self.temperature, self._particles
        assert student is not None
        assert temperature is not None
        steps = jittered(self._length, self._jitter, self.rng)
        kept = 0.0 if self.friction is None else float(np.exp(-self.friction * steps * self._h))
        v = particles.refresh(x, v, temperature, kept, self.rng)

        def propose(x: FloatArray, v: FloatArray) -> tuple[FloatArray, FloatArray]:
            x, v, _ = trajectory(particles, x, v, student(x), student, self._h, steps)
            return x, v

        def energy(x: FloatArray) -> float:
            self._scratch.positions = x
            found: float = self.true.get_property("energy", self._scratch)
            return found

        with self.meter.purpose("start"):  # known but for the first time, or after somebody moved the atoms
            before = energy(x)
        memory = self.true.remember()
        outcome = metropolis(particles, x, v, before, propose, energy, temperature, self.rng)
        if not outcome.accepted:
            self.true.recall(memory)
        done = self.counts.burn_in_proposals
        if done < self._adaptation.proposals:
            self._length = self._adaptation.next(self._length, outcome.work, temperature, done)
            self.counts.burn_in_proposals += 1
        else:
            self.counts.proposals += 1
            self.counts.accepted += outcome.accepted
        self.counts.failed_proposals += int(np.isinf(outcome.work))
        return outcome.x, outcome.v, steps

    @property
    def trajectory_length(self) -> float:
        """Of D's proposals, in ASE's unit of time: what the burn-in has found."""
        length: float = self._length * self._h * units.fs
        return length

    def get_time(self) -> float:
        """Simulated so far, in ASE's unit of time; for D that of the student's trajectories."""
        return self._time

    def call_observers(self) -> None:
        """Loggers and trajectories; what they ask of the true potential is counted as theirs."""
        with self.meter.purpose("reporters"):
            super().call_observers()

    def _refresh_properties(self) -> None:
        """No force is computed for nobody."""

    def todict(self) -> dict[str, Any]:
        """For the header of trajectories."""
        return {**super().todict(), "variant": self.variant, "steps": self.steps}

    def save(self, path: str | Path) -> None:
        """Write all that is needed to go on, in one file that is replaced only when it is complete."""
        state = {
            "identity": self._identity(),
            "nsteps": self.nsteps,
            "time": self._time,
            "length": self._length,
            "counts": asdict(self.counts),
            "calls": dict(self.meter.by_purpose),
            "rng": self.rng.bit_generator.state,
        }
        arrays = {"positions": self.atoms.get_positions(), "momenta": self.atoms.get_momenta()}
        with replacing(Path(path)) as temporary, temporary.open("wb") as file:
            np.savez(file, state=json.dumps(state), **arrays)

    def restore(self, path: str | Path) -> None:
        """Go on from what `save` wrote, bit for bit.

        Raises:
            ConfigError: it cannot be read, or belongs to a run with other settings or atoms.
        """
        try:
            with np.load(Path(path)) as saved:
                state = json.loads(str(saved["state"]))
                positions, momenta = saved["positions"], saved["momenta"]
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"cannot restart from {path}: {error}. Start the run anew") from None
        ours, theirs = self._identity(), state["identity"]
        different = [f"{name} {theirs.get(name)} -> {ours[name]}" for name in ours if ours[name] != theirs.get(name)]
        if different:
            raise ConfigError(
                f"{path} belongs to another run: {'; '.join(different)}. Use the same settings, or start anew"
            )
        self.atoms.set_positions(positions, apply_constraint=False)
        self.atoms.set_momenta(momenta, apply_constraint=False)
        self.nsteps, self._time, self._length = state["nsteps"], state["time"], state["length"]
        self.counts = Counts(**state["counts"])
        self.meter.by_purpose.clear()
        self.meter.by_purpose.update(state["calls"])
        self.rng.bit_generator.state = state["rng"]
        self._known = None

    def _identity(self) -> dict[str, Any]:
        bonds = self._particles.constraints
        return {
            "variant": self.variant,
            "timestep_fs": self._h,
            "steps": self.steps,
            "temperature_K": self.temperature,
            "friction_per_fs": self.friction,
            "jitter": self._jitter,
            "burn_in": asdict(self._adaptation),
            "fixcm": self._particles.still,
            "numbers": self.atoms.numbers.tolist(),
            "masses": self._particles.masses.tolist(),
            "bonds": [] if bonds is None else bonds.pairs.tolist(),
        }
