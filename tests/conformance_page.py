"""docs/conformance.md: every check, and the bugs that it is known to catch.

python tests/conformance_page.py            # is the page up to date?
python tests/conformance_page.py --write    # write it anew
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import broken_adapters
import broken_dynamics
import broken_engines
from mlff_engines.validation import lifecycle, result
from mlff_engines.validation.dynamics import constant_energy
from requirements import REPOSITORY

PAGE = REPOSITORY / "docs" / "conformance.md"

TEMPLATE = """\
# The judge

`mlff validate student.pt --engines ase,openmm,lammps -o DIR` runs the checks below on every engine and writes
`DIR/report.html`. The same from Python, in `mlff_engines.validation`: `run.validate`; on a model or an engine of one's
own, given as a callable from `Structure` to `Result`: `static.conformance.check_model`; on an adapter:
`dynamics.constant_energy.check_dynamics` and `lifecycle.check_adapter`.

A verdict is *pass*, *fail* or *inconclusive*: data that could not have shown a fault are no pass.

## Static checks

Energies and virials in eV per atom, forces in eV/Å, relative to the largest force or virial where that is above 1; S3
in units of the finite difference's own uncertainty, S4 relative to the largest component, S8 in wrong edges. A float32
model is upcast for S3. Energies may besides differ by their rounding in float64. What an engine does not offer (OpenMM:
virial and per-atom energies) is not compared.

| | check | float64 | float32 |
|---|---|---|---|
{static}

## Dynamics

M1: distance of the ratio from 4; M2 and M3 in Å; M4 in meV/atom/ps, and within 3 standard errors of the eager model.
M5-M7 have limits that follow from the data: see `ensembles.py`, `temperatures.py` and `stability.py`.

| | check | float64 | float32 |
|---|---|---|---|
{moving}
| M5 | {names[M5]} | replicas | replicas |
| M6 | {names[M6]} | 3 sigma | 3 sigma |
| M7 | {names[M7]} | none breaks | none breaks |

## Lifecycle

D2 and D3 in Å, Å/fs and eV per atom, D4 in any of them, D5 in MiB. D1 is LAMMPS' own, D6 OpenMM's.

| | check | float64 | float32 |
|---|---|---|---|
| D1 | {names[D1]} | 1e-08 | 5e-05 |
{lifecycle}
| D6 | {names[D6]} | 1e-08 | 5e-05 |

## Bugs that the static checks catch

Each bug is put into a right engine by `tests/broken_engines.py`, in float64, for Lennard-Jones and for PaiNN with
random weights. Listed are the checks that fail for both; others may fail besides. S1 and S2 compare with the eager
model; the others need the engine alone, and so find a wrong model that its engine reproduces faithfully: the first row
is such a one. A unit that is off in energy and force alike shows in nothing but the comparison and the E0s.

| bug | caught by |
|---|---|
{static_bugs}

## Bugs that M1-M3 catch

The same bugs, and some of integrators, behind velocity Verlet (`tests/broken_dynamics.py`): a hot liquid of two noble
gases, and PaiNN with random weights. *Missed* are checks that are known to pass in spite of the bug.

M1 asks for a smooth potential, and so can fail a right engine on a perfect crystal: by symmetry PaiNN's vectors vanish
there, and their length has a cusp, rounded within 1e-4 of it. Start from a structure that is off its lattice sites.

| bug | caught by | missed by |
|---|---|---|
{moving_bugs}

## Bugs around a trained student

The student of the quick start (PaiNN for ethanol in vacuum, 64 features, 3 layers, cutoff 5 Å) with the bugs of the two
tables above, by `examples/benchmarks/injected_bugs.py`, which makes this table for any student; every check that fails
is listed. `tests/validation/test_student_bugs.py` does the same with a small student of noble gases.

| bug | static checks that fail | of M1-M3 |
|---|---|---|
{student_bugs}

Ethanol hardly reaches beyond the cutoff, so in its dynamics nothing shows of a cutoff without an envelope nor of stale
neighbours: the structures of the static checks are there for that.

## Bugs in each adapter

Put where such a bug would live (`tests/broken_adapters.py`): in the Python of the ASE, OpenMM and ML-IAP adapters, in
the C++ of the LAMMPS plug-in, in the settings of a deck. The model is Lennard-Jones for argon and krypton, as an
artifact; forces that are not conservative are the artifact's. Listed are checks that
`tests/adapters/test_injected_bugs.py` holds to fail; the right adapters pass all of them. OpenMM asks no force for its
virial.

| bug | {adapters} |
|---|{rules}
{adapter_bugs}

\\* The adapter itself refuses to go on.

## Wrong models that published thresholds pass

Liquid argon, 108 atoms at 94.4 K, four replicas each of the right model and of a wrong one, for three sets of seeds and
the one of `tests/validation/test_ensembles.py`. MLIPAudit passes a radial distribution function within 0.1 root mean
square of its reference; with the seeds of the test, that of the right model is 0.008 off.

| wrong model | rms difference of g(r) | MLIPAudit | M5 | M6 |
|---|---|---|---|---|
| σ + 0.5 % | ≤ 0.028 | passes | fails 4 of 4 | not asked |
| T + 2 K | ≤ 0.008 | passes | fails 4 of 4 | fails 3 of 3 |

Written by `python tests/conformance_page.py --write`.
"""

# as examples/benchmarks/injected_bugs.py printed them: bug -> static checks, checks of dynamics
STUDENT = {
    "cutoff truncated, no envelope": ("S3 S7", ""),
    "stale neighbour list": ("S1 S3 S4 S5 S6", ""),
    "neighbour list updated too rarely": ("", ""),
    "0.1 % non-conservative force": ("S1 S2 S3 S4", "M1 M3"),
    "1 % non-conservative force": ("S1 S2 S3 S4", "M1 M3"),
    "wrong sign of the virial": ("S1 S2 S4", ""),
    "two species swapped": ("S1 S2 S9", "M1 M3"),
    "positions in nm for Å": ("S1 S2 S3 S6 S7", "M2 M3"),
    "energy and force unit off by 1.0005": ("S1 S2 S9", "M3"),
    "energy unit off by 1.0005": ("S1 S2 S3 S4 S9", "M1 M3"),
    "energy summed in float32": ("S1 S2 S3 S4 S5 S7 S9 S10", "M3"),
}

ADAPTERS = {
    "ase": "ASE",
    "openmm": "OpenMM",
    "lammps": "LAMMPS plug-in",
    "lammps-mliap": "LAMMPS ML-IAP",
}


def page() -> str:
    """The text of docs/conformance.md."""
    return TEMPLATE.format(
        names=result.NAMES,
        static=_checks(result.TOLERANCES),
        moving=_checks(constant_energy.TOLERANCES),
        lifecycle=_checks(lifecycle.TOLERANCES),
        static_bugs="\n".join(
            f"| {name}{_where(bug)} | {bug.caught.replace(' ', ', ')} |" for name, bug in broken_engines.BUGS.items()
        ),
        moving_bugs="\n".join(
            f"| {name}{_where(bug)} | {bug.caught.replace(' ', ', ')} | {bug.missed.replace(' ', ', ')} |"
            for name, bug in broken_dynamics.BUGS.items()
        ),
        student_bugs="\n".join(
            f"| {name} | {_list(static)} | {_list(moving)} |" for name, (static, moving) in STUDENT.items()
        ),
        adapters=" | ".join(ADAPTERS.values()),
        rules="---|" * len(ADAPTERS),
        adapter_bugs="\n".join(
            f"| {name} | {' | '.join(_adapter(cases.get(engine)) for engine in ADAPTERS)} |"
            for name, cases in broken_adapters.BUGS.items()
        ),
    )


def _checks(tolerances: Mapping[str, Mapping[Any, float]]) -> str:
    return "\n".join(
        f"| {code} | {result.NAMES[code]} | {t['float64']:g} | {t['float32']:g} |" for code, t in tolerances.items()
    )


def _list(codes: str) -> str:
    return codes.replace(" ", ", ") or "-"


def _adapter(bug: broken_adapters.Bug | None) -> str:
    return "-" if bug is None else _list(bug.caught) + ("*" if bug.refusal else "")


def _where(bug: broken_engines.Bug | broken_dynamics.Bug) -> str:
    return "" if bug.models == tuple(broken_engines.MODELS) else f" ({', '.join(bug.models)} only)"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page(), encoding="utf-8")
    sys.exit(PAGE.read_text(encoding="utf-8") != page())
