"""What enters the loss is what finite differences of the model say, for every target."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from torch import Tensor
from torch_geometric.data import Batch

import tiny
from mlff_engines.errors import ConfigError, DataError, TrainingError
from mlff_engines.models.registry import build_model, model_config
from mlff_engines.potential import Potential, edge_forces
from mlff_training import losses
from mlff_training.data.dataset import GraphDataset, labels_of, to_graph
from mlff_training.data.formats import read
from mlff_training.data.labels import DataWarning
from mlff_training.losses import LossConfig, errors, require_labels, total_loss, validate

CUTOFF = 4.0
Array = npt.NDArray[np.float64]


def potential(elements: tuple[str, ...] = ("Cu", "Au")) -> Potential:
    torch.manual_seed(1)
    model = build_model(model_config(tiny.MODEL), elements, dict.fromkeys(elements, -2.0), scale=1.5)
    model.network.double()
    return Potential(model).train()


def unlabelled(atoms: Atoms, hessian_index: int | None = None) -> Atoms:
    """Labels of zero: the errors are then what the model predicts."""
    atoms = atoms.copy()
    zeros = {"energy": 0.0, "forces": np.zeros((len(atoms), 3)), "energies": np.zeros(len(atoms))}
    if atoms.pbc.all():
        zeros["stress"] = np.zeros(6)
    atoms.calc = SinglePointCalculator(atoms, **zeros)
    if hessian_index is not None:
        atoms.arrays["hessian_row"] = np.zeros((len(atoms), 3))
        atoms.info["hessian_index"] = hessian_index
    return atoms


def batch_of(frames: list[Atoms]) -> Batch:
    dataset = GraphDataset(frames, CUTOFF, torch.float64)
    return Batch.from_data_list([dataset[i] for i in range(len(frames))])


def found(model: Potential, frames: list[Atoms], config: LossConfig) -> dict[str, Tensor]:
    batch = batch_of(frames)
    return errors(model, to_graph(batch), labels_of(batch), config)


ALL = LossConfig(energy=1.0, forces=1.0, stress=1.0, energies=1.0, hessian=1.0)


def energy_of(model: Potential, atoms: Atoms) -> float:
    graph = to_graph(batch_of([unlabelled(atoms)]))
    return float(model(graph)["node_energy"].sum().detach())


def forces_of(model: Potential, atoms: Atoms) -> Array:
    graph = to_graph(batch_of([unlabelled(atoms)]))
    gradient = model(graph)["edge_gradient"].detach()
    return edge_forces(graph["edge_index"], gradient, len(atoms)).numpy()


def differences(value: Callable[[Atoms], float | Array], atoms: Atoms, h: float = 1e-5) -> Array:
    """Central differences of `value` in every coordinate, (N, 3, ...)."""
    slopes = []
    for k in range(3 * len(atoms)):
        sides = []
        for sign in (1, -1):
            moved = atoms.copy()
            moved.positions[k // 3, k % 3] += sign * h
            sides.append(np.asarray(value(moved)))
        slopes.append((sides[0] - sides[1]) / (2 * h))
    return np.array(slopes).reshape(len(atoms), 3, *slopes[0].shape)


def strain_slope(model: Potential, atoms: Atoms, h: float = 1e-5) -> Array:
    """(1/V) dE/dε by central differences of symmetric strains."""
    slope = np.zeros((3, 3))
    for a in range(3):
        for b in range(3):
            sides = []
            for sign in (1, -1):
                strain = np.eye(3)
                strain[a, b] += sign * h / 2
                strain[b, a] += sign * h / 2
                moved = atoms.copy()
                moved.set_cell(atoms.cell @ strain, scale_atoms=True)
                sides.append(energy_of(model, moved))
            slope[a, b] = (sides[0] - sides[1]) / (2 * h)
    return slope / atoms.get_volume()


def test_every_target_against_finite_differences() -> None:
    """Two crystals in one batch: offsets of atoms, of the Hessian's component and of the stress all matter."""
    model = potential()
    frames = [unlabelled(atoms, k) for atoms, k in zip(tiny.crystals(2), (4, 7), strict=True)]
    seen = found(model, frames, ALL)
    assert set(seen) == {"energy", "forces", "stress", "energies", "hessian"}
    for n, (atoms, k) in enumerate(zip(frames, (4, 7), strict=True)):
        own = slice(4 * n, 4 * n + 4)
        energy = energy_of(model, atoms)
        assert float(seen["energy"][n].detach()) == pytest.approx(energy / 4, rel=1e-12)
        assert float(seen["energies"][own].detach().sum()) == pytest.approx(energy, rel=1e-12)
        forces = -differences(lambda a: energy_of(model, a), atoms)
        assert np.abs(forces).max() > 1e-2  # there is something to see
        np.testing.assert_allclose(seen["forces"][own].detach(), forces, atol=1e-6)
        stress = strain_slope(model, atoms)
        assert np.abs(stress).max() > 1e-4
        np.testing.assert_allclose(seen["stress"][n].detach(), stress, atol=1e-8)
        hessian = -differences(lambda a: forces_of(model, a), atoms).reshape(12, 4, 3)
        assert np.abs(hessian[k]).max() > 1e-2
        np.testing.assert_allclose(seen["hessian"][own].detach(), hessian[k], atol=1e-6)


def test_the_loss_has_the_gradient_it_should_have() -> None:
    """Second and third derivatives through every target: the slope in one weight is that of finite differences."""
    model = potential()
    frames = [unlabelled(atoms, 5) for atoms in tiny.crystals(2)]
    weight = model.model.network.filter_net.weight
    total_loss(found(model, frames, ALL), ALL).backward()
    assert weight.grad is not None
    spot = np.unravel_index(int(weight.grad.abs().argmax()), weight.shape)
    values = []
    for h in (1e-5, -2e-5):
        with torch.no_grad():
            weight[spot] += h
        values.append(float(total_loss(found(model, frames, ALL), ALL).detach()))
    assert float(weight.grad[spot]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)


def hessian_of(model: Potential, atoms: Atoms) -> Array:
    """Predicted Hessian (3N, 3N), all its rows in one batch as the loss sees them."""
    n = 3 * len(atoms)
    seen = found(model, [unlabelled(atoms, k) for k in range(n)], LossConfig(hessian=1.0))
    return seen["hessian"].detach().numpy().reshape(n, n)


@pytest.fixture
def molecules(data_dir: Path) -> tuple[list[Atoms], Array]:
    """Real molecules of 18 atoms with their full Hessians (M, 54, 54), eV/Å²."""
    folder = data_dir / "deepmd_hessian" / "data" / "H10C5N2O"
    with pytest.warns(DataWarning, match="hessian"):
        frames = read(folder)
    for atoms in frames:
        atoms.set_cell(None)
        atoms.pbc = False  # a box of vacuum
    n = 3 * len(frames[0])
    return frames, np.load(folder / "set.000" / "hessian.npy").reshape(len(frames), n, n)


def test_hessian_rows_of_a_molecule(molecules: tuple[list[Atoms], Array]) -> None:
    frames, labels = molecules
    model = potential(("C", "H", "N", "O"))
    predicted = hessian_of(model, frames[0])
    assert predicted.shape == labels[0].shape
    np.testing.assert_allclose(predicted, predicted.T, atol=1e-10)
    n = len(frames[0])
    np.testing.assert_allclose(predicted.reshape(3 * n, n, 3).sum(1), 0.0, atol=1e-10)  # translations
    slopes = -differences(lambda a: forces_of(model, a), frames[0]).reshape(3 * n, 3 * n)
    np.testing.assert_allclose(predicted, slopes, atol=1e-6)
    # the labels have the same sign: bonds are stiff
    assert (labels.diagonal(axis1=1, axis2=2) > 0).mean() > 0.9


def test_training_on_hessian_rows_lowers_the_error_of_the_whole(molecules: tuple[list[Atoms], Array]) -> None:
    frames, labels = molecules
    model = potential(("C", "H", "N", "O"))
    rng = np.random.default_rng(0)
    sampled = []
    for atoms, hessian in zip(frames, labels, strict=True):
        k = int(rng.integers(len(hessian)))
        atoms.arrays["hessian_row"] = hessian[k].reshape(-1, 3)
        atoms.info["hessian_index"] = k
        sampled.append(atoms)
    batch, config = batch_of(sampled), LossConfig(energy=0.0, forces=0.0, hessian=1.0)

    def whole_error() -> float:
        return float(np.sqrt(np.mean((hessian_of(model, frames[0]) - labels[0]) ** 2)))

    before = whole_error()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        total_loss(errors(model, to_graph(batch), labels_of(batch), config), config).backward()
        optimizer.step()
    assert whole_error() < 0.7 * before


@pytest.mark.parametrize("kind", ["mse", "mae", "huber"])
def test_batch_is_the_mean_over_its_structures(kind: str) -> None:
    config = LossConfig(kind=kind, energy=2.0, forces=3.0, energies=0.5)
    model, frames = potential(), tiny.clusters(3)
    together = total_loss(found(model, frames, config), config)
    alone = [total_loss(found(model, [atoms], config), config) for atoms in frames]
    assert float(together.detach()) == pytest.approx(float(torch.stack(alone).mean().detach()), rel=1e-12)


def test_structures_of_different_sizes_do_not_see_each_other() -> None:
    frames = [tiny.clusters(1, seed=size, size=size)[0] for size in (2, 6, 3)]
    model = potential()
    together = found(model, frames, LossConfig(energies=1.0))
    alone = [found(model, [atoms], LossConfig(energies=1.0)) for atoms in frames]
    for name, error in together.items():
        torch.testing.assert_close(error, torch.cat([one[name] for one in alone]), rtol=0, atol=1e-12)


def test_functions_and_weights() -> None:
    error = torch.tensor([-0.3, 0.02, 0.005], dtype=torch.float64)
    e = error.abs().numpy()
    expected = {
        "mse": (e**2).mean(),
        "mae": e.mean(),
        "huber": np.where(e < 0.1, 0.5 * e**2, 0.1 * (e - 0.05)).mean(),
    }
    for kind, value in expected.items():
        config = LossConfig(kind=kind, huber_delta=0.1, energy=2.0, forces=5.0)
        loss = total_loss({"energy": error, "forces": error, "stress": error[:0]}, config)
        assert float(loss) == pytest.approx(7 * value, rel=1e-12)


def test_missing_stress_is_masked() -> None:
    """A molecule among boxes, and a box without stress: neither counts, and no NaN gets into the gradient."""
    config = LossConfig(energy=0.0, forces=0.0, stress=1.0)
    known, bare = tiny.crystals(2)
    del bare.calc.results["stress"]
    model = potential()
    gradients = []
    for frames in ([known], [known, bare, *tiny.clusters(1)]):
        model.zero_grad()
        seen = found(model, frames, config)
        assert seen["stress"].shape == (1, 3, 3)
        total_loss(seen, config).backward()
        gradients.append(torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None]))
    assert gradients[1].isfinite().all()
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    assert found(model, [bare], config).keys() == {"energy", "forces"}  # the set has no stress at all


@pytest.mark.parametrize("target", ["stress", "energies", "hessian"])
def test_a_target_without_labels_is_an_error(target: str, tmp_path: Path) -> None:
    good = tiny.crystals(2)
    for atoms in good:
        atoms.arrays["hessian_row"], atoms.info["hessian_index"] = np.zeros((4, 3)), 0
    bad = [tiny.labelled(atoms.copy(), ("energy", "forces")) for atoms in tiny.crystals(2, seed=1)]
    config = {"loss": {target: 0.5}}
    tiny.trainer(tmp_path / "good", good, good, config)
    with pytest.raises(
        DataError, match=rf"train.loss.{target} is 0.5 but .* training frame has .*train.loss.{target}: 0"
    ):
        tiny.trainer(tmp_path / "bad", bad, good, config)
    if target == "hessian":  # not validated
        tiny.trainer(tmp_path / "bad", good, bad, config)
    else:
        with pytest.raises(DataError, match="validation frame"):
            tiny.trainer(tmp_path / "bad", good, bad, config)
    require_labels({}, LossConfig(), "training")


def test_validation_does_not_depend_on_the_batch_size() -> None:
    """Also for structures of different sizes, some with stress."""
    frames = [*tiny.clusters(3), *tiny.crystals(2), *tiny.clusters(2, seed=1, size=2)]
    dataset = GraphDataset(frames, CUTOFF, torch.float64)
    config = LossConfig(stress=1.0, energies=1.0)
    model = potential()
    one, all_at_once = (validate(model, dataset, config, size, torch.device("cpu")) for size in (2, 7))
    assert one == pytest.approx(all_at_once, rel=1e-12)
    forces = np.concatenate([(forces_of(model, a) - a.calc.results["forces"]).ravel() for a in frames])
    assert one["forces_mae"] == pytest.approx(np.abs(forces).mean(), rel=1e-9)
    assert one["forces_rmse"] == pytest.approx(np.sqrt((forces**2).mean()), rel=1e-9)
    assert set(one) == {"loss"} | {
        f"{t}_{m}" for t in ("energy", "forces", "stress", "energies") for m in ("mae", "rmse")
    }


@pytest.mark.fault("R4")
def test_validation_label_that_is_not_finite_is_named() -> None:
    frames = tiny.clusters(5)
    frames[3].calc.results["forces"][0, 0] = np.inf
    dataset = GraphDataset(frames, CUTOFF, torch.float64)
    with pytest.raises(TrainingError, match="forces is not finite on a frame from 2 to 3 of 5 for validation"):
        validate(potential(), dataset, LossConfig(), 2, torch.device("cpu"))


def test_every_field_is_documented() -> None:
    assert [name for name, field in LossConfig.model_fields.items() if not field.description] == []


def test_weights_are_checked() -> None:
    from mlff_engines.config import parse

    with pytest.raises(ConfigError, match=r"unknown key 'force'; did you mean 'forces'\?"):
        parse(LossConfig, {"force": 1.0}, "loss")
    with pytest.raises(ConfigError, match=r"forces = -1: .*greater than or equal to 0"):
        parse(LossConfig, {"forces": -1}, "loss")


def test_wrong_stress_sign_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = losses.stress_of
    monkeypatch.setattr(losses, "stress_of", lambda virial, volume: -right(virial, volume))
    with pytest.raises(AssertionError):
        test_every_target_against_finite_differences()
