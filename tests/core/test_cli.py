"""The command lines: help that teaches, errors that suggest, exit codes that scripts can rely on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest

from mlff_engines import __version__, cli
from mlff_engines.manifest import Manifest, inspect
from students import artifact, checkpoint

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return artifact(tmp_path_factory.mktemp("student"), dtype="float32")


def fails(command: object, *args: object) -> int:
    """The exit code of a command that fails."""
    with pytest.raises(SystemExit) as error:
        command([str(arg) for arg in args])  # type: ignore[operator]
    assert isinstance(error.value.code, int)
    return error.value.code


def without(module: str, *args: object) -> subprocess.CompletedProcess[str]:
    """`mlff ARGS` in an environment that lacks a module."""
    program = f"import sys; sys.modules[{module!r}] = None; from mlff_engines.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", program, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


def test_help_lists_every_command(capsys: Capture) -> None:
    cli.main(["--help"])
    shown = capsys.readouterr().out
    for name in [*cli.ELSEWHERE, "inspect", "verify"]:
        assert f"  {name} " in shown
    assert "mlff distill examples/" in shown


def test_version(capsys: Capture) -> None:
    cli.main(["--version"])
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize("name", [*cli.ELSEWHERE, "inspect", "verify"])
def test_every_command_has_help(name: str, capsys: Capture) -> None:
    cli.main([name, "--help"])
    shown = capsys.readouterr().out
    assert f"{name} [OPTIONS]" in shown
    assert len(shown.splitlines()) > 4


@pytest.mark.fault("M4")
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["inspct", "x"], "no command 'inspct'; did you mean 'inspect'?"),
        (
            ["qqq"],
            "allowed: bench, data, distill, import, inspect, kstep, label, lammps, sample, train, validate, verify",
        ),
        (["inspect", "x", "--jsn"], "--json"),
        (["verify", "x", "--devise", "cpu"], "--device"),
    ],
)
def test_unknown_command_or_option_is_answered_with_the_nearest(args: list[str], message: str, capsys: Capture) -> None:
    assert fails(cli.main, *args) == 2
    assert message in capsys.readouterr().err


@pytest.mark.fault("M4")
def test_unknown_dtype_lists_the_known(tmp_path: Path, capsys: Capture) -> None:
    assert fails(cli.export, tmp_path, "-o", tmp_path / "x.pt", "--dtype", "float16") == 2
    assert "'float32', 'float64'" in capsys.readouterr().err


def test_inspect(student: Path, capsys: Capture) -> None:
    cli.main(["inspect", str(student)])
    shown = capsys.readouterr().out
    for part in ("painn, float32", "H (E0 -13.6000 eV)", "4 Å, 2 layers: range 8 Å", "Angstrom, eV", "(fixed)"):
        assert part in shown
    assert inspect(student).sha256 in shown


def test_inspect_as_json_is_the_manifest(student: Path, capsys: Capture) -> None:
    cli.main(["inspect", str(student), "--json"])
    assert Manifest.model_validate(json.loads(capsys.readouterr().out)) == inspect(student)


def test_inspect_executes_nothing(student: Path) -> None:
    """Not even torch's loader is reached."""
    program = (
        "import sys, torch; torch.jit.load = torch.load = None; "
        "from mlff_engines.cli import main; main(['inspect', sys.argv[1]])"
    )
    run = subprocess.run([sys.executable, "-c", program, str(student)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_verify(student: Path, capsys: Capture) -> None:
    cli.main(["verify", str(student)])
    shown = capsys.readouterr().out
    assert "triclinic box" in shown
    assert "golden vectors reproduced" in shown


@pytest.mark.fault("A1", "A4")
@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_what_is_no_artifact_exits_with_one(command: str, tmp_path: Path, capsys: Capture) -> None:
    assert fails(cli.main, command, tmp_path / "absent.pt") == 1
    assert capsys.readouterr().err.startswith("error: no artifact at ")
    folder = checkpoint(tmp_path / "best")
    assert fails(cli.main, command, folder) == 1
    error = capsys.readouterr().err
    assert f"mlff-export {folder} -o student.pt" in error
    assert len(error.splitlines()) == 1


def test_export(tmp_path: Path, capsys: Capture) -> None:
    folder, out = checkpoint(tmp_path / "best"), tmp_path / "student.pt"
    cli.export([str(folder), "-o", str(out), "--dtype", "float64"])
    assert "student.pt: float64, as the float64 model on 4 structures" in capsys.readouterr().out
    assert inspect(out).dtype == "float64"
    cli.export([str(folder), str(checkpoint(tmp_path / "other", 1)), "-o", str(tmp_path / "two.pt")])
    assert inspect(tmp_path / "two.pt").members == 2


def test_export_checks_a_structure_of_the_user(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "water.xyz"
    file.write_text("3\n\nO 0 0 0\nH 0.96 0 0\nH -0.24 0.93 0\n")
    cli.export([str(checkpoint(tmp_path / "best")), "-o", str(tmp_path / "student.pt"), "--check", str(file)])
    assert "structure 0" in capsys.readouterr().out


@pytest.mark.fault("M3")
def test_export_refuses_to_overwrite(tmp_path: Path, capsys: Capture) -> None:
    folder, out = checkpoint(tmp_path / "best"), tmp_path / "student.pt"
    out.write_text("mine")
    assert fails(cli.export, folder, "-o", out) == 1
    assert "exists; choose another name or pass --overwrite" in capsys.readouterr().err
    assert out.read_text() == "mine"
    cli.export([str(folder), "-o", str(out), "--overwrite"])
    assert inspect(out).members == 1


def test_export_needs_a_checkpoint_and_an_output(tmp_path: Path, capsys: Capture) -> None:
    assert fails(cli.export, tmp_path) == 2
    assert "Missing option '-o'" in capsys.readouterr().err
    assert fails(cli.export, "-o", tmp_path / "x.pt") == 2
    assert "Missing argument 'CHECKPOINTS" in capsys.readouterr().err


@pytest.mark.fault("M6")
def test_a_missing_extra_is_named_and_nothing_else_is_affected(student: Path) -> None:
    run = without("ase", "train", "config.yaml")
    assert run.returncode == 1
    assert run.stderr == "error: mlff train needs ase, which is not installed: pip install 'mlff-engines[train]'\n"
    for args in (["--help"], ["inspect", student], ["verify", student]):
        assert without("ase", *args).returncode == 0


@pytest.mark.fault("M6")
def test_check_without_ase(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "best")
    program = "import sys; sys.modules['ase'] = None; from mlff_engines.cli import export; export(sys.argv[1:])"
    args = [str(folder), "-o", str(tmp_path / "student.pt"), "--check", "water.xyz"]
    run = subprocess.run([sys.executable, "-c", program, *args], capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr == "error: --check reads structures with ASE: pip install 'mlff-engines[ase]'\n"


def test_a_verdict_is_an_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    @click.pass_context
    def undecided(ctx: click.Context) -> None:
        ctx.exit(3)

    monkeypatch.setitem(cli.mlff.commands, "undecided", undecided)
    assert fails(cli.main, "undecided") == 3


def test_ctrl_c_exits_with_130(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlff_engines.manifest.inspect", interrupted)
    assert fails(cli.main, "inspect", "x") == 130
    error = capsys.readouterr().err
    assert "interrupted" in error
    assert "Traceback" not in error


def test_installed_commands_are_these(tmp_path: Path) -> None:
    bin_folder = Path(sys.executable).parent
    for name, text in (("mlff", "Learn a small fast force field"), ("mlff-export", "Export a checkpoint folder")):
        if not (bin_folder / name).exists():
            pytest.skip("mlff-engines is not installed in this environment")
        run = subprocess.run([bin_folder / name, "--help"], cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert text in run.stdout
