"""A subject of the benchmark in a process of its own, asked for samples over a pipe.

It runs in other packages' environments too, where mlff_engines is not installed: nothing of it is imported here. A
subject is a module, or a file, with

    open_subject(what: str, options: dict) -> (prepare, about)

where `about` holds versions and settings, and `prepare(system)` makes the work on one system (a dictionary, see
`mlff_engines.bench.systems.System.plain`). That is a function of no argument: one call is one evaluation; or it
returns (wall, cpu) seconds of one of many that it has timed itself.

A request and its answer are a line of JSON each, on standard input and standard output:

| request                                      | answer                                                              |
|----------------------------------------------|---------------------------------------------------------------------|
| {"do": "open", "subject", "what", "options"} | {"about"}                                                           |
| {"do": "prepare", "system"}                  | {"seconds"}: of a call, after some to warm up                       |
| {"do": "sample", "seconds"}                  | {"wall", "cpu"}: of each call, in ms; {"rss_mb", "base_mb"}         |

An error is answered by {"error"}.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

WARM_UP = 0.2  # s
MOST = 1000  # calls in one sample
# steps that are timed together: some rebuilds of a neighbour list are among them. Fewer where a step takes over SLOW
STEPS, FEW_STEPS, SLOW = 20, 5, 1.0  # s

Work = Callable[[], Any]


def kept(path: Path, make: Callable[[Path], Any]) -> Path:
    """`path`, written by `make` unless it is there; under another name at first, so that nobody reads half of it."""
    if not path.is_file():
        temporary = path.with_name(f"{os.getpid()}-{path.name}")
        make(temporary)
        temporary.rename(path)
    return path


def measured(work: Work) -> tuple[float, float]:
    """Seconds of one call by the clock and of the processor."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    if isinstance(found, tuple):
        return float(found[0]), float(found[1])
    return time.perf_counter() - wall, time.process_time() - cpu


def ase_steps(calculator: Any, system: dict[str, Any]) -> Work:
    """Steps of ASE's velocity Verlet, always the same ones; the first of all, which begins everything, is not timed."""
    ase, verlet, units = (importlib.import_module(name) for name in ("ase", "ase.md.verlet", "ase.units"))
    atoms = ase.Atoms(system["numbers"], system["positions"], cell=system["cell"], pbc=system["pbc"])
    atoms.set_masses(system["masses"])
    atoms.calc = calculator
    start, velocities = atoms.get_positions(), [[v / units.fs for v in row] for row in system["velocities"]]
    slow = [0.0]

    def work() -> tuple[float, float]:
        atoms.set_positions(start)
        atoms.set_velocities(velocities)
        integrator = verlet.VelocityVerlet(atoms, system["timestep"] * units.fs)
        first = time.perf_counter()
        integrator.run(1)
        slow[0] = slow[0] or (time.perf_counter() - first) / 2
        steps = FEW_STEPS if slow[0] > SLOW else STEPS
        wall, cpu = time.perf_counter(), time.process_time()
        integrator.run(steps)
        return (time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps

    return work


class Memory:
    """Resident memory of this process and its children, whichever has most, in MB (10^6 bytes)."""

    def __init__(self) -> None:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self.base = self._largest("VmRSS")

    def peak(self) -> float:
        """Since this was made."""
        return self._largest("VmHWM")

    @staticmethod
    def _largest(key: str) -> float:
        found, pids = [0.0], [str(os.getpid())]
        for pid in pids:
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{pid}/status").read_text()
                found += [int(line.split()[1]) * 1.024e-3 for line in status.splitlines() if line.startswith(key)]
                pids += Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return max(found)


class Server:
    """The state between requests."""

    def open(self, subject: str, what: str, options: dict[str, Any]) -> dict[str, Any]:
        """Load the subject."""
        if subject.endswith(".py"):
            spec = importlib.util.spec_from_file_location(f"subject_{Path(subject).stem}", subject)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(subject)
        self.prepare_work, about = module.open_subject(what, options)
        return {"about": about}

    def prepare(self, system: dict[str, Any]) -> dict[str, Any]:
        """Make the work on `system`, and warm up."""
        self.work: Work | None = None
        gc.collect()
        self.memory = Memory()
        self.work = self.prepare_work(system)
        measured(self.work)
        begun, last = time.perf_counter(), 0.0
        while not last or time.perf_counter() - begun < WARM_UP:
            last = measured(self.work)[0]
        return {"seconds": last}

    def sample(self, seconds: float) -> dict[str, Any]:
        """Calls for `seconds`, one at least."""
        assert self.work is not None
        found: list[tuple[float, float]] = []
        begun = time.perf_counter()
        while not found or (time.perf_counter() - begun < seconds and len(found) < MOST):
            found.append(measured(self.work))
        wall, cpu = ([1e3 * value for value in column] for column in zip(*found, strict=True))
        return {"wall": wall, "cpu": cpu, "rss_mb": self.memory.peak(), "base_mb": self.memory.base}


def main() -> None:
    """Serve until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever others print goes to the log
    server = Server()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(server, request.pop("do"))(**request)
        except Exception as error:
            traceback.print_exc()  # into the log
            said = str(error).strip().splitlines() or [""]
            answer = {"error": f"{type(error).__name__}: {said[0]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    sys.modules["worker"] = sys.modules["__main__"]  # by this name subjects import it, also where it is no module
    main()
