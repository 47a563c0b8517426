"""The jump with the equivariant transformer of TorchMD-Net: what PaiNN's tests in test_jump.py do not ask."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kstep_jumps import ETHANOL, SETTINGS, TERMS, checkpoint, require_torchmdnet
from mlff_engines.config import parse
from mlff_engines.errors import ConfigError, MissingEngineError
from mlff_engines.export import export_any
from mlff_engines.kstep.learned import LearnedJump
from mlff_engines.manifest import inspect
from mlff_engines.models.jump import JumpConfig, JumpModel, TorchMDNetJump, normalised
from mlff_engines.neighbors import VerletList
from mlff_training.kstep.config import JumpModelConfig
from requirements import require_compiler

ARCH = {"arch": "torchmdnet_et_jump", "heads": 4}


def config(**settings: object) -> JumpConfig:
    return parse(JumpConfig, SETTINGS | ARCH | settings, "test")


def test_model_yaml_names_it() -> None:
    network = JumpModelConfig(arch="torchmdnet_et", hidden_channels=32, num_heads=4).network()
    assert (network.arch, network.heads, network.features) == ("torchmdnet_et_jump", 4, 32)
    assert JumpModelConfig().network().arch == "painn_jump"


def test_without_the_package_the_error_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmdnet.models.torchmd_et", None)  # as where it is not installed
    match = r"arch torchmdnet_et needs TorchMD-Net .*: pip install torchmd-net, or choose arch painn"
    with pytest.raises(MissingEngineError, match=match):
        JumpModel(config(), TERMS)
    file = checkpoint(tmp_path / "best") / "config.yaml"
    file.write_text(file.read_text().replace("painn_jump", "torchmdnet_et_jump"))
    with pytest.raises(MissingEngineError, match=match):
        export_any([tmp_path / "best"], tmp_path / "jump.pt")
    assert not (tmp_path / "jump.pt").exists()


def test_heads_that_do_not_divide_the_features_are_refused() -> None:
    with pytest.raises(ConfigError, match="8 features do not divide by 3 attention heads"):
        JumpModel(config(heads=3), TERMS)


def test_the_interactions_are_those_of_the_whole_package() -> None:
    """Atoms at rest: what TorchMD-Net makes of positions with these weights, its own neighbour list included."""
    require_torchmdnet()
    torch.manual_seed(0)
    network = JumpModel(config(), TERMS).network.double().eval()
    assert isinstance(network, TorchMDNetJump)
    theirs = importlib.import_module("torchmdnet.models.torchmd_et").TorchMD_ET(
        hidden_channels=8, num_layers=2, num_rbf=20, num_heads=4, cutoff_upper=4.0, max_z=119, vector_cutoff=True
    )
    theirs.double().eval()
    ours = {name: tensor for name, tensor in network.state_dict().items() if name in theirs.state_dict()}
    assert set(theirs.state_dict()) - set(ours) == {"distance.box"}
    theirs.load_state_dict(ours, strict=False)
    numbers = torch.from_numpy(ETHANOL.numbers)
    q, mu, *_ = theirs(numbers, torch.from_numpy(ETHANOL.positions), torch.zeros_like(numbers))
    index, vectors = VerletList(4.0, 0.0).update(ETHANOL)
    graph = {"numbers": numbers, "edge_index": torch.from_numpy(index), "edge_vec": torch.from_numpy(vectors)}
    found = network._interact(network.embedding(numbers), torch.zeros_like(mu), graph)
    torch.testing.assert_close(found[0], q, atol=1e-12, rtol=0)
    torch.testing.assert_close(found[1], normalised(mu), atol=1e-12, rtol=0)
    assert float(mu.detach().abs().max()) > 0.01


def test_the_artifact_needs_no_torchmdnet(tmp_path: Path) -> None:
    require_torchmdnet()
    made = export_any([checkpoint(tmp_path / "best", **ARCH)], tmp_path / "jump.pt", dtype="float64")
    assert inspect(tmp_path / "jump.pt").layers == 3  # the neighbours are embedded before the two layers
    v = np.random.default_rng(0).normal(0, 0.01, (9, 3))
    np.save(tmp_path / "dx.npy", made(ETHANOL, v).dx)
    code = f"""
import sys; sys.modules["torchmdnet"] = None
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import numpy as np
from kstep_jumps import ETHANOL
from mlff_engines.kstep.learned import LearnedJump
found = LearnedJump.load({str(tmp_path / "jump.pt")!r})(ETHANOL, np.random.default_rng(0).normal(0, 0.01, (9, 3)))
np.testing.assert_allclose(found.dx, np.load({str(tmp_path / "dx.npy")!r}), atol=1e-12)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_torch_can_compile_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_torchmdnet()
    require_compiler()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = export_any([checkpoint(tmp_path / "best", **ARCH)], tmp_path / "jump.pt", dtype="float64")
    compiled = LearnedJump.load(tmp_path / "jump.pt", kernel="compiled")
    v = np.random.default_rng(0).normal(0, 0.01, (9, 3))
    np.testing.assert_allclose(compiled(ETHANOL, v).dx, made(ETHANOL, v).dx, atol=1e-12)
