"""The rows as tables and a plot in a page of the documentation, between two markers."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from mlff_engines.bench.rows import Row
from mlff_engines.errors import ConfigError
from mlff_engines.files import replacing
from mlff_engines.validation.reports.figures import svg
from mlff_engines.validation.result import Curve, Plot

SECTION = "mlff bench"
FIGURE = "speed.svg"
NONE = "-"
RATIO = "Of one thread by the processor time, of more by the clock."


def table(rows: Sequence[Row], cell: Callable[[Row], str]) -> list[str]:
    """Subjects and numbers of threads down, systems across, in Markdown."""
    systems = list(dict.fromkeys(row.system for row in sorted(rows, key=lambda row: row.atoms)))
    found = {(row.what, row.threads, row.system): cell(row) for row in rows}
    lines = ["| | threads | " + " | ".join(systems) + " |", "|---" * (len(systems) + 2) + "|"]
    for what in dict.fromkeys(row.what for row in rows):
        for threads in sorted({row.threads for row in rows if row.what == what}):
            cells = [found.get((what, threads, system), NONE) for system in systems]
            lines.append(f"| `{what}` | {threads} | " + " | ".join(cells) + " |")
    return lines


def milliseconds(row: Row) -> str:
    """Median by the clock, 95th percentile, and processor time."""
    if row.median_ms is None or row.p95_ms is None or row.cpu_ms is None:
        return NONE
    return f"{row.median_ms:.3g} / {row.p95_ms:.3g} ({row.cpu_ms:.3g})"


def section(rows: Sequence[Row], command: str, notes: Sequence[str] = ()) -> str:
    """The tables of one run, with the figure."""
    parts = [f"```sh\n{command}\n```", f"![milliseconds of a call over atoms](figures/{FIGURE})", machine()]
    if notes:
        parts.append("\n".join(f"- {note}" for note in notes))
    alone, steps = ([row for row in rows if ("/" in row.what) == whole] for whole in (False, True))
    for title, part in (("A model alone", alone), ("With the neighbour list", steps)):
        if part:
            caption = "Milliseconds of a call: median / 95th percentile (median processor time)."
            parts += [f"### {title}", caption, "\n".join(table(part, milliseconds))]
    same = [row for row in alone if row.what == "schnetpack"]
    for title, ours, theirs in (
        ("Times the time of `mlff`", "mlff", alone),
        ("Same weights: times the time of `mlff-schnetpack`", "mlff-schnetpack", same),
    ):
        ratios = _ratios(alone, ours, theirs)
        if ratios:
            parts += [f"### {title}", RATIO, "\n".join(table(ratios, _ratio))]
    large = [row for row in alone if row.atoms >= 192]
    if large:
        parts += ["Memory of one evaluation, kB per atom (peak, less what the process had before):"]
        parts += ["\n".join(table(large, _memory))]
    missing = dict.fromkeys(f"- `{row.what}`, {row.system}: {row.reason}" for row in rows if row.reason)
    if missing:
        parts += ["Not measured:", "\n".join(missing)]
    return "\n\n".join(parts)


def write_page(rows: Sequence[Row], command: str, page: Path, notes: Sequence[str] = ()) -> None:
    """Put the section between the markers of `page`, and the figure below `figures/` beside it.

    Raises:
        ConfigError: the page does not exist or lacks the markers; or matplotlib is not installed.
    """
    _around(page, SECTION)
    figure = svg(plot(rows))
    with replacing(page.parent / "figures" / FIGURE) as temporary:
        temporary.write_text(figure.replace("<svg", '<svg style="background: white"', 1), encoding="utf-8")
    fill(page, SECTION, section(rows, command, notes))


def markers(name: str) -> tuple[str, str]:
    """The lines between which a page holds the section `name`."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def fill(page: Path, name: str, text: str) -> None:
    """Put `text` between the markers of the section `name`.

    Raises:
        ConfigError: the page does not exist or lacks the markers.
    """
    before, after = _around(page, name)
    with replacing(page) as temporary:
        temporary.write_text(f"{before}\n\n{text}\n\n{after}", encoding="utf-8")


def _around(page: Path, name: str) -> tuple[str, str]:
    """What stands before and after a section, its markers included."""
    begin, end = markers(name)
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ConfigError(f"{page} needs the lines {begin!r} and {end!r}, once each: the tables go between them")
    return text[: text.index(begin) + len(begin)], text[text.index(end) :]


def plot(rows: Sequence[Row]) -> Plot:
    """Models alone with the fewest threads."""
    fewest = min((row.threads for row in rows), default=1)
    curves = []
    for what in dict.fromkeys(row.what for row in rows if "/" not in row.what):
        points = [(r.atoms, r.median_ms) for r in rows if r.what == what and r.threads == fewest and r.median_ms]
        if points:
            x, y = zip(*sorted(points), strict=True)
            curves.append(Curve(what, x, y))
    title = f"Energy and forces, {fewest} thread{'s' * (fewest > 1)}"
    return Plot(title, "atoms", "median of a call, ms", curves, scale="log-log")


def _ratios(rows: Sequence[Row], ours: str, theirs: Sequence[Row]) -> list[Row]:
    """Those of `theirs` in units of the rows of `ours` on the same system with as many threads, as their `cpu_ms`."""
    units = {(row.system, row.threads): _spent(row) for row in rows if row.what == ours}
    found = []
    for row in theirs:
        spent, unit = _spent(row), units.get((row.system, row.threads))
        if row.what != ours and spent and unit:
            found.append(row.model_copy(update={"cpu_ms": spent / unit}))
    return found


def _spent(row: Row) -> float | None:
    return row.cpu_ms if row.threads == 1 else row.median_ms


def _ratio(row: Row) -> str:
    return f"{row.cpu_ms:.3g}"


def _memory(row: Row) -> str:
    if row.rss_mb is None or row.base_mb is None:
        return NONE
    return f"{1e3 * (row.rss_mb - row.base_mb) / row.atoms:.0f}"


def machine() -> str:
    """The processor of this machine, in words."""
    name = platform.machine()
    path = Path("/proc/cpuinfo")
    if path.is_file():
        found = re.search(r"^model name\s*: (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        name = found[1] if found else name
    return f"{name}, {os.cpu_count()} cores."
