"""Label structures with a teacher, on any executor, so that a killed run loses no finished label."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from mlff_engines.errors import DataError, StructureError, TeacherError
from mlff_engines.files import replacing
from mlff_training.data.xyz import write_xyz
from mlff_training.teachers.calculator import hessian_row
from mlff_training.teachers.config import TeacherConfig, state_of
from mlff_training.teachers.journal import Journal
from mlff_training.teachers.parallel import as_done, progress_bar, teacher_here, workers_for


@dataclass(frozen=True)
class _Task:
    key: str
    teacher: TeacherConfig
    atoms: Atoms
    energies_too: bool  # False: only the Hessian row is wanted
    hessian_index: int | None


def label(
    frames: Sequence[Atoms],
    teacher: TeacherConfig,
    out: Path,
    *,
    executor: Executor | None = None,
    workers: int = 1,
    hessian_rows: bool = False,
    seed: int = 0,
    max_failed: float = 0.1,
    progress: bool = True,
) -> list[Atoms]:
    """Give every structure the teacher's energy, forces and whatever else it offers; write them to `out`.

    Each finished label goes at once to the journal ``<out>.journal``: repeat a killed run with the same arguments, and
    it computes only what is missing. `out` appears when all is done, in the order of `frames`. Structures on which the
    teacher fails are left out and listed in ``<out>.failed.json``; another run tries them again.

    Args:
        frames: structures; `info` charge and multiplicity are honoured. Those already labelled at the teacher's level
            of theory keep their labels.
        teacher: who labels.
        out: the extended XYZ file to write.
        executor: any `concurrent.futures.Executor`; the tasks and what they return can be pickled. Default: `workers`
            teacher processes on this machine.
        workers: number of teacher processes without an `executor`.
        hessian_rows: add one row of the Hessian per structure, chosen at random, for two further teacher calls.
        seed: seed of that choice.
        max_failed: the largest fraction of structures that may fail.
        progress: show a progress bar.

    Returns:
        The labelled structures, without those that failed.

    Raises:
        DataError: for no structures, or if another run writes the same output.
        StructureError: if the teacher cannot use a structure's charge or multiplicity; before any computation.
        TeacherError: if the teacher cannot be made, or fails on more than `max_failed` of the structures.
    """
    frames = list(frames)
    if not frames:
        raise DataError(f"no structures to label for {out}")
    indices: list[int | None] = [None] * len(frames)
    keys = []
    for number, atoms in enumerate(frames):
        try:
            state_of(teacher, atoms)
        except StructureError as error:
            raise StructureError(f"structure {number}: {error}") from None
        content = _content(atoms, teacher)
        if hessian_rows and len(atoms):
            choice = hashlib.sha256(f"{content}:{seed}".encode()).digest()
            indices[number] = int.from_bytes(choice[:8], "big") % (3 * len(atoms))
        keys.append(f"{content}:{indices[number]}")
    with Journal(out.with_name(out.name + ".journal")) as journal:
        tasks = {
            key: _Task(key, teacher, _bare(atoms), not _has_labels(atoms, teacher), index)
            for key, atoms, index in zip(keys, frames, indices, strict=True)
            if key not in journal.records and not (_has_labels(atoms, teacher) and index is None)
        }
        failed = _work(list(tasks.values()), teacher, journal, executor, workers, max_failed * len(frames), progress)
        _report(
            out, [(number, failed[key]) for number, key in enumerate(keys) if key in failed], len(frames), max_failed
        )
        labelled = [
            _labelled(atoms, teacher, journal.records.get(key), index)
            for key, atoms, index in zip(keys, frames, indices, strict=True)
            if key not in failed
        ]
    write_xyz(out, labelled)
    return labelled


def _work(
    tasks: list[_Task],
    teacher: TeacherConfig,
    journal: Journal,
    executor: Executor | None,
    workers: int,
    tolerated: float,
    progress: bool,
) -> dict[str, str]:
    """Do the tasks into the journal; return key -> reason of those that failed."""
    failed: dict[str, str] = {}
    if not tasks:
        return failed
    with (
        workers_for(executor, min(workers, len(tasks)), teacher) as (running, its_teacher),
        progress_bar("labels", len(tasks), progress) as advance,
    ):
        tasks = [_Task(t.key, its_teacher, t.atoms, t.energies_too, t.hessian_index) for t in tasks]
        for batch in as_done(running, _compute, tasks):
            journal.append(answer for _, answer in batch if "failed" not in answer)
            failed.update((answer["key"], answer["failed"]) for _, answer in batch if "failed" in answer)
            if len(failed) > tolerated:
                break  # no need to find out how many more
            advance(len(batch))
    return failed


def _compute(task: _Task) -> dict[str, Any]:
    """One label, in a worker: a record for the journal, or the reason why there is none."""
    calculator = teacher_here(task.teacher)
    record: dict[str, Any] = {"key": task.key}
    try:
        calculator.reset()  # a label must not depend on which structures this worker has seen before
        if task.energies_too:
            calculator.calculate(task.atoms)
            record["results"] = dict(calculator.results)
        if task.hessian_index is not None:
            record["hessian_row"] = hessian_row(calculator, task.atoms, task.hessian_index)
    except TeacherError as error:
        return {"key": task.key, "failed": str(error)}
    return record


def _content(atoms: Atoms, teacher: TeacherConfig) -> str:
    """SHA-256 of everything a label depends on."""
    digest = hashlib.sha256(teacher.digest.encode())
    digest.update(json.dumps(state_of(teacher, atoms)).encode())
    for array in (atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _bare(atoms: Atoms) -> Atoms:
    """What the teacher needs of a structure; everything else stays here."""
    bare = Atoms(numbers=atoms.numbers, positions=atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    bare.info = {key: atoms.info[key] for key in ("charge", "multiplicity") if key in atoms.info}
    return bare


def _has_labels(atoms: Atoms, teacher: TeacherConfig) -> bool:
    if atoms.calc is None or atoms.info.get("level") != teacher.level_of_theory:
        return False
    found = atoms.calc.results
    return all(key in found and np.isfinite(found[key]).all() for key in ("energy", "forces"))


def with_labels(atoms: Atoms, results: dict[str, Any], teacher: TeacherConfig) -> Atoms:
    """A copy of `atoms` that holds `results` of the teacher's and says whose they are."""
    copy = atoms.copy()
    copy.set_constraint()
    copy.info["level"] = teacher.level_of_theory
    copy.calc = SinglePointCalculator(copy, **results)
    return copy


def _labelled(atoms: Atoms, teacher: TeacherConfig, record: dict[str, Any] | None, index: int | None) -> Atoms:
    results = record["results"] if record is not None and "results" in record else atoms.calc.results
    labelled = with_labels(atoms, results, teacher)
    if record is not None and index is not None:
        labelled.arrays["hessian_row"] = np.asarray(record["hessian_row"])
        labelled.info["hessian_index"] = index
    return labelled


def _report(out: Path, failed: list[tuple[int, str]], total: int, max_failed: float) -> None:
    listing = out.with_name(out.name + ".failed.json")
    if not failed:
        listing.unlink(missing_ok=True)
        return
    with replacing(listing) as temporary:
        temporary.write_text(json.dumps([{"structure": n, "reason": reason} for n, reason in failed], indent=1))
    if len(failed) > max_failed * total:
        number, reason = failed[0]
        raise TeacherError(
            f"the teacher failed on {len(failed)} of {total} structures, more than the {max_failed:.0%} allowed; "
            f"structure {number}: {reason}. All reasons: {listing}. Finished labels are kept; mend the cause and repeat"
        )
