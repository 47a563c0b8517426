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

from mlff_engines.config import Config, load_yaml
from mlff_engines.errors import ConfigError
from mlff_engines.files import replacing
from mlff_engines.kstep.learned import export_jump
from mlff_engines.manifest import inspect
from mlff_engines.options import keys_option, output_option, path_argument

Stage = Callable[[str, Sequence[str]], None]  # name of a command of `mlff kstep`, and its arguments
Section = Path | dict[str, Any]
NEED_STUDENT, NEED_JUMP = ("student", "C", "D"), ("jump", "A1", "A2")

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
    "run": {
        "replicas": 1,
        "equilibration_ps": 0.2,
        "length_ps": 0.4,
        "nve_ps": 0.2,
        "sample_fs": 20,
        "reference_ps": 0.4,
    },
}


class PipelineConfig(Config):
    """A file for `mlff kstep pipeline`; each section is the path of a file beside it, or what would stand in one."""

    molecules: Path | dict[str, str] = Field(description="file of `SMILES name`, or SMILES by name")
    md: Section = Field(description="mlff kstep simulate --keys")
    sampling: dict[str, Any] | None = Field(None, description="over `md`: more trajectories, for the student alone")
    model: Section = Field(description="of the jumps: mlff_training.kstep.config.JumpModelConfig")
    train: Section = Field(description="of the jumps: mlff kstep train --keys; k_steps: one jump for each")
    student: Section = Field(description="mlff kstep student --keys")
    run: Section = Field(description="mlff kstep run --keys")
    processes: int = Field(1, ge=1, description="simulations at a time in `run`")


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
    run_stages(load_yaml(PipelineConfig, config), config.parent, out, commands_beside(ctx), smoke=smoke)
    click.echo(f"{out / 'report.html'}")


def commands_beside(ctx: click.Context) -> Stage:
    """Those of the group that `ctx` was called from.

    Raises:
        ConfigError: it was called from none.
    """
    group = ctx.parent.command if ctx.parent is not None else None
    if not isinstance(group, click.Group):
        raise ConfigError(f"{ctx.info_name} calls the commands beside it: start it as mlff kstep {ctx.info_name}")

    def stage(name: str, arguments: Sequence[str]) -> None:
        command = group.get_command(ctx, name)
        assert command is not None
        click.echo(f"--- mlff kstep {name} {' '.join(arguments)}")
        command.main(list(arguments), prog_name=name, standalone_mode=False)

    return stage


def run_stages(config: PipelineConfig, folder: Path, out: Path, stage: Stage, *, smoke: bool = False) -> None:
    """Call every stage that is not complete; the settings of each are kept in ``out/configs``.

    Args:
        config: what to do.
        folder: which paths in it are relative to.
        out: gets ``molecules/``, ``trajectories/``, ``sampling/``, ``pairs/``, ``jumps/``, ``student/``, ``runs/`` and
            the report.
        stage: calls a command.
        smoke: with `SMOKE` over the settings.

    Raises:
        ConfigError: `out` holds a pipeline of other settings, or a section that cannot be read.
    """
    sections = sections_of(config, folder, smoke)
    systems, options = make_models(config, sections, folder, out, stage)
    run = keep(out / "configs" / "run.yaml", sections["run"])
    stage("run", [systems, run, *options, "-o", str(out / "runs")])
    stage("evaluate", [str(out / "runs"), "-o", str(out)])


Sections = dict[str, dict[str, Any]]


def sections_of(config: PipelineConfig, folder: Path, smoke: bool) -> Sections:
    """What stands in the sections of `config`, by name.

    Raises:
        ConfigError: a section that cannot be read.
    """
    sections = {name: _section(getattr(config, name), folder, name) | (SMOKE[name] if smoke else {}) for name in SMOKE}
    sections["md"] |= {"save_forces": True}
    if config.sampling is not None:
        sections["sampling"] = sections["md"] | config.sampling | (SMOKE["md"] if smoke else {})
    if smoke:
        lengths = {"length_ps": None, "nve_ps": None}
        sections["run"]["variants"] = [variant | lengths for variant in sections["run"].get("variants", [])]
    return sections


def make_models(
    config: PipelineConfig, sections: Sections, folder: Path, out: Path, stage: Stage
) -> tuple[str, list[str]]:
    """All stages before `run`: the folder of the molecules, and the options that give `run` what its variants need.

    Raises:
        ConfigError: `out` holds models of other settings.
    """
    files = {name: keep(out / "configs" / f"{name}.yaml", part) for name, part in sections.items() if name != "run"}
    if isinstance(config.molecules, dict):
        lines = "".join(f"{smiles} {name}\n" for name, smiles in config.molecules.items())
        molecules = _keep(out / "configs" / "molecules.smi", lines)
    else:
        molecules = str(folder / config.molecules)
    variants = [variant for variant in sections["run"].get("variants", []) if isinstance(variant, dict)]
    kinds = [variant.get("kind") for variant in variants if not variant.get("ballistic")]
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
            folders = [trajectories]
            if "sampling" in files:
                folders.append(str(out / "sampling"))
                stage("simulate", [systems, files["sampling"], "-o", folders[-1]])
            stage("student", [*folders, files["student"], "-o", str(student.parent)])
        options += ["--student", str(student)]
    if config.processes > 1:
        options += ["--processes", str(config.processes)]
    return systems, options


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


def keep(path: Path, section: Mapping[str, Any]) -> str:
    """Write `section` as YAML, or find that it is there already.

    Raises:
        ConfigError: `path` holds other settings.
    """
    return _keep(path, yaml.safe_dump(dict(section)))


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
