"""The measurement: workers kept alive and asked in turn, so that whatever else the machine does hits all alike."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlff_engines.bench import worker
from mlff_engines.bench.rows import Row, read_rows, row_of, write_rows
from mlff_engines.bench.systems import System
from mlff_engines.errors import ConfigError, MLFFError
from mlff_engines.files import replacing

Echo = Callable[[str], None]
# read once, when a library is loaded
THREAD_LIMITS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
AT_LEAST = 3  # rounds
OPENING = 900.0  # s, until a subject must be there; some compile
WAITING = 120.0  # s, beyond what a sample should take


@dataclass(frozen=True)
class Subject:
    """One thing to time.

    Attributes:
        what: its name in the rows; with a slash where it is more than a model alone.
        module: module or file, see `mlff_engines.bench.worker`.
        level: what of it.
        options: for it.
        python: the interpreter.
        environment: more environment variables.
        missing: why it cannot be timed at all.
        note: what the page should say of it.
        constant: whether it takes as long whatever the system is.
    """

    what: str
    module: str = ""
    level: str = "model"
    options: dict[str, Any] = field(default_factory=dict)
    python: str = sys.executable
    environment: dict[str, str] = field(default_factory=dict)
    missing: str | None = None
    note: str | None = None
    constant: bool = False

    @property
    def stepping(self) -> bool:
        """Whether a sample is a burst of MD steps."""
        return self.level not in ("model", "evaluator")


@dataclass(frozen=True)
class Plan:
    """How to measure.

    Attributes:
        systems: names, see `mlff_engines.bench.systems`.
        threads: numbers of threads, one after another.
        rounds: in which every subject is asked for one sample.
        sample: seconds that a sample takes at least.
        budget: seconds after which a subject is asked no more on one system, `AT_LEAST` rounds apart.
        patience: seconds of the longest sample; a subject that will take longer, by its time for fewer atoms, is
            left out.
    """

    systems: tuple[str, ...]
    threads: tuple[int, ...] = (1,)
    rounds: int = 12
    sample: float = 0.3
    budget: float = 60.0
    patience: float = 90.0


class Worker:
    """A subject in its process.

    Raises:
        MLFFError: it cannot be opened; with its words.
    """

    def __init__(self, subject: Subject, threads: int, log: Path, memory: int | None) -> None:
        self.subject, self.log = subject, log
        clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        limits = dict.fromkeys(THREAD_LIMITS, str(threads))
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [subject.python, "-P", worker.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**clean, **limits, **subject.environment},
                text=True,
            )
        if memory is not None:  # an allocation fails, and the machine does not fall
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(self.process.pid, resource.RLIMIT_DATA, (memory, memory))
        try:
            self.about: dict[str, Any] = self.ask(
                OPENING, do="open", subject=subject.module, what=subject.level, options=subject.options
            )["about"]
        except MLFFError:
            self.close()
            raise

    def ask(self, patience: float, **request: Any) -> dict[str, Any]:
        """The answer to a request, within `patience` seconds.

        Raises:
            MLFFError: the worker died, was too slow, or says that it cannot.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        late, begun = threading.Timer(patience, self.process.kill), time.monotonic()
        late.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.write(json.dumps(request) + "\n")
                self.process.stdin.flush()
            line = self.process.stdout.readline()
        finally:
            late.cancel()
        if not line:
            code = self.process.wait()
            said = [text for text in self.log.read_text(errors="replace").splitlines() if text.strip()]
            slow = time.monotonic() - begun >= patience
            why = f"no answer within {patience:.0f} s" if slow else f"exit code {code}"
            raise MLFFError(f"its process ended ({why})" + "".join(f": {last}" for last in said[-1:]))
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise MLFFError(answer["error"])
        return answer

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return self.process.poll() is None

    def close(self) -> None:
        """End it."""
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def measure(plan: Plan, subjects: Sequence[Subject], systems: Sequence[System], out: Path, echo: Echo) -> list[Row]:
    """Time all subjects on all systems, the smallest first; repeat it to go on after an interruption.

    Args:
        plan: how.
        subjects: what.
        systems: those of the plan.
        out: the folder for `rows.json`, `plan.json`, `about.json` and logs.
        echo: gets lines of progress.

    Raises:
        ConfigError: `out` holds the rows of another plan.
    """
    _claim(plan, subjects, out)
    file, ordered = out / "rows.json", sorted(systems, key=lambda system: len(system.structure))
    rows = read_rows(file)
    for threads in plan.threads:
        done = {row.system for row in rows if row.threads == threads}
        pending = [system for system in ordered if system.name not in done]
        if not pending:
            continue
        with contextlib.ExitStack() as stack:
            workers: dict[str, Worker | str] = {}
            with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
                opened = pool.map(lambda subject, n=threads: _start(subject, n, out), subjects)
                for subject, found in zip(subjects, opened, strict=True):
                    echo(f"{threads} thread{'s' * (threads > 1)}: opened {subject.what}")
                    workers[subject.what] = found
                    if isinstance(found, Worker):
                        stack.callback(found.close)
            _note(out, workers)
            for system in pending:
                before = {row.what: row for row in rows if row.threads == threads}  # the last is the largest so far
                rows += _on_one_system(plan, subjects, workers, system, threads, before, echo)
                write_rows(file, rows)
    return rows


def _claim(plan: Plan, subjects: Sequence[Subject], out: Path) -> None:
    """The folder is for this plan, or becomes so."""
    wanted = json.loads(json.dumps({**asdict(plan), "what": [subject.what for subject in subjects]}))
    path = out / "plan.json"
    if path.is_file():
        found = json.loads(path.read_text())
        if found != wanted:
            other = [name for name in wanted if found.get(name) != wanted[name]]
            raise ConfigError(
                f"{out} holds a benchmark with other {', '.join(other)}: choose another folder, or pass --overwrite"
            )
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(wanted, indent=1))


def _start(subject: Subject, threads: int, out: Path) -> Worker | str:
    """The worker, or why there is none."""
    if subject.missing is not None:
        return subject.missing
    log = out / "logs" / f"{subject.what.replace('/', '-')}-{threads}.txt"
    try:
        return Worker(subject, threads, log, _memory())
    except MLFFError as error:
        return str(error)


def _memory() -> int | None:
    """Bytes that one worker may take: what is free now less a reserve; None where that is not told."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
        return int(0.7 * 1024 * kilobytes)
    return None


def _note(out: Path, workers: dict[str, Worker | str]) -> None:
    """Versions and settings of those that run."""
    about = {what: found.about for what, found in workers.items() if isinstance(found, Worker)}
    with replacing(out / "about.json") as temporary:
        temporary.write_text(json.dumps(about, indent=1))


def _on_one_system(
    plan: Plan,
    subjects: Sequence[Subject],
    workers: dict[str, Worker | str],
    system: System,
    threads: int,
    before: dict[str, Row],
    echo: Echo,
) -> list[Row]:
    atoms, samples = len(system.structure), dict[str, list[dict[str, Any]]]()
    of = {"system": system.name, "atoms": atoms, "threads": threads}
    reasons: dict[str, str] = {}
    plain = system.plain()
    for subject in subjects:
        found = workers[subject.what]
        reason = found if isinstance(found, str) else _too_slow(plan, subject, before.get(subject.what), atoms)
        if reason is None and isinstance(found, Worker):
            echo(f"{threads} x {system.name}: warming up {subject.what}")
            try:
                found.ask(10 * plan.patience + WAITING, do="prepare", system=plain)
                samples[subject.what] = []
            except MLFFError as error:
                reason = str(error)
                if not found.alive:
                    workers[subject.what] = reason
        if reason is not None:
            reasons[subject.what] = reason
            echo(f"{threads} x {system.name}: no {subject.what}: {reason}")
    spent = dict.fromkeys(samples, 0.0)
    for n in range(plan.rounds):
        names = [what for what in samples if n < AT_LEAST or spent[what] < plan.budget]
        first = n % max(len(names), 1)
        for what in names[first:] + names[:first]:  # everybody is first some time
            found = workers[what]
            assert isinstance(found, Worker)
            begun = time.monotonic()
            try:
                taken = found.ask(10 * plan.patience + WAITING, do="sample", seconds=plan.sample)
            except MLFFError as error:
                reasons[what] = str(error)
                del samples[what]
                if not found.alive:
                    workers[what] = str(error)
                continue
            samples[what].append(taken)
            spent[what] += time.monotonic() - begun
        echo(f"{threads} x {system.name}: round {n + 1} of {plan.rounds}")
    return [
        row_of(samples[subject.what], what=subject.what, **of)
        if subject.what in samples
        else Row(what=subject.what, reason=reasons[subject.what], **of)
        for subject in subjects
    ]


def _too_slow(plan: Plan, subject: Subject, before: Row | None, atoms: int) -> str | None:
    """Why it is not tried, by the row for fewer atoms."""
    if before is None or (subject.constant and before.median_ms is not None):
        return None
    if before.median_ms is None:
        return before.reason
    call = 1e-3 * before.median_ms * atoms / before.atoms
    steps = (worker.FEW_STEPS if call > worker.SLOW else worker.STEPS) if subject.stepping else 1
    if call * steps <= plan.patience:
        return None
    return f"it would take {call * steps:.0f} s at a time, by its {before.median_ms:.3g} ms for {before.atoms} atoms"
