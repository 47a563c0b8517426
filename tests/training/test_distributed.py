"""`mlff train` as a process of its own, alone and under `torchrun`: signals, and several processes as one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

import tiny
from mlff_engines.checkpoint import load_checkpoint
from mlff_engines.cli import main
from mlff_engines.errors import ConfigError
from mlff_training.data.xyz import write_xyz
from mlff_training.distributed import World
from mlff_training.state import load_state

MLFF = str(Path(sys.executable).with_name("mlff"))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
pytestmark = pytest.mark.slow
LONG = 120.0  # s; nothing here may hang


@pytest.fixture
def config_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a configuration for 13 training frames; the arguments override those of its section `train`."""
    frames = tiny.clusters(13)
    for i, atoms in enumerate(frames):
        atoms.info |= {"charge": 0.0, "multiplicity": 1, "level": "EMT", "group": str(i)}
    write_xyz(tmp_path / "train.xyz", frames)
    held_out = tiny.clusters(3, seed=9)
    for atoms in held_out:
        atoms.info |= {"charge": 0.0, "multiplicity": 1, "level": "EMT"}
    write_xyz(tmp_path / "valid.xyz", held_out)

    def write(**train: Any) -> Path:
        settings = {"batch_size": 5, "warmup_steps": 2, "learning_rate": 5e-3, "dtype": "float64", "tensorboard": False}
        content = {
            "data": {"train": [str(tmp_path / "train.xyz")], "valid": [str(tmp_path / "valid.xyz")]},
            "e0": tiny.E0,
            "model": tiny.MODEL,
            "train": {**settings, **train},
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
        return tmp_path / "config.yaml"

    return write


@contextmanager
def running(*command: object) -> Iterator[subprocess.Popen[str]]:
    """A process in a session of its own, none of which is left behind."""
    with (
        tempfile.TemporaryDirectory() as scratch,  # torchrun leaves a folder of logs
        subprocess.Popen(
            [str(part) for part in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": scratch},
            start_new_session=True,
        ) as process,
    ):
        children: list[psutil.Process] = []
        try:
            yield process
        finally:
            if process.poll() is None:
                children = psutil.Process(process.pid).children(recursive=True)
                process.kill()
            for child in children:
                child.kill()


def train(*command: object) -> subprocess.CompletedProcess[str]:
    with running(*command) as process:
        out, err = process.communicate(timeout=LONG)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def train_here(config: Path, run: Path, *options: str) -> None:
    """The same command in this process, where everything is imported already."""
    main(["train", str(config), "-o", str(run), *options])


def wait_for_rows(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + LONG
    while time.monotonic() < end:
        if (folder / "log.csv").exists() and len(tiny.rows(folder)) >= count:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError(f"no {count} rows in {folder}")


def epochs_saved(folder: Path) -> int:
    state, warning = load_state(folder / "state.safetensors")
    assert warning is None
    return int(state["counters"]["epoch"])


@pytest.mark.fault("R7", "M5")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_exits(
    number: signal.Signals, config_file: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with running(MLFF, "train", config_file(epochs=100_000, schedule="constant"), "-o", run) as process:
        wait_for_rows(run, 3, process)
        process.send_signal(number)
        _, err = process.communicate(timeout=LONG)
    assert process.returncode == 130, err
    assert f"error: stopped by {number.name} in epoch " in err
    assert "run the same command to go on" in err
    assert "Traceback" not in err
    rows, saved = len(tiny.rows(run)), epochs_saved(run)
    assert saved == rows
    assert saved >= 3
    if number == signal.SIGTERM:
        config = config_file(epochs=saved + 2, schedule="constant")
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            train_here(config, run)
        assert caught.value.code == 1
        assert "train.epochs: 100000 ->" in capfd.readouterr().err
        train_here(config, run, "--allow-config-change")
        assert [row["epoch"] for row in tiny.rows(run)] == list(range(1, saved + 3))


def test_two_processes_equal_one(config_file: Callable[..., Path], tmp_path: Path) -> None:
    """13 frames in batches of 5 over 2 processes: shares of 3 and 2, 2 and 1; two batches per step, then one."""
    config = config_file(epochs=3, accumulate=2, clip_norm=0.1, loss={"energies": 1.0})
    train_here(config, tmp_path / "one")
    both = train(*TORCHRUN, MLFF, "train", config, "-o", tmp_path / "two")
    assert both.returncode == 0, both.stderr
    one, two = ({p.relative_to(tmp_path / n) for p in (tmp_path / n).rglob("*")} for n in ("one", "two"))
    # but for the digest in the name of the weights
    assert {p for p in one if p.suffix != ".safetensors"} == {p for p in two if p.suffix != ".safetensors"}
    assert both.stderr.count("epoch 1, forces") == 1  # one process speaks
    states = [load_state(tmp_path / name / "state.safetensors")[0] for name in ("one", "two")]
    assert states[0]["counters"]["step"] == states[1]["counters"]["step"] == 6
    for part in ("potential", "averaged"):
        for name, tensor in states[0]["parts"][part].items():
            torch.testing.assert_close(tensor, states[1]["parts"][part][name], rtol=0, atol=1e-10, equal_nan=True)
    for row, other in zip(tiny.rows(tmp_path / "one"), tiny.rows(tmp_path / "two"), strict=True):
        assert row == pytest.approx({**other, "seconds": row["seconds"]}, rel=1e-6)
    train_here(config_file(epochs=1, learning_rate=1e-30), tmp_path / "start")
    untrained, trained = (load_checkpoint(tmp_path / name / "best")[0].state_dict() for name in ("start", "two"))
    key = "model.network.filter_net.weight"
    assert (untrained[key] - trained[key]).abs().max() > 1e-3  # there was something to agree on


def ranks(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    return [p for p in psutil.Process(launcher.pid).children(recursive=True) if "train" in p.cmdline()]


@pytest.mark.fault("R7")
@pytest.mark.parametrize("who", ["launcher", "second process"])
def test_signal_under_torchrun(who: str, config_file: Callable[..., Path], tmp_path: Path) -> None:
    """All processes stop together, the state is saved, and training goes on in two processes or one."""
    run, config = tmp_path / "run", config_file(epochs=100_000, schedule="constant")
    with running(*TORCHRUN, MLFF, "train", config, "-o", run) as process:
        wait_for_rows(run, 2, process)
        workers = ranks(process)
        assert len(workers) == 2
        if who == "launcher":
            process.send_signal(signal.SIGTERM)
        else:
            second = next(worker for worker in workers if worker.environ()["RANK"] == "1")
            second.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=LONG)
    assert process.returncode != 0
    assert "run the same command to go on" in err
    assert not any(worker.is_running() for worker in workers)
    saved = epochs_saved(run)
    assert saved == len(tiny.rows(run)) >= 2
    train_here(config_file(epochs=saved + 1, schedule="constant"), run, "--allow-config-change")
    assert len(tiny.rows(run)) == saved + 1


def test_killed_process_does_not_leave_the_others_waiting(config_file: Callable[..., Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = config_file(epochs=100_000, save_every_minutes=0)
    with running(*TORCHRUN, MLFF, "train", config, "-o", run) as process:
        wait_for_rows(run, 2, process)
        workers = ranks(process)
        next(worker for worker in workers if worker.environ()["RANK"] == "1").kill()
        process.communicate(timeout=LONG)
    assert process.returncode != 0
    assert not any(worker.is_running() for worker in workers)
    assert epochs_saved(run) >= 1


def test_more_processes_than_structures(tmp_path: Path) -> None:
    frames = tiny.clusters(3)
    with pytest.raises(ConfigError, match=r"train\.batch_size 4 is smaller than the 5 processes"):
        tiny.trainer(tmp_path, frames, frames, {"batch_size": 4}, world=World(0, 5))
    with pytest.raises(ConfigError, match="3 training frames are fewer than the 5 processes"):
        tiny.trainer(tmp_path, frames, frames, {"batch_size": 5}, world=World(0, 5))
