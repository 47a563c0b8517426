"""The fused kernel is its model: same energies, same gradients, whatever the graph, the order and the threads."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from broken_engines import ORGANIC, domain_decomposed, evaluator, painn
from mlff_engines.errors import ArtifactError
from mlff_engines.graph import Graph, collate, make_graph
from mlff_engines.kernels import fuse, load_operators, table
from mlff_engines.kernels.painn import FusedPaiNN
from mlff_engines.neighbors import neighbor_list
from mlff_engines.potential import Ensemble, Potential
from mlff_engines.structure import Structure
from mlff_engines.validation.result import STATIC
from mlff_engines.validation.static.conformance import check_model
from mlff_engines.validation.static.parity import reference
from mlff_engines.validation.static.systems import cluster, crystal
from requirements import require_compiler

require_compiler()

# relative to the largest gradient or to 1: rounding in float64; rounding and the table in float32
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6}
SKIN = 0.6


@pytest.fixture(scope="module", autouse=True)
def _operators() -> None:
    load_operators()


def fused(potential: Potential) -> FusedPaiNN:
    found = fuse(potential, ["painn"])
    assert isinstance(found, FusedPaiNN)
    return found


def graph_of(structure: Structure, skin: float = 0.0, **more: Any) -> Graph:
    index, vectors = neighbor_list(structure.positions, structure.cell, structure.pbc, ORGANIC.cutoff + skin)
    return make_graph(*map(torch.from_numpy, (structure.numbers, index, vectors)), **more)


def shuffled(graph: Graph, seed: int = 0) -> Graph:
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(graph["edge_vec"])))
    return {**graph, "edge_index": graph["edge_index"][:, order], "edge_vec": graph["edge_vec"][order]}


def box(atoms: int) -> Structure:
    """Periodic, `atoms` large."""
    one = cluster(ORGANIC, atoms, seed=3)
    side = ORGANIC.spacing * np.ceil(atoms ** (1 / 3))
    return replace(one, cell=side * np.eye(3), pbc=np.ones(3, dtype=bool))


def half_owned() -> Graph:
    graph = graph_of(crystal(ORGANIC))
    return {**graph, "owned": torch.arange(len(graph["numbers"])) % 2 == 0}


NOTHING = torch.zeros((2, 0), dtype=torch.int64)
GRAPHS: dict[str, Callable[[], Graph]] = {
    "no atoms": lambda: make_graph(NOTHING[0], NOTHING, torch.zeros((0, 3), dtype=torch.float64)),
    "one atom": lambda: make_graph(torch.tensor([6]), NOTHING, torch.zeros((0, 3), dtype=torch.float64)),
    "atoms far apart": lambda: make_graph(torch.tensor([6, 1, 8]), NOTHING, torch.zeros((0, 3), dtype=torch.float64)),
    "two atoms": lambda: graph_of(cluster(ORGANIC, 2)),
    "one way only": lambda: make_graph(
        torch.tensor([6, 8]), torch.tensor([[0], [1]]), torch.tensor([[0.3, -1.1, 0.7]], dtype=torch.float64)
    ),
    "cluster": lambda: graph_of(cluster(ORGANIC, 21)),
    "small cell, atoms that neighbour themselves": lambda: graph_of(crystal(ORGANIC)),
    "skin": lambda: graph_of(crystal(ORGANIC), SKIN),
    "edges in any order": lambda: shuffled(graph_of(cluster(ORGANIC, 13), SKIN)),
    "half of it owned": half_owned,
    "none owned": lambda: {**half_owned(), "owned": torch.zeros(8, dtype=torch.bool)},
    "batch": lambda: collate(
        [graph_of(cluster(ORGANIC, 5)), graph_of(cluster(ORGANIC, 1)), graph_of(crystal(ORGANIC), SKIN)]
    ),
    "more than a tile": lambda: graph_of(box(64)),
    "very close": lambda: make_graph(
        torch.tensor([1, 1]),
        torch.tensor([[0, 1], [1, 0]]),
        torch.tensor([[0.3, 0, 0.4], [-0.3, 0, -0.4]], dtype=torch.float64),
    ),
    "not contiguous": lambda: {
        **graph_of(cluster(ORGANIC, 9)),
        "edge_vec": graph_of(cluster(ORGANIC, 9))["edge_vec"].T.contiguous().T,
    },
}


def cast(graph: Graph, dtype: torch.dtype) -> Graph:
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in graph.items()}


def assert_same(found: Graph, expected: Graph, tolerance: float, case: str = "") -> None:
    assert found["node_energy"].dtype == torch.float64
    scale = max([1.0, *expected["edge_gradient"].abs().flatten().tolist()])
    for name in ("node_energy", "edge_gradient"):
        difference = (found[name].double() - expected[name].double()).abs()
        assert (difference <= tolerance * scale).all(), f"{case}: {name} off by {difference.max():.3g} of {scale:.3g}"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"interactions": 1},
        {"interactions": 3, "features": 64, "basis_size": 20},
        {"features": 24, "interactions": 3},
        {"features": 2},
        {"features": 40, "basis": "gaussian", "basis_size": 20},
        {"basis": "bernstein", "cutoff_function": "polynomial"},
        {"cutoff_function": "physnet"},
        {"charge": True},
        {"charge": True, "spin": True, "features": 16},
    ],
    ids=lambda options: ", ".join(f"{k} {v}" for k, v in options.items()) or "usual",
)
def test_equals_the_eager_model(options: dict[str, Any]) -> None:
    potential = painn(**options)
    for dtype, tolerance in TOLERANCE.items():
        single = copy.deepcopy(potential).to(dtype).eval()
        kernel = fused(single)
        exact = copy.deepcopy(single).double().eval()  # the same weights, rounded or not
        for name, make in GRAPHS.items():
            graph = make()
            graph["charge"] = torch.linspace(-1, 1, len(graph["charge"]), dtype=torch.float64)
            graph["spin"] = torch.ones_like(graph["charge"])
            rounded = cast(graph, dtype)
            assert_same(kernel(rounded), exact(cast(rounded, torch.float64)), tolerance, f"{dtype}, {name}")


def test_ensemble_equals_the_eager_one() -> None:
    members = [painn(seed, features=16) for seed in range(3)]
    graph = graph_of(crystal(ORGANIC), SKIN)
    expected, found = Ensemble(members)(graph), fuse(Ensemble(members), ["painn"] * 3)(graph)
    assert set(found) == set(expected) == {"node_energy", "edge_gradient", "energy_std", "force_std"}
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-11, atol=1e-12)


@pytest.mark.check(*STATIC)
@pytest.mark.parametrize("form", ["one", "ensemble", "ghosts", "charged"])
def test_every_static_check_passes(form: str) -> None:
    """The tolerances are those of the eager model."""
    options: dict[str, Any] = {"charge": True, "spin": True} if form == "charged" else {}
    claims = replace(ORGANIC, charges=(0.0, -1.0), spins=(0.0, 1.0)) if form == "charged" else ORGANIC
    takes = {"takes_charge": True, "takes_spin": True} if form == "charged" else {}
    potential: Potential | Ensemble = painn(**options)
    if form == "ensemble":
        potential = Ensemble([painn(seed) for seed in range(2)])
    kernel = fuse(potential, ["painn", "painn"] if form == "ensemble" else ["painn"])
    evaluate = domain_decomposed(kernel, claims) if form == "ghosts" else evaluator(kernel, claims, **takes)
    codes = [code for code in STATIC if form != "ghosts" or code == "S1"]
    results = check_model(evaluate, claims, reference=reference(potential, claims.cutoff), only=codes)
    assert [result.code for result in results] == codes
    assert [result for result in results if not result.passed] == []


@pytest.mark.check("S3")
def test_gradient_is_the_derivative_of_the_energy() -> None:
    """Of the kernel's own energy, edge by edge, for the owned atoms alone."""
    kernel = fused(painn(features=24, interactions=3))
    graph = half_owned()
    gradient, step = kernel(graph)["edge_gradient"], 1e-4
    rng = np.random.default_rng(0)

    def energy(shift: Tensor) -> float:
        out = kernel({**graph, "edge_vec": graph["edge_vec"] + shift})
        return float((out["node_energy"] * graph["owned"]).sum())

    for edge in rng.choice(len(gradient), 12, replace=False):
        shift = torch.zeros_like(graph["edge_vec"])
        shift[edge] = step * torch.from_numpy(rng.standard_normal(3))
        slope = (8 * (energy(shift) - energy(-shift)) - (energy(2 * shift) - energy(-2 * shift))) / 12
        assert slope == pytest.approx(float((gradient * shift).sum()), abs=1e-12)


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("features", [8, 64])
def test_bitwise_the_same_for_any_number_of_threads(dtype: torch.dtype, features: int) -> None:
    kernel = fused(painn(features=features, interactions=3, dtype=dtype))
    graphs = [cast(shuffled(graph_of(box(atoms), SKIN)), dtype) for atoms in (5, 125)]
    torch.set_num_threads(1)
    expected = [kernel(graph) for graph in graphs]
    for threads in (1, 2, 4, 7):
        torch.set_num_threads(threads)
        for graph, out in zip(graphs, expected, strict=True):
            again = kernel(graph)
            assert all(torch.equal(again[name], tensor) for name, tensor in out.items()), threads


def test_order_of_edges_only_reorders_the_gradient() -> None:
    kernel, graph = fused(painn()), graph_of(cluster(ORGANIC, 13), SKIN)
    order = torch.randperm(len(graph["edge_vec"]), generator=torch.Generator().manual_seed(0))
    mixed = {**graph, "edge_index": graph["edge_index"][:, order], "edge_vec": graph["edge_vec"][order]}
    expected = kernel(graph)
    expected["edge_gradient"] = expected["edge_gradient"][order]
    assert_same(kernel(mixed), expected, 1e-13)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_edges_beyond_the_cutoff_count_exactly_nothing(dtype: torch.dtype) -> None:
    kernel, wide = fused(painn(dtype=dtype)), cast(graph_of(crystal(ORGANIC), SKIN), dtype)
    near = wide["edge_vec"].double().norm(dim=-1) < ORGANIC.cutoff
    assert not near.all()
    tight = {**wide, "edge_index": wide["edge_index"][:, near], "edge_vec": wide["edge_vec"][near]}
    assert torch.equal(kernel(wide)["node_energy"], kernel(tight)["node_energy"])
    assert torch.equal(kernel(wide)["edge_gradient"][near], kernel(tight)["edge_gradient"])
    assert not kernel(wide)["edge_gradient"][~near].any()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_lone_atoms_have_exactly_their_reference_energy(dtype: torch.dtype) -> None:
    kernel = fused(painn(dtype=dtype))
    graph = make_graph(torch.tensor(ORGANIC.numbers), NOTHING, torch.zeros((0, 3), dtype=dtype))
    assert kernel(graph)["node_energy"].tolist() == [ORGANIC.e0[symbol] for symbol in ORGANIC.elements]


def test_coincident_atoms_are_not_finite() -> None:
    """As in the eager model: the evaluator then names the atom."""
    potential = painn()
    graph = graph_of(cluster(ORGANIC, 3))
    graph["edge_vec"][0] = 0
    for model in (potential, fused(potential)):
        assert not model(graph)["node_energy"].isfinite().all()


def test_training_goes_through_automatic_differentiation() -> None:
    potential = painn()
    graph = graph_of(cluster(ORGANIC, 4))
    out = fused(potential).train()(graph)
    out["edge_gradient"].square().sum().backward()
    assert all(p.grad is not None for p in potential.parameters() if p is not potential.model.network.readout[2].bias)


def test_wrong_arguments_are_refused_and_leave_no_harm() -> None:
    kernel, graph = fused(painn()), graph_of(cluster(ORGANIC, 4))
    expected = kernel(graph)
    astray = graph["edge_index"].clone()
    astray[:, 0] = torch.tensor([9, 1])
    with pytest.raises(IndexError, match="edge 0 joins atoms 9 and 1 of 4"):
        kernel({**graph, "edge_index": astray})
    with pytest.raises(IndexError, match="no element 119"):
        kernel.outputs({**graph, "numbers": torch.full((4,), 119)}, torch.ones(4, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="edge_vec is Float but the model Double"):
        kernel(cast(graph, torch.float32))
    other = fused(painn())
    other.layers += 1
    with pytest.raises(RuntimeError, match="of another model"):
        other(graph)
    again = kernel(graph)
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("options", [{}, {"basis": "gaussian", "basis_size": 60}, {"basis_size": 48}])
def test_table_error_is_bounded_and_as_stated(dtype: torch.dtype, options: dict[str, Any]) -> None:
    network: Any = painn(**options).model.network

    def filters(r: Tensor) -> Tensor:
        found: Tensor = network.filter_net(network.basis(r)) * network.cutoff_function(r).unsqueeze(-1)
        return found

    made = table.tabulate(filters, ORGANIC.cutoff, dtype)
    assert max(made.value_error, made.slope_error) <= table.BOUND[dtype]
    r = torch.from_numpy(np.random.default_rng(0).uniform(0.2, ORGANIC.cutoff, 2000))
    position = (r - table.START) * made.intervals / (ORGANIC.cutoff - table.START)
    t = 2 * (position - position.floor()) - 1
    powers = t.unsqueeze(-1) ** torch.arange(made.coefficients.shape[1])
    found = torch.einsum("ep,epc->ec", powers, made.coefficients.double()[position.long()])
    exact = filters(r).detach()
    error = float((found - exact).abs().max() / exact.abs().max())
    assert error < 1.5 * made.value_error + 100 * torch.finfo(dtype).eps


def test_table_is_continuous_and_zero_at_the_cutoff() -> None:
    network: Any = painn().model.network
    made = table.tabulate(
        lambda r: network.filter_net(network.basis(r)) * network.cutoff_function(r).unsqueeze(-1), 4.0, torch.float32
    )
    signs = (-1.0) ** torch.arange(6)
    left, right = (made.coefficients * signs.unsqueeze(-1)).sum(1), made.coefficients.sum(1)
    torch.testing.assert_close(right[:-1], left[1:], rtol=0, atol=3e-7 * float(right.abs().max()))
    assert right[-1].abs().max() < 3e-7 * right.abs().max()


def test_filters_that_no_table_can_hold_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "INTERVALS", [4])
    with pytest.raises(ArtifactError, match=r"cannot be tabulated: error .* with 4 intervals; allowed 2e-07"):
        fused(painn(dtype=torch.float32))


def wrong_way_back(kernel: FusedPaiNN) -> None:
    """A weight used as it is in the adjoint, where its transpose belongs."""
    square = 16 * 16  # 8 features, padded
    back = slice(2 * square, 3 * square)  # the first update's mix is (F, 2F), and then, for the way back, (2F, F)
    kernel.weights[back] = kernel.weights[back].reshape(16, 16).T.flatten()


def ghosts_counted(kernel: FusedPaiNN) -> None:
    outputs = kernel.outputs
    kernel.outputs = lambda graph, seed: outputs(graph, torch.ones_like(seed) * kernel.model.reference.scale)  # type: ignore[method-assign]


def shifted_table(kernel: FusedPaiNN) -> None:
    kernel.start += 1e-6


def eager_isolated_atoms(kernel: FusedPaiNN) -> None:
    kernel.y_isolated += 1e-9


def first_layer_of_another_element(kernel: FusedPaiNN) -> None:
    kernel.x[6] = kernel.x[8]


def powers_upwards(kernel: FusedPaiNN) -> None:
    """The coefficients of each filter, of degree 11 and in chunks of 16 channels, from the lowest on."""
    kernel.filters = kernel.filters.unflatten(0, (-1, 12, 16)).flip(1).flatten()


@pytest.mark.parametrize(
    "bug",
    [
        wrong_way_back,
        ghosts_counted,
        shifted_table,
        eager_isolated_atoms,
        first_layer_of_another_element,
        powers_upwards,
    ],
    ids=lambda bug: bug.__name__,
)
def test_bugs_are_noticed(bug: Callable[[FusedPaiNN], None]) -> None:
    potential, graph = painn(), half_owned()
    kernel, expected = fused(potential), potential(graph)
    assert_same(kernel(graph), expected, TOLERANCE[torch.float64])
    bug(kernel)
    with pytest.raises(AssertionError):
        assert_same(kernel(graph), expected, TOLERANCE[torch.float64])
