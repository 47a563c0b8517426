"""The command lines `mlff` and `mlff-export`.

Commands that need more than the core are named here and imported when called, so that a missing extra is a line
that says how to install it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlff_engines import __version__
from mlff_engines.errors import MLFFError, suggest

if TYPE_CHECKING:
    from mlff_engines.artifact import Artifact
    from mlff_engines.kstep.learned import LearnedJump
    from mlff_engines.manifest import Dtype, Kernel
    from mlff_engines.structure import Structure
    from mlff_engines.validation.builtin import System
    from mlff_engines.validation.run import Mode

Place = tuple[str, str, str, str]  # module, attribute, extra that it needs, line in the list of commands
ELSEWHERE: dict[str, Place] = {
    "distill": (
        "mlff_training.commands",
        "distill",
        "train",
        "Teacher to student: sample, label, train, export, check.",
    ),
    "sample": ("mlff_training.commands", "sample", "train", "Sample structures with a teacher."),
    "label": ("mlff_training.commands", "label", "train", "Compute a teacher's energies and forces."),
    "train": ("mlff_training.commands", "train", "train", "Train a student on labelled structures."),
    "data": ("mlff_training.commands", "data", "train", "Convert and describe data sets."),
    "lammps": ("mlff_lammps.commands", "lammps", "lammps", "Build the plug-in or LAMMPS itself, run decks."),
    "bench": ("mlff_engines.bench.commands", "bench", "validation", "Time students and other packages side by side."),
    "import": ("mlff_engines.foreign.commands", "import_model", "all", "Checkpoints from other packages' models."),
}
KSTEP: dict[str, Place] = {
    "prepare": ("mlff_openmm.kstep.commands", "prepare", "kstep", "SMILES to PDB files and OpenMM Systems."),
    "simulate": ("mlff_openmm.kstep.commands", "simulate", "kstep", "Trajectories to learn jumps from."),
    "dataset": ("mlff_training.kstep.commands", "dataset", "train", "Pairs of states some steps apart."),
    "train": ("mlff_training.kstep.commands", "train", "train", "Train jumps on such pairs."),
    "student": ("mlff_training.kstep.commands", "student", "train", "Train a force field on the same trajectories."),
    "run": ("mlff_openmm.kstep.commands", "run", "kstep", "All variants and baselines from the same starts."),
    "evaluate": ("mlff_engines.validation.reports.large_steps", "evaluate", "validation", "Judge these runs."),
    "ladder": ("mlff_engines.kstep.ladder", "ladder", "kstep", "Longer jumps, as long as nothing gets worse."),
    "pipeline": ("mlff_engines.kstep.pipeline", "pipeline", "kstep", "All of these, as one file says."),
}


class LazyCommand(click.Command):
    """Stands for a command of another package until it is called."""

    def __init__(self, name: str, place: Place) -> None:
        module, attribute, extra, line = place
        super().__init__(name, short_help=line, add_help_option=False)
        self.target = (module, attribute, extra)

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Import the real command and let it parse `args`."""
        return self.load().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the real command."""
        return ctx.command.invoke(ctx)

    def load(self) -> click.Command:
        """The real command."""
        module, attribute, needed = self.target
        try:
            command: click.Command = getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            raise MLFFError(
                f"mlff {self.name} needs {error.name}, which is not installed: pip install 'mlff-engines[{needed}]'"
            ) from None
        return command


class Commands(click.Group):
    """A group that suggests the nearest command and answers errors in one line."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command, or fail with the nearest name."""
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            ctx.fail(f"no command {args[0]!r}{suggest(args[0], self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def mlff() -> None:
    """Learn a small fast force field from any teacher and run it in every engine.

    \b
    A first student, from teacher to artifact:
      mlff distill examples/ethanol.yaml -o runs/ethanol
    The same in steps, each resumable:
      mlff sample ..., mlff label ..., mlff train ..., mlff-export runs/ethanol/best -o student.pt
    """


@mlff.group(cls=Commands)
def kstep() -> None:
    """Large steps: learn jumps of several time steps, and correct them by true forces.

    \b
    Each stage goes on where it was stopped:
      mlff kstep prepare examples/kstep/molecules.smi examples/kstep/md.yaml -o runs/kstep/systems
      mlff kstep simulate runs/kstep/systems examples/kstep/md.yaml -o runs/kstep/trajectories
      mlff kstep dataset runs/kstep/trajectories -o runs/kstep/pairs
      mlff kstep train runs/kstep/pairs --model model.yaml --train train.yaml -o runs/kstep/jumps
    All stages for two molecules, and their report:
      mlff kstep pipeline examples/kstep.yaml -o runs/kstep
    """


for _group, _places in ((mlff, ELSEWHERE), (kstep, KSTEP)):
    for _name, _place in _places.items():
        _group.add_command(LazyCommand(_name, _place))


@mlff.command("inspect")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the whole manifest as JSON.")
def inspect_artifact(artifact: Path, as_json: bool) -> None:
    """Say what ARTIFACT is, checking its hashes; nothing of it is executed."""
    from mlff_engines.manifest import inspect

    manifest = inspect(artifact)
    if as_json:
        click.echo(manifest.model_dump_json(indent=2))
        return
    domain = manifest.domain
    ensemble = f", ensemble of {manifest.members}" if manifest.members > 1 else ""
    rows = {
        "model": f"{manifest.architecture}{ensemble}, {manifest.dtype}",
        "elements": ", ".join(
            f"{symbol} (E0 {manifest.e0[symbol]:.4f} eV)" if symbol in manifest.e0 else symbol
            for symbol in domain.elements
        ),
        "cutoff": f"{manifest.cutoff:g} Å, {manifest.layers} layers: range {manifest.cutoff * manifest.layers:g} Å",
        "units": f"{manifest.units.length}, {manifest.units.energy}",
        "charges": f"{domain.charges} ({'an input' if manifest.takes_charge else 'fixed'})",
        "unpaired electrons": f"{domain.spins} ({'an input' if manifest.takes_spin else 'fixed'})",
        "shortest distances": ", ".join(f"{pair} {d:.2f}" for pair, d in domain.min_distances.items()) + " Å",
        "outputs": ", ".join(manifest.outputs),
        "made with": f"torch {manifest.torch_version}, kernel {manifest.kernel}",
        "sha256": manifest.sha256,
    }
    if manifest.jump is not None:
        rows |= {name: str(value) for name, value in manifest.jump.model_dump().items()}
    for name, value in rows.items():
        click.echo(f"{name:20s}{value}")
    for member in manifest.training:
        click.echo(f"{'training':20s}{_training_line(member)}")


def _training_line(training: dict[str, Any]) -> str:
    valid = training.get("valid", {})
    error = f", validation force MAE {1e3 * valid['forces_mae']:.1f} meV/Å" if "forces_mae" in valid else ""
    return f"{training.get('frames', {}).get('train', '?')} frames of {training.get('teacher', '?')}{error}"


@mlff.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--device", default="cpu", show_default=True)
def verify(artifact: Path, device: str) -> None:
    """Replay ARTIFACT's golden vectors here: the same energies, forces and virials as where it was made."""
    loaded = _load(artifact, device)
    for name, deviations in loaded.verify().items():
        click.echo(f"{name:24s}" + "  ".join(f"{what} {value:.1e}" for what, value in deviations.items()))
    click.echo(f"{artifact}: {len(loaded.golden)} golden vectors reproduced")


def _load(path: Path, device: str, dtype: Dtype | None = None, kernel: str | None = None) -> Artifact | LearnedJump:
    """A potential or a jump."""
    from mlff_engines.artifact import load
    from mlff_engines.kstep.learned import LearnedJump
    from mlff_engines.manifest import inspect

    read = LearnedJump.load if inspect(path).kind == "jump" else load
    return read(path, device=device, dtype=dtype, kernel=kernel)


@mlff.command()
@click.argument("artifact")
@click.option(
    "--system",
    "systems",
    multiple=True,
    metavar="STRUCTURE|NAME",
    help="A structure file, or a built-in system such as water-64; may be repeated. Default: a training structure.",
)
@click.option("--engines", default="ase", show_default=True, help="Comma-separated.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The folder to write.")
@click.option("--full", "mode", flag_value="full", help="Also drift, ensembles, stability, lifecycle: hours.")
@click.option(
    "--quick", "mode", flag_value="quick", default="quick", help="Static checks and M1-M3: minutes (default)."
)
@click.option("--only", default="", help="Comma-separated codes of checks, such as S1,M4, in place of these.")
@click.option("--temperature", type=click.FloatRange(min=0, min_open=True), help="Of the dynamics, K.")
@click.option(
    "--length",
    type=click.FloatRange(min=0, min_open=True),
    default=100.0,
    show_default=True,
    help="Of each replica in --full, ps.",
)
@click.option("--device", default="cpu", show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of velocities and thermostats.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier validation.")
@click.pass_context
def validate(
    ctx: click.Context,
    artifact: str,
    systems: tuple[str, ...],
    engines: str,
    out: Path,
    mode: Mode,
    only: str,
    temperature: float | None,
    length: float,
    device: str,
    seed: int,
    overwrite: bool,
) -> None:
    """Judge ARTIFACT in one engine or more and write a report. Repeat it to go on after an interruption.

    ARTIFACT may be "argon": an analytic Lennard-Jones model, to try engines without any training.
    Exits with 0 when everything passes, 1 when something fails, 3 when the data decide nothing.
    """
    import tempfile

    from mlff_engines.validation import builtin
    from mlff_engines.validation.run import validate as judge

    with tempfile.TemporaryDirectory() as scratch:
        path = builtin.argon_artifact(Path(scratch)) if artifact == "argon" else Path(artifact)
        report = judge(
            path,
            out,
            engines=_split(engines),
            only=_split(only),
            systems=[found for given in systems for found in _systems(given, path, temperature)],
            mode=mode,
            length=length,
            device=device,
            seed=seed,
            overwrite=overwrite,
            command=" ".join(["mlff", *sys.argv[1:]]),
        )
    for section in report.sections:
        for result in section.results:
            figure = f"{result.figure:.3g}, allowed {result.tolerance:g}"
            click.echo(f"{section.engine:14s} {result.code:4s} {result.verdict:13s} {result.name}: {figure}")
            if not result.passed:
                click.echo(f"{'':20s}{result.detail}")
        if section.problem:
            click.echo(f"{section.engine:14s} {section.problem}")
    click.echo(f"{report.verdict}: {out / 'report.html'}")
    ctx.exit(report.exit_code)


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _systems(given: str, artifact: Path, temperature: float | None) -> list[System]:
    """The structures of a file, or one built-in system."""
    from dataclasses import replace

    from mlff_engines.artifact import load
    from mlff_engines.validation.builtin import System, named_system

    if Path(given).exists():
        structures = _read_structures(Path(given), "--system")
        stem = Path(given).stem
        names = [stem] if len(structures) == 1 else [f"{stem}-{n}" for n in range(len(structures))]
        systems = [System(name, structure) for name, structure in zip(names, structures, strict=True)]
    else:
        systems = [named_system(given, load(artifact))]
    return systems if temperature is None else [replace(system, temperature=temperature) for system in systems]


def _read_structures(path: Path, option: str) -> list[Structure]:
    try:
        reader = importlib.import_module("mlff_ase.structures")
    except ModuleNotFoundError:
        raise MLFFError(f"{option} reads structures with ASE: pip install 'mlff-engines[ase]'") from None
    structures: list[Structure] = reader.read(path)
    return structures


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("checkpoints", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The artifact to write.")
@click.option(
    "--dtype", type=click.Choice(["float32", "float64"]), help="Default: float32, or that of the artifact given."
)
@click.option("--device", default="cpu", show_default=True, help="Device it is saved for; loading remaps it.")
@click.option("--check", type=click.Path(path_type=Path), help="A structure file to compare artifact and model on.")
@click.option(
    "--kernel",
    type=click.Choice(["torch", "fused"]),
    default="torch",
    show_default=True,
    help="fused: the program itself names the fused operator, for engines that load it without Python.",
)
@click.option(
    "--compile",
    "compiling",
    is_flag=True,
    help="Also compile it with torch for this machine, into the cache, for MLFF_KERNEL=compiled: a minute.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing artifact.")
@click.option(
    "--engine",
    type=click.Choice(["lammps-mliap"]),
    help="OUT is for this engine; the artifact stands beside it, or is given in place of CHECKPOINTS.",
)
def mlff_export(
    checkpoints: tuple[Path, ...],
    out: Path | None,
    dtype: Dtype | None,
    device: str,
    check: Path | None,
    kernel: Kernel,
    compiling: bool,
    overwrite: bool,
    engine: str | None,
) -> None:
    """Export a checkpoint folder to one TorchScript artifact, and replay its golden vectors.

    Several CHECKPOINTS become an ensemble with uncertainties. Every engine runs the artifact as it is, except LAMMPS'
    `pair_style mliap unified`, which loads a file made with --engine lammps-mliap.

    An artifact in place of CHECKPOINTS is written again, in another --dtype or for another --kernel; without -o it is
    only compiled, as --compile asks.
    """
    from mlff_engines.artifact import load, recast
    from mlff_engines.export import export_any
    from mlff_engines.manifest import inspect

    structures = [] if check is None else _read_structures(check, "--check")
    given = checkpoints[0] if len(checkpoints) == 1 and checkpoints[0].is_file() else None
    if out is None:
        if given is None or not compiling or engine is not None:
            raise click.UsageError("Missing option '-o' / '--out'.")
        artifact = given
    else:
        artifact = out if engine is None else out.with_suffix(".pt")
    made = None
    if given is None:
        made = export_any(
            checkpoints,
            artifact,
            dtype=dtype or "float32",
            device=device,
            structures=structures,
            overwrite=overwrite,
            kernel=kernel,
        )
    elif out is not None and engine is None:
        recast(load(given, dtype=dtype, kernel=kernel), artifact, overwrite=overwrite)
        made = load(artifact, kernel=kernel)
    else:
        artifact = given
    if made is not None:
        for name, deviations in made.verify().items():
            click.echo(f"{name:24s}" + "  ".join(f"{what} {value:.1e}" for what, value in deviations.items()))
        click.echo(f"{artifact}: {inspect(artifact).dtype}, as the float64 model on {len(made.golden)} structures")
    if compiling:
        found = _load(artifact, device, dtype, kernel="compiled").verify()
        click.echo(f"{artifact}: compiled for this machine, as the float64 model on {len(found)} structures")
    if engine is not None:
        importlib.import_module("mlff_lammps.mliap").write_mliap(artifact, out, overwrite=overwrite)
        click.echo(f"{out}: for pair_style mliap unified {out} 1; it names {artifact}, which must stay where it is")


def _run(command: click.Command, args: Sequence[str] | None) -> None:
    try:
        code = command.main(args=args, standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("interrupted", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except MLFFError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:  # a file or disk that cannot be used; anything else is a bug and shows its traceback
        click.echo(f"error: {error.strerror or error}: {error.filename or 'see above'}", err=True)
        sys.exit(1)
    if code:  # of a command that has a verdict
        sys.exit(code)


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of `mlff`."""
    _run(mlff, args)


def export(args: Sequence[str] | None = None) -> None:
    """Entry point of `mlff-export`."""
    _run(mlff_export, args)


if __name__ == "__main__":
    main()
