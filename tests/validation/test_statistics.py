"""Processes with known answers: autoregressive series, and distribution functions whose bins depend on each other."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats
from scipy.signal import lfilter

from mlff_engines.validation.dynamics import statistics
from mlff_engines.validation.dynamics.statistics import (
    Difference,
    autocorrelation_time,
    block_count,
    block_means,
    compare_means,
    compare_profiles,
    critical,
    effective_samples,
    equilibrated,
)

REPLICAS = 4


def autoregressive(length: int, tau: float, seed: int | np.random.Generator, replicas: int = REPLICAS) -> Any:
    """Unit variance; ρ(k) = φ^k, so that τ = (1 + φ) / (1 - φ) / 2. From equilibrium."""
    rng = np.random.default_rng(seed)
    phi = (2 * tau - 1) / (2 * tau + 1)
    noise = rng.standard_normal((replicas, length)) * math.sqrt(1 - phi**2)
    noise[:, 0] /= math.sqrt(1 - phi**2)
    return lfilter([1.0], [1.0, -phi], noise, axis=1)


@pytest.mark.parametrize("tau", [0.5, 3.0, 20.0])
def test_autocorrelation_time_is_the_known_one(tau: float) -> None:
    series = autoregressive(40_000, tau, 1)
    assert autocorrelation_time(series) == pytest.approx(tau, rel=0.1)
    assert effective_samples(series) == pytest.approx(160_000 / (2 * tau), rel=0.1)


def test_autocorrelation_time_is_that_of_pymbar() -> None:
    from mlff_engines.validation.dynamics.temperatures import _physical_validation

    _physical_validation()  # silences its advice
    from pymbar.timeseries import statistical_inefficiency_multiple

    series = autoregressive(10_000, 8.0, 2)
    assert 2 * autocorrelation_time(series) == pytest.approx(statistical_inefficiency_multiple(series), rel=0.1)


def test_a_constant_has_no_samples() -> None:
    for constant in (np.zeros((4, 100)), np.full((4, 100), -75020.3)):
        assert effective_samples(constant) == 0


def test_replicas_that_disagree_are_worth_little() -> None:
    """Each stuck in a valley of its own, which no replica alone can tell."""
    stuck = autoregressive(5000, 2.0, 3) + np.array([[-1.0], [1.0], [-1.0], [1.0]])
    assert effective_samples(stuck[:1]) > 1000
    assert effective_samples(stuck) < statistics.LEAST_SAMPLES


def test_equilibration_is_found() -> None:
    series = autoregressive(4000, 5.0, 4)
    assert equilibrated(series) <= 200
    relaxing = series + 8 * np.exp(-np.arange(4000) / 150)
    assert 400 <= equilibrated(relaxing) <= 1200
    assert equilibrated(series + np.linspace(0, 10, 4000)) == 2000


def test_blocks_end_where_the_series_ends() -> None:
    series = np.arange(2 * 11 * 3, dtype=float).reshape(2, 11, 3)
    means = block_means(series, 2)
    assert means.shape == (2, 2, 3)
    np.testing.assert_allclose(means[1, 1], series[1, 6:].mean(axis=0))
    assert block_count(1000, 5.0) == 20
    assert block_count(240, 2.0) == 12
    assert block_count(99, 10.0) == 0


def test_three_sigma_for_all_tests_together() -> None:
    assert critical(1) == pytest.approx(3.0)
    assert 4 * stats.norm.sf(critical(4)) == pytest.approx(stats.norm.sf(3.0))
    assert critical(4, 30) > critical(4, 300) > critical(4)


@pytest.mark.parametrize(
    ("value", "error", "bound", "verdict"),
    [
        (0.05, 0.05, 0.0, "pass"),
        (0.15, 0.05, 0.0, "inconclusive"),  # may be more than the margin
        (0.0, 0.15, 0.0, "inconclusive"),  # nothing is known
        (0.16, 0.05, 0.0, "fail"),
        (0.16, 0.05, 0.08, "inconclusive"),  # integrators may do that
        (0.05, 0.01, 0.0, "fail"),  # small, but real
        (0.05, 0.01, 0.05, "pass"),
        (np.nan, 0.01, 0.0, "fail"),
        (0.01, 0.0, 0.0, "fail"),
        (0.0, 0.0, 0.0, "pass"),
    ],
)
def test_verdicts(value: float, error: float, bound: float, verdict: str) -> None:
    assert Difference("x", "eV", value, error, margin=0.2, bound=bound).verdict(1) == verdict


@pytest.mark.parametrize("length", [300, 2400])
def test_error_rates_of_means(length: int) -> None:
    """Whatever the amount of data: right models fail at 3 sigma, models off by the margin hardly ever pass."""
    rng, trials, margin = np.random.default_rng(5), 1000, 0.2
    verdicts: dict[float, list[str]] = {0.0: [], margin: []}
    for _ in range(trials):
        first, second = autoregressive(length, 3.0, rng), autoregressive(length, 3.0, rng)
        blocks = block_count(length, 3.0)
        for shift, found in verdicts.items():
            found.append(compare_means(first + shift, second, blocks, margin, name="x", unit="eV").verdict(1))
    # one in a hundred times would the stated rate show more than this
    assert verdicts[0.0].count("fail") <= stats.binom.isf(0.01, trials, 2 * stats.norm.sf(3.0))
    assert verdicts[margin].count("pass") <= stats.binom.isf(0.01, trials, stats.norm.sf(2.0))
    if length == 2400:  # enough data
        assert verdicts[0.0].count("pass") > 0.9 * trials
        assert verdicts[margin].count("fail") > 0.5 * trials


# ---------------------------------------------------------------- distribution functions

BINS = 40


def profiles(
    seed: int, replicas: int = REPLICAS, blocks: int = 10, noise: float = 0.02, slow: float = 0.0, shift: float = 0.0
) -> Any:
    """Blocks of two kinds of g(r), bins correlated over some neighbours; `slow` noise differs between replicas only."""
    rng, x = np.random.default_rng(seed), np.arange(BINS)
    smooth = np.exp(-0.5 * ((x[:, None] - x) / 2.0) ** 2)
    smooth /= np.linalg.norm(smooth, axis=0)
    made = {}
    for kind, mean in (("A-A", 1 + 0.8 * np.sin(x / 5)), ("A-B", np.full(BINS, 1.2))):
        fast = rng.standard_normal((replicas, blocks, BINS)) @ smooth
        still = rng.standard_normal((replicas, 1, BINS)) @ smooth
        made[kind] = mean * (1 + shift * np.cos(x / 3)) + noise * fast + slow * still
    made["A-A"][..., :5] = 0.0  # the core of the atoms
    return made


def compared(a: Any, b: Any, bound: float = 0.0) -> Any:
    return compare_profiles(a, b, {kind: np.full(BINS, bound) for kind in a}, missed=0.02)


def test_probability_of_a_right_model_is_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "PERMUTATIONS", 500)
    found = [compared(profiles(2 * seed), profiles(2 * seed + 1)) for seed in range(100)]
    levels = [result.level for result in found]
    # a bit above uniform, because slow motions are only ever added
    assert stats.kstest(levels, "uniform", alternative="greater").pvalue > 0.01
    assert np.mean(levels) < 0.65
    assert [result.verdict(1, 0.02) for result in found].count("pass") >= 85
    assert np.mean([kind.rms_z for result in found for kind in result.kinds.values()]) == pytest.approx(1.0, abs=0.1)
    assert np.mean([kind.error / kind.floor for r in found for kind in r.kinds.values()]) == pytest.approx(1.0, abs=0.1)


def test_right_and_wrong_profiles() -> None:
    right = profiles(0)
    assert compared(profiles(1), right).verdict(4, 0.02) == "pass"
    assert not compared(profiles(1), right).kinds["A-A"].bins[:5].any()
    wrong = compared(profiles(1, shift=0.01), right)
    assert wrong.verdict(4, 0.02) == "fail"
    assert wrong.kinds["A-B"].rms < 0.1  # a threshold for it would let it pass
    assert compared(profiles(1, shift=0.01), right, bound=0.02).verdict(4, 0.02) == "pass"


def test_a_wrong_pair_is_not_drowned_by_right_ones() -> None:
    a, b = profiles(1), profiles(0)
    a["A-B"] = profiles(1, shift=0.02)["A-B"]
    for n in range(8):
        a[f"C-{n}"], b[f"C-{n}"] = profiles(10 + n)["A-A"], profiles(20 + n)["A-A"]
    assert compared(a, b).verdict(4, 0.02) == "fail"


def test_atoms_where_none_should_be_are_seen() -> None:
    wrong = profiles(1)
    wrong["A-A"][..., 3:5] = 0.02 + 0.002 * np.random.default_rng(0).standard_normal(wrong["A-A"][..., 3:5].shape)
    assert compared(wrong, profiles(0)).verdict(4, 0.02) == "fail"


def test_too_little_data_for_profiles_is_no_pass() -> None:
    assert compared(profiles(1, noise=0.4), profiles(0, noise=0.4)).verdict(4, 0.02) == "inconclusive"


def test_slow_motions_raise_no_alarm() -> None:
    """Replicas that differ more than their blocks say: taken for blocks alone, all of these would fail."""
    found = [compared(profiles(2 * s, slow=0.04), profiles(2 * s + 1, slow=0.04)) for s in range(10)]
    assert [result.verdict(4, 1.0) for result in found].count("fail") == 0
    assert min(result.correlated for result in found) > 10
    assert max(result.blocks for result in found) < statistics.LEAST_BLOCKS


def test_no_pairs_no_verdict() -> None:
    assert compare_profiles({}, {}, {}, 0.1).kinds == {}
