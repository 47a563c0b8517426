"""`report.html`: one file that opens anywhere, without a network."""

from __future__ import annotations

import importlib.resources
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlff_engines import __version__
from mlff_engines.files import replacing
from mlff_engines.validation.reports.figures import svg
from mlff_engines.validation.reports.report import Report, Section, overall
from mlff_engines.validation.result import NAMES, CheckResult, Verdict
from mlff_engines.validation.trajectories.observables import needed

# sign and words: colour alone tells nothing to one reader in twenty
WORDS: dict[Verdict | None, tuple[str, str]] = {
    "pass": ("✓", "pass"),
    "fail": ("✗", "FAIL"),
    "inconclusive": ("?", "inconclusive"),
    None: ("–", ""),
}
SUMMARY: dict[Verdict, str] = {
    "pass": "Every check that was run has passed.",
    "fail": "At least one check has failed: do not trust results of an engine that fails before the cause is known.",
    "inconclusive": "Nothing has failed, but some checks could not have shown a fault: that is not a pass.",
}
INCONCLUSIVE = "The data cannot decide. Run longer, or more replicas (--full); the detail says what was too little."
UNANSWERED = "The engine gave no number, or an error: mend that first, and the check will have its say."
# what to do about a failure
ADVICE = {
    "S1": "The engine computes something else than the model. Look at the detail for the quantity and the structure: "
    "all structures hint at units or the order of species, periodic ones at images, moved ones at a stale "
    "neighbour list, virials alone at a sign.",
    "S2": "The result depends on earlier calls: a cached neighbour list, or code specialised to other shapes. Export "
    "the artifact again with this torch version.",
    "S3": "Forces are not the gradient of the energy: dynamics will not conserve energy. Look for a correction or a "
    "unit applied to one of the two only.",
    "S4": "Pressure and stress are wrong, most often in sign or by a factor of the volume: do not run at constant "
    "pressure.",
    "S5": "The energy depends on orientation, origin or the order of atoms: the model or its neighbours break a "
    "symmetry.",
    "S6": "The same crystal in another description gives another energy: images or cell vectors are mistreated. Until "
    "it is mended, use boxes wider than twice the cutoff.",
    "S7": "Energy or force jumps at the cutoff: energy will drift. The model needs an envelope that ends smoothly.",
    "S8": "The neighbour search misses or invents edges: see which case in the detail.",
    "S9": "Lone atoms do not have their E0, or distant fragments feel one another: check the E0s and the range.",
    "S10": "Species are mixed up, or the energy of a part depends on elements that are absent.",
    "D1": "Domains disagree: ghost atoms are missing or counted. Run on one process until it is mended.",
    "D2": "The result depends on the skin: lists are rebuilt too late. Rebuild at every step until it is mended.",
    "D3": "A restart does not go on as the run would have: part of the state is not saved.",
    "D4": "Runs do not repeat: look for unordered sums on threads or a GPU, or for a seed that is not set.",
    "D5": "Memory grows with every evaluation: long runs will end.",
    "D6": "The end points of a mixed system are not its parts: check which atoms each potential acts on.",
    "M1": "Energy fluctuations do not follow the time step: forces are not the gradient of the energy that is reported "
    "(see S3), jump at the cutoff (S7) or come from a stale list (D2).",
    "M2": "Dynamics does not run backwards: forces depend on more than positions, or numbers are rounded.",
    "M3": "The engine integrates other equations: compare masses, time step and units.",
    "M4": "Total energy drifts: reduce the time step; if it stays, see S3 and S7. Float32 drifts more than float64.",
    "M5": "The ensemble differs from the eager model's: see S1 and S4 first, then the thermostat's temperature and "
    "friction.",
    "M6": "Kinetic energies are not those of the temperature: check thermostat, masses, constraints and removed "
    "degrees of freedom.",
    "M7": "The run became unstable: the model met structures outside its data. The frames before the failure are the "
    "ones to label and train on.",
}

# of figure and tolerance
UNITS = {
    **dict.fromkeys(("S1", "S2", "S5", "S6", "S7", "S9", "S10", "D1", "D6"), "eV, eV/Å"),
    "S3": "× uncertainty",
    "S4": "relative",
    "S8": "edges",
    "D2": "Å, eV",
    "D3": "Å, eV",
    "D5": "MiB",
    "M1": "from 4",
    "M2": "Å",
    "M3": "Å, eV",
    "M4": "meV/atom/ps",
}


@dataclass(frozen=True)
class Cell:
    """One check of one engine over all its systems."""

    verdict: Verdict | None
    text: str
    title: str
    anchor: str


def write_report(report: Report, folder: Path) -> tuple[Path, Path]:
    """Write `report.json` and the self-contained `report.html` into `folder`, replacing older ones.

    Raises:
        ConfigError: matplotlib or jinja2 is not installed; `report.json` is written even so.
    """
    paths = folder / "report.json", folder / "report.html"
    with replacing(paths[0]) as temporary:
        temporary.write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
    text = page(report)
    with replacing(paths[1]) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return paths


def page(report: Report) -> str:
    """The page.

    Raises:
        ConfigError: jinja2 or matplotlib is not installed.
    """
    jinja2 = needed("jinja2")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(number=number, share=share, moment=moment)
    folder = importlib.resources.files(__package__) / "templates"
    engines = list(dict.fromkeys(section.engine for section in report.sections))
    codes = [code for code in NAMES if any(r.code == code for s in report.sections for r in s.results)]
    codes += sorted({r.code for s in report.sections for r in s.results} - set(NAMES))
    by_engine = {engine: [section for section in report.sections if section.engine == engine] for engine in engines}
    text: str = environment.from_string((folder / "report.html").read_text(encoding="utf-8")).render(
        report=report,
        version=__version__,
        words=WORDS,
        summary=SUMMARY[report.verdict] if report.sections else "Nothing was run, so nothing was shown.",
        units=UNITS,
        engines={engine: overall(section.verdict for section in parts) for engine, parts in by_engine.items()},
        matrix={code: [_cell(code, engine, by_engine[engine]) for engine in engines] for code in codes},
        names={r.code: r.name for s in report.sections for r in s.results},
        to_do=_to_do(report.sections),
        sections=by_engine,
        plots={
            id(result): [drawn for n, plot in enumerate(result.plots) if (drawn := svg(plot, f"p{s}-{r}-{n}-"))]
            for s, section in enumerate(report.sections)
            for r, result in enumerate(section.results)
        },
        overview=[drawn for n, plot in enumerate(getattr(report, "plots", [])) if (drawn := svg(plot, f"o{n}-"))],
        identity=id,
        anchor=_anchor,
        views=[view.model_dump() for view in report.views],
        viewer=(folder / "3Dmol-min.js").read_text(encoding="utf-8") if report.views else "",
    )
    return text


def number(value: float, digits: int = 3) -> str:
    """As a person writes it: few digits, powers of ten beyond 10⁻³ and 10⁵."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else "−∞"
    if value == 0 or 1e-3 <= abs(value) < 99_999.5:
        return f"{value:.{digits}g}".replace("-", "−") if abs(value) < 10**digits else f"{value:.0f}".replace("-", "−")
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    written = f"{float(mantissa):g}".replace("-", "−")
    return f"10{raised}" if written == "1" else f"{written}×10{raised}"


def moment(date: str) -> str:
    """An ISO 8601 date as a person writes it."""
    return date.replace("T", " ").replace("+00:00", " UTC")


def share(result: CheckResult) -> str:
    """The figure in parts of its tolerance."""
    if not math.isfinite(result.figure) or not math.isfinite(result.tolerance) or result.tolerance <= 0:
        return ""
    part = result.figure / result.tolerance
    return f"{100 * part:.0f} %" if 0.005 < part < 10 else "< 1 %" if part <= 0.005 else f"{number(part, 2)} ×"


def _cell(code: str, engine: str, sections: Sequence[Section]) -> Cell:
    found = [(section, result) for section in sections for result in section.results if result.code == code]
    if not found:
        alone = any(section.problem for section in sections) or not any(section.results for section in sections)
        why = "was not run" if alone else "does not apply: what it asks for is not offered"
        return Cell(None, "not run" if alone else "does not apply", f"{code} {why} in {engine}", "")
    verdict = overall(result.verdict for _, result in found)
    agree = [(section, result) for section, result in found if result.verdict == verdict]
    if len(found) == 1:
        part = share(found[0][1])
        text = (
            f"{part} of tolerance"
            if part.endswith("%")
            else f"{part} tolerance"
            if part
            else number(found[0][1].figure)
        )
    else:
        text = f"{len(agree)} of {len(found)} systems"
    title = "; ".join(f"{section.system}: {number(r.figure)} (tolerance {number(r.tolerance)})" for section, r in agree)
    return Cell(verdict, text, title, _anchor(agree[0][0], agree[0][1]))


def _anchor(section: Section, result: CheckResult | None = None) -> str:
    parts = [section.engine, section.system, *([result.code] if result else [])]
    return "-".join("".join(c if c.isalnum() else "_" for c in part) for part in parts)


def _to_do(sections: Sequence[Section]) -> list[tuple[Verdict, str, str, str]]:
    """Verdict, where, what was found and advice: failures first, one line for each check and engine."""
    rows: list[tuple[Verdict, str, str, str]] = []
    for wanted in ("fail", "inconclusive"):
        seen: dict[tuple[str, str], list[tuple[Section, CheckResult]]] = {}
        for section in sections:
            for result in section.results:
                if result.verdict == wanted:
                    seen.setdefault((section.engine, result.code), []).append((section, result))
        for (engine, code), found in seen.items():
            where = f"{code} in {engine}: {', '.join(section.system for section, _ in found)}"
            advice = ADVICE.get(code, "See the detail.") if wanted == "fail" else INCONCLUSIVE
            if wanted == "fail" and any(math.isnan(result.figure) for _, result in found):
                advice = UNANSWERED
            rows.append((found[0][1].verdict, where, found[0][1].detail, advice))
    rows += [
        (
            "inconclusive",
            f"{section.engine}: {section.system}",
            section.problem,
            "Checks are missing: repeat the run when mended.",
        )
        for section in sections
        if section.problem
    ]
    return rows
