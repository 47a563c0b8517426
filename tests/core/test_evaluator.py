"""Every structure that can go wrong: the right number, or an error that names the atom and the way out."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import students
from broken_engines import ORGANIC, ensemble, evaluator, painn
from mlff_engines.checkpoint import Domain
from mlff_engines.errors import ExtrapolationWarning, StructureError
from mlff_engines.evaluator import Evaluator
from mlff_engines.graph import Graph
from mlff_engines.structure import Structure
from mlff_engines.validation.static.parity import reference
from mlff_engines.validation.static.systems import cluster, crystal, isolated

NEAR = {"C-H": 1.0, "H-H": 1.5, "H-O": 0.9}


def strict(outside: str = "error", **options: Any) -> Evaluator:
    """An evaluator with a domain of trained distances and charges."""
    domain = Domain(elements=["H", "C", "O"], min_distances=NEAR, charges=[0.0, 1.0])
    return Evaluator(painn(), domain, ORGANIC.cutoff, dtype=torch.float64, outside=outside, **options)


def pair(r: float, numbers: tuple[int, int] = (6, 1), **more: Any) -> Structure:
    return Structure(np.array(numbers), np.array([[0, 0, 0], [r, 0, 0]]), **more)


@pytest.mark.fault("S1")
def test_unknown_element() -> None:
    structure = replace(cluster(ORGANIC), numbers=np.array([1, 7, 8, 26, 7, 1, 6, 6]))
    with pytest.raises(StructureError, match=r"does not know Fe, N \(atoms 1, 3, 4\); it was trained for H, C, O"):
        evaluator(painn(), ORGANIC)(structure)


@pytest.mark.fault("S1")
def test_many_unknown_atoms_are_counted() -> None:
    structure = cluster(ORGANIC, 30, numbers=[7])
    with pytest.raises(StructureError, match=r"atoms 0, 1, .*9, \.\.\. 30 in all"):
        evaluator(painn(), ORGANIC)(structure)


@pytest.mark.fault("S2")
@pytest.mark.parametrize("make", [painn, ensemble])
def test_one_atom(make: Any) -> None:
    engine = evaluator(make(), ORGANIC)
    for symbol, number in zip(ORGANIC.elements, ORGANIC.numbers, strict=True):
        found = engine(isolated(ORGANIC, number))
        assert found.energy == pytest.approx(ORGANIC.e0[symbol], abs=1e-11)
        assert (found.forces == 0).all()
        assert (found.virial == 0).all()


@pytest.mark.fault("S3")
@pytest.mark.parametrize("make", [painn, ensemble])
@pytest.mark.parametrize("pbc", [False, True])
def test_no_atoms(make: Any, pbc: bool) -> None:
    found = evaluator(make(), ORGANIC)(
        Structure(np.zeros(0, dtype=np.int64), np.zeros((0, 3)), 5 * np.eye(3), np.full(3, pbc))
    )
    assert found.energy == 0
    assert found.forces.shape == (0, 3)
    assert found.energies.shape == (0,)
    assert (found.virial == 0).all()


@pytest.mark.fault("S4")
@pytest.mark.parametrize("distance", [0.0, 1e-9, 5e-4])
@pytest.mark.parametrize("outside", ["warn", "error", "ignore"])
def test_coincident_atoms(distance: float, outside: str) -> None:
    """An error whatever is allowed outside the trained range; also through a boundary."""
    positions = cluster(ORGANIC).positions.copy()
    positions[5] = positions[2] + [distance, 0, 0]
    structure = replace(cluster(ORGANIC), positions=positions)
    with pytest.raises(StructureError, match=r"atoms (2 and 5|5 and 2) coincide: .* Å apart. Move one of them"):
        strict(outside)(structure)
    through = replace(structure, cell=20 * np.eye(3), pbc=np.ones(3, dtype=bool))
    positions = positions.copy()
    positions[5, 2] += 20
    with pytest.raises(StructureError, match="coincide"):
        strict(outside)(replace(through, positions=positions))


@pytest.mark.fault("S5")
def test_below_the_trained_distance() -> None:
    message = (
        r"atoms 0 \(C\) and 1 \(H\) are 0\.800 Å apart; the shortest C-H distance in the training data is 1\.000 Å"
    )
    with pytest.raises(StructureError, match=message):
        strict("error")(pair(0.8))
    engine = strict("warn")
    with pytest.warns(ExtrapolationWarning, match=message):
        found = engine(pair(0.8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert strict("ignore")(pair(0.8)).energy == found.energy
        engine(pair(0.79))  # said once, not at every step
        engine(pair(1.2))
        engine(pair(0.3, (6, 6)))  # a pair of which nothing is known
    with pytest.warns(ExtrapolationWarning, match="O-H"):
        engine(pair(0.8, (8, 1)))


@pytest.mark.fault("S5")
def test_the_worst_pair_is_named() -> None:
    three = Structure(np.array([6, 1, 1]), np.array([[0, 0, 0], [0.95, 0, 0], [0, 0.6, 0]]))
    with pytest.raises(StructureError, match=r"\(H\) and .* \(H\) are 1\.124 Å apart|\(C\) and 2 \(H\) are 0\.600 Å"):
        strict("error")(three)


@pytest.mark.fault("S5")
def test_outside_is_checked_while_a_neighbour_list_is_reused() -> None:
    engine = strict("error", skin=2.0)
    engine(pair(1.1))
    with pytest.raises(StructureError, match=r"0\.900 Å apart"):
        engine(pair(0.9))
    assert engine.neighbors.builds == 1


@pytest.mark.fault("S6")
def test_force_that_is_no_number() -> None:
    class Exploding(nn.Module):
        def forward(self, graph: Graph) -> Graph:
            energy = torch.zeros(len(graph["numbers"]), dtype=torch.float64)
            energy[1] = torch.nan
            return {"node_energy": energy, "edge_gradient": torch.zeros_like(graph["edge_vec"])}

    engine = evaluator(Exploding(), ORGANIC)
    with pytest.raises(StructureError, match=r"not finite on atom 1 \(H\), and on 0 more"):
        engine(pair(1.1))


@pytest.mark.fault("S8", "S14")
def test_cell_smaller_than_the_cutoff() -> None:
    """As its replicas without any boundary that could matter; and as brute force."""
    box = crystal(ORGANIC)
    assert np.linalg.norm(box.cell, axis=1).max() < ORGANIC.cutoff
    found = evaluator(painn(), ORGANIC)(box)
    expected = reference(painn(), ORGANIC.cutoff)(box)
    np.testing.assert_allclose(found.forces, expected.forces, atol=1e-12)
    assert found.energy == pytest.approx(expected.energy, abs=1e-9)


@pytest.mark.fault("S9")
def test_dummy_cell_without_periodicity() -> None:
    engine, molecule = evaluator(painn(), ORGANIC), cluster(ORGANIC)
    expected = engine(molecule)
    for cell in (np.eye(3), 1e-3 * np.ones((3, 3)), np.full((3, 3), np.nan)):
        found = engine(replace(molecule, cell=cell))
        assert (found.forces == expected.forces).all()
        assert found.stress is None


@pytest.mark.fault("S10")
def test_mixed_periodicity_has_no_stress() -> None:
    engine, box = evaluator(painn(), ORGANIC), crystal(ORGANIC)
    full = engine(box)
    assert full.stress is not None
    np.testing.assert_allclose(full.stress, -full.virial / box.volume, rtol=1e-14)
    slab = engine(replace(box, pbc=np.array([True, True, False])))
    assert slab.stress is None
    assert np.abs(slab.virial - full.virial).max() > 1e-3


@pytest.mark.fault("S11")
def test_atoms_outside_the_box() -> None:
    engine, box = evaluator(painn(), ORGANIC), crystal(ORGANIC)
    expected = engine(box)
    shifts = np.random.default_rng(0).integers(-9, 10, (len(box), 3))
    found = engine(replace(box, positions=box.positions + shifts @ box.cell))
    np.testing.assert_allclose(found.forces, expected.forces, atol=1e-11)


@pytest.mark.fault("S12")
@pytest.mark.parametrize("name", ["charge", "spin"])
def test_state_that_the_model_does_not_take(name: str) -> None:
    """Refused, never dropped, whatever `outside` says."""
    domain = Domain(elements=ORGANIC.elements)
    for outside in ("warn", "ignore"):
        engine = Evaluator(painn(), domain, ORGANIC.cutoff, dtype=torch.float64, outside=outside)
        with pytest.raises(StructureError, match=rf"{name} 2 is not supported.*trained at 0\..*model\.{name}: true"):
            engine(replace(cluster(ORGANIC), **{name: 2.0}))


@pytest.mark.fault("S12")
def test_charge_that_was_not_trained() -> None:
    domain = Domain(elements=ORGANIC.elements, charges=[0.0, 1.0])
    options: Any = {"dtype": torch.float64, "takes_charge": True}
    engine = Evaluator(painn(charge=True), domain, ORGANIC.cutoff, **options)
    neutral, cation = (engine(replace(cluster(ORGANIC), charge=q)) for q in (0.0, 1.0))
    assert abs(neutral.energy - cation.energy) > 1e-3
    with pytest.warns(ExtrapolationWarning, match=r"charge -1 was not in the training data \(0, 1\)"):
        engine(replace(cluster(ORGANIC), charge=-1.0))
    with pytest.raises(StructureError, match="charge -1 was not in the training data"):
        Evaluator(painn(charge=True), domain, ORGANIC.cutoff, outside="error", **options)(
            replace(cluster(ORGANIC), charge=-1.0)
        )


@pytest.mark.fault("S12")
def test_a_student_of_ions_alone_refuses_the_neutral_molecule() -> None:
    engine = Evaluator(painn(), Domain(elements=ORGANIC.elements, charges=[1.0]), ORGANIC.cutoff, dtype=torch.float64)
    engine(replace(cluster(ORGANIC), charge=1.0))
    with pytest.raises(StructureError, match=r"charge 0 is not supported.*trained at 1"):
        engine(cluster(ORGANIC))


OUT_OF_MEMORY = """
import resource, sys
import numpy as np
from pathlib import Path
from mlff_engines.artifact import load
from mlff_engines.errors import StructureError
from mlff_engines.structure import Structure
evaluate = load(sys.argv[1], kernel=sys.argv[2]).evaluator(outside="ignore")
def box(side):
    grid = np.stack(np.meshgrid(*[1.5 * np.arange(side)] * 3), -1).reshape(-1, 3).astype(float)
    return Structure(np.full(side**3, 6), grid, 1.5 * side * np.eye(3), np.ones(3))
before = evaluate(box(4)).energy
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
limits = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, limits[1]))
try:
    evaluate(box(14 if sys.argv[2] == "torch" else 20))
except StructureError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, limits)
assert evaluate(box(4)).energy == before  # and it goes on
"""


@pytest.mark.fault("S13")
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to know the memory in use")
@pytest.mark.parametrize(
    ("kernel", "least"),
    [
        ("torch", 3 * 3 * 64 * 8),  # three layers of 3 x 64 numbers in float64 per edge, kept some times over
        ("fused", 10 * 8),  # some numbers per edge and, shared by its many edges, some features per atom
    ],
)
def test_out_of_memory(tmp_path: Path, kernel: str, least: int) -> None:
    """For real: a process that may take 256 MiB more."""
    path = students.artifact(tmp_path, features=64, interactions=3)
    command = [sys.executable, "-c", OUT_OF_MEMORY, str(path), kernel]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "out of memory for " in run.stdout
    needs = re.search(
        r"with (\d+) edges on cpu: it needs about ([\d.]+) GiB, [\d.]+ GiB are free; .* (\d+) atoms", run.stdout
    )
    assert needs, run.stdout
    assert least < float(needs[2]) * 2**30 / int(needs[1]) < 20 * least
    assert "Use a smaller box" in run.stdout


@pytest.mark.fault("S13")
def test_other_failures_are_not_called_memory() -> None:
    class Failing(nn.Module):
        def forward(self, graph: Graph) -> Graph:
            raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        evaluator(Failing(), ORGANIC)(cluster(ORGANIC))


@pytest.mark.fault("S14")
def test_no_edge_is_dropped() -> None:
    """A thousand neighbours each: every pair there is reaches the model."""
    seen = []

    class Counting(nn.Module):
        def forward(self, graph: Graph) -> Graph:
            seen.append(graph["edge_index"].shape[1])
            return painn()(graph)

    atoms = 400
    positions = np.random.default_rng(0).uniform(0, 2.2, (atoms, 3))
    engine = evaluator(Counting(), ORGANIC, skin=0.0)
    engine(Structure(np.ones(atoms), positions))
    assert seen == [atoms * (atoms - 1)]


def test_skin_changes_nothing_but_the_number_of_searches() -> None:
    rng = np.random.default_rng(0)
    reused, anew = evaluator(painn(), ORGANIC, skin=1.0), evaluator(painn(), ORGANIC, skin=0.0)
    structure = crystal(ORGANIC)
    for _ in range(20):
        structure = replace(structure, positions=structure.positions + 0.01 * rng.standard_normal((8, 3)))
        np.testing.assert_allclose(reused(structure).forces, anew(structure).forces, atol=1e-11)
    assert reused.neighbors.builds == 1
    assert anew.neighbors.builds == 20


def test_forces_add_up_to_nothing_in_float32() -> None:
    forces = evaluator(painn(dtype=torch.float32), ORGANIC, torch.float32)(crystal(ORGANIC)).forces
    assert np.abs(forces.sum(0)).max() < 1e-13
    assert np.abs(forces).max() > 1e-2


def test_ensemble_gives_its_uncertainty() -> None:
    found = evaluator(ensemble(), ORGANIC)(crystal(ORGANIC))
    expected = reference(ensemble(), ORGANIC.cutoff)(crystal(ORGANIC))
    assert found.energy_std == pytest.approx(expected.energy_std, rel=1e-8)
    assert found.force_std is not None
    np.testing.assert_allclose(found.force_std, expected.force_std, rtol=1e-10)
    assert evaluator(painn(), ORGANIC)(crystal(ORGANIC)).force_std is None


def test_unknown_option_is_explained() -> None:
    with pytest.raises(StructureError, match="outside='warnn'; did you mean 'warn'"):
        strict("warnn")
