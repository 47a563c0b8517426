"""From labelled frames to a checkpoint: data, split, references, domain and the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

import tiny
from mlff_engines.checkpoint import load_checkpoint
from mlff_engines.cli import main
from mlff_engines.config import load_yaml
from mlff_engines.errors import ConfigError, DataError
from mlff_engines.potential import edge_forces
from mlff_training.data.dataset import GraphDataset, statistics, to_graph
from mlff_training.data.labels import DataWarning
from mlff_training.data.xyz import write_xyz
from mlff_training.loop import TrainConfig
from mlff_training.student import DataConfig, StudentConfig, domain_of, load_data, some_structures, train_student

QUICK = TrainConfig(epochs=2, batch_size=4, tensorboard=False, warmup_steps=2)


def stated(frames: list[Atoms], **info: Any) -> list[Atoms]:
    for i, atoms in enumerate(frames):
        atoms.info |= {"charge": 0.0, "multiplicity": 1, "level": "EMT", "group": f"g{i}", **info}
    return frames


@pytest.fixture
def frames() -> list[Atoms]:
    return stated(tiny.clusters(20))


@pytest.fixture
def source(frames: list[Atoms], tmp_path: Path) -> Path:
    write_xyz(tmp_path / "all.xyz", frames)
    return tmp_path / "all.xyz"


def test_domain(frames: list[Atoms]) -> None:
    frames = frames[:2]
    frames[0].set_positions([[0, 0, 0], [1.9, 0, 0], [0, 2.4, 0], [0, 0, 2.7]])
    frames[1].set_positions([[0, 0, 0], [2.2, 0, 0], [0, 2.8, 0], [0, 0, 2.9]])
    frames[1].info |= {"charge": -1.0, "multiplicity": 2}
    domain = domain_of(frames, statistics(frames))
    assert domain.elements == ["Cu", "Au"]
    assert domain.min_distances["Au-Cu"] == 1.9
    assert domain.min_distances["Cu-Cu"] == pytest.approx(np.hypot(1.9, 2.4), abs=1e-4)
    assert set(domain.min_distances) == {"Au-Cu", "Cu-Cu"}  # only one gold atom
    assert (domain.charges, domain.spins) == ([-1.0, 0.0], [0.0, 1.0])


def test_checkpoint_says_what_it_is_made_of(frames: list[Atoms], tmp_path: Path) -> None:
    parts = {"train": frames[:16], "valid": frames[16:], "test": []}
    best = train_student(parts, tiny.E0, tiny.MODEL, QUICK, tmp_path, teacher="emt")
    potential, config = load_checkpoint(tmp_path / "best")
    assert config.domain == domain_of(parts["train"], statistics(parts["train"]))
    assert config.training["teacher"] == "emt"
    assert config.training["frames"] == {"train": 16, "valid": 4, "test": 0}
    assert {"valid": config.training["valid"]} == best
    assert config.training["train"]["epochs"] == 2
    assert len(config.training["data_sha256"]["train"]) == 64
    e0 = potential.model.reference.e0  # type: ignore[union-attr]
    assert (float(e0[29]), float(e0[79])) == (3.0, 3.5)
    # weights start from the seed of the configuration alone
    again = train_student(parts, tiny.E0, tiny.MODEL, QUICK, tmp_path / "again")
    other = train_student(parts, tiny.E0, tiny.MODEL, QUICK.model_copy(update={"seed": 1}), tmp_path / "other")
    assert again == best
    assert other != best


def test_structures_kept_are_the_smallest_and_others(frames: list[Atoms]) -> None:
    small = stated(tiny.clusters(1, seed=3, size=2), charge=1.0, multiplicity=2)
    kept = some_structures([*frames, *small])
    assert [len(structure.numbers) for structure in kept] == [2, 4]
    assert (kept[0].charge, kept[0].spin) == (1.0, 1.0)
    assert len(some_structures(small)) == 1


@pytest.mark.parametrize(
    ("name", "info"), [("charge", {"charge": 1.0}), ("spin", {"multiplicity": 3})], ids=["charge", "spin"]
)
def test_charge_or_spin_that_varies_must_be_an_input(
    name: str, info: dict[str, float], frames: list[Atoms], tmp_path: Path
) -> None:
    for atoms in frames[::2]:
        atoms.info |= info
    parts = {"train": frames[:16], "valid": frames[16:]}
    with pytest.raises(ConfigError, match=rf"several values of {name} .* set model\.{name}: true"):
        train_student(parts, tiny.E0, tiny.MODEL, QUICK, tmp_path)
    assert list(tmp_path.iterdir()) == []
    train_student(parts, tiny.E0, {**tiny.MODEL, name: True}, QUICK, tmp_path)


@pytest.mark.fault("T6")
def test_duplicates_across_the_parts_are_refused(frames: list[Atoms], tmp_path: Path) -> None:
    turned = frames[3].copy()
    turned.rotate(40, "z")
    turned.calc = SinglePointCalculator(turned, **frames[3].calc.results)
    with pytest.raises(DataError, match="valid"):
        train_student({"train": frames[:16], "valid": [turned]}, tiny.E0, tiny.MODEL, QUICK, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_errors_of_the_test_set(frames: list[Atoms], tmp_path: Path) -> None:
    """Those of the checkpoint that is kept, on frames that neither training nor the choice of the best has seen."""
    parts = {"train": frames[:12], "valid": frames[12:15], "test": frames[15:]}
    found = train_student(parts, tiny.E0, tiny.MODEL, QUICK, tmp_path)
    assert json.loads((tmp_path / "errors.json").read_text()) == found
    potential, _ = load_checkpoint(tmp_path / "best")
    dataset = GraphDataset(parts["test"], 4.0)
    deviations = []
    for i, atoms in enumerate(parts["test"]):
        graph = to_graph(dataset[i])
        forces = edge_forces(graph["edge_index"], potential(graph)["edge_gradient"], len(atoms)).detach().numpy()
        deviations.append(np.abs(forces - atoms.calc.results["forces"]).mean())
    assert found["test"]["forces_mae"] == pytest.approx(np.mean(deviations), rel=1e-4)
    assert set(found["test"]) == set(found["valid"])


def names(parts: dict[str, list[Atoms]]) -> dict[str, list[str]]:
    return {name: [atoms.info["group"] for atoms in frames] for name, frames in parts.items()}


def test_split_is_kept_and_used_again(source: Path, tmp_path: Path) -> None:
    config = DataConfig(train=[source], valid=0.2, test=3)
    first = names(load_data(config, tmp_path / "run"))
    assert {name: len(frames) for name, frames in first.items()} == {"train": 13, "valid": 4, "test": 3}
    assert len({group for part in first.values() for group in part}) == 20
    kept = json.loads((tmp_path / "run" / "split.json").read_text())["splits"]
    assert {name: [f"g{i}" for i in chosen] for name, chosen in kept.items()} == first
    other = config.model_copy(update={"split_seed": 1})
    assert names(load_data(other, tmp_path / "other")) != first
    assert names(load_data(other, tmp_path / "run")) == first  # what was made first stays
    write_xyz(source, stated(tiny.clusters(20, seed=5)))
    with pytest.raises(DataError, match=r"split\.json was made for other data"):
        load_data(config, tmp_path / "run")


def test_parts_in_files_of_their_own(source: Path, frames: list[Atoms], tmp_path: Path) -> None:
    write_xyz(tmp_path / "valid.xyz", frames[:2])
    parts = load_data(DataConfig(train=[source], valid=[tmp_path / "valid.xyz"], train_size=5), tmp_path / "run")
    assert names(parts) == {"train": [f"g{i}" for i in range(5)], "valid": ["g0", "g1"], "test": []}
    assert not (tmp_path / "run").exists()


def test_real_data(data_dir: Path, tmp_path: Path) -> None:
    """A slice of rMD17 ethanol, PBE labels in kcal/mol, by the same route."""
    source = data_dir / "rmd17_ethanol" / "rmd17_ethanol_train_01.npz"
    parts = load_data(DataConfig(train=[source], train_size=20, valid=5, test=10, split_by="frame"), tmp_path)
    best = train_student(parts, "fit", {**tiny.MODEL, "cutoff": 5.0}, QUICK, tmp_path)
    assert best["test"]["forces_mae"] == pytest.approx(best["valid"]["forces_mae"], rel=0.5)
    _, config = load_checkpoint(tmp_path / "best")
    assert config.domain.elements == ["H", "C", "O"]
    assert 0.8 < config.domain.min_distances["H-O"] < 1.0


@pytest.fixture
def config_file(source: Path, tmp_path: Path) -> Callable[..., Path]:
    def write(**sections: Any) -> Path:
        content = {
            "data": {"train": [str(source)], "valid": 4},
            "e0": tiny.E0,
            "model": tiny.MODEL,
            "train": {"epochs": 1, "batch_size": 4, "tensorboard": False},
            **sections,
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
        return tmp_path / "config.yaml"

    return write


def test_command(config_file: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    main(["train", str(config_file()), "-o", str(tmp_path / "run")])
    out = capfd.readouterr().out
    assert f"best checkpoint: {tmp_path / 'run' / 'best'}" in out
    rows = tiny.rows(tmp_path / "run")
    assert f"valid: forces MAE {1e3 * rows[0]['valid_forces_mae']:.2f}" in out


@pytest.mark.fault("M4")
@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"trian": {}}, "unknown key 'trian'; did you mean 'train'?"),
        ({"train": {"epoch": 1}}, "unknown key 'train.epoch'; did you mean 'epochs'?"),
        ({"train": {"loss": {"force": 1}}}, "unknown key 'train.loss.force'; did you mean 'forces'?"),
        ({"train": {"epochs": "many"}}, "train.epochs = 'many'"),
        ({"model": {"feature": 8}}, "unknown key 'feature'; did you mean 'features'?"),
        ({"model": {"arch": "pain"}}, "unknown architecture 'pain'; did you mean 'painn'?"),
        ({"data": {"valid": 0.1}}, "missing key 'data.train'"),
        ({"data": {"train": []}}, "data.train = []"),
    ],
)
def test_configuration_errors(
    sections: dict[str, Any],
    message: str,
    config_file: Callable[..., Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", str(config_file(**sections)), "-o", str(tmp_path / "run")])
    assert caught.value.code == 1
    assert message in capfd.readouterr().err
    assert not (tmp_path / "run" / "best").exists()
    assert not (tmp_path / "run" / "log.csv").exists()


def test_every_field_has_a_type_that_loads(config_file: Callable[..., Path]) -> None:
    config = load_yaml(StudentConfig, config_file())
    assert StudentConfig.model_validate(json.loads(config.model_dump_json())) == config


def test_a_label_that_only_some_frames_have(frames: list[Atoms], tmp_path: Path) -> None:
    del frames[0].calc.results["energies"]
    config = TrainConfig.model_validate({**QUICK.model_dump(), "loss": {"energies": 1.0}})
    with (
        pytest.warns(DataWarning, match="energies is left out"),
        pytest.raises(DataError, match=r"train\.loss\.energies is 1 but not every training frame has the label"),
    ):
        train_student({"train": frames[:16], "valid": frames[16:]}, tiny.E0, tiny.MODEL, config, tmp_path)
