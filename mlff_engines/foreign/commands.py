"""`mlff import`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlff_engines.errors import ArtifactError, MLFFError

if TYPE_CHECKING:
    from mlff_engines.structure import Structure

CONTEXT = {"help_option_names": ["-h", "--help"]}


@click.group("import", context_settings=CONTEXT)
def import_model() -> None:
    """Turn other packages' models into checkpoints, with the same energies and forces."""


@import_model.command("schnetpack", context_settings=CONTEXT)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The checkpoint folder to write.")
@click.option("--elements", required=True, help="Comma-separated symbols that the model was trained for.")
@click.option("--energy-unit", "unit", required=True, help="Of the model, e.g. eV or kcal/mol. Lengths are in Å.")
@click.option("--check", type=click.Path(path_type=Path), help="A structure file to compare both on as well.")
@click.option(
    "--python",
    type=click.Path(path_type=Path),
    help="An interpreter that has SchNetPack 2; by default an environment that is made for it, once.",
)
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint in OUT.")
def schnetpack(
    model: Path, out: Path, elements: str, unit: str, check: Path | None, python: Path | None, overwrite: bool
) -> None:
    """Import a PaiNN that SchNetPack trained: MODEL is its file, such as best_model.

    SchNetPack reads MODEL, which is a pickle: trust it. The checkpoint is written only if it gives SchNetPack's
    energies and forces in float64; then export it with mlff-export.
    """
    from mlff_engines.foreign.environments import make
    from mlff_engines.foreign.schnetpack import TOLERANCE, import_schnetpack

    if (out / "config.yaml").exists() and not overwrite:
        raise ArtifactError(f"{out} holds a checkpoint; choose another folder or pass --overwrite")
    off = import_schnetpack(
        model,
        out,
        elements=[word.strip() for word in elements.split(",") if word.strip()],
        unit=unit,
        python=python or make("schnetpack", lambda line: click.echo(line, err=True)),
        structures=[] if check is None else _structures(check),
    )
    click.echo(f"{out}: forces as SchNetPack's to {off:.1e} eV/Å in float64, allowed {TOLERANCE:g}")
    click.echo(f"now: mlff-export {out} -o {out.name}.pt")


def _structures(path: Path) -> list[Structure]:
    try:
        reader = importlib.import_module("mlff_ase.structures")
    except ModuleNotFoundError:
        raise MLFFError("--check reads structures with ASE: pip install 'mlff-engines[ase]'") from None
    found: list[Structure] = reader.read(path)
    return found
