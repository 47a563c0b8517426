"""SchNetPack's PaiNN becomes ours with the same energies and forces, or is refused; SchNetPack itself is the judge."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlff_engines import cli
from mlff_engines.artifact import load
from mlff_engines.bench.systems import named
from mlff_engines.checkpoint import Domain, load_checkpoint
from mlff_engines.errors import ArtifactError, ConfigError, MissingEngineError
from mlff_engines.evaluator import Evaluator
from mlff_engines.export import export, synthetic
from mlff_engines.foreign import environments, schnetpack
from mlff_engines.foreign.environments import Environment
from mlff_engines.foreign.schnetpack import import_schnetpack, make_untrained
from mlff_engines.manifest import Dtype
from requirements import has_compiler, missing

ELEMENTS = ["H", "C", "O"]
DOMAIN = Domain(elements=ELEMENTS)
UNIT = "eV"  # forces of untrained models are then as large as those of real ones
SMALL = {"features": 16, "interactions": 2}
STRUCTURES = [named("aspirin").structure, named("water-24").structure]


@pytest.fixture(scope="module")
def python() -> Path:
    """The interpreter that has SchNetPack, where an earlier benchmark has installed it: gigabytes."""
    found = environments.at_hand("schnetpack")
    if found is None:
        missing("schnetpack", "SchNetPack is not at hand: mlff bench --peers schnetpack")
    assert found is not None
    return found


Import = Callable[..., float]


@pytest.fixture
def converted(python: Path, tmp_path: Path) -> Import:
    """Import an untrained model of SchNetPack with these options into `tmp_path`/ours."""

    def convert(**options: Any) -> float:
        make_untrained(tmp_path / "best_model", python, **options)
        return import_schnetpack(
            tmp_path / "best_model",
            tmp_path / "ours",
            elements=ELEMENTS,
            unit=UNIT,
            python=python,
            structures=STRUCTURES,
        )

    return convert


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"features": 128, "interactions": 3, "mean": -2.5},
        {**SMALL, "basis": "bessel", "basis_size": 7, "cutoff": 4.3, "shared_filters": True},
        {**SMALL, "interactions": 3, "shared_interactions": True, "seed": 1},
    ],
    ids=["usual", "Bessel, shared filters", "shared interactions"],
)
def test_same_energies_and_forces(converted: Import, tmp_path: Path, options: dict[str, Any]) -> None:
    assert converted(**options) <= 1e-10
    potential, config = load_checkpoint(tmp_path / "ours")
    assert config.model["cutoff"] == float(np.float32(options.get("cutoff", 5.0)))  # SchNetPack's is in float32
    assert config.domain.elements == ELEMENTS
    exact = Evaluator(potential, config.domain, config.model["cutoff"], skin=0.0, dtype=torch.float64)
    tolerances: dict[Dtype, float] = {"float32": 1e-5, "float64": 1e-10}
    for dtype, tolerance in tolerances.items():
        export([tmp_path / "ours"], tmp_path / f"{dtype}.pt", dtype=dtype)
        for kernel in ("torch", "fused") if has_compiler() else ("torch",):
            evaluate = load(tmp_path / f"{dtype}.pt", kernel=kernel).evaluator()
            for structure in STRUCTURES:
                expected = exact(structure)  # SchNetPack's, to 1e-10
                assert np.abs(expected.forces).max() > 0.1
                np.testing.assert_allclose(evaluate(structure).forces, expected.forces, rtol=0, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"activation": "softplus"}, {"epsilon": 1e-2}], ids=lambda options: str(options))
def test_what_differs_is_noticed(converted: Import, tmp_path: Path, options: dict[str, Any]) -> None:
    """Neither is told by the weights: SchNetPack's own results are what tells."""
    with pytest.raises(ArtifactError, match="is not reproduced"):
        converted(**SMALL, **options)
    assert not (tmp_path / "ours").exists()


@pytest.mark.slow
def test_a_wrong_conversion_is_noticed(
    converted: Import, python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Injected bugs: the two halves of a mix, two parts of a message, filters of another layer, a forgotten mean."""
    converted(**SMALL, mean=0.7)
    read = functools.cache(lambda model: schnetpack_read(model, list(synthetic(DOMAIN).values()), python))
    schnetpack_read = schnetpack._read
    monkeypatch.setattr(schnetpack, "_read", lambda model, structures, python: read(model))
    right, features = schnetpack._weights, SMALL["features"]

    def swapped(name: str, step: int) -> Callable[..., schnetpack.State]:
        def wrong(*args: Any) -> schnetpack.State:
            state = right(*args)
            blocks = list(state[name].split(step))
            state[name] = torch.cat([blocks[1], blocks[0], *blocks[2:]])
            return state

        return wrong

    def again() -> None:
        import_schnetpack(tmp_path / "best_model", tmp_path / "again", elements=ELEMENTS, unit=UNIT, python=python)

    again()
    for name, step in (
        ("updates.0.vector_mix.weight", features),
        ("messages.1.message_net.2.weight", features),
        ("updates.1.update_net.2.weight", features),
        ("filter_net.weight", 3 * features),
    ):
        monkeypatch.setattr(schnetpack, "_weights", swapped(name, step))
        with pytest.raises(ArtifactError, match="is not reproduced"):
            again()
    monkeypatch.setattr(schnetpack, "_weights", right)

    offsets = schnetpack._set_offsets

    def forgotten(ours: Any, about: dict[str, Any], *rest: Any) -> None:
        offsets(ours, {**about, "postprocessors": []}, *rest)

    monkeypatch.setattr(schnetpack, "_set_offsets", forgotten)
    with pytest.raises(ArtifactError, match="is not reproduced"):
        again()


@pytest.mark.slow
def test_command(python: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_untrained(tmp_path / "best_model", python, **SMALL)
    options = ["-o", str(tmp_path / "ours"), "--elements", "H, O", "--energy-unit", "kcal/mol"]
    command = ["import", "schnetpack", str(tmp_path / "best_model"), *options]
    cli.main(command)
    assert "forces as SchNetPack's to" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "ours")[1].training["imported"].startswith("SchNetPack 2")
    for arguments, said in (
        (command, "pass --overwrite"),
        ([*command[:2], str(tmp_path / "absent"), *options, "--overwrite"], "no file"),
        ([*command, "--overwrite", "--python", str(tmp_path / "python")], "name a Python that has SchNetPack"),
        ([*command[:-1], "kcal", "--overwrite"], "unknown energy unit 'kcal'; did you mean 'kcal/mol'"),
    ):
        with pytest.raises(SystemExit):
            cli.main(arguments)
        assert said in capsys.readouterr().err
    (tmp_path / "text").write_text("no model")
    with pytest.raises(SystemExit):
        cli.main([*command[:2], str(tmp_path / "text"), *options, "--overwrite"])
    assert "cannot read" in capsys.readouterr().err


def described(**changes: Any) -> tuple[dict[str, Any], schnetpack.State]:
    """What SchNetPack says of a usual model, changed."""
    about: dict[str, Any] = {
        "representation": "PaiNN",
        "basis": "GaussianRBF",
        "cutoff_function": "CosineCutoff",
        "embedding": "Embedding",
        "electronic": 0,
        "inputs": ["PairwiseDistances"],
        "outputs": ["Atomwise", "Forces"],
        "aggregation": ["sum"],
        "postprocessors": [{"type": "CastTo64"}, {"type": "AddOffsets", "is_extensive": True}],
    }
    state = {
        "representation.embedding.weight": torch.zeros(100, 8),
        "representation.radial_basis.widths": torch.ones(5),
        "representation.cutoff_fn.cutoff": torch.tensor([5.0]),
        "output_modules.0.outnet.0.weight": torch.zeros(4, 8),
        "output_modules.0.outnet.1.weight": torch.zeros(1, 4),
    }
    for name, value in changes.items():
        (state if name.replace("__", ".") in state else about)[name.replace("__", ".")] = value
    return about, state


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"representation": "SchNet"}, "representation SchNet"),
        ({"basis": "GaussianRBFCentered"}, "radial basis GaussianRBFCentered"),
        ({"cutoff_function": "MollifierCutoff"}, "cutoff function MollifierCutoff"),
        ({"electronic": 1}, "embeddings of charge or spin"),
        ({"outputs": ["Atomwise", "DipoleMoment", "Forces"]}, "output modules"),
        ({"outputs": ["Atomwise"]}, "output modules"),
        ({"aggregation": ["avg"]}, "aggregation"),
        ({"postprocessors": [{"type": "ScaleProperty"}]}, "postprocessors"),
        ({"postprocessors": [{"type": "AddOffsets", "is_extensive": False}]}, "not extensive"),
        ({"representation__radial_basis__widths": torch.tensor([1.0, 2.0])}, "different widths"),
        ({"output_modules__0__outnet__0__weight": torch.zeros(8, 8)}, "a readout of 2 layers, the first 8 wide"),
    ],
)
def test_what_cannot_be_imported_is_said(changes: dict[str, Any], said: str) -> None:
    assert schnetpack._check(Path("best_model"), *described()) == 5.0
    with pytest.raises(ArtifactError, match=said):
        schnetpack._check(Path("best_model"), *described(**changes))


def test_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert environments.at_hand("mace") is None
    with pytest.raises(ConfigError, match="did you mean 'mace'"):
        environments.folder("mase")
    monkeypatch.setitem(environments.ENVIRONMENTS, "mace", Environment("mace-torch", (str(tmp_path / "absent"),)))
    with pytest.raises(MissingEngineError, match=r"cannot install mace-torch: .*absent"):
        environments.make("mace")
    assert environments.at_hand("mace") is None  # half of one is none
