"""The checks pass on right engines and fail on each injected bug; the table of the docs is this test's expectation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import broken_engines
import conformance_page
from broken_engines import (
    BUGS,
    MODELS,
    NOBLE,
    ORGANIC,
    domain_decomposed,
    ensemble,
    evaluator,
    lennard_jones,
    painn,
    trained_painn,
)
from mlff_engines.checkpoint import set_dtype
from mlff_engines.manifest import TOLERANCE
from mlff_engines.neighbors import neighbor_list
from mlff_engines.structure import Structure
from mlff_engines.validation.result import STATIC, TOLERANCES, CheckResult, Worst
from mlff_engines.validation.static.conformance import check_model
from mlff_engines.validation.static.derivatives import check_forces, derivative, richardson
from mlff_engines.validation.static.neighbor_cases import check_neighbors
from mlff_engines.validation.static.parity import check_parity, reference
from mlff_engines.validation.static.systems import cluster, crystal, systems


def failed(results: list[CheckResult]) -> list[CheckResult]:
    return [result for result in results if not result.passed]


@pytest.mark.check("S1", "S2", "S3", "S4", "S5", "S6", "S7", "S8", "S9", "S10")
@pytest.mark.parametrize("model", ["lj", "painn", "charged painn", "ensemble", "trained painn"])
def test_right_models_pass(model: str) -> None:
    options = {}
    if model == "trained painn":
        potential, claims = trained_painn(steps=30)
    elif model == "ensemble":
        potential, claims = ensemble(), ORGANIC
    elif model == "charged painn":
        claims = replace(ORGANIC, charges=(0.0, -1.0), spins=(0.0, 1.0))
        potential, options = painn(charge=True, spin=True), {"takes_charge": True, "takes_spin": True}
    else:
        make, claims = MODELS[model]
        potential = make()
    results = check_model(
        evaluator(potential, claims, **options), claims, reference=reference(potential, claims.cutoff)
    )
    assert [result.code for result in results] == list(STATIC)
    assert failed(results) == []


@pytest.mark.check("S1", "S2", "S3", "S4", "S5", "S6", "S7", "S8", "S9", "S10")
def test_right_float32_model_passes() -> None:
    single = painn(dtype=torch.float32)
    double = painn(dtype=torch.float32)
    set_dtype(double, torch.float64)
    results = check_model(
        evaluator(single, ORGANIC, torch.float32),
        replace(ORGANIC, dtype="float32"),
        reference=reference(single, ORGANIC.cutoff),
        upcast=evaluator(double.eval(), ORGANIC),
    )
    assert [result.code for result in results] == list(STATIC)
    assert failed(results) == []


def test_right_engine_with_ghost_atoms_passes() -> None:
    """The contract's `owned`: explicit images, several layers of messages, forces folded back."""
    results = check_model(
        domain_decomposed(lennard_jones(), NOBLE), NOBLE, reference=reference(lennard_jones(), NOBLE.cutoff)
    )
    assert failed(results) == []
    engine, expected = domain_decomposed(painn(), ORGANIC), reference(painn(), ORGANIC.cutoff)
    assert check_parity(engine, expected, ORGANIC, {"box": crystal(ORGANIC)}).passed


@pytest.mark.check("S1", "S2", "S3", "S4", "S5", "S6", "S7", "S8", "S9", "S10")
@pytest.mark.parametrize(("bug", "model"), [(name, model) for name, bug in BUGS.items() for model in bug.models])
def test_bug_is_caught(bug: str, model: str) -> None:
    make, claims = MODELS[model]
    engine = BUGS[bug].make(make(), claims)
    caught = BUGS[bug].caught.split()
    results = check_model(
        engine.evaluate,
        claims,
        reference=reference(engine.model_is_wrong or make(), claims.cutoff),
        search=engine.search,
        only=caught,
    )
    assert [result.code for result in failed(results)] == caught


def test_a_wrong_model_reproduced_faithfully_passes_parity() -> None:
    """Why parity alone is no judge."""
    potential = lennard_jones()
    engine = broken_engines.truncated_cutoff(potential, NOBLE)
    assert failed(check_model(engine.evaluate, NOBLE, reference=reference(potential, 8.0), only=["S1", "S2"])) == []


def test_ignored_charge_is_caught() -> None:
    claims = replace(ORGANIC, charges=(0.0, -1.0))
    engine = evaluator(painn(charge=True), claims, takes_charge=True)
    [result] = check_model(
        lambda structure: engine(replace(structure, charge=0.0)),
        claims,
        reference=reference(painn(charge=True), claims.cutoff),
        only=["S1"],
    )
    assert not result.passed
    assert "charge -1" in result.detail


def test_every_check_catches_something() -> None:
    assert {code for bug in BUGS.values() for code in bug.caught.split()} == set(STATIC) == set(TOLERANCES)


def test_tolerance_of_parity_is_that_of_the_golden_vectors() -> None:
    assert TOLERANCES["S1"] == TOLERANCE


def test_page_is_up_to_date() -> None:
    assert conformance_page.PAGE.read_text(encoding="utf-8") == conformance_page.page(), (
        "docs/conformance.md is stale: make pages"
    )


def test_an_engine_that_refuses_has_failed() -> None:
    engine = evaluator(painn(), replace(ORGANIC, elements=["H", "C"]))
    results = check_model(engine, ORGANIC, only=["S9"])
    assert not results[0].passed
    assert "does not know O" in results[0].detail


def test_float32_model_needs_its_upcast_for_finite_differences() -> None:
    claims = replace(ORGANIC, dtype="float32")
    results = check_model(evaluator(painn(dtype=torch.float32), claims, torch.float32), claims, only=["S3"])
    assert results == []
    # its own energies decide nothing, and that is no pass
    rough = check_forces(evaluator(painn(dtype=torch.float32), claims, torch.float32), claims, {"c": cluster(claims)})
    assert not rough.passed
    assert "too rough" in rough.detail


def test_richardson_knows_its_uncertainty() -> None:
    slope, uncertainty = richardson(lambda x: np.exp(3 * x), 0.05)
    assert abs(slope - 3) < 5 * uncertainty < 1e-9
    # a kink within the step: less certain, and said so
    slope, uncertainty = richardson(lambda x: np.exp(3 * x) + max(0.0, x - 0.004) ** 2, 0.05)
    assert abs(slope - 3) < 10 * uncertainty
    noise = np.random.default_rng(0)
    slope, uncertainty = richardson(lambda x: np.exp(3 * x) + 1e-6 * noise.standard_normal(), 0.05)
    assert abs(slope - 3) < 10 * uncertainty
    assert uncertainty > 1e-6


def test_stiff_functions_get_smaller_steps() -> None:
    """A student far outside its training: forces of thousands of eV/Å."""

    def stiff(x: float) -> float:
        return float(np.exp(300 * x))

    assert richardson(stiff, 0.02)[1] > 1e-4
    slope, uncertainty = derivative(stiff, 0.02, enough=1e-6)
    assert uncertainty < 1e-6
    assert abs(slope - 300) < 5 * uncertainty
    # enough is enough: no further calls
    calls = []
    derivative(lambda x: calls.append(x) or x, 0.02, enough=1e-3)  # type: ignore[func-returns-value]
    assert len(calls) == 12


def test_not_a_number_never_passes() -> None:
    worst = Worst()
    worst.see(np.nan, "here")
    worst.see(1.0, "there")
    assert worst.judged("S1", "float64").passed is False
    assert worst.detail == "here"


@pytest.mark.check("S8")
@pytest.mark.parametrize("cutoff", [1.5, 3.0, 6.5])
def test_own_search_is_exact(cutoff: float) -> None:
    result = check_neighbors(neighbor_list, cutoff)
    assert result.passed, result


def test_systems_cover_what_they_are_for() -> None:
    claims = replace(ORGANIC, charges=(0.0, 1.0))
    made = systems(claims)
    assert {tuple(s.pbc) for s in made.values()} >= {(False,) * 3, (True,) * 3, (True, True, False)}
    assert made["cluster, charge 1"].charge == 1
    for structure in (made["cluster"], made["triclinic box"]):
        assert set(structure.numbers) == {1, 6, 8}
    heights = made["triclinic box"].volume / np.linalg.norm(np.cross(*made["triclinic box"].cell[:2]))
    assert heights < ORGANIC.cutoff  # the box needs several images
    assert isinstance(made["slab"], Structure)
