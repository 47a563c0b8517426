"""Checkpoints: what is saved is what is loaded, and nothing else is taken for one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from mlff_engines.checkpoint import (
    CheckpointConfig,
    Domain,
    StructureRecord,
    load_checkpoint,
    save_checkpoint,
    set_dtype,
)
from mlff_engines.errors import ArtifactError, ConfigError
from mlff_engines.models.registry import build_model, model_config
from mlff_engines.structure import Structure
from mlff_engines.validation.result import Claims
from mlff_engines.validation.static.systems import crystal
from students import E0, checkpoint


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))


def test_round_trip(tmp_path: Path) -> None:
    config = model_config({"features": 8, "interactions": 1, "basis": "gaussian"})
    model = build_model(config, list(E0), E0, scale=2.5, shift=-0.1).eval()
    domain = Domain(elements=list(E0), min_distances={"C-H": 1.01}, charges=[0.0, 1.0])
    structure = crystal(Claims(list(E0), 4.0, E0))
    save_checkpoint(tmp_path, model, config, domain, {"teacher": "emt", "epochs": 3}, [structure])
    potential, loaded = load_checkpoint(tmp_path)
    assert not potential.training
    assert loaded.domain == domain
    assert loaded.training == {"teacher": "emt", "epochs": 3}
    assert model_config(loaded.model) == config
    for name, tensor in model.state_dict().items():
        found = potential.model.state_dict()[name]
        assert found.dtype == tensor.dtype
        assert torch.equal(found.nan_to_num(), tensor.nan_to_num()), name
    [found_structure] = [record.structure for record in loaded.structures]
    for field in ("numbers", "positions", "cell", "pbc"):
        assert (getattr(found_structure, field) == getattr(structure, field)).all()


def test_float64_weights_keep_their_digits(tmp_path: Path) -> None:
    config = model_config({"features": 8, "interactions": 1})
    model = build_model(config, list(E0), E0)
    model.network.double()
    with torch.no_grad():
        model.network.filter_net.bias.fill_(1 / 3)
    save_checkpoint(tmp_path, model, config, Domain(elements=list(E0)), {})
    bias = load_checkpoint(tmp_path)[0].model.network.filter_net.bias
    assert bias.dtype == torch.float64
    assert float(bias[0].detach()) == 1 / 3


def test_no_atoms_survive_the_record() -> None:
    nothing = Structure(np.zeros(0, dtype=np.int64), np.zeros((0, 3)))
    assert len(StructureRecord.of(nothing).structure) == 0


def test_saving_anew_leaves_one_set_of_weights(tmp_path: Path) -> None:
    checkpoint(tmp_path, seed=0)
    first = load_checkpoint(tmp_path)[1].weights
    checkpoint(tmp_path, seed=1)
    second = load_checkpoint(tmp_path)[1].weights
    assert first != second
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", second]


def test_failed_save_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path, seed=0)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mlff_engines.checkpoint.yaml.safe_dump", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint(tmp_path, seed=1)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.items() <= after.items()
    load_checkpoint(tmp_path)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(
        ArtifactError, match=r"absent does not exist; expected a checkpoint folder such as runs/NAME/best"
    ):
        load_checkpoint(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match=r"empty has no config\.yaml"):
        load_checkpoint(tmp_path / "empty")
    (tmp_path / "file.pt").touch()
    with pytest.raises(ArtifactError, match=r"file\.pt is a file"):
        load_checkpoint(tmp_path / "file.pt")


@pytest.mark.fault("A3")
def test_altered_weights(tmp_path: Path) -> None:
    weights = checkpoint(tmp_path) / load_checkpoint(tmp_path)[1].weights
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ArtifactError, match="its SHA-256 differs"):
        load_checkpoint(tmp_path)
    weights.unlink()
    with pytest.raises(ArtifactError, match="cannot read the weights"):
        load_checkpoint(tmp_path)


@pytest.mark.fault("A5")
def test_newer_schema(tmp_path: Path) -> None:
    edit(checkpoint(tmp_path), schema_version=99)
    with pytest.raises(ArtifactError, match="schema version 99; this mlff-engines reads up to 1: upgrade"):
        load_checkpoint(tmp_path)


def test_weights_of_another_model(tmp_path: Path) -> None:
    model = load_checkpoint(checkpoint(tmp_path))[1].model
    edit(tmp_path, model=model | {"features": 32})
    with pytest.raises(ArtifactError, match="does not fit the model"):
        load_checkpoint(tmp_path)


def test_unknown_key_is_explained(tmp_path: Path) -> None:
    edit(checkpoint(tmp_path), domains={})
    with pytest.raises(ConfigError, match="unknown key 'domains'; did you mean 'domain'"):
        load_checkpoint(tmp_path)


def test_config_names_every_field() -> None:
    assert all(
        field.description
        for name, field in CheckpointConfig.model_fields.items()
        if name not in {"schema_version", "domain"}
    )


@pytest.mark.fault("A9")
def test_weights_too_large_for_float32(tmp_path: Path) -> None:
    potential, _ = load_checkpoint(checkpoint(tmp_path))
    set_dtype(potential, torch.float64)
    with torch.no_grad():
        potential.model.network.readout[2].bias.fill_(1e39)
    with pytest.raises(ArtifactError, match=r"readout\.2\.bias is not finite in torch\.float32: export in float64"):
        set_dtype(potential, torch.float32)
