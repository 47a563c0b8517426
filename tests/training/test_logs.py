"""Where training reports, and where it keeps quiet."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import Any

import pytest
from ase import Atoms
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import tiny
from mlff_engines.errors import ConfigError
from mlff_training.logs import TrainingLog


@pytest.fixture(scope="module")
def frames() -> list[Atoms]:
    return tiny.clusters(6)


def values(epoch: int, **more: float) -> dict[str, float]:
    return {"epoch": epoch, "step": 10 * epoch, "seconds": 1.0, "valid_forces_mae": 0.1 / 3, **more}


def quiet_log(folder: Path, **more: Any) -> TrainingLog:
    folder.mkdir(exist_ok=True)
    return TrainingLog(folder, **{"active": True, "tensorboard": False, "wandb_project": None, **more})


def test_csv_forgets_what_a_resumed_run_writes_again(tmp_path: Path) -> None:
    log = quiet_log(tmp_path)
    for epoch in (1, 2, 3):
        log.row(values(epoch))
    path = tmp_path / "log.csv"
    assert path.read_text().splitlines()[:2] == ["epoch,step,seconds,valid_forces_mae", "1,10,1,0.033333333"]
    path.write_text(path.read_text() + "4,40,1")  # killed in the middle of a row
    log = quiet_log(tmp_path)
    log.forget_after(2)
    log.row(values(3))
    assert [row["epoch"] for row in tiny.rows(tmp_path)] == [1, 2, 3]
    log.row(values(4, valid_stress_mae=0.5))
    assert path.read_text().splitlines()[3:] == ["3,30,1,0.033333333,", "4,40,1,0.033333333,0.5"]
    path.write_text("epoch,st")  # killed in the middle of the header
    log.forget_after(0)
    log.row(values(1))
    assert [row["epoch"] for row in tiny.rows(tmp_path)] == [1]


def test_other_processes_are_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = quiet_log(tmp_path, active=False, tensorboard=True)
    with log.progress(10, 0):
        log.advance()
        log.row(values(1))
        log.say("hello")
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_tensorboard_events(frames: list[Atoms], tmp_path: Path) -> None:
    tiny.trainer(tmp_path, frames, frames[:2], {"tensorboard": True, "epochs": 3}).run()
    tiny.trainer(tmp_path, frames, frames[:2], {"tensorboard": True, "epochs": 4}, allow_config_change=True).run()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    seen = {event.step: event.value for event in events.Scalars("valid/forces_mae")}
    expected = {int(row["step"]): row["valid_forces_mae"] for row in tiny.rows(tmp_path)}
    assert len(expected) == 4
    assert seen == pytest.approx(expected, rel=1e-5)


def test_tensorboard_hides_points_made_again(tmp_path: Path) -> None:
    for epochs, value in (((1, 2, 3), 1.0), ((2,), 2.0)):
        log = quiet_log(tmp_path, tensorboard=True)
        with log.progress(1, 0):
            for epoch in epochs:
                log.row(values(epoch, valid_loss=value))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("valid/loss")
    assert [(event.step, event.value) for event in events] == [(10, 1.0), (20, 2.0)]


@pytest.mark.fault("M6")
def test_missing_package_is_named_with_its_install_line(
    frames: list[Atoms], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("wandb") is None:
        with pytest.raises(
            ConfigError, match=r"train.wandb_project is 'mine' but wandb is not installed: pip install wandb"
        ):
            tiny.trainer(tmp_path / "run", frames, frames, {"wandb_project": "mine"})
        assert not (tmp_path / "run").exists()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name))
    with pytest.raises(ConfigError, match=r"pip install tensorboard, or set train.tensorboard: false"):
        tiny.trainer(tmp_path / "run", frames, frames, {"tensorboard": True})
    tiny.trainer(tmp_path / "run", frames, frames, {"tensorboard": False})


def test_no_bar_without_a_terminal(frames: list[Atoms], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One plain line per validation, on standard error."""
    tiny.trainer(tmp_path, frames, frames[:2], {"epochs": 2}).run()
    out, err = capfd.readouterr()
    assert out == ""
    assert [line.split(",")[0] for line in err.splitlines()] == ["epoch 1", "epoch 2"]
    assert "\x1b" not in err
    assert "\r" not in err


def test_bar_on_a_terminal(tmp_path: Path) -> None:
    log = quiet_log(tmp_path)
    screen = io.StringIO()
    log._console = Console(file=screen, force_terminal=True, width=100)
    with log.progress(8, 3):
        log.advance()
        log.row(values(1))
    assert "4/8" in screen.getvalue()
    assert "epoch 1, forces 33.3 meV/Å" in screen.getvalue()
    log.advance()  # after the bar is closed


def test_messages_are_printed_as_they_are(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    message = "runs/[bold]x/state: " + 40 * "a long path "
    quiet_log(tmp_path).say(message)
    assert capfd.readouterr().err == message + "\n"
