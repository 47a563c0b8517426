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

BEGIN, END = "<!-- mlff bench: begin -->", "<!-- mlff bench: end -->"
FIGURE = "speed.svg"
NONE = "-"


def table(rows: Sequence[Row], cell: Callable[[Row], str]) -> list[str]:
    """Subjects down, systems across, in Markdown."""
    systems = list(dict.fromkeys(row.system for row in sorted(rows, key=lambda row: row.atoms)))
    found = {(row.what, row.system): cell(row) for row in rows}
    lines = ["| | " + " | ".join(systems) + " |", "|---" * (len(systems) + 1) + "|"]
    for what in dict.fromkeys(row.what for row in rows):
        lines.append(f"| `{what}` | " + " | ".join(found.get((what, system), NONE) for system in systems) + " |")
    return lines


def milliseconds(row: Row) -> str:
    """Median by the clock, 95th percentile, and processor time."""
    if row.median_ms is None or row.p95_ms is None or row.cpu_ms is None:
        return NONE
    return f"{row.median_ms:.3g} / {row.p95_ms:.3g} ({row.cpu_ms:.3g})"


def section(rows: Sequence[Row], command: str) -> str:
    """The tables of one run, with the figure."""
    parts = [f"```sh\n{command}\n```", f"![milliseconds of a call over atoms](figures/{FIGURE})", _machine()]
    for threads in sorted({row.threads for row in rows}):
        these = [row for row in rows if row.threads == threads]
        shown = f"{threads} thread{'s' * (threads > 1)}"
        alone, steps = ([row for row in these if ("/" in row.what) == whole] for whole in (False, True))
        for title, part in ((f"A model alone, {shown}", alone), (f"With the neighbour list, {shown}", steps)):
            if part:
                caption = "Milliseconds of a call: median / 95th percentile (median processor time)"
                parts += [f"### {title}", f"{caption}.", "\n".join(table(part, milliseconds))]
        ratios = _ratios(alone)
        if ratios:
            parts += [f"### Times the processor time of `mlff`, {shown}", "\n".join(table(ratios, _ratio))]
        parts += ["Memory of one evaluation, kB per atom (peak, less what the process had before):"]
        parts += ["\n".join(table([row for row in alone if row.atoms >= 192], _memory))]
    missing = dict.fromkeys(f"- `{row.what}`, {row.system}: {row.reason}" for row in rows if row.reason)
    if missing:
        parts += ["Not measured:", "\n".join(missing)]
    return "\n\n".join(parts)


def write_page(rows: Sequence[Row], command: str, page: Path) -> None:
    """Put the section between the markers of `page`, and the figure below `figures/` beside it.

    Raises:
        ConfigError: the page does not exist or lacks the markers; or matplotlib is not installed.
    """
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ConfigError(f"{page} needs the lines {BEGIN!r} and {END!r}, once each: the tables go between them")
    figure = svg(plot(rows))
    with replacing(page.parent / "figures" / FIGURE) as temporary:
        temporary.write_text(figure.replace("<svg", '<svg style="background: white"', 1), encoding="utf-8")
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    with replacing(page) as temporary:
        temporary.write_text(f"{before}{BEGIN}\n\n{section(rows, command)}\n\n{after}", encoding="utf-8")


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


def _ratios(rows: Sequence[Row]) -> list[Row]:
    """The other rows in units of those of `mlff`."""
    ours = {row.system: row.cpu_ms for row in rows if row.what == "mlff" and row.cpu_ms}
    return [
        row.model_copy(update={"cpu_ms": row.cpu_ms / ours[row.system]})
        for row in rows
        if row.what != "mlff" and row.system in ours and row.cpu_ms
    ]


def _ratio(row: Row) -> str:
    return f"{row.cpu_ms:.3g}"


def _memory(row: Row) -> str:
    if row.rss_mb is None or row.base_mb is None:
        return NONE
    return f"{1e3 * (row.rss_mb - row.base_mb) / row.atoms:.0f}"


def _machine() -> str:
    """The processor of this machine, in words."""
    name = platform.machine()
    path = Path("/proc/cpuinfo")
    if path.is_file():
        found = re.search(r"^model name\s*: (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        name = found[1] if found else name
    return f"{name}, {os.cpu_count()} cores."
