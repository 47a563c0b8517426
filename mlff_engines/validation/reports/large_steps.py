"""`mlff kstep evaluate`: the runs of `mlff kstep run`, judged, and what they cost; a row for every variant."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from mlff_engines.errors import DataError
from mlff_engines.files import sha256_of
from mlff_engines.options import output_option, path_argument
from mlff_engines.units import energy_unit, length_unit
from mlff_engines.validation.dynamics.large_steps import NAMES, Basins, Run, error_of, judge, slopes, slowest_dihedral
from mlff_engines.validation.reports.page import write_report
from mlff_engines.validation.reports.report import Provenance, Report, Section, overall
from mlff_engines.validation.result import CheckResult, Curve, Plot, Verdict

NM, KJ_PER_MOL = length_unit("nm"), energy_unit("kJ/mol")  # Å, eV
VELOCITY = NM * 1e-3  # nm/ps in Å/fs
REFERENCE = "reference"
BASELINES = ("verlet", "hmr", "mts")


class Row(BaseModel):
    """One variant over all molecules."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    variant: str
    macro_step_fs: float = Field(description="between two true forces, or energies")
    true_calls_per_ns: float = Field(description="of the dynamics, at the boundary of the true potential")
    all_calls_per_ns: float = Field(description="with those of starts and checks")
    seconds_per_ns: float = Field(description="wall-clock")
    calls_per_sample: float = Field(description="true calls per independent sample of the slowest dihedral")
    sampling_gain: float | None = Field(default=None, description="those of hmr over these, or None without hmr")
    time_to_basin_ps: float = Field(description="mean time until the slowest dihedral is in another basin")
    acceptance: float | None = Field(default=None, description="of proposals, variant D")
    fallbacks: int = Field(default=0, description="jumps that were not taken: at their bound")
    clamp_hits: int = Field(default=0, description="atoms at the bound of a jump")
    error: float = Field(description="largest figure of a gate in units of what passes")
    savings: float | None = Field(
        default=None,
        description="true calls of the cheapest baseline of no larger error, over these; passed gates only",
    )
    gates: dict[str, Verdict] = Field(description="worst over the molecules, by code")
    verdict: Verdict


class LargeStepReport(Report):
    """A report with a row for every variant."""

    variants: list[Row] = Field(default_factory=list)
    plots: list[Plot] = Field(default_factory=list, description="of all variants side by side")


@click.command()
@click.argument("runs", type=path_argument)
@output_option
def evaluate(runs: Path, out: Path) -> None:
    """Judge the RUNS of mlff kstep run against their reference; writes report.json and report.html into OUT."""
    report = evaluate_runs(runs, command=" ".join(["mlff", *sys.argv[1:]]))
    for row in report.variants:
        gates = " ".join(f"{code}:{verdict}" for code, verdict in row.gates.items())
        click.echo(f"{row.variant:12s} {row.verdict:13s} {row.true_calls_per_ns:10.4g} true calls/ns  {gates}")
    click.echo(str(write_report(report, out)[1]))


def evaluate_runs(folder: Path, command: str = "") -> LargeStepReport:
    """The report of all molecules in `folder`.

    Raises:
        DataError: no runs, none of the reference, or a file that is none.
    """
    tables = {
        path.name: _read_molecule(path)
        for path in sorted(folder.iterdir() if folder.is_dir() else [])
        if path.is_dir() and any(path.glob("*_r*.npz"))
    }
    if not tables:
        raise DataError(f"no runs in {folder}: run mlff kstep run")
    sections, costs, hashes = [], dict[str, list[_Cost]](), dict[str, str]()
    plots: list[Plot] = []
    for molecule, variants in tables.items():
        if REFERENCE not in variants:
            raise DataError(f"{folder / molecule} has no runs of the reference: run mlff kstep run again")
        reference = variants[REFERENCE][0]
        replicate = _replicate(variants)
        slowest = slowest_dihedral(reference)
        plots += _overview(molecule, [run for run, _, _ in variants.values()])
        for name, (run, costly, files) in variants.items():
            hashes |= {f"{molecule}/{path.name}": sha256_of(path) for path in files}
            if name == REFERENCE:
                continue
            results = judge(run, reference, replicate)
            sections.append(Section(engine=name, system=molecule, results=[*results]))
            costs.setdefault(name, []).append(costly | {"results": results} | _sampling(run, slowest))
    provenance = Provenance(command=command, hashes=hashes)
    title, rows = "large time steps", _rows(costs)
    return LargeStepReport(title=title, provenance=provenance, sections=sections, variants=rows, plots=plots)


_Cost = dict[str, Any]


def _overview(molecule: str, runs: Sequence[Run]) -> list[Plot]:
    """The slopes of the replicas of all that ran to the end without thermostat."""
    drifts = {run.variant: slopes(run) for run in runs if not run.problems}
    curves = [
        Curve(name, [float(n)] * len(found), np.log10(np.abs(found) + 1e-9).tolist(), style="violin")
        for n, (name, found) in enumerate(drifts.items())
        if len(found)
    ]
    title = f"{molecule}: drift of the true total energy"
    return [Plot(title, "", "log10 of |slope| (kJ/mol/ps/atom)", curves)] if curves else []


def _sampling(run: Run, slowest: Basins | None) -> _Cost:
    """Of the reference's slowest dihedral, so that all are held to the same."""
    if slowest is None or len(run.kept.times) < 2:
        return {"samples": 0.0, "changes": 0, "duration": 0.0}
    found = slowest.samples(run), slowest.changes(run), slowest.duration(run)
    return dict(zip(("samples", "changes", "duration"), found, strict=True))


def _replicate(variants: Mapping[str, tuple[Run, _Cost, list[Path]]]) -> Run | None:
    """The run made as the reference was, with other noise."""
    dt = variants[REFERENCE][1]["macro_step_fs"]
    for name, (run, cost, _) in variants.items():
        if name != REFERENCE and cost["kind"] == "verlet" and cost["macro_step_fs"] == dt and not run.problems:
            return run
    return None


def _rows(costs: Mapping[str, Sequence[_Cost]]) -> list[Row]:
    rows = []
    for name, parts in costs.items():
        ns = 1e-3 * sum(part["simulated_ps"] for part in parts)
        counts = {key: sum(part["counts"].get(key, 0) for part in parts) for key in COUNTED}
        gates: dict[str, list[CheckResult]] = {}
        for part in parts:
            for result in part["results"]:
                gates.setdefault(result.code, []).append(result)
        verdicts = {code: overall(one.verdict for one in gates[code]) for code in NAMES if code in gates}
        calls = sum(part["calls"]["marginal"] for part in parts)
        errors = [error_of(part["results"]) for part in parts]
        samples = sum(part["samples"] for part in parts)
        rows.append(
            Row(
                variant=name,
                macro_step_fs=parts[0]["macro_step_fs"],
                true_calls_per_ns=_over(calls, ns),
                all_calls_per_ns=_over(sum(part["calls"]["all"] for part in parts), ns),
                seconds_per_ns=_over(sum(part["seconds"] for part in parts), ns),
                calls_per_sample=_over(calls, samples),
                time_to_basin_ps=_over(sum(part["duration"] for part in parts), sum(part["changes"] for part in parts)),
                acceptance=counts["accepted"] / counts["proposals"] if counts["proposals"] else None,
                fallbacks=counts["fallbacks"],
                clamp_hits=counts["clamp_hits"],
                error=math.nan if any(math.isnan(error) for error in errors) else max(errors),
                gates=verdicts,
                verdict=overall(verdicts.values()),
            )
        )
    baselines = [row for row in rows if costs[row.variant][0]["kind"] in BASELINES]
    heavy = [row.calls_per_sample for row in rows if costs[row.variant][0]["kind"] == "hmr"]
    return [
        row.model_copy(
            update={
                "savings": savings(row, baselines),
                "sampling_gain": _over(min(heavy), row.calls_per_sample) if heavy else None,
            }
        )
        for row in rows
    ]


COUNTED = ("proposals", "accepted", "fallbacks", "clamp_hits")


def savings(row: Row, baselines: Sequence[Row]) -> float | None:
    """At equal error against the cheapest baseline; None where a gate is not passed or no baseline is as good."""
    if row.verdict != "pass":
        return None
    calls = [other.true_calls_per_ns for other in baselines if other.verdict == "pass" and other.error <= row.error]
    return min(calls) / row.true_calls_per_ns if calls and row.true_calls_per_ns else None


def _over(value: float, by: float) -> float:
    return value / by if by > 0 else math.nan


def _read_molecule(folder: Path) -> dict[str, tuple[Run, _Cost, list[Path]]]:
    """Run, cost and files of each variant."""
    files: dict[str, list[Path]] = {}
    for path in folder.glob("*_r*.npz"):
        files.setdefault(path.stem.rsplit("_r", 1)[0], []).append(path)
    return {name: _read(sorted(paths, key=_replica)) for name, paths in sorted(files.items())}


def _replica(path: Path) -> int:
    return int(path.stem.rsplit("_r", 1)[1])


def _read(paths: list[Path]) -> tuple[Run, _Cost, list[Path]]:
    parts: list[dict[str, Any]] = []
    for path in paths:
        try:
            with np.load(path) as data:
                part = {name: data[name] for name in data.files}
            part["meta"] = json.loads(str(part["metadata"]))
            parts.append(part)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path} is no run of mlff kstep run ({error}); remove it and run again") from None
    first = parts[0]["meta"]
    whole = [part for part in parts if len(part["time"]) == max(len(other["time"]) for other in parts)]

    def stacked(name: str, scale: float) -> Any:
        return scale * np.stack([part[name] for part in whole])

    run = Run(
        variant=first["variant"]["name"],
        molecule=first["molecule"],
        numbers=parts[0]["numbers"],
        masses=parts[0]["masses"],
        constraints=parts[0]["constraints"],
        times=whole[0]["time"],
        positions=stacked("pos", NM),
        velocities=stacked("vel", VELOCITY),
        kicks=stacked("kick", VELOCITY),
        slopes=stacked("slope", KJ_PER_MOL),
        curvatures=stacked("curvature", 1.0),
        nve=[np.array([part["nve_time"], part["nve_Etot"]]) for part in parts if len(part["nve_time"])],
        temperature=first["settings"]["temperature_K"],
        problems={part["meta"]["replica"]: part["meta"]["problem"] for part in parts if part["meta"]["problem"]},
        draws_velocities=first["variant"]["kind"] == "D",
    )
    metas = [part["meta"] for part in parts]
    cost: _Cost = {
        "kind": first["variant"]["kind"],
        "macro_step_fs": first["macro_step_fs"],
        "simulated_ps": sum(meta["simulated_ps"] for meta in metas),
        "seconds": sum(meta["seconds"] for meta in metas),
        "calls": {key: sum(meta["calls"][key] for meta in metas) for key in ("marginal", "all")},
        "counts": {key: sum(meta["counts"].get(key, 0) for meta in metas) for key in COUNTED},
    }
    return run, cost, paths
