"""The jump network: equivariant, momentum conserving, bounded; its artifact says what it is tied to."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import students
from kstep_jumps import ETHANOL, SETTINGS, TERMS, M, checkpoint, require_torchmdnet
from mlff_engines import artifact
from mlff_engines.checkpoint import load_checkpoint, load_jump_checkpoint
from mlff_engines.config import parse
from mlff_engines.errors import ArtifactError, ConfigError, StructureError
from mlff_engines.export import export_any
from mlff_engines.kstep.learned import LearnedJump, export_jump
from mlff_engines.manifest import Dtype, inspect
from mlff_engines.models.jump import JumpConfig, JumpModel, JumpTerms
from mlff_engines.neighbors import VerletList
from mlff_engines.structure import FloatArray, Structure

V = np.random.default_rng(0).normal(0, 0.01, (9, 3))


def jump(seed: int = 0, skin: float = 1.0, terms: JumpTerms = TERMS, **settings: object) -> LearnedJump:
    config = parse(JumpConfig, SETTINGS | settings, "test")
    torch.manual_seed(seed)
    model = JumpModel(config, terms).double().eval()
    return LearnedJump(model, terms, config.cutoff, takes_temperature=config.temperature, skin=skin)


@pytest.fixture(params=["painn_jump", "torchmdnet_et_jump"])
def arch(request: pytest.FixtureRequest) -> dict[str, object]:
    if request.param == "torchmdnet_et_jump":
        require_torchmdnet()
    return {"arch": request.param, "heads": 4}


def rotation(seed: int) -> FloatArray:
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((3, 3)))
    return q


def moved(structure: Structure, positions: FloatArray) -> Structure:
    return Structure(structure.numbers, positions, structure.cell, structure.pbc)


@pytest.mark.parametrize("settings", [{}, {"from_flight": True, "temperature": True, "forces": True}])
def test_equivariant_under_rotations_reflections_translations_and_permutations(
    arch: dict[str, object], settings: dict[str, object]
) -> None:
    model = jump(**arch, **settings)
    plain = model.evaluate(ETHANOL, V, 300.0)
    turn = rotation(3)
    turned = model.evaluate(moved(ETHANOL, ETHANOL.positions @ turn + 2.0), V @ turn, 300.0)
    order = np.random.default_rng(0).permutation(9)
    permuted = model.evaluate(Structure(ETHANOL.numbers[order], ETHANOL.positions[order]), V[order], 300.0)
    for name in ("dx", "dv", *(["forces"] if "forces" in settings else [])):
        np.testing.assert_allclose(turned[name], plain[name].numpy() @ turn, atol=1e-12)
        np.testing.assert_allclose(permuted[name], plain[name].numpy()[order], atol=1e-12)
    assert float(plain["dx"].abs().max()) > 1e-3


@pytest.mark.parametrize("from_flight", [False, True])
def test_momentum_is_conserved_and_the_centre_of_mass_flies(from_flight: bool) -> None:
    drift = np.array([0.003, -0.002, 0.001])
    model = jump(from_flight=from_flight)
    found, faster = model(ETHANOL, V), model(ETHANOL, V + drift)
    np.testing.assert_allclose(M @ found.dv, 0, atol=1e-12)
    np.testing.assert_allclose(M @ found.dx / M.sum(), M @ V / M.sum() * 8.0, atol=1e-12)
    np.testing.assert_allclose(faster.dx, found.dx + 8.0 * drift, atol=1e-10)  # Galilean
    np.testing.assert_allclose(faster.dv, found.dv, atol=1e-10)


def test_the_bound_shortens_vectors_without_turning_them_and_is_counted() -> None:
    free, tight = jump(bounded=False), jump(max_displacement=1e-3)
    raw = free.evaluate(ETHANOL, V)
    bound = tight.evaluate(ETHANOL, V)
    before, after = ((out["dx"] + out["drift_x"]).numpy() - M @ V / M.sum() * 8.0 for out in (raw, bound))
    assert np.linalg.norm(after, axis=1).max() < 1e-3
    cosine = (before * after).sum(1) / np.linalg.norm(before, axis=1) / np.linalg.norm(after, axis=1)
    np.testing.assert_allclose(cosine, 1, atol=1e-12)
    np.testing.assert_array_equal(bound["clamped"].numpy(), np.linalg.norm(before, axis=1) > 1e-3)
    assert tight(ETHANOL, V).clamped == int(bound["clamped"].sum()) > 0
    assert free(ETHANOL, V).clamped == 0


def test_inputs_matter() -> None:
    model = jump(temperature=True)
    plain = model(ETHANOL, V, 300.0).dx
    assert np.abs(model(ETHANOL, V, 320.0).dx - plain).max() > 1e-6
    assert np.abs(model(ETHANOL, 1.1 * V, 300.0).dx - plain).max() > 1e-6
    with pytest.raises(ConfigError, match=r"takes the temperature; it was trained at \[300\.0\] K"):
        model(ETHANOL, V)


def test_edges_beyond_the_cutoff_count_nothing(arch: dict[str, object]) -> None:
    found, model = [], jump(**arch, cutoff=2.0)
    with torch.no_grad():
        for weights in model.module.parameters():  # biases, too, that are zero before training
            weights.add_(0.1 * torch.randn_like(weights))
    for reach in (2.0, 3.5):
        model.neighbors = VerletList(reach, 0.0)
        found.append((model.neighbors.update(ETHANOL)[0].shape[1], model(ETHANOL, V)))
    (few, tight), (many, loose) = found
    assert few < many
    np.testing.assert_allclose(loose.dx, tight.dx, atol=1e-12)
    np.testing.assert_allclose(loose.dv, tight.dv, atol=1e-12)


def test_batched_structures_do_not_see_each_other(arch: dict[str, object]) -> None:
    model = jump(**arch)
    index, vectors = model.neighbors.update(ETHANOL)
    count = len(ETHANOL)
    graph = {
        "numbers": torch.from_numpy(np.tile(ETHANOL.numbers, 2)),
        "edge_index": torch.from_numpy(np.concatenate([index, index + count], axis=1)),
        "edge_vec": torch.from_numpy(np.concatenate([vectors, vectors])),
        "batch": torch.arange(2).repeat_interleave(count),
        "velocities": torch.from_numpy(np.concatenate([V, -2 * V])),
        "temperature": torch.full((2,), 300.0, dtype=torch.float64),
    }
    out = model.module(graph)
    np.testing.assert_allclose(out["dx"][:count].detach(), model(ETHANOL, V).dx, atol=1e-12)
    np.testing.assert_allclose(out["dx"][count:].detach(), model(ETHANOL, -2 * V).dx, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_export_reproduces_the_eager_model_and_states_its_terms(
    tmp_path: Path, dtype: Dtype, arch: dict[str, object]
) -> None:
    folder = checkpoint(tmp_path / "best", temperature=True, forces=True, **arch)
    made = export_jump(folder, tmp_path / "jump.pt", dtype=dtype)
    manifest = inspect(tmp_path / "jump.pt")
    assert (manifest.kind, manifest.jump, manifest.outputs[-1]) == ("jump", TERMS, "forces")
    eager = LearnedJump(load_jump_checkpoint(folder)[0].double(), TERMS, 4.0, takes_temperature=True)
    loaded = LearnedJump.load(tmp_path / "jump.pt", dtype="float64")
    found, expected = (model(ETHANOL, V, 300.0) for model in (loaded, eager))
    np.testing.assert_allclose(found.dx, expected.dx, atol=1e-12)
    assert set(made.verify()) == {"structure 0", "chain"}
    np.testing.assert_allclose(M @ made(ETHANOL, V, 300.0).dv, 0, atol=1e-12)  # in float32 too
    with pytest.raises(ArtifactError, match="exists"):
        export_jump(folder, tmp_path / "jump.pt")


def test_one_command_exports_potentials_and_jumps(tmp_path: Path) -> None:
    folder, potential = checkpoint(tmp_path / "jump"), students.checkpoint(tmp_path / "potential")
    assert isinstance(export_any([folder], tmp_path / "jump.pt"), LearnedJump)
    assert isinstance(export_any([potential], tmp_path / "student.pt"), artifact.Artifact)
    for checkpoints, more in (([folder, folder], {}), ([folder], {"kernel": "fused"})):
        with pytest.raises(ArtifactError, match="is a jump: it is exported alone"):
            export_any(checkpoints, tmp_path / "other.pt", **more)


def test_golden_vectors_notice_other_weights(tmp_path: Path) -> None:
    export_jump(checkpoint(tmp_path / "best"), tmp_path / "jump.pt", dtype="float64")
    loaded = LearnedJump.load(tmp_path / "jump.pt")
    with torch.no_grad():
        next(loaded.module.parameters()).mul_(1.001)
    with pytest.raises(ArtifactError, match=r"golden vector 'structure 0': d[xv] off by"):
        loaded.verify()


def test_kinds_are_not_mixed_up(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "best")
    export_jump(folder, tmp_path / "jump.pt")
    potential = students.artifact(tmp_path)
    with pytest.raises(ArtifactError, match=r"is a jump, not a potential: mlff_ase\.KStepDynamics runs it"):
        artifact.load(tmp_path / "jump.pt")
    with pytest.raises(ArtifactError, match="is a potential, not a jump"):
        LearnedJump.load(potential)
    with pytest.raises(ArtifactError, match="holds a jump of 4 steps"):
        load_checkpoint(folder)
    with pytest.raises(ArtifactError, match="holds a potential"):
        load_jump_checkpoint(tmp_path / "member-0")
    with zipfile.ZipFile(potential) as archive:  # what older versions have to read
        name = next(n for n in archive.namelist() if n.endswith("mlff.json"))
        assert "jump" not in json.loads(archive.read(name))
    assert "jump" not in (tmp_path / "member-0" / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"masses": np.where(ETHANOL.numbers == 1, 3.024, M)}, r"masses: 3\.024 amu on atom 3 \(H\).*1\.008 \(6 such"),
        ({"timestep": 1.0}, r"time step: 1 fs, trained with 2 fs"),
        ({"steps": 8}, r"steps per jump: 8, trained with 4"),
        ({"constraints": "none"}, r"constraints: none, trained with hbonds"),
    ],
)
@pytest.mark.fault("J6")
def test_other_runs_are_refused(change: dict[str, object], match: str) -> None:
    run = {"numbers": ETHANOL.numbers, "masses": M, "timestep": 2.0, "steps": 4, "constraints": "hbonds"}
    jump().require(**run)
    with pytest.raises(ConfigError, match=match):
        jump().require(**(run | change))


def test_unknown_elements_and_bad_terms_are_refused() -> None:
    with pytest.raises(StructureError, match=r"does not know N; it was trained for H, C, O"):
        jump()(Structure(np.array([7]), np.zeros((1, 3))), np.zeros((1, 3)))
    with pytest.raises(ConfigError, match="masses of elements in amu above 0"):
        parse(JumpTerms, {"steps": 4, "timestep": 2.0, "masses": {"H": -1.0}, "temperatures": [300]}, "terms")
