"""The stages of `mlff kstep` that belong to OpenMM."""

from __future__ import annotations

from pathlib import Path

import click

from mlff_engines.config import load_yaml
from mlff_engines.options import keys_option, output_option, overwrite_option, path_argument
from mlff_openmm.kstep.config import MDConfig, RunConfig
from mlff_openmm.kstep.prepare import prepare as run_prepare
from mlff_openmm.kstep.run import run as run_variants
from mlff_openmm.kstep.simulate import simulate as run_simulate


@click.command()
@click.argument("molecules", type=path_argument)
@click.argument("config", type=path_argument)
@output_option
@overwrite_option
@keys_option(MDConfig)
def prepare(molecules: Path, config: Path, out: Path, overwrite: bool) -> None:
    """Make a PDB file and an OpenMM System of each of MOLECULES, lines of `SMILES name`, as CONFIG (md.yaml) says."""
    for made in run_prepare(molecules, load_yaml(MDConfig, config), out, overwrite=overwrite):
        record = made.record
        click.echo(
            f"{made.name}: {record['atoms']} atoms, {record['settings']['force_field']}, "
            f"{record['constraints']} constraints, {made.system}"
        )


@click.command()
@click.argument("prepared", type=path_argument)
@click.argument("config", type=path_argument)
@output_option
@overwrite_option
@keys_option(MDConfig)
def simulate(prepared: Path, config: Path, out: Path, overwrite: bool) -> None:
    """Simulate what `mlff kstep prepare` left in PREPARED; the same command goes on where it was stopped."""
    for made in run_simulate(prepared, load_yaml(MDConfig, config), out, overwrite=overwrite):
        click.echo(made)


@click.command()
@click.argument("prepared", type=path_argument)
@click.argument("config", type=path_argument)
@click.option("--student", type=path_argument, help="Artifact of a force field, for variants C and D.")
@click.option("--jump", "jumps", type=path_argument, multiple=True, help="Artifact of a jump, for variants A.")
@click.option("--processes", type=click.IntRange(1), default=1, show_default=True, help="Simulations at a time.")
@output_option
@overwrite_option
@keys_option(RunConfig)
def run(
    prepared: Path,
    config: Path,
    student: Path | None,
    jumps: tuple[Path, ...],
    processes: int,
    out: Path,
    overwrite: bool,
) -> None:
    """Run the variants in CONFIG for each molecule in PREPARED, from the same starts; runs that are there stay."""
    settings = load_yaml(RunConfig, config)
    made = run_variants(prepared, settings, out, student=student, jumps=jumps, processes=processes, overwrite=overwrite)
    click.echo(f"{out}: {len(made)} runs; judge them with mlff kstep evaluate {out}")
