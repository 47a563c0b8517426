"""`mlff kstep run`: variants and baselines from the same starts, what they ask of the true potential, and going on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kstep_jumps
import students
from mlff_engines.errors import ConfigError
from mlff_engines.kstep.learned import export_jump
from mlff_engines.structure import FloatArray
from requirements import require_engine, require_package

require_engine("openmm")
require_package("rdkit", "openmm")
require_package("openmmml", "openmm")
require_package("MDAnalysis", "openmm")

import openmm  # noqa: E402
from MDAnalysis.lib.formats.libdcd import DCDFile  # noqa: E402

from mlff_openmm.kstep.config import MDConfig, RunConfig, Variant  # noqa: E402
from mlff_openmm.kstep.prepare import Prepared, prepare  # noqa: E402
from mlff_openmm.kstep.run import run  # noqa: E402
from mlff_openmm.kstep.simulations import repartition  # noqa: E402

SHORT = {"replicas": 1, "equilibration_ps": 0.1, "length_ps": 0.24, "nve_ps": 0.12, "sample_fs": 20, "inner_step_fs": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ethanol, prepared; an untrained jump and student, the latter with forces near zero."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "ethanol.smi").write_text("CCO ethanol")
    prepare(folder / "ethanol.smi", MDConfig(), folder / "molecules")
    export_jump(kstep_jumps.checkpoint(folder / "jump"), folder / "jump.pt")
    students.artifact(folder, dtype="float32")
    return folder


def config(*variants: dict[str, Any], **changed: Any) -> RunConfig:
    return RunConfig(variants=variants, **(SHORT | changed))


def running(folder: Path, out: Path, *variants: dict[str, Any], **changed: Any) -> dict[str, tuple[Any, Any]]:
    """Metadata and arrays of the first replica, by variant."""
    models = {"student": folder / "student-float32.pt", "jumps": [folder / "jump.pt"]}
    made = run(folder / "molecules", config(*variants, **changed), out, progress=False, **models)  # type: ignore[arg-type]
    found = {}
    for path in made:
        if path.stem.endswith("_r0"):
            with np.load(path) as data:
                arrays = {name: data[name] for name in data.files}
            found[path.stem.removesuffix("_r0")] = json.loads(str(arrays["metadata"])), arrays
    return found


def test_true_calls_are_those_of_the_schemes(folder: Path, tmp_path: Path) -> None:
    variants = ({"kind": "verlet", "dt_fs": 2}, {"kind": "hmr"}, {"kind": "A1", "k": 4}, {"kind": "A2", "k": 4})
    found = running(folder, tmp_path, *variants)
    calls = {name: meta["calls"]["marginal"] for name, (meta, _) in found.items() if not meta["problem"]}
    assert calls["reference"] == calls["verlet-2fs"] == 120 + 1  # one before the first step
    assert calls["hmr-4fs"] == 60 + 1
    for name, per_step in (("A1-k4", 1), ("A2-k4", 2)):
        meta = found[name][0]
        steps = round(1e3 * meta["simulated_ps"] / 10)
        assert meta["macro_step_fs"] == 10
        assert meta["problem"] or meta["calls"]["marginal"] == per_step * steps + 4 * meta["counts"]["fallbacks"]
    meta, arrays = found["hmr-4fs"]
    assert arrays["masses"].sum() == pytest.approx(found["reference"][1]["masses"].sum())
    assert arrays["masses"][3:] == pytest.approx(3.024)
    assert arrays["pos"].shape == (12, 9, 3)
    np.testing.assert_allclose(arrays["time"], 0.02 * np.arange(1, 13))
    assert not np.array_equal(found["reference"][1]["pos"], found["verlet-2fs"][1]["pos"])  # other noise


def test_energy_without_thermostat_is_the_true_one_and_conserved(folder: Path, tmp_path: Path) -> None:
    found = running(folder, tmp_path, {"kind": "verlet", "dt_fs": 2}, {"kind": "verlet", "dt_fs": 0.5, "name": "fine"})
    widths = {name: np.ptp(arrays["nve_Etot"]) for name, (_, arrays) in found.items()}
    assert widths["reference"] == widths["verlet-2fs"]  # the same start, no noise
    assert 0 < widths["fine"] < widths["reference"] / 8  # 16 times smaller steps' squares
    assert widths["reference"] < 5


def test_the_kick_is_half_a_time_step_of_force_within_the_constraints(folder: Path, tmp_path: Path) -> None:
    found = running(folder, tmp_path, {"kind": "verlet", "dt_fs": 2})
    arrays = found["reference"][1]
    molecule = Prepared.at(folder / "molecules", "ethanol")
    _, system = molecule.load()
    context = openmm.Context(system, openmm.VerletIntegrator(0.0), openmm.Platform.getPlatform("Reference"))
    context.setPositions(arrays["pos"][0])
    forces = context.getState(forces=True).getForces(asNumpy=True)._value
    free = 0.001 * forces / arrays["masses"][:, None]
    kick = arrays["kick"][0]
    assert np.abs(kick).max() > 0.01
    i, j = arrays["constraints"].T
    along = ((kick[i] - kick[j]) * (arrays["pos"][0][i] - arrays["pos"][0][j])).sum(axis=1)
    np.testing.assert_allclose(along, 0, atol=1e-8)
    np.testing.assert_allclose(arrays["masses"] @ kick, arrays["masses"] @ free, atol=1e-8)


def test_what_is_there_stays_and_other_settings_are_refused(folder: Path, tmp_path: Path) -> None:
    running(folder, tmp_path, {"kind": "verlet", "dt_fs": 2})
    file = tmp_path / "ethanol" / "verlet-2fs_r0.npz"
    before = file.stat().st_mtime_ns
    found = running(folder, tmp_path, {"kind": "verlet", "dt_fs": 2}, {"kind": "hmr"}, replicas=1)
    assert file.stat().st_mtime_ns == before
    assert set(found) == {"reference", "verlet-2fs", "hmr-4fs"}
    with pytest.raises(ConfigError, match="was made with another settings"):
        running(folder, tmp_path, {"kind": "verlet", "dt_fs": 2}, length_ps=0.3)
    file.unlink()
    first = _positions(found)
    again = _positions(running(folder, tmp_path, {"kind": "verlet", "dt_fs": 2}))
    np.testing.assert_array_equal(first, again)


def _positions(found: dict[str, tuple[Any, Any]]) -> FloatArray:
    positions: FloatArray = found["verlet-2fs"][1]["pos"]
    return positions


def test_c_and_d_ask_once_per_macro_step_and_failures_are_results(folder: Path, tmp_path: Path) -> None:
    unsafe = {"kind": "C", "macro_step_fs": 400, "name": "unsafe"}
    found = running(folder, tmp_path, {"kind": "C", "macro_step_fs": 4}, {"kind": "D", "trajectory_ps": 0.04}, unsafe)
    meta, arrays = found["D-0.04ps"]
    assert meta["counts"]["proposals"] == 6
    assert meta["calls"] == {"marginal": 6, "all": 7}
    assert len(arrays["nve_Etot"]) == 0
    meta, arrays = found["C-4fs"]
    steps = round(1e3 * meta["simulated_ps"] / 4)
    assert meta["problem"] or meta["calls"]["marginal"] == steps + 1
    assert len(arrays["pos"]) == len(arrays["kick"]) == len(arrays["Epot"])
    meta, arrays = found["unsafe"]
    assert meta["problem"]
    assert len(arrays["pos"]) <= 1


def test_baselines_ask_what_their_schemes_say(folder: Path, tmp_path: Path) -> None:
    """Macro-steps of 20 fs, so that the lengths are whole: the true potential is asked by the corrector alone."""
    found = running(
        folder,
        tmp_path,
        {"kind": "mts", "macro_step_fs": 4},
        {"kind": "student", "dt_fs": 1},
        {"kind": "jump", "k": 4, "ballistic": True},
        {"kind": "A1", "k": 4, "ballistic": True},
        {"kind": "A2", "k": 4, "ballistic": True, "length_ps": 0.1, "nve_ps": 0},
    )
    calls = {name: meta["calls"]["marginal"] for name, (meta, _) in found.items() if not meta["problem"]}
    assert calls["mts-4fs"] == 60 + 1
    assert found["mts-4fs"][0]["time_step_fs"] == 2
    assert calls.get("student-1fs", 0) == calls.get("jump-k4-ballistic", 0) == 0
    assert found["student-1fs"][0]["macro_step_fs"] == 1
    assert found["jump-k4-ballistic"][0]["macro_step_fs"] == 8
    meta, arrays = found["A1-k4-ballistic"]
    assert meta["problem"] or meta["calls"]["marginal"] == 24
    meta, arrays = found["A2-k4-ballistic"]
    assert meta["simulated_ps"] <= 0.1 + 1e-9
    assert len(arrays["nve_time"]) == 0


def test_multiple_time_steps_are_verlet_where_the_outer_is_the_inner(folder: Path, tmp_path: Path) -> None:
    found = running(folder, tmp_path, {"kind": "mts", "macro_step_fs": 2}, {"kind": "mts", "macro_step_fs": 6})
    energies = {name: arrays["nve_Etot"] for name, (_, arrays) in found.items()}
    np.testing.assert_allclose(energies["mts-2fs"], energies["reference"], atol=1e-6)
    assert np.ptp(energies["mts-6fs"]) < 20  # bonded forces at 2 fs: no resonance, and no explosion


def test_multiple_time_steps_need_forces_to_divide(folder: Path, tmp_path: Path) -> None:
    """A learned potential has no nonbonded part: the variant is refused, and that is its result."""
    learned = MDConfig(force_field=str(folder / "student-float32.pt"), implicit_solvent=None)
    prepare(folder / "ethanol.smi", learned, tmp_path / "molecules")
    settings = config({"kind": "mts", "macro_step_fs": 4}, length_ps=0.02, nve_ps=0, equilibration_ps=0.01)
    run(tmp_path / "molecules", settings, tmp_path / "runs", progress=False)
    with np.load(tmp_path / "runs" / "ethanol" / "mts-4fs_r0.npz") as data:
        assert "refused: mts-4fs: multiple time steps need" in json.loads(str(data["metadata"]))["problem"]


def test_configurations_have_the_temperature_of_the_thermostat(folder: Path, tmp_path: Path) -> None:
    slow = {"length_ps": 20, "equilibration_ps": 2, "nve_ps": 0, "friction_per_ps": 10}
    found = running(folder, tmp_path, {"kind": "hmr"}, **slow)
    for _, arrays in found.values():
        kelvin = arrays["slope"].mean() / arrays["curvature"].mean() / 8.31446e-3
        assert kelvin == pytest.approx(300, rel=0.15)  # 4 standard errors


@pytest.mark.slow
def test_processes_share_the_work_and_change_nothing(folder: Path, tmp_path: Path) -> None:
    variants = ({"kind": "verlet", "dt_fs": 2}, {"kind": "D", "trajectory_ps": 0.04})
    for processes in (1, 2):
        student = folder / "student-float32.pt"
        settings = config(*variants, length_ps=0.08, nve_ps=0.04, dcd=processes == 2)
        out = tmp_path / str(processes)
        run(folder / "molecules", settings, out, student=student, processes=processes, progress=False)
    for file in (tmp_path / "1" / "ethanol").glob("*_r0.npz"):
        with np.load(file) as one, np.load(tmp_path / "2" / "ethanol" / file.name) as two:
            np.testing.assert_array_equal(one["pos"], two["pos"])
            with DCDFile(str(tmp_path / "2" / "ethanol" / file.with_suffix(".dcd").name)) as written:
                found = written.readframes().xyz
            np.testing.assert_allclose(found, 10 * two["pos"], atol=1e-4)
    assert not list((tmp_path / "1" / "ethanol").glob("*.dcd"))


def test_what_a_variant_needs_must_be_there(folder: Path, tmp_path: Path) -> None:
    for variant, message in (
        ({"kind": "A1", "k": 8}, r"A1-k8: no jump of 8 steps; given are \[4\]"),
        ({"kind": "C", "macro_step_fs": 4}, "C-4fs needs a student"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(folder / "molecules", config(variant), tmp_path, jumps=[folder / "jump.pt"])
    with pytest.raises(ConfigError, match="is no jump"):
        run(folder / "molecules", config({"kind": "A1", "k": 4}), tmp_path, jumps=[folder / "student-float32.pt"])
    for wrong, text in (
        ({"kind": "C"}, "C needs macro_step_fs"),
        ({"kind": "C", "macro_step_fs": 5}, "2.5 inner steps"),
        ({"kind": "verlet", "name": "reference"}, "none of them reference"),
    ):
        with pytest.raises(ValueError, match=text):
            config(wrong)
    with pytest.raises(ValueError, match="twice"):
        config({"kind": "hmr"}, {"kind": "hmr"})


def test_names_follow_from_the_rest() -> None:
    names = [
        Variant(**given).name
        for given in ({"kind": "hmr"}, {"kind": "A2", "k": 8}, {"kind": "D", "trajectory_ps": 0.5})
    ]
    assert names == ["hmr-4fs", "A2-k8", "D-0.5ps"]
    assert Variant(kind="student").name == "student"
    assert Variant(kind="A1", k=4, ballistic=True).name == "A1-k4-ballistic"
    with pytest.raises(ValueError, match="ballistic is for jump, A1, A2"):
        Variant(kind="C", macro_step_fs=4, ballistic=True)


def test_repartitioning_moves_mass_only(folder: Path) -> None:
    pdb, system = Prepared.at(folder / "molecules", "ethanol").load()
    before = [system.getParticleMass(i)._value for i in range(9)]
    repartition(system, pdb.topology)
    after = [system.getParticleMass(i)._value for i in range(9)]
    assert sum(after) == pytest.approx(sum(before))
    assert after[0] == pytest.approx(before[0] - 3 * (3.024 - before[3]))
