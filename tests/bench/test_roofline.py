"""Operations are counted as torch counts them, ceilings do what they say, and the page says what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mlff_engines import cli
from mlff_engines.bench import ceilings, ours
from mlff_engines.bench.page import markers
from mlff_engines.bench.roofline import CEILINGS, SECTION, eager_products, report, work
from mlff_engines.bench.rows import Row
from mlff_engines.bench.systems import named
from mlff_engines.errors import ConfigError
from mlff_engines.graph import make_graph
from mlff_engines.kernels.table import DEGREE
from mlff_engines.models.painn import PaiNNConfig
from mlff_engines.models.registry import build_model
from mlff_engines.neighbors import neighbor_list
from requirements import require_compiler

CONFIGS = [
    PaiNNConfig(),
    PaiNNConfig(features=16, interactions=1, cutoff=3.0, basis_size=7),
    PaiNNConfig(features=10, interactions=4, cutoff=4.0),
]


def counted(config: PaiNNConfig, system: str) -> tuple[int, int, int]:
    """Atoms, edges, and the operations that torch counts in plain energies and their gradient."""
    s = named(system).structure
    index, vectors = neighbor_list(s.positions, s.cell, s.pbc, config.cutoff)
    network: Any = build_model(config, ours.ELEMENTS, dict.fromkeys(ours.ELEMENTS, 0.0)).network
    leaf = torch.from_numpy(vectors).float().requires_grad_(True)
    # the counter cannot follow a leaf into a module, hence the clone
    graph = make_graph(torch.from_numpy(s.numbers), torch.from_numpy(index), leaf.clone())
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(network(graph).sum(), leaf)
    return len(s), index.shape[1], counter.get_total_flops()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.features}x{config.interactions}")
@pytest.mark.parametrize("system", ["aspirin", "water-24"])
def test_products_are_what_torch_counts(config: PaiNNConfig, system: str) -> None:
    atoms, edges, operations = counted(config, system)
    assert eager_products(config, atoms, edges) == operations


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.features}x{config.interactions}")
def test_what_the_kernel_leaves_out(config: PaiNNConfig) -> None:
    """Of the plain products: all filters, the first message net, the unread part of the last update, and the energy's
    last layer, which is no product there."""
    left_out = 8 * config.features**2 + 2 * 2 * config.features**2 + 2 * 2 * (config.features // 2)
    assert eager_products(config, 5, 0) - work(config, 5, 0).dense == 5 * left_out


class Number(float):
    """Counts what is done with it."""

    done = 0

    @classmethod
    @contextmanager
    def counting(cls) -> Iterator[list[int]]:
        """In `[0]`, afterwards."""
        before, found = cls.done, [0]
        yield found
        found[0] = cls.done - before

    def __add__(self, other: float) -> Number:
        Number.done += 1
        return Number(float(self) + float(other))

    def __mul__(self, other: float) -> Number:
        Number.done += 1
        return Number(float(self) * float(other))


def dot(a: list[Number], b: list[Number]) -> Number:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def polynomial(t: Number, degree: int, slope: bool) -> tuple[Number, Number]:
    """A filter by Horner's rule, and its slope."""
    c = [Number(0.1 * k) for k in range(degree + 1)]
    value = derivative = c[0]
    value = value * t + c[1]
    for k in range(2, degree + 1):
        if slope:
            derivative = derivative * t + value
        value = value * t + c[k]
    return value, derivative


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_operations_of_an_edge(dtype: torch.dtype, layers: int) -> None:
    """Eq. 7-8 of PaiNN and their adjoint for one channel of one edge, written out with numbers that count."""
    degree, one = DEGREE[dtype], Number(0.3)
    u, v, own = [one] * 3, [one] * 3, [one] * 3
    q, mu = one, [one] * 3
    with Number.counting() as found:
        for layer in range(layers):
            first = layer == 0
            w_s, w_vs = (polynomial(one, degree, False)[0] for _ in range(2))
            q = q + w_s * one
            along = w_vs * one
            mu = [sum_ + along * u[k] for k, sum_ in enumerate(mu)]
            if not first:
                scaled = polynomial(one, degree, False)[0] * one
                mu = [sum_ + scaled * v[k] for k, sum_ in enumerate(mu)]
        g, g_mu, radial, direction = one, [one] * 3, one, [one] * 3
        for layer in range(layers):
            if layer == 0:  # what the neighbour sent does not depend on positions
                (_, s), (w, d) = (polynomial(one, degree, True) for _ in range(2))
                radial = radial + (g * one) * s
                vs = w * one
                radial = radial + (dot(g_mu, u) * one) * d
                direction = [sum_ + vs * g_mu[k] for k, sum_ in enumerate(direction)]
                continue
            g_x, g_own = [one] * 3, [one] * 3
            for k, term in enumerate((g, dot(g_mu, u), dot(g_mu, own))):
                w, d = polynomial(one, degree, True)
                g_x[k] = g_x[k] + term * w
                radial = radial + (term * one) * d
                if k:
                    weighted = w * one
                    target = direction if k == 1 else g_own
                    target[:] = [sum_ + weighted * g_mu[c] for c, sum_ in enumerate(target)]
    config = PaiNNConfig(features=2, interactions=layers)
    assert work(config, 1, 1, dtype).edge_operations == 2 * found[0]


def test_ceilings_do_what_they_say() -> None:
    assert set(ceilings.AMOUNT) == set(CEILINGS)
    with FlopCounterMode(display=False) as counter:
        ceilings.open_subject("product", {})[0]({})()
    assert counter.get_total_flops() == ceilings.AMOUNT["product"]
    assert 3 * 4 * ceilings.IN_CACHE < 512 * 1024
    assert 3 * 4 * ceilings.IN_MEMORY > 256 * 1024**2
    ceilings.open_subject("triad-cache", {})[0]({})()


def rows_of(times: dict[str, float], system: str = "water-24") -> list[Row]:
    return [
        Row(system=system, atoms=24, threads=1, what=what, median_ms=9.0, p95_ms=9.0, cpu_ms=ms)
        for what, ms in times.items()
    ]


def test_shares(tmp_path: Path) -> None:
    """A student that takes twice the time of its operations at the measured rate reaches half of it."""
    artifact = ours.default_student(tmp_path)
    edges = neighbor_list(*(getattr(named("water-24").structure, n) for n in ("positions", "cell", "pbc")), 5.0)[0]
    done = work(PaiNNConfig(), 24, edges.shape[1])
    rate = 50.0  # Gflop/s
    times: dict[str, Any] = {
        "mlff": 2e-6 * done.operations / rate,
        "mlff without edges": 1e-6 * done.dense / rate,
        "product": 1e-6 * ceilings.AMOUNT["product"] / rate,
        "triad-cache": 1e-6 * ceilings.AMOUNT["triad-cache"] / 60.0,
        "triad-memory": 1e-6 * ceilings.AMOUNT["triad-memory"] / 20.0,
    }
    text = report(artifact, rows_of(times), "mlff bench --roofline")
    assert "384 by 384: 50.0 Gflop/s; a triad in the L2 cache: 60.0 GB/s; a triad in main memory: 20.0 GB/s" in text
    first, second = (line.split(" | ") for line in text.splitlines() if line.startswith("| water-24"))
    assert first[1] == f"{edges.shape[1] / 24:.1f}"
    assert first[6:8] == ["25.0", "50 %"]
    assert second[2:4] == ["50.0", "100 %"]
    of_edges = 2 * done.operations - done.dense  # their time, times the rate
    assert second[6] == f"{100 * done.edge_operations / of_edges:.0f} %"
    assert second[8] == f"{100 * done.cache / of_edges * rate / 60:.0f} %"
    assert second[9] == f"{100 * of_edges / (2 * done.operations):.0f} % |"


def test_only_of_painn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from mlff_engines.bench import roofline

    artifact = ours.default_student(tmp_path)
    monkeypatch.setattr(roofline, "model_config", lambda config: object())
    with pytest.raises(ConfigError, match="is no PaiNN"):
        roofline.subjects(artifact)
    with pytest.raises(SystemExit):
        cli.main(["bench", "--roofline", "--peers", "mace"])
    assert "leave out --threads, --what and --peers" in capsys.readouterr().err


@pytest.mark.slow
def test_command(tmp_path: Path) -> None:
    require_compiler()
    page = tmp_path / "page.md"
    page.write_text("\n".join(["before", *markers(SECTION), "after"]))
    cli.main(["bench", "--roofline", "--quick", "--systems", "aspirin", "--page", str(page)])
    text = page.read_text()
    assert "mlff bench --roofline --quick --systems 'aspirin'" in text
    rows = [line for line in text.splitlines() if line.startswith("| aspirin")]
    assert len(rows) == 2
    assert all("-" not in row for row in rows)
