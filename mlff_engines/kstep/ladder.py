"""`mlff kstep ladder`: jumps of more and more steps, as long as nothing gets significantly worse.

Each rung runs one more variant from the same starts and is judged by the gates of `mlff kstep evaluate`. It is accepted
unless it fails a gate that the rung below did not fail, for which the reference once more stands below the first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import click
from pydantic import Field

from mlff_engines.config import Config, load_yaml
from mlff_engines.errors import ConfigError
from mlff_engines.files import replacing
from mlff_engines.kstep.pipeline import PipelineConfig, Stage, commands_beside, keep, make_models, sections_of
from mlff_engines.options import keys_option, output_option, path_argument

REPLICATE = "verlet"
LEAST_PS = 50.0


class LadderConfig(Config):
    """A file for `mlff kstep ladder`: that of a pipeline, its variants in `run` left out, and these."""

    pipeline: Path = Field(description="a file for mlff kstep pipeline, beside this one")
    variant: Literal["jump", "A1", "A2"] = Field("A1", description="what uses the jumps")
    k_steps: list[int] = Field([4, 8, 12, 16], min_length=1, description="rungs; one jump is trained for each")
    length_ps: float = Field(100.0, ge=LEAST_PS, description="of each replica, at the temperature and without")


class Rung(Config):
    """What one rung showed."""

    variant: str
    k: int
    accepted: bool
    degraded: list[str] = Field(description="gates that fail, and on the rung below did not")
    gates: dict[str, str]


@click.command()
@click.argument("config", type=path_argument)
@output_option
@click.option("--smoke", is_flag=True, help="Only try the path, in seconds.")
@keys_option(LadderConfig)
@click.pass_context
def ladder(ctx: click.Context, config: Path, out: Path, smoke: bool) -> None:
    """Climb as CONFIG says, until a rung is worse than the one below; run it again to go on."""
    rungs = climb(load_yaml(LadderConfig, config), config.parent, out, commands_beside(ctx), smoke=smoke)
    for rung in rungs:
        fate = "accepted" if rung.accepted else f"not accepted: {', '.join(rung.degraded)} fail"
        click.echo(f"{rung.variant}: {fate}")
    click.echo(f"{out / 'ladder.json'}")


def climb(config: LadderConfig, folder: Path, out: Path, stage: Stage, *, smoke: bool = False) -> list[Rung]:
    """Rung by rung, to the first that is not accepted; what they showed is in ``out/ladder.json``.

    Args:
        folder: which paths in `config` are relative to.
        out: as of a pipeline.
        stage: calls a command of `mlff kstep`.
        smoke: useless models and short runs.

    Raises:
        ConfigError: `out` holds a ladder or pipeline of other settings; k_steps that do not rise.
    """
    if config.k_steps != sorted(set(config.k_steps)):
        raise ConfigError(f"k_steps {config.k_steps}; each rung takes more steps than the one below")
    given = folder / config.pipeline
    pipeline = load_yaml(PipelineConfig, given)
    sections = sections_of(pipeline, given.parent, smoke)
    variants = [{"kind": REPLICATE, "name": REPLICATE}, *({"kind": config.variant, "k": k} for k in config.k_steps)]
    lengths = {} if smoke else {"length_ps": config.length_ps, "nve_ps": config.length_ps}
    sections["run"] |= {"variants": variants, "reference_ps": None, **lengths}
    sections["train"] |= {"k_steps": config.k_steps}
    systems, options = make_models(pipeline, sections, given.parent, out, stage)
    rungs: list[Rung] = []
    below: Mapping[str, str] | None = None
    for count, k in enumerate(config.k_steps, 2):
        run = keep(out / "configs" / f"run_k{k}.yaml", sections["run"] | {"variants": variants[:count]})
        stage("run", [systems, run, *options, "-o", str(out / "runs")])
        stage("evaluate", [str(out / "runs"), "-o", str(out)])
        gates = _gates(out / "report.json")
        name = f"{config.variant}-k{k}"
        rungs.append(judged(name, k, gates[name], gates[REPLICATE] if below is None else below))
        below = gates[name]
        with replacing(out / "ladder.json") as path:
            path.write_text(json.dumps([rung.model_dump() for rung in rungs], indent=1) + "\n")
        if not rungs[-1].accepted:
            break
    return rungs


def judged(variant: str, k: int, gates: Mapping[str, str], below: Mapping[str, str]) -> Rung:
    """Accepted, unless a gate fails that does not fail on the rung `below`."""
    degraded = [code for code, verdict in gates.items() if verdict == "fail" and below.get(code) != "fail"]
    return Rung(variant=variant, k=k, accepted=not degraded, degraded=degraded, gates=dict(gates))


def _gates(report: Path) -> dict[str, dict[str, str]]:
    rows: Sequence[Mapping[str, Any]] = json.loads(report.read_text())["variants"]
    return {row["variant"]: row["gates"] for row in rows}
