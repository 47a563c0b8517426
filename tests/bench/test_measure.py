"""The measurement: real processes asked in turn, whatever they do; what was told is kept, what failed is said."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from mlff_engines.bench.rows import Row, read_rows
from mlff_engines.bench.run import Plan, Subject, Worker, measure
from mlff_engines.bench.systems import System, named
from mlff_engines.errors import ConfigError, MLFFError

# reports times of its own, which are known: 2 ms by the clock and 1 ms of the processor for each atom
SUBJECT = """
import os
from pathlib import Path

def open_subject(what, options):
    print("chatter on standard output")
    if what == "unopened":
        raise ImportError("no such package here")

    def prepare(system):
        atoms = len(system["numbers"])
        if what == "refusing" and atoms > 30:
            raise MemoryError("too large\\nfor this machine")

        def work():
            with Path(options["log"]).open("a") as log:
                log.write(f"{options['name']} {system['name']} {os.environ['OMP_NUM_THREADS']}\\n")
            if what == "dying" and atoms > 30:
                os._exit(7)
            return 2e-3 * atoms, 1e-3 * atoms
        return work

    return prepare, {"threads": os.environ["OMP_NUM_THREADS"]}
"""
SYSTEMS = [named(name) for name in ("water-30", "aspirin", "water-60")]
PLAN = Plan(systems=("water-30", "aspirin", "water-60"), rounds=4, sample=0.0, patience=5.0)
Make = Callable[..., Subject]


@pytest.fixture
def subject(tmp_path: Path) -> Make:
    """A subject of this file's making."""
    script = tmp_path / "subject.py"
    script.write_text(SUBJECT)

    def make(what: str, level: str = "model") -> Subject:
        return Subject(what, str(script), level, {"log": str(tmp_path / "log"), "name": what})

    return make


def run(plan: Plan, subjects: Sequence[Subject], out: Path, systems: Sequence[System] = SYSTEMS) -> dict[str, Row]:
    rows = measure(plan, subjects, systems, out, lambda line: None)
    assert read_rows(out / "rows.json") == rows
    return {f"{row.what} {row.system} {row.threads}": row for row in rows}


def test_rows_tell_what_workers_said(subject: Make, tmp_path: Path) -> None:
    rows = run(replace(PLAN, threads=(1, 2)), [subject("a"), subject("b")], tmp_path / "out")
    assert len(rows) == 2 * 3 * 2
    for row in rows.values():
        assert row.atoms == {"water-30": 30, "aspirin": 21, "water-60": 60}[row.system]
        assert row.median_ms == pytest.approx(2.0 * row.atoms)
        assert row.p95_ms == pytest.approx(2.0 * row.atoms)
        assert row.cpu_ms == pytest.approx(1.0 * row.atoms)
        assert row.calls == PLAN.rounds
        assert row.rss_mb is not None
        assert row.base_mb is not None
        assert row.rss_mb >= row.base_mb > 5
    assert json.loads((tmp_path / "out" / "about.json").read_text())["a"] == {"threads": "2"}
    threads = [line.split()[2] for line in (tmp_path / "log").read_text().splitlines()]
    assert threads == sorted(threads)
    assert set(threads) == {"1", "2"}


def test_workers_are_asked_in_turn(subject: Make, tmp_path: Path) -> None:
    """Round by round, another one first each time; not one after the other."""
    run(PLAN, [subject(name) for name in "abc"], tmp_path / "out", SYSTEMS[:1])
    asked = "".join(line.split()[0] for line in (tmp_path / "log").read_text().splitlines())
    warm_up, rounds = asked[: -3 * PLAN.rounds], asked[-3 * PLAN.rounds :]
    assert set(warm_up) == {"a", "b", "c"}
    assert rounds == "abcbcacababc"


def test_what_fails_has_a_row_that_says_why(subject: Make, tmp_path: Path) -> None:
    kinds = ("good", "unopened", "refusing", "dying")
    subjects = [subject(kind, kind) for kind in kinds] + [Subject("absent", missing="pip said no")]
    rows = run(PLAN, subjects, tmp_path / "out")
    reasons = {name: row.reason for name, row in rows.items() if row.median_ms is None}
    assert reasons == {
        "absent aspirin 1": "pip said no",
        "absent water-30 1": "pip said no",
        "absent water-60 1": "pip said no",
        "unopened aspirin 1": "ImportError: no such package here",
        "unopened water-30 1": "ImportError: no such package here",
        "unopened water-60 1": "ImportError: no such package here",
        "refusing water-60 1": "MemoryError: too large",
        "dying water-60 1": reasons["dying water-60 1"],
    }
    assert "exit code 7" in str(reasons["dying water-60 1"])
    assert rows["good water-60 1"].median_ms == pytest.approx(120.0)


def test_what_would_take_too_long_is_left_out(subject: Make, tmp_path: Path) -> None:
    """By its time for fewer atoms; for MD steps, by that of a whole burst."""
    plan = replace(PLAN, patience=0.1, systems=("aspirin", "water-60"))
    subjects = [subject("call"), subject("steps", "ase")]
    rows = run(plan, subjects, tmp_path / "out", [named("aspirin"), named("water-60")])
    assert rows["call aspirin 1"].median_ms == pytest.approx(42.0)
    assert "would take 0 s at a time, by its 42 ms for 21 atoms" in str(rows["call water-60 1"].reason)
    assert "would take 2 s" in str(rows["steps water-60 1"].reason)


def test_goes_on_where_it_stopped(subject: Make, tmp_path: Path) -> None:
    def stop_at_the_second(line: str) -> None:
        if "water-30: round 2" in line:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        measure(PLAN, [subject("a")], SYSTEMS, out, stop_at_the_second)
    assert [row.system for row in read_rows(out / "rows.json")] == ["aspirin"]
    (tmp_path / "log").unlink()
    rows = run(PLAN, [subject("a")], out)
    assert [row.system for row in rows.values()] == ["aspirin", "water-30", "water-60"]
    assert "aspirin" not in (tmp_path / "log").read_text()
    (tmp_path / "log").unlink()
    run(PLAN, [subject("a")], out)
    assert not (tmp_path / "log").exists()  # all there
    with pytest.raises(ConfigError, match="holds a benchmark with other what"):
        run(PLAN, [subject("a"), subject("b")], out)
    with pytest.raises(ConfigError, match="holds a benchmark with other rounds"):
        run(replace(PLAN, rounds=5), [subject("a")], out)


def test_a_late_worker_is_ended(subject: Make, tmp_path: Path) -> None:
    script = tmp_path / "hanging.py"
    script.write_text("def open_subject(what, options):\n    import time\n    time.sleep(600)\n")
    worker = Worker(subject("a"), 1, tmp_path / "log.txt", None)
    with pytest.raises(MLFFError, match="no answer within 0 s"):
        worker.ask(0.2, do="open", subject=str(script), what="model", options={})
    assert not worker.alive
    worker.close()


def test_memory_is_limited(tmp_path: Path) -> None:
    script = tmp_path / "greedy.py"
    script.write_text("def open_subject(what, options):\n    return bytearray(10**9), {}\n")
    with pytest.raises(MLFFError, match="MemoryError"):
        Worker(Subject("greedy", str(script)), 1, tmp_path / "log.txt", 500_000_000)
