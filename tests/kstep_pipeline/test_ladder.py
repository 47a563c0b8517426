"""The ladder climbs while nothing gets worse, stops where something does, and goes on where it was stopped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from mlff_engines.errors import ConfigError
from mlff_engines.kstep.ladder import LadderConfig, climb, judged
from requirements import REPOSITORY

GOOD = {"K1": "pass", "K2": "inconclusive", "K3": "pass"}


def test_a_rung_is_accepted_unless_a_gate_fails_that_did_not_below() -> None:
    assert judged("A1-k8", 8, GOOD, GOOD).accepted
    worse = judged("A1-k8", 8, GOOD | {"K2": "fail"}, GOOD)
    assert (worse.accepted, worse.degraded) == (False, ["K2"])
    assert judged("A1-k12", 12, GOOD | {"K2": "fail"}, GOOD | {"K2": "fail"}).accepted  # no worse than below
    assert judged("A1-k12", 12, GOOD, GOOD | {"K3": "fail"}).accepted


class Judge:
    """In place of the commands: what was run, and a report in which rungs above `limit` fail."""

    def __init__(self, out: Path, limit: int) -> None:
        self.out, self.limit, self.called = out, limit, list[str]()
        (out / "jumps").mkdir(parents=True)

    def __call__(self, name: str, arguments: Sequence[str]) -> None:
        self.called.append(name)
        if name == "run":
            self.variants = yaml.safe_load(Path(arguments[1]).read_text())["variants"]
        if name == "evaluate":
            rows = [
                {
                    "variant": variant.get("name") or f"A1-k{variant['k']}",
                    "gates": GOOD | ({"K2": "fail"} if variant.get("k", 0) > self.limit else {}),
                }
                for variant in self.variants
            ]
            (self.out / "report.json").write_text(json.dumps({"variants": rows}))


def config(tmp_path: Path, **changed: object) -> LadderConfig:
    settings = yaml.safe_load((REPOSITORY / "examples" / "kstep.yaml").read_text())
    (tmp_path / "kstep.yaml").write_text(yaml.safe_dump(settings))
    return LadderConfig.model_validate({"pipeline": "kstep.yaml"} | changed)


@pytest.mark.parametrize(("limit", "accepted"), [(0, []), (8, [4, 8]), (16, [4, 8, 12, 16])])
def test_it_stops_at_the_first_rung_that_is_worse(
    tmp_path: Path, limit: int, accepted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlff_engines.kstep.pipeline._export", lambda *_: None)
    judge = Judge(tmp_path / "out", limit)
    rungs = climb(config(tmp_path), tmp_path, tmp_path / "out", judge, smoke=False)
    assert [rung.k for rung in rungs if rung.accepted] == accepted
    assert len(rungs) == min(len(accepted) + 1, 4)
    assert judge.called.count("train") == 1
    assert judge.called.count("run") == len(rungs)
    kept = json.loads((tmp_path / "out" / "ladder.json").read_text())
    assert [rung["k"] for rung in kept] == [4, 8, 12, 16][: len(rungs)]
    settings = yaml.safe_load((tmp_path / "out" / "configs" / "run_k4.yaml").read_text())
    assert settings["length_ps"] == settings["nve_ps"] == 100
    assert [variant["kind"] for variant in settings["variants"]] == ["verlet", "A1"]
    assert climb(config(tmp_path), tmp_path, tmp_path / "out", judge) == rungs


def test_bad_ladders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="takes more steps"):
        climb(config(tmp_path, k_steps=[8, 4]), tmp_path, tmp_path / "out", lambda *_: None)
    with pytest.raises(ValueError, match="greater than or equal to 50"):
        config(tmp_path, length_ps=10)


@pytest.mark.slow
def test_one_rung_with_real_stages(tmp_path: Path) -> None:
    import click

    from mlff_engines import cli
    from requirements import require_engine, require_package

    require_engine("openmm")
    for module in ("rdkit", "openmmml", "torch_geometric", "MDAnalysis", "jinja2"):
        require_package(module, "openmm")

    def stage(name: str, arguments: Sequence[str]) -> None:
        command = cli.kstep.get_command(click.Context(cli.kstep), name)
        assert command is not None
        command.main(list(arguments), prog_name=name, standalone_mode=False)

    settings = yaml.safe_load((REPOSITORY / "examples" / "kstep.yaml").read_text())
    settings |= {"molecules": {"methanol": "CO"}, "processes": 1}
    given = config(tmp_path, k_steps=[4])
    (tmp_path / "kstep.yaml").write_text(yaml.safe_dump(settings))
    [rung] = climb(given, tmp_path, tmp_path / "out", stage, smoke=True)
    assert rung.variant == "A1-k4"
    assert rung.accepted == (rung.gates["K1"] != "fail")  # so little data show nothing else
    assert (tmp_path / "out" / "report.html").exists()
