"""The gate of equal accuracy: one loop trains every package's models, goes on where it stopped, and judges them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from mlff_engines.bench import subjects
from mlff_engines.bench.page import markers
from mlff_engines.bench.rows import Row
from mlff_engines.bench.subjects import SCRIPTS, Peer
from mlff_engines.config import load_yaml
from mlff_engines.errors import TrainingError
from requirements import require_compiler, require_engine

EXAMPLES = Path(__file__).parents[2] / "examples" / "benchmarks"
# a package whose models are springs between all pairs of atoms: energy Σ (a + b r + c r²)
SPRINGS = """
import torch

def build(options):
    size, facts = options.get("size", {}), options["facts"]
    if size.get("broken"):
        raise ValueError("such a size there is not")
    model = torch.nn.Module()
    model.powers = size.get("powers", 3)
    model.c = torch.nn.Parameter(torch.zeros(model.powers))
    model.register_buffer("shift", torch.tensor(facts["e0"]).sum())
    if "state" in options:
        model.load_state_dict(options["state"])
    return model

def graph(numbers, positions):
    return torch.tensor(positions, dtype=torch.float32)

def neighbors(graph):
    return len(graph) - 1.0

def collate(graphs):
    return torch.stack(graphs)

def predict(model, batch):
    batch = batch.clone().requires_grad_(True)
    i, j = torch.triu_indices(batch.shape[1], batch.shape[1], 1)
    r = (batch[:, i] - batch[:, j]).norm(dim=-1)
    energy = model.shift + sum(c * r.pow(k) for k, c in enumerate(model.c)).sum(1)
    (gradient,) = torch.autograd.grad(energy.sum(), batch, create_graph=model.training)
    return energy, -gradient.flatten(0, 1)

def open_subject(what, options):
    loaded = torch.load(options["weights"], weights_only=True)
    model = build(loaded).eval()

    def prepare(system):
        batch = collate([graph(system["numbers"], system["positions"])])
        return lambda: predict(model, batch)[1].detach()

    return prepare, {"mode": options["mode"], "powers": model.powers}
"""
TRAINING = {
    **{"minutes": 0.02, "batch_size": 4, "learning_rate": 1.0, "energy_weight": 1.0, "forces_weight": 10.0},
    **{"ema_decay": 0.9, "weight_decay": 0.0, "amsgrad": True, "clip_norm": None, "seed": 0},
}


@pytest.fixture
def springs(tmp_path: Path) -> Path:
    """The package's file."""
    path = tmp_path / "springs.py"
    path.write_text(SPRINGS)
    return path


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    """Of springs of 1.5 eV/Å² and 1 Å, at random positions of four atoms."""
    rng, arrays = np.random.default_rng(0), {"numbers": np.array([1, 1, 8, 8])}
    for part, count in {"train": 60, "valid": 10, "held_out": 20}.items():
        positions = rng.normal(scale=1.0, size=(count, 4, 3))
        apart = positions[:, :, None] - positions[:, None]
        r = np.linalg.norm(apart, axis=-1) + np.eye(4)
        arrays[f"{part}/positions"] = positions
        arrays[f"{part}/energies"] = 0.5 * (1.5 * (r - 1) ** 2).sum((1, 2)) - 100.0
        arrays[f"{part}/forces"] = -(3.0 * (r - 1) / r)[..., None].__mul__(apart).sum(2)
    np.savez(tmp_path / "data.npz", **arrays)
    return tmp_path / "data.npz"


def fit(springs: Path, folder: Path, labels: Path, **changes: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    job = {"size": changes.pop("size", {}), "training": {**TRAINING, **changes}, "data": str(labels)}
    (folder / "job.json").write_text(json.dumps(job))
    command = [sys.executable, "-P", str(SCRIPTS / "fit.py"), str(springs), str(folder)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads((folder / "fitted.json").read_text()))


def test_the_loop_learns(springs: Path, labels: Path, tmp_path: Path) -> None:
    """The right size to a thousandth of the forces; one power too few, and it cannot."""
    found = fit(springs, tmp_path / "right", labels)
    with np.load(labels) as data:
        scale = np.abs(data["held_out/forces"]).mean()
    assert found["force_mae"] < 1e-2 * scale
    assert found["energy_mae"] < 1e-2
    assert found["parameters"] == 3
    assert found["labels"] == 60
    assert found["frames"] == 4 * found["steps"]
    assert found["minutes"] == pytest.approx(0.02, rel=0.2)
    assert found["force_mae"] < 0.1 * fit(springs, tmp_path / "small", labels, size={"powers": 2})["force_mae"]


def test_the_loop_goes_on(springs: Path, labels: Path, tmp_path: Path) -> None:
    """With a larger budget after its state was saved: steps and time add up."""
    first = fit(springs, tmp_path / "fit", labels)
    second = fit(springs, tmp_path / "fit", labels, minutes=0.03)
    assert second["steps"] > first["steps"]
    assert second["minutes"] == pytest.approx(0.03, rel=0.2)
    assert second["log"][: len(first["log"])] == first["log"]


@pytest.fixture(scope="module")
def gate() -> ModuleType:
    """The example."""
    require_engine("ase")
    name = "same_accuracy"
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_the_configuration_is_valid(gate: ModuleType) -> None:
    config = load_yaml(gate.Gate, EXAMPLES / "same_accuracy.yaml")
    assert set(config.peers) <= set(subjects.PEERS)
    assert all(len(peer.sizes) >= 3 for peer in config.peers.values())


def facts(mae: float) -> dict[str, Any]:
    return {"parameters": 1000, "labels": 50, "minutes": 1.0, "frames": 200, "force_mae": mae}


def test_who_qualifies(gate: ModuleType) -> None:
    """The fastest of those accurate enough, not the fastest of all; eager and compiled apart."""
    config = gate.Gate(peers={name: {"training": TRAINING, "sizes": {"s": {}, "l": {}}} for name in ("mace", "nequip")})
    errors = {"mlff": 0.0400, "mace s": 0.0421, "mace l": 0.0419, "nequip s": 0.06, "nequip l": 0.05}
    times = {"mlff": (8.0, 0.5), "mace s": (9.0, 4.0), "mace l": (20.0, 6.0), "nequip s": (7.0, 3.0)}
    rows = {
        f"{name} {mode}": Row(
            **{"system": "aspirin", "atoms": 21, "threads": 1, "what": f"{name} {mode}"},
            **{"median_ms": 99.0, "p95_ms": 99.0, "cpu_ms": ms},
        )
        for name, pair in times.items()
        for mode, ms in zip(gate.MODES, pair, strict=True)
    }
    judged = gate.judge(config, {name: facts(error) for name, error in errors.items()}, rows)
    assert [model.name for model in judged if model.qualifies] == ["mlff", "mace l"]
    assert gate.verdicts(config, judged) == [
        "A model qualifies up to 42.0 meV/Å, 1.05 times the error of our student.",
        "mace, eager: its fastest model that qualifies, mace l, takes 40 times ours.",
        "mace, compiled: its fastest model that qualifies, mace l, takes 12 times ours.",
        "nequip, eager: none qualifies; the fastest of all, nequip s, takes 14 times ours.",
        "nequip, compiled: none qualifies; the fastest of all, nequip s, takes 6 times ours.",
    ]
    lines = gate.table(judged).splitlines()
    assert lines[2] == "| mlff | 1,000 | 50 | 1.0 | 200 | 40.0 | yes | 8 | 16 | 0.5 | 1 |"
    assert lines[6] == "| nequip l | 1,000 | 50 | 1.0 | 200 | 50.0 | no | - | - | - | - |"


@pytest.mark.slow
def test_the_whole_gate(
    gate: ModuleType, springs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From GFN2-xTB to a page, with springs for a package: every model is trained once, and a broken size is said."""
    require_compiler()
    for module in (subjects, gate):
        monkeypatch.setattr(module, "PEERS", {"springs": Peer(str(springs), "springs")})
    monkeypatch.setattr(gate.environments, "make", lambda name, echo: Path(sys.executable))
    page, config = tmp_path / "page.md", tmp_path / "gate.yaml"
    page.write_text("\n".join(["before", *markers(gate.SECTION), "after"]))
    settings = {
        "sampling": {"relax": None, "md": {"temperatures": [300], "steps": 60, "interval": 2}},
        "held_out": {"temperatures": [300], "seeds": [1], "steps": 40, "interval": 4},
        "valid": 5,
        "workers": 1,
        "rounds": 1,
        "student": {"model": {"features": 16, "interactions": 1}, "train": {"epochs": 1, "tensorboard": False}},
        "peers": {"springs": {"training": TRAINING, "sizes": {"three": {}, "none": {"broken": True}}}},
    }
    config.write_text(json.dumps(settings))
    command = [str(config), "-o", str(tmp_path / "out"), "--page", str(page)]
    gate.main(command)
    text = page.read_text()
    assert "No springs none: it cannot be trained (exit code 1): ValueError: such a size there is not." in text
    assert "held out: 10 structures" in text
    assert "springs, compiled: " in text
    assert text.startswith("before\n")
    assert str(tmp_path) not in text
    capsys.readouterr()
    gate.main([*command, "--as-is"])  # all is there
    said = capsys.readouterr().err
    assert "training" not in said.replace("cannot be trained", "").replace("not been trained", "")
    assert "No springs none: it has not been trained yet." in page.read_text()
    changed = gate.Peer(training={**TRAINING, "minutes": 0.03}, sizes={"three": {}})
    with pytest.raises(TrainingError, match="not been trained"):
        gate.fitted("springs", changed, "three", tmp_path / "out", train=False)


@pytest.mark.slow
def test_table_error_runs(tmp_path: Path) -> None:
    """Coarser tables are worse, down to the kernel's own."""
    require_compiler()
    from mlff_engines.bench.ours import default_student

    student = default_student(tmp_path)
    done = subprocess.run(
        [sys.executable, EXAMPLES / "table_error.py", student, EXAMPLES.parent / "ethanol.xyz", "--smoke"],
        check=True,
        capture_output=True,
        text=True,
    )
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| float")]
    for dtype in ("float32", "float64"):
        errors = [float(row[4]) for row in rows if dtype in row[0]]
        assert errors == sorted(errors, reverse=True)
        assert len(errors) == 3
    assert [row[1].endswith("*") for row in rows] == [False, False, True] * 2
