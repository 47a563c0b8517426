"""The commands of `mlff` that make a student."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import yaml

from mlff_engines.config import load_yaml
from mlff_engines.errors import ConfigError
from mlff_engines.options import keys_option, output_option, path_argument
from mlff_training.data.checks import check_frames
from mlff_training.data.formats import convert, describe, read
from mlff_training.distill import DistillConfig, smoke
from mlff_training.distill import distill as run_distill
from mlff_training.sampling.sample import sample as run_sample
from mlff_training.student import StudentConfig, load_data, train_student
from mlff_training.teachers.labelling import label as run_label
from mlff_training.trial import Trial

change_option = click.option(
    "--allow-config-change", is_flag=True, help="Resume although the configuration differs from the saved one."
)


@click.command()
@click.argument("config", type=path_argument)
@click.option("-o", "--out", type=path_argument, help="Folder of the run; default: `output` of CONFIG.")
@click.option("--smoke", "in_seconds", is_flag=True, help="Only try the path: a useless student in seconds.")
@change_option
@keys_option(DistillConfig)
def distill(config: Path, out: Path | None, in_seconds: bool, allow_config_change: bool) -> None:
    """From a teacher to a student that has been tried, as the YAML file CONFIG says; run it again to resume."""
    settings = load_yaml(DistillConfig, config)
    folder = out or settings.output
    if folder is None:
        raise ConfigError(f"{config} names no `output`; give the folder of the run with -o DIR")
    if not settings.start:
        raise ConfigError(f"{config} names no structures to start from: start: [FILE, ...]")
    if settings.trial and settings.sampling.md and settings.trial.seed in settings.sampling.md.seeds:
        raise ConfigError(f"trial.seed {settings.trial.seed} is also sampled (sampling.md.seeds); choose another")
    start = [frame for file in settings.start for frame in read(config.parent / file, labels=None)]
    artifact, trial = run_distill(
        start,
        smoke(settings) if in_seconds else settings,
        folder,
        allow_config_change=allow_config_change,
    )
    if trial is not None:
        click.echo(_summary(trial, folder))
    click.echo(
        f"""
The student: {artifact}    To run it:

  from ase.io import read
  from mlff_ase import MLFFCalculator
  atoms = read("{config.parent / settings.start[0]}")
  atoms.calc = MLFFCalculator("{artifact}")
  print(atoms.get_potential_energy())"""
    )


def _summary(trial: Trial, folder: Path) -> str:
    forces = ", ".join(f"{error:.1f} meV/Å at {temperature}" for temperature, error in trial.force_mae.items())
    lines = ["", f"force error (MAE) on teacher trajectories never sampled: {forces}"]
    lines.append(
        f"its own dynamics, {trial.nve_ps:g} ps NVE from one start, and what halving the time step does (4 is right):"
    )
    for name, found in trial.engines.items():
        bonds = "no bond broken" if found.bonds_intact else "A BOND BROKE"
        ratios = ", ".join(f"{ratio:.2f}" for ratio in found.dt2_ratios)
        lines.append(
            f"  {name:8s} {bonds} (largest change {found.largest_bond_change:.2f} Å), "
            f"energy drift {found.nve_drift:.3f} meV/atom/ps; energy error falls by {ratios}"
        )
    lines += [f"  {name:8s} left out: {problem}" for name, problem in trial.missing.items()]
    where = folder / "trial"
    lines.append(f"plots: {where / 'student_vs_teacher.png'}    trajectories: {where}/ENGINE/nve.*")
    return "\n".join(lines)


@click.command()
@click.argument("config", type=path_argument)
@output_option
def sample(config: Path, out: Path) -> None:
    """Sample structures with the teacher, as the YAML file CONFIG of `mlff distill` says, into OUT (extended XYZ)."""
    settings = load_yaml(DistillConfig, config)
    start = [frame for file in settings.start for frame in read(config.parent / file, labels=None)]
    frames = run_sample(start, settings.teacher, settings.sampling, out, workers=settings.workers)
    click.echo(f"{out}: {len(frames)} structures")


@click.command()
@click.argument("config", type=path_argument)
@click.argument("structures", type=path_argument)
@output_option
def label(config: Path, structures: Path, out: Path) -> None:
    """Label STRUCTURES with the teacher of CONFIG into OUT (extended XYZ); run it again to resume."""
    settings = load_yaml(DistillConfig, config)
    frames = run_label(
        read(structures, labels=None),
        settings.teacher,
        out,
        workers=settings.workers,
        hessian_rows=settings.hessian_rows,
        seed=settings.train.seed,
    )
    click.echo(f"{out}: {len(frames)} labelled structures")


@click.group()
def data() -> None:
    """Convert and describe data sets."""


units_options = (
    click.option("--energy-unit", help="Unit of energies where the file does not say."),
    click.option("--length-unit", help="Unit of lengths where the file does not say."),
    click.option("--labels", default="default", show_default=True, help="Which labels, where a file has several."),
)


def with_units(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options about units and labels."""
    for option in reversed(units_options):
        command = option(command)
    return command


@data.command("convert")
@click.argument("source", type=path_argument)
@click.argument("target", type=path_argument)
@with_units
@click.option("--level", help="Level of theory to write into every frame.")
@click.option("--charge", type=float, help="Total charge of every frame, e.")
@click.option("--multiplicity", type=int, help="Spin multiplicity of every frame.")
@click.option("--overwrite", is_flag=True, help="Replace an existing TARGET.")
def convert_data(source: Path, target: Path, overwrite: bool, **options: Any) -> None:
    """Convert SOURCE (npz, DeePMD folder, ASE database, XYZ) to canonical extended XYZ."""
    click.echo(yaml.safe_dump(convert(source, target, overwrite=overwrite, **options), sort_keys=False))


@data.command("inspect")
@click.argument("source", type=path_argument)
@with_units
def inspect_data(source: Path, **options: Any) -> None:
    """Say what is in SOURCE and whether its labels make sense."""
    frames = read(source, **options)
    click.echo(yaml.safe_dump(describe(frames), sort_keys=False))
    check_frames(frames, str(source))


@click.command()
@click.argument("config", type=path_argument)
@output_option
@change_option
@keys_option(StudentConfig)
def train(config: Path, out: Path, allow_config_change: bool) -> None:
    """Train a student on labelled structures, as the YAML file CONFIG says; run it again to resume."""
    settings = load_yaml(StudentConfig, config)
    parts = load_data(settings.data, out)
    found = train_student(
        parts,
        settings.e0,
        settings.model,
        settings.train,
        out,
        device=settings.device,
        allow_config_change=allow_config_change,
    )
    if int(os.environ.get("RANK", "0")) > 0:  # torchrun: one process speaks for all
        return
    click.echo(f"best checkpoint: {out / 'best'}")
    for part, errors in found.items():
        forces, energy = (1e3 * errors[f"{what}_mae"] for what in ("forces", "energy"))
        click.echo(
            f"{part}: forces MAE {forces:.2f}, RMSE {1e3 * errors['forces_rmse']:.2f} meV/Å; "
            f"energy MAE {energy:.3f} meV/atom"
        )
