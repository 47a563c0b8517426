"""Options that the commands of several packages share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from mlff_engines.config import Config, describe_keys

path_argument = click.Path(path_type=Path)
output_option = click.option("-o", "--out", required=True, type=path_argument, help="Where the result goes.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Make anew what was made with other settings.")


def keys_option(kind: type[Config]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """``--keys``: every key of the configuration file, its default and meaning."""

    def callback(context: click.Context, _: click.Parameter, asked: bool) -> None:
        if asked:
            click.echo("\n".join(describe_keys(kind)))
            context.exit()

    return click.option(
        "--keys",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=callback,
        help=f"List every key of {kind.__name__} with its default and meaning.",
    )
