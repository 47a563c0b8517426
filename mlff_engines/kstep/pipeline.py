"""`mlff kstep pipeline`: the stages one after another, each by its own command.

The core imports neither engine nor trainer: the commands are those that stand beside this one in `mlff kstep`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import yaml
from pydantic import Field

from mlff_engines.artifact import inspect
from mlff_engines.config import Config, load_yaml
from mlff_engines.errors import ConfigError
from mlff_engines.files import replacing
from mlff_engines.kstep.learned import export_jump
from mlff_engines.options import keys_option, output_option, path_argument

Stage = Callable[[str, Sequence[str]], None]  # name of a command of `mlff kstep`, and its arguments
Section = Path | dict[str, Any]
NEED_STUDENT, NEED_JUMP = ("C", "D"), ("A1", "A2")

# over what the file says; useless models and verdicts that decide nothing, in seconds
SMOKE: dict[str, dict[str, Any]] = {
    "md": {
        "length_ns": 1e-3,
        "equilibration_ps": 0.2,
        "nve_interval_ps": 0.5,
        "nve_window_ps": 0.1,
        "burst_interval_ps": 0.05,
    },
    "model": {"hidden_channels": 8, "num_layers": 1, "vec_channels": 4},
    "train": {"epochs": 1, "batch_size": 64},
    "student": {
        "frames": 60,
        "model": {"arch": "painn", "features": 8, "interactions": 1, "cutoff": 4.0},
        "train": {"epochs": 2, "tensorboard": False},
    },
    "run": {"replicas": 1, "equilibration_ps": 0.2, "length_ps": 0.4, "nve_ps": 0.2, "sample_fs": 20},
}


class PipelineConfig(Config):
    """A file for `mlff kstep pipeline`; each section is the path of a file beside it, or what would stand in one."""

    molecules: Path | dict[str, str] = Field(description="file of `SMILES name`, or SMILES by name")
    md: Section = Field(description="mlff kstep simulate --keys")
    model: Section = Field(description="of the jumps: mlff_training.kstep.config.JumpModelConfig")
    train: Section = Field(description="of the jumps: mlff kstep train --keys; k_steps: one jump for each")
    student: Section = Field(description="mlff kstep student --keys")
    run: Section = Field(description="mlff kstep run --keys")


@click.command()
@click.argument("config", type=path_argument)
@output_option
@click.option(
    "--smoke", is_flag=True, help="Only try the path: useless models in seconds, verdicts that decide nothing."
)
@keys_option(PipelineConfig)
@click.pass_context
def pipeline(ctx: click.Context, config: Path, out: Path, smoke: bool) -> None:
    """All stages of `mlff kstep` as CONFIG says, from molecules to OUT/report.html; run it again to go on."""
    group = ctx.parent.command if ctx.parent is not None else None
    if not isinstance(group, click.Group):
        raise ConfigError("the pipeline calls the commands beside it: start it as mlff kstep pipeline")

    def stage(name: str, arguments: Sequence[str]) -> None:
        command = group.get_command(ctx, name)
        assert command is not None
        click.echo(f"--- mlff kstep {name} {' '.join(arguments)}")
        command.main(list(arguments), prog_name=name, standalone_mode=False)

    run_stages(load_yaml(PipelineConfig, config), config.parent, out, stage, smoke=smoke)
    click.echo(f"{out / 'report.html'}")


def run_stages(config: PipelineConfig, folder: Path, out: Path, stage: Stage, *, smoke: bool = False) -> None:
    """Call every stage that is not complete; the settings of each are kept in ``out/configs``.

    Args:
        config: what to do.
        folder: which paths in it are relative to.
        out: gets ``molecules/``, ``trajectories/``, ``pairs/``, ``jumps/``, ``student/``, ``runs/`` and the report.
        stage: calls a command.
        smoke: with `SMOKE` over the settings.

    Raises:
        ConfigError: `out` holds a pipeline of other settings, or a section that cannot be read.
    """
    sections = {name: _section(getattr(config, name), folder, name) | (SMOKE[name] if smoke else {}) for name in SMOKE}
    sections["md"] |= {"save_forces": True}
    files = {
        name: _keep(out / "configs" / f"{name}.yaml", yaml.safe_dump(section)) for name, section in sections.items()
    }
    if isinstance(config.molecules, dict):
        lines = "".join(f"{smiles} {name}\n" for name, smiles in config.molecules.items())
        molecules = _keep(out / "configs" / "molecules.smi", lines)
    else:
        molecules = str(folder / config.molecules)
    kinds = [variant.get("kind") for variant in sections["run"].get("variants", []) if isinstance(variant, dict)]
    systems, trajectories, pairs = (str(out / name) for name in ("molecules", "trajectories", "pairs"))
    stage("prepare", [molecules, files["md"], "-o", systems])
    stage("simulate", [systems, files["md"], "-o", trajectories])
    options: list[str] = []
    if any(kind in NEED_JUMP for kind in kinds):
        steps = sections["train"].get("k_steps", [4])
        steps = [steps] if isinstance(steps, int) else steps
        stage("dataset", [trajectories, *(word for k in steps for word in ("-k", str(k))), "-o", pairs])
        by = ["--split-by", "segment"]  # the jumps are for these very molecules
        models = ["--model", files["model"], "--train", files["train"]]
        stage("train", [pairs, *models, *by, "-o", str(out / "jumps")])
        for k in steps:
            artifact = out / "jumps" / f"jump_k{k}.pt"
            _export(out / "jumps" / f"k{k:02d}" / "best", artifact)
            options += ["--jump", str(artifact)]
    if any(kind in NEED_STUDENT for kind in kinds):
        student = out / "student" / "student.pt"
        if not student.exists():
            stage("student", [trajectories, files["student"], "-o", str(student.parent)])
        options += ["--student", str(student)]
    stage("run", [systems, files["run"], *options, "-o", str(out / "runs")])
    stage("evaluate", [str(out / "runs"), "-o", str(out)])


def _section(given: Section, folder: Path, name: str) -> dict[str, Any]:
    if isinstance(given, dict):
        return given
    try:
        found = yaml.safe_load((folder / given).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{name}: cannot read {folder / given}: {error}") from None
    if not isinstance(found, Mapping):
        raise ConfigError(f"{name}: {folder / given} holds {type(found).__name__}; wanted: keys and values")
    return dict(found)


def _keep(path: Path, text: str) -> str:
    """Write `text`, or find that it is there already."""
    if path.exists():
        if path.read_text() != text:
            raise ConfigError(f"{path} holds other settings, those of an earlier pipeline: choose another folder")
    else:
        with replacing(path) as temporary:
            temporary.write_text(text)
    return str(path)


def _export(checkpoint: Path, artifact: Path) -> None:
    """Unless it is there, of these very weights."""
    from mlff_engines.checkpoint import load_jump_checkpoint

    if artifact.exists():
        weights = load_jump_checkpoint(checkpoint)[1].sha256
        if inspect(artifact).weights_sha256 == [weights]:
            return
    export_jump(checkpoint, artifact, overwrite=True)
