"""M6, and M5 without a volume, on harmonic molecules in vacuum, with each of the bugs they must catch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlff_engines.errors import ConfigError
from mlff_engines.validation.core_engine import CoreEngine
from mlff_engines.validation.dynamics.ensembles import compare_ensembles
from mlff_engines.validation.dynamics.replicas import mean_square_frequencies, run_replicas
from mlff_engines.validation.dynamics.temperatures import compare_temperatures, second_temperature
from mlff_engines.validation.engine import Trajectory, kinetic_energy
from mlff_engines.validation.result import CheckResult
from sampled import CHOICE, MOLECULES, VAPOUR, Named, molecules


class Vapour:
    """The trajectories that the tests share; `hot` is the second temperature of M6."""

    def __init__(self, folder: Path) -> None:
        core = CoreEngine(molecules())
        right = Named("right", molecules())
        self.core = run_replicas(core, VAPOUR, CHOICE, folder)
        self.right = run_replicas(right, VAPOUR, CHOICE, folder)
        self.stiff = run_replicas(Named("stiff", molecules(1.25)), VAPOUR, CHOICE, folder)
        self.hot = second_temperature(self.right, VAPOUR, CHOICE)
        self.right_hot = run_replicas(right, self.hot, CHOICE, folder)
        self.frequencies = mean_square_frequencies(core.evaluate, self.core, VAPOUR)

    def temperatures(self, change: Callable[[Trajectory], Trajectory] = lambda run: run) -> CheckResult:
        runs, hot_runs = ([change(run) for run in part] for part in (self.right, self.right_hot))
        return compare_temperatures(runs, hot_runs, VAPOUR, self.hot, CHOICE, self.frequencies)


@pytest.fixture(scope="module")
def vapour(tmp_path_factory: pytest.TempPathFactory) -> Vapour:
    return Vapour(tmp_path_factory.mktemp("vapour"))


@pytest.mark.slow
def test_molecules_without_volume(vapour: Vapour) -> None:
    """Densities of distances instead of g(r): all pairs of elements, no pressure."""
    result = compare_ensembles(vapour.right, vapour.core, VAPOUR, CHOICE, vapour.frequencies)
    assert result.verdict == "pass", result
    assert {plot.title for plot in result.plots} == {f"{k} distances" for k in ("H-H", "H-O", "O-O")} | {
        "potential energy"
    }
    assert "pressure: difference (GPa)" not in result.figures
    density = result.plots[1].curves[0]
    assert np.sum(density.y) * (density.x[1] - density.x[0]) == pytest.approx(1.0, abs=0.02)


@pytest.mark.slow
def test_stiffer_bonds_fail(vapour: Vapour) -> None:
    """Of a harmonic well neither mean energy knows: by equipartition both are the same for every stiffness."""
    result = compare_ensembles(vapour.stiff, vapour.core, VAPOUR, CHOICE, vapour.frequencies)
    assert abs(result.figures["potential energy: difference (eV)"]) < result.figures["potential energy: margin (eV)"]
    assert result.verdict == "fail", result


@pytest.mark.slow
def test_right_temperatures_pass(vapour: Vapour) -> None:
    result = vapour.temperatures()
    assert result.verdict == "pass", result
    names = {name.split(":")[0].removeprefix("temperature by mean of ") for name in result.figures}
    motions = {f"{motion} kinetic energy" for motion in ("translational", "rotational", "internal")}
    assert (
        names >= {"kinetic energy", "kinetic energy of H", "kinetic energy of O", "ratio of two temperatures"} | motions
    )
    assert [len(plot.curves) for plot in result.plots] == [2]


def scaled(atoms: Any, factor: float) -> Callable[[Trajectory], Trajectory]:
    """Another kinetic energy of some atoms."""

    def change(run: Trajectory) -> Trajectory:
        velocities = run.velocities.copy()
        velocities[:, atoms] *= np.sqrt(factor)
        kinetic = np.array([kinetic_energy(v, VAPOUR.masses) for v in velocities])
        return replace(run, velocities=velocities, kinetic=kinetic)

    return change


def weakly_coupled(run: Trajectory) -> Trajectory:
    """As under Berendsen's thermostat: the mean is right, the fluctuations are too small."""
    kinetic = run.kinetic.mean() + 0.7 * (run.kinetic - run.kinetic.mean())
    return replace(run, kinetic=kinetic, velocities=run.velocities * np.sqrt(kinetic / run.kinetic)[:, None, None])


def colder_hydrogen(run: Trajectory) -> Trajectory:
    """The sum is right, its partition is not."""
    hydrogen = VAPOUR.structure.numbers == 1
    return scaled(~hydrogen, 1.16)(scaled(hydrogen, 0.92)(run))


def without_translation(run: Trajectory) -> Trajectory:
    """Molecules held in their places."""
    masses = VAPOUR.masses.reshape(MOLECULES, 3, 1)
    v = run.velocities.reshape(-1, MOLECULES, 3, 3)
    v = (v - (masses * v).sum(axis=2, keepdims=True) / masses.sum(axis=1, keepdims=True)).reshape(run.velocities.shape)
    return replace(run, velocities=v * np.sqrt(1.5), kinetic=run.kinetic)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bug", "named"),
    [
        (scaled(slice(None), 1.07), "mean of kinetic energy"),
        (weakly_coupled, "width of"),
        (colder_hydrogen, "kinetic energy of"),
        (without_translation, "translational"),
        (lambda run: replace(run, potential=1.35 * run.potential), "ratio of two temperatures"),
    ],
    ids=["T + 7 %", "weak coupling", "cold hydrogen", "no translation", "wrong energy unit"],
)
def test_wrong_temperatures_fail(vapour: Vapour, bug: Any, named: str) -> None:
    result = vapour.temperatures(bug)
    assert result.verdict == "fail", result
    assert named in result.detail


@pytest.mark.slow
def test_a_thermostat_that_ignores_its_temperature_fails(vapour: Vapour) -> None:
    result = compare_temperatures(vapour.right, vapour.core, VAPOUR, vapour.hot, CHOICE, vapour.frequencies)
    assert result.verdict == "fail"
    assert "ratio of two temperatures" in result.detail


@pytest.mark.slow
def test_temperatures_from_too_little_data(vapour: Vapour) -> None:
    def short(run: Trajectory) -> Trajectory:
        names = ("times", "potential", "kinetic", "positions", "velocities")
        return replace(run, **{name: getattr(run, name)[:40] for name in names})

    result = vapour.temperatures(short)
    assert result.verdict == "inconclusive", result
    assert "run longer" in result.detail


@pytest.mark.slow
def test_random_numbers_of_others_stay(vapour: Vapour) -> None:
    np.random.seed(3)
    expected = np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    vapour.temperatures()
    np.testing.assert_array_equal(np.random.get_state()[1], expected)  # type: ignore[index]


@pytest.mark.slow
def test_missing_packages_are_named(vapour: Vapour, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(ConfigError, match=r"pip install 'mlff-engines\[validation\]'"):
        vapour.temperatures()
