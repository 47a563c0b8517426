"""Energies, edge gradients, forces, virial, ensembles, and the energy reference under them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from broken_engines import NOBLE, ORGANIC, ensemble, lennard_jones, painn
from mlff_engines.checkpoint import set_dtype
from mlff_engines.graph import INPUTS, OUTPUTS, Graph, collate, make_graph
from mlff_engines.models.registry import build_model, model_config
from mlff_engines.neighbors import neighbor_list
from mlff_engines.potential import Ensemble, Potential, edge_forces, edge_virial, stress_of
from mlff_engines.structure import Structure
from mlff_engines.validation.static.systems import cluster, crystal, isolated


def graph_of(structure: Structure, cutoff: float = ORGANIC.cutoff, **more: Any) -> Graph:
    index, vectors = neighbor_list(structure.positions, structure.cell, structure.pbc, cutoff)
    return make_graph(*map(torch.from_numpy, (structure.numbers, index, vectors)), **more)


def test_graph_has_the_tensors_of_the_contract() -> None:
    graph = graph_of(crystal(ORGANIC))
    assert set(graph) == set(INPUTS)
    out = ensemble()(graph)
    assert set(out) == set(OUTPUTS)
    sizes = {"N": 8, "E": graph["edge_index"].shape[1], "B": 1, "2": 2, "3": 3}
    for name, spec in (INPUTS | OUTPUTS).items():
        tensor = {**graph, **out}[name]
        shape = [sizes[part] for part in spec.shape.strip("()").replace(" ", "").split(",") if part]
        assert list(tensor.shape) == shape, name
        kinds = {"float": torch.float64, "float64": torch.float64, "int64": torch.int64, "bool": torch.bool}
        assert tensor.dtype == kinds[spec.dtype], name


@pytest.mark.parametrize("make", [lambda: (lennard_jones(), NOBLE), lambda: (painn(), ORGANIC)], ids=["lj", "painn"])
def test_forces_and_virial_are_derivatives_by_positions_and_strain(make: Any) -> None:
    potential, claims = make()
    structure = crystal(claims)
    graph = graph_of(structure, claims.cutoff)
    (i, j), atoms = graph["edge_index"], len(structure)
    positions = torch.from_numpy(structure.positions).requires_grad_()
    strain = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    offset = graph["edge_vec"] - (positions[j] - positions[i]).detach()
    vectors = (positions[j] - positions[i] + offset) @ (torch.eye(3, dtype=torch.float64) + (strain + strain.T) / 2)
    energy = potential.model(graph | {"edge_vec": vectors})["node_energy"].sum()
    slope, strain_slope = torch.autograd.grad(energy, [positions, strain])

    out = potential(graph)
    forces = edge_forces(graph["edge_index"], out["edge_gradient"], atoms)
    virial = edge_virial(graph["edge_vec"], out["edge_gradient"], torch.zeros_like(i), 1)
    torch.testing.assert_close(forces, -slope, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(virial[0], -strain_slope, rtol=1e-12, atol=1e-13)
    volume = torch.tensor([structure.volume])
    torch.testing.assert_close(stress_of(virial, volume)[0], strain_slope / structure.volume)
    assert forces.abs().max() > 1e-3
    assert torch.allclose(forces.sum(0), torch.zeros(3, dtype=torch.float64), atol=1e-12)


def test_gradient_is_that_of_owned_atoms_only() -> None:
    structure, owned = cluster(ORGANIC), torch.arange(8) < 3
    graph = graph_of(structure, owned=owned)
    potential = painn()
    vectors = graph["edge_vec"].clone().requires_grad_()
    energies = potential.model(graph | {"edge_vec": vectors})["node_energy"]
    expected = torch.autograd.grad(energies[:3].sum(), vectors)[0]
    torch.testing.assert_close(potential(graph)["edge_gradient"], expected, rtol=0, atol=1e-14)
    everything = graph_of(structure)
    assert (potential(everything)["edge_gradient"] - expected).abs().max() > 1e-3


def test_a_batch_is_its_structures_one_by_one() -> None:
    structures = [cluster(ORGANIC, 5, 1), crystal(ORGANIC), isolated(ORGANIC, 8), cluster(ORGANIC, 3, 2)]
    graphs = [graph_of(s) for s in structures]
    batch = collate(graphs)
    assert batch["batch"].tolist() == [0] * 5 + [1] * 8 + [2] + [3] * 3
    for potential in (painn(), ensemble()):
        together, alone = potential(batch), [potential(g) for g in graphs]
        for name in together:
            joined = torch.cat([out[name] for out in alone])
            torch.testing.assert_close(together[name], joined, rtol=0, atol=1e-11)
    edge_batch = batch["batch"][batch["edge_index"][0]]
    out = painn()(batch)
    virials = edge_virial(batch["edge_vec"], out["edge_gradient"], edge_batch, 4)
    for graph, virial in zip(graphs, virials, strict=True):
        own = edge_virial(
            graph["edge_vec"], painn()(graph)["edge_gradient"], torch.zeros_like(graph["edge_index"][0]), 1
        )
        torch.testing.assert_close(virial, own[0], rtol=0, atol=1e-11)


def test_ensemble_is_the_mean_and_spread_of_its_members() -> None:
    members = [painn(seed) for seed in range(3)]
    graph = graph_of(crystal(ORGANIC))
    out = Ensemble(members)(graph)
    energies = np.array([m(graph)["node_energy"].numpy() for m in members])
    gradients = [m(graph)["edge_gradient"] for m in members]
    forces = np.array([edge_forces(graph["edge_index"], g, 8).numpy() for g in gradients])
    np.testing.assert_allclose(out["node_energy"], energies.mean(0), rtol=1e-14)
    np.testing.assert_allclose(out["edge_gradient"], np.mean([g.numpy() for g in gradients], axis=0), atol=1e-14)
    np.testing.assert_allclose(out["energy_std"], [energies.sum(1).std()], rtol=1e-9)
    spread = np.sqrt(((forces - forces.mean(0)) ** 2).sum(-1).mean(0))
    np.testing.assert_allclose(out["force_std"], spread, rtol=1e-12)
    assert spread.min() > 1e-3


def test_ensemble_of_one_has_no_spread() -> None:
    out = Ensemble([painn()])(graph_of(cluster(ORGANIC)))
    assert out["energy_std"].tolist() == [0]
    assert out["force_std"].abs().max() == 0


def test_forces_can_be_trained_on() -> None:
    """The slope of a force loss by a weight, against finite differences: the gradient is itself differentiated."""
    potential = painn().train()
    graph = graph_of(crystal(ORGANIC))

    def loss() -> Tensor:
        out = potential(graph)
        return edge_forces(graph["edge_index"], out["edge_gradient"], 8).square().sum() + out["node_energy"].sum()

    loss().backward()
    rng = np.random.default_rng(0)
    for name, parameter in potential.named_parameters():
        if name == "model.network.updates.1.update_net.2.bias" or parameter.grad is None:
            continue
        flat, slopes = parameter.data.view(-1), parameter.grad.view(-1)
        at = int(rng.choice(torch.nonzero(slopes).numpy().ravel()))
        start, step = float(flat[at]), 1e-5
        values = []
        for shift in (step, -step):
            flat[at] = start + shift
            values.append(float(loss().detach()))
        flat[at] = start
        assert float(slopes[at]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=2e-4, abs=1e-5), name


def test_training_and_evaluation_agree() -> None:
    potential = painn()
    graph = graph_of(crystal(ORGANIC))
    expected = {name: tensor.clone() for name, tensor in potential(graph).items()}
    out = potential.train()(graph)
    assert out["node_energy"].requires_grad
    assert out["edge_gradient"].requires_grad
    for name, tensor in expected.items():
        torch.testing.assert_close(out[name].detach(), tensor, rtol=0, atol=1e-11)
        assert not tensor.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lone_atoms_have_their_e0(dtype: torch.dtype) -> None:
    """Also after the weights changed, and to all digits of E0 in float32."""
    potential = painn(dtype=dtype)
    with torch.no_grad():
        for parameter in potential.parameters():
            parameter.mul_(1.3)
    potential.eval()
    for symbol, number in zip(ORGANIC.elements, ORGANIC.numbers, strict=True):
        graph = graph_of(isolated(ORGANIC, number)) | {"edge_vec": torch.zeros(0, 3, dtype=dtype)}
        found = potential(graph)["node_energy"]
        assert found.dtype == torch.float64
        assert float(found) == pytest.approx(ORGANIC.e0[symbol], abs=1e-12 if dtype == torch.float64 else 1e-6)


def test_scale_shift_and_e0() -> None:
    plain = painn()
    scaled = copy.deepcopy(plain)
    reference: Any = scaled.model.reference
    reference.scale.mul_(3.0)
    reference.shift.add_(0.25)
    graph = graph_of(cluster(ORGANIC))
    e0 = torch.tensor([ORGANIC.e0[{1: "H", 6: "C", 8: "O"}[z]] for z in graph["numbers"].tolist()], dtype=torch.float64)
    expected = e0 + 0.25 + 3 * (plain(graph)["node_energy"] - e0)
    torch.testing.assert_close(scaled(graph)["node_energy"], expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(scaled(graph)["edge_gradient"], 3 * plain(graph)["edge_gradient"])


def test_energy_reference_keeps_float64() -> None:
    e0 = {"H": -13.605693122994, "O": -2041.123456789012}
    potential = Potential(build_model(model_config({"features": 4, "interactions": 1}), ["H", "O"], e0)).eval()
    for dtype in (torch.float32, torch.float16, torch.float64):
        potential.to(dtype)
        assert float(potential.model.reference.e0[8]) == e0["O"]
    assert next(potential.parameters()).dtype == torch.float64
    set_dtype(potential, torch.float32)
    assert next(potential.parameters()).dtype == torch.float32


def test_an_element_without_e0_is_no_number() -> None:
    """A graph that no evaluator has checked: better NaN than a made-up energy."""
    graph = graph_of(Structure(np.array([1, 7]), np.array([[0.0, 0, 0], [1, 0, 0]])))
    assert painn()(graph)["node_energy"].isnan().tolist() == [False, True]
