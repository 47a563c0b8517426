"""The stages of `mlff kstep` that belong to OpenMM."""

from __future__ import annotations

from pathlib import Path

import click

from mlff_engines.config import load_yaml
from mlff_engines.options import keys_option, output_option, overwrite_option, path_argument
from mlff_openmm.kstep.config import MDConfig
from mlff_openmm.kstep.prepare import prepare as run_prepare
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
