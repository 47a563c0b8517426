"""Speed at equal accuracy: our student and other packages' models learn the same labels, then all are timed in one run.

python examples/benchmarks/same_accuracy.py examples/benchmarks/same_accuracy.yaml -o runs/same_accuracy

A model qualifies if its force error (MAE) on the held-out set is within `tolerance` of our student's. Trainings run one
after another, on one thread. Repeat the command to go on after an interruption: what is trained is kept. Each size of
each package is a folder below OUT/peers; a size added to the file is trained by itself.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from pydantic import Field

from mlff_engines.bench.page import fill, machine
from mlff_engines.bench.rows import Row
from mlff_engines.bench.run import THREAD_LIMITS, Plan, Subject, measure
from mlff_engines.bench.subjects import PEERS, SCRIPTS
from mlff_engines.bench.systems import System, named
from mlff_engines.config import Config, load_yaml
from mlff_engines.errors import ConfigError, MLFFError, TrainingError
from mlff_engines.export import export
from mlff_engines.files import replacing, sha256_of
from mlff_engines.foreign import environments
from mlff_training.data.labels import results
from mlff_training.data.xyz import read_xyz
from mlff_training.loop import TrainConfig
from mlff_training.sampling.sample import Dynamics, SamplingConfig, sample
from mlff_training.student import split_frames, train_student
from mlff_training.teachers.config import TeacherConfig
from mlff_training.teachers.labelling import label

SECTION = "same accuracy"
OURS = "mlff"
MODES = ("eager", "compiled")


class Training(Config):
    """Of another package's models; see mlff_engines/bench/theirs/fit.py."""

    minutes: float = Field(gt=0, description="of processor time")
    batch_size: int = Field(ge=1)
    learning_rate: float = Field(gt=0, description="at first; it falls as a cosine")
    energy_weight: float = Field(ge=0, description="of the mean squared error of the energy per atom, eV²")
    forces_weight: float = Field(ge=0, description="of the mean squared error of the forces, (eV/Å)²")
    ema_decay: float = Field(ge=0, lt=1, description="of the averaged weights")
    weight_decay: float = Field(0.0, ge=0)
    amsgrad: bool = True
    clip_norm: float | None = Field(None, description="largest norm of the gradient")
    seed: int = Field(0, ge=0)


class Peer(Config):
    """Another package."""

    training: Training
    sizes: dict[str, dict[str, Any]] = Field(min_length=1, description="hyper-parameters by a name")


class Student(Config):
    """Ours."""

    model: dict[str, Any] = Field(default_factory=dict)
    train: TrainConfig = TrainConfig()


class Gate(Config):
    """The YAML file."""

    output: Path | None = Field(None, description="folder of the run")
    system: str = Field("aspirin", description="a molecule of the benchmark")
    teacher: TeacherConfig = TeacherConfig(name="gfn2-xtb")
    workers: int = Field(2, ge=1, description="teacher processes")
    sampling: SamplingConfig = SamplingConfig()
    held_out: Dynamics = Dynamics(seeds=(9001,))
    valid: int = Field(100, ge=1, description="frames of the sampled ones")
    tolerance: float = Field(1.05, ge=1)
    rounds: int = Field(12, ge=1, description="of the timing")
    student: Student = Student()
    peers: dict[str, Peer] = Field(default_factory=dict)


def labelled(config: Gate, system: System, out: Path) -> dict[str, list[Atoms]]:
    """The frames "train", "valid" and "held_out", each with labels of the teacher."""
    if config.sampling.md is not None and set(config.sampling.md.seeds) & set(config.held_out.seeds):
        raise ConfigError(f"held_out.seeds {config.held_out.seeds} are also sampled (sampling.md.seeds)")
    settings = config.model_dump(mode="json", include={"system", "teacher", "sampling", "held_out", "valid"})
    done, files = out / "labels.json", {name: out / f"{name}-labels.xyz" for name in ("sampled", "held_out")}
    if done.is_file() and json.loads(done.read_text()) == settings:
        found = {name: read_xyz(path) for name, path in files.items()}
        return {**split_frames(found["sampled"], {}, 0, "frame", out), "held_out": found["held_out"]}
    for old in (done, out / "split.json", out / "data.npz"):
        old.unlink(missing_ok=True)
    start = [Atoms(system.structure.numbers, system.structure.positions)]
    apart = SamplingConfig(relax=config.sampling.relax, md=config.held_out)
    found = {}
    for name, how in (("sampled", config.sampling), ("held_out", apart)):
        say(f"{name}: structures and labels of {config.teacher.level_of_theory}")
        frames = sample(start, config.teacher, how, out / f"{name}.xyz", workers=config.workers)
        if name == "held_out":  # the way to the minimum is the same for all
            frames = [frame for frame in frames if "-md-" in frame.info["group"]]
        found[name] = label(frames, config.teacher, files[name], workers=config.workers)
    parts = {
        **split_frames(found["sampled"], {"train": None, "valid": config.valid}, 0, "frame", out),
        "held_out": found["held_out"],
    }
    plain(parts, out / "data.npz")
    with replacing(done) as temporary:
        temporary.write_text(json.dumps(settings, indent=1))
    return parts


def plain(parts: dict[str, list[Atoms]], path: Path) -> None:
    """The labels as other packages' environments read them, in eV and Å."""
    arrays = {"numbers": parts["train"][0].numbers}
    for name, frames in parts.items():
        arrays[f"{name}/positions"] = np.array([frame.positions for frame in frames])
        arrays[f"{name}/energies"] = np.array([results(frame)["energy"] for frame in frames])
        arrays[f"{name}/forces"] = np.array([results(frame)["forces"] for frame in frames])
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def our_student(config: Gate, parts: dict[str, list[Atoms]], out: Path) -> dict[str, Any]:
    """Train and export ours."""
    folder, spent = out / "student", out / "student" / "minutes.json"
    settings = {"data": sha256_of(out / "data.npz"), **config.student.model_dump(mode="json")}
    done = out / "student.json"
    if done.is_file() and (found := json.loads(done.read_text()))["settings"] == settings:
        return dict(found)
    folder.mkdir(parents=True, exist_ok=True)
    say(f"training {OURS} on {len(parts['train'])} labels")
    before = json.loads(spent.read_text()) if spent.is_file() else 0.0
    begun = time.process_time()
    frames = {"train": parts["train"], "valid": parts["valid"], "test": parts["held_out"]}
    try:
        errors = train_student(frames, "fit", config.student.model, config.student.train, folder)["test"]
    finally:
        minutes = before + (time.process_time() - begun) / 60
        spent.write_text(json.dumps(minutes))
    artifact = export([folder / "best"], out / "student.pt", overwrite=True)
    found = {
        "settings": settings,
        "parameters": sum(p.numel() for p in artifact.module.parameters()),
        "labels": len(parts["train"]),
        "minutes": minutes,
        "frames": len(parts["train"]) * config.student.train.epochs,
        "force_mae": errors["forces_mae"],
        "energy_mae": errors["energy_mae"],
    }
    with replacing(done) as temporary:
        temporary.write_text(json.dumps(found, indent=1))
    return found


def fitted(name: str, peer: Peer, size: str, out: Path, train: bool = True) -> dict[str, Any]:
    """Train one size of a package in its environment, unless it is trained; what `fit.py` says of it.

    Raises:
        MissingEngineError: its environment cannot be made.
        TrainingError: it fails there, or is not trained and shall not be.
    """
    folder, data = out / "peers" / f"{name}-{size}", out / "data.npz"
    folder.mkdir(parents=True, exist_ok=True)
    job = {"size": peer.sizes[size], "training": peer.training.model_dump(), "data": os.path.relpath(data, folder)}
    job["data_sha256"] = sha256_of(data)
    before, done = folder / "job.json", folder / "fitted.json"
    if not before.is_file() or json.loads(before.read_text()) != job:
        for old in (*folder.glob("*.pt"), *folder.glob("*.pt2"), done):
            old.unlink(missing_ok=True)
        before.write_text(json.dumps(job))
    if not done.is_file() and not train:
        raise TrainingError("it has not been trained yet")
    if not done.is_file():
        say(f"training {name} {size}, {peer.training.minutes:g} minutes of processor time")
        clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        limits = dict.fromkeys(THREAD_LIMITS, "1") | {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
        python = environments.make(PEERS[name].environment, say)
        command = [str(word) for word in (python, "-P", SCRIPTS / "fit.py", SCRIPTS / PEERS[name].script, folder)]
        with (folder / "log.txt").open("a") as log:
            code = subprocess.run(command, env={**clean, **limits}, stdout=log, stderr=log).returncode
        if code or not done.is_file():
            said = (folder / "log.txt").read_text().strip().splitlines()
            raise TrainingError(f"it cannot be trained (exit code {code}): " + "".join(said[-1:]))
    return dict(json.loads(done.read_text()))


def timed(config: Gate, found: dict[str, dict[str, Any]], system: System, out: Path) -> dict[str, Row]:
    """Rows of a call of every model, all asked in turn: eager, and compiled by each package's own means."""
    artifact = {"artifact": str((out / "student.pt").absolute())}
    subjects = [
        Subject(f"{OURS} {mode}", "mlff_engines.bench.ours", options=artifact, environment={"MLFF_KERNEL": kernel})
        for mode, kernel in (("eager", "torch"), ("compiled", "fused"))
    ]
    trained = [(name, size) for name, peer in config.peers.items() for size in peer.sizes if f"{name} {size}" in found]
    for name, size in trained:
        folder = (out / "peers" / f"{name}-{size}").absolute()
        options = {**PEERS[name].options, "folder": str(folder), "weights": str(folder / "model.pt")}
        subjects += [
            Subject(
                f"{name} {size} {mode}",
                str(SCRIPTS / PEERS[name].script),
                python=str(environments.make(PEERS[name].environment, say)),
                options={**options, "mode": mode},
                environment={"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"},
            )
            for mode in MODES
        ]
    plan = Plan(systems=(system.name,), threads=(1,), rounds=config.rounds, sample=0.3, budget=20.0)
    key = hashlib.sha256(json.dumps([found, [subject.what for subject in subjects]]).encode()).hexdigest()[:8]
    return {row.what: row for row in measure(plan, subjects, [system], out / f"timing-{key}", say)}


@dataclass(frozen=True)
class Judged:
    """One model; `ms` of a call by mode, as far as it could be timed."""

    package: str
    name: str
    facts: dict[str, Any]
    ms: dict[str, float]
    qualifies: bool


def judge(config: Gate, found: dict[str, dict[str, Any]], rows: dict[str, Row]) -> list[Judged]:
    """Ours first."""
    bar = config.tolerance * found[OURS]["force_mae"]
    judged = []
    for name, facts in found.items():
        ms = {mode: row.cpu_ms for mode in MODES if (row := rows.get(f"{name} {mode}")) and row.cpu_ms}
        judged.append(Judged(name.partition(" ")[0], name, facts, ms, facts["force_mae"] <= bar))
    return judged


def verdicts(config: Gate, judged: Sequence[Judged]) -> list[str]:
    """Per package and mode: its fastest model that qualifies, in times of ours; else its fastest of all."""
    ours, *others = judged
    bar = config.tolerance * ours.facts["force_mae"]
    said = [f"A model qualifies up to {1e3 * bar:.1f} meV/Å, {config.tolerance:g} times the error of our student."]
    for package in config.peers:
        for mode in MODES:
            timed = [model for model in others if model.package == package and mode in model.ms]
            best = min(timed, key=lambda model: (not model.qualifies, model.ms[mode]), default=None)
            if best is None or "compiled" not in ours.ms:
                continue
            times = f"{best.ms[mode] / ours.ms['compiled']:.3g} times ours"
            if best.qualifies:
                said.append(f"{package}, {mode}: its fastest model that qualifies, {best.name}, takes {times}.")
            else:
                said.append(f"{package}, {mode}: none qualifies; the fastest of all, {best.name}, takes {times}.")
    return said


def table(judged: Sequence[Judged]) -> str:
    """Ours compiled is the fused kernel."""
    unit = judged[0].ms.get("compiled")
    titles = ["", "parameters", "labels", "minutes", "frames seen", "force MAE, meV/Å", "qualifies"]
    titles += [f"{mode}, {what}" for mode in MODES for what in ("ms", "times ours")]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for model in judged:
        facts = model.facts
        cells = [model.name, *(f"{facts[key]:,}" for key in ("parameters", "labels")), f"{facts['minutes']:.1f}"]
        cells += [f"{facts['frames']:,}", f"{1e3 * facts['force_mae']:.1f}", "yes" if model.qualifies else "no"]
        for mode in MODES:
            ms = model.ms.get(mode)
            cells += [f"{ms:.3g}" if ms else "-", f"{ms / unit:.3g}" if ms and unit else "-"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def section(config: Gate, parts: dict[str, list[Atoms]], shown: str, command: str) -> str:
    """What the page says of the run."""
    peers = ", ".join(f"{peer.training.minutes:g} for {name}" for name, peer in config.peers.items())
    about = (
        f"{len(parts['train']):,} labels of {config.teacher.level_of_theory} for {config.system}, the same for every "
        f"model; held out: {len(parts['held_out']):,} structures of trajectories at "
        f"{', '.join(f'{t:g}' for t in config.held_out.temperatures)} K whose seeds were never sampled. Minutes are "
        f"processor time of one thread; allowed were {peers}, in one training loop for all of them "
        "(`mlff_engines/bench/theirs/fit.py`: each package's own model, batches, loss weights and rates, with a "
        "learning rate that falls as the time goes). Milliseconds are the median processor time of a call for "
        f"energy and forces with edges given, float32, one thread, all models in one run. {machine()}"
    )
    return "\n\n".join([f"```sh\n{command}\n```", about, shown])


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("-o", "--out", type=Path, help="folder of the run; default: `output` of CONFIG")
    parser.add_argument("--page", type=Path, help="put the table between the markers of this page")
    parser.add_argument("--as-is", action="store_true", help="judge what has been trained, and train no more")
    parser.add_argument("--time-again", action="store_true", help="forget the timing, not the trainings")
    options = parser.parse_args(arguments)
    config = load_yaml(Gate, options.config)
    unknown = sorted(set(config.peers) - set(PEERS))
    if unknown:
        raise ConfigError(f"{options.config}: unknown peers {unknown}; allowed: {', '.join(PEERS)}")
    out = options.out or config.output
    if out is None:
        raise ConfigError(f"{options.config} names no `output`; give the folder of the run with -o DIR")
    out.mkdir(parents=True, exist_ok=True)
    system = named(config.system)
    parts = labelled(config, system, out)
    found, missing = {OURS: our_student(config, parts, out)}, []
    for name, peer in config.peers.items():
        for size in peer.sizes:
            try:
                found[f"{name} {size}"] = fitted(name, peer, size, out, train=not options.as_is)
            except MLFFError as error:
                missing.append(f"No {name} {size}: {error}.")
                say(missing[-1])
    if options.time_again:
        for old in out.glob("timing-*"):
            shutil.rmtree(old)
    rows = timed(config, found, system, out)
    judged = judge(config, found, rows)
    notes = [*verdicts(config, judged), *missing]
    notes += [f"No figure of {what}: {row.reason}." for what, row in rows.items() if row.reason]
    shown = "\n\n".join([table(judged), "\n".join(f"- {note}" for note in notes)])
    print(shown)
    if options.page is not None:
        command = f"python examples/benchmarks/same_accuracy.py examples/benchmarks/{options.config.name}"
        fill(options.page, SECTION, section(config, parts, shown, command))


if __name__ == "__main__":
    try:
        main()
    except MLFFError as error:
        sys.exit(f"error: {error}")
