"""Variant C in OpenMM: what `app.Simulation` steps a corrected student with."""

from __future__ import annotations

from typing import Any

import numpy as np
import openmm
from openmm import unit

from mlff_engines.errors import ConfigError
from mlff_engines.kstep.constraints import BondConstraints
from mlff_engines.kstep.particles import Evaluation, ForceField, Particles
from mlff_engines.kstep.stability import require_safe_student
from mlff_engines.structure import FloatArray
from mlff_engines.units import energy_unit, length_unit
from mlff_openmm.kstep.corrector import CORRECTION_GROUP, STUDENT_GROUP, meter_of

NM = length_unit("nm")  # Å
FORCE = energy_unit("kJ/mol") / NM  # kJ/mol/nm in eV/Å
TOLERANCE = 1e-8  # of constraints


def hybrid_integrator(
    system: openmm.System,
    macro_step: Any,
    inner_step: Any,
    *,
    positions: Any,
    temperature: Any = None,
    friction: Any = 1.0,
    seed: int | None = None,
    allow_unsafe: bool = False,
) -> openmm.CustomIntegrator:
    """Distilled RESPA: the student at `inner_step`, the true potential once per `macro_step`.

    >>> system = MLPotential("mlff", model="student.pt", corrector="ethanol.xml").createSystem(pdb.topology)
    >>> integrator = hybrid_integrator(system, 6 * femtoseconds, 1 * femtosecond, positions=pdb.positions)
    >>> simulation = app.Simulation(pdb.topology, system, integrator)

    One step of the integrator is one macro-step D: half a kick of D by true minus student, D/`inner_step` steps of the
    student, half a kick. RATTLE'd velocity Verlet without `temperature`, BAOAB-RESPA with (OpenMM's `MTSIntegrator` and
    `MTSLangevinIntegrator`). The true potential is evaluated once per macro-step; once more after positions were set
    from outside, or after something else was computed, such as an energy for a reporter. `mlff_openmm.meter_of(system)`
    counts.

    The macro-step is checked by the rule of `mlff_engines.kstep.stability` at `positions`: 24 true calls for each,
    counted as "check".

    Args:
        system: made with a `corrector`, see `mlff_openmm.potential.MLFFPotentialImpl`.
        macro_step, inner_step: Quantities, or ps; the first a multiple of the second.
        positions: (N, 3), Quantity or nm, or several such configurations (M, N, 3): of the simulation, if possible.
        temperature: Quantity or K; None conserves energy.
        friction: Quantity or 1/ps, with a temperature.
        seed: of the noise, 1 or more; None: OpenMM chooses.
        allow_unsafe: take a macro-step at a resonance all the same, to show what happens.

    Raises:
        ConfigError: no corrector, a macro-step that is no multiple or unsafe, or values out of range.
        OpenMMException: what the student or true potential raises at `positions`.
    """
    meter = meter_of(system)
    outer, inner = (_plain(value, unit.picosecond) for value in (macro_step, inner_step))
    steps = _whole(outer, inner)
    kelvin = None if temperature is None else _plain(temperature, unit.kelvin)
    damping = 0.0 if kelvin is None else _plain(friction, unit.picosecond**-1)
    if (kelvin is not None and not kelvin > 0) or damping < 0 or (seed is not None and seed < 1):
        raise ConfigError(
            f"temperature {kelvin} K, friction {damping:g}/ps, seed {seed}; allowed: temperature above 0 or None, "
            "friction 0 or above, seed 1 or more, or None"
        )
    if not allow_unsafe and steps > 1:
        with meter.purpose("check"):
            _require_safe(system, _plain(positions, unit.nanometer), 1e3 * outer, 1e3 * inner, 1e-3 * damping)
    return multiple_time_steps(outer, [(CORRECTION_GROUP, 1), (STUDENT_GROUP, steps)], kelvin, damping, seed)


def multiple_time_steps(
    step: float, groups: list[tuple[int, int]], kelvin: float | None, friction: float, seed: int | None = None
) -> openmm.CustomIntegrator:
    """RATTLE'd velocity Verlet or, at a temperature, BAOAB, with velocities on step, of one or nested force groups.

    Args:
        step: ps, of the whole.
        groups: force groups, and how often each is evaluated in it.
        kelvin, friction: K and 1/ps.
    """
    if kelvin is None:
        integrator = openmm.MTSIntegrator(step, groups)
    else:
        bath = kelvin * unit.kelvin, friction / unit.picosecond
        integrator = openmm.MTSLangevinIntegrator(*bath, step * unit.picosecond, groups)
        if seed is not None:
            integrator.setRandomNumberSeed(seed)
    integrator.setConstraintTolerance(TOLERANCE)
    return integrator


def particles_of(system: openmm.System) -> Particles:
    """Masses and constraints, for `mlff_engines.kstep`; with a `CMMotionRemover`, noise carries no net momentum."""
    count = system.getNumParticles()
    masses = np.array([system.getParticleMass(i).value_in_unit(unit.dalton) for i in range(count)])
    found = [system.getConstraintParameters(i) for i in range(system.getNumConstraints())]
    still = any(isinstance(force, openmm.CMMotionRemover) for force in system.getForces())
    if not found:
        return Particles(masses, still=still)
    lengths = [length.value_in_unit(unit.nanometer) * NM for _, _, length in found]
    return Particles(masses, BondConstraints([(i, j) for i, j, _ in found], lengths, masses), still)


def _require_safe(system: openmm.System, positions: FloatArray, macro: float, inner: float, friction: float) -> None:
    """Lengths of steps in fs, friction in 1/fs."""
    context = openmm.Context(system, openmm.VerletIntegrator(0.0), openmm.Platform.getPlatform("Reference"))
    configurations = []
    for x in positions.reshape(-1, system.getNumParticles(), 3):
        context.setPositions(x)
        context.applyConstraints(TOLERANCE)
        met = context.getState(positions=True).getPositions(asNumpy=True)
        configurations.append(met.value_in_unit(unit.nanometer) * NM)
    student, residual = (_field(context, group) for group in (STUDENT_GROUP, CORRECTION_GROUP))
    require_safe_student(student, residual, particles_of(system), configurations, macro, inner, friction)


def _field(context: openmm.Context, group: int) -> ForceField:
    def evaluate(x: FloatArray) -> Evaluation:
        context.setPositions(x / NM)
        state = context.getState(forces=True, groups={group})
        forces = state.getForces(asNumpy=True).value_in_unit(unit.kilojoules_per_mole / unit.nanometer)
        return Evaluation(0.0, forces * FORCE)

    return evaluate


def _whole(outer: float, inner: float) -> int:
    steps = round(outer / inner) if inner > 0 else 0
    if steps < 1 or abs(steps * inner / outer - 1) > 1e-9:
        raise ConfigError(
            f"macro_step {1e3 * outer:g} fs is no multiple of inner_step {1e3 * inner:g} fs; allowed: 1, 2, 3, ... "
            "times the inner step, for example 6 fs and 1 fs"
        )
    return steps


def _plain(value: Any, wanted: Any) -> Any:
    """The number of a Quantity in `wanted`; a number as it is."""
    if unit.is_quantity(value):
        value = value.value_in_unit(wanted)
    return float(value) if np.ndim(value) == 0 else np.asarray(value, dtype=np.float64)
