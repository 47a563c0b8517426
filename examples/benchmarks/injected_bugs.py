"""Which checks notice which bug in the engine of a student: each bug is put around it in turn, and the judge looks.

PYTHONPATH=tests python examples/benchmarks/injected_bugs.py runs/ethanol/student.pt

Prints a table. The student runs in float64 in the engine of the core, so that a figure beyond its tolerance is the
bug's alone; the bugs are those of `tests/broken_engines.py` and `tests/broken_dynamics.py`. Minutes for a molecule.
Students that take a charge or spin are not supported.
"""

import argparse
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import broken_dynamics
import broken_engines
from mlff_engines.artifact import Artifact, load
from mlff_engines.validation.builtin import System, builtin_systems, named_system
from mlff_engines.validation.core_engine import CoreEngine
from mlff_engines.validation.dynamics.constant_energy import Options, check_dynamics, starting
from mlff_engines.validation.dynamics.replicas import EnsembleOptions, equilibrate
from mlff_engines.validation.engine import Dynamics
from mlff_engines.validation.result import STATIC, CheckResult, Claims
from mlff_engines.validation.static.conformance import FEW, check_model
from mlff_engines.validation.static.parity import reference

RIGHT, TRUNCATED = "none", "cutoff truncated, no envelope"
BUGS = (
    RIGHT,
    TRUNCATED,
    "stale neighbour list",
    "neighbour list updated too rarely",
    "0.1 % non-conservative force",
    "1 % non-conservative force",
    "wrong sign of the virial",
    "two species swapped",
    "positions in nm for Å",
    "energy and force unit off by 1.0005",
    "energy unit off by 1.0005",
    "energy summed in float32",
)
CHECKS = (*STATIC, "M1", "M2", "M3")
SETTLING, FRICTION = 500, 20.0  # steps, 1/ps


def settled(student: Artifact, system: System, folder: Path) -> Dynamics:
    """Where dynamics starts: at rest with its surroundings, as in `mlff validate`."""
    core = CoreEngine(student.evaluator(outside="ignore"))
    start = starting(core, system.structure, system.temperature)
    warm = replace(start, temperature=system.temperature, friction=FRICTION)
    return starting(
        core, equilibrate(core, warm, EnsembleOptions(equilibration=SETTLING), folder).structure, system.temperature
    )


def judged(
    bug: str,
    student: Artifact,
    start: Dynamics,
    folder: Path,
    options: Options | None = None,
    only: Collection[str] = CHECKS,
) -> Iterator[CheckResult]:
    """Static checks and M1-M3 of the student with one bug."""
    claims = replace(Claims.of(student.manifest), dtype="float64")
    # a kernel has its envelope in tables, where it cannot be taken away
    own = student.eager() if bug == TRUNCATED else student.module
    broken, faithful = CoreEngine(broken_engines.evaluator(own, claims)), None
    if bug in broken_engines.BUGS:
        made = broken_engines.BUGS[bug].make(own, claims)
        broken, faithful = CoreEngine(made.evaluate), made.model_is_wrong
    elif bug != RIGHT:
        broken = broken_dynamics.BUGS[bug].make(own, claims)
    core = CoreEngine(broken_engines.evaluator(faithful or student.module, claims))
    if bug in (RIGHT, *broken_engines.BUGS):
        found = {name: s.structure for name, s in builtin_systems(student).items() if len(s.structure) <= FEW}
        expected = reference(faithful or student.eager(), claims.cutoff)
        yield from check_model(broken.evaluate, claims, reference=expected, structures=found, only=only)
    moving = [code for code in only if code not in STATIC]
    yield from check_dynamics(broken, core, start, folder, options, only=moving)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path)
    parser.add_argument("--system", help="built-in system for dynamics (default: the first)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    student = load(arguments.student, dtype="float64")
    systems = builtin_systems(student)
    system = named_system(arguments.system, student) if arguments.system else next(iter(systems.values()))
    print("| bug | static checks that fail | dynamics checks that fail |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, np.errstate(all="ignore"):  # some explode
        start = settled(student, system, Path(folder))
        for bug in BUGS:
            results = list(judged(bug, student, start, Path(folder)))
            failed = [result.code for result in results if result.verdict == "fail"]
            static, moving = (
                ", ".join(code for code in failed if (code in STATIC) is kind) or "-" for kind in (True, False)
            )
            print(f"| {bug} | {static} | {moving} |", flush=True)


if __name__ == "__main__":
    main()
