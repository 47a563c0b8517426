"""Large steps with a dear potential in ASE: wall-clock and energy drift beside Verlet's.

python examples/benchmarks/large_steps_ase.py student.pt
python examples/benchmarks/large_steps_ase.py small.pt --system water-192 --true large.pt

The student is one of the true potential; same_accuracy.py, beside this file, makes one of GFN2-xTB for aspirin, and
large_steps_water.yaml says how to get one of flexible TIP3P for a box of water. From each start every scheme runs at
constant energy, in turns of `TURN` fs, so that whatever else the machine does hits all alike. Repeat the command to go
on after an interruption: starts that are done are kept.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms, units
from ase.calculators.calculator import Calculator
from ase.io import read
from ase.md.velocitydistribution import thermalize_momenta

from mlff_ase import KStepDynamics, MLFFCalculator
from mlff_engines.bench.page import fill, machine
from mlff_engines.bench.systems import named
from mlff_engines.errors import ConfigError, SimulationError
from mlff_engines.files import replacing, sha256_of
from mlff_training.teachers.config import TeacherConfig
from mlff_training.teachers.make import make_teacher

TEMPERATURE = 300.0  # K
SETTLING = 5000.0  # fs
TURN = 480.0  # fs: whole macro-steps of every scheme
VERLET = "Verlet"
XTB = "gfn2-xtb"


@dataclass(frozen=True)
class Scheme:
    """Variant C, or with a macro-step of one inner step velocity Verlet, whatever the student.

    Attributes:
        inner, macro: fs.
        rigid: bonds to hydrogen are constrained.
    """

    inner: float
    macro: float
    rigid: bool = True

    @property
    def name(self) -> str:
        kind = VERLET if self.inner == self.macro else "C"
        return f"{kind} {self.macro:g} fs, {'bonds to H rigid' if self.rigid else 'all free'}"


SCHEMES = [
    Scheme(1.0, 1.0, rigid=False),
    *(Scheme(h, h) for h in (1.0, 2.0, 3.0)),
    *(Scheme(0.5, macro, rigid=False) for macro in (2.0, 3.0)),
    *(Scheme(1.0, macro) for macro in (4.0, 6.0, 8.0)),
]

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("student", type=Path)
parser.add_argument("--system", default="aspirin", help="or water-N with N atoms")
parser.add_argument("--true", default=XTB, help="true potential: a teacher, or an artifact (default: %(default)s)")
parser.add_argument("--start", type=Path, help="structure file in place of SYSTEM's own positions")
parser.add_argument("-o", "--out", type=Path, help="default: runs/large_steps_SYSTEM")
parser.add_argument("--starts", type=int, default=4)
parser.add_argument("--picoseconds", type=float, default=10.0, help="of each scheme from each start")
parser.add_argument("--page", type=Path, help="put the table between the markers of this page")


def section(system: str) -> str:
    """Of the page."""
    return f"large steps, {system}"


def true_potential(given: str) -> Calculator:
    """A new one for each run: calculators remember."""
    if Path(given).is_file():
        return MLFFCalculator(given, outside="ignore")
    return make_teacher(TeacherConfig(name=given))


def started(system: str, start: Path | None, true: str, student: Path, seed: int) -> Atoms:
    """At `TEMPERATURE`, as far as the true potential knows, or the student where that takes too long."""
    structure = named(system).structure
    atoms = Atoms(structure.numbers, structure.positions, cell=structure.cell, pbc=structure.pbc)
    if start is not None:
        atoms.positions = read(start).positions
    atoms.calc = true_potential(str(student) if true == XTB else true)
    thermalize_momenta(atoms, temperature_K=TEMPERATURE, rng=np.random.default_rng(seed))
    settling = KStepDynamics(
        atoms, units.fs, student, steps=1, temperature_K=TEMPERATURE, friction=0.01 / units.fs, constraints="hbonds",
        seed=seed,
    )  # fmt: skip
    settling.run(round(SETTLING))
    atoms.set_constraint()
    return atoms


def run_all(begin: Atoms, true: str, student: Path, seed: int, length: float) -> dict[str, dict[str, Any]]:
    """Of each scheme: time in fs and true total energy in eV after every macro-step; seconds and true calls in all."""
    found: dict[str, dict[str, Any]] = {
        s.name: {"time": [], "energy": [], "seconds": 0.0, "problem": ""} for s in SCHEMES
    }
    running: dict[str, KStepDynamics] = {}
    for scheme in SCHEMES:
        atoms = begin.copy()
        atoms.calc = true_potential(true)
        try:
            running[scheme.name] = KStepDynamics(
                atoms, scheme.inner * units.fs, student, steps=round(scheme.macro / scheme.inner),
                constraints="hbonds" if scheme.rigid else "none",
            )  # fmt: skip
        except ConfigError as error:  # a macro-step that is refused is a result
            found[scheme.name]["problem"] = f"refused: {error}"
    turns = round(1e3 * length / TURN)
    for turn in range(turns):
        for scheme in SCHEMES:
            dynamics, record = running.get(scheme.name), found[scheme.name]
            if dynamics is None:
                continue
            begun = time.perf_counter()
            try:
                for _ in range(round(TURN / scheme.macro)):
                    dynamics.run(1)
                    record["time"].append(dynamics.get_time() / units.fs)
                    record["energy"].append(dynamics.atoms.get_total_energy())  # known: no call
            except SimulationError as error:
                record["problem"] = f"failed after {dynamics.get_time() / units.fs:.0f} fs: {error}"
                del running[scheme.name]
            record["seconds"] += time.perf_counter() - begun
            record["calls"] = dynamics.meter.by_purpose["dynamics"]
        print(f"start {seed}: {(turn + 1) * TURN / 1e3:.2f} of {turns * TURN / 1e3:.2f} ps", flush=True)
    return found


def summary(scheme: Scheme, runs: Sequence[dict[str, Any]], atoms: int) -> dict[str, Any]:
    """Drift in meV/atom/ps and its standard error over the starts, rms fluctuation about it in meV; costs per ps."""
    problems = [run["problem"] for run in runs if run["problem"]]
    if problems:
        return {"scheme": scheme.name, "problem": f"{len(problems)} of {len(runs)} {problems[0]}"}
    fits = [np.polynomial.Polynomial.fit(run["time"], run["energy"], 1) for run in runs]
    slopes = np.array([1e6 * fit.convert().coef[1] / atoms for fit in fits])
    residues = [np.std(run["energy"] - fit(np.array(run["time"]))) for run, fit in zip(runs, fits, strict=True)]
    picoseconds = sum(run["time"][-1] for run in runs) / 1e3
    return {
        "scheme": scheme.name,
        "drift": float(slopes.mean()),
        "error": float(slopes.std(ddof=1) / np.sqrt(len(runs))) if len(runs) > 1 else float("nan"),
        "fluctuation": 1e3 * float(np.mean(residues)),
        "seconds": sum(run["seconds"] for run in runs) / picoseconds,
        "calls": sum(run["calls"] for run in runs) / picoseconds,
    }


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Of `summary`, and how much faster than the first of them each is."""
    lines = [
        "| scheme | true calls per ps | s per ps | speed-up | drift, meV/atom/ps | fluctuation of the energy, meV |",
        "|---|---|---|---|---|---|",
    ]
    plain = next((row["seconds"] for row in rows if "seconds" in row), 0.0)
    for row in rows:
        if "problem" in row:
            lines.append(f"| {row['scheme']} | | | | {row['problem'].split(': ')[0]} | |")
            continue
        lines.append(
            f"| {row['scheme']} | {row['calls']:.0f} | {row['seconds']:.1f} | {plain / row['seconds']:.1f} "
            f"| {row['drift']:.2f} ± {row['error']:.2f} | {row['fluctuation']:.1f} |"
        )
    return lines


def main() -> None:
    """Run what is missing, then tell."""
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    system, student, true, length = arguments.system, arguments.student, arguments.true, arguments.picoseconds
    out = arguments.out or Path("runs") / f"large_steps_{system}"
    files = {"student": student, "start": arguments.start, "true": Path(true) if Path(true).is_file() else None}
    hashes = {name: sha256_of(file) for name, file in files.items() if file is not None}
    wanted = {"system": system, "picoseconds": length, "true": true} | hashes
    runs = []
    for seed in range(arguments.starts):
        file = out / f"start-{seed}.json"
        made = json.loads(file.read_text()) if file.is_file() else {}
        if made.get("settings") != wanted:
            begin = started(system, arguments.start, true, student, seed)
            made = {"settings": wanted, "runs": run_all(begin, true, student, seed, length)}
            with replacing(file) as temporary:
                temporary.write_text(json.dumps(made))
        runs.append(made["runs"])
    atoms = len(named(system).structure)
    rows = [summary(scheme, [run[scheme.name] for run in runs], atoms) for scheme in SCHEMES]
    with replacing(out / "report.json") as temporary:
        temporary.write_text(json.dumps({"settings": wanted, "starts": arguments.starts, "rows": rows}, indent=1))
    lines = table(rows)
    print("\n".join(lines))
    if arguments.page is not None:
        fill(arguments.page, section(system), "\n".join([machine(), "", *lines]))


if __name__ == "__main__":
    main()
