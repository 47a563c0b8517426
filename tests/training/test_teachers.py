from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.lj import LennardJones
from tblite.ase import TBLite

from mlff_engines.config import parse
from mlff_engines.errors import ConfigError, StructureError, TeacherError
from mlff_engines.foreign import environments
from mlff_training.teachers.calculator import TeacherCalculator, checked, hessian_row
from mlff_training.teachers.config import TeacherConfig
from mlff_training.teachers.make import make_teacher
from mlff_training.teachers.remote import RemoteCalculator, TeacherLost
from mlff_training.teachers.table import TEACHERS

HERE = Path(sys.executable)
TROUBLE = Atoms("He2", positions=[[101, 0, 0], [0, 0, 3]])
CALM = Atoms("He2", positions=[[0, 0, 0], [0, 0, 3]])


@pytest.fixture(autouse=True)
def _toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.fixture(params=["here", "behind a pipe"])
def python(request: pytest.FixtureRequest) -> Path | None:
    return None if request.param == "here" else HERE


@pytest.fixture
def opened() -> Iterator[list[TeacherCalculator]]:
    calculators: list[TeacherCalculator] = []
    yield calculators
    for calculator in calculators:
        calculator.close()


def toy(**settings: object) -> TeacherConfig:
    options = {key: settings.pop(key) for key in ("k", "log", "seconds", "trouble", "anchor") if key in settings}
    return TeacherConfig.model_validate({"name": "toy_teachers:Springs", "options": options, **settings})


def make(config: TeacherConfig, opened: list[TeacherCalculator]) -> TeacherCalculator:
    opened.append(make_teacher(config))
    return opened[-1]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # a zombie whose parent has not yet asked is dead too
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def gone(pid: int, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


@pytest.mark.fault("M4")
def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown teacher 'gfn2_xtb'; did you mean 'gfn2-xtb'"):
        parse(TeacherConfig, {"name": "gfn2_xtb"}, "config.yaml")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "mace"}, "needs the options .'model_paths'."),
        ({"charge": "somehow"}, "expected info:KEY"),
        ({"optons": {}}, "did you mean 'options'"),
    ],
)
def test_bad_configuration(given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(TeacherConfig, given, "config.yaml")


@pytest.mark.fault("M6")
def test_missing_package_names_the_install_line(python: Path | None) -> None:
    config = TeacherConfig(name="absent_package.sub:Calculator", python=python)
    with pytest.raises(TeacherError, match=r"not installed.*python.* -m pip install absent_package"):
        make_teacher(config)


def test_every_row_of_the_table_says_how_to_install_it() -> None:
    for name, spec in TEACHERS.items():
        assert ":" in spec.path, name
        assert spec.install, name
        assert spec.description, name


def test_missing_interpreter() -> None:
    with pytest.raises(TeacherError, match=r"cannot start /nowhere/python.*interpreter"):
        make_teacher(TeacherConfig(name="emt", python=Path("/nowhere/python")))


def test_wrong_options_are_explained(python: Path | None) -> None:
    with pytest.raises(TeacherError, match=r"cannot make the teacher toy_teachers:Springs.*kk"):
        make_teacher(TeacherConfig(name="toy_teachers:Springs", options={"kk": 1}, python=python))


@pytest.mark.parametrize("name", ["gfn2-xtb", "gfn1-xtb"])
def test_charge_and_multiplicity_reach_tblite(name: str, python: Path | None, opened: list[TeacherCalculator]) -> None:
    calculator = make(TeacherConfig(name=name, python=python), opened)
    method = {"gfn2-xtb": "GFN2-xTB", "gfn1-xtb": "GFN1-xTB"}[name]
    energies = set()
    for charge, multiplicity in ((0, 1), (1, 2), (0, 3), (-1, 2), (0, 1)):
        atoms = molecule("H2O")
        reference = TBLite(method=method, charge=charge, multiplicity=multiplicity, verbosity=0)
        expected = reference.get_property("energy", atoms), reference.get_property("forces", atoms)
        atoms.info.update(charge=charge, multiplicity=multiplicity)
        atoms.calc = calculator
        assert atoms.get_potential_energy() == pytest.approx(expected[0], abs=1e-6)
        np.testing.assert_allclose(atoms.get_forces(), expected[1], atol=1e-5)
        np.testing.assert_allclose(calculator.results["energies"].sum(), expected[0], atol=1e-6)
        energies.add(round(expected[0], 3))
    assert len(energies) == 4


def test_charge_changed_in_place_is_noticed(opened: list[TeacherCalculator]) -> None:
    atoms = molecule("H2O")
    atoms.calc = make(TeacherConfig(), opened)
    neutral = atoms.get_potential_energy()
    atoms.info.update(charge=-1, multiplicity=2)
    assert abs(atoms.get_potential_energy() - neutral) > 1


@pytest.mark.fault("S12")
@pytest.mark.parametrize("info", [{"charge": 1}, {"multiplicity": 3}])
def test_teacher_without_charge_refuses_it(info: dict[str, float], opened: list[TeacherCalculator]) -> None:
    atoms = bulk("Cu")
    atoms.info.update(info)
    atoms.calc = make(TeacherConfig(name="emt"), opened)
    with pytest.raises(StructureError, match=rf"Cu has {next(iter(info))} \d, which the teacher emt cannot use"):
        atoms.get_potential_energy()


@pytest.mark.fault("S12")
def test_impossible_spin_state_is_refused(opened: list[TeacherCalculator]) -> None:
    atoms = molecule("H2O")
    atoms.info["charge"] = 1  # tblite itself would silently go on with half an orbital
    atoms.calc = make(TeacherConfig(), opened)
    with pytest.raises(StructureError, match=r"9 electrons, which cannot have multiplicity 1.*= 2"):
        atoms.get_potential_energy()


def test_own_way_of_passing_charge_and_spin(python: Path | None, opened: list[TeacherCalculator]) -> None:
    config = TeacherConfig(name="toy_teachers:Charged", charge="info:q", multiplicity="info:s=S", python=python)
    calculator = make(config, opened)
    for charge, multiplicity, expected in ((0, 1, 0.0), (1, 2, 10.5), (0, 3, 1.0)):
        atoms = CALM.copy()
        atoms.info.update(charge=charge, multiplicity=multiplicity)
        assert calculator.get_property("energy", atoms) == expected


def test_chatter_does_not_reach_the_channel(opened: list[TeacherCalculator]) -> None:
    calculator = make(toy(k=2.0, python=HERE), opened)
    for x in (1.0, 2.0, 3.0):
        atoms = Atoms("He", positions=[[x, 0, 0]])
        assert calculator.get_property("energy", atoms) == x**2
        np.testing.assert_array_equal(calculator.get_property("forces", atoms), [[-2 * x, 0, 0]])


def test_nested_options(opened: list[TeacherCalculator]) -> None:
    option = {"call": "toy_teachers:stiff", "options": {"k": 3.0}}
    calculator = make(toy(k=option, python=HERE), opened)
    assert calculator.get_property("energy", Atoms("He", positions=[[1, 0, 0]])) == 15.0


def test_death_is_told_with_its_last_words_and_survived(opened: list[TeacherCalculator]) -> None:
    calculator = make(toy(trouble="exit", python=HERE), opened)
    with pytest.raises(TeacherLost, match=r"He2: its process died \(exit code 3\)(.|\n)*out of cheese"):
        calculator.get_property("energy", TROUBLE)
    assert calculator.get_property("energy", CALM) == 4.5


def test_kill_is_told(opened: list[TeacherCalculator]) -> None:
    calculator = make(toy(python=HERE), opened)
    assert isinstance(calculator, RemoteCalculator)
    assert calculator._process is not None
    os.kill(calculator._process.pid, signal.SIGKILL)
    with pytest.raises(TeacherLost, match="SIGKILL"):
        calculator.get_property("energy", CALM)


def test_timeout_ends_the_child(tmp_path: Path, opened: list[TeacherCalculator]) -> None:
    log = tmp_path / "log"
    calculator = make(toy(trouble="hang", python=HERE, timeout=2.0, log=str(log)), opened)
    with pytest.raises(TeacherLost, match="no answer within 2 s"):
        calculator.get_property("energy", TROUBLE)
    assert gone(int(log.read_text().split()[0]))


@pytest.mark.fault("T4")
def test_not_finite_is_refused(python: Path | None, opened: list[TeacherCalculator]) -> None:
    calculator = make(toy(trouble="nan", python=python), opened)
    with pytest.raises(TeacherError, match="forces is not finite"):
        calculator.get_property("energy", TROUBLE)
    assert calculator.get_property("energy", CALM) == 4.5


def test_failed_scf_is_told_and_forgotten(python: Path | None, opened: list[TeacherCalculator]) -> None:
    ethanol, water = molecule("CH3CH2OH"), molecule("H2O")
    calculator = make(TeacherConfig(options={"max_iterations": 8}, python=python), opened)
    with pytest.raises(TeacherError, match="SCF not converged in 8 cycles"):
        calculator.get_property("energy", ethanol)
    assert calculator.get_property("energy", Atoms("He")) == pytest.approx(
        TBLite(method="GFN2-xTB", verbosity=0).get_property("energy", Atoms("He")), abs=1e-6
    )
    assert len(water) == 3


def test_no_forces_no_teacher(opened: list[TeacherCalculator]) -> None:
    calculator = make(TeacherConfig(name="toy_teachers:Lesser"), opened)
    with pytest.raises(TeacherError, match="no forces"):
        calculator.get_property("energy", CALM)


def test_energies_must_add_up(opened: list[TeacherCalculator]) -> None:
    calculator = make(TeacherConfig(name="toy_teachers:Committee"), opened)
    calculator.get_property("energy", CALM)
    assert "energies" not in calculator.results


def test_close_and_garbage_collection_kill_the_child() -> None:
    first, second = RemoteCalculator(toy()), RemoteCalculator(toy())
    assert first._process is not None
    assert second._process is not None
    pids = first._process.pid, second._process.pid
    first.close()
    del second
    gc.collect()
    assert all(gone(pid) for pid in pids)
    with pytest.raises(TeacherLost, match="closed"):
        first.get_property("energy", CALM)


def test_killed_parent_leaves_no_orphan(tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from ase import Atoms
        from mlff_training.teachers.remote import RemoteCalculator
        from mlff_training.teachers.config import TeacherConfig
        options = {{"log": {str(log)!r}, "trouble": "hang"}}
        calculator = RemoteCalculator(TeacherConfig(name="toy_teachers:Springs", options=options))
        calculator.get_property("energy", Atoms("He", positions=[[101, 0, 0]]))
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])
    while not log.exists() or not log.read_text():
        assert parent.poll() is None
        time.sleep(0.05)
    child = int(log.read_text().split()[0])
    assert alive(child)
    parent.kill()
    parent.wait()
    assert gone(child)


def test_stress_comes_in_the_order_of_ase(opened: list[TeacherCalculator]) -> None:
    full = np.array([[1.0, 6, 5], [6, 2, 4], [5, 4, 3]])
    answer = {"energy": 0.0, "forces": np.zeros((1, 3)), "stress": full}
    np.testing.assert_array_equal(checked(answer, Atoms("He"), "t")["stress"], [1, 2, 3, 4, 5, 6])

    # sign and order of a real one, against the energy of a strained cell
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=1)
    calculator = make(TeacherConfig(name="emt", python=HERE), opened)
    stress = calculator.get_property("stress", atoms)
    energies = []
    for step in (1e-4, -1e-4):
        strain = np.eye(3)
        strain[0, 1] = strain[1, 0] = step / 2
        strained = atoms.copy()
        strained.set_cell(atoms.cell @ strain, scale_atoms=True)
        energies.append(calculator.get_property("energy", strained))
    assert stress[5] == pytest.approx((energies[0] - energies[1]) / 2e-4 / atoms.get_volume(), abs=1e-6)


def test_no_stress_without_a_volume(opened: list[TeacherCalculator]) -> None:
    calculator = make(TeacherConfig(name="emt"), opened)
    slab = bulk("Cu", cubic=True)
    slab.pbc = (True, True, False)
    calculator.get_property("energy", slab)
    assert "stress" not in calculator.results


def test_hessian_row() -> None:
    r, epsilon, sigma = 1.2, 1.0, 1.0
    atoms = Atoms("Ar2", positions=[[0, 0, 0], [0, 0, r]])
    calculator = LennardJones(sigma=sigma, epsilon=epsilon, rc=50.0)
    second = 4 * epsilon * (156 * sigma**12 / r**14 - 42 * sigma**6 / r**8)
    first = 4 * epsilon * (-12 * sigma**12 / r**13 + 6 * sigma**6 / r**7)
    before = atoms.positions.copy()
    np.testing.assert_allclose(
        hessian_row(calculator, atoms, 5, delta=1e-4), [[0, 0, -second], [0, 0, second]], atol=1e-5
    )
    np.testing.assert_allclose(
        hessian_row(calculator, atoms, 0, delta=1e-4), [[first / r, 0, 0], [-first / r, 0, 0]], atol=1e-5
    )
    np.testing.assert_array_equal(atoms.positions, before)


def test_digest_follows_the_contents_of_files(tmp_path: Path) -> None:
    model = tmp_path / "model.pt"
    model.write_text("one")
    configs = []
    for text in ("one", "two"):
        model.write_text(text)
        config = TeacherConfig(name="mace", options={"model_paths": str(model)})
        configs.append((config.digest, config.level_of_theory))
    assert configs[0][0] != configs[1][0]
    assert configs[0][1] != configs[1][1]
    assert TeacherConfig().level_of_theory == "GFN2-xTB"
    assert TeacherConfig(options={"accuracy": 0.1}).level_of_theory != "GFN2-xTB"


# ---- a teacher in an environment of its own, for real ---------------------------------------------------------------

# makes a model file and evaluates structures with it, without anything of ours
DIRECT = """
    import json, sys
    from mace.calculators import MACECalculator  # before e3nn: it makes torch.load accept e3nn's constants
    import numpy as np, torch
    from ase import Atoms
    from e3nn import o3
    from mace import modules
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    block = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]
    model = modules.MACE(
        r_max=4.0, num_bessel=4, num_polynomial_cutoff=5, max_ell=1, interaction_cls=block, interaction_cls_first=block,
        num_interactions=2, num_elements=3, hidden_irreps=o3.Irreps("8x0e + 8x1o"), MLP_irreps=o3.Irreps("4x0e"),
        gate=torch.nn.functional.silu, atomic_energies=np.array([-13.6, -1030.0, -2043.0]), avg_num_neighbors=5.0,
        atomic_numbers=[1, 6, 8], correlation=2,
    )
    torch.save(model, sys.argv[1])
    for given in json.loads(sys.argv[2]):
        atoms = Atoms(**given)
        atoms.calc = MACECalculator(model_paths=sys.argv[1], device="cpu", default_dtype="float64")
        stress = atoms.get_stress().tolist() if atoms.pbc.all() else None
        print("RESULT", json.dumps([atoms.get_potential_energy(), atoms.get_forces().tolist(), stress]))
"""


@pytest.mark.slow
def test_mace_in_an_environment_of_its_own(tmp_path: Path, opened: list[TeacherCalculator]) -> None:
    mace_python = environments.make("mace")
    model = tmp_path / "untrained.model"
    ethanol = molecule("CH3CH2OH")
    ethanol.rattle(0.05, seed=3)
    periodic = ethanol.copy()
    periodic.set_cell([6.0, 7.0, 8.0])
    periodic.pbc = True
    structures = [ethanol, periodic]
    given = [
        {name: np.asarray(getattr(atoms, name)).tolist() for name in ("numbers", "positions", "cell", "pbc")}
        for atoms in structures
    ]
    command = [str(mace_python), "-c", textwrap.dedent(DIRECT), str(model), json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.removeprefix("RESULT") for line in done.stdout.splitlines() if line.startswith("RESULT")]

    config = TeacherConfig(name="mace", options={"model_paths": str(model)}, python=mace_python)
    calculator = make(config, opened)
    for atoms, line in zip(structures, lines, strict=True):
        energy, forces, stress = json.loads(line)
        assert calculator.get_property("energy", atoms) == pytest.approx(energy, abs=1e-9)
        np.testing.assert_allclose(calculator.get_property("forces", atoms), forces, atol=1e-9)
        assert np.abs(forces).max() > 1e-3  # untrained, not trivial
        assert calculator.results["energies"].sum() == pytest.approx(energy)
        if stress is not None:
            np.testing.assert_allclose(calculator.results["stress"], stress, atol=1e-9)
    charged = ethanol.copy()
    charged.info["charge"] = 1.0
    with pytest.raises(StructureError, match="mace cannot use"):
        calculator.get_property("energy", charged)
    foreign = Atoms("Xe2", positions=[[0, 0, 0], [0, 0, 2]])
    with pytest.raises(TeacherError, match="Xe2"):
        calculator.get_property("energy", foreign)
    # forces against energies through the same pipe
    moved = [ethanol.copy(), ethanol.copy()]
    moved[0].positions[2, 1] += 1e-4
    moved[1].positions[2, 1] -= 1e-4
    up, down = (calculator.get_property("energy", atoms) for atoms in moved)
    assert calculator.get_property("forces", ethanol)[2, 1] == pytest.approx(-(up - down) / 2e-4, abs=1e-6)


def test_closing_ends_a_wait_in_another_thread(opened: list[TeacherCalculator]) -> None:
    """At any moment of the exchange, the start of a new child among them; else the caller would wait for ever."""
    for delay in (0.0, 0.001, 0.01, 0.05, 0.2):
        calculator = make(toy(trouble="exit", seconds=0.02, python=HERE), opened)
        ended = threading.Event()

        def work(calculator: TeacherCalculator = calculator, ended: threading.Event = ended) -> None:
            with contextlib.suppress(TeacherLost):
                while True:
                    with contextlib.suppress(TeacherLost):
                        calculator.calculate(Atoms("He", positions=[[200.0, 0, 0]]))
                    if calculator._closed:  # type: ignore[attr-defined]
                        break
            ended.set()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        time.sleep(delay)
        calculator.close()
        assert ended.wait(30)
