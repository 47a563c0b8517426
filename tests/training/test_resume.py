"""A run that was stopped goes on as if it had not been; one that was changed says so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from ase import Atoms

import tiny
from mlff_engines.checkpoint import load_checkpoint
from mlff_engines.errors import TrainingError
from mlff_training import loop
from mlff_training.loop import Interrupted, Trainer
from mlff_training.state import load_state


@pytest.fixture(scope="module")
def frames() -> list[Atoms]:
    return tiny.clusters(14)


@pytest.fixture(scope="module")
def valid() -> list[Atoms]:
    return tiny.clusters(3, seed=9)


def interrupt_at(trainer: Trainer, batch: int) -> None:
    """Let a real SIGTERM come in when `batch` batches are through, and run into it."""
    advance, seen = trainer.log.advance, []

    def counting() -> None:
        advance()
        seen.append(None)
        if len(seen) == batch:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.log.advance = counting  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match=r"stopped by SIGTERM .* run the same command to go on") as caught:
        trainer.run()
    assert caught.value.exit_code == 130


def everything(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """All that two runs must have in common; wall-clock seconds differ."""
    state, warning = load_state(folder / "state.safetensors")
    assert warning is None
    del state["counters"]["seconds"]
    best, config = load_checkpoint(folder / "best")
    return {
        "saved": state,
        "live": {name: getattr(trainer, name).state_dict() for name in ("potential", "averaged", "optimizer")},
        "best": best.state_dict(),
        "best errors": config.training,
        "log": [{name: value for name, value in row.items() if name != "seconds"} for row in tiny.rows(folder)],
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "default": {"epochs": 4, "ema_decay": 0.9},
    "plateau": {
        "epochs": 8,
        "schedule": "plateau",
        "ema_decay": 0.5,
        "plateau_patience": 0,
        "learning_rate": 0.05,
        "warmup_steps": 0,
    },
    "accumulate": {"epochs": 4, "accumulate": 3, "optimizer": "amsgrad", "batch_size": 2, "validate_every": 2},
    "no average": {"epochs": 4, "ema_decay": 0, "schedule": "constant", "weight_decay": 0.01, "dtype": "float64"},
}


def run_twice(
    folder: Path, config: dict[str, Any], frames: list[Atoms], valid: list[Atoms], stops: list[int]
) -> list[dict[str, Any]]:
    """Everything of an uninterrupted run and of one stopped after so many batches, again and again."""
    whole = tiny.trainer(folder / "whole", frames, valid, config)
    whole.run()
    for batch in stops:
        # a resumed run begins with other weights: all must come from the state
        seed = 3 if (folder / "parts").exists() else 0
        interrupt_at(tiny.trainer(folder / "parts", frames, valid, config, weights_seed=seed), batch)
    parts = tiny.trainer(folder / "parts", frames, valid, config, weights_seed=5)
    parts.run()
    return [everything(whole, folder / "whole"), everything(parts, folder / "parts")]


@pytest.mark.fault("R6", "R7")
@pytest.mark.parametrize("name", CONFIGS)
def test_resumed_equals_uninterrupted_bitwise(
    name: str, frames: list[Atoms], valid: list[Atoms], tmp_path: Path
) -> None:
    """Stopped in the middle of the first epoch, at the last batch of an epoch, and in the middle of another."""
    first = tiny.trainer(tmp_path / "parts", frames, valid, CONFIGS[name])
    interrupt_at(first, 2)
    assert first.epoch == 0
    assert 2 <= first.batch < len(first._batches())
    rest = len(first._batches()) - first.batch
    whole, parts = run_twice(tmp_path, CONFIGS[name], frames, valid, [rest, len(first._batches()) + 1])
    assert len(whole["log"]) == CONFIGS[name]["epochs"] // CONFIGS[name].get("validate_every", 1)
    if name == "plateau":
        assert whole["log"][-1]["learning_rate"] < 0.05  # the schedule had something to do
    assert tiny.differing(whole, parts) == []


@pytest.mark.parametrize("lost", ["nothing", "potential", "averaged", "optimizer", "plateau", "batch", "step", "sums"])
def test_anything_forgotten_would_be_seen(
    lost: str, frames: list[Atoms], valid: list[Atoms], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**CONFIGS["plateau"], "warmup_steps": 10}
    monkeypatch.setattr(loop, "_PARTS", tuple(name for name in loop._PARTS if name != lost))
    monkeypatch.setattr(loop, "_COUNTERS", tuple(name for name in loop._COUNTERS if name != lost))
    whole, parts = run_twice(tmp_path, config, frames, valid, [10])
    del whole["saved"], parts["saved"]
    assert (tiny.differing(whole, parts) == []) == (lost == "nothing")


@pytest.mark.fault("R3")
def test_damaged_state_resumes_from_the_one_before(
    frames: list[Atoms], valid: list[Atoms], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = {"epochs": 3, "save_every_minutes": 0}
    whole = tiny.trainer(tmp_path / "whole", frames, valid, config)
    whole.run()
    interrupt_at(tiny.trainer(tmp_path / "run", frames, valid, config), 10)
    path = tmp_path / "run" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    capfd.readouterr()
    resumed = tiny.trainer(tmp_path / "run", frames, valid, config)
    said = capfd.readouterr().err
    assert f"warning: {path}" in said
    assert f"fell back to {path}.previous" in said
    assert "after 2 epochs and 0 batches" in said
    resumed.run()
    assert tiny.differing(everything(whole, tmp_path / "whole"), everything(resumed, tmp_path / "run")) == []


@pytest.mark.fault("R5")
def test_changed_configuration_is_listed_and_refused(frames: list[Atoms], valid: list[Atoms], tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, frames, valid)
    trainer.run()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    changed = {"epochs": 5, "loss": {"forces": 20.0}}
    with pytest.raises(TrainingError) as caught:
        tiny.trainer(tmp_path, frames, tiny.clusters(2), changed)
    for part in ("train.epochs: 3 -> 5", "train.loss.forces: 10.0 -> 20.0", "data.valid: ", "--allow-config-change"):
        assert part in str(caught.value)
    assert "train.batch_size" not in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    allowed = tiny.trainer(tmp_path, frames, tiny.clusters(2), changed, allow_config_change=True)
    assert allowed.epoch == 3
    assert allowed.best == {"loss": float("inf")}  # of another loss
    allowed.run()
    assert [row["epoch"] for row in tiny.rows(tmp_path)] == [1, 2, 3, 4, 5]


@pytest.mark.fault("R5")
def test_allowed_changes_take_effect(frames: list[Atoms], valid: list[Atoms], tmp_path: Path) -> None:
    tiny.trainer(tmp_path, frames, valid, {"schedule": "plateau", "weight_decay": 0.1}).run()
    config = {"schedule": "plateau", "learning_rate": 1e-4, "optimizer": "amsgrad", "epochs": 4, "plateau_factor": 0.3}
    changed = tiny.trainer(tmp_path, frames, valid, config, allow_config_change=True)
    group = changed.optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["amsgrad"]) == (1e-4, 0.0, True)
    assert changed.plateau.factor == 0.3
    changed.run()
    assert tiny.rows(tmp_path)[-1]["learning_rate"] == pytest.approx(1e-4)


@pytest.mark.fault("R5")
def test_another_model_is_refused_even_so(
    frames: list[Atoms], valid: list[Atoms], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.trainer(tmp_path, frames, valid).run()
    monkeypatch.setitem(tiny.MODEL, "features", 10)
    with pytest.raises(TrainingError, match=r"model.features: 8 -> 10\. Restore it or choose another folder"):
        tiny.trainer(tmp_path, frames, valid, allow_config_change=True)


def test_new_targets_get_columns_of_their_own(frames: list[Atoms], valid: list[Atoms], tmp_path: Path) -> None:
    tiny.trainer(tmp_path, frames, valid).run()
    tiny.trainer(tmp_path, frames, valid, {"epochs": 4, "loss": {"energies": 1.0}}, allow_config_change=True).run()
    header, *lines = (tmp_path / "log.csv").read_text().splitlines()
    assert header.endswith("train_energies,valid_energies_mae,valid_energies_rmse")
    assert [line.count(",") for line in lines] == [header.count(",")] * 4
    assert [line.endswith(",,,") for line in lines] == [True] * 3 + [False]


FULL = """
    import resource, sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[2])
    import tiny
    from mlff_engines.errors import TrainingError

    folder, frames = Path(sys.argv[1]), tiny.clusters(6)
    trainer = tiny.trainer(folder, frames, frames[:2], {"epochs": 2, "save_every_minutes": 0})
    trainer.run()
    for size in (20_000, 300):  # too small for a state; and even for a row of the log
        trainer = tiny.trainer(folder, frames, frames[:2], {"epochs": 4}, allow_config_change=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        try:
            trainer.run()
        except TrainingError as error:
            print(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    trainer = tiny.trainer(folder, frames, frames[:2], {"epochs": 4}, allow_config_change=True)
    print(trainer.epoch)
    trainer.run()
    print([row["epoch"] for row in tiny.rows(folder)])
"""


@pytest.mark.fault("R2")
def test_disk_full_while_training(tmp_path: Path) -> None:
    tests = str(Path(tiny.__file__).parent)
    command = [sys.executable, "-c", textwrap.dedent(FULL), str(tmp_path / "run"), tests]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    *messages, epoch, rows = done.stdout.splitlines()
    assert len(messages) == 2
    for message in messages:
        assert f"{tmp_path / 'run'}" in message
        assert "File too large" in message
        assert "intact" in message
        assert "free space" in message
    assert (epoch, rows) == ("2", "[1.0, 2.0, 3.0, 4.0]")


def test_second_signal_stops_at_once(
    frames: list[Atoms], valid: list[Atoms], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later one; the copy that a launcher may send along with the first does not count."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    trainer = tiny.trainer(tmp_path, frames, valid)
    with trainer._signals():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert trainer._stop == "SIGINT"
        monkeypatch.setattr(trainer, "_asked", trainer._asked - 5)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
