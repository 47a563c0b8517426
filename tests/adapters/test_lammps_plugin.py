"""`pair_style mlff`: the numbers of the artifact, whatever box, units and number of ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import decks
import students
from broken_engines import ARGON_KRYPTON, NOBLE, ORGANIC, lennard_jones
from decks import TILTED, Deck, chain, half_empty, water
from mlff_engines.artifact import load
from mlff_engines.checkpoint import Domain, load_checkpoint, save_checkpoint
from mlff_engines.export import export
from mlff_engines.graph import make_graph
from mlff_engines.neighbors import neighbor_list
from mlff_engines.structure import FloatArray, Result, Structure
from mlff_engines.validation.result import Evaluate, deviation
from mlff_engines.validation.static.parity import reference
from mlff_engines.validation.static.systems import cluster, crystal
from requirements import require_engine

require_engine("lammps")

HCO = ("H", "C", "O")
CUTOFF = 4.0


@pytest.fixture
def deck(tmp_path: Path) -> Deck:
    return decks.make_deck(tmp_path)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return students.artifact(tmp_path_factory.mktemp("student"), interactions=3)


@pytest.fixture(scope="module")
def exact(student: Path) -> Evaluate:
    """The eager model in float64 on brute-force neighbours, which shares no code with the plug-in."""
    return reference(load_checkpoint(student.parent / "member-0")[0], CUTOFF)


@pytest.fixture(scope="module")
def argon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("argon")
    domain = Domain(elements=list(NOBLE.elements))
    save_checkpoint(folder / "lj", lennard_jones().model, ARGON_KRYPTON, domain, {"teacher": "none", "frames": {}})
    export([folder / "lj"], folder / "lj.pt", dtype="float64")
    return folder / "lj.pt"


BOXES = {
    "molecule": cluster(ORGANIC, 9),
    "water": water(3),
    "tilted": water(2, shape=TILTED),
    "smaller than the cutoff": crystal(ORGANIC),
    "slab": replace(water(2), pbc=np.array([True, True, False])),
    "wire of atoms far apart": replace(water(2), pbc=np.array([False, False, True]), positions=3 * water(2).positions),
    "one atom": Structure(np.array([6]), np.zeros((1, 3))),
}


def off(found: Result, expected: Result) -> dict[str, float]:
    return deviation(found, expected)


@pytest.mark.fault("L5")
def test_numbers_of_the_eager_model(deck: Deck, student: Path, exact: Evaluate) -> None:
    found = deck.evaluate(f"mlff {student}", list(BOXES.values()), elements=HCO)
    for (name, structure), result in zip(BOXES.items(), found, strict=True):
        deviations = off(result, exact(structure))
        assert max(deviations.values()) < 1e-10, (name, deviations)


@pytest.mark.parametrize(
    ("ranks", "grids"),
    [(2, ["2 1 1", "1 1 2"]), (4, ["2 2 1", "1 4 1"])],
)
def test_every_number_of_ranks(deck: Deck, student: Path, exact: Evaluate, ranks: int, grids: list[str]) -> None:
    structures = [BOXES["tilted"], BOXES["smaller than the cutoff"], half_empty(), chain()]
    for grid in grids:
        found = deck.evaluate(f"mlff {student}", structures, elements=HCO, ranks=ranks, before=f"processors {grid}")
        for number, (structure, result) in enumerate(zip(structures, found, strict=True)):
            deviations = off(result, exact(structure))
            assert max(deviations.values()) < 1e-8, (grid, number, deviations)


@pytest.mark.fault("L7")
def test_ghost_atoms_are_folded(deck: Deck, student: Path) -> None:
    structure = water(3)
    decks.write_data(deck.folder / "w.data", structure, HCO)
    text = f"{decks.start(structure)}\nread_data w.data\npair_style mlff {student}\npair_coeff * * H C O\nrun 0"
    assert f"evaluated {len(structure)} atoms on 1 ranks for {len(structure)} in the box" in deck.log(text)
    log = deck.log(f"comm_modify cutoff 3.0\n{text}", ranks=2)
    assert "ghost cutoff 14 Angstrom (3 layers x 4 + skin 2)" in log
    evaluated = int(log.split("evaluated ")[1].split()[0])
    ghosts = int(log.split("Nghost:")[1].split()[0].split(".")[0])
    # without folding a rank would evaluate its ghosts too: ten times as much
    assert len(structure) < evaluated <= 2 * len(structure) < ghosts


def test_tiled_domains(deck: Deck, student: Path, exact: Evaluate) -> None:
    structure = replace(half_empty(), pbc=np.zeros(3, dtype=bool))
    decks.write_data(deck.folder / "w.data", structure, HCO)
    deck.log(
        f"""{decks.start(structure)}
comm_style tiled
read_data w.data
balance 1.0 rcb
pair_style mlff {student}
pair_coeff * * H C O
dump d all custom 1 0.dump id fx fy fz
dump_modify d sort id format float %.17g
run 0""",
        ranks=2,
    )
    forces = np.loadtxt(deck.folder / "0.dump", skiprows=9)[:, 1:]
    assert np.abs(forces - exact(structure).forces).max() < 1e-8


def test_precision_is_the_artifacts_or_the_one_asked_for(deck: Deck, student: Path, exact: Evaluate) -> None:
    single = students.artifact(deck.folder / "single", dtype="float32", interactions=3)
    structure = BOXES["tilted"]
    (found,) = deck.evaluate(f"mlff {single}", [structure], elements=HCO)
    assert 1e-9 < max(off(found, exact(structure)).values()) < 5e-5
    expected = load(single, dtype="float64").evaluator(skin=0.0)(structure)
    (found,) = deck.evaluate(f"mlff {single} dtype float64 threads 2", [structure], elements=HCO)
    assert max(off(found, expected).values()) < 1e-10
    (found,) = deck.evaluate(f"mlff {student} dtype float32", [structure], elements=HCO)
    assert 1e-9 < max(off(found, exact(structure)).values()) < 5e-5


def test_metal_and_real_units(deck: Deck, student: Path, exact: Evaluate) -> None:
    structure = BOXES["tilted"]
    (found,) = deck.evaluate(f"mlff {student}", [structure], elements=HCO, units="real")
    assert max(off(found, exact(structure)).values()) < 1e-10


def test_order_and_subset_of_elements(deck: Deck, student: Path, exact: Evaluate) -> None:
    structure = water(2)
    (found,) = deck.evaluate(f"mlff {student}", [structure], elements=("O", "H"))
    assert max(off(found, exact(structure)).values()) < 1e-10


def test_charge_and_spin_reach_the_model(deck: Deck) -> None:
    domain = Domain(elements=list(HCO), charges=[0.0, 1.0], spins=[0.0])
    student = students.artifact(deck.folder / "charged", charge=True, spin=True, domain=domain)
    exact = reference(load_checkpoint(student.parent / "member-0")[0], CUTOFF)
    structure = replace(water(1, shape=4 * np.eye(3)), charge=1.0, spin=2.0)
    (found,) = deck.evaluate(f"mlff {student} charge 1 spin 2", [structure], elements=HCO, ranks=2)
    assert max(off(found, exact(structure)).values()) < 1e-10
    assert abs(found.energy - exact(replace(structure, charge=0.0, spin=0.0)).energy) > 1e-3
    assert "spin 2 was not in the training data (0): the model extrapolates" in (deck.folder / "log.lammps").read_text()


def test_virial_of_each_atom(deck: Deck, student: Path) -> None:
    """Half of each edge's virial goes to either end."""
    structure = BOXES["tilted"]
    deck.evaluate(f"mlff {student}", [structure], elements=HCO)
    found = -np.loadtxt(deck.folder / "0.dump", skiprows=9)[:, 5:] / decks.NKTV2P["metal"]
    index, vectors = neighbor_list(structure.positions, structure.cell, structure.pbc, CUTOFF)
    graph = make_graph(torch.from_numpy(structure.numbers), torch.from_numpy(index), torch.from_numpy(vectors))
    gradients = load(student)(graph)["edge_gradient"].numpy()
    outer = -0.5 * vectors[:, :, None] * gradients[:, None, :]
    expected = np.zeros((len(structure), 3, 3))
    for end in index:
        np.add.at(expected, end, outer)
    for column, (a, b) in enumerate([(0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2)]):
        assert np.allclose(found[:, column], (expected[:, a, b] + expected[:, b, a]) / 2, atol=1e-10)


def argon_crystal(seed: int = 0) -> Structure:
    """32 atoms of argon and krypton, face-centred cubic."""
    basis = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    cells = np.stack(np.meshgrid(*[np.arange(2)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    positions = 5.4 * (cells[:, None] + basis).reshape(-1, 3)
    positions += np.random.default_rng(seed).uniform(-0.1, 0.1, positions.shape)
    return Structure(np.tile([18, 18, 36, 18], 8), positions, 10.8 * np.eye(3), np.ones(3, dtype=bool))


def test_equals_lj_cut(deck: Deck, argon: Path) -> None:
    """Below the switching distance the artifact is LAMMPS' own Lennard-Jones, for 100 steps of dynamics."""
    structure = Structure(np.array([18, 36, 36, 18]), 3.7 * np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]))
    decks.write_data(deck.folder / "a.data", structure, NOBLE.elements)
    ends = {}
    for name, style in {
        "mlff": f"pair_style mlff {argon}\npair_coeff * * Ar Kr",
        "lj": "pair_style lj/cut 8.0\npair_modify mix arithmetic\n"
        "pair_coeff 1 1 0.0103 3.4\npair_coeff 2 2 0.0141 3.65",
    }.items():
        deck.log(
            f"""{decks.start(structure)}
read_data a.data
{style}
velocity all create 20 1
fix 1 all nve
timestep 0.002
run 100
write_dump all custom {name}.dump id x y z fx fy fz modify sort id format float %.17g
print "$(pe:%.17g)" file {name}.txt"""
        )
        ends[name] = np.loadtxt(deck.folder / f"{name}.dump", skiprows=9)
    assert np.abs(ends["lj"][:, 4:]).max() > 1e-3
    assert np.abs(ends["mlff"] - ends["lj"]).max() < 1e-12
    energies = [float((deck.folder / f"{name}.txt").read_text()) for name in ("mlff", "lj")]
    e0 = sum(NOBLE.e0[symbol] for symbol in ("Ar", "Kr")) * 2
    assert energies[0] - e0 == pytest.approx(energies[1], abs=1e-9)


def nve(deck: Deck, argon: Path, *, dt: float, steps: int, skin: float = 0.5, ranks: int = 1) -> FloatArray:
    """Total energies of every step; the last positions are in end.dump."""
    structure = argon_crystal()
    decks.write_data(deck.folder / "a.data", structure, NOBLE.elements)
    log = deck.log(
        f"""{decks.start(structure)}
read_data a.data
pair_style mlff {argon}
pair_coeff * * Ar Kr
neighbor {skin} bin
velocity all create 60 1
fix 1 all nve
timestep {dt}
thermo_style custom step etotal
thermo_modify format float %.12g
thermo 1
run {steps}
write_dump all custom end.dump id xu yu zu modify sort id format float %.17g""",
        ranks=ranks,
    )
    assert "Dangerous builds = 0" in log
    return decks.thermo(log)["TotEng"]


def test_energy_is_conserved(deck: Deck, argon: Path) -> None:
    """Its fluctuation falls with the square of the time step; the list is rebuilt on the way, atoms change ranks."""
    coarse = nve(deck, argon, dt=0.008, steps=125)
    fine = nve(deck, argon, dt=0.004, steps=250)
    assert 3.5 < coarse.std() / fine.std() < 4.5
    end = np.loadtxt(deck.folder / "end.dump", skiprows=9)
    for options in ({"skin": 2.0}, {"ranks": 2, "skin": 0.3}):
        again = nve(deck, argon, dt=0.004, steps=250, **options)  # type: ignore[arg-type]
        assert np.abs(again - fine).max() < 1e-8
        assert np.abs(np.loadtxt(deck.folder / "end.dump", skiprows=9) - end).max() < 1e-6


MOVING = """velocity all create 300 7
fix 1 all nve
timestep 0.0002
thermo_modify format float %.17g
"""


@pytest.fixture
def small(deck: Deck, student: Path) -> str:
    """The head of an input with 24 atoms of water."""
    structure = water(2)
    decks.write_data(deck.folder / "w.data", structure, HCO)
    return f"{decks.start(structure)}\nread_data w.data\npair_style mlff {student}\npair_coeff * * H C O\n"


def test_restart_goes_on_as_if_never_stopped(deck: Deck, small: str, student: Path) -> None:
    ending = "write_dump all custom {}.dump id xu yu zu vx vy vz modify sort id format float %.17g"
    deck.log(f"{small}{MOVING}run 10\nwrite_restart half.restart\nrun 10\n{ending.format('whole')}")
    deck.log(
        f"""read_restart half.restart
pair_style mlff {student}
pair_coeff * * H C O
fix 1 all nve
timestep 0.0002
run 10
{ending.format("again")}"""
    )
    whole, again = ((deck.folder / f"{name}.dump").read_text() for name in ("whole", "again"))
    assert whole == again


def test_rerun_gives_the_energies_of_the_run(deck: Deck, small: str) -> None:
    pe = "thermo_style custom step pe\nthermo_modify format float %.17g\n"
    dump = "dump d all custom 2 t.dump id type x y z ix iy iz\ndump_modify d sort id format float %.17g\n"
    first = decks.thermo(deck.log(f"{small}{MOVING}{pe}thermo 2\n{dump}run 10"))
    again = decks.thermo(deck.log(f"{small}{pe}thermo 2\nrerun t.dump dump x y z ix iy iz box yes format native"))
    assert len(again["PotEng"]) == 6
    assert np.allclose(again["PotEng"], first["PotEng"], rtol=0, atol=1e-9)


def test_minimisation_and_box_relaxation(deck: Deck, argon: Path) -> None:
    tight = argon_crystal()
    structure = replace(tight, positions=1.04 * tight.positions, cell=1.04 * tight.cell)
    decks.write_data(deck.folder / "a.data", structure, NOBLE.elements)
    log = deck.log(
        f"""{decks.start(structure)}
read_data a.data
pair_style mlff {argon}
pair_coeff * * Ar Kr
thermo_style custom step pe fnorm press vol
thermo_modify format float %.12g
thermo 1000
minimize 0 1e-6 500 5000
fix 1 all box/relax iso 0.0
minimize 0 1e-4 500 5000"""
    )
    table = decks.thermo(log)
    start, fixed, *_, relaxed = zip(*table.values(), strict=True)
    assert fixed[1] < start[1] - 0.01
    assert fixed[2] < 1e-3 < start[2]
    assert relaxed[1] < fixed[1] - 1e-3
    assert abs(relaxed[3]) < 20 < 200 < abs(fixed[3])


@pytest.mark.parametrize("ranks", [1, 2])
def test_overlay_with_dispersion(deck: Deck, student: Path, exact: Evaluate, ranks: int) -> None:
    """D3 alone and D3 beside the artifact differ by the artifact."""
    structure, d3 = BOXES["tilted"], "dispersion/d3 original pbe 9.0 7.0"
    coeff = "pair_coeff * * dispersion/d3 H C O"
    (alone,) = deck.evaluate(f"hybrid/overlay {d3}", [structure], elements=HCO, ranks=ranks, coeffs=[coeff])
    (both,) = deck.evaluate(
        f"hybrid/overlay mlff {student} {d3}",
        [structure],
        elements=HCO,
        ranks=ranks,
        coeffs=["pair_coeff * * mlff H C O", coeff],
    )
    artifact = Result(
        both.energy - alone.energy,
        both.energies - alone.energies,
        both.forces - alone.forces,
        both.virial - alone.virial,
    )
    assert np.abs(alone.forces).max() > 1e-3
    assert max(off(artifact, exact(structure)).values()) < 1e-8


@pytest.mark.fault("L4")
@pytest.mark.parametrize("ranks", [1, 4])
def test_unmapped_types_of_an_overlay_are_not_seen(deck: Deck, student: Path, exact: Evaluate, ranks: int) -> None:
    """Water as an artifact, argon in one end of the box as a classical pair style; some ranks hold argon alone."""
    molecules = half_empty()
    rng = np.random.default_rng(0)
    gas = np.stack(np.meshgrid([1.0, 4.0], [1.0, 4.0], [12.0, 20.0, 28.0]), axis=-1).reshape(-1, 3)
    gas += rng.uniform(-0.2, 0.2, gas.shape)
    # and one argon atom among the molecules
    positions = np.concatenate([molecules.positions, gas, [[1.5, 1.5, 1.5]]])
    numbers = np.concatenate([molecules.numbers, np.full(len(gas) + 1, 18)])
    structure = replace(molecules, numbers=numbers, positions=positions)
    (found,) = deck.evaluate(
        f"hybrid/overlay mlff {student} lj/cut 3.0",
        [structure],
        elements=("H", "C", "O", "Ar"),
        ranks=ranks,
        before="processors 1 1 *",
        coeffs=["pair_coeff * * mlff H C O NULL", "pair_coeff * 4 lj/cut 0.0 1.0"],
    )
    expected = exact(molecules)
    n = len(molecules)
    assert max(off(replace(found, energies=found.energies[:n], forces=found.forces[:n]), expected).values()) < 1e-8
    assert np.abs(found.forces[n:]).max() == 0


def test_overlay_with_coulomb(deck: Deck, student: Path, exact: Evaluate) -> None:
    """With a k-space solver, on two ranks."""
    structure, forces = BOXES["water"], {}
    for name, (style, coeff) in {
        "alone": ("hybrid/overlay coul/long 4.0", ""),
        "both": (f"hybrid/overlay mlff {student} coul/long 4.0", "pair_coeff * * mlff H C O"),
    }.items():
        deck.log(
            f"""units metal
atom_style charge
read_data {charged(deck, structure)}
pair_style {style}
{coeff}
pair_coeff * * coul/long
kspace_style ewald 1e-8
dump d all custom 1 {name}.dump id fx fy fz
dump_modify d sort id format float %.17g
run 0""",
            ranks=2,
        )
        forces[name] = np.loadtxt(deck.folder / f"{name}.dump", skiprows=9)[:, 1:]
    assert np.abs(forces["alone"]).max() > 0.1
    assert np.abs(forces["both"] - forces["alone"] - exact(structure).forces).max() < 1e-8


def charged(deck: Deck, structure: Structure) -> str:
    """A data file of atom style charge."""
    decks.write_data(deck.folder / "w.data", structure, HCO)
    head, atoms = (deck.folder / "w.data").read_text().split("Atoms # atomic\n\n")
    lines = []
    for line in atoms.splitlines():
        tag, kind, *xyz = line.split()
        lines.append(" ".join([tag, kind, {"1": "0.4", "2": "0.0", "3": "-0.8"}[kind], *xyz]))
    (deck.folder / "q.data").write_text(f"{head}Atoms # charge\n\n" + "\n".join(lines) + "\n")
    return "q.data"


def test_plugin_survives_clear_and_unload(deck: Deck, small: str) -> None:
    again = f"plugin unload pair mlff\nplugin load {deck.plugin}\nclear\n{small}run 0\nplugin unload pair mlff"
    energies = decks.thermo(deck.log(f"{small}run 0\nclear\n{small}run 0\n{again}"))["TotEng"]
    assert len(energies) == 3
    assert len(set(energies)) == 1


def test_every_clear_gets_the_artifact_that_it_names(deck: Deck, student: Path) -> None:
    """The one loaded last is kept, and must not be taken for another or for another precision of itself."""
    decks.write_data(deck.folder / "w.data", water(2), HCO)
    other = students.artifact(deck.folder / "other", features=8)
    runs = [
        f"clear\n{decks.start(water(2))}\nread_data w.data\npair_style mlff {style}\npair_coeff * * H C O\n"
        "thermo_modify format float %.17g\nrun 0"
        for style in (student, student, other, f"{student} dtype float32", student)
    ]
    energies = decks.thermo(deck.log("\n".join(runs)))["TotEng"]
    assert energies[0] == energies[1] == energies[4]
    assert len(set(energies)) == 3
