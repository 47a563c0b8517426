"""PaiNN against a slow reference, written atom by atom from the paper.

Schütt, Unke, Gastegger, ICML 2021, arXiv 2102.03150. Features of atom i: scalars s_i (F,), vectors v_i (3, F).

Message, summed over the neighbours j of i, with r_ij = r_j - r_i, φ = two linear layers with SiLU between, W = a linear
layer of the radial basis, times the cutoff function (Eq. 7, 8):

    Δs_i = Σ_j φ_s(s_j) W_s(r_ij)
    Δv_i = Σ_j v_j φ_vv(s_j) W_vv(r_ij) + (r_ij/|r_ij|) φ_vs(s_j) W_vs(r_ij)

Update (Eq. 9, 10), with a = two linear layers of (s_i, |V v_i|):

    Δs_i = a_ss + a_sv <U v_i, V v_i>
    Δv_i = a_vv U v_i
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mlff_engines.errors import ConfigError
from mlff_engines.graph import Graph, collate, make_graph
from mlff_engines.models.painn import PaiNN
from mlff_engines.models.registry import model_config
from mlff_engines.neighbors import neighbor_list

F, BASIS, CUTOFF = 6, 5, 3.5


@pytest.fixture(autouse=True)
def _float64() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def model(seed: int = 0, **options: Any) -> PaiNN:
    """PaiNN with random weights, none of them zero."""
    defaults = {"features": F, "interactions": 3, "cutoff": CUTOFF, "basis_size": BASIS}
    torch.manual_seed(seed)
    painn = PaiNN(model_config({**defaults, **options}))
    with torch.no_grad():
        for parameter in painn.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return painn


def structure(seed: int = 0, atoms: int = 7) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(2.0)] * 3, indexing="ij"), -1).reshape(-1, 3)[:atoms]
    return rng.choice([1, 6, 8], atoms), 1.4 * grid + rng.uniform(-0.2, 0.2, (atoms, 3)), 3.1 * np.eye(3)


def graph(numbers: np.ndarray, positions: np.ndarray, cell: np.ndarray, **more: Any) -> Graph:
    index, vectors = neighbor_list(positions, cell, np.ones(3, dtype=bool), CUTOFF)
    return make_graph(*map(torch.from_numpy, (numbers, index, vectors)), **more)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def dense(layer: nn.Module, x: np.ndarray) -> np.ndarray:
    weight, bias = layer.weight.detach().numpy(), layer.bias
    y = weight @ x
    return y if bias is None else y + bias.detach().numpy()


def mlp(net: nn.Sequential, x: np.ndarray) -> np.ndarray:
    return dense(net[2], silu(dense(net[0], x)))


def slow_painn(painn: PaiNN, inputs: Graph) -> np.ndarray:
    """Raw outputs (N,), one atom and one neighbour at a time; nothing is skipped."""
    numbers, (centres, neighbours) = inputs["numbers"].tolist(), inputs["edge_index"].tolist()
    vectors = inputs["edge_vec"].detach().numpy()
    s = [painn.embedding.weight[z].detach().numpy() for z in numbers]
    v = [np.zeros((3, F)) for _ in numbers]
    for layer, (message, update) in enumerate(zip(painn.messages, painn.updates, strict=True)):
        phi = [mlp(message.message_net, s_j) for s_j in s]
        ds, dv = [np.zeros(F) for _ in numbers], [np.zeros((3, F)) for _ in numbers]
        for i, j, vector in zip(centres, neighbours, vectors, strict=True):
            r = math.sqrt(vector @ vector)
            if r >= CUTOFF:
                continue
            bessel = np.array([math.sin(n * math.pi * r / CUTOFF) / r for n in range(1, BASIS + 1)])
            envelope = 0.5 * (math.cos(math.pi * r / CUTOFF) + 1)
            w = dense(painn.filter_net, bessel)[3 * F * layer : 3 * F * (layer + 1)] * envelope
            x_s, x_vs, x_vv = np.split(phi[j] * w, 3)
            ds[i] += x_s
            dv[i] += np.outer(vector / r, x_vs) + v[j] * x_vv
        s = [a + b for a, b in zip(s, ds, strict=True)]
        v = [a + b for a, b in zip(v, dv, strict=True)]
        mix = update.vector_mix.weight.detach().numpy()
        for i in range(len(numbers)):
            vv, uv = v[i] @ mix[:F].T, v[i] @ mix[F:].T  # V v_i, U v_i
            norm = np.sqrt((vv**2).sum(axis=0) + 1e-8)
            a_ss, a_vv, a_sv = np.split(mlp(update.update_net, np.concatenate([s[i], norm])), 3)
            s[i] = s[i] + a_ss + a_sv * (uv * vv).sum(axis=0)
            v[i] = v[i] + a_vv * uv
    return np.array([mlp(painn.readout, s_i)[0] for s_i in s])


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_equals_the_paper(layers: int) -> None:
    """Every layer: so the terms skipped in the first and the last are those that are zero or unread."""
    painn, inputs = model(interactions=layers), graph(*structure())
    found = painn(inputs).detach().numpy()
    np.testing.assert_allclose(found, slow_painn(painn, inputs), rtol=1e-11, atol=1e-12)
    assert np.ptp(found) > 1e-2


def test_unskipped_layers_change_nothing() -> None:
    painn, inputs = model(), graph(*structure())
    expected = painn(inputs)
    painn.messages[0].first = False
    painn.updates[-1].last = False
    torch.testing.assert_close(painn(inputs), expected, rtol=0, atol=1e-14)
    painn.messages[1].first = True  # a layer that does matter
    assert (painn(inputs) - expected).abs().max() > 1e-4


def test_shapes_of_the_parameters_are_those_of_schnetpack() -> None:
    """So that its weights fit (sizes as in its PaiNN and Atomwise)."""
    shapes = {name: tuple(p.shape) for name, p in model(interactions=2).named_parameters()}
    block = {
        "messages.{}.message_net.0": (F, F),
        "messages.{}.message_net.2": (3 * F, F),
        "updates.{}.update_net.0": (F, 2 * F),
        "updates.{}.update_net.2": (3 * F, F),
    }
    linear = {name.format(i): shape for i in range(2) for name, shape in block.items()}
    linear |= {"filter_net": (2 * 3 * F, BASIS), "readout.0": (F // 2, F), "readout.2": (1, F // 2)}
    expected = {f"{name}.weight": shape for name, shape in linear.items()}
    expected |= {f"{name}.bias": shape[:1] for name, shape in linear.items()}
    expected |= {f"updates.{i}.vector_mix.weight": (2 * F, F) for i in range(2)} | {"embedding.weight": (119, F)}
    assert shapes == expected


@pytest.mark.parametrize("basis", ["bessel", "gaussian", "bernstein"])
@pytest.mark.parametrize("cutoff_function", ["cosine", "polynomial", "physnet"])
def test_rotations_and_reflections_change_nothing(basis: str, cutoff_function: str) -> None:
    painn = model(basis=basis, cutoff_function=cutoff_function)
    numbers, positions, cell = structure()
    expected = painn(graph(numbers, positions, cell))
    for seed in range(2):
        q = np.linalg.qr(np.random.default_rng(seed).standard_normal((3, 3)))[0]
        for operation in (q, -q):
            turned = painn(graph(numbers, positions @ operation.T, cell @ operation.T))
            torch.testing.assert_close(turned, expected, rtol=0, atol=1e-11)


def test_vectors_matter() -> None:
    """The same distances from the centre, another angle: a model of distances alone could not tell in one layer."""
    painn, numbers = model(interactions=1), np.array([8, 1, 1])

    def centre(angle: float) -> float:
        arms = 3.4 * np.array([[1, 0, 0], [math.cos(angle), math.sin(angle), 0]])
        pairs = torch.tensor([[0, 0, 1, 2], [1, 2, 0, 0]])
        inputs = make_graph(torch.from_numpy(numbers), pairs, torch.from_numpy(np.concatenate([arms, -arms])))
        return float(painn(inputs)[0].detach())

    assert abs(centre(1.0) - centre(2.0)) > 1e-9


def test_edges_beyond_the_cutoff_count_nothing() -> None:
    painn = model()
    numbers, positions, cell = structure()
    index, vectors = neighbor_list(positions, cell, np.ones(3, dtype=bool), CUTOFF + 1.0)
    assert (np.linalg.norm(vectors, axis=1) > CUTOFF).any()
    wide = make_graph(*map(torch.from_numpy, (numbers, index, vectors)))
    torch.testing.assert_close(painn(wide), painn(graph(numbers, positions, cell)), rtol=0, atol=1e-13)


def test_structures_of_a_batch_do_not_mix() -> None:
    painn = model(charge=True, spin=True)
    one = graph(*structure(0), charge=torch.tensor([1.0]), spin=torch.tensor([0.0]))
    two = graph(*structure(1, atoms=5), charge=torch.tensor([-1.0]), spin=torch.tensor([1.0]))
    torch.testing.assert_close(painn(collate([one, two])), torch.cat([painn(one), painn(two)]), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["charge", "spin"])
def test_charge_and_spin_matter_where_they_are_inputs(name: str) -> None:
    def outputs(painn: PaiNN, value: float) -> Tensor:
        return painn(graph(*structure(), **{name: torch.tensor([value])})).detach()

    taking, ignoring = model(**{name: True}), model()
    assert (outputs(taking, 1.0) - outputs(taking, 0.0)).abs().max() > 1e-3
    assert (outputs(taking, 1.0) - outputs(taking, -1.0)).abs().max() > 1e-3
    assert torch.equal(outputs(ignoring, 1.0), outputs(ignoring, 0.0))


def test_no_edges_and_no_atoms() -> None:
    painn = model()
    nothing = torch.zeros((2, 0), dtype=torch.int64)
    assert painn(make_graph(torch.tensor([6]), nothing, torch.zeros(0, 3))).shape == (1,)
    assert painn(make_graph(nothing[0], nothing, torch.zeros(0, 3))).shape == (0,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature": 3}, "unknown key 'feature'; did you mean 'features'"),
        ({"features": 0}, "features = 0"),
        ({"cutoff": -1}, "cutoff = -1"),
        ({"arch": "pain"}, "unknown architecture 'pain'; did you mean 'painn'"),
    ],
)
def test_wrong_hyper_parameters_are_explained(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_config(options)
