"""Our side of the benchmark: a student alone, behind the `Evaluator`, and in whole MD steps of every engine."""

from __future__ import annotations

import importlib
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlff_engines.artifact import Artifact, load
from mlff_engines.bench.worker import FEW_STEPS, SLOW, STEPS, Work, ase_steps
from mlff_engines.checkpoint import Domain, save_checkpoint
from mlff_engines.errors import MissingEngineError
from mlff_engines.export import export
from mlff_engines.graph import make_graph
from mlff_engines.models.registry import build_model, model_config
from mlff_engines.neighbors import neighbor_list
from mlff_engines.potential import edge_forces
from mlff_engines.structure import Structure
from mlff_engines.units import length_unit
from mlff_engines.validation.core_engine import CoreEngine
from mlff_engines.validation.engine import Dynamics, Engine
from mlff_engines.validation.engines import make_engine

ELEMENTS = ("H", "C", "O")
SCALE = 1e-3  # eV: forces of random weights that move nothing during the steps that are timed
FRAMES = 20  # of a system in motion, shown to the Evaluator there and back
LEVELS = ("model", "evaluator", "core", "ase", "openmm", "lammps")


def default_student(folder: Path) -> Path:
    """The artifact of our default student with random weights."""
    config = model_config({})
    torch.manual_seed(0)
    model = build_model(config, ELEMENTS, dict.fromkeys(ELEMENTS, 0.0), scale=SCALE).eval()
    save_checkpoint(folder / "student", model, config, Domain(elements=list(ELEMENTS)), {"teacher": "none"})
    export([folder / "student"], folder / "student.pt", overwrite=True)
    return folder / "student.pt"


def open_subject(what: str, options: dict[str, Any]) -> tuple[Callable[[dict[str, Any]], Work], dict[str, Any]]:
    """One of `LEVELS` of the artifact `options["artifact"]`; see `mlff_engines.bench.worker`.

    The environment variable MLFF_KERNEL chooses the kernel everywhere.
    """
    path = Path(options["artifact"])
    if what in ("model", "evaluator", "core"):
        artifact = load(path)
        make: dict[str, Callable[[Artifact, dict[str, Any]], Work]]
        make = {"model": partial(_model, edges=options.get("edges", True)), "evaluator": _evaluator, "core": _core}
        about = {"torch": str(torch.__version__), "kernel": artifact.kernel}
        return lambda system: make[what](artifact, system), about
    if what == "ase":  # as the others are timed
        try:
            calculator = importlib.import_module("mlff_ase").MLFFCalculator(path, outside="ignore")
        except ImportError as error:
            raise MissingEngineError(f"{error}: pip install 'mlff-engines[ase]'") from None
        return lambda system: ase_steps(calculator, system), {"kernel": calculator.artifact.kernel}
    folder = Path(tempfile.mkdtemp(prefix=f"{what}-", dir=options["folder"]))
    engine = make_engine(what, path, folder=folder)
    about = dict(engine.versions())
    if what == "openmm":
        return lambda system: _openmm(path, system), about
    return lambda system: _steps(engine, folder, system, _loop_time), about


def _structure(system: dict[str, Any]) -> Structure:
    numbers, positions, cell, pbc = (np.array(system[name]) for name in ("numbers", "positions", "cell", "pbc"))
    return Structure(numbers, positions, cell, pbc)


def _model(artifact: Artifact, system: dict[str, Any], edges: bool = True) -> Work:
    """Energy and forces, edges given; or of atoms that are all alone."""
    s = _structure(system)
    artifact.evaluator(outside="ignore").check_composition(s)
    index, vectors = neighbor_list(s.positions, s.cell, s.pbc, artifact.manifest.cutoff)
    if not edges:
        index, vectors = index[:, :0], vectors[:0]
    edge_index = torch.from_numpy(index)
    graph = make_graph(torch.from_numpy(s.numbers), edge_index, torch.from_numpy(vectors).to(artifact.dtype))

    def work() -> None:
        out = artifact(graph)
        float(out["node_energy"].sum())
        edge_forces(edge_index, out["edge_gradient"], len(s))

    return work


def _evaluator(artifact: Artifact, system: dict[str, Any]) -> Work:
    """Energy, forces and virial from positions that move as in dynamics at 300 K."""
    start, velocities = _structure(system), np.array(system["velocities"])
    there = [replace(start, positions=start.positions + k * system["timestep"] * velocities) for k in range(FRAMES)]
    frames, evaluate, calls = [*there, *there[-2:0:-1]], artifact.evaluator(outside="ignore"), [0]

    def work() -> None:
        evaluate(frames[calls[0] % len(frames)])
        calls[0] += 1

    return work


def _core(artifact: Artifact, system: dict[str, Any]) -> Work:
    with tempfile.TemporaryDirectory() as folder:
        engine = CoreEngine(artifact.evaluator(outside="ignore"))
    return _steps(engine, Path(folder), system, _difference)


def _openmm(path: Path, system: dict[str, Any]) -> Work:
    """Steps of OpenMM's own Verlet on the Reference platform; the first, which begins everything, is not timed."""
    openmm, app, ours = (importlib.import_module(name) for name in ("openmm", "openmm.app", "mlff_openmm"))
    nm = length_unit("nm")
    topology, particles = app.Topology(), openmm.System()
    residue = topology.addResidue("ALL", topology.addChain())
    for number, mass in zip(system["numbers"], system["masses"], strict=True):
        element = app.Element.getByAtomicNumber(number)
        topology.addAtom(element.symbol, element, residue)
        particles.addParticle(mass)
    if any(system["pbc"]):
        box = np.array(system["cell"]) / nm
        topology.setPeriodicBoxVectors(box * openmm.unit.nanometer)
        particles.setDefaultPeriodicBoxVectors(*box)
    particles.addForce(ours.MLFFForce(path, topology, device="cpu", outside="ignore"))
    integrator = openmm.VerletIntegrator(system["timestep"] * 1e-3)  # ps
    context = openmm.Context(particles, integrator, openmm.Platform.getPlatform("Reference"))
    positions, velocities = np.array(system["positions"]) / nm, np.array(system["velocities"]) / nm * 1e3
    slow: list[bool] = []

    def work() -> tuple[float, float]:
        context.setPositions(positions)
        context.setVelocities(velocities)
        begun = time.perf_counter()
        integrator.step(1)
        slow.append(time.perf_counter() - begun > SLOW)
        steps = FEW_STEPS if slow[0] else STEPS
        wall, cpu = time.perf_counter(), time.process_time()
        integrator.step(steps)
        return (time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps

    return work


Timer = Callable[[Engine, Path, Dynamics, int], tuple[float, float]]


def _steps(engine: Engine, folder: Path, system: dict[str, Any], timer: Timer) -> Work:
    """Seconds of one of many steps of velocity Verlet, always the same ones."""
    folder.mkdir(exist_ok=True)
    dynamics = Dynamics(
        _structure(system), np.array(system["velocities"]), system["timestep"], 1, masses=np.array(system["masses"])
    )
    slow: list[bool] = []

    def work() -> tuple[float, float]:
        if not slow:
            slow.append(timer(engine, folder, dynamics, 2)[0] > SLOW)
        return timer(engine, folder, dynamics, FEW_STEPS if slow[0] else STEPS)

    return work


def _run(engine: Engine, folder: Path, dynamics: Dynamics, steps: int) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    engine.run(replace(dynamics, steps=steps, every=steps), folder / f"trajectory{engine.suffix}")
    return time.perf_counter() - wall, time.process_time() - cpu


def _difference(engine: Engine, folder: Path, dynamics: Dynamics, steps: int) -> tuple[float, float]:
    """By a run's difference from a short one: all that happens once in a run is in both."""
    short, long = (_run(engine, folder, dynamics, n) for n in (1, 1 + steps))
    return (long[0] - short[0]) / steps, (long[1] - short[1]) / steps


def _loop_time(engine: Engine, folder: Path, dynamics: Dynamics, steps: int) -> tuple[float, float]:
    """By LAMMPS' own clock, which starts when all is set up."""
    _run(engine, folder, dynamics, steps)
    log = (folder / "log.lammps").read_text()
    wall = float(re.findall(r"^Loop time of (\S+) on", log, re.MULTILINE)[-1]) / steps
    return wall, wall * float(re.findall(r"^([\d.]+)% CPU use", log, re.MULTILINE)[-1]) / 100
