"""Pairs and the training of jumps, on real constant-energy bursts of a small analytic molecule."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from ase import Atoms, units
from click.testing import CliRunner

import students
from kstep_jumps import require_torchmdnet
from kstep_systems import MASSES, molecule, phase_point
from mlff_ase import MLFFCalculator
from mlff_ase.kstep import KStepDynamics
from mlff_engines.checkpoint import load_jump_checkpoint
from mlff_engines.errors import ConfigError, DataError, TrainingError
from mlff_engines.kstep.learned import LearnedJump, export_jump
from mlff_engines.kstep.propagators import trajectory, velocity_verlet
from mlff_engines.structure import FloatArray
from mlff_training.kstep import commands
from mlff_training.kstep.batches import FORCE, NM, NM_PER_PS, PairBatches
from mlff_training.kstep.config import JumpModelConfig, JumpTrainConfig
from mlff_training.kstep.evaluation import validate
from mlff_training.kstep.pairs import load_pairs, make_pairs, split_pairs
from mlff_training.kstep.train import JumpTrainer, train_jumps
from mlff_training.loop import Interrupted

DT = 0.5  # fs
MODEL = {"hidden_channels": 16, "num_layers": 1, "vec_channels": 8, "max_disp_nm": 0.1, "predict_delta": False}
TRAIN = {"lr": 5e-3, "warmup_steps": 5, "epochs": 2, "val_every_steps": 10, "checkpoint_every_steps": 5}
NUMBERS = np.array([6, 1, 8, 1])


def write(path: Path, name: str, change: dict[str, Any] | None = None, **meta: Any) -> Path:
    """A trajectory file as of `mlff kstep simulate`: 30 bursts of 16 steps, every fourth kept."""
    seed = sum(map(ord, name))
    particles, x, _ = phase_point(constrained=True, seed=seed)
    rng, field = np.random.default_rng(seed), molecule()
    rows: dict[str, list[Any]] = {key: [] for key in ("pos", "vel", "forces", "segment", "step")}
    for segment in range(30):
        v = particles.thermal(x, 300.0, rng)
        x, v, here = trajectory(particles, x, v, field(x), field, DT, 20)
        a, b, there = x, v, here
        for step in range(17):
            if step % 4 == 0:
                for key, value in zip(rows, (a / NM, b / NM_PER_PS, there.forces / FORCE, segment, step), strict=True):
                    rows[key].append(value)
            a, b, there = velocity_verlet(particles, a, b, there, field, DT)
    settings = {"constraints": "HBonds"} | meta.pop("settings", {})
    metadata = {"molecule": name, "temperature_K": 300.0, "dt_fs": DT, "settings": settings, **meta}
    arrays = {key: np.array(value) for key, value in rows.items()}
    arrays |= {"numbers": NUMBERS, "masses": MASSES, "box": np.zeros((3, 3)), **(change or {})}
    np.savez(path, **arrays, metadata=json.dumps(metadata))
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [write(folder / f"{name}_300K.npz", name) for name in ("alpha", "beta", "gamma")]


@pytest.fixture(scope="module")
def data(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for k in (4, 8):
        make_pairs(runs, k, folder)
    return folder


def trainer(data: Path, folder: Path, k: int = 4, *, model: dict[str, Any] | None = None, **train: Any) -> JumpTrainer:
    pairs = load_pairs(data / f"dataset_k{k}.npz")
    parts = split_pairs(pairs, data / "splits.json", valid=0.34)
    config = JumpTrainConfig(**(TRAIN | train))
    return JumpTrainer(
        pairs, parts["train"], parts["valid"], JumpModelConfig(**(MODEL | (model or {}))), config, folder
    )


def centred(x: FloatArray) -> FloatArray:
    return x - MASSES @ x / MASSES.sum()


def test_pairs_are_frames_k_steps_apart_without_drift(runs: list[Path], data: Path) -> None:
    pairs = load_pairs(data / "dataset_k8.npz")
    a = pairs.arrays
    assert len(pairs) == 3 * 30 * 3  # three starts per burst of five frames
    assert list(a["molecules"]) == ["alpha", "beta", "gamma"]
    with np.load(runs[0]) as run:
        np.testing.assert_allclose(a["x_t"][4:8], centred(run["pos"][1]), atol=1e-12)
        np.testing.assert_allclose(a["x_tk"][4:8], centred(run["pos"][3]), atol=1e-12)
        np.testing.assert_allclose(a["v_tk"][4:8], centred(run["vel"][3]), atol=1e-12)
        np.testing.assert_allclose(a["f_t"][4:8], run["forces"][1])
    assert a["next"][:3].tolist() == [2, -1, -1]  # the first pair ends where the third starts
    for name in ("x_t", "v_t", "x_tk", "v_tk"):
        np.testing.assert_allclose(MASSES @ a[name].reshape(-1, 4, 3), 0, atol=1e-10)
    terms = pairs.record.terms
    assert (terms.steps, terms.timestep, terms.constraints, terms.temperatures) == (8, DT, "hbonds", [300.0])
    assert terms.masses == {"C": 12.0, "H": 1.0, "O": 16.0}


@pytest.mark.parametrize(
    ("broken", "match"),
    [
        (lambda p: write(p, "delta", dt_fs=1.0), r"has time step \(fs\) and constraints \(1\.0, 'hbonds'\)"),
        (lambda p: write(p, "delta", settings={"constraints": None}), r"\(0\.5, 'none'\)"),
        (lambda p: write(p, "delta", settings={"constraints": "AllBonds"}), "has the constraints AllBonds"),
        (lambda p: write(p, "delta", {"masses": np.array([12.0, 1, 16, 3])}), r"atoms of H of 3 and 1 amu"),
        (lambda p: write(p, "delta", {"box": np.eye(3)}), "is periodic"),
        (lambda p: write(p, "delta", {"vel": np.full((150, 4, 3), np.nan)}), "not finite"),
        (lambda p: (p.write_bytes(b"no"), p)[1], "is no trajectory of mlff kstep simulate"),
        (lambda p: (np.savez(p, pos=np.zeros(3)), p)[1], "it has no masses, metadata"),
    ],
)
def test_trajectories_that_do_not_fit_are_refused(
    runs: list[Path], tmp_path: Path, broken: Callable[[Path], Path], match: str
) -> None:
    with pytest.raises(DataError, match=match):
        make_pairs([runs[0], broken(tmp_path / "delta.npz")], 4, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.fault("J4")
def test_k_without_pairs_is_refused(runs: list[Path], tmp_path: Path) -> None:
    for k in (6, 20):
        with pytest.raises(
            DataError, match=rf"no two frames {k} steps apart \(frames lie \[4\] steps apart, .*16 steps"
        ):
            make_pairs(runs, k, tmp_path)
    with pytest.raises(ConfigError, match="k = 0"):
        make_pairs(runs, 0, tmp_path)


@pytest.mark.fault("J5")
def test_an_altered_data_set_is_noticed(runs: list[Path], tmp_path: Path) -> None:
    path = make_pairs(runs[:1], 4, tmp_path)
    path.write_bytes(make_pairs(runs[1:2], 4, tmp_path / "other").read_bytes())
    with pytest.raises(DataError, match="is not the file its JSON describes"):
        load_pairs(path)
    with pytest.raises(DataError, match="cannot read the pairs"):
        load_pairs(tmp_path / "dataset_k12.npz")


def test_splits_keep_molecules_or_segments_whole(data: Path, runs: list[Path], tmp_path: Path) -> None:
    pairs = load_pairs(data / "dataset_k4.npz")
    for by, of in (("molecule", "molecule_id"), ("segment", "segment")):
        parts = split_pairs(pairs, tmp_path / f"{by}.json", by=by)
        ids = [set(pairs.arrays[of][part].tolist()) for part in parts.values()]
        assert not ids[0] & ids[1]
        assert len(parts["train"]) + len(parts["valid"]) == len(pairs)
        longer = split_pairs(load_pairs(data / "dataset_k8.npz"), tmp_path / f"{by}.json", by=by)
        assert set(load_pairs(data / "dataset_k8.npz").arrays[of][longer["valid"]].tolist()) == ids[1]
    with pytest.raises(DataError, match="splits by segment"):
        split_pairs(pairs, tmp_path / "segment.json", by="molecule")
    single = load_pairs(make_pairs(runs[:1], 4, tmp_path))
    with pytest.raises(ConfigError, match=r"1 molecule\(s\) cannot be split .*split by segment"):
        split_pairs(single, tmp_path / "single.json")


def test_batches_carry_pairs_both_ways(data: Path) -> None:
    pairs = load_pairs(data / "dataset_k4.npz")
    batches = PairBatches(pairs, np.arange(10), 5.0, reverse=True)
    there, back = batches.batch([3]), batches.batch([13])
    torch.testing.assert_close(back.x, there.x + there.dx)
    torch.testing.assert_close(back.dx, -there.dx)
    torch.testing.assert_close(back.graph["velocities"], -(there.graph["velocities"] + there.dv))
    torch.testing.assert_close(back.dv, there.dv)
    assert there.forces is not None
    assert bool(there.forces.isfinite().all())
    assert back.forces is not None
    assert bool(back.forces.isnan().all())
    noisy = batches.batch([3], 0.1, np.random.default_rng(0))
    torch.testing.assert_close(noisy.x + noisy.dx, there.x + there.dx)  # it ends where it ended
    index = noisy.graph["edge_index"]
    torch.testing.assert_close(noisy.graph["edge_vec"], (noisy.x[index[1]] - noisy.x[index[0]]).float())
    both = batches.batch([3, 13])
    assert both.graph["batch"].tolist() == [0] * 4 + [1] * 4


def test_the_true_flow_has_no_error_and_flight_has_that_of_flight(data: Path) -> None:
    """What is measured, measured on jumps that are known."""

    class Known(torch.nn.Module):
        interval, max_displacement, bounded = 4 * DT, 1.0, False

        def __init__(self, right: bool) -> None:
            super().__init__()
            self.reference, self.right, self.calls = model.reference, right, iter(batches)

        def forward(self, graph: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            batch = next(self.calls)
            dx = batch.dx if self.right else self.interval * graph["velocities"]
            dv = batch.dv if self.right else -0.1 * graph["velocities"]
            return {"dx": dx, "dv": dv, "clamped": torch.zeros(len(dx), dtype=torch.bool)}

    model = trainer(data, data / "unused").model
    part = PairBatches(load_pairs(data / "dataset_k4.npz"), np.arange(20), 5.0)
    batches = [part.batch(list(range(n, n + 10))) for n in (0, 10)]
    right, flying = (validate(Known(known), part, 10) for known in (True, False))
    assert (right["x_rmse"], right["v_rmse"], right["heat"]) == (0.0, 0.0, 1.0)
    assert flying["x_rmse"] == flying["x_flight"] > 0
    assert flying["heat"] < 1


@pytest.mark.slow
def test_training_learns_and_reports(data: Path, tmp_path: Path) -> None:
    run = trainer(data, tmp_path, epochs=12, reverse=False, batch_size=16, model={"use_force_head": True})
    best = run.run()
    assert best["x_rmse"] < 0.7 * best["x_flight"]
    rows = (tmp_path / "log.csv").read_text().splitlines()
    assert len(rows) >= 3
    table = json.loads((tmp_path / "rollout.json").read_text())
    assert [row["jumps"] for row in table] == [1, 2, 3]
    assert table[0]["x_rmse"] < table[2]["x_rmse"]
    shown = json.loads((tmp_path / "displacements.json").read_text())
    assert set(shown["elements"]) == {"C", "H", "O"}
    width = np.diff(shown["elements"]["H"]["edges"])
    assert (width * shown["elements"]["H"]["true"]).sum() == pytest.approx(1)
    assert shown["elements"]["H"]["largest"]["true"] > shown["elements"]["O"]["largest"]["true"]
    assert load_jump_checkpoint(tmp_path / "best")[1].training["valid"]["x_rmse"] == best["x_rmse"]


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(data: Path, tmp_path: Path) -> None:
    settings = {"noise_nm": 0.001, "grad_accum": 2, "batch_size": 16, "val_every_steps": 4}
    whole = trainer(data, tmp_path / "whole", **settings)
    whole.run()
    first = trainer(data, tmp_path / "parts", **settings)
    first._stop = "SIGTERM"
    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        first.run()
    second = trainer(data, tmp_path / "parts", **settings)
    assert second.step == 1
    second.run()
    for one, other in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert (tmp_path / "whole" / "log.csv").read_text() == (tmp_path / "parts" / "log.csv").read_text()
    with pytest.raises(TrainingError, match=r"another configuration: train\.lr: 0\.005 -> 0\.001"):
        trainer(data, tmp_path / "parts", **settings, lr=1e-3)


def test_a_curriculum_hands_weights_on(data: Path, tmp_path: Path) -> None:
    config = JumpTrainConfig(**(TRAIN | {"k_steps": [4, 8], "epochs": 1, "lr": 1e-9, "warmup_steps": 0}))
    made = train_jumps(data, JumpModelConfig(**MODEL), config, tmp_path, valid=0.34)
    assert [path.parent.name for path in made] == ["k04", "k08"]
    short, long = (load_jump_checkpoint(path)[0] for path in made)
    for one, other in zip(short.network.parameters(), long.network.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)  # but for a rate of 1e-9
    assert long.interval == 2 * short.interval
    assert not torch.equal(long.reference.dx[6], short.reference.dx[6])


def test_amp_and_temperature_train(data: Path, tmp_path: Path) -> None:
    best = trainer(data, tmp_path, epochs=1, amp=True, model={"use_temperature": True, "predict_delta": True}).run()
    assert np.isfinite(best["x_rmse"])


@pytest.mark.parametrize("arch", ["painn", "torchmdnet_et"])
def test_a_trained_jump_is_exported_and_runs(data: Path, tmp_path: Path, arch: str) -> None:
    if arch == "torchmdnet_et":
        require_torchmdnet()
    trainer(data, tmp_path, epochs=1, model={"arch": arch, "num_heads": 4}).run()
    made = export_jump(tmp_path / "best", tmp_path / "jump.pt")
    assert isinstance(made, LearnedJump)
    _, x, v = phase_point(constrained=True)
    atoms = Atoms(NUMBERS, x, masses=MASSES)
    atoms.set_velocities(v / units.fs)
    atoms.calc = MLFFCalculator(students.artifact(tmp_path), outside="ignore")
    run = KStepDynamics(atoms, DT * units.fs, tmp_path / "jump.pt", variant="A2", steps=4, constraints="hbonds")
    run.run(2)
    assert run.meter.by_purpose["dynamics"] == 4


def test_a_bound_that_the_data_exceed_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_disp_nm 0\.0001: atoms of the data move 0\.0\d+ nm"):
        trainer(data, tmp_path, model={"max_disp_nm": 1e-4, "predict_delta": True})


def test_missing_forces_and_bad_curricula_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz", "a")
    with np.load(path) as run:
        arrays = {name: run[name] for name in run.files if name != "forces"}
    np.savez(path, **arrays)
    make_pairs([path], 4, tmp_path)
    pairs = load_pairs(tmp_path / "dataset_k4.npz")
    parts = split_pairs(pairs, tmp_path / "splits.json", by="segment")
    model = JumpModelConfig(**(MODEL | {"use_force_head": True}))
    with pytest.raises(ConfigError, match="use_force_head: the trajectories have no forces"):
        JumpTrainer(pairs, parts["train"], parts["valid"], model, JumpTrainConfig(), tmp_path / "run")
    with pytest.raises(ValueError, match="each larger than the one before"):
        JumpTrainConfig(k_steps=[8, 4])


def test_the_commands_make_pairs_and_jumps(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(MODEL))
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(TRAIN | {"k_steps": 8, "epochs": 1}))
    run = CliRunner()
    data, out = str(tmp_path / "data"), str(tmp_path / "out")
    for _ in range(2):  # the second time it finds what is there
        found = run.invoke(commands.dataset, [str(runs[0].parent), "-k", "8", "-o", data], catch_exceptions=False)
        assert found.exit_code == 0
        assert "dataset_k8.npz: 270 pairs of alpha, beta, gamma" in found.output
    files = ["--model", str(tmp_path / "model.yaml"), "--train", str(tmp_path / "train.yaml")]
    found = run.invoke(commands.train, [data, *files, "-o", out], catch_exceptions=False)
    assert "export it with mlff-export" in found.output
    assert (tmp_path / "out" / "k08" / "best" / "config.yaml").exists()
    (tmp_path / "train.yaml").write_text("learning_rate: 1")
    with pytest.raises(ConfigError, match="unknown key 'learning_rate'"):
        run.invoke(commands.train, [data, *files, "-o", out], catch_exceptions=False)
    with pytest.raises(DataError, match="no trajectories"):
        run.invoke(commands.dataset, [out, "-o", data], catch_exceptions=False)
