"""`mlff bench`."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

import click

from mlff_engines.errors import ConfigError

CONTEXT = {"help_option_names": ["-h", "--help"]}


@click.command(context_settings=CONTEXT)
@click.option("--quick", is_flag=True, help="Minutes: fewer rounds, one thread, models alone of what is at hand.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder to keep; repeat the command to go on.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the rows here as a JSON list.")
@click.option("--page", type=click.Path(path_type=Path), help="Put tables and a plot between the markers of this page.")
@click.option("--artifact", type=click.Path(path_type=Path), help="A student; default: ours with random weights.")
@click.option("--systems", help="Comma-separated: aspirin, water-N with N atoms.")
@click.option("--threads", help="Comma-separated numbers of threads, one run each.  [default: 1,2; quick: 1]")
@click.option("--what", default="", help="Comma-separated names to time, such as 'mlff,mlff/*,schnetpack'.")
@click.option("--peers", default="", help="Comma-separated packages to install first, each in its own environment.")
@click.option("--overwrite", is_flag=True, help="Begin anew in OUT.")
def bench(
    quick: bool,
    out: Path | None,
    json_file: Path | None,
    page: Path | None,
    artifact: Path | None,
    systems: str | None,
    threads: str | None,
    what: str,
    peers: str,
    overwrite: bool,
) -> None:
    """Time our student and other packages side by side: the models alone, and whole MD steps in every engine.

    Each runs in a process of its own with the number of threads fixed; they are asked in turn for one sample after
    another, so that whatever else the machine does hits all alike. Peers: schnetpack, mace, nequip, so3krates;
    those installed by an earlier --peers take part by themselves.
    """
    from mlff_engines.bench import subjects as known
    from mlff_engines.bench import systems as boxes
    from mlff_engines.bench.page import milliseconds, table, write_page
    from mlff_engines.bench.rows import write_rows
    from mlff_engines.bench.run import Plan, measure

    names = _words(systems) or list(boxes.QUICK if quick else boxes.FULL)
    given = {"systems": tuple(names), "threads": _numbers(threads or ("1" if quick else "1,2"))}
    pace = {"rounds": 4, "sample": 0.1, "budget": 8.0, "patience": 4.0} if quick else {}
    plan = Plan(**given, **pace)  # type: ignore[arg-type]
    chosen_systems = [boxes.named(name) for name in names]
    with ExitStack() as stack:
        if out is None:
            out = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        elif overwrite:
            shutil.rmtree(out, ignore_errors=True)
        found = known.all_subjects(out / "models", artifact, _words(peers), _progress)
        if quick and not what:  # other packages' whole steps take longer than one would wait
            found = [subject for subject in found if subject.what.startswith("mlff") or "/" not in subject.what]
        rows = measure(plan, known.chosen(found, _words(what)), chosen_systems, out, _progress)
    if json_file is not None:
        write_rows(json_file, rows)
    for number in plan.threads:
        click.echo(f"{number} thread{'s' * (number > 1)}, ms: median / 95th percentile (processor time)")
        click.echo("\n".join(table([row for row in rows if row.threads == number], milliseconds)))
    if page is not None:
        write_page(rows, _command(quick, systems, threads, what, peers), page)


def _command(quick: bool, systems: str | None, threads: str | None, what: str, peers: str) -> str:
    """What makes the same rows again; where they are kept is everybody's own affair."""
    options = {"--systems": systems, "--threads": threads, "--what": what, "--peers": peers}
    given = [f"{name} '{value}'" for name, value in options.items() if value]
    return " ".join(["mlff bench", *["--quick"] * quick, *given])


def _words(text: str | None) -> list[str]:
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def _numbers(text: str) -> tuple[int, ...]:
    words = _words(text)
    if not words or not all(word.isdigit() and int(word) for word in words):
        raise ConfigError(f"--threads {text!r}; allowed: positive whole numbers, such as 1,2")
    return tuple(int(word) for word in words)


def _progress(line: str) -> None:
    click.echo(line, err=True)
