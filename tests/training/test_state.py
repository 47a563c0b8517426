"""The saved state survives kills, a full disk and damage; what cannot be read is said."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from mlff_engines.errors import TrainingError
from mlff_training.state import differences, has_state, load_state, save_state

NAME = "state.safetensors"


def some_state(number: int = 0) -> dict[str, Any]:
    return {
        "counters": {"epoch": number, "best": {"loss": math.inf}, "none": None, "flag": True, "rate": 0.1 + 1e-17},
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0)}, 11: {"step": torch.tensor(4.0)}},
            "betas": (0.9, 0.999),
        },
        "weights": {
            "a/b": torch.arange(6.0).reshape(2, 3).T + number,  # not contiguous
            "empty": torch.empty(0, 3),
            "shared": (shared := torch.ones(2, dtype=torch.float64)),
            "again": shared,
            "yes": torch.tensor([True, False]),
            "half": torch.tensor([1.5], dtype=torch.bfloat16),
        },
    }


def test_comes_back_as_it_was(tmp_path: Path) -> None:
    assert not has_state(tmp_path / NAME)
    save_state(tmp_path / "new" / NAME, some_state())
    assert has_state(tmp_path / "new" / NAME)
    state, warning = load_state(tmp_path / "new" / NAME)
    assert warning is None
    assert tiny.differing(state, some_state()) == []
    assert list(state["optimizer"]["state"]) == [0, 11]  # numbers, not their names
    assert state["weights"]["half"].dtype == torch.bfloat16
    assert tiny.differing(state, some_state(1)) == ["/counters/epoch", "/weights/a/b"]


def test_differences_name_every_leaf() -> None:
    old = {"train": {"epochs": 3, "loss": {"forces": 1.0}}, "gone": 1}
    new = {"train": {"epochs": 4, "loss": {"forces": 2.0}}, "new": [2]}
    assert differences(old, new) == {
        "gone": "1 -> None",
        "new": "None -> [2]",
        "train.epochs": "3 -> 4",
        "train.loss.forces": "1.0 -> 2.0",
    }


def flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


DAMAGE = {
    "weights": lambda content: flip(content, len(content) - 1),
    "counter": lambda content: content.replace(b'[\\"epoch\\", 1]', b'[\\"epoch\\", 7]'),
    "header": lambda content: flip(content, 3),
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "other": lambda content: b"not a safetensors file at all",
}


@pytest.mark.fault("R3")
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_latest_falls_back_and_says_so(damage: str, tmp_path: Path) -> None:
    path = tmp_path / NAME
    for number in (0, 1):
        save_state(path, some_state(number))
    content = path.read_bytes()
    path.write_bytes(DAMAGE[damage](content))
    assert path.read_bytes() != content
    state, warning = load_state(path)
    assert state["counters"]["epoch"] == 0
    assert warning is not None
    assert str(path) in warning
    assert f"fell back to {path}.previous" in warning
    (tmp_path / f"{NAME}.previous").write_bytes(DAMAGE[damage](content))
    with pytest.raises(
        TrainingError, match=r"no readable training state: .*state\.safetensors\.previous.*another folder"
    ):
        load_state(path)


# A child saves states, one after another, and is killed at a moment of its parent's choice; whatever it has told to be
# saved must be there. "direct" writes without the care under test: the check has to catch it.
KILLER = """
    import os, random, signal, sys, time
    from pathlib import Path
    import torch
    from safetensors.torch import save as to_bytes
    from mlff_training.state import load_state, save_state

    torch.set_num_threads(1)
    path, writer = Path(sys.argv[1]), sys.argv[2]
    weights = torch.zeros(2_000_000)

    def save(number):
        if writer == "direct":
            path.write_bytes(to_bytes({"weights": weights + number}))
        else:
            save_state(path, {"number": number, "weights": weights + number})

    random.seed(0)
    number = 0
    for attempt in range(12):
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            for number in range(number + 1, number + 1000):
                save(number)
                os.write(write_end, number.to_bytes(4, "little"))
        os.close(write_end)
        assert os.read(read_end, 4)
        time.sleep(random.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        told = os.read(read_end, 65536)
        state, warning = load_state(path)
        if told:
            number = int.from_bytes(told[-4:], "little")
        assert state["number"] >= number, (state["number"], number)
        assert torch.equal(state["weights"], weights + state["number"])
        number = state["number"]
    save(number + 1)
    print("readable after every kill:", sorted(p.name for p in path.parent.iterdir()))
"""


def run(source: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(source), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.fault("R1")
def test_killed_while_saving(tmp_path: Path) -> None:
    done = run(KILLER, tmp_path / NAME, "save_state")
    # nor is anything left lying about: no temporary file of a process that is gone
    assert done.stdout == f"readable after every kill: ['{NAME}', '{NAME}.previous']\n", done.stderr
    (tmp_path / "direct").mkdir()
    done = run(KILLER, tmp_path / "direct" / NAME, "direct")
    assert "no readable training state" in done.stderr


FULL = """
    import resource, sys
    from pathlib import Path
    import torch
    from mlff_engines.errors import TrainingError
    from mlff_training.state import load_state, save_state

    path = Path(sys.argv[1])
    for number in (1, 2):
        save_state(path, {"number": number, "weights": torch.zeros(10)})
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        save_state(path, {"number": 3, "weights": torch.zeros(1_000_000)})
    except TrainingError as error:
        print(error)
    for name in (path, path.with_name(path.name + ".previous")):
        state, warning = load_state(name)
        print(state["number"], warning)
    print(sorted(p.name for p in path.parent.iterdir()))
"""


@pytest.mark.fault("R2")
def test_disk_full(tmp_path: Path) -> None:
    """A limit of the file size stands for the full disk: the same call of the system fails in the same way."""
    done = run(FULL, tmp_path / NAME)
    assert done.returncode == 0, done.stderr
    message, latest, previous, files = done.stdout.splitlines()
    assert message.startswith(f"cannot save the training state to {tmp_path / NAME}: ")
    assert "Earlier states are intact; free space" in message
    assert (latest, previous) == ("2 None", "1 None")
    assert files == f"['{NAME}', '{NAME}.previous']"
