"""The stages of `mlff kstep` that belong to training."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from mlff_engines.config import load_yaml
from mlff_engines.errors import DataError
from mlff_engines.options import keys_option, output_option, path_argument
from mlff_training.kstep.config import JumpModelConfig, JumpTrainConfig
from mlff_training.kstep.pairs import STEPS, load_pairs, make_pairs
from mlff_training.kstep.student import TrajectoryStudentConfig, train_trajectory_student
from mlff_training.kstep.train import train_jumps


@click.command()
@click.argument("trajectories", type=path_argument)
@click.option("-k", "steps", type=int, multiple=True, default=STEPS, show_default=True, help="Steps of a jump.")
@click.option("--stride", type=int, default=1, show_default=True, help="Every such-many-th pair.")
@output_option
def dataset(trajectories: Path, steps: tuple[int, ...], stride: int, out: Path) -> None:
    """Make pairs for jumps from the NPZ files in TRAJECTORIES; sets that are there already stay."""
    files = sorted(trajectories.glob("*.npz"))
    if not files:
        raise DataError(f"no trajectories (*.npz) in {trajectories}: run mlff kstep simulate")
    for k in steps:
        path = out / f"dataset_k{k}.npz"
        if not path.exists():
            make_pairs(files, k, out, stride=stride)
        record = load_pairs(path).record
        click.echo(f"{path}: {record.pairs} pairs of {', '.join(record.molecules)}")


@click.command()
@click.argument("data", type=path_argument)
@click.option("--model", "model", required=True, type=path_argument, help="model.yaml")
@click.option("--train", "train_file", required=True, type=path_argument, help="train.yaml")
@click.option("--split-by", type=click.Choice(["molecule", "segment"]), default="molecule", show_default=True)
@output_option
@keys_option(JumpTrainConfig)
def train(data: Path, model: Path, train_file: Path, split_by: Literal["molecule", "segment"], out: Path) -> None:
    """Train jumps on the pairs in DATA; the same command goes on where it was stopped."""
    configs = load_yaml(JumpModelConfig, model), load_yaml(JumpTrainConfig, train_file)
    for checkpoint in train_jumps(data, *configs, out, by=split_by):
        click.echo(f"{checkpoint}: export it with mlff-export {checkpoint} -o jump.pt")


@click.command()
@click.argument("trajectories", type=path_argument, nargs=-1, required=True)
@click.argument("config", type=path_argument)
@output_option
@keys_option(TrajectoryStudentConfig)
def student(trajectories: tuple[Path, ...], config: Path, out: Path) -> None:
    """Train a force field on the frames in the folders TRAJECTORIES, for variants C and D; the same command goes on."""
    files = [path for folder in trajectories for path in sorted(folder.glob("*.npz"))]
    artifact = train_trajectory_student(files, load_yaml(TrajectoryStudentConfig, config), out)
    click.echo(f"{artifact}: run it with mlff kstep run --student {artifact}")
