"""Validate one artifact in several engines, step by step, each kept when done: what `mlff validate` does.

| in the folder    | content                                                                             |
|------------------|-------------------------------------------------------------------------------------|
| `report.html`    | for people; `report.json` holds the same for machines; both are written last         |
| `plan.json`      | what decides the figures; a folder belongs to one plan                               |
| `steps/`         | what each finished check found: an interrupted validation goes on from there         |
| `trajectories/`  | every run of every engine, in the engine's native format                             |
| `engines/`       | whatever an engine writes to do its work                                             |
"""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import click
import numpy as np
import torch

from mlff_engines import __version__
from mlff_engines.artifact import load
from mlff_engines.checkpoint import StructureRecord
from mlff_engines.config import Config
from mlff_engines.errors import ConfigError, MissingEngineError, SimulationError, suggest
from mlff_engines.evaluator import Evaluator
from mlff_engines.files import replacing
from mlff_engines.validation import lifecycle
from mlff_engines.validation.builtin import System, builtin_systems
from mlff_engines.validation.core_engine import CoreEngine
from mlff_engines.validation.dynamics import constant_energy
from mlff_engines.validation.dynamics.constant_energy import starting
from mlff_engines.validation.dynamics.ensembles import check_ensemble
from mlff_engines.validation.dynamics.replicas import EnsembleOptions, equilibrate
from mlff_engines.validation.dynamics.stability import StabilityOptions, check_stability
from mlff_engines.validation.dynamics.temperatures import check_temperatures
from mlff_engines.validation.engine import Dynamics, Engine
from mlff_engines.validation.engines import ENGINES, make_engine
from mlff_engines.validation.reports.page import write_report
from mlff_engines.validation.reports.report import Provenance, Report, Section, View
from mlff_engines.validation.result import NAMES, STATIC, CheckResult, Claims, Evaluate
from mlff_engines.validation.static.conformance import check_model
from mlff_engines.validation.static.parity import check_parity, reference

Mode = Literal["quick", "full"]
MOVING: dict[Mode, tuple[str, ...]] = {
    "quick": ("M1", "M2", "M3"),
    "full": ("M1", "M2", "M3", "M4", "M5", "M6", "M7", "D2", "D3", "D4", "D5"),
}
OWN = ("D1", "D6")  # of some engines
STATIC_SYSTEMS = "static systems"
SETTLING, SETTLING_FRICTION = 500, 20.0  # steps and 1/ps: what was built by hand comes to rest first
FRICTION = 5.0  # 1/ps: liquids lose their memory soonest at some such value
SAMPLING = 10.0  # fs between the samples of an ensemble
PACKAGES = ("torch", "numpy", "scipy", "vesin", "mdtraj", "MDAnalysis", "physical_validation")


class Plan(Config):
    """All that decides the figures of a validation."""

    version: str = __version__
    artifact_sha256: str
    engines: tuple[str, ...]
    systems: dict[str, StructureRecord]
    temperatures: dict[str, float]
    mode: Mode
    only: tuple[str, ...]
    length: float
    device: str
    seed: int


@dataclass(frozen=True)
class Step:
    """One check, or some that share their work, of one engine on one system."""

    engine: str
    system: str
    name: str
    check: Callable[[], list[CheckResult]]


def validate(
    artifact: Path,
    folder: Path,
    *,
    engines: Sequence[str] = ("ase",),
    systems: Sequence[System] = (),
    mode: Mode = "quick",
    only: Sequence[str] = (),
    length: float = 100.0,
    device: str = "cpu",
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
    command: str = "",
) -> Report:
    """Judge `artifact` in every engine, and write `report.json` and `report.html` into `folder`.

    Repeat an interrupted validation with the same arguments, and it goes on where it was.

    Args:
        artifact: the `.pt` file.
        folder: made; must be empty, or hold an unfinished validation of the same plan.
        engines: of `mlff_engines.validation.engines.ENGINES`. One that is missing is reported, the others go on.
        systems: for dynamics and static checks; by default the first of `builtin_systems`. The others of the built-in
            ones serve the static checks in any case.
        mode: "quick": S1-S10 and M1-M3; "full": M4-M7 and D1-D6 besides.
        only: codes of checks to run, in place of those of `mode`.
        length: of each of the four replicas of M5-M7, ps.
        device: of the model.
        seed: of velocities and thermostats.
        overwrite: replace an earlier validation in `folder`.
        progress: show a progress bar.
        command: for the report.

    Raises:
        ConfigError: an unknown engine, no engine, or a folder that holds something else.
        ArtifactError: see `mlff_engines.artifact.load`.
        StructureError: a structure that the model refuses.
    """
    began = time.monotonic()
    for name in engines:
        if name not in ENGINES:
            raise ConfigError(f"unknown engine {name!r}{suggest(name, ENGINES)}")
    for code in only:
        if code not in NAMES:
            raise ConfigError(f"unknown check {code!r}{suggest(code, NAMES)}")
    if not engines:
        raise ConfigError(f"no engine named; allowed: {', '.join(ENGINES)}")
    session = _Session(artifact, folder, systems, length, device, seed)
    plan = Plan(
        artifact_sha256=session.artifact.manifest.sha256,
        engines=tuple(engines),
        systems={system.name: StructureRecord.of(system.structure) for system in session.systems},
        temperatures={system.name: system.temperature for system in session.systems},
        mode=mode,
        only=tuple(only),
        length=length,
        device=device,
        seed=seed,
    )
    views = [
        View.of(system.name, system.structure, session.core.evaluate(system.structure).forces)
        for system in session.systems
    ]
    _claim(folder, plan, overwrite)
    problems = {name: problem for name in engines if (problem := session.problem(name))}
    able = [name for name in engines if name not in problems]
    steps = [step for name in able for step in _steps(session, name, "full" if only else mode)]
    steps = [step for step in steps if not only or step.name in only]
    results: dict[tuple[str, str], list[CheckResult]] = {}
    log = progress and not sys.stderr.isatty()  # of a batch job: one line a step
    with click.progressbar(
        steps, label="validating", item_show_func=_shown, width=24, hidden=log or not progress, file=sys.stderr
    ) as shown:
        for number, step in enumerate(shown, start=1):
            found = _kept(step, folder / "steps")
            results.setdefault((step.engine, step.system), []).extend(found)
            if log:
                verdicts = ", ".join(result.verdict for result in found) or "does not apply"
                click.echo(f"{number}/{len(steps)} {_shown(step)}: {verdicts}", err=True)
    report = Report(
        title=f"{artifact.name} in {', '.join(engines)}",
        provenance=_provenance(artifact, plan, command, time.monotonic() - began),
        sections=[
            *(
                Section(engine=name, system=system, results=found, versions=session.engine(name).versions())
                for (name, system), found in results.items()
            ),
            *(Section(engine=name, system="", problem=problem) for name, problem in problems.items()),
        ],
        views=views,
    )
    write_report(report, folder)
    return report


class _Session:
    """What the steps share; engines and starting points are made when first needed."""

    def __init__(
        self, path: Path, folder: Path, systems: Sequence[System], length: float, device: str, seed: int
    ) -> None:
        self.path, self.folder, self.length, self.device, self.seed = path, folder, length, device, seed
        self.artifact = load(path)
        builtin = builtin_systems(self.artifact)
        self.systems = list(systems) or [next(iter(builtin.values()))]
        self.static = {n: s.structure for n, s in (builtin | {s.name: s for s in self.systems}).items()}
        self._engines: dict[tuple[str, bool], Engine] = {}
        self._starts: dict[str, Dynamics] = {}

    @cached_property
    def core(self) -> CoreEngine:
        """The eager model in float64; by its kernel, many times faster, where that proves to be the same."""
        manifest = self.artifact.manifest
        exact = load(self.path, dtype="float64")
        if exact.kernel == "fused":
            evaluate, claims = exact.evaluator(outside="ignore"), replace(Claims.of(manifest), dtype="float64")
            if check_parity(evaluate, self.expected, claims, {s.name: s.structure for s in self.systems}).passed:
                return CoreEngine(evaluate)
        return CoreEngine(
            Evaluator(
                self.artifact.eager(),
                manifest.domain,
                manifest.cutoff,
                takes_charge=manifest.takes_charge,
                takes_spin=manifest.takes_spin,
                dtype=torch.float64,
                outside="ignore",
            )
        )

    @cached_property
    def expected(self) -> Evaluate:
        """The eager model, sharing no code with what it judges."""
        return reference(self.artifact.eager(), self.artifact.manifest.cutoff)

    def claims(self, engine: Engine) -> Claims:
        """What the artifact says of itself, as far as the engine shows it."""
        return replace(Claims.of(self.artifact.manifest), dtype=engine.dtype, offers=engine.offers)

    def engine(self, name: str, *, exact: bool = False) -> Engine:
        """An engine in the artifact's own precision, or in float64."""
        exact = exact and self.artifact.manifest.dtype != "float64"
        if (name, exact) not in self._engines:
            place = self.folder / "engines" / (f"{name}-float64" if exact else name)
            dtype: Literal["float64"] | None = "float64" if exact else None
            self._engines[name, exact] = make_engine(name, self.path, folder=place, device=self.device, dtype=dtype)
        return self._engines[name, exact]

    def problem(self, name: str) -> str:
        """Why an engine cannot be used here, or nothing."""
        try:
            self.engine(name)
        except MissingEngineError as error:
            return str(error)
        return ""

    def start(self, system: System) -> Dynamics:
        """Settled, with velocities of its temperature and a time step that suits it."""
        if system.name not in self._starts:
            given = starting(self.core, system.structure, system.temperature, self.seed)
            warm = replace(given, temperature=system.temperature, friction=SETTLING_FRICTION)
            options = EnsembleOptions(seed=self.seed, equilibration=SETTLING)
            settled = equilibrate(self.core, warm, options, self.folder / "trajectories" / system.name / "start")
            self._starts[system.name] = starting(self.core, settled.structure, system.temperature, self.seed)
        return self._starts[system.name]


def _steps(session: _Session, name: str, mode: Mode) -> list[Step]:
    """Everything that one engine has to show."""
    steps = [Step(name, STATIC_SYSTEMS, code, partial(_static, session, name, code)) for code in STATIC]
    if mode == "full":
        steps += [Step(name, STATIC_SYSTEMS, code, partial(_own, session, name, code)) for code in OWN]
    for system in session.systems:
        steps += [Step(name, system.name, code, partial(_moving, session, name, system, code)) for code in MOVING[mode]]
    return steps


def _static(session: _Session, name: str, code: str) -> list[CheckResult]:
    engine = session.engine(name)
    upcast = None if engine.dtype == "float64" else session.engine(name, exact=True).evaluate
    return check_model(
        engine.evaluate,
        session.claims(engine),
        reference=session.expected,
        upcast=upcast,
        structures=session.static,
        only=[code],
    )


def _own(session: _Session, name: str, code: str) -> list[CheckResult]:
    engine = session.engine(name)
    checks = engine.own_checks(session.expected, session.claims(engine))
    return [checks[code]()] if code in checks else []


def _moving(session: _Session, name: str, system: System, code: str) -> list[CheckResult]:
    start, folder = session.start(system), session.folder / "trajectories" / system.name / name
    folder.mkdir(parents=True, exist_ok=True)
    if code in constant_energy.TOLERANCES:
        # laws that rounding would hide are tried in float64; drift is what the user's own precision makes of it
        engine = session.engine(name, exact=code != "M4")
        return constant_energy.check_dynamics(engine, session.core, start, folder, only=[code])
    if code in lifecycle.TOLERANCES:
        return lifecycle.check_adapter(
            partial(make_engine, name), session.path, start, folder, device=session.device, only=[code]
        )
    engine = session.engine(name)
    warm = replace(start, temperature=system.temperature, friction=FRICTION)
    if code == "M7":
        domain = session.artifact.manifest.domain
        options = StabilityOptions(duration=session.length, min_distances=domain.min_distances)
        return [check_stability(engine, session.core, warm, folder, options)]
    steps = round(1e3 * session.length / start.timestep)
    warm = replace(warm, steps=steps, every=max(1, round(SAMPLING / start.timestep)))
    check = {"M5": check_ensemble, "M6": check_temperatures}[code]
    # the eager model's replicas serve every engine
    return [check(engine, session.core, warm, folder.parent / "replicas", EnsembleOptions(seed=session.seed))]


def _claim(folder: Path, plan: Plan, overwrite: bool) -> None:
    """Make `folder` this plan's, or refuse."""
    written = folder / "plan.json"
    text = plan.model_dump_json(indent=1)
    if folder.is_dir() and any(folder.iterdir()):
        if not written.is_file():
            raise ConfigError(f"{folder} holds something else than a validation; name another folder")
        if overwrite:
            shutil.rmtree(folder)
        elif (folder / "report.json").is_file():
            raise ConfigError(f"{folder} holds a finished validation; name another folder or pass --overwrite")
        elif written.read_text(encoding="utf-8") != text:
            raise ConfigError(
                f"{folder} holds an unfinished validation of another artifact, or with other engines, systems or "
                "settings; repeat that one to finish it, name another folder or pass --overwrite"
            )
    with replacing(written) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _kept(step: Step, folder: Path) -> list[CheckResult]:
    """What the step found, now or before."""
    file = folder / f"{step.engine}-{step.system}-{step.name}.json".replace(" ", "-")
    if file.is_file():
        return Section.model_validate_json(file.read_bytes()).results
    try:
        results = step.check()
    except SimulationError as error:  # atoms that flew apart are a verdict; the other checks go on
        results = [CheckResult(step.name, NAMES[step.name], "fail", np.nan, 0.0, str(error))]
    found = Section(engine=step.engine, system=step.system, results=results)
    with replacing(file) as temporary:
        temporary.write_text(found.model_dump_json(), encoding="utf-8")
    return found.results


def _provenance(artifact: Path, plan: Plan, command: str, seconds: float) -> Provenance:
    versions = {"mlff-engines": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return Provenance(
        command=command,
        artifact=artifact.name,
        sha256=plan.artifact_sha256,
        seconds=seconds,
        seeds={"velocities and thermostats": plan.seed},
        versions=versions | {"platform": platform.platform()},
        settings={
            "mode": ", ".join(plan.only) or plan.mode,
            "length of replicas, ps": plan.length,
            "device": plan.device,
        }
        | {f"temperature of {name}, K": value for name, value in plan.temperatures.items()},
    )


def _shown(step: Step | None) -> str:
    return "" if step is None else f"{step.engine}: {step.name} on {step.system}"
