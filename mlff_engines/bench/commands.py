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
@click.option("--roofline", is_flag=True, help="Instead: the student's operations and bytes beside this machine's.")
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
    roofline: bool,
    overwrite: bool,
) -> None:
    """Time our student and other packages side by side: the models alone, and whole MD steps in every engine.

    Each runs in a process of its own with the number of threads fixed; they are asked in turn for one sample after
    another, so that whatever else the machine does hits all alike. Peers: schnetpack, torchmdnet, mace, nequip,
    allegro, deepmd, so3krates; those installed by an earlier --peers take part by themselves.
    """
    from mlff_engines.bench import ours
    from mlff_engines.bench import page as pages
    from mlff_engines.bench import subjects as known
    from mlff_engines.bench import systems as boxes
    from mlff_engines.bench.rows import write_rows
    from mlff_engines.bench.run import Plan, measure

    names = _words(systems) or list(boxes.QUICK if quick or roofline else boxes.FULL)
    if roofline and (threads or what or peers):
        raise ConfigError("--roofline is of our student on one thread: leave out --threads, --what and --peers")
    given = {"systems": tuple(names), "threads": _numbers(threads or ("1" if quick or roofline else "1,2"))}
    pace = {"rounds": 4, "sample": 0.1, "budget": 8.0, "patience": 4.0} if quick else {}
    plan = Plan(**given, **pace)  # type: ignore[arg-type]
    chosen_systems = [boxes.named(name) for name in names]
    command = _command(quick, systems, threads, what, peers, roofline)
    with ExitStack() as stack:
        if out is None:
            out = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        elif overwrite:
            shutil.rmtree(out / "roofline" if roofline else out, ignore_errors=True)
        if roofline:
            from mlff_engines.bench import roofline as roof

            (out / "models").mkdir(parents=True, exist_ok=True)
            artifact = artifact or ours.default_student(out / "models")
            rows = measure(plan, roof.subjects(artifact), chosen_systems, out / "roofline", _progress)
            text = roof.report(artifact, rows, command)
            click.echo(text)
            if page is not None:
                pages.fill(page, roof.SECTION, text)
        else:
            found = known.all_subjects(out / "models", artifact, _words(peers), _progress)
            if quick and not what:  # compiling and other packages' whole steps take longer than one would wait
                found = [subject for subject in found if subject.what.startswith("mlff") or "/" not in subject.what]
                found = [subject for subject in found if subject.what != "mlff-compiled"]
            found = known.chosen(found, _words(what))
            rows = measure(plan, found, chosen_systems, out, _progress)
            click.echo("ms: median / 95th percentile (processor time)")
            click.echo("\n".join(pages.table(rows, pages.milliseconds)))
            if page is not None:
                pages.write_page(rows, command, page, [subject.note for subject in found if subject.note])
    if json_file is not None:
        write_rows(json_file, rows)


def _command(quick: bool, systems: str | None, threads: str | None, what: str, peers: str, roofline: bool) -> str:
    """What makes the same rows again; where they are kept is everybody's own affair."""
    options = {"--systems": systems, "--threads": threads, "--what": what, "--peers": peers}
    given = [f"{name} '{value}'" for name, value in options.items() if value]
    return " ".join(["mlff bench", *["--roofline"] * roofline, *["--quick"] * quick, *given])


def _words(text: str | None) -> list[str]:
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def _numbers(text: str) -> tuple[int, ...]:
    words = _words(text)
    if not words or not all(word.isdigit() and int(word) for word in words):
        raise ConfigError(f"--threads {text!r}; allowed: positive whole numbers, such as 1,2")
    return tuple(int(word) for word in words)


def _progress(line: str) -> None:
    click.echo(line, err=True)
