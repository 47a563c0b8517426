"""From checkpoints to an artifact: what is written, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from broken_engines import ORGANIC
from mlff_engines import artifact
from mlff_engines.artifact import load
from mlff_engines.checkpoint import Domain, load_checkpoint, save_checkpoint
from mlff_engines.errors import ArtifactError
from mlff_engines.export import export, synthetic
from mlff_engines.manifest import DTYPES, inspect
from mlff_engines.models.registry import build_model, model_config
from mlff_engines.validation.static.parity import reference
from mlff_engines.validation.static.systems import cluster, crystal
from students import E0, checkpoint


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("members", [1, 3])
def test_export(tmp_path: Path, dtype: Any, members: int) -> None:
    folders = [checkpoint(tmp_path / str(seed), seed) for seed in range(members)]
    made = export(folders, tmp_path / "student.pt", dtype=dtype, structures=[crystal(ORGANIC)])
    assert made.manifest == inspect(tmp_path / "student.pt")
    assert (made.manifest.dtype, made.manifest.members) == (dtype, members)
    assert ("energy_std" in made.manifest.outputs) == (members > 1)
    assert len(made.manifest.weights_sha256) == len(made.manifest.training) == members
    dtypes = {t.dtype for name, t in made.module.named_parameters()}
    assert dtypes == {DTYPES[dtype]}
    assert {g.name for g in made.golden} >= {"structure 0", "triclinic box", "isolated C"}
    found = made.evaluator(outside="ignore")(cluster(ORGANIC))
    potentials = torch.nn.ModuleList(load_checkpoint(folder)[0] for folder in folders)
    expected = reference(potentials, 4.0)(cluster(ORGANIC))
    np.testing.assert_allclose(found.forces, expected.forces, atol=1e-11 if dtype == "float64" else 5e-5)
    assert (found.force_std is None) == (members == 1)


def test_recorded_structures_become_golden_vectors(tmp_path: Path) -> None:
    config = model_config({"features": 8, "interactions": 1, "cutoff": 4.0})
    student = build_model(config, list(E0), E0).eval()
    recorded = [cluster(ORGANIC), crystal(ORGANIC)]
    save_checkpoint(tmp_path / "c", student, config, Domain(elements=list(E0)), {}, recorded)
    made = export([tmp_path / "c"], tmp_path / "student.pt")
    for golden, structure in zip(made.golden, recorded, strict=False):
        assert (golden.structure.positions == structure.positions).all()


def test_memory_per_edge_is_about_right(tmp_path: Path) -> None:
    """It grows as the features do, and does not depend on what else the checkpoint holds."""
    needs = []
    for features, structures in ((32, []), (64, []), (64, [cluster(ORGANIC), crystal(ORGANIC)])):
        folder = checkpoint(tmp_path / str(features), features=features)
        made = export([folder], tmp_path / "student.pt", structures=structures, overwrite=True)
        assert made.manifest.bytes_per_edge is not None
        needs.append(made.manifest.bytes_per_edge)
    assert 1.6 < needs[1] / needs[0] < 2.2
    assert needs[1] == needs[2]
    # two layers of filters and messages of 3 F numbers in float32
    assert 2 * 3 * 64 * 4 < needs[1] < 20 * 2 * 3 * 64 * 4


@pytest.mark.fault("M3")
def test_existing_output_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "student.pt"
    export([checkpoint(tmp_path / "one", 1)], out)
    before = out.read_bytes()
    with pytest.raises(ArtifactError, match=r"student\.pt exists; choose another name or pass --overwrite"):
        export([checkpoint(tmp_path / "two", 2)], out)
    assert out.read_bytes() == before
    export([tmp_path / "two"], out, overwrite=True)
    assert inspect(out).weights_sha256 == [load_checkpoint(tmp_path / "two")[1].sha256]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"cutoff": 5.0}, r"two has cutoff 5\.0 but .*one has 4\.0: the members of an ensemble share cutoff"),
        ({"charge": True}, r"two has charge True but .*one has False"),
    ],
)
def test_members_that_do_not_fit(tmp_path: Path, other: dict[str, Any], message: str) -> None:
    folders = [checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two", 1, **other)]
    with pytest.raises(ArtifactError, match=message):
        export(folders, tmp_path / "student.pt")
    assert not (tmp_path / "student.pt").exists()


def test_members_of_other_elements(tmp_path: Path) -> None:
    config = load_checkpoint(checkpoint(tmp_path / "one"))[1].model
    save_checkpoint(
        tmp_path / "two",
        build_model(model_config(config), ["H", "C"], E0),
        model_config(config),
        Domain(elements=["H", "C"]),
        {},
    )
    with pytest.raises(ArtifactError, match=r"two was trained on elements \['H', 'C'\] but .*\['H', 'C', 'O'\]"):
        export([tmp_path / "one", tmp_path / "two"], tmp_path / "student.pt")


def test_an_ensemble_is_at_home_where_every_member_is(tmp_path: Path) -> None:
    seen = ({"C-H": 1.0, "H-O": 0.9}, {"C-H": 0.95, "H-O": 0.92})
    folders = [
        checkpoint(tmp_path / str(i), i, domain=Domain(elements=list(E0), min_distances=d)) for i, d in enumerate(seen)
    ]
    made = export(folders, tmp_path / "student.pt")
    assert made.manifest.domain.min_distances == {"C-H": 1.0, "H-O": 0.92}


def test_members_may_differ_in_size(tmp_path: Path) -> None:
    folders = [checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two", features=8, interactions=3)]
    made = export(folders, tmp_path / "student.pt", dtype="float64")
    found = made.evaluator(outside="ignore")(crystal(ORGANIC))
    potentials = torch.nn.ModuleList(load_checkpoint(folder)[0] for folder in folders)
    np.testing.assert_allclose(found.forces, reference(potentials, 4.0)(crystal(ORGANIC)).forces, atol=1e-11)
    assert made.manifest.layers == 3  # the longest range of any


@pytest.mark.fault("A11")
@pytest.mark.parametrize("earlier", [False, True])
def test_an_artifact_that_does_not_reproduce_the_model_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: bool
) -> None:
    """And one that it was to replace stays."""
    folder, out = checkpoint(tmp_path / "one"), tmp_path / "student.pt"
    before = export([folder], out).manifest if earlier else None
    script = artifact.script

    def other_weights(potential: Any) -> Any:
        with torch.no_grad():
            potential.model.network.readout[2].weight.mul_(1.001)
        return script(potential)

    monkeypatch.setattr(artifact, "script", other_weights)
    with pytest.raises(ArtifactError, match="golden vector"):
        export([folder], out, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", *(["student.pt"] if earlier else [])]
    if earlier:
        assert inspect(out) == before


def test_unknown_dtype(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="dtype 'float16'; allowed: float32, float64"):
        export([checkpoint(tmp_path / "one")], tmp_path / "student.pt", dtype="float16")  # type: ignore[arg-type]


def test_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="expected a checkpoint folder"):
        export([tmp_path / "absent"], tmp_path / "student.pt")


def test_charged_students(tmp_path: Path) -> None:
    """Golden vectors at a charge that the model knows."""
    folder = checkpoint(tmp_path / "ion", charge=True, domain=Domain(elements=list(E0), charges=[-1.0, 0.0]))
    made = export([folder], tmp_path / "student.pt")
    assert made.manifest.takes_charge
    assert {g.charge for g in made.golden} == {-1.0}


def test_synthetic_structures_hold_every_element() -> None:
    made = synthetic(Domain(elements=["H", "C", "O", "Cu"]))
    assert set(made["triclinic box"].numbers) == {1, 6, 8, 29}
    assert {f"isolated {s}" for s in ("H", "C", "O", "Cu")} < set(made)


def test_load_gives_what_export_gave(tmp_path: Path) -> None:
    made = export([checkpoint(tmp_path / "one")], tmp_path / "student.pt")
    again = load(tmp_path / "student.pt")
    assert again.manifest == made.manifest
    assert again.golden == made.golden
