"""Trajectories for training: on-step velocities, conserved energy, the same frames however often stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlff_engines.errors import ConfigError, DataError, SimulationError
from requirements import require_engine, require_package

require_engine("openmm")
require_package("rdkit", "openmm")

from mlff_openmm.kstep import simulate as stage  # noqa: E402
from mlff_openmm.kstep.config import MDConfig  # noqa: E402
from mlff_openmm.kstep.prepare import Prepared, prepare  # noqa: E402
from mlff_openmm.kstep.simulate import Run, simulate  # noqa: E402

GAS_CONSTANT = 8.31446261815324e-3  # kJ/mol/K
SHORT = MDConfig(
    length_ns=4e-4,
    equilibration_ps=0.02,
    nve_interval_ps=0.2,
    nve_window_ps=0.08,
    burst_interval_ps=0.05,
    save_forces=True,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("molecules")
    (folder / "molecules.smi").write_text("CCO ethanol")
    prepare(folder / "molecules.smi", SHORT, folder)
    return folder


def frames(file: Path) -> dict[str, Any]:
    with np.load(file) as data:
        return dict(data)


def changed(**keys: object) -> MDConfig:
    return MDConfig.model_validate(SHORT.model_dump() | keys)


def test_the_file_holds_what_is_promised(folder: Path, tmp_path: Path) -> None:
    (file,) = simulate(folder, SHORT, tmp_path, progress=False)
    data = frames(file)
    assert file.name == "ethanol_300K.npz"
    assert list(tmp_path.iterdir()) == [file]
    # in each of two cycles four bursts of 16 steps and a window of 40, a frame every four steps
    count = 2 * (4 * 5 + 11)
    for key in ("pos", "vel", "forces"):
        assert data[key].shape == (count, 9, 3)
        assert data[key].dtype == np.float64
    np.testing.assert_array_equal(data["box"], np.zeros((3, 3)))
    np.testing.assert_array_equal(data["numbers"], [6, 6, 8, 1, 1, 1, 1, 1, 1])
    np.testing.assert_allclose(data["masses"][[0, 3]], [12.011, 1.008], rtol=1e-3)
    kinetic = 0.5 * (data["masses"][:, None] * data["vel"] ** 2).sum((1, 2))
    np.testing.assert_allclose(data["Ekin"], kinetic, rtol=1e-12)
    np.testing.assert_allclose(data["Etot"], data["Epot"] + kinetic, rtol=1e-12)
    for segment in np.unique(data["segment"]):
        chosen = data["segment"] == segment
        long = data["window"][chosen].any()
        np.testing.assert_array_equal(data["step"][chosen], np.arange(0, 41 if long else 17, 4))
        assert np.ptp(data["Etot"][chosen]) < 3.0  # kJ/mol; Ekin and Epot each go up and down by more
    assert len(np.unique(data["segment"])) == 10
    metadata = json.loads(str(data["metadata"]))
    assert metadata["dt_fs"] == 2.0
    assert metadata["temperature_K"] == 300.0
    assert len(set(metadata["seeds"])) == 3
    assert metadata["sha256"] == Prepared.at(folder, "ethanol").record["sha256"]


def test_displaced_frames_are_out_of_shape_and_segments_of_their_own(folder: Path, tmp_path: Path) -> None:
    (plain,) = simulate(folder, SHORT, tmp_path / "plain", progress=False)
    (both,) = simulate(folder, changed(displaced_nm=0.005), tmp_path / "displaced", progress=False)
    usual, data = frames(plain), frames(both)
    _, counts = np.unique(data["segment"], return_counts=True)
    alone = np.isin(data["segment"], np.flatnonzero(counts == 1))
    assert alone.sum() == 8  # after each burst
    assert len(np.unique(data["segment"])) == data["segment"].max() + 1
    np.testing.assert_array_equal(data["pos"][:5], usual["pos"][:5])
    assert data["Epot"][alone].mean() > data["Epot"][~alone].mean() + 30  # kJ/mol
    i, j = data["constraints"].T
    lengths = np.linalg.norm(data["pos"][alone][:, i] - data["pos"][alone][:, j], axis=2)
    np.testing.assert_allclose(lengths, np.broadcast_to(data["constraint_lengths"], lengths.shape), rtol=1e-5)
    only = changed(displaced_nm=0.005, burst_steps=0, nve_window_ps=0)
    (single,) = simulate(folder, only, tmp_path / "only", progress=False)
    assert len(frames(single)["pos"]) == 8


def test_constraints_hold_in_positions_and_velocities(folder: Path, tmp_path: Path) -> None:
    data = frames(simulate(folder, SHORT, tmp_path, progress=False)[0])
    i, j = data["constraints"].T
    apart = data["pos"][:, i] - data["pos"][:, j]
    np.testing.assert_allclose(np.linalg.norm(apart, axis=2), np.tile(data["constraint_lengths"], (62, 1)), rtol=1e-7)
    stretching = (apart * (data["vel"][:, i] - data["vel"][:, j])).sum(2) / data["constraint_lengths"]
    assert np.abs(stretching).max() < 1e-6  # nm/ps, of about 3


def test_velocities_are_on_step_and_the_thermostatted_run_is_left_alone(folder: Path, tmp_path: Path) -> None:
    """Almost without friction the thermostatted run is the Verlet trajectory, which the bursts that leave it follow."""
    config = changed(friction_per_ps=1e-12, burst_interval_ps=0.032, nve_window_ps=0)  # a burst reaches the next
    data = frames(simulate(folder, config, tmp_path, progress=False)[0])
    x, v, f = (data[key].reshape(-1, 5, 9, 3) for key in ("pos", "vel", "forces"))
    full = x.shape[0] // 2 - 1  # the last stretch of a cycle is shorter
    np.testing.assert_allclose(x[: full - 1, 4], x[1:full, 0], atol=1e-7)
    np.testing.assert_allclose(v[: full - 1, 4], v[1:full, 0], atol=1e-4)
    half_a_kick = 1e-3 * f / data["masses"][:, None]
    assert np.abs(half_a_kick).max() > 0.1  # nm/ps: velocities half a step away would be seen


def test_the_energy_error_of_a_window_falls_with_the_square_of_the_time_step(folder: Path) -> None:
    deviations = []
    for dt in (0.5, 1.0, 2.0):
        config = changed(dt_fs=dt, save_interval_steps=round(4 / dt), burst_steps=0, nve_window_ps=1)
        pdb, system = Prepared.at(folder, "ethanol").load()
        engine = stage._Engine(system, config, 300.0, seed=1)
        engine.start(pdb.getPositions(asNumpy=True)._value, seed=1)
        deviations.append(np.std([frame["Etot"] for frame in engine.constant_energy(round(500 / dt))]))
    assert deviations[1] / deviations[0] == pytest.approx(4, rel=0.2)
    assert deviations[2] / deviations[1] == pytest.approx(4, rel=0.2)


def test_bursts_sample_the_temperature(folder: Path, tmp_path: Path) -> None:
    config = changed(
        length_ns=0.02,
        nve_interval_ps=20,
        equilibration_ps=1,
        friction_per_ps=20,
        nve_window_ps=0,
        constraints="HBonds",
    )
    (cold, hot) = simulate(
        folder, changed(**(config.model_dump() | {"temperature_K": (200, 400)})), tmp_path, progress=False
    )
    for file, wanted in ((cold, 200), (hot, 400)):
        data = frames(file)
        kinetic = data["Ekin"][data["step"] == 0]
        temperature = 2 * kinetic.mean() / (27 - 6) / GAS_CONSTANT
        assert len(kinetic) == 400
        # 3 standard errors; on-step velocities are a few kelvin colder, as of any Verlet scheme at 2 fs
        assert temperature == pytest.approx(wanted, rel=0.08)
    assert cold.name == "ethanol_200K.npz"


def test_an_interrupted_run_goes_on_to_the_same_frames(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole,) = simulate(folder, SHORT, tmp_path / "whole", progress=False)
    cycle = Run._cycle

    def interrupted(self: Run, number: int, before: Path | None) -> dict[str, Any]:
        if number == 1:
            raise KeyboardInterrupt
        return cycle(self, number, before)

    monkeypatch.setattr(Run, "_cycle", interrupted)
    with pytest.raises(KeyboardInterrupt):
        simulate(folder, SHORT, tmp_path / "stopped", progress=False)
    parts = tmp_path / "stopped" / "ethanol_300K.parts"
    assert [p.name for p in parts.iterdir()] == ["00000.npz"]
    with pytest.raises(ConfigError, match="another settings"):
        simulate(folder, changed(friction_per_ps=2.0), tmp_path / "stopped", progress=False)

    called = []
    monkeypatch.setattr(Run, "_cycle", lambda *args: called.append(args[1]) or cycle(*args))
    (resumed,) = simulate(folder, SHORT, tmp_path / "stopped", progress=False)
    assert called == [1]
    assert not parts.exists()
    one, two = frames(whole), frames(resumed)
    for key in one:
        np.testing.assert_array_equal(one[key], two[key])
    assert simulate(folder, SHORT, tmp_path / "stopped", progress=False) == [resumed]
    assert called == [1]


def test_another_seed_gives_other_frames(folder: Path, tmp_path: Path) -> None:
    one = frames(simulate(folder, SHORT, tmp_path, progress=False)[0])
    with pytest.raises(ConfigError, match="another settings"):
        simulate(folder, changed(seed=2), tmp_path, progress=False)
    two = frames(simulate(folder, changed(seed=2), tmp_path, overwrite=True, progress=False)[0])
    assert np.abs(one["pos"] - two["pos"]).max() > 1e-3


def test_other_settings_than_those_of_the_molecules_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"constraints': 'HBonds.*constraints': None"):
        simulate(folder, changed(constraints=None), tmp_path, progress=False)
    with pytest.raises(DataError, match="no prepared molecules"):
        simulate(tmp_path, SHORT, tmp_path, progress=False)


def test_an_exploding_run_is_stopped(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SimulationError, match="smaller dt_fs"):
        simulate(folder, changed(dt_fs=25.0, length_ns=4e-2, nve_interval_ps=20), tmp_path, progress=False)


def test_unmet_constraints_are_noticed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stretched(self: Any, step: int) -> dict[str, Any]:
        found = frame(self, step)
        found["pos"][3] += 0.01 * (step == 8)
        return found

    frame = stage._Engine._frame
    monkeypatch.setattr(stage._Engine, "_frame", stretched)
    with pytest.raises(SimulationError, match="frame 2: the constrained distance"):
        simulate(folder, SHORT, tmp_path, progress=False)


def test_a_foreign_file_is_refused(folder: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "ethanol_300K.npz", pos=np.zeros(3))
    with pytest.raises(DataError, match="no trajectory of ours"):
        simulate(folder, SHORT, tmp_path, progress=False)
