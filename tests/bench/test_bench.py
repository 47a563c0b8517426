"""`mlff bench` with our own student: real engines, real rows, a page."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from mlff_engines import cli
from mlff_engines.bench import subjects
from mlff_engines.bench.ours import ELEMENTS
from mlff_engines.bench.page import SECTION, markers, plot, write_page
from mlff_engines.bench.rows import Row
from mlff_engines.checkpoint import Domain, save_checkpoint
from mlff_engines.errors import ArtifactError, ConfigError
from mlff_engines.foreign import environments
from mlff_engines.models.registry import build_model, model_config
from requirements import require_compiler, require_engine

BEGIN, END = markers(SECTION)
WHOLE = ["mlff", "mlff-eager", "mlff/evaluator", "mlff/core", "mlff/ase", "mlff/openmm", "mlff/lammps"]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other packages, whatever this machine has."""
    monkeypatch.setattr(subjects, "PEERS", {})


@pytest.mark.usefixtures("alone")
@pytest.mark.slow
def test_every_engine_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require_compiler()
    for engine in ("ase", "openmm", "lammps"):
        require_engine(engine)
    out, file, page = tmp_path / "out", tmp_path / "rows.json", tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    options = ["-o", str(out), "--json", str(file), "--page", str(page), "--systems", "aspirin,water-24"]
    cli.main(["bench", "--quick", *options])
    rows = [Row.model_validate(row) for row in json.loads(file.read_text())]
    assert [row.what for row in rows] == WHOLE * 2
    for row in rows:
        assert row.reason is None
        assert row.threads == 1
        for value in (row.median_ms, row.p95_ms, row.cpu_ms, row.rss_mb):
            assert value is not None
            assert math.isfinite(value)
            assert value > 0
    about = json.loads((out / "about.json").read_text())
    kernels = {what: found["kernel"] for what, found in about.items() if "kernel" in found}
    assert kernels == dict.fromkeys(["mlff", "mlff/evaluator", "mlff/core", "mlff/ase"], "fused") | {
        "mlff-eager": "torch"
    }
    assert "| `mlff` |" in capsys.readouterr().out
    assert page.read_text().startswith(f"before\n{BEGIN}\n")
    assert page.read_text().endswith(f"{END}\nafter\n")
    assert "old" not in page.read_text()
    assert "mlff bench --quick --systems 'aspirin,water-24'" in page.read_text()
    assert str(tmp_path) not in page.read_text()


@pytest.mark.usefixtures("alone")
def test_unknown_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["--what", "mlfff"], "did you mean 'mlff'"),
        (["--peers", "mace"], "unknown peer 'mace'"),
        (["--systems", "benzene"], "no system 'benzene'"),
        (["--threads", "two"], "--threads 'two'"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["bench", "--quick", "-o", str(tmp_path), *arguments])
        assert said in capsys.readouterr().err


@pytest.mark.usefixtures("alone")
def test_one_student_by_every_kernel(tmp_path: Path) -> None:
    found = {s.what: s.environment["MLFF_KERNEL"] for s in subjects.all_subjects(tmp_path) if "/" not in s.what}
    assert found == {"mlff": "fused", "mlff-eager": "torch", "mlff-compiled": "compiled"}


def test_patterns() -> None:
    found = [subjects.Subject(name) for name in ("mlff", "mlff/ase", "mlff-eager", "mace", "mace/ase")]
    assert [s.what for s in subjects.chosen(found, ["*/ase", "mlff"])] == ["mlff", "mlff/ase", "mace/ase"]
    assert subjects.chosen(found, []) == found


def some_rows() -> list[Row]:
    def row(what: str, atoms: int, ms: float, threads: int = 1) -> Row:
        memory = {"rss_mb": 300.0 + 0.05 * atoms, "base_mb": 300.0}
        of = {"system": f"water-{atoms}", "atoms": atoms, "threads": threads, "what": what}
        return Row(**of, median_ms=ms, p95_ms=2 * ms, cpu_ms=0.5 * ms, calls=9, **memory)

    return [
        row("mlff", 192, 5.0),
        row("mlff", 999, 25.0),
        row("mlff/ase", 192, 6.0),
        row("mlff-schnetpack", 192, 10.0),
        row("schnetpack", 192, 70.0),
        row("mace", 192, 600.0),
        Row(system="water-999", atoms=999, threads=1, what="mace", reason="it would take 9 s at a time"),
        row("mlff", 192, 3.0, threads=2),
        row("mlff-schnetpack", 192, 8.0, threads=2),
        row("schnetpack", 192, 40.0, threads=2),
    ]


def test_page_says_what_the_rows_say(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\n{BEGIN}\n{END}\n\nThe rest.\n")
    write_page(some_rows(), "mlff bench -o runs/bench", page, ["the same weights"])
    text = page.read_text()
    write_page(some_rows(), "mlff bench -o runs/bench", page, ["the same weights"])
    assert page.read_text() == text
    assert text.startswith(f"# Title\n\n{BEGIN}\n")
    assert text.endswith(f"{END}\n\nThe rest.\n")
    for line in (
        "mlff bench -o runs/bench",
        "- the same weights",
        "| | threads | water-192 | water-999 |",
        "| `mlff` | 1 | 5 / 10 (2.5) | 25 / 50 (12.5) |",
        "| `mlff` | 2 | 3 / 6 (1.5) | - |",
        "| `mlff/ase` | 1 | 6 / 12 (3) |",
        "| `mace` | 1 | 600 / 1.2e+03 (300) | - |",
        "| `mace` | 1 | 120 |",  # times the processor time of mlff
        "| `schnetpack` | 1 | 14 |",
        "| `schnetpack` | 2 | 13.3 |",  # by the clock
        "| `mlff` | 1 | 50 | 50 |",  # kB per atom
        "- `mace`, water-999: it would take 9 s at a time",
    ):
        assert line in text.splitlines(), line
    same = text[text.index("### Same weights") :].splitlines()
    assert same[4:8] == [
        "| | threads | water-192 |",
        "|---|---|---|",
        "| `schnetpack` | 1 | 7 |",
        "| `schnetpack` | 2 | 5 |",
    ]
    assert (tmp_path / "figures" / "speed.svg").read_text().startswith("<svg")
    curves = {curve.label: (list(curve.x), list(curve.y)) for curve in plot(some_rows()).curves}
    assert curves == {
        "mlff": ([192, 999], [5.0, 25.0]),
        "mlff-schnetpack": ([192], [10.0]),
        "schnetpack": ([192], [70.0]),
        "mace": ([192], [600.0]),
    }


@pytest.mark.parametrize("text", ["", f"{BEGIN}\n", f"{BEGIN}\n{END}\n{BEGIN}\n{END}\n"])
def test_page_without_its_markers_is_left_alone(tmp_path: Path, text: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ConfigError, match="needs the lines"):
        write_page(some_rows(), "mlff bench", page)
    assert page.read_text() == text
    assert not (tmp_path / "figures").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(subjects.PEERS))
def test_other_packages_are_timed(name: str, tmp_path: Path) -> None:
    """Where an earlier `mlff bench --peers` has installed them: they are gigabytes."""
    if environments.at_hand(subjects.PEERS[name].environment) is None:
        pytest.skip(f"{name} is not at hand: mlff bench --peers {name}")
    file = tmp_path / "rows.json"
    cli.main(["bench", "--quick", "--json", str(file), "--systems", "aspirin,water-120", "--what", f"mlff,{name}*"])
    rows = [Row.model_validate(row) for row in json.loads(file.read_text())]
    assert {row.what for row in rows} == {"mlff", name, f"{name}/ase"}
    for row in rows:
        if row.system == "water-120" and str(row.reason).startswith("it would take"):
            continue  # the machine is busy
        assert row.reason is None, f"{row.what}, {row.system}: {row.reason}"
        assert row.median_ms is not None


@pytest.mark.usefixtures("alone")
def test_a_peer_that_cannot_be_installed_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the page, with the words of pip; the others go on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(subjects.PEERS, "gone", subjects.Peer("gone.py", "gone"))
    monkeypatch.setitem(
        environments.ENVIRONMENTS, "gone", environments.Environment("gone", (str(tmp_path / "absent"),))
    )
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    command = ["bench", "--quick", "--peers", "gone", "--what", "mlff-eager,gone", "--systems", "aspirin"]
    cli.main([*command, "--page", str(page)])
    assert "- `gone`, aspirin: cannot install gone: " in page.read_text()
    assert "| `mlff-eager` | 1 | " in page.read_text()


def test_kernel_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate of equal weights in float32, and an injected bug: a kernel made of another checkpoint."""
    require_compiler()
    random_student(tmp_path / "ours", seed=0)
    assert 0 < subjects.kernel_error(tmp_path / "ours") < subjects.TOLERANCE
    random_student(tmp_path / "other", seed=1)
    right = subjects.export
    monkeypatch.setattr(subjects, "export", lambda checkpoints, *a, **k: right([tmp_path / "other"], *a, **k))
    with pytest.raises(ArtifactError, match=r"forces differ by .* in float32; allowed 1e-05"):
        subjects.kernel_error(tmp_path / "ours")


def random_student(folder: Path, seed: int) -> None:
    config = model_config({"features": 16, "interactions": 2})
    torch.manual_seed(seed)
    model = build_model(config, ELEMENTS, dict.fromkeys(ELEMENTS, 0.0), scale=0.1).eval()
    save_checkpoint(folder, model, config, Domain(elements=list(ELEMENTS)), {"teacher": "none"})
