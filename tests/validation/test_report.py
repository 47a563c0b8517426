"""The report says everything, opens without a network, and can be read back."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from mlff_engines.errors import ConfigError, DataError
from mlff_engines.structure import Structure
from mlff_engines.validation.reports.figures import band, svg
from mlff_engines.validation.reports.page import ADVICE, number, page, share, write_report
from mlff_engines.validation.reports.report import Provenance, Report, Section, View, overall, read_report
from mlff_engines.validation.result import NAMES, CheckResult, Curve, Plot, Verdict
from mlff_engines.validation.trajectories import observables

WATER = Structure(
    np.array([8, 1, 1]), np.array([[0.0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]]), 5.0 * np.eye(3), [True, True, False]
)
T = np.linspace(0, 10, 50)
PLOTS = [
    Plot("Energy", "time, ps", "energy, meV", [Curve("one", T, np.sin(T)), Curve("two", T, np.cos(T))]),
    Plot("dt²", "time step, fs", "deviation, eV", [Curve("", [1, 2, 4], [1, 4, 16], style="points")], "log-log"),
    Plot("g(r)", "r, Å", "g", [band("ase", T, np.stack([np.exp(-T), np.exp(-2 * T)]))], "log"),
    Plot("Distribution", "x, Å", "density, 1/Å", [Curve("$H_2$ & <b>", T, T, 0.1 * T, style="steps")]),
    Plot("What is left", "force, eV/Å", "difference, eV/Å", [Curve("", [1.0, 1.0], [0.1, 0.1], style="points")]),
]


def check(code: str, verdict: Verdict = "pass", figure: float = 1e-7, **more: object) -> CheckResult:
    return replace(CheckResult(code, NAMES[code], verdict, figure, 1e-5, f"detail of {code}"), **more)


def example() -> Report:
    first = [check("S1", plots=PLOTS), check("S7", "fail", 2e-3), check("M4", "inconclusive", math.nan)]
    second = [
        check("S1", figures={"largest force, eV/Å": np.float64(3.25), "infinite": math.inf}),
        check("S8", figure=0.0),
    ]
    return Report(
        title="student.pt",
        provenance=Provenance(
            command="mlff validate student.pt",
            artifact="student.pt",
            sha256="ab" * 32,
            seeds={"replicas": 4},
            seconds=12.3,
        ),
        sections=[
            Section(engine="ase", system="water", results=first, versions={"ase": "3.29"}),
            Section(engine="ase", system="slab", results=second),
            Section(engine="other", system="water", results=[check("S1")]),
            Section(engine="absent", system="water", problem="not installed: pip install 'mlff-engines[absent]'"),
        ],
        views=[
            View.of("water", WATER, np.array([[0.1, 0, 0], [-0.1, 0, 0], [0, 0, 0.0]])),
            View.of("no forces", WATER),
        ],
    )


class Page(HTMLParser):
    """Elements with their attributes, text outside scripts and styles, and what is left open."""

    VOID = frozenset({"meta", "input", "br", "img", "link", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def html() -> str:
    return page(example())


@pytest.mark.parametrize("verdicts", list(itertools.product(("pass", "fail", "inconclusive", None), repeat=3)))
def test_fail_outweighs_inconclusive_outweighs_pass(verdicts: tuple[Verdict | None, ...]) -> None:
    there = [verdict for verdict in verdicts if verdict]
    expected = "fail" if "fail" in there else "inconclusive" if "inconclusive" in there or not there else "pass"
    assert overall(there) == expected
    results = [Section(engine="a", system=str(n), results=[check("S1", v)]) for n, v in enumerate(there)]
    report = Report(title="x", sections=results)
    assert (report.verdict, report.exit_code) == (expected, {"pass": 0, "fail": 1, "inconclusive": 3}[expected])


def test_what_did_not_run_is_no_pass() -> None:
    assert Section(engine="a", system="b").verdict == "inconclusive"
    assert Section(engine="a", system="b", results=[check("S1")], problem="stopped").verdict == "inconclusive"
    assert Section(engine="a", system="b", results=[check("S1", "fail")], problem="stopped").verdict == "fail"


def test_json_is_valid_and_reads_back(tmp_path: Path) -> None:
    report = example()
    json_file, html_file = write_report(report, tmp_path / "out")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    written = json.loads(json_file.read_text(encoding="utf-8"), parse_constant=refuse)
    assert written["verdict"] == "fail"
    assert written["sections"][0]["verdict"] == "fail"
    assert written["sections"][0]["results"][2]["figure"] == "NaN"
    again = read_report(json_file)
    assert again.model_dump_json() == report.model_dump_json()
    assert math.isnan(again.sections[0].results[2].figure)
    result = again.sections[1].results[0]
    assert isinstance(result, CheckResult)
    assert result.figures == {"largest force, eV/Å": 3.25, "infinite": math.inf}
    assert again.sections[0].results[0].plots[3].curves[0].error == pytest.approx(0.1 * T)
    assert page(again) == html_file.read_text(encoding="utf-8")


def test_a_written_verdict_is_not_believed(tmp_path: Path) -> None:
    report = Report(title="x", sections=[Section(engine="a", system="b", results=[check("S1", "fail")])])
    forged = json.loads(report.model_dump_json())
    forged["verdict"] = forged["sections"][0]["verdict"] = "pass"
    file = tmp_path / "report.json"
    file.write_text(json.dumps(forged))
    assert read_report(file).exit_code == 1


def test_schema_describes_every_part() -> None:
    schema = Report.model_json_schema(mode="serialization")
    assert {"Section", "CheckResult", "Plot", "Curve", "Provenance", "View"} <= set(schema["$defs"])
    for part in ("Provenance", "Section"):
        assert all("description" in field for field in schema["$defs"][part]["properties"].values()), part


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{}", "title"),
        ("not json", "Invalid JSON"),
        ('{"title": "x", "schema_version": 2}', "schema_version"),
        ('{"title": "x", "sektions": []}', "sektions"),
    ],
)
def test_foreign_json_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "report.json"
    file.write_text(text)
    with pytest.raises(DataError, match=problem):
        read_report(file)
    with pytest.raises(DataError, match="no report at"):
        read_report(tmp_path / "absent.json")


def test_page_parses_and_every_link_leads_somewhere(html: str) -> None:
    parsed = Page(html)
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes["href"] for tag, attributes in parsed.elements if tag == "a"]
    assert len(links) == 5  # the cells of the matrix that have a verdict
    assert all(link and link.startswith("#") and link[1:] in ids for link in links)


def external(html: str) -> list[str]:
    """Whatever a browser would fetch."""
    loads = [
        value
        for _, attributes in Page(html).elements
        for name, value in attributes.items()
        if name in {"src", "href", "xlink:href", "srcset", "data", "action", "poster"} and value
    ]
    styles = " ".join(re.findall(r"<style.*?</style>", html, re.S)) + " ".join(re.findall(r'style="[^"]*"', html))
    loads += re.findall(r"url\(\s*['\"]?([^)'\"]+)", styles) + re.findall(r"@import\s+(\S+)", styles)
    return [load for load in loads if not load.startswith(("#", "data:"))]


def test_page_loads_nothing(html: str) -> None:
    assert external(html) == []
    assert "default-src 'none'" in html  # and the browser is told so
    for bug in (
        '<img src="https://x.org/a.png">',
        '<script src="//x.org/a.js"></script>',
        "<style>@import u.css</style>",
    ):
        assert external(html.replace("<h1>", f"{bug}<h1>")), bug


def test_page_says_every_verdict_in_words(html: str) -> None:
    report, parsed = example(), Page(html)
    for section in report.sections:
        for result in section.results:
            assert result.detail in parsed.text
            assert result.name in parsed.text
    rows = re.findall(r"<tr id=.*?</tr>", html, re.S)
    found = [next(v for v in ("FAIL", "inconclusive", "pass") if v in Page(row).text) for row in rows]
    assert found == ["pass", "FAIL", "inconclusive", "pass", "pass", "pass"]
    assert "✗ FAIL At least one check has failed" in parsed.text
    assert ADVICE["S7"] in parsed.text  # what to do about it
    assert "pip install 'mlff-engines[absent]'" in parsed.text
    assert "not a number" in parsed.text
    assert "– not run" in parsed.text  # by the engine that is absent
    assert "– does not apply" in parsed.text
    assert "× uncertainty" not in parsed.text
    assert "meV/atom/ps" in parsed.text
    assert "ab" * 32 in parsed.text


def test_matrix_shows_the_worst_of_the_systems() -> None:
    sections = [
        Section(engine="ase", system=name, results=[check("S1", v)]) for name, v in (("a", "pass"), ("b", "fail"))
    ]
    found = Page(page(Report(title="x", sections=sections))).text
    assert "✗ FAIL 1 of 2 systems" in found


def test_every_known_check_has_advice() -> None:
    assert set(ADVICE) == set(NAMES)


def test_advice_knows_an_engine_that_gave_no_number() -> None:
    broken = Section(engine="ase", system="a", results=[check("S5", "fail", math.nan)])
    found = Page(page(Report(title="x", sections=[broken]))).text
    assert "gave no number" in found
    assert ADVICE["S5"] not in found


def test_empty_reports_are_whole() -> None:
    nothing = Report(title="nothing")
    assert (nothing.verdict, nothing.exit_code) == ("inconclusive", 3)
    assert "Nothing was run" in Page(page(nothing)).text
    no_checks = Report(title="x", sections=[Section(engine="ase", system="water")])
    assert "No check was run" in Page(page(no_checks)).text
    assert "$3Dmol" not in page(no_checks)  # half a megabyte that nothing would use


def test_names_are_shown_as_they_are_and_harm_nothing() -> None:
    name = "<script>alert(1)</script> & " + "x" * 300
    long = Report(
        title=name,
        sections=[
            Section(engine=name, system=name, results=[check("S1", detail=name, plots=[replace(PLOTS[0], title=name)])])
        ],
        views=[View.of(name, WATER)],
    )
    text = page(long)
    assert text.count("<script>") == 2  # the viewer and its data
    assert Page(text).text.count(name) >= 4


@pytest.mark.parametrize("plot", PLOTS, ids=lambda plot: plot.title)
def test_plots_are_drawn(plot: Plot) -> None:
    drawn = svg(plot, "q-")
    assert drawn.startswith("<svg")
    parsed = Page(drawn)
    assert all(attributes["id"].startswith("q-") for _, attributes in parsed.elements if attributes.get("id"))
    for label in (plot.title, plot.x, *(curve.label for curve in plot.curves)):
        assert label in parsed.text
    assert drawn == svg(plot, "q-")  # the same file from the same figures


def test_short_logarithmic_axes_have_plain_numbers() -> None:
    steps, deviations = [0.1, 0.2, 0.4], [0.5, 2.0, 8.0]
    words = Page(svg(Plot("t", "x", "y", [Curve("", steps, deviations, style="points")], "log-log"))).words
    assert {"0.1", "0.2", "0.5", "1", "2", "5"} <= {word.strip() for word in words}
    words = Page(svg(Plot("t", "x", "y", [Curve("", steps, [1e-9, 1e-5, 1.0])], "log"))).words
    assert not {"0.1", "0.01"} & {word.strip() for word in words}


def test_plots_leave_out_what_has_no_place() -> None:
    def plot(y: list[float], scale: str = "linear") -> Plot:
        return Plot("title", "x", "y", [Curve("", [1.0, 2.0, 3.0], y)], scale)

    assert svg(plot([math.nan] * 3)) == ""
    assert svg(plot([0.0, -1.0, math.inf], "log")) == ""
    assert svg(Plot("title", "x", "y", [])) == ""
    assert svg(plot([math.nan, 1.0, 2.0]))
    assert svg(plot([-1.0, 1.0, 2.0], "log-log"))
    assert svg(Plot("t", "x", "y", [Curve("", [1.0, 2.0], [1.0, 1e-9], [2.0, 1.0], style="points")], "log"))
    empty = Report(
        title="x", sections=[Section(engine="a", system="b", results=[check("S1", plots=[plot([math.nan] * 3)])])]
    )
    assert "<svg" not in page(empty)


def test_many_points_do_not_make_a_large_page() -> None:
    x = np.random.default_rng(0).normal(size=50_000)
    drawn = svg(Plot("t", "x", "y", [Curve("", x.tolist(), (1e-6 * x**2).tolist(), style="points")]))
    assert len(drawn) < 200_000
    assert external(drawn) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.23456, "1.23"),
        (-0.01234, "−0.0123"),
        (123456.7, "1.23×10⁵"),
        (12345.6, "12346"),
        (1e-10, "10⁻¹⁰"),
        (-2.5e-7, "−2.5×10⁻⁷"),
        (math.nan, "not a number"),
        (math.inf, "∞"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("figure", "tolerance", "text"),
    [(5e-6, 1e-5, "50 %"), (1e-12, 1e-5, "< 1 %"), (1.0, 1e-5, "10⁵ ×"), (0.0, 0.0, ""), (math.nan, 1.0, "")],
)
def test_share_of_the_tolerance(figure: float, tolerance: float, text: str) -> None:
    assert share(check("S1", figure=figure, tolerance=tolerance)) == text


def test_view_keeps_lattice_vectors_of_periodic_axes_alone() -> None:
    assert View.of("slab", WATER).cell == ((5, 0, 0), (0, 5, 0), (0, 0, 0))
    assert View.of("free", replace(WATER, pbc=np.zeros(3, dtype=bool))).cell is None


@pytest.mark.fault("M6")
def test_without_the_extra_the_figures_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(observables.importlib, "import_module", absent)
    with pytest.raises(ConfigError, match=r"jinja2 is not installed: pip install 'mlff-engines\[validation\]'"):
        write_report(example(), tmp_path)
    assert read_report(tmp_path / "report.json").verdict == "fail"


def test_licence_of_the_viewer_ships_beside_it(repository: Path) -> None:
    folder = repository / "mlff_engines" / "validation" / "reports" / "templates"
    assert "BSD-3-Clause" in (folder / "3Dmol-LICENSE.txt").read_text()
    assert (folder / "3Dmol-min.js").stat().st_size > 400_000
